from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elang.calibration import GateCosts, calibrate_gates, compare, gate_outcome
from elang.calibration.compare import area_gain, gate_gain
from elang.calibration.curve import area, every_threshold
from elang.calibration.gates import budget_area

COSTS = GateCosts(rows=1, encode=1.0, decode={1: 2.0}, super={1: 10.0})


def rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ease = rng.normal(size=n).astype("f4")
    return ease, rng.random(n) < 1 / (1 + np.exp(-2 * ease)), rng.random(n) < 0.9


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_gain_is_a_difference_of_areas(seed, ties):
    score, swift, super_ = rows(40, seed)
    control = np.random.default_rng(seed + 1).integers(0, 3 if ties else 10**6, 40).astype("f4")
    score[::7] = np.nan

    def by_counts(values: np.ndarray) -> float:
        found = every_threshold(values, swift, super_)
        return area(found.kept / 40, (super_.sum() + found.gained - found.lost) / 40)

    compare.RESAMPLES, before = 2, compare.RESAMPLES
    try:
        got = area_gain(score, swift, super_, control).value, area_gain(score, swift, super_).value
    finally:
        compare.RESAMPLES = before
    assert got[0] == pytest.approx(by_counts(score) - by_counts(control))
    assert got[1] == pytest.approx(by_counts(score) - (swift.mean() + super_.mean()) / 2)


def test_an_interval_covers_the_true_gain_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(compare, "RESAMPLES", 100)
    truth = area_gain(*rows(200_000, seed=1)).value
    covered = 0
    for seed in range(60):
        gain = area_gain(*rows(150, seed=100 + seed), confidence=0.9, seed=seed)
        covered += gain.lower <= truth <= gain.upper
    assert covered / 60 >= 0.77  # 0.9 less three standard errors and a little


def test_no_gain_over_oneself_and_a_clear_one_over_noise():
    score, swift, super_ = rows(500)
    assert area_gain(score, swift, super_, 2 * score) == (0, 0, 0)
    assert area_gain(score, swift, super_).lower > 0
    noise = np.random.default_rng(5).random(500)
    assert area_gain(score, swift, super_, noise).lower > 0
    assert area_gain(noise, swift, super_, score).upper < 0
    assert area_gain(noise, swift, super_).lower < 0 < area_gain(noise, swift, super_).upper


def test_gates_are_compared_at_thresholds_that_other_rows_chose():
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(2):
        one, other = rng.normal(size=(2, 800)).astype("f4")
        swift = rng.random(800) < 1 / (1 + np.exp(-2 * one - 2 * other))
        parts.append(({"head": one}, {"late": other}, swift, rng.random(800) < 0.9))
    curves = calibrate_gates(*parts[0], COSTS, max_seconds=6.0).curves
    early, late, swift, super_ = parts[1]
    gain = gate_gain(curves["head + late"], curves["head"], early | late, swift, super_, COSTS)
    areas = []
    for name, scores in (("head + late", (early["head"], late["late"])), ("head", (early["head"], None))):
        curve = curves[name]
        outcome = gate_outcome(*scores, curve.early_threshold, curve.late_threshold, swift, super_, COSTS)
        areas.append(budget_area(outcome.seconds, outcome.quality, COSTS))
    assert gain.value == pytest.approx(areas[0] - areas[1])
    assert gain.lower < gain.value < gain.upper
    assert str(gain).startswith(f"{gain.value:+.4f} (")
