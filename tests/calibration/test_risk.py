from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mapie.risk_control import control_fwer
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value, find_best_predict_param, get_r_hat_plus
from scipy.stats import binom
from test_curve import rows

from elang.calibration import InfeasibleTarget
from elang.calibration.curve import every_threshold
from elang.calibration.risk import _p_values, _rows_needed, _start, agree, binomial_cdf, selective_error
from elang.reference import keep_mask

ALPHA, DELTA = 0.1, 0.05


def at_most(delta, draws):
    """A share of `draws` that one of probability delta exceeds about once in 400 trials."""
    return delta + 2.8 * np.sqrt(delta * (1 - delta) / draws)


def share_kept(rule, *args):
    try:
        return rule(*args).share_kept
    except InfeasibleTarget:
        return 0.0


def kept_by_router(score, threshold):
    return keep_mask(torch.as_tensor(score), float(threshold)).numpy()


def thresholds(score):
    return every_threshold(score, np.ones(score.size, bool), np.ones(score.size, bool)).threshold


@given(st.integers(1, 3000), st.data(), st.floats(0.001, 0.999))
def test_binomial_cdf_is_scipys(n, data, p):
    k = np.array(data.draw(st.lists(st.integers(0, n), min_size=1, max_size=9)))
    truth = binom.cdf(k, n, p)
    assert np.allclose(binomial_cdf(k, n, p), truth, rtol=1e-8, atol=1e-200)
    assert np.allclose(binomial_cdf(k, np.full(k.shape, n), p), truth, rtol=1e-8, atol=1e-200)


def mapies_p_values(total, n, alpha, binary):
    """MAPIE rounds n * (total / n) up, which must not add one to a whole total."""
    return compute_hoeffding_bentkus_p_value(np.maximum(total / n - 1e-13, 0), n, alpha, binary)[:, 0]


@pytest.mark.parametrize("n", [1, 7, 250])
@pytest.mark.parametrize("alpha", [0.02, 0.3, 0.9])
def test_p_values_are_mapies(alpha, n):
    whole, broken = np.arange(n + 1), np.random.default_rng(0).random(200) * n
    assert np.allclose(_p_values(whole, n, alpha, True), mapies_p_values(whole, n, alpha, True), rtol=1e-9)
    assert np.allclose(_p_values(whole, n, alpha, False), mapies_p_values(whole, n, alpha, False), rtol=1e-9)
    assert np.allclose(_p_values(broken, n, alpha, False), mapies_p_values(broken, n, alpha, False), rtol=1e-9)


def losses(n, kind):
    return hnp.arrays(np.bool_, n) if kind == "bool" else hnp.arrays(np.float64, n, elements=st.floats(0, 1))


@given(rows(min_finite=1), st.sampled_from(["bool", "float"]), st.floats(0.02, 0.98), st.data())
def test_crc_is_mapies_at_the_routers_thresholds(case, kind, alpha, data):
    score, loss = case[0], data.draw(losses(case[0].size, kind))
    every = thresholds(score)
    table = np.stack([kept_by_router(score, t) * loss for t in every], axis=1)
    observed, inflated = get_r_hat_plus(table, np.arange(len(every)), "crc", None, None, None)
    if (abs(inflated - alpha) < 1e-9).any():
        return  # MAPIE takes a bound of alpha itself for a failure
    feasible = inflated[:2] < alpha
    if not feasible.all():
        with pytest.raises(InfeasibleTarget):
            agree(score, loss, alpha)
        return
    bound = agree(score, loss, alpha)
    if inflated[0] < inflated[-1]:
        assert bound.index == find_best_predict_param(np.arange(len(every)), inflated, np.array([alpha]))[0]
    else:
        assert bound.index == len(every) - 1
    assert bound.threshold == every[bound.index]
    assert bound.observed == pytest.approx(observed[bound.index])
    assert bound.p_value is None


