"""What the joint model does at each threshold: everything on the page that moves with the slider, from rows alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elang.calibration import BatchCosts, Curve, calibrate
from elang.calibration.bounds import wilson_interval
from elang.calibration.curve import every_threshold
from elang.evaluation.answered import AnsweredRows

MOST = 201  # thresholds on a page
CONFIDENCE = 0.95
BINS = 40  # of the histogram
RELIABILITY_BINS = 10
SHARES = np.linspace(0, 1, 101)  # kept, of random routing

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Points:
    """P <= 201 thresholds of a run's score, from "route all" to "keep every finite row", and what each does."""

    rows: AnsweredRows
    score: NDArray[np.float32]  # [N]
    swift_right: NDArray[np.bool_]  # [N]
    super_right: NDArray[np.bool_]  # [N]
    descending: Counts  # rows with a finite score, the highest first
    threshold: NDArray[np.float32]  # [P]
    kept: Counts  # [P] rows: the first of `descending`
    initial: int  # the place of the first threshold that was asked for

    @property
    def n(self) -> int:
        return len(self.score)

    def of_kept(self, values: ArrayLike) -> Counts:
        """Sum of whole numbers [N] over the rows that each threshold keeps; [P]."""
        ordered = np.asarray(values).astype(np.int64)[self.descending]
        return np.append(0, np.cumsum(ordered))[self.kept]

    def of_joint(self, swift: ArrayLike, super_: ArrayLike) -> Counts:
        """Sum of whole numbers [N] over all rows, `swift` of the kept ones and `super_` of the routed ones; [P]."""
        ours, theirs = (np.asarray(values).astype(np.int64) for values in (swift, super_))
        return self.of_kept(ours - theirs) + int(theirs.sum())

    @property
    def share(self) -> Floats:
        return self.kept / self.n

    @property
    def kept_wrong(self) -> Counts:
        return self.of_kept(~self.swift_right)

    @property
    def right(self) -> Counts:
        return self.of_joint(self.swift_right, self.super_right)

    @property
    def accuracy(self) -> Floats:
        return self.right / self.n

    @property
    def interval(self) -> tuple[Floats, Floats]:
        """Wilson's, of each accuracy by itself."""
        return wilson_interval(self.right, self.n, CONFIDENCE)

    def at_random(self, share: ArrayLike) -> Floats:
        """Expected accuracy where these shares of the rows are kept, whichever they are."""
        swift, super_ = self.swift_right.mean(), self.super_right.mean()
        return np.asarray(super_ + np.asarray(share) * (swift - super_))

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Of every score that is finite for some row, by name."""
        scores = {name: self.rows.score_values(name) for name in self.rows.scores}
        usable = {name: values for name, values in scores.items() if np.isfinite(values).any()}
        right = self.swift_right, self.super_right
        return calibrate(usable, *right, score=self.rows.score, confidence=CONFIDENCE).curves


def operating_points(rows: AnsweredRows) -> Points:
    """Every distinct decision that the score of a run can make, or about 200 of them, evenly spread over the rows."""
    score = rows.score_values(rows.score)
    swift, super_ = np.array(rows.swift_right), np.array(rows.super_right)
    finite = np.flatnonzero(np.isfinite(score))
    every = every_threshold(score, swift, super_)
    asked = np.float32(rows.thresholds[0])
    of_asked = int(np.searchsorted(every.kept, np.count_nonzero(score[finite] >= asked)))
    evenly = np.searchsorted(every.kept, np.linspace(0, every.kept[-1], MOST - 1))
    shown = np.unique(np.append(evenly, of_asked))
    initial = int(np.searchsorted(shown, of_asked))
    threshold = every.threshold[shown]
    threshold[initial] = asked  # the same decision on these rows
    return Points(
        rows=rows,
        score=score,
        swift_right=swift,
        super_right=super_,
        descending=finite[np.argsort(-score[finite], kind="stable")],
        threshold=threshold,
        kept=every.kept[shown],
        initial=initial,
    )


class Cost(NamedTuple):
    """Of a row on average, relative to Super alone."""

    joint: Floats  # [P]
    random: Floats  # at `SHARES`
    swift: float  # alone
    oracle: float  # that keeps exactly what Swift has right


def flops_cost(points: Points) -> Cost:
    """Each row at its own length. A routed row costs what Swift spent before it was routed, and Super."""
    rows = points.rows
    swift, super_ = (np.array(flops, dtype=np.int64) for flops in (rows.swift_flops, rows.super_flops))
    routed = super_ + np.array(rows.gate_flops.get(rows.score, rows.swift_flops), dtype=np.int64)
    alone = super_.sum()
    return Cost(
        joint=points.of_joint(swift, routed) / alone,
        random=(SHARES * swift.sum() + (1 - SHARES) * routed.sum()) / alone,
        swift=float(swift.sum() / alone),
        oracle=float(np.where(points.swift_right, swift, routed).sum() / alone),
    )


def time_cost(points: Points, costs: BatchCosts) -> Cost:
    """Expected on whole batches, from measured costs of batches: rows are routed independently of each other."""
    alone = costs.super[costs.rows] / costs.rows
    return Cost(
        joint=costs.of_share(1 - points.share) / alone,
        random=costs.of_share(1 - SHARES) / alone,
        swift=costs.swift / costs.rows / alone,
        oracle=float(costs.of_share(1 - points.swift_right.mean())[0] / alone),
    )


class Histogram(NamedTuple):
    """Rows by their score, those that are not finite left out."""

    edges: Floats  # [B + 1]
    kept_right: Counts  # [P, B]
    kept_wrong: Counts
    routed: Counts


def histogram(points: Points) -> Histogram:
    finite = points.score[points.descending].astype(np.float64)
    edges = np.histogram_bin_edges(finite, BINS)
    place = np.full(points.n, -1)
    place[points.descending] = np.clip(np.searchsorted(edges, finite, side="right") - 1, 0, BINS - 1)
    bins = [place == b for b in range(BINS)]
    right = np.stack([points.of_kept(rows & points.swift_right) for rows in bins], axis=1)
    wrong = np.stack([points.of_kept(rows & ~points.swift_right) for rows in bins], axis=1)
    return Histogram(edges, right, wrong, np.array([rows.sum() for rows in bins]) - right - wrong)


class Reliability(NamedTuple):
    """How often Swift is right in each bin of its rows."""

    confidence: Floats  # [B] mean `max_prob`; or where there is none, the middle of the bin's ranks, as a share
    right: Floats  # [B] share
    lower: Floats
    upper: Floats
    n: Counts  # [B] rows
    ece: float | None  # expected calibration error; None: the score is no probability


def reliability(points: Points) -> Reliability:
    """By `max_prob` in ten bins of equal width where it is a score, else by the score in ten bins of equal rows.

    The expected calibration error is the mean distance of confidence and share right over the bins, by rows (Guo et
    al. 2017). Rows whose score is not finite are left out.
    """
    rows = points.rows
    is_probability = "max_prob" in points.curves
    score = rows.score_values("max_prob") if is_probability else points.score
    finite = np.flatnonzero(np.isfinite(score))
    if is_probability:
        value = score[finite].astype(np.float64)
        place = np.clip((value * RELIABILITY_BINS).astype(np.int64), 0, RELIABILITY_BINS - 1)
    else:
        order = np.argsort(np.argsort(score[finite], kind="stable"), kind="stable")
        value = (order + 0.5) / len(finite)
        place = order * RELIABILITY_BINS // len(finite)
    count = np.bincount(place, minlength=RELIABILITY_BINS)
    some = np.flatnonzero(count)
    count = count[some]
    right = np.bincount(place, points.swift_right[finite], RELIABILITY_BINS)[some]
    confidence = np.bincount(place, value, RELIABILITY_BINS)[some] / count
    intervals = [wilson_interval(r, int(n), CONFIDENCE) for r, n in zip(right, count, strict=True)]
    lower, upper = np.array(intervals, dtype=np.float64).reshape(-1, 2).T
    ece = float(count @ np.abs(right / count - confidence) / count.sum()) if is_probability else None
    return Reliability(confidence, right / count, lower, upper, count, ece)


class ByLabel(NamedTuple):
    label: str
    rows: int
    swift: float  # share right
    super: float
    joint: Floats  # [P]
    share_kept: Floats  # [P]


def by_label(points: Points) -> list[ByLabel]:
    """One for each label that is right for some row; none where answers are free text."""
    rows = points.rows
    if not rows.labels:
        return []
    target, labels = np.array(rows.target), []
    for label in dict.fromkeys((*rows.labels, *rows.target)):
        if n := int((of_label := target == label).sum()):
            swift, super_ = of_label & points.swift_right, of_label & points.super_right
            joint, kept = points.of_joint(swift, super_) / n, points.of_kept(of_label) / n
            labels.append(ByLabel(label, n, swift.sum() / n, super_.sum() / n, joint, kept))
    return labels


class Example(NamedTuple):
    row: int
    kept_from: int  # the place of the first threshold that keeps it; P: none does


def hardest(points: Points, most: int = 20) -> tuple[list[Example], list[Example]]:
    """Rows that Swift has wrong, the highest score first; rows that it alone has right, the lowest score first.

    At each threshold those of the first that are kept, and those of the second that are routed, are its worst.
    """
    finite = np.isfinite(points.score)
    rank = np.full(points.n, points.n)
    rank[points.descending] = np.arange(len(points.descending))
    kept_from = np.searchsorted(points.kept, rank, side="right")
    upwards = np.concatenate((np.flatnonzero(~finite), points.descending[::-1]))

    def first(rows: Counts) -> list[Example]:
        return [Example(int(row), int(kept_from[row])) for row in rows[:most]]

    wrong = points.descending[~points.swift_right[points.descending]]
    return first(wrong), first(upwards[(points.swift_right & ~points.super_right)[upwards]])


def outcomes(points: Points, costs: BatchCosts | None) -> dict[str, NDArray[np.generic]]:
    """The figures of every threshold, each [P], by name."""
    n, (lower, upper) = points.n, points.interval
    only_swift = points.swift_right & ~points.super_right
    of_time = {} if costs is None else {"time_speedup": 1 / time_cost(points, costs).joint}
    return {
        "threshold": points.threshold,
        "share_kept": points.share,
        "accuracy": points.accuracy,
        "lower": lower,
        "upper": upper,
        "random_accuracy": points.at_random(points.share),
        "flops_speedup": 1 / flops_cost(points).joint,
        **of_time,
        "kept": points.kept,
        "kept_wrong": points.kept_wrong,
        "routed": n - points.kept,
        "routed_in_vain": only_swift.sum() - points.of_kept(only_swift),  # though Swift alone was right
        "wrong": n - points.right,
    }
