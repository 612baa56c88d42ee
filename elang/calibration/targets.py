"""What a threshold is to achieve, and which of all thresholds achieves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elang.calibration import bounds, risk
from elang.calibration.bounds import InfeasibleTarget
from elang.calibration.costs import BatchCosts
from elang.calibration.curve import Thresholds
from elang.calibration.risk import RiskBound


class Choice(NamedTuple):
    at: int  # the place of the threshold
    note: str  # what this does and does not prove
    critical: float  # that the bound on the drop is for
    bound: RiskBound | None = None


class Rows(NamedTuple):
    """The calibration rows under one score."""

    score: NDArray[np.float32]  # [N]
    thresholds: Thresholds
    swift_correct: NDArray[np.bool_]  # [N]
    super_correct: NDArray[np.bool_]  # [N]
    candidates: int  # among how many scores these very rows chose this one
    here: NDArray[np.int64]  # [N] which these are, of all rows given

    @property
    def n(self) -> int:
        return len(self.score)


Target = Callable[[Rows, float], Choice]  # of the rows, at a confidence


def nearest_share(share: float) -> Target:
    def choose(rows: Rows, confidence: float) -> Choice:
        index = int(np.argmin(np.abs(rows.thresholds.kept / rows.n - share)))
        picked = ", its score picked on these very rows" if rows.candidates > 1 else ""
        return Choice(index, f"The intervals are for this threshold alone{picked}.", NormalDist().inv_cdf(confidence))

    return choose


def best_accuracy(rows: Rows, confidence: float) -> Choice:
    gain = rows.thresholds.gained - rows.thresholds.lost
    note = f"Picked as the best of {len(gain)} thresholds on these very rows: expect less on others."
    return Choice(int(np.flatnonzero(gain == gain.max())[-1]), note, NormalDist().inv_cdf(confidence))


def within_cost(most: float, costs: BatchCosts) -> Target:
    def choose(rows: Rows, confidence: float) -> Choice:
        t = rows.thresholds
        cost = costs.of_share(1 - t.kept / rows.n)
        affordable = cost <= most
        if not affordable.any():
            raise InfeasibleTarget(f"max_cost: got {most:g} {costs.unit} a row, the least possible is {cost.min():g}")
        gain = np.where(affordable, t.gained - t.lost, -rows.n - 1)
        index = int(np.flatnonzero(gain == gain.max())[-1])
        note = (
            f"A row costs {cost[index]:.4g} {costs.unit} on average ({most:g} allowed), in batches of {costs.rows}. "
            f"Picked as the best of {int(affordable.sum())} affordable thresholds on these very rows: expect less on "
            "others."
        )
        return Choice(index, note, NormalDist().inv_cdf(confidence))

    return choose


def within_drop(most: float) -> Target:
    def choose(rows: Rows, confidence: float) -> Choice:
        t, n = rows.thresholds, rows.n
        critical = bounds.critical_value(n, most, (1 - confidence) / rows.candidates)
        index = bounds.proven(t.gained, t.lost, n, most, critical) - 1
        if index < 1:
            raise InfeasibleTarget(bounds.explain_infeasible(t.kept, t.gained, t.lost, n, most, critical))
        note = (
            f"Over the draw of these {n} rows, with probability of at least {confidence:.4g}, accuracy on rows drawn "
            f"independently from the same population is at most {most:.4g} below Super's (exact paired test at every "
            f"distinct score in turn; the error probability is shared by {rows.candidates} score(s))."
        )
        return Choice(index, note, critical)

    return choose


def agreement(disagree: NDArray[np.generic], alpha: float, delta: float | None) -> Target:
    def choose(rows: Rows, confidence: float) -> Choice:
        if delta is None and rows.candidates > 1:
            raise ValueError("agree: got no delta for a score picked on these rows, wanted one, or score='auto'")
        each = None if delta is None else delta / rows.candidates
        return _bounded(risk.agree(rows.score, disagree[rows.here], alpha, each), delta, rows.candidates, confidence)

    return choose


def error_of_kept(alpha: float, delta: float) -> Target:
    def choose(rows: Rows, confidence: float) -> Choice:
        bound = risk.selective_error(rows.score, ~rows.swift_correct, alpha, delta / rows.candidates)
        return _bounded(bound, delta, rows.candidates, confidence)

    return choose


def _bounded(bound: RiskBound, delta: float | None, candidates: int, confidence: float) -> Choice:
    shared = "" if candidates == 1 else f" (delta is shared by {candidates} scores)"
    statement = dataclasses.replace(bound, delta=delta).statement
    return Choice(bound.index, f"{statement}{shared}", NormalDist().inv_cdf(confidence), bound)