@given(rows(min_finite=1), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_agree_takes_the_last_threshold_before_the_first_failure(case, alpha, delta):
    score, loss, _ = case
    alpha += 1e-6  # whether a p-value equals delta is a matter of rounding, as at alpha = delta = 0.5
    last, p_value = -1, None
    for i, t in enumerate(thresholds(score)):
        p = binom.cdf((kept_by_router(score, t) & loss).sum(), loss.size, alpha)
        if p > delta:
            break
        last, p_value = i, p
    if last < 1:
        with pytest.raises(InfeasibleTarget):
            agree(score, loss, alpha, delta)
        return
    bound = agree(score, loss, alpha, delta)
    keep = kept_by_router(score, bound.threshold)
    assert (bound.index, bound.share_kept, bound.observed) == (last, keep.mean(), (keep & loss).mean())
    assert np.float32(bound.threshold) == bound.threshold == thresholds(score)[last]
    assert bound.p_value == pytest.approx(p_value)


@given(rows(min_finite=1), st.floats(0.3, 0.95), st.floats(0.2, 0.95))
def test_selective_error_goes_row_by_row_from_its_start(case, alpha, delta):
    score, loss, _ = case
    alpha += 1e-6  # as above
    start, finite = _start(loss.size, alpha, delta, True), np.flatnonzero(np.isfinite(score))
    down = sorted(finite, key=lambda row: (-score[row], row))
    first = min(start, len(down))
    passed = first - 1
    while passed < len(down) and binom.cdf(loss[down[: passed + 1]].sum(), passed + 1, alpha) <= delta:
        passed += 1
    every = thresholds(score)
    kept = np.array([kept_by_router(score, t).sum() for t in every])
    allowed = np.flatnonzero((kept <= passed) & (kept >= min(start + 1, len(down))))
    if not allowed.size:
        with pytest.raises(InfeasibleTarget):
            selective_error(score, loss, alpha, delta)
        return
    bound, last = selective_error(score, loss, alpha, delta), allowed[-1]
    keep = kept_by_router(score, bound.threshold)
    assert (bound.index, bound.threshold, bound.share_kept) == (last, every[last], keep.mean())
    assert bound.observed == pytest.approx(loss[keep].mean())
    assert bound.p_value == pytest.approx(binom.cdf(loss[keep].sum(), keep.sum(), alpha))


def test_start_is_fixed_by_n_alpha_and_delta():
    n = np.arange(1, 2000)
    none, four = (n[binom.cdf(times, n, ALPHA) <= DELTA][0] for times in (0, 4))
    assert [_start(rows, ALPHA, DELTA, True) for rows in (10, 40, 100, 170, 1000)] == [11, none, 50, 85, four]
    assert _start(1000, ALPHA, DELTA, False) > four


def test_selective_error_takes_one_row_more_than_the_start():
    score, start = -np.arange(200.0), _start(200, ALPHA, DELTA, True)
    wrong = np.isin(np.arange(200), [0, 1, 2, 3, start])
    with pytest.raises(InfeasibleTarget):
        selective_error(score, wrong, ALPHA, DELTA)
    assert selective_error(score, np.roll(wrong, 1), ALPHA, DELTA).share_kept == (start + 1) / 200


def test_ties_stand_in_the_order_of_the_rows():
    score = np.tile([1.0, 0.0], 200)
    wrong = (score == 1) & (np.arange(400) >= 382)
    assert selective_error(score, wrong, ALPHA, DELTA).share_kept == 1
    with pytest.raises(InfeasibleTarget):
        selective_error(score[::-1], wrong[::-1], ALPHA, DELTA)


def test_selective_error_is_mapies_for_a_conditional_loss():
    rng = np.random.default_rng(0)
    score = rng.random(600).astype(np.float32)
    wrong = rng.random(600) < 0.3 * (1 - score) ** 2
    kept = np.arange(_start(600, ALPHA, DELTA, True), 601)
    total = np.cumsum(wrong[np.argsort(-score)])[kept - 1]
    p_values = mapies_p_values(total, kept, ALPHA, True)
    valid = control_fwer(p_values, DELTA, "fixed_sequence")
    assert 0 < len(valid) < len(kept)
    bound = selective_error(score, wrong, ALPHA, DELTA)
    assert bound.share_kept == kept[valid[-1]] / 600
    assert bound.p_value == pytest.approx(p_values[valid[-1]])


def test_expected_loss_is_just_below_alpha():
    """Mean of the true risk over draws: at most alpha and no more than 2 / (n + 1) below it (Angelopoulos et al.)."""
    rng, n, draws = np.random.default_rng(0), 40, 4000
    risk = {"conformal": [], "empirical": []}  # true risk of threshold t: the integral of 0.4 (1 - s) from t to 1
    for _ in range(draws):
        score = rng.random(n).astype(np.float32)
        loss = rng.random(n) < 0.4 * (1 - score)
        total = np.cumsum(loss[np.argsort(-score)])
        lowest = np.append(1, np.sort(score)[::-1])[np.count_nonzero(total <= ALPHA * n)]
        risk["empirical"].append(0.2 * (1 - lowest) ** 2)
        risk["conformal"].append(0.2 * (1 - max(agree(score, loss, ALPHA).threshold, 0)) ** 2)
    error = np.std(risk["conformal"]) / np.sqrt(draws)
    assert ALPHA - 2 / (n + 1) < np.mean(risk["conformal"]) < ALPHA + 2.8 * error
    assert np.mean(risk["empirical"]) > ALPHA + 2.8 * error


@pytest.mark.parametrize("dtype", [np.bool_, np.float64])
def test_violations_of_agree_are_rarer_than_delta(dtype):
    rng, n, draws, alpha = np.random.default_rng(0), 300, 700, 0.05
    allowed = np.sqrt(alpha / 0.2)  # a share kept of q has the true risk 0.2 q^2
    proven, naive = [], []
    for _ in range(draws):
        score = rng.random(n).astype(np.float32)
        mean = 0.4 * (1 - score)
        loss = rng.random(n) < mean if dtype is np.bool_ else rng.beta(4 * mean, 4 * (1 - mean))
        proven.append(1 - max(agree(score, loss, alpha, DELTA).threshold, 0))
        down = np.argsort(-score)
        naive.append(1 - score[down[np.count_nonzero(np.cumsum(loss[down]) <= alpha * n) - 1]])
    assert np.mean(np.array(proven) > allowed) <= at_most(DELTA, draws)
    assert np.mean(proven) > 0.6 * allowed
    assert np.mean(np.array(naive) > allowed) > 5 * DELTA


def test_agree_uses_up_delta_where_it_is_hardest_to_keep():
    """One level of scores that loses alpha exactly: a violation is a pass, whose probability scipy knows."""
    n, draws = 200, 2000
    lost = np.random.default_rng(0).binomial(n, ALPHA, size=draws)
    wrong = np.mean([share_kept(agree, np.zeros(n), np.arange(n) < k, ALPHA, DELTA) == 1 for k in lost])
    size = max(p for p in binom.cdf(np.arange(n), n, ALPHA) if p <= DELTA)
    assert abs(wrong - size) < 2.8 * np.sqrt(size / draws)


def tent(top, depth):
    """P(wrong | kept) at a share kept: alpha at 0, up by `top` of alpha, below it by `depth`, and up again."""
    return lambda q: ALPHA * np.interp(q, [0, 0.2, 0.35, 0.6, 0.75, 1], [1, 1 + top, 1, 1 - depth, 1, 1.3])


POPULATIONS = {
    "nowhere allowed": lambda q: ALPHA * 1.0001 + 0 * q,
    "too wrong at the top": tent(0.1, 0.05),
    "allowed, then not": lambda q: ALPHA * np.interp(q, [0, 0.5, 0.7, 1], [0.1, 0.3, 1.0, 2.0]),
    "to and fro": lambda q: ALPHA * (1 + 0.03 * np.sin(25 * q)),
}


@pytest.mark.parametrize("levels", [None, 12], ids=["distinct", "tied"])
@pytest.mark.parametrize("population", POPULATIONS)
def test_violations_of_selective_error_are_rarer_than_delta(population, levels):
    """The population is given by its selective error R at each share q: a row there is wrong at the rate (q R)'."""
    rng, n, draws = np.random.default_rng(1), 250, 600
    selective = POPULATIONS[population]
    grid = np.linspace(0, 1, 4001)
    rate = np.diff(grid * selective(grid)) / np.diff(grid)
    assert ((rate >= 0) & (rate <= 1)).all()
    q = rng.random((draws, n))
    wrong = rng.random((draws, n)) < rate[(q * 4000).astype(int)]
    q = np.ceil(q * levels) / levels if levels else q
    shares = np.array([share_kept(selective_error, *draw, ALPHA, DELTA) for draw in zip(-q, wrong, strict=True)])
    kept = np.rint(shares * n).astype(int)
    ordered = np.sort(q, axis=1)
    reached = np.where(kept == n, 1.0, np.take_along_axis(ordered, np.maximum(kept - 1, 0)[:, None], axis=1)[:, 0])
    violated = (kept > 0) & (selective(reached) > ALPHA * 1.00005)
    assert violated.mean() <= at_most(DELTA, draws)
    if population == "allowed, then not":
        assert np.mean(shares) > 0.2
    if population == "nowhere allowed":
        assert violated.mean() > DELTA / 4
        total = np.cumsum(np.take_along_axis(wrong, np.argsort(q, axis=1), axis=1), axis=1)
        passes = binom.cdf(total, np.arange(1, n + 1), ALPHA) <= DELTA
        assert passes.any(axis=1).mean() > 2 * DELTA  # any threshold that passes by itself
        assert (total <= ALPHA * np.arange(1, n + 1)).any(axis=1).mean() > 0.5  # the empirical rate


def test_violations_with_a_loss_that_is_not_0_or_1():
    rng, n, draws = np.random.default_rng(0), 200, 600
    loss = rng.beta(0.02 * ALPHA, 0.02 * (1 - ALPHA), size=(draws, n))  # nearly 0 or 1: the hardest of mean alpha
    shares = [share_kept(selective_error, np.arange(n), row, ALPHA, DELTA) for row in loss]
    assert np.mean(np.array(shares) > 0) <= at_most(DELTA, draws)
    easy = [share_kept(selective_error, np.arange(n), row / 4, ALPHA, DELTA) for row in loss[:50]]
    assert np.mean(easy) > 0.7


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (lambda n: agree(np.arange(n), np.zeros(n, bool), 0.02), 49),
        (lambda n: agree(np.arange(n), np.zeros(n, bool), 0.02, 0.05), 149),
        (lambda n: agree(np.arange(n), np.zeros(n), 0.02, 0.05), 149),
        (lambda n: selective_error(np.arange(n), np.zeros(n, bool), 0.02, 0.05), 149),
        (lambda n: selective_error(np.where(np.arange(n) % 2, np.nan, 1.0), np.zeros(n, bool), 0.1, 0.05), 57),
    ],
)
def test_infeasible_target_says_how_many_rows_would_do(rule, wanted):
    n = wanted // 2
    with pytest.raises(InfeasibleTarget, match=rf"no threshold meets with n = {n}; n of about (\d+) would") as error:
        rule(n)
    assert int(str(error.value).split("n of about ")[1].split()[0]) == wanted
    with pytest.raises(InfeasibleTarget):
        rule(wanted - 1)
    assert rule(wanted).observed == 0


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("delta", [0.01, 0.05])
def test_rows_needed_would_do(alpha, delta):
    mean = alpha * np.array([0.0, 0.1, 0.3, 0.6, 0.8])
    for binary in (True, False):
        needed = _rows_needed(mean, alpha, delta, binary)
        assert (np.diff(needed) > 0).all()
        enough, too_few = np.ceil(1.4 * needed).astype(int), (0.7 * needed).astype(int)
        assert (_p_values(np.ceil(mean * enough), enough, alpha, binary) <= delta).all()
        assert (_p_values(mean * too_few, too_few, alpha, binary) > delta).all()
        assert needed[0] == pytest.approx(np.log(delta) / np.log(1 - alpha))
        assert _rows_needed(np.array([alpha, 1.0]), alpha, delta, binary).tolist() == [np.inf, np.inf]
    conformal = _rows_needed(mean, alpha, None, True)
    assert np.allclose(mean * conformal + 1, alpha * (conformal + 1))


