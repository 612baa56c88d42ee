"""Risk bounds: the lowest threshold at which a loss is shown to be at most `alpha` on rows drawn like these.

`agree` needs no labels: a row loses if Swift keeps it and answers otherwise than Super. Its mean over all rows only
grows as the threshold falls. `selective_error` is the error among the rows that Swift keeps, and may go up and down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elang.calibration.bounds import Counts, Floats, InfeasibleTarget
from elang.calibration.curve import every_threshold

Method = Literal["conformal risk control", "exact binomial test", "Hoeffding-Bentkus test"]
TEST: dict[bool, Method] = {True: "exact binomial test", False: "Hoeffding-Bentkus test"}


@dataclass(frozen=True)
class RiskBound:
    """A threshold with what is known of its risk; `statement` says under which assumptions."""

    risk: str  # in words
    method: Method
    index: int  # of the threshold in `every_threshold` of the score
    threshold: float  # exactly a float32, or -inf
    share_kept: float
    observed: float  # the risk on the calibration rows
    p_value: float | None  # of "the risk at this threshold exceeds alpha"; None where nothing is tested
    n: int
    alpha: float
    delta: float | None

    @property
    def statement(self) -> str:
        """What holds, over which draw, and on which assumption."""
        seen = f"On these rows it is {self.observed:.4g}, with {self.share_kept:.1%} kept by Swift"
        if self.delta is None:
            return (
                f"Over the draw of these n = {self.n} rows and one more, all exchangeable, {self.risk} is at most "
                f"alpha = {self.alpha:.4g} in expectation ({self.method}); given these rows it may be more. {seen}."
            )
        return (
            f"Over the draw of these n = {self.n} rows, with probability of at least 1 - delta = {1 - self.delta:.6g}, "
            f"{self.risk} is at most alpha = {self.alpha:.4g} on rows drawn independently from the same population "
            f"(Learn then Test, {self.method}). {seen}; p = {self.p_value:.2g}."
        )


def agree(score: ArrayLike, loss: ArrayLike, alpha: float, delta: float | None = None) -> RiskBound:
    """The lowest threshold at which at most a share `alpha` of all rows is kept and answered otherwise than by Super.

    Without `delta`, in expectation: conformal risk control (Angelopoulos et al. 2022), the lowest threshold with
    (total loss + 1) / (n + 1) <= alpha, for exchangeable rows. It may be read off these: let t* be the lowest threshold
    that keeps the mean loss of all n + 1 rows within alpha. The one taken is never below t*, and at t* the new row is
    no likelier to lose than any other.
    With `delta`, with probability >= 1 - delta: Learn then Test (Angelopoulos et al. 2021), for independent rows. Each
    threshold is tested at level delta, from "route all" downwards, up to the first failure. The many tests need no
    correction: let t* be the highest threshold whose true risk exceeds alpha, a fixed number. To go wrong is to take t*
    or a lower one, with no less loss on these rows; then t* passes too, which has probability <= delta.

    Args:
        score: of each row, [N] float32; a row whose score is not finite is never kept.
        loss: whether Swift's answer differs from Super's, [N] bool or integer 0/1; or by how much, [N] float in [0, 1].
            The dtype decides: the first is tested by the exact binomial, the second by Hoeffding-Bentkus p-values.
        alpha: the most that the mean loss may be, in (0, 1).
        delta: the probability, over the draw of the rows, that it is more, in (0, 1); None bounds the expectation.
            For the best of several scores on the same rows, give each its part of delta.

    Raises:
        InfeasibleTarget: no threshold that keeps a row meets this; the message says how many rows might do.
        ValueError: an argument that is not as described, by its name.
    """
    score, loss, binary = _checked(score, loss, alpha, 0.5 if delta is None else delta)
    n = loss.size
    threshold, kept, highest = _descending(score, loss)
    total = highest[kept]
    p_values: Floats | None = None
    if delta is None:
        passes = total + 1 <= alpha * (n + 1)
    else:
        p_values = _p_values(total, n, alpha, binary)
        passes = p_values <= delta
    last = _passed(passes) - 1
    if last < 1:
        raise _infeasible(kept[1:], _rows_needed(total[1:] / n, alpha, delta, binary), n, alpha, delta)
    return RiskBound(
        risk="the share of all rows that Swift keeps and answers otherwise than Super"
        if binary
        else "the mean over all rows of the loss against Super, 0 where Super answers,",
        method="conformal risk control" if p_values is None else TEST[binary],
        index=last,
        threshold=float(threshold[last]),
        share_kept=float(kept[last] / n),
        observed=float(total[last] / n),
        p_value=None if p_values is None else float(p_values[last]),
        n=n,
        alpha=alpha,
        delta=delta,
    )


def selective_error(score: ArrayLike, loss: ArrayLike, alpha: float, delta: float) -> RiskBound:
    """The lowest threshold at which the rows that Swift keeps are wrong at a rate of at most `alpha`.

    Learn then Test: of m rows kept by a threshold fixed beforehand, Binomial(m, R) are wrong, R = P(wrong | kept),
    whatever m turns out to be. The tests start at the `_start` rows with the highest scores, a number fixed by n, alpha
    and delta, and go on row by row up to the first failure; a threshold that is taken keeps more rows than the start.
    P(R > alpha) <= delta, though R is not monotone and thresholds are read off the rows. For ties are in the order of
    the rows, a random one as these are independent; so let the score be continuous, and hence R(t). Let s be the score
    of the first row after the start. If R(s) >= alpha: given s, the rows above it are independent and wrong at the rate
    R(s), so the start passes with probability <= delta. If R(s) < alpha: let (b, a) be the widest interval around s
    with R < alpha. To go wrong, the rows above b must pass. As R(a) = R(b) = alpha, rows above a (if a is not the top)
    and rows from b to a are wrong at the same rate alpha: given how many there are of each, which tells whether s lies
    between, those above b pass with probability <= delta. The cases exclude each other. (A start where the rows happen
    to look good would void this.)
    If no more scores are finite than the start takes, keeping them all is the one threshold and the one test.

    Args:
        score, alpha, delta: as for `agree`, with alpha for the mean loss of the kept rows.
        loss: whether Swift is wrong, [N] bool or integer 0/1; or how wrong, [N] float in [0, 1].

    Raises:
        InfeasibleTarget, ValueError: as for `agree`.
    """
    score, loss, binary = _checked(score, loss, alpha, delta)
    n = loss.size
    threshold, kept, highest = _descending(score, loss)
    start = _start(n, alpha, delta, binary)
    rows = np.arange(min(start, kept[-1]), kept[-1] + 1)
    p_values = _p_values(highest[rows], rows, alpha, binary)
    allowed = kept[kept >= min(start + 1, kept[-1])]
    passed = rows[0] + _passed(p_values <= delta) - 1
    if passed < allowed[0]:
        needed = np.maximum.accumulate(_rows_needed(highest[rows] / rows, alpha, delta, binary) / (rows / n))
        raise _infeasible(allowed, needed[allowed - rows[0]], n, alpha, delta)
    last = int(np.searchsorted(kept, passed, side="right")) - 1
    return RiskBound(
        risk="the share of wrong answers among rows kept by Swift" if binary else "the mean loss of rows kept by Swift",
        method=TEST[binary],
        index=last,
        threshold=float(threshold[last]),
        share_kept=float(kept[last] / n),
        observed=float(highest[kept[last]] / kept[last]),
        p_value=float(p_values[kept[last] - rows[0]]),
        n=n,
        alpha=alpha,
        delta=delta,
    )


def _start(n: int, alpha: float, delta: float, binary: bool) -> int:
    """How many rows `selective_error` tests first: as many as may lose 4 times, or half of n if that is fewer.

    Later starts miss small shares, earlier ones often fail by bad luck. At the least, as many as may lose no time.
    """
    rows = np.arange(1, n + 1)

    def rows_that_may_lose(times: int) -> int:
        return 1 + int(np.count_nonzero(_p_values(np.full(n, float(times)), rows, alpha, binary) > delta))

    return max(rows_that_may_lose(0), min(rows_that_may_lose(4), n // 2))


def binomial_cdf(k: ArrayLike, n: ArrayLike, p: float) -> Floats:
    """P(Binomial(n, p) <= k), element by element: the tail on k's side of the mean is summed, from its largest term."""
    k, n = np.broadcast_arrays(np.asarray(k, dtype=np.int64), np.asarray(n, dtype=np.int64))
    lower = k < n * p
    k, p_ = np.where(lower, k, n - k - 1), np.where(lower, p, 1 - p)
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n.max() + 2)))))
    i = np.maximum(k, 0)
    log_pmf = log_factorial[n] - log_factorial[i] - log_factorial[n - i] + i * np.log(p_) + (n - i) * np.log1p(-p_)
    term, tail = np.where(k < 0, 0.0, np.exp(log_pmf)), np.zeros(k.shape)
    while (term > 1e-17 * tail).any():
        tail += term
        term *= k * (1 - p_) / ((n - k + 1) * p_)
        k = k - 1
    return np.where(lower, tail, 1 - tail)


