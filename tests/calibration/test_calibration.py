from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_curve import rows

from elang.calibration import BatchCosts, Calibration, InfeasibleTarget, calibrate
from elang.calibration.bounds import critical_value, drop_statistic
from elang.reference import keep_mask

N = 900


@pytest.fixture(scope="module")
def data():
    """Scores that tell Swift's mistakes well, badly and not at all; Super is the better model."""
    rng = np.random.default_rng(0)
    ease = rng.normal(size=N) + 1
    swift = rng.random(N) < 1 / (1 + np.exp(-1.5 * ease))
    super_ = rng.random(N) < 1 / (1 + np.exp(-1.5 * ease - 1))
    noise = rng.normal(size=(3, N)).astype(np.float32)
    return {"bad": ease + 2 * noise[0], "good": ease + 0.3 * noise[1], "random": noise[2]}, swift, super_


def joint_correct(score, threshold, swift, super_):
    keep = keep_mask(torch.as_tensor(np.asarray(score, dtype=np.float32)), threshold).numpy()
    return keep, np.where(keep, swift, super_)


TARGETS = [{"swift_share": 0.0}, {"swift_share": 0.37}, {"swift_share": 1.0}, {"max_drop": 0.02}, {}]


@pytest.mark.parametrize("target", TARGETS)
def test_target_reports_what_the_router_does(data, target):
    scores, swift, super_ = data
    c = calibrate(scores, swift, super_, **target)
    keep, correct = joint_correct(scores[c.score], c.threshold, swift, super_)
    t = c.target
    assert (t.share_kept, t.accuracy) == (keep.mean(), correct.mean())
    assert t.drop == pytest.approx(super_.mean() - correct.mean())
    assert t.lower < t.accuracy < t.upper
    assert t.drop <= t.drop_upper
    assert t.random_accuracy == c.random_accuracy(t.share_kept)
    assert (c.swift_accuracy, c.super_accuracy, c.n) == (swift.mean(), super_.mean(), N)
    assert c.oracle_accuracy == (swift | super_).mean()
    assert f"{t.share_kept:.1%}" in c.summary()
    assert f"{t.accuracy:.1%}" in c.summary()


def test_random_accuracy_is_the_expectation_over_all_choices_of_rows():
    swift, super_ = np.array([1, 0, 1, 0]), np.array([1, 1, 1, 0])
    c = calibrate({"s": np.arange(4.0)}, swift, super_)
    pairs = [
        np.where(np.isin(np.arange(4), kept), swift, super_).mean()
        for kept in [(i, j) for i in range(4) for j in range(i)]
    ]
    assert c.random_accuracy(0.5) == pytest.approx(np.mean(pairs))


@given(rows(min_finite=1), st.floats(0, 1))
def test_share_target_is_the_nearest_share_there_is(case, wanted):
    score, swift, super_ = case
    t = calibrate({"s": score}, swift, super_, swift_share=wanted)
    keep, _ = joint_correct(score, t.threshold, swift, super_)
    assert t.target.share_kept == keep.mean()
    every = [joint_correct(score, float(x), swift, super_)[0].mean() for x in [np.inf, *score[np.isfinite(score)]]]
    assert abs(keep.mean() - wanted) == min(abs(share - wanted) for share in every)


@given(rows(min_finite=1))
def test_best_accuracy_is_the_best_there_is(case):
    score, swift, super_ = case
    c = calibrate({"s": score}, swift, super_)
    every = [joint_correct(score, float(t), swift, super_) for t in [np.inf, *score[np.isfinite(score)]]]
    best = max(correct.mean() for _, correct in every)
    assert c.target.accuracy == best
    assert c.target.share_kept == max(keep.mean() for keep, correct in every if correct.mean() == best)


def test_thresholds_of_shares_none_and_all():
    score, right = np.array([3, 1, 2, np.nan]), np.ones(4)
    assert calibrate({"s": score}, right, right, swift_share=0).threshold == np.inf
    everything = calibrate({"s": score}, right, right, swift_share=1)
    assert everything.threshold == -np.inf
    assert everything.target.share_kept == 0.75
    assert everything.curve.not_finite == 1
    assert "1 rows have a score that is not finite" in everything.summary()