def test_more_rows_than_there_are_would_do():
    assert _rows_needed(np.zeros(1), 0.1, 0.2, True) < 15 < np.log(0.2) / np.log(0.9)
    with pytest.raises(InfeasibleTarget, match="with n = 15; n of about 16 would"):
        agree(np.arange(15), np.zeros(15, bool), 0.1, 0.2)


@pytest.mark.parametrize(
    ("rule", "lost", "args", "half"),
    [
        (agree, np.arange(200) >= 60, (0.004,), "15.0%"),
        (agree, np.arange(200) >= 60, (0.01, DELTA), "15.5%"),
        (selective_error, np.arange(200) < 5, (ALPHA, DELTA), "50.0%"),
    ],
)
def test_rows_that_would_do_are_for_half_of_what_is_in_reach(rule, lost, args, half):
    with pytest.raises(InfeasibleTarget, match=f"for {half} kept$"):
        rule(-np.arange(200.0), lost, *args)


@pytest.mark.parametrize("delta", [None, DELTA])
def test_infeasible_target_says_when_no_number_of_rows_would_do(delta):
    loss = np.arange(500) % 2 == 0
    with pytest.raises(InfeasibleTarget, match="the 500 rows with the highest score lose more than that already"):
        agree(np.zeros(500), loss, ALPHA, delta)
    with pytest.raises(InfeasibleTarget, match="the 90 rows with the highest score lose more than that already"):
        selective_error(np.arange(500.0), loss, ALPHA, DELTA)


