from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, multinomial

from elang.calibration.bounds import (
    critical_value,
    drop_bound,
    drop_statistic,
    proven,
    rows_needed,
    wilson_interval,
)
from elang.calibration.curve import every_threshold


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (3, 7), (7, 7), (1630, 2000)])
def test_wilson_interval_is_scipys(successes, n):
    truth = binomtest(successes, n).proportion_ci(0.9, method="wilson")
    assert np.allclose(wilson_interval(successes, n, 0.9), (truth.low, truth.high), rtol=0, atol=1e-12)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.floats(0.001, 0.5))
def test_statistic_uses_the_likeliest_disagreement(gained, lost, agree, drop):
    n = gained + lost + agree + 1
    agree += 1
    numerator = n * drop - (lost - gained)
    if abs(numerator) < 1e-6:
        return
    variance = (numerator / drop_statistic(gained, lost, n, drop)) ** 2 / n
    disagreement = variance + drop**2
    assert drop - 1e-9 <= disagreement <= 1

    def log_likelihood(q):
        p = np.array([(q - drop) / 2, (q + drop) / 2, 1 - q])
        counts = np.array([gained, lost, agree])
        return (counts[counts > 0] * np.log(np.maximum(p[counts > 0], 1e-300))).sum()

    best = max(log_likelihood(q) for q in np.linspace(drop, 1, 400))
    assert log_likelihood(max(disagreement, drop + 1e-12)) >= best - 1e-6


@given(st.integers(2, 200), st.floats(0.002, 0.5), st.data())
def test_statistic_falls_with_every_loss_and_rises_with_every_gain(n, drop, data):
    gained = data.draw(st.integers(0, n - 1))
    lost = data.draw(st.integers(0, n - 1 - gained))
    here = drop_statistic(gained, lost, n, drop)
    assert drop_statistic(gained, lost + 1, n, drop) < here < drop_statistic(gained + 1, lost, n, drop)


@pytest.mark.parametrize(
    ("n", "drop", "alpha"), [(40, 0.1, 0.05), (90, 0.02, 0.05), (90, 0.05, 0.2), (120, 0.03, 0.01)]
)
def test_critical_value_is_exact(n, drop, alpha):
    """Sum the trinomial by another hand, at true drops of and above the bound: rejection probability <= alpha."""
    gained, lost = (a.ravel() for a in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    gained, lost = gained[gained + lost <= n], lost[gained + lost <= n]
    rejected = drop_statistic(gained, lost, n, drop) > critical_value(n, drop, alpha)
    counts = np.stack([gained, lost, n - gained - lost], axis=1)[rejected]
    size = []
    for true_drop in (drop, 1.2 * drop, 2 * drop):
        for disagreement in np.linspace(true_drop, 1, 150):
            p = [(disagreement - true_drop) / 2, (disagreement + true_drop) / 2, 1 - disagreement]
            size.append(multinomial.pmf(counts, n, p).sum())
    assert max(size) <= alpha * 1.02  # the grid over the disagreement may miss the very worst by a hair
    assert max(size) >= alpha * 0.7


def test_bound_on_800_rows_with_a_tenth_disagreeing_costs_1_8_points():
    bound = drop_bound(40, 40, 800, critical_value(800, 0.02, 0.05))
    assert bound == pytest.approx(1.645 * np.sqrt(0.1 / 800), rel=0.02)


def test_bound_is_1_when_every_row_was_lost():
    assert drop_bound(0, 5, 5, 1.645) == 1


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 300))
def test_bound_inverts_the_statistic(gained, lost, agree):
    n = gained + lost + agree
    bound = drop_bound(gained, lost, n, 1.645)
    assert bound > (lost - gained) / n
    assert drop_statistic(gained, lost, n, bound) == pytest.approx(1.645, abs=1e-3)


def population(rng, n):
    """The true drop of this one rises with every row kept: 0.18 s^2 - 0.10 s^2 = 0.08 s^2 at share s."""
    score = rng.random(n, dtype=np.float32)
    u = rng.random(n)
    lost = u < 0.36 * (1 - score)
    gained = u > 1 - 0.20 * (1 - score)
    return score, gained | (u < 0.9) & ~lost, lost | (u < 0.9) & ~gained


@pytest.mark.parametrize(("n", "max_drop"), [(300, 0.02), (800, 0.01), (800, 0.02)])
def test_violations_of_a_max_drop_are_rarer_than_promised(n, max_drop):
    """Every threshold tried, the lowest proven one taken: its true drop exceeds the target in <= 5 % of the draws."""
    rng = np.random.default_rng(0)
    critical = critical_value(n, max_drop, 0.05)
    allowed_share = np.sqrt(max_drop / 0.08)
    share, draws = [], 500
    for _ in range(draws):
        outcome = every_threshold(*population(rng, n))
        threshold = outcome.threshold[max(proven(outcome.gained, outcome.lost, n, max_drop, critical) - 1, 0)]
        share.append(np.clip(1 - threshold, 0, 1))
    violations = np.mean(np.array(share) > allowed_share)
    assert violations <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / draws)
    assert np.mean(share) > 0.4 * allowed_share


def test_the_promise_is_nearly_used_up_where_it_is_hardest_to_keep():
    """Two score levels, the upper one losing exactly the target: the sequence has one chance to go wrong."""
    n, max_drop, draws = 400, 0.03, 20_000
    critical = critical_value(n, max_drop, 0.05)
    counts = np.random.default_rng(0).multinomial(n, [0.03, 0.06, 0.91], size=draws)
    wrong = np.mean([proven(np.array([0, b]), np.array([0, c]), n, max_drop, critical) == 2 for b, c, _ in counts])
    assert 0.04 < wrong < 0.05 + 2 * np.sqrt(0.05 * 0.95 / draws)


def test_sequence_ends_at_the_first_failure():
    zeros, lost = np.zeros(4, dtype=np.int64), np.array([0, 1, 60, 1])
    critical = critical_value(1000, 0.02, 0.05)
    assert proven(zeros, lost, 1000, 0.02, critical) == 2
    assert proven(zeros, np.array([0, 0, 1, 1]), 1000, 0.02, critical) == 4


def test_rows_needed_would_do():
    gained, lost, n, max_drop = np.array([0, 2, 8]), np.array([0, 3, 10]), 200, 0.03
    needed = rows_needed(gained, lost, n, max_drop, 1.645)
    assert (np.diff(needed) >= 0).all()
    for i in range(3):
        for factor, enough in ((1.1, True), (0.7, False)):
            m = int(factor * needed[i])
            scale = m / n
            passes = drop_statistic(gained[: i + 1] * scale, lost[: i + 1] * scale, m, max_drop) > 1.645
            assert passes.all() == enough
    assert needed[0] == pytest.approx(np.log(0.05) / np.log(0.97), rel=0.01)
    overtaken = rows_needed(np.array([0, 0, 30]), np.array([0, 3, 3]), n, max_drop, 1.645)
    assert overtaken[2] == overtaken[1] > overtaken[0]
    assert rows_needed(np.array([0, 0]), np.array([0, 10]), 200, 0.03, 1.645)[1] == np.inf
