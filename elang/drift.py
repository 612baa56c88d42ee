"""Whether the rows that come are still like those of the calibration: histograms, distances, bounds. Plain arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elang.calibration import Calibration
from elang.calibration.bounds import Counts, wilson_interval
from elang.calibration.risk import binomial_cdf

LOWEST = float(np.finfo(np.float32).min)
BEYOND = 100  # edges on either side of the quantiles


@dataclass(frozen=True)
class Bins:
    """Where scores are counted: bin 0 holds -inf, bin i the scores in [edge i-1, edge i), the last one inf and NaN.

    Edges are the thresholds of the calibration's curve, which are quantiles of the score on its rows, and the one
    chosen. They go on beyond the outermost, in even steps and as far as these lie apart, to resolve traffic that moved.
    """

    edges: NDArray[np.float32]  # [P] ascending, from the lowest float32 to inf
    kept: Counts  # [P] calibration rows that a threshold at each edge keeps
    known: Counts  # the edges at which the calibration tells that; beyond the quantiles it does not
    tenths: Counts  # at most 9 edges, which cut the calibration rows into parts as equal as ties let them be
    chosen: int  # the edge at the calibration's threshold

    @classmethod
    def of(cls, calibration: Calibration) -> Bins:
        c = calibration
        share = {**dict(zip(c.curve.threshold, c.curve.share_kept, strict=True)), c.threshold: c.target.share_kept}
        quantiles = np.array(sorted(filter(math.isfinite, share)))
        if not quantiles.size:
            raise ValueError(f"calibration: got one whose {c.score} is the same on all rows, wanted two values or more")
        steps = (quantiles[-1] - quantiles[0]) * np.arange(1, BEYOND + 1) / BEYOND
        edges = np.concatenate(([LOWEST], quantiles[0] - steps, quantiles, quantiles[-1] + steps, [np.inf]))
        with np.errstate(over="ignore"):
            edges = np.unique(edges.astype(np.float32).clip(LOWEST))
        kept = np.rint(c.n * np.array([share[t] for t in quantiles]))
        places = np.searchsorted(edges, quantiles)
        return cls(
            edges=edges,
            kept=np.interp(edges, quantiles, kept, left=c.n - c.curve.not_finite, right=0).astype(np.int64),
            known=np.unique(np.append(0, places)),
            tenths=np.unique([places[np.argmin(np.abs(kept - c.n * tenth / 10))] for tenth in range(1, 10)]),
            chosen=int(np.searchsorted(edges, np.float32(c.threshold))),
        )


def kept_at_edges(histogram: NDArray[Any]) -> NDArray[Any]:
    """Rows [P] that a threshold at each edge keeps, of a histogram [P + 1]."""
    return np.append(histogram[1:-1][::-1].cumsum()[::-1], 0)


class Totals(NamedTuple):
    """Counts since the monitor was made."""

    histogram: Counts  # [P + 1], of scores in the monitor's bins
    routed: int
    shadow_rows: int  # kept rows that Super answered too
    shadow_disagreements: int  # of these, where it answered otherwise


@dataclass(frozen=True)
class Shadow:
    """How often Super answers otherwise than Swift on the rows that Swift keeps, from a sample of these."""

    rows: int
    disagreements: int
    confidence: float

    @property
    def upper(self) -> float:
        """Upper bound on the probability of disagreement, for one look at a time fixed beforehand.

        The exact binomial one (Clopper and Pearson 1934), for independent rows of one population.
        """
        k, n = self.disagreements, self.rows
        return _highest(k, n, lambda p: float(binomial_cdf(k, n, p)) > 1 - self.confidence)

    @property
    def upper_always(self) -> float:
        """The same for a look after every row: with probability >= `confidence` it holds at all of them together.

        The likelihood averaged over a Beta(1/2, 1/2) prior exceeds 1 / (1 - confidence) times that of the true
        probability with probability <= 1 - confidence, ever (Ville 1939; Robbins 1970). For rows drawn as for `upper`.
        """
        k, n = self.disagreements, self.rows
        average = math.lgamma(k + 0.5) + math.lgamma(n - k + 0.5) - math.lgamma(n + 1) - math.log(math.pi)
        least = average + math.log(1 - self.confidence)
        return _highest(k, n, lambda p: k * math.log(p) + (n - k) * math.log1p(-p) > least)


@dataclass(frozen=True)
class DriftReport:
    """The rows of a window against the calibration's, a row without a finite score being below every score."""

    rows: int
    not_finite: int  # of these, rows whose score is not finite
    calibration_rows: int
    share_kept: float | None  # by the calibrated threshold, wherever the router's is now; None: no rows
    lower: float  # two-sided Wilson interval of `share_kept`
    upper: float
    calibration_share_kept: float
    share_routed: float | None  # by the router, and a late gate if there is one
    psi: float  # population stability index, over tenths of the calibration rows; half a row is added to each count
    psi_limit: float  # the limit asked for, or what chance passes with probability `significance` if that is more
    ks: float  # Kolmogorov-Smirnov distance at the edges of all bins: at most that of the scores themselves
    ks_p_value: float  # at least that of `ks`: the first term of Kolmogorov's series, for large samples
    significance: float
    confidence: float  # of the intervals and bounds
    shadow: Shadow | None  # None: no row was sampled

    @property
    def crossed(self) -> tuple[str, ...]:
        """The measures past their limits."""
        psi, ks = self.psi > self.psi_limit, self.ks_p_value < self.significance
        return ("PSI",) * psi + ("KS",) * ks

    @property
    def drifted(self) -> bool:
        return bool(self.crossed)

    def summary(self) -> str:
        """What was seen, against what, and whether that is drift, in one paragraph."""
        if self.share_kept is None:
            return "No rows yet."
        level = f"{100 * self.confidence:.4g}%"
        text = (
            f"{'Drift by ' + ' and '.join(self.crossed) if self.drifted else 'No drift'}: of {self.rows} rows "
            f"({self.not_finite} with a score that is not finite) the calibrated threshold keeps {self.share_kept:.1%} "
            f"({level} interval {self.lower:.1%} to {self.upper:.1%}), of the {self.calibration_rows} calibration rows "
            f"{self.calibration_share_kept:.1%}. PSI {self.psi:.3g} (limit {self.psi_limit:.3g}); KS distance at least "
            f"{self.ks:.3g}, p <= {self.ks_p_value:.2g} (limit {self.significance:.3g})."
        )
        if (s := self.shadow) is not None:
            text += (
                f" Super answers {s.disagreements} of {s.rows} kept rows otherwise: at most {s.upper:.2%} with {level} "
                f"confidence at a single look, {s.upper_always:.2%} at every look."
            )
        return text