def test_one_row_can_do():
    bound = agree([2.5], [False], 0.5, 0.6)
    assert (bound.threshold, bound.share_kept, bound.p_value) == (-np.inf, 1, 0.5)
    assert selective_error([2.5], [False], 0.5, 0.6).threshold == -np.inf
    assert agree([2.5], [False], 0.5).threshold == -np.inf


def test_all_alike_keeps_every_finite_row():
    score = np.append(np.arange(300.0), [np.nan, np.inf, -np.inf])
    for bound in (agree(score, np.arange(303) > 299, ALPHA, DELTA), selective_error(score, score < 0, ALPHA, DELTA)):
        assert (bound.threshold, bound.share_kept, bound.observed) == (-np.inf, 300 / 303, 0)
    # A row that is never kept counts for `agree`, which is about all rows, but not for the error among the kept.
    assert agree(score, score < 0, ALPHA, DELTA).p_value == pytest.approx(0.9**303)
    assert selective_error(score, score < 0, ALPHA, DELTA).p_value == pytest.approx(0.9**300)


def test_integers_are_booleans_and_floats_are_not():
    score, loss = np.arange(400.0), np.arange(400) < 60
    for rule in (agree, selective_error):
        exact = rule(score, loss, ALPHA, DELTA)
        assert rule(score, loss.astype(np.int64), ALPHA, DELTA) == exact
        bounded = rule(score, loss.astype(np.float32), ALPHA, DELTA)
        assert bounded.method == "Hoeffding-Bentkus test" != exact.method
        assert bounded.share_kept < exact.share_kept


