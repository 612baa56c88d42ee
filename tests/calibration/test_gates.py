from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elang.calibration import GateCalibration, GateCosts, calibrate_gates, gate_outcome
from elang.calibration.gates import budget_area
from elang.reference import keep_mask

COSTS = GateCosts(rows=1, encode=1.0, decode={1: 2.0}, super={1: 10.0})


def rows(n: int = 400, seed: int = 0) -> tuple[dict, dict, np.ndarray, np.ndarray]:
    """An early score that tells a little of what makes Swift right, and a late one that tells another part."""
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=n), rng.normal(size=n)
    swift = rng.random(n) < 1 / (1 + np.exp(-2 * one - 2 * other))
    return {"head": one.astype("f4")}, {"late": other.astype("f4")}, swift, rng.random(n) < 0.9


def by_hand(early, late, t1, t2, swift, super_) -> tuple[float, float, float, float]:
    """Row by row, by the rule of the router."""
    first, second = (
        keep_mask(torch.tensor(s), float(t)).tolist() for s, t in ((early, np.float32(t1)), (late, np.float32(t2)))
    )
    seconds = quality = decoded = kept = 0.0
    for i in range(len(swift)):
        keep = first[i] and second[i]
        seconds += COSTS.encode + COSTS.decode[1] * first[i] + COSTS.super[1] * (not keep)
        quality += swift[i] if keep else super_[i]
        decoded, kept = decoded + first[i], kept + keep
    return tuple(value / len(swift) for value in (seconds, quality, decoded, kept))


FLOATS = st.one_of(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0]), st.floats(width=32), st.integers(-2, 2))


@given(st.data())
def test_every_point_of_every_curve_is_what_its_thresholds_do(data):
    n = data.draw(st.integers(1, 30))
    early, late = (
        np.array([0.5, *data.draw(st.lists(FLOATS, min_size=n, max_size=n))], dtype=np.float32) for _ in range(2)
    )
    swift, super_ = (data.draw(st.lists(st.booleans(), min_size=n + 1, max_size=n + 1)) for _ in range(2))
    c = calibrate_gates({"early": early}, {"late": late}, swift, super_, COSTS, max_seconds=99.0)
    everything = np.zeros(n + 1, dtype=np.float32)
    assert list(c.curves) == ["early", "late", "early + late"]
    for curve in c.curves.values():
        scores = early if curve.early else everything, late if curve.late else everything
        columns = zip(curve.seconds, curve.quality, curve.share_decoded, curve.share_kept, strict=True)
        thresholds = zip(curve.early_threshold, curve.late_threshold, strict=True)
        for point, (t1, t2) in zip(columns, thresholds, strict=True):
            assert point == pytest.approx(by_hand(*scores, t1, t2, swift, super_), abs=1e-9)
        assert (np.diff(curve.seconds) > 0).all()
        assert (np.diff(curve.quality) > 0).all()
        got = gate_outcome(
            early if curve.early else None,
            late if curve.late else None,
            curve.early_threshold,
            curve.late_threshold,
            swift,
            super_,
            COSTS,
        )
        assert got.seconds == pytest.approx(curve.seconds, abs=1e-9)
        assert got.quality == pytest.approx(curve.quality, abs=1e-9)
        assert got.share_kept == pytest.approx(curve.share_kept, abs=1e-9)
        assert got.share_decoded == pytest.approx(curve.share_decoded, abs=1e-9)


def test_the_frontier_has_the_best_of_all_pairs_of_few_scores():
    early, late, swift, super_ = rows(40)
    c = calibrate_gates(early, late, swift, super_, COSTS, max_seconds=6.0)
    levels = [[-np.inf, *np.unique(s), np.inf] for s in (early["head"], late["late"])]
    points = [by_hand(early["head"], late["late"], a, b, swift, super_)[:2] for a in levels[0] for b in levels[1]]
    for budget in (3.0, 4.5, 6.0, 8.0, 12.0):
        at = np.searchsorted(c.curves["head + late"].seconds, budget + 1e-9) - 1
        best = max(quality for seconds, quality in points if seconds <= budget + 1e-9)
        assert c.curves["head + late"].quality[at] == pytest.approx(best)
    assert c.quality == max(
        q for curve in c.curves.values() for s, q in zip(curve.seconds, curve.quality, strict=True) if s <= 6.0
    )