def _divergence(mean: Floats, alpha: float) -> Floats:
    """Kullback-Leibler divergence of Bernoulli(alpha) from Bernoulli(mean), 0 for a mean >= alpha."""
    mean = np.minimum(mean, alpha)
    return mean * np.log(np.maximum(mean, 1e-300) / alpha) + (1 - mean) * np.log((1 - mean) / (1 - alpha))


def _p_values(total: Floats, n: int | Counts, alpha: float, binary: bool) -> Floats:
    """P-values of "the mean of n independent losses in [0, 1] exceeds alpha", given their total."""
    tail = binomial_cdf(np.ceil(total), n, alpha)
    return tail if binary else np.minimum(np.exp(-n * _divergence(total / n, alpha)), math.e * tail)


def _passed(passes: NDArray[np.bool_]) -> int:
    """How many tests pass before the first failure."""
    return passes.size if passes.all() else int(passes.argmin())


def _descending(score: NDArray[np.float32], loss: Floats) -> tuple[NDArray[np.float32], Counts, Floats]:
    """Every threshold [P], how many rows it keeps [P], and by m, the total loss of the m highest rows."""
    anything = np.ones(score.size, dtype=np.bool_)
    outcome = every_threshold(score, anything, anything)
    finite = np.flatnonzero(np.isfinite(score))
    rows = finite[np.argsort(-score[finite], kind="stable")]
    return outcome.threshold, outcome.kept, np.append(0.0, np.cumsum(loss[rows]))


