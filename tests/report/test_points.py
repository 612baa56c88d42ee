from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import COSTS, answered
from scipy.stats import binom, binomtest
from sklearn.calibration import calibration_curve

from elang.report.points import (
    SHARES,
    by_label,
    flops_cost,
    hardest,
    histogram,
    operating_points,
    outcomes,
    reliability,
    time_cost,
)


def kept_rows(rows, threshold):
    """The router's rule, row by row."""
    values = [np.nan if value is None else value for value in rows.scores[rows.score]]
    return np.array([np.isfinite(value) and np.float32(value) >= np.float32(threshold) for value in values])


def seconds_of_a_row(share_routed):
    batch = np.interp(np.arange(COSTS.rows + 1), list(COSTS.super), list(COSTS.super.values()))
    batch[0] = 0
    return (COSTS.swift + binom(COSTS.rows, share_routed).pmf(np.arange(COSTS.rows + 1)) @ batch) / COSTS.rows


@pytest.mark.parametrize("classes", [2, 3])
def test_outcomes_are_those_of_routing_row_by_row(classes):
    rows = answered(classes, gate_flops={"energy": (700,) * 400})
    points = operating_points(rows)
    got = outcomes(points, COSTS)
    swift, super_ = np.array(rows.swift_right), np.array(rows.super_right)
    swift_flops, super_flops = np.array(rows.swift_flops), np.array(rows.super_flops)
    assert len(points.threshold) == 201
    for i, threshold in enumerate(points.threshold):
        kept = kept_rows(rows, threshold)
        right = np.where(kept, swift, super_)
        interval = binomtest(int(right.sum()), 400).proportion_ci(0.95, "wilson")
        spent = np.where(kept, swift_flops, 700 + super_flops).sum()
        expected = {
            "threshold": threshold,
            "share_kept": kept.mean(),
            "accuracy": right.mean(),
            "lower": interval.low,
            "upper": interval.high,
            "random_accuracy": kept.mean() * swift.mean() + (1 - kept.mean()) * super_.mean(),
            "flops_speedup": super_flops.sum() / spent,
            "time_speedup": COSTS.super[8] / 8 / seconds_of_a_row(1 - kept.mean()),
            "kept": kept.sum(),
            "kept_wrong": (kept & ~swift).sum(),
            "routed": (~kept).sum(),
            "routed_in_vain": (~kept & swift & ~super_).sum(),
            "wrong": (~right).sum(),
        }
        assert {name: column[i] for name, column in got.items()} == pytest.approx(expected)


def test_a_score_without_flops_of_its_gate_needs_all_of_swift():
    rows = answered(gate_flops={})
    swift, super_ = sum(rows.swift_flops), sum(rows.super_flops)
    assert flops_cost(operating_points(rows)).joint[0] == pytest.approx((swift + super_) / super_)


def test_costs_beside_the_joint_model():
    rows = answered()
    points = operating_points(rows)
    right = np.array(rows.swift_right)
    swift, super_ = np.array(rows.swift_flops), np.array(rows.super_flops)
    flops, time = flops_cost(points), time_cost(points, COSTS)
    alone = COSTS.super[8] / 8
    assert flops.swift == pytest.approx(swift.sum() / super_.sum())
    assert flops.oracle == pytest.approx((swift.sum() + super_[~right].sum()) / super_.sum())
    assert flops.random == pytest.approx((swift.sum() + (1 - SHARES) * super_.sum()) / super_.sum())
    assert time.swift == pytest.approx(COSTS.swift / 8 / alone)
    assert time.oracle == pytest.approx(seconds_of_a_row((~right).mean()) / alone)
    assert time.random == pytest.approx([seconds_of_a_row(1 - share) / alone for share in SHARES])


@pytest.mark.parametrize("threshold", [np.inf, -np.inf, 1.31044, 2.0])
def test_the_first_threshold_asked_for_has_a_place(threshold):
    rows = answered(n=3_000, thresholds=(threshold, 0.5))
    points = operating_points(rows)
    assert points.threshold[points.initial] == np.float32(threshold)
    assert points.kept[points.initial] == kept_rows(rows, threshold).sum()
    assert len(points.threshold) <= 201
    assert points.kept[0] == 0
    assert points.kept[-1] == 2_999
    assert np.diff(points.share).max() < 0.01


