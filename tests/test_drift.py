from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monitored import calibrated, normal, read, routed
from scipy import special, stats

from elang.drift import DriftReport, Shadow, _chi_square_quantile
from elang.monitoring import Monitor

INF = math.inf


def lowered(scores):
    """As a router takes them: what is not finite lies below every score."""
    return np.where(np.isfinite(scores), scores, -np.inf)


floats = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([INF, -INF, math.nan, 0.0, 1.0, 2.0])


def rows(min_size):
    return hnp.arrays(np.float32, st.integers(min_size, 40), elements=floats)


@settings(deadline=None)
@given(rows(2), rows(1), st.floats(0, 1))
def test_report_is_scipys_on_the_scores_in_their_bins(then, now, share):
    if len(np.unique(then[np.isfinite(then)])) < 2:
        return
    c = calibrated(then, share)
    monitor = Monitor(c)
    for part in np.array_split(now, 3):
        monitor.update(routed(part, c.threshold))
    report, totals, edges = monitor.read(), monitor.totals(), monitor.bins.edges
    bins = [len(edges) if math.isnan(x) else int((edges <= x).sum()) for x in now]
    assert totals.histogram.tolist() == np.bincount(bins, minlength=len(edges) + 1).tolist()

    kept = np.isfinite(now) & (now >= np.float32(c.threshold))
    assert report.rows == len(now)
    assert report.not_finite == (~np.isfinite(now)).sum()
    assert report.share_kept == kept.sum() / len(now)
    assert report.share_routed == (~kept).sum() / len(now)
    assert report.calibration_share_kept == (np.isfinite(then) & (then >= np.float32(c.threshold))).mean()
    interval = stats.binomtest(int(kept.sum()), len(now)).proportion_ci(0.95, "wilson")
    assert np.allclose((report.lower, report.upper), interval)

    known = np.sort(np.float32([*c.curve.threshold, c.threshold, np.finfo(np.float32).min]))
    binned = [np.searchsorted(known, lowered(x), side="right") for x in (then, now)]
    assert math.isclose(report.ks, stats.ks_2samp(*binned, method="asymp").statistic, abs_tol=1e-12)
    assert report.ks <= stats.ks_2samp(lowered(then), lowered(now), method="asymp").statistic + 1e-12
    exact = special.kolmogorov(report.ks * math.sqrt(len(then) * len(now) / (len(then) + len(now))))
    assert exact - 1e-12 <= report.ks_p_value <= 1
    assert exact > 0.05 or report.ks_p_value <= exact * 1.001


def test_psi_is_numpys_over_tenths():
    then, now = normal(1000), normal(500, 0.4, seed=1)
    c = calibrated(then)
    cuts = sorted(min(c.curve.threshold, key=lambda t: abs((then >= t).sum() - 100 * k)) for k in range(1, 10))
    p, q = ((np.histogram(x, [-INF, *cuts, INF])[0] + 0.5) / (len(x) + 5) for x in (now, then))
    assert abs(q - 0.1).max() < 0.002
    assert math.isclose(read(c, now).psi, ((p - q) * np.log(p / q)).sum(), rel_tol=1e-9)


def test_psi_of_ties_has_fewer_bins():
    then = np.repeat([0.0, 1.0, 2.0, 3.0], [100, 100, 100, 700])
    monitor = Monitor(calibrated(then))
    assert monitor.bins.edges[monitor.bins.tenths].tolist() == [1, 2, 3]
    monitor.add(torch.tensor(np.repeat([0.5, 3.0], 50)), 0)
    p, q = (np.array([50, 0, 0, 50]) + 0.5) / 102, (np.array([100, 100, 100, 700]) + 0.5) / 1002
    assert math.isclose(monitor.read().psi, ((p - q) * np.log(p / q)).sum(), rel_tol=1e-9)


def test_the_calibration_rows_have_not_drifted():
    then = np.append(normal(800), [math.nan] * 8)
    report = read(calibrated(then), then)
    assert (report.psi, report.ks, report.ks_p_value, report.not_finite) == (0, 0, 1, 8)
    assert report.share_kept == report.calibration_share_kept
    assert not report.drifted
    assert report.summary().startswith("No drift: of 808 rows (8 with a score that is not finite)")


def test_chance_is_no_drift():
    """PSI of 40 rows is mostly past 0.2 by chance; of as many windows as here, 1 % alarms and few more."""
    draws, significance = 400, 0.01
    generator = np.random.default_rng(0)
    reports = [
        read(calibrated(generator.normal(size=300)), generator.normal(size=40), significance=significance)
        for _ in range(draws)
    ]
    assert np.mean([r.psi > 0.2 for r in reports]) > 0.5
    allowed = significance + 3 * math.sqrt(significance / draws)
    for measure in ("PSI", "KS"):
        assert np.mean([measure in r.crossed for r in reports]) <= allowed


@pytest.mark.parametrize("freedom", [1, 3, 9])
@pytest.mark.parametrize("probability", [0.5, 0.99, 0.9999])
def test_chi_square_quantile_is_scipys(freedom, probability):
    assert math.isclose(_chi_square_quantile(probability, freedom), stats.chi2.ppf(probability, freedom), rel_tol=0.08)


