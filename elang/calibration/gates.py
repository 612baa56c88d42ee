"""`calibrate_gates`: thresholds of one gate or two, before and behind Swift's decoding, on costs that were measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elang.calibration.artefact import Artefact, Float32, Provenance, Record
from elang.calibration.costs import GateCosts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = 101  # thresholds of a gate

Floats = NDArray[np.float64]


class Outcome(NamedTuple):
    """What pairs of thresholds come to on some rows."""

    seconds: Floats  # [P] of a row, on average
    quality: Floats  # [P]
    share_decoded: Floats  # [P] of the rows, by Swift
    share_kept: Floats  # [P]


class GateCurve(Record):
    """The best quality for the time, from the quickest point on: columns."""

    early: str | None  # the score of gate 1; None: there is none, and every row is decoded
    late: str | None  # the score of gate 2; None: every decoded row is kept
    area: float  # mean of the best quality within a budget, over budgets from Swift's time to Super's
    seconds: tuple[float, ...]
    quality: tuple[float, ...]
    share_decoded: tuple[float, ...]
    share_kept: tuple[float, ...]
    early_threshold: tuple[Float32, ...]
    late_threshold: tuple[Float32, ...]


class GateCalibration(Artefact):
    """Thresholds for a `Router` before and a `LateRouter` behind Swift's decoding, with the evidence for them."""

    version: Literal[1] = 1
    early: str | None
    late: str | None
    early_threshold: Float32
    late_threshold: Float32
    target: Literal["max_seconds", "max_drop"]
    value: float
    seconds: float  # of the point chosen, on these rows, as are the others
    quality: float
    share_decoded: float
    share_kept: float
    n: int
    costs: GateCosts
    swift_quality: float
    super_quality: float
    provenance: Provenance
    curves: dict[str, GateCurve]

    def random_quality(self, seconds: ArrayLike) -> Floats:
        """Expected from routing rows at random, before anything runs: the straight line from Swift to Super."""
        low, high = self.costs.of_swift, self.costs.of_super
        share_routed = (np.asarray(seconds) - low) / (high - low)
        return np.asarray(self.swift_quality + share_routed * (self.super_quality - self.swift_quality))

    def summary(self) -> str:
        """What these thresholds do on the calibration rows, and what each way of gating is worth there."""
        gates = [f"{self.early} is at least {np.float32(self.early_threshold)!s}"] if self.early else []
        if self.late:
            gates.append(f"{self.late} of what it decoded is at least {np.float32(self.late_threshold)!s}")
        areas = ", ".join(f"{name} {curve.area:.4f}" for name, curve in self.curves.items())
        return (
            f"A row stays with Swift if its {' and the '.join(gates)}. On {self.n} rows Swift decodes "
            f"{self.share_decoded:.1%} and keeps {self.share_kept:.1%}: quality {self.quality:.4f} (Super "
            f"{self.super_quality:.4f}, Swift {self.swift_quality:.4f}, random routing in the same time "
            f"{self.random_quality(self.seconds):.4f}), {1e3 * self.seconds:.3g} ms a row (Super "
            f"{1e3 * self.costs.of_super:.3g}, Swift {1e3 * self.costs.of_swift:.3g}). Mean of the best quality within "
            f"a budget between those times: {areas}. Picked on these very rows: expect less on others."
        )

    def plot(self, path: str | Path | None = None) -> Figure:
        """Quality against time of every way to gate, written to `path` if given. Needs `elang[report]`."""
        from elang.calibration.plot import plot_gates

        figure: Figure = plot_gates(self)
        if path is not None:
            figure.savefig(path)
        return figure


