"""The search for a cascade's thresholds: all of them together, on scores that were computed once.

What one threshold is worth hangs on the others, so they are searched by coordinate descent: one after the other, each
over all its distinct values while the others stand, until none can be bettered; from several starts. That is a local
optimum, and never worse than the best single threshold with everything routed on by the other models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import model_validator

from elang.calibration import bounds, costs
from elang.calibration.artefact import Record
from elang.calibration.bounds import Floats

STARTS = (0.0, 0.5, 1.0)  # of a search: all thresholds at this share of their values, from "route all" on
AT_ONCE = 4_000_000  # entries of a table of costs in memory

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class CascadeCosts(Record):
    """Costs of whole batches, measured where the models will serve. Batches shrink along the cascade."""

    unit: str
    rows: int  # of a batch that the first model sees
    first: float  # of the first model on such a batch
    later: tuple[costs.BySize, ...]  # of each model after it; between the sizes measured a straight line
    buckets: bool = False  # batches are filled up to the next size measured, as `bucket` dispatch does

    @model_validator(mode="after")
    def _is_complete(self) -> CascadeCosts:
        if not self.later:
            raise ValueError("later: got no costs, wanted those of at least one model")
        costs.check(self.rows, {f"later[{i}]": each for i, each in enumerate(self.later)}, {"first": self.first})
        return self

    @property
    def of_last(self) -> float:
        """Of a row if the last model answers all, with no other before it."""
        return self.later[-1][self.rows] / self.rows

    def of_shares(self, seen: ArrayLike) -> Floats:
        """Expected cost of a row that gets to each model after the first with these probabilities [n - 1, P]; [P].

        Rows get as far as they do independently of each other.
        """
        shares = np.asarray(seen, dtype=np.float64)
        each = zip(self.later, shares, strict=True)
        return np.asarray(
            (self.first + sum(costs.expected(c, s, self.rows, self.buckets) for c, s in each)) / self.rows
        )


class Totals(NamedTuple):
    """Of N rows, how many P vectors of thresholds send where, and what that changes."""

    seen: Ints  # [n - 1, P] that get to each model after the first
    gained: Ints  # [P] answered rightly where the last model is wrong
    lost: Ints  # [P] the other way round
    differ: Ints  # [P] answered otherwise than by the last model


class Rows:
    """What vectors of thresholds come to on N rows whose scores and answers are known.

    A vector `at` [n - 1] names each threshold by its place among the distinct ones of its score: 0 routes all rows on,
    the last one stops every row whose score is finite.
    """

    def __init__(self, scores: NDArray[np.float32], correct: Bools, differ: Bools, batches: CascadeCosts) -> None:
        """Of scores [n - 1, N]; of each model's answers [n, N], whether right and whether other than the last one's."""
        self.n, self.correct = scores.shape[1], correct
        distinct = [np.unique(-score[np.isfinite(score)]) for score in scores]
        self._descending = distinct  # negated
        self.thresholds = [np.append(np.float32(np.inf), -values) for values in distinct]
        for thresholds in self.thresholds:
            thresholds[1:][-1:] = -np.inf
        places = [
            np.where(np.isfinite(score), np.searchsorted(values, -score), len(values))
            for score, values in zip(scores, distinct, strict=True)
        ]
        self._place = np.stack([*places, np.full(self.n, -1)])  # a row stops below `at`; at the last model it must
        self._surest_first = self._place.argsort(axis=1, kind="stable")
        models = np.arange(len(correct))
        seen = np.broadcast_to(models[:, None, None] >= models[1:, None], (len(models), len(models) - 1, self.n))
        events = np.stack([correct & ~correct[-1], ~correct & correct[-1], differ], axis=1)
        # [n, N, Q]: what each row adds to each of the totals if this model answers it.
        self._adds = np.concatenate([seen, events], axis=1).swapaxes(1, 2).astype(np.int64, order="C")
        shares = np.array_split(np.arange(self.n + 1) / self.n, math.ceil(self.n * batches.rows / AT_ONCE))
        self.batches = batches
        self._cost_of = [  # by how many of the rows get to the model
            np.concatenate([costs.expected(by_size, part, batches.rows, batches.buckets) for part in shares])
            for by_size in batches.later
        ]

    def thresholds_of(self, at: Ints) -> list[float]:
        return [float(thresholds[place]) for thresholds, place in zip(self.thresholds, at, strict=True)]

    def at(self, thresholds: Sequence[float]) -> Ints:
        """The vector that stops what these thresholds, of other rows maybe, stop."""
        pairs = zip(self._descending, thresholds, strict=True)
        return np.array([np.searchsorted(values, -np.float32(t), side="right") for values, t in pairs])

    def answered_by(self, at: Ints) -> Ints:
        """[N]: the model that answers each row."""
        return np.asarray((self._place < np.append(at, 0)[:, None]).argmax(axis=0))

    def totals(self, at: Ints) -> Totals:
        return _totals(self._adds[self.answered_by(at), np.arange(self.n)].sum(axis=0)[None])

    def along(self, k: int, at: Ints) -> Totals:
        """For every threshold of score k, while the others stand."""
        others = at.copy()
        others[k] = 0
        onward = self.answered_by(others)  # if model k stops nothing
        rows = self._surest_first[k]
        rows = rows[onward[rows] > k]  # those that get to it
        start = self._adds[onward, np.arange(self.n)].sum(axis=0)
        changes = self._adds[k, rows] - self._adds[onward[rows], rows]
        stopped = np.searchsorted(self._place[k, rows], np.arange(len(self.thresholds[k])))
        return _totals(np.concatenate([start[None], changes]).cumsum(axis=0)[stopped])

    def cost(self, totals: Totals) -> Floats:
        """Of a row, on average; [P]."""
        # Summed in one order: equal counts are to cost the same to the last bit, or a search might go in circles.
        each = [table[seen] for table, seen in zip(self._cost_of, totals.seen, strict=True)]
        return np.asarray((self.batches.first + sum(each)) / self.batches.rows)


def _totals(columns: Ints) -> Totals:  # [P, Q]
    return Totals(columns[:, :-3].T, *columns[:, -3:].T)


# Of totals and costs: what is to be least, by the first that differs. The first is 0 where the target is met.
Goal = Callable[[Totals, Floats], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]


def most_accurate(max_cost: float) -> Goal:
    return lambda totals, cost: (np.maximum(cost - max_cost, 0), totals.lost - totals.gained, cost)


def cheapest_with_statistic(least: float, n: int, max_drop: float) -> Goal:
    """Of those for which the test of `max_drop` has at least this statistic."""

    def goal(totals: Totals, cost: Floats) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        statistic = bounds.drop_statistic(totals.gained, totals.lost, n, max_drop)
        return np.maximum(least - statistic, 0), cost, totals.lost - totals.gained

    return goal


def cheapest_differing(most: float) -> Goal:
    """Of those that answer at most so many rows otherwise than the last model."""
    return lambda totals, cost: (np.maximum(totals.differ - most, 0), cost, totals.lost - totals.gained)


def search(rows: Rows, goal: Goal, more_starts: Iterable[Ints] = ()) -> tuple[Ints, float]:
    """The best vector that coordinate descent finds, and by how much it misses the target: 0 where it meets it.

    A step takes the best of all thresholds of one score, the others standing; of equally good ones, that which sends
    fewest rows on. From "route all" the first step, on each score in turn, finds the best single threshold; no later
    step makes it worse. Deterministic.
    """
    last = np.array([len(thresholds) - 1 for thresholds in rows.thresholds])
    starts = [*more_starts, *(np.rint(share * last).astype(np.int64) for share in STARTS)]
    found = [_descend(rows, goal, start, first) for start in starts for first in range(len(last))]
    value, at = min(found, key=lambda each: each[0])
    return at, value[0]


def _descend(rows: Rows, goal: Goal, start: Ints, first: int) -> tuple[tuple[float, ...], Ints]:
    at, k, unchanged = start.copy(), first, 0
    value, _ = _least(rows, goal, rows.totals(at))
    while unchanged < len(at):
        unchanged += 1
        new, best = _least(rows, goal, rows.along(k, at))
        if new < value:
            at[k], value, unchanged = best, new, 1  # this score is at its best until another moves
        k = (k + 1) % len(at)
    return value, at


def _least(rows: Rows, goal: Goal, totals: Totals) -> tuple[tuple[float, ...], int]:
    columns = *goal(totals, rows.cost(totals)), totals.seen.sum(axis=0)
    best = int(np.lexsort(columns[::-1])[0])
    return tuple(float(column[best]) for column in columns), best