@pytest.mark.parametrize(
    ("now", "crossed"),
    [
        (normal(2000, 1.0), ("PSI", "KS")),
        (normal(2000, 0.2), ("KS",)),
        (np.append(normal(2000), [math.nan] * 400), ("KS",)),
        (np.full(2000, INF, np.float32), ("PSI", "KS")),
    ],
)
def test_shifts_are_seen(now, crossed):
    report = read(calibrated(normal(2000, seed=1)), now)
    assert report.crossed == crossed
    assert report.drifted
    assert report.summary().startswith(f"Drift by {' and '.join(crossed)}: of {len(now)} rows")


def test_limits_are_the_callers():
    c, now = calibrated(normal(2000, seed=1)), normal(2000, 0.2)
    assert read(c, now, significance=1e-12).crossed == ()
    assert read(c, now, psi_limit=0.02).crossed == ("PSI", "KS")


def test_nothing_counted():
    monitor = Monitor(calibrated(normal(50)))
    monitor.update(routed(np.float32([]), 0.0))
    monitor.add([], 0)
    monitor.add_shadow([])
    report = monitor.read()
    assert (report.rows, report.share_kept, report.share_routed, report.shadow) == (0, None, None, None)
    assert (report.lower, report.upper, report.psi, report.ks_p_value) == (0, 1, 0, 1)
    assert not report.drifted
    assert report.summary() == "No rows yet."


def test_a_window_ends_at_the_read_that_restarts():
    c = calibrated(normal(400))
    monitor = Monitor(c)
    monitor.add(normal(100), 30)
    assert monitor.read().rows == 100
    assert monitor.read(restart=True).rows == 100
    monitor.add(normal(50, 3.0), 10)
    report = monitor.read()
    assert (report.rows, report.share_routed) == (50, 0.2)
    assert report.psi == read(c, normal(50, 3.0)).psi
    assert monitor.totals().histogram.sum() == 150
    assert monitor.totals().routed == 40


def test_one_warning_for_each_crossing(caplog):
    monitor = Monitor(calibrated(normal(2000, seed=1)))
    counts = []
    for mean in (0.2, 0.2, 1.0, 1.0, 0.0, 0.2):  # KS, the same, PSI too, the same, neither, KS
        monitor.add(normal(2000, mean), 0)
        report = monitor.read(restart=True)
        counts.append(len(caplog.records))
    assert counts == [1, 1, 2, 2, 2, 3]
    assert caplog.records[-1].levelno == logging.WARNING
    assert caplog.messages[-1] == report.summary()


def test_report_is_a_record_of_plain_numbers():
    report = read(calibrated(normal(300)), normal(100))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rows = 1
    plain = {"float": (int, float), "int": (int,), "float | None": (float,), "Shadow | None": (type(None),)}
    assert all(type(getattr(report, f.name)) in plain[f.type] for f in dataclasses.fields(DriftReport))


# The shadow sample's bounds


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 300), (1, 1), (3, 50), (40, 400), (299, 300), (700, 20_000)])
@pytest.mark.parametrize("confidence", [0.9, 0.999])
def test_shadow_bounds_are_scipys(k, n, confidence):
    shadow = Shadow(n, k, confidence)
    assert math.isclose(shadow.upper, stats.beta.ppf(confidence, k + 1, n - k) if k < n else 1, rel_tol=1e-5)
    p = shadow.upper_always
    assert p > shadow.upper or p == 1
    if p < 1 - 1e-6:
        mixture = special.betaln(k + 0.5, n - k + 0.5) - special.betaln(0.5, 0.5)
        likelihood = special.xlogy(k, p) + special.xlog1py(n - k, -p)
        assert math.isclose(mixture - likelihood, -math.log(1 - confidence), rel_tol=1e-4)


def test_a_look_at_all_times_needs_the_bound_for_all_times():
    """Of 100 streams, 10 may ever be above the bound, give or take; the one for a single look fails far more."""
    p, confidence, streams = 0.1, 0.9, 100
    looks = np.unique(np.geomspace(1, 2000, 30).astype(int))
    disagreements = (np.random.default_rng(0).random((streams, 2000)) < p).cumsum(axis=1)[:, looks - 1]
    low = {(k, n) for row in disagreements for k, n in zip(row.tolist(), looks.tolist(), strict=True) if k < n * p}
    bounds = {(k, n): Shadow(n, k, confidence) for k, n in low}
    ever = {"upper": 0, "upper_always": 0}
    for name in ever:
        below = {pair for pair, shadow in bounds.items() if getattr(shadow, name) < p}
        ever[name] = sum(any(pair in below for pair in zip(row, looks, strict=True)) for row in disagreements.tolist())
    assert ever["upper_always"] <= streams * (1 - confidence) + 3 * math.sqrt(streams * 0.1 * 0.9)
    assert ever["upper"] > 2 * streams * (1 - confidence)