def test_two_gates_of_two_kinds_of_knowledge_beat_either():
    early, late, swift, super_ = rows(4000)
    c = calibrate_gates(early, late, swift, super_, COSTS, max_drop=0.02)
    assert (c.early, c.late) == ("head", "late")
    assert c.quality >= c.super_quality - 0.02
    least = min(
        s
        for curve in c.curves.values()
        for s, q in zip(curve.seconds, curve.quality, strict=True)
        if q >= c.super_quality - 0.02
    )
    assert c.seconds == least < c.costs.of_super
    fresh_early, fresh_late, *fresh = rows(4000, seed=1)
    areas = {}
    for name, curve in c.curves.items():
        sources = (fresh_early["head"] if curve.early else None), (fresh_late["late"] if curve.late else None)
        outcome = gate_outcome(*sources, curve.early_threshold, curve.late_threshold, *fresh, COSTS)
        areas[name] = budget_area(outcome.seconds, outcome.quality, COSTS)
    assert areas["head + late"] > max(areas["head"], areas["late"])


def test_area_is_the_mean_of_the_best_within_the_budget():
    seconds, quality = [2.0, 5.0, 6.0, 20.0], [0.5, 0.4, 0.75, 1.0]
    assert budget_area(seconds, quality, COSTS) == pytest.approx((3 * 0.5 + 4 * 0.75) / 7)  # from 3 to 10
    assert budget_area([4.0], [0.5], COSTS) == pytest.approx(0.5)


def test_random_routing_is_the_line_between_the_models():
    c = calibrate_gates(*rows(), COSTS, max_seconds=9.0)
    assert c.random_quality(3.0) == pytest.approx(c.swift_quality)
    assert c.random_quality(10.0) == pytest.approx(c.super_quality)


def test_saved_read_and_drawn(tmp_path):
    c = calibrate_gates(*rows(2000), COSTS, max_drop=0.02)
    c.save(tmp_path / "gates.json")
    assert GateCalibration.load(tmp_path / "gates.json") == c
    for part in ("the late of what it decoded is at least", f"quality {c.quality:.4f}", "expect less on others"):
        assert part in c.summary()
    axes = c.plot(tmp_path / "gates.png").axes[0]
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.get_label().split(" (")[0]: line.get_xydata() for line in axes.lines}
    for name, curve in c.curves.items():
        assert np.allclose(lines[name][:, 0], 1e3 * np.array(curve.seconds))
        assert lines[name][:, 1].tolist() == list(curve.quality)
    assert {"random", *c.curves} <= set(lines)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"super_quality: got 3 rows, wanted 400", {"super_quality": [1, 0, 1]}),
        (r"swift_quality: got float64 \[2\], wanted finite", {"swift_quality": [1.0, np.nan]}),
        (r"max_seconds, max_drop: got both or neither", {"max_drop": 0.1}),
        (r"max_seconds, max_drop: got both or neither", {"max_seconds": None}),
        (r"max_seconds: got 0.5, out of reach: the quickest takes 3 s a row", {"max_seconds": 0.5}),
        (r"max_drop: got -0.5, out of reach", {"max_seconds": None, "max_drop": -0.5}),
        (
            r"costs: got GateCosts.*wanted a Super that takes longer",
            {"costs": GateCosts(rows=1, encode=5, decode={1: 6}, super={1: 10})},
        ),
        (r"early, late: got none, wanted names", {"early": {}, "late": {}}),
        (r"early, late: got head, head", {"late": {"head": np.zeros(400, "f4")}}),
        (r"head: got float32 \[2\], wanted float32 \[400\]", {"early": {"head": np.zeros(2, "f4")}}),
        (r"head: got float32 \[400\], wanted .* some of it finite", {"early": {"head": np.full(400, np.nan, "f4")}}),
    ],
)
def test_bad_arguments_are_named(match, change):
    early, late, swift, super_ = rows()
    arguments = {"early": early, "late": late, "swift_quality": swift, "super_quality": super_, "costs": COSTS}
    with pytest.raises(ValueError, match=match):
        calibrate_gates(**{**arguments, "max_seconds": 5.0, **change})