def compare(c: Calibration, bins: Bins, window: Totals, psi_limit: float, significance: float) -> DriftReport:
    """The rows of a window against the calibration's."""
    rows, kept = int(window.histogram.sum()), kept_at_edges(window.histogram)
    lower, upper, psi, ks, p_value = 0.0, 1.0, 0.0, 0.0, 1.0
    if rows:
        lower, upper = (float(end) for end in wilson_interval(kept[bins.chosen], rows, c.confidence))
        ks = float(np.abs(kept / rows - bins.kept / c.n)[bins.known].max())
        p_value = min(1.0, 2 * math.exp(-2 * ks**2 * rows * c.n / (rows + c.n)))
        now, then = (
            -np.diff(np.concatenate(([total], counts[bins.tenths], [0])))
            for total, counts in ((rows, kept), (c.n, bins.kept))
        )
        psi = _stability_index(now, then)
        psi_limit = max(psi_limit, (1 / rows + 1 / c.n) * _chi_square_quantile(1 - significance, now.size - 1))
    return DriftReport(
        rows=rows,
        not_finite=int(window.histogram[0] + window.histogram[-1]),
        calibration_rows=c.n,
        share_kept=int(kept[bins.chosen]) / rows if rows else None,
        lower=lower,
        upper=upper,
        calibration_share_kept=int(bins.kept[bins.chosen]) / c.n,
        share_routed=window.routed / rows if rows else None,
        psi=psi,
        psi_limit=psi_limit,
        ks=ks,
        ks_p_value=p_value,
        significance=significance,
        confidence=c.confidence,
        shadow=Shadow(window.shadow_rows, window.shadow_disagreements, c.confidence) if window.shadow_rows else None,
    )


def _stability_index(now: Counts, then: Counts) -> float:
    """Population stability index of two histograms; half a row more in each bin keeps it finite where one is empty."""
    p, q = ((counts + 0.5) / (counts.sum() + 0.5 * counts.size) for counts in (now, then))
    return float((p - q) @ np.log(p / q))


def _chi_square_quantile(probability: float, freedom: int) -> float:
    """By the cube root that is nearly normal (Wilson and Hilferty 1931)."""
    variance = 2 / (9 * freedom)
    return freedom * (1 - variance + NormalDist().inv_cdf(probability) * math.sqrt(variance)) ** 3


def _highest(k: int, n: int, within: Callable[[float], bool]) -> float:
    """The end of the interval of probabilities, begun at k / n, that are within a bound: by bisection, rounded up."""
    low, high = k / n, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return high