def _rows_needed(mean: Floats, alpha: float, delta: float | None, binary: bool) -> Floats:
    """About how many rows of each mean loss would do; `inf` for a mean >= alpha.

    Hoeffding's inequality says how many are enough, and fewest if nothing is lost. To tell a loss of 0 or 1 from alpha,
    fewer mostly are: as many as by the normal approximation with its correction for continuity.
    """
    gap = np.maximum(alpha - mean, 0)
    with np.errstate(divide="ignore"):
        if delta is None:
            return (1 - alpha) / gap
        enough = -math.log(delta) / _divergence(mean, alpha)
        deviation = max(NormalDist().inv_cdf(1 - delta), 0.0) * math.sqrt(alpha * (1 - alpha))
        return np.minimum(enough, (np.sqrt(deviation**2 + 2 * gap) - deviation) ** -2) if binary else enough


def _infeasible(kept: Counts, needed: Floats, n: int, alpha: float, delta: float | None) -> InfeasibleTarget:
    """Says how many rows would do for half of the share within reach, were the rates seen the true ones."""
    reach = int(np.count_nonzero(np.isfinite(needed)))
    if reach:
        half = int(np.searchsorted(kept[:reach], kept[reach - 1] / 2))
        about = max(math.ceil(needed[half]), n + 1)
        outlook = f"n of about {about} would, at the rates seen, for {kept[half] / n:.1%} kept"
    else:
        outlook = f"the {kept[0]} rows with the highest score lose more than that already, so more rows are no help"
    level = "" if delta is None else f" with delta = {delta:.6g}"
    return InfeasibleTarget(f"alpha: got {alpha:.6g}{level}, which no threshold meets with n = {n}; {outlook}")


def _checked(score: ArrayLike, loss: ArrayLike, alpha: float, delta: float) -> tuple[NDArray[np.float32], Floats, bool]:
    losses, scores = np.asarray(loss), np.asarray(score)
    binary = losses.dtype.kind in "biu"
    if losses.ndim != 1 or losses.size == 0 or losses.dtype.kind not in "biuf":
        raise ValueError(f"loss: got {losses.dtype} {list(losses.shape)}, wanted bool or float [N] with N >= 1")
    if not (np.isin(losses, (0, 1)) if binary else (losses >= 0) & (losses <= 1)).all():
        raise ValueError(f"loss: got values outside {'0 and 1' if binary else '[0, 1]'}, or not a number")
    if scores.shape != losses.shape or scores.dtype.kind not in "fiu":
        raise ValueError(f"score: got {scores.dtype} {list(scores.shape)}, wanted float32 [{losses.size}] as in loss")
    with np.errstate(over="ignore"):
        scores = scores.astype(np.float32)
    if not np.isfinite(scores).any():
        raise ValueError(f"score: got no finite value among {losses.size} rows, wanted at least one")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: got {alpha}, wanted a risk in (0, 1); 0 cannot be shown, 1 always holds")
    if not 0 < delta < 1:
        raise ValueError(f"delta: got {delta}, wanted a probability in (0, 1)")
    return scores, losses.astype(np.float64), binary