def test_max_drop_keeps_the_longest_run_that_passes(data):
    scores, swift, super_ = data
    c = calibrate(scores, swift, super_, score="good", max_drop=0.02, confidence=0.9)
    critical, kept = critical_value(N, 0.02, 0.1), 0
    for t in np.sort(scores["good"].astype(np.float32))[::-1]:
        keep, _ = joint_correct(scores["good"], float(t), swift, super_)
        if not drop_statistic((keep & swift & ~super_).sum(), (keep & ~swift & super_).sum(), N, 0.02) > critical:
            break
        kept += 1
    assert 0.1 < c.target.share_kept == kept / N < 1
    assert c.target.drop_upper <= 0.02
    assert "independently" in c.target.note


def test_choosing_among_scores_costs_confidence(data):
    scores, swift, super_ = data
    alone = calibrate(scores, swift, super_, score="good", max_drop=0.02, confidence=1 - 0.05 / 3)
    among = calibrate(scores, swift, super_, max_drop=0.02, confidence=0.95)
    assert among.score == "good"
    assert among.threshold == alone.threshold > calibrate(scores, swift, super_, score="good", max_drop=0.02).threshold


@pytest.mark.parametrize("n", [50, 200])
def test_infeasible_target_says_what_would_do(data, n):
    scores, swift, super_ = data
    few = {"good": scores["good"][:n]}
    with pytest.raises(InfeasibleTarget, match=rf"max_drop: got 0\.5 points, which {n} rows cannot prove") as error:
        calibrate(few, swift[:n], super_[:n], max_drop=0.005)
    rows = int(str(error.value).split("about ")[1].split(" rows")[0])
    assert rows >= 598  # log(0.05) / log(1 - 0.005): fewer cannot rule out losses never seen
    calibrate({"s": np.arange(rows + 10)}, np.ones(rows + 10), np.ones(rows + 10), max_drop=0.005)


def test_infeasible_target_counts_the_rows_for_half_of_what_is_in_reach():
    with pytest.raises(InfeasibleTarget, match=r"about \d+ rows would prove it for 50\.0% kept"):
        calibrate({"s": np.arange(100)}, np.ones(100), np.ones(100), max_drop=0.01)


def test_infeasible_target_says_when_no_number_of_rows_would_do():
    swift = np.arange(500) % 2
    with pytest.raises(InfeasibleTarget, match="500 rows with the highest score lose more than that already"):
        calibrate({"constant": np.zeros(500)}, swift, np.ones(500), max_drop=0.05)


def test_score_of_the_largest_area_is_chosen_unless_one_is_given(data):
    scores, swift, super_ = data
    c = calibrate(scores, swift, super_)
    assert (c.score, c.score_selection) == ("good", "largest_area")
    assert c.curves["good"].area == max(curve.area for curve in c.curves.values())
    assert c.curves["random"].area == pytest.approx((swift.mean() + super_.mean()) / 2, abs=0.01)
    given_score = calibrate(scores, swift, super_, score="bad")
    assert (given_score.score, given_score.score_selection) == ("bad", "given")
    assert given_score.curve is given_score.curves["bad"]


def test_curve_is_what_the_router_does_at_every_point(data):
    scores, swift, super_ = data
    curve = calibrate(scores, swift, super_).curve
    columns = (curve.share_kept, curve.accuracy, curve.lower, curve.upper, curve.threshold)
    assert 150 < len(curve.threshold) <= 201
    assert (np.diff(curve.share_kept) > 0).all()
    assert (curve.share_kept[0], curve.share_kept[-1]) == (0, 1)
    for share, accuracy, lower, upper, threshold in zip(*columns, strict=True):
        keep, correct = joint_correct(scores["good"], threshold, swift, super_)
        assert (share, accuracy) == (round(keep.mean(), 6), round(correct.mean(), 6))
        assert lower < accuracy < upper


@given(rows(min_finite=1), st.sampled_from([*TARGETS[:3], {}]))
def test_file_gives_back_every_bit(tmp_path_factory, case, target):
    score, swift, super_ = case
    path = tmp_path_factory.getbasetemp() / "calibration.json"
    c = calibrate({"s": score}, swift, super_, provenance={"data": "brackets [ 1,\n  2 ] stay"}, **target)
    c.save(path)
    loaded = Calibration.load(path)
    assert loaded == c
    bits = [np.float32([x.threshold, *x.curve.threshold]).tobytes() for x in (c, loaded)]
    assert bits[0] == bits[1]
    assert all(float(np.float32(t)) == t for t in loaded.curve.threshold)