def calibrate_gates(
    early: Mapping[str, ArrayLike],  # each [N] float32
    late: Mapping[str, ArrayLike],  # each [N] float32
    swift_quality: ArrayLike,  # [N]
    super_quality: ArrayLike,  # [N]
    costs: GateCosts,
    *,
    max_seconds: float | None = None,
    max_drop: float | None = None,
    provenance: Provenance | None = None,
) -> GateCalibration:
    """Choose the gates and their thresholds: every early score alone, every late one, every pair.

    Time is of batches: Swift's encoder on all rows, its decoder on those that gate 1 keeps, Super on those that either
    gate routes, each part as long as one of its size was measured to take.

    Args:
        early: scores known before Swift decodes, by name, such as the energy head's.
        late: scores of what Swift decoded (`elang.late_scores`), of all N rows.
        swift_quality, super_quality: of each model's output for each row: right or not, or any figure that is better
            when higher and whose mean counts.
        max_seconds: target: the best quality within this time for a row, on average.
        max_drop: target: the least time with a mean quality of at most this below Super's on these rows. Nothing is
            proven about others.

    Raises:
        ValueError: an argument that is not as described, by its name; a target out of reach; a Super that is not
            slower than Swift.
    """
    swift, super_ = _quality("swift_quality", swift_quality), _quality("super_quality", super_quality)
    n = len(swift)
    if len(super_) != n:
        raise ValueError(f"super_quality: got {len(super_)} rows, wanted {n} as in swift_quality")
    if (max_seconds is None) == (max_drop is None):
        raise ValueError("max_seconds, max_drop: got both or neither, wanted one target")
    if not costs.of_swift < costs.of_super < math.inf:
        raise ValueError(
            f"costs: got {costs!r}, wanted a Super that takes longer than Swift: else nothing is to be won"
        )
    scores = {name: _score(name, values, n) for name, values in {**early, **late}.items()}
    if not scores or len(scores) < len(early) + len(late):
        raise ValueError(f"early, late: got {', '.join([*early, *late]) or 'none'}, wanted names of at least one score")
    pairs = [*((name, None) for name in early), *((None, name) for name in late), *itertools.product(early, late)]
    curves = {}
    for first, second in pairs:
        name = " + ".join(score for score in (first, second) if score is not None)
        curves[name] = _curve(first, second, scores, swift, super_, costs)

    super_mean = float(super_.mean())
    found: list[tuple[float, float, GateCurve, int]] = []  # the less the better, by two counts
    for curve in curves.values():
        for i, (seconds, quality) in enumerate(zip(curve.seconds, curve.quality, strict=True)):
            if max_seconds is not None and seconds <= max_seconds:
                found.append((-quality, seconds, curve, i))
            if max_drop is not None and quality >= super_mean - max_drop:
                found.append((seconds, -quality, curve, i))
    if not found:
        asked = f"max_seconds: got {max_seconds}" if max_drop is None else f"max_drop: got {max_drop}"
        quickest = min(curve.seconds[0] for curve in curves.values())
        best = max(curve.quality[-1] for curve in curves.values())
        raise ValueError(
            f"{asked}, out of reach: the quickest takes {quickest:.4g} s a row, the best is at {best:.4g} and Super at "
            f"{super_mean:.4g}"
        )
    _, _, curve, i = min(found, key=lambda point: point[:2])
    return GateCalibration(
        early=curve.early,
        late=curve.late,
        early_threshold=curve.early_threshold[i],
        late_threshold=curve.late_threshold[i],
        target="max_seconds" if max_drop is None else "max_drop",
        value=float(max_seconds if max_seconds is not None else max_drop),  # type: ignore[arg-type]
        seconds=curve.seconds[i],
        quality=curve.quality[i],
        share_decoded=curve.share_decoded[i],
        share_kept=curve.share_kept[i],
        n=n,
        costs=costs,
        swift_quality=float(swift.mean()),
        super_quality=super_mean,
        provenance=provenance or Provenance(),
        curves=curves,
    )


def gate_outcome(
    early: ArrayLike | None,  # [N] float32; None: no gate 1
    late: ArrayLike | None,  # [N] float32; None: no gate 2
    early_threshold: ArrayLike,  # [P]
    late_threshold: ArrayLike,  # [P]
    swift_quality: ArrayLike,  # [N]
    super_quality: ArrayLike,  # [N]
    costs: GateCosts,
) -> Outcome:
    """What each pair of thresholds would have come to on these rows."""
    swift, super_ = _quality("swift_quality", swift_quality), _quality("super_quality", super_quality)
    columns: dict[str, list[float]] = {name: [] for name in Outcome._fields}
    for first, second in zip(np.atleast_1d(early_threshold), np.atleast_1d(late_threshold), strict=True):
        decoded = keeps(early, first, len(swift))
        kept = decoded & keeps(late, second, len(swift))
        share_decoded, share_kept = float(decoded.mean()), float(kept.mean())
        columns["seconds"].append(float(costs.of_shares(share_decoded, share_kept)))
        columns["quality"].append(float(np.where(kept, swift, super_).mean()))
        columns["share_decoded"].append(share_decoded)
        columns["share_kept"].append(share_kept)
    return Outcome(**{name: np.array(values) for name, values in columns.items()})