def test_statement_names_loss_level_rows_and_assumption():
    score, loss = np.arange(300.0), np.arange(300) % 40 == 0
    for rule, words in ((agree, "all rows that Swift keeps and answers otherwise"), (selective_error, "wrong answers")):
        text = rule(score, loss, ALPHA, DELTA).statement
        wanted = (words, "n = 300", "1 - delta = 0.95", "alpha = 0.1", "independently", "Learn then Test", "exact")
        assert all(part in text for part in wanted)
        assert "mean" in rule(score, loss.astype(float), ALPHA, DELTA).statement
    expected = agree(score, loss, ALPHA).statement
    assert all(part in expected for part in ("n = 300", "alpha = 0.1", "in expectation", "exchangeable", "conformal"))
    assert "guarantee" not in text + expected


@pytest.mark.parametrize("rule", [agree, selective_error])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": []}, r"loss: got float64 \[0\], wanted bool or float \[N\]"),
        ({"loss": [[0, 1, 0]]}, r"loss: got int64 \[1, 3\]"),
        ({"loss": ["a", "b", "c"]}, "loss: got <U1"),
        ({"loss": [0, 1, 2]}, "loss: got values outside 0 and 1"),
        ({"loss": [0.0, 1.5, 0.0]}, r"loss: got values outside \[0, 1\]"),
        ({"loss": [0.0, -0.1, 0.0]}, r"loss: got values outside \[0, 1\]"),
        ({"loss": [0.0, np.nan, 0.0]}, r"loss: got values outside \[0, 1\], or not a number"),
        ({"score": [1.0, 2.0]}, r"score: got float64 \[2\], wanted float32 \[3\]"),
        ({"score": [True, False, True]}, "score: got bool"),
        ({"score": [np.nan, np.inf, 1e300]}, "score: got no finite value among 3 rows"),
        ({"alpha": 0}, "alpha: got 0, wanted"),
        ({"alpha": 1}, "alpha: got 1, wanted"),
        ({"alpha": np.nan}, "alpha: got nan, wanted"),
        ({"delta": 0}, "delta: got 0, wanted"),
        ({"delta": 1}, "delta: got 1, wanted"),
    ],
)
def test_bad_input_is_named(rule, change, message):
    good = {"score": [1.0, 2.0, 3.0], "loss": [False, False, False], "alpha": 0.5, "delta": 0.3}
    rule(**good)
    with pytest.raises(ValueError, match=message) as error:
        rule(**good | change)
    assert not isinstance(error.value, InfeasibleTarget)


def test_a_bound_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        agree([2.5], [False], 0.5).threshold = 0.0


def test_import_needs_neither_torch_nor_scipy():
    code = "import sys, elang.calibration.risk; sys.exit(any(m in sys.modules for m in ('torch', 'scipy', 'mapie')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
