"""How much better one way to route is than another: areas between curves, with bootstrap intervals over the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elang.calibration.costs import GateCosts
from elang.calibration.gates import GateCurve, budget_area, keeps

RESAMPLES = 1_000
AT_ONCE = 4_000_000  # rows of samples in memory

Floats = NDArray[np.float64]


class Gain(NamedTuple):
    """A difference and its percentile interval (Efron 1979), the rows being drawn anew."""

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} ({self.lower:+.4f} to {self.upper:+.4f})"


def area_gain(
    score: ArrayLike,  # [N]
    swift_quality: ArrayLike,  # [N]
    super_quality: ArrayLike,  # [N]
    control: ArrayLike | None = None,  # [N]
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Gain:
    """Mean quality over all shares of rows kept, routing by `score`, minus that by `control`, or at random (None)."""
    swift, super_ = (np.asarray(q, dtype=np.float64) for q in (swift_quality, super_quality))
    ours, theirs = _area_of(score, swift, super_), None if control is None else _area_of(control, swift, super_)

    def gain(weights: Floats) -> Floats:
        at_random = weights @ (swift + super_) / 2 / len(swift)
        return ours(weights) - (at_random if theirs is None else theirs(weights))

    return _bootstrap(gain, len(swift), confidence, seed)


def gate_gain(
    curve: GateCurve,
    control: GateCurve,
    scores: dict[str, NDArray[np.float32]],  # each [N]
    swift_quality: ArrayLike,  # [N]
    super_quality: ArrayLike,  # [N]
    costs: GateCosts,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Gain:
    """`budget_area` of one way to gate minus that of another, at thresholds that other rows chose."""
    swift, super_ = (np.asarray(q, dtype=np.float64) for q in (swift_quality, super_quality))
    ours, theirs = (_budget_area_of(each, scores, swift, super_, costs) for each in (curve, control))
    return _bootstrap(lambda weights: ours(weights) - theirs(weights), len(swift), confidence, seed)


Statistic = Callable[[Floats], Floats]  # of how often each row counts in each sample [R, N]; [R]


def _bootstrap(statistic: Statistic, n: int, confidence: float, seed: int) -> Gain:
    rng, drawn = np.random.default_rng(seed), list[float]()
    while len(drawn) < RESAMPLES:
        several = min(RESAMPLES - len(drawn), max(1, AT_ONCE // n))
        weights = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(several)])
        drawn += statistic(weights.astype(np.float64)).tolist()
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(drawn, [tail, 1 - tail])
    return Gain(float(statistic(np.ones((1, n)))[0]), float(lower), float(upper))


def _area_of(score: ArrayLike, swift: Floats, super_: Floats) -> Statistic:
    """`calibration.curve.area`, of any quality and of weighted rows."""
    values = np.asarray(score, dtype=np.float32)
    finite = np.isfinite(values)
    distinct, place = np.unique(-values[finite], return_inverse=True)
    gained = (swift - super_)[finite]

    def area(weight: Floats) -> float:
        w, n = weight[finite], weight.sum()
        share = np.append(0.0, np.bincount(place, w, len(distinct)).cumsum()) / n
        quality = (weight @ super_ + np.append(0.0, np.bincount(place, w * gained, len(distinct)).cumsum())) / n
        return float(np.diff(share) @ (quality[1:] + quality[:-1]) / 2 + (1 - share[-1]) * quality[-1])

    return lambda weights: np.array([area(weight) for weight in weights])


def _budget_area_of(
    curve: GateCurve, scores: dict[str, NDArray[np.float32]], swift: Floats, super_: Floats, costs: GateCosts
) -> Statistic:
    early, late = (None if name is None else scores[name] for name in (curve.early, curve.late))
    decoded = np.array([keeps(early, t, len(swift)) for t in curve.early_threshold], dtype=np.float64)
    kept = decoded * [keeps(late, t, len(swift)) for t in curve.late_threshold]
    gained = kept * (swift - super_)

    def areas(weights: Floats) -> Floats:
        n = weights.sum(axis=1, keepdims=True)
        seconds = costs.of_shares(weights @ decoded.T / n, weights @ kept.T / n)
        quality = (weights @ super_[:, None] + weights @ gained.T) / n
        return np.array([budget_area(*point, costs) for point in zip(seconds, quality, strict=True)])

    return areas
