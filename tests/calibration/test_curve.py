from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_auc_score

from elang.calibration.curve import area, auroc, every_threshold
from elang.reference import keep_mask

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, np.nextafter(np.float32(1), np.float32(2)), 1e-45, 3.4e38]


@st.composite
def rows(draw, min_finite: int = 0):
    """Scores with ties and every kind of float32, and whether Swift and Super are right."""
    value = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.integers(-2, 2).map(float))
    score = np.array(draw(st.lists(value, min_size=1, max_size=40)), dtype=np.float32)
    score[: max(0, min_finite - int(np.isfinite(score).sum()))] = 0.5
    correct = hnp.arrays(np.bool_, len(score))
    return score, draw(correct), draw(correct)


@given(rows())
def test_each_threshold_counts_what_the_router_keeps(case):
    score, swift, super_ = case
    outcome = every_threshold(score, swift, super_)
    for t, kept, gained, lost in zip(*outcome, strict=True):
        keep = keep_mask(torch.from_numpy(score), float(t)).numpy()
        assert keep.sum() == kept
        assert (keep & swift & ~super_).sum() == gained
        assert (keep & ~swift & super_).sum() == lost


@given(rows())
def test_every_distinct_decision_is_there_once_and_in_order(case):
    score, swift, super_ = case
    outcome = every_threshold(score, swift, super_)
    distinct = np.unique(score[np.isfinite(score)])
    assert outcome.threshold.dtype == np.float32
    assert len(outcome.threshold) == len(distinct) + 1
    assert (np.diff(outcome.kept) > 0).all()
    assert outcome.threshold[0] == np.inf
    assert (outcome.threshold[1:-1] == distinct[:0:-1]).all()
    if len(distinct):
        assert outcome.threshold[-1] == -np.inf
        assert outcome.kept[-1] == np.isfinite(score).sum()


def test_area_is_the_mean_over_shares():
    share, accuracy = np.array([0.0, 0.5, 1.0]), np.array([0.8, 0.9, 0.7])
    assert area(share, accuracy) == pytest.approx((0.85 + 0.8) / 2)


def test_area_holds_the_last_accuracy_where_no_more_rows_can_be_kept():
    assert area(np.array([0.0, 0.5]), np.array([0.8, 0.6])) == pytest.approx(0.5 * 0.7 + 0.5 * 0.6)


@given(hnp.arrays(np.float32, 30, elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])), hnp.arrays(np.bool_, 30))
def test_auroc_is_the_share_of_pairs_in_the_right_order(score, positive):
    if positive.all() or not positive.any():
        with pytest.raises(ValueError, match="positive: got"):
            auroc(score, positive)
    else:
        assert auroc(score, positive) == pytest.approx(roc_auc_score(positive, score))