def test_file_is_plain_json_that_a_person_can_read(data, tmp_path):
    scores, swift, super_ = data
    source = {
        "swift": "a",
        "super": "b",
        "data": "held out",
        "data_sha256": "0" * 64,
        "dtype": "bfloat16",
        "backend": "cpp",
    }
    c = calibrate(scores, swift, super_, temperature=2.0, provenance=source, swift_share=1)
    c.save(tmp_path / "c.json")
    text = (tmp_path / "c.json").read_text()
    saved = json.loads(text)
    assert saved["threshold"] == "-inf"
    assert saved["curves"]["good"]["threshold"][0] == "inf"
    assert saved["temperature"] == 2.0
    assert saved["provenance"].items() >= source.items()
    assert saved["provenance"]["date"].startswith("20")
    assert text.count("\n") < 80
    assert len(text) < 20_000 * len(scores)


def test_loading_refuses_what_it_does_not_know(data, tmp_path):
    calibrate(*data).save(tmp_path / "c.json")
    saved = json.loads((tmp_path / "c.json").read_text())
    for change, message in (
        ({"version": 2}, "version"),
        ({"threshold": "nan"}, "threshold"),
        ({"threshold": 1e300}, "wanted a float32 value"),
        ({"score": "unheard of"}, "score: got 'unheard of'"),
        ({"candidate": "unheard of"}, "candidate: got 'unheard of'"),
        ({"extra": 1}, "extra"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(saved | change))
        with pytest.raises(ValueError, match=message):
            Calibration.load(tmp_path / "bad.json")
    (tmp_path / "by_hand.json").write_text(json.dumps(saved | {"threshold": 1.31044}))
    assert Calibration.load(tmp_path / "by_hand.json").threshold == float(np.float32(1.31044))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {}}, "scores: got none"),
        ({"scores": {"s": [1.0, 2.0]}}, r"scores\['s'\]: got float64 \[2\], wanted float32 \[3\]"),
        ({"scores": {"s": ["a", "b", "c"]}}, r"scores\['s'\]: got <U1"),
        ({"scores": {"s": [np.nan, np.inf, 1e300]}}, r"scores\['s'\]: got no finite value"),
        ({"swift_correct": []}, "swift_correct: got shape"),
        ({"swift_correct": [[1, 0, 1]]}, "swift_correct: got shape"),
        ({"swift_correct": [0.5, 1, 0]}, "swift_correct: got values other than"),
        ({"super_correct": [1, 2, 0]}, "super_correct: got values other than"),
        ({"super_correct": [1, 0]}, "super_correct: got 2 rows, wanted 3"),
        ({"score": "energy"}, "score: got 'energy', wanted one of s"),
        ({"swift_share": 0.5, "max_drop": 0.1}, "swift_share, max_drop: got 2 targets"),
        ({"swift_share": 1.1}, r"swift_share: got 1\.1"),
        ({"swift_share": np.nan}, "swift_share: got nan"),
        ({"max_drop": 0}, "max_drop: got 0, wanted"),
        ({"max_drop": 1}, "max_drop: got 1, wanted"),
        ({"max_cost": 1.0}, "max_cost, costs: got one of them"),
        ({"costs": BatchCosts(unit="s", rows=1, swift=1, super={1: 9})}, "max_cost, costs: got one of them"),
        ({"agree": 0.1}, r"agree: got 0\.1, wanted a pair \(alpha, delta\)"),
        ({"agree": (0.1, 0.1)}, "agree: got no disagree, wanted it"),
        ({"disagree": [1, 0]}, "disagree: got 2 rows, wanted 3"),
        ({"swift_correct": None}, "swift_correct, super_correct: got one of them"),
        ({"swift_correct": None, "super_correct": None}, "swift_correct, super_correct: got neither, nor disagree"),
        ({"ids": ["a"]}, "ids: got 1, wanted 3"),
        ({"confidence": 1}, "confidence: got 1"),
        ({"confidence": 0}, "confidence: got 0"),
        ({"temperature": 0}, "temperature: got 0"),
        ({"provenance": {"moddel": "a"}}, "moddel"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"scores": {"s": [1.0, 2.0, 3.0]}, "swift_correct": [1, 0, 1], "super_correct": [True, True, False]}
    calibrate(**good)
    with pytest.raises(ValueError, match=message):
        calibrate(**good | change)


def test_a_calibration_cannot_be_changed(data):
    with pytest.raises(ValueError, match="frozen"):
        calibrate(*data).threshold = 0.0


def test_import_needs_neither_torch_nor_matplotlib():
    code = "import sys, elang.calibration; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