scores = st.sampled_from([None, -1.0, 0.0, 0.5, 2.0])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(scores, st.booleans(), st.booleans()), min_size=1, max_size=30), st.sampled_from((0.5, 3)))
def test_ties_and_scores_that_are_not_finite(given_rows, threshold):
    score, swift, super_ = zip(*given_rows, strict=True)
    n, finite = len(score), {value for value in score if value is not None}
    columns = dict.fromkeys(("id", "text", "target", "swift", "super"), ("",) * n) | {"swift_flops": (1,) * n}
    rows = answered(
        n=n,
        **columns,
        swift_right=swift,
        super_right=super_,
        scores={"energy": score},
        super_flops=(10,) * n,
        gate_flops={},
        thresholds=(threshold,),
    )
    points = operating_points(rows)
    got = outcomes(points, None)
    assert len(points.threshold) == len(finite) + 1
    wrong, in_vain = hardest(points)
    for i, at in enumerate(points.threshold):
        kept = kept_rows(rows, at)
        assert got["kept"][i] == kept.sum()
        assert got["accuracy"][i] == pytest.approx(np.where(kept, swift, super_).mean())
        assert got["flops_speedup"][i] == pytest.approx(10 * n / (n + 10 * (~kept).sum()))
        for example in (*wrong, *in_vain):
            assert (i >= example.kept_from) == kept[example.row]


@pytest.mark.parametrize("on_edges", [False, True])
def test_the_histogram_counts_every_finite_row_once(on_edges):
    rows = answered(3, not_finite=(7, 9))
    if on_edges:
        whole = tuple(None if i in (7, 9) else i % 41 for i in range(400))
        rows = rows.model_copy(update={"scores": rows.scores | {"energy": whole}})
    points = operating_points(rows)
    h = histogram(points)
    score = points.score.astype(np.float64)
    for i, threshold in enumerate(points.threshold):
        kept = kept_rows(rows, threshold)
        for counts, of in (
            (h.kept_right, kept & rows.swift_right),
            (h.kept_wrong, kept & ~np.array(rows.swift_right)),
            (h.routed, ~kept & np.isfinite(score)),
        ):
            assert counts[i].tolist() == np.histogram(score[of], h.edges)[0].tolist()
    assert h.kept_right[0].sum() == 0
    assert (h.kept_right + h.kept_wrong + h.routed).sum(axis=1).tolist() == [398] * len(points.threshold)


def test_reliability_by_max_prob():
    rows = answered(3)
    finite = np.arange(400) != 7
    p, right = rows.score_values("max_prob")[finite], np.array(rows.swift_right)[finite]
    r = reliability(operating_points(rows))
    share, confidence = calibration_curve(right, p, n_bins=10)
    assert r.right == pytest.approx(share)
    assert r.confidence == pytest.approx(confidence, rel=1e-6)
    assert r.n.sum() == 399
    assert r.ece == pytest.approx(np.sum(r.n / 399 * np.abs(share - confidence)), rel=1e-6)
    for i, n in enumerate(r.n.tolist()):
        interval = binomtest(round(share[i] * n), n).proportion_ci(0.95, "wilson")
        assert (r.lower[i], r.upper[i]) == pytest.approx((interval.low, interval.high))


def test_reliability_without_probabilities_is_by_the_rank_of_the_score():
    rows = answered(n=500, not_finite=())
    rows = rows.model_copy(update={"scores": {"energy": rows.scores["energy"]}})
    r = reliability(operating_points(rows))
    upwards = np.argsort(rows.scores["energy"]).reshape(10, 50)
    assert r.right == pytest.approx(np.array(rows.swift_right)[upwards].mean(axis=1))
    assert r.confidence == pytest.approx(np.arange(0.05, 1, 0.1))
    assert r.n.tolist() == [50] * 10
    assert r.ece is None


def test_by_label():
    rows = answered(3, labels=("neutral", "entailment", "unused"))
    points = operating_points(rows)
    labels = by_label(points)
    assert [label.label for label in labels] == ["neutral", "entailment", "contradiction"]
    for label in labels:
        of = np.array(rows.target) == label.label
        assert (label.rows, label.swift) == (of.sum(), pytest.approx(np.array(rows.swift_right)[of].mean()))
        assert label.super == pytest.approx(np.array(rows.super_right)[of].mean())
        for i, threshold in enumerate(points.threshold):
            kept = kept_rows(rows, threshold)
            assert label.share_kept[i] == pytest.approx(kept[of].mean())
            assert label.joint[i] == pytest.approx(np.where(kept, rows.swift_right, rows.super_right)[of].mean())
    assert by_label(operating_points(answered(labels=()))) == []


def test_the_hardest_are_the_surest_mistakes_and_the_least_sure_of_what_swift_alone_has_right():
    rows = answered(3, not_finite=tuple(range(0, 400, 4)))
    swift, super_ = np.array(rows.swift_right), np.array(rows.super_right)
    score = rows.score_values("energy")
    wrong, in_vain = hardest(operating_points(rows), most=20)
    sure = sorted(np.flatnonzero(~swift & np.isfinite(score)), key=lambda row: -score[row])
    unsure = sorted(np.flatnonzero(swift & ~super_), key=lambda row: score[row] if np.isfinite(score[row]) else -np.inf)
    assert [example.row for example in wrong] == sure[:20]
    assert [example.row for example in in_vain] == unsure[:20]
    assert not np.isfinite(score[in_vain[0].row])
    assert in_vain[0].kept_from == len(operating_points(rows).threshold)
