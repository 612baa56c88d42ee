"""Costs, risk bounds, halves: what `calibrate` is asked for beside a share and a drop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from elang.calibration import BatchCosts, GateCosts, InfeasibleTarget, calibrate, risk
from elang.calibration.compare import area_gain

N = 1200
COSTS = BatchCosts(unit="ms", rows=8, swift=4.0, super={1: 10.0, 2: 12.0, 4: 16.0, 8: 24.0})


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    ease = rng.normal(size=N).astype("f4") + 1
    swift = rng.random(N) < 1 / (1 + np.exp(-1.5 * ease))
    super_ = rng.random(N) < 1 / (1 + np.exp(-1.5 * ease - 1))
    scores = {"bad": ease + 2 * rng.normal(size=N).astype("f4"), "good": ease, "good@2.0": 2 * ease}
    return scores, swift, super_


@given(st.integers(1, 12), st.floats(0, 1), st.booleans(), st.data())
def test_the_cost_of_a_share_is_its_expectation(rows, share, buckets, data):
    sizes = sorted({rows, *data.draw(st.lists(st.integers(1, rows), max_size=3))})
    super_ = {size: float(5 + size * size) for size in sizes}
    costs = BatchCosts(unit="s", rows=rows, swift=3.0, super=super_, buckets=buckets)
    want = 3.0
    for count in range(1, rows + 1):
        if buckets:
            cost = super_[min(size for size in sizes if size >= count)]
        else:
            cost = np.interp(count, sizes, [super_[size] for size in sizes])
        want += stats.binom.pmf(count, rows, share) * cost
    assert costs.of_share(share) == pytest.approx([want / rows])


def test_costs_of_no_rows_and_all_and_of_each_alone():
    assert COSTS.of_share([0, 1]) == pytest.approx([4 / 8, (4 + 24) / 8])
    alone = BatchCosts(unit="FLOPs", rows=1, swift=1.2, super={1: 21.8})
    assert alone.of_share(0.32) == pytest.approx([1.2 + 0.32 * 21.8])
    for change, message in (
        ({"rows": 9}, "super: got the sizes 1, 2, 4, 8, wanted the 9 rows of a batch too"),
        ({"super": {}}, "super: got {}, wanted costs >= 0"),
        ({"swift": -1.0}, "swift: got -1.0, wanted no cost below 0"),
        ({"super": {0: 1.0, 8: 2.0}}, "of batches of 1 row and more"),
    ):
        with pytest.raises(ValueError, match=message):
            BatchCosts(**{**COSTS.model_dump(), **change})


def test_gates_cost_what_parts_of_their_size_cost():
    costs = GateCosts(rows=4, encode=1.0, decode={1: 2.0, 4: 5.0}, super={1: 6.0, 2: 8.0, 4: 16.0})
    assert (costs.of_swift, costs.of_super) == (6 / 4, 16 / 4)
    assert costs.of_shares([1.0, 0.0], [1.0, 0.0]) == pytest.approx([6 / 4, 17 / 4])
    decode, super_ = {1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0}, {1: 6.0, 2: 8.0, 3: 12.0, 4: 16.0}
    want = 1 + sum(stats.binom.pmf(k, 4, 0.6) * decode[k] + stats.binom.pmf(k, 4, 0.7) * super_[k] for k in decode)
    assert costs.of_shares(0.6, 0.3) == pytest.approx(want / 4)
    with pytest.raises(ValueError, match=r"decode: got the sizes 1, wanted the 4 rows of a batch too"):
        GateCosts(rows=4, encode=1.0, decode={1: 2.0}, super={4: 1.0})


def test_max_cost_is_the_best_accuracy_that_can_be_paid_for(data):
    scores, swift, super_ = data
    for most in (0.9, 1.6, 2.5, 3.5):
        c = calibrate({"good": scores["good"]}, swift, super_, max_cost=most, costs=COSTS)
        order = np.argsort(-scores["good"])
        right = super_.sum() + np.append(0, np.cumsum((swift.astype(int) - super_)[order]))
        cost = COSTS.of_share(1 - np.arange(N + 1) / N)
        assert c.target.accuracy == pytest.approx(right[cost <= most].max() / N)
        assert COSTS.of_share(1 - c.target.share_kept)[0] <= most
        assert f"({most:g} allowed), in batches of 8" in c.target.note
    with pytest.raises(InfeasibleTarget, match=r"max_cost: got 0\.4 ms a row, the least possible is 0\.5"):
        calibrate(scores, swift, super_, max_cost=0.4, costs=COSTS)


@pytest.mark.parametrize("delta", [0.1, None])
def test_agreement_needs_no_labels(data, delta):
    scores, swift, super_ = data
    disagree = swift != super_
    want = risk.agree(scores["good"], disagree, 0.1, delta)
    c = calibrate({"good": scores["good"]}, agree=(0.1, delta), disagree=disagree)
    assert (c.threshold, c.target.note) == (want.threshold, want.statement)
    assert (c.judged_by, c.super_accuracy, c.swift_accuracy) == ("super", 1.0, 1 - disagree.mean())
    assert "agreement with Super" in c.summary()
    assert (c.target.delta, c.target.observed_risk, c.target.p_value) == (delta, want.observed, want.p_value)
    labelled = calibrate({"good": scores["good"]}, swift, super_, agree=(0.1, delta), disagree=disagree)
    assert (labelled.threshold, labelled.judged_by) == (want.threshold, "labels")
    assert labelled.swift_accuracy == swift.mean()


def test_risk_is_shared_by_the_scores_that_these_rows_choose_among(data):
    scores, swift, super_ = data
    three = calibrate(scores, swift, super_, selective_error=(0.15, 0.1))
    assert three.threshold == risk.selective_error(scores["good"], ~swift, 0.15, 0.1 / 3).threshold
    assert "1 - delta = 0.9," in three.target.note
    assert three.target.note.endswith("(delta is shared by 3 scores)")
    one = calibrate(scores, swift, super_, score="good", selective_error=(0.15, 0.1))
    assert one.threshold == risk.selective_error(scores["good"], ~swift, 0.15, 0.1).threshold < three.threshold
    with pytest.raises(ValueError, match="agree: got no delta for a score picked on these rows"):
        calibrate(scores, swift, super_, agree=(0.1, None), disagree=swift != super_)


def test_auto_picks_the_score_on_other_rows_than_it_calibrates_on(data):
    scores, swift, super_ = data
    disagree = swift != super_
    c = calibrate(scores, swift, super_, score="auto", agree=(0.1, 0.1), disagree=disagree, seed=3)
    other, here = np.split(np.random.default_rng(3).permutation(N), [N // 2])
    here = np.sort(here)
    assert (c.n, c.score_selection, c.score) == (N - N // 2, "largest_area_on_other_rows", "good")
    want = risk.agree(scores["good"][here], disagree[here], 0.1, 0.1)
    assert (c.threshold, c.target.note) == (want.threshold, want.statement)
    assert set(c.selection) == set(scores)
    gain = area_gain(scores["bad"][other], swift[other], super_[other])
    bad = c.selection["bad"]
    assert (bad.gain_over_random, bad.lower, bad.upper) == gain
    assert c.selection["good"].area > bad.area > 0
    # "good" ranks as "good@2.0" does: alone, the other has its own temperature.
    hot = calibrate({"good@2.0": scores["good@2.0"]}, swift, super_, score="auto", temperature=9.0)
    assert (hot.score, hot.temperature, hot.candidate) == ("good", 2.0, "good@2.0")
    assert hot.curve == hot.curves["good@2.0"]
    with pytest.raises(ValueError, match="score: got 'auto' for 1 row"):
        calibrate({"s": [1.0]}, [True], [True], score="auto")


def test_the_hardest_rows_are_named(data):
    scores, swift, super_ = data
    ids = [f"row {i}" for i in range(N)]
    c = calibrate({"good": scores["good"]}, swift, super_, swift_share=0.5, ids=ids)
    kept_and_wrong = [i for i in np.argsort(-scores["good"]) if scores["good"][i] >= c.threshold and not swift[i]]
    assert c.hardest.id == tuple(ids[i] for i in kept_and_wrong[:20])
    assert c.hardest.score == tuple(scores["good"][kept_and_wrong[:20]].tolist())
    half = calibrate({"good": scores["good"]}, swift, super_, swift_share=0.5, score="auto").hardest
    assert all(not swift[i] for i in half.id)
    assert half.score == tuple(scores["good"][list(half.id)].tolist())
