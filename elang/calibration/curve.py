"""Accuracy against the share of rows that Swift keeps, for every threshold that tells the rows apart."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Thresholds(NamedTuple):
    """One entry per distinct decision on n rows, from "route all" (`+inf`) to "keep every finite row" (`-inf`).

    Rows with equal scores are kept or routed together, so there are (distinct finite scores) + 1 entries.
    """

    threshold: NDArray[np.float32]  # [P] descending; between the ends, the score of the last row kept
    kept: NDArray[np.int64]  # [P] rows that Swift keeps
    gained: NDArray[np.int64]  # [P] of these, Swift right and Super wrong
    lost: NDArray[np.int64]  # [P] of these, Swift wrong and Super right


def every_threshold(
    score: NDArray[np.float32],  # [N]
    swift_correct: NDArray[np.bool_],  # [N]
    super_correct: NDArray[np.bool_],  # [N]
) -> Thresholds:
    """Counts at every threshold under the router's rule: keep iff the score is finite and score >= threshold."""
    finite = np.flatnonzero(np.isfinite(score))
    rows = finite[np.argsort(-score[finite], kind="stable")]
    descending = score[rows]
    last = np.flatnonzero(np.append(descending[1:] != descending[:-1], True)) if rows.size else rows

    def running(event: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.append(0, np.cumsum(event[rows])[last])

    threshold = np.append(np.float32(np.inf), descending[last])
    threshold[last.size :] = -np.inf if last.size else np.inf
    return Thresholds(
        threshold,
        np.append(0, last + 1),
        running(swift_correct & ~super_correct),
        running(~swift_correct & super_correct),
    )


def area(share_kept: NDArray[np.float64], accuracy: NDArray[np.float64]) -> float:
    """Mean accuracy over all shares from 0 to 1; ties are crossed in a straight line, as breaking them at random would.

    Where rows with a score that is not finite cap the share, the last accuracy stands for the shares beyond.
    """
    widths, heights = np.diff(share_kept), (accuracy[1:] + accuracy[:-1]) / 2
    return float(widths @ heights + (1 - share_kept[-1]) * accuracy[-1])


def auroc(score: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """The probability that a positive row scores above a negative one, a tie being half a win (Mann and Whitney 1947).

    Raises:
        ValueError: all rows are of one kind.
    """
    wins, negatives = int(positive.sum()), int((~positive).sum())
    if not wins or not negatives:
        raise ValueError(f"positive: got {wins} of {len(positive)} rows, wanted both kinds")
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # of each distinct score, ties sharing the mean
    return float((rank[place[positive]].sum() - wins * (wins + 1) / 2) / (wins * negatives))