def budget_area(seconds: ArrayLike, quality: ArrayLike, costs: GateCosts) -> float:
    """Mean of the best quality within a budget, over all budgets from Swift's time for a row to Super's.

    Where no point is quick enough the quickest counts.
    """
    at, best = _frontier(np.asarray(seconds, dtype=np.float64), np.asarray(quality, dtype=np.float64))
    low, high = costs.of_swift, costs.of_super
    time, height = np.asarray(seconds, dtype=np.float64)[at], best[at]
    edges = np.clip(np.append(time, high), low, high)
    edges[0] = low
    return float((np.diff(edges) * height).sum() / (high - low))


def _curve(
    early: str | None,
    late: str | None,
    scores: Mapping[str, NDArray[np.float32]],
    swift: Floats,
    super_: Floats,
    costs: GateCosts,
) -> GateCurve:
    """Every pair of two gates' levels at once, by sums over a histogram of the first level that keeps a row."""
    n = len(swift)
    first, of_first = _levels(None if early is None else scores[early], n)
    second, of_second = _levels(None if late is None else scores[late], n)
    shape = len(first) + 1, len(second) + 1  # the last bin: a row that no level keeps

    def kept(weight: Floats) -> Floats:
        cells = np.bincount(of_first * shape[1] + of_second, weight, shape[0] * shape[1]).reshape(shape)
        return np.asarray(cells.cumsum(axis=0).cumsum(axis=1)[:-1, :-1])

    decoded = np.bincount(of_first, minlength=shape[0]).cumsum()[:-1, None] / n
    share_kept = kept(np.ones(n)) / n
    quality = super_.mean() + kept(swift - super_) / n
    seconds = costs.of_shares(decoded, share_kept)
    at, _ = _frontier(seconds.ravel(), quality.ravel())
    i, j = np.unravel_index(at, share_kept.shape)

    def column(values: NDArray[np.floating]) -> tuple[float, ...]:
        return tuple(values.astype(np.float64).tolist())

    return GateCurve(
        early=early,
        late=late,
        area=budget_area(seconds.ravel(), quality.ravel(), costs),
        seconds=column(seconds[i, j]),
        quality=column(quality[i, j]),
        share_decoded=column(decoded[i, 0]),
        share_kept=column(share_kept[i, j]),
        early_threshold=column(first[i]),
        late_threshold=column(second[j]),
    )


def _levels(score: NDArray[np.float32] | None, n: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Thresholds from "route all" to "keep every finite row", and for each row the first that keeps it."""
    if score is None:
        return np.array([-np.inf], dtype=np.float32), np.zeros(n, dtype=np.int64)
    finite = np.isfinite(score)
    inner = np.unique(np.quantile(score[finite], np.linspace(0, 1, LEVELS), method="nearest"))[:0:-1]
    levels = np.concatenate(([np.inf], inner, [-np.inf])).astype(np.float32)
    at = np.searchsorted(-levels, -np.where(finite, score, -np.inf), side="left")
    return levels, np.where(finite, at, len(levels))


def _frontier(seconds: Floats, quality: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The points that no other beats in both, by time; and for each point of all the best quality in its time."""
    order = np.lexsort((-quality, seconds))
    best = np.maximum.accumulate(quality[order])
    better = np.append(True, best[1:] > best[:-1])
    within = np.empty_like(best)
    within[order] = best
    return order[better], within


def keeps(score: ArrayLike | None, threshold: float, n: int) -> NDArray[np.bool_]:
    """[n]: what a gate with this score keeps; without one, everything."""
    if score is None:
        return np.ones(n, dtype=np.bool_)
    values = np.asarray(score, dtype=np.float32)
    return np.isfinite(values) & (values >= np.float32(threshold))


def _quality(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ValueError(f"{name}: got {array.dtype} {list(array.shape)}, wanted finite numbers [N] with N >= 1")
    return array.astype(np.float64)


def _score(name: str, values: ArrayLike, n: int) -> NDArray[np.float32]:
    array = np.asarray(values)
    if array.shape != (n,) or array.dtype.kind not in "fiu" or not np.isfinite(array).any():
        raise ValueError(f"{name}: got {array.dtype} {list(array.shape)}, wanted float32 [{n}], some of it finite")
    return array.astype(np.float32)
