from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from conftest import assert_partition
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from scipy import special, stats

from elang import prometheus
from elang.calibration import calibrate
from elang.drift import DriftReport, Shadow, _chi_square_quantile
from elang.late import LateRouter
from elang.monitoring import BudgetController, Monitor
from elang.prometheus import Metrics
from elang.reference import Route, partition
from elang.router import Router
from elang.stats import Stats

INF = math.inf


def calibrated(scores, share=0.6, **options):
    right = np.random.default_rng(0).random(len(scores)) < 0.8
    return calibrate({"energy": np.float32(scores)}, right, ~right, score="energy", swift_share=share, **options)


def normal(rows, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, rows).astype(np.float32)


def routed(scores, threshold):
    """What a router returns, as far as a monitor looks."""
    score = torch.as_tensor(scores)
    return Route(torch.empty(0), score, *partition(score.isfinite() & (score >= threshold)))


def read(calibration, scores, **options):
    monitor = calibration.monitor(**options)
    monitor.update(routed(scores, calibration.threshold))
    return monitor.read()


def lowered(scores):
    """As a router takes them: what is not finite lies below every score."""
    return np.where(np.isfinite(scores), scores, -np.inf)


# Drift


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


# Counting


@pytest.fixture
def no_host_reads(monkeypatch):
    def refuse(*_):
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)


def count_everything(monitor, routing):
    monitor.update(routing)
    shadow = monitor.shadow_rows(routing, 0.5)
    monitor.add_shadow(shadow)


def test_counting_reads_nothing_on_the_host(no_host_reads):
    count_everything(Monitor(calibrated(normal(100))), routed(normal(40), 0.0))


@pytest.mark.gpu
def test_counting_does_not_wait_for_the_gpu():
    monitor, on_gpu = Monitor(calibrated(normal(100))), routed(torch.from_numpy(normal(40)).cuda(), 0.0)
    count_everything(monitor, on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        count_everything(monitor, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert monitor.read().rows == 80


def test_counts_in_any_mode():
    """Made in inference mode, written to outside of it, and the other way round."""
    routing = routed(normal(10), 0.0)
    for first, second in ((True, False), (False, True)):
        monitor = Monitor(calibrated(normal(100)))
        for mode in (first, second):
            with torch.inference_mode(mode):
                count_everything(monitor, routing)
        with_gradients = routing.score.clone().requires_grad_()
        monitor.update(routing._replace(score=with_gradients))
        assert monitor.read().rows == 30
        assert monitor.totals().routed == 3 * int(routing.n_routed)


def test_scores_of_any_kind():
    scores, monitor = normal(64), Monitor(calibrated(normal(100)))
    strided = torch.from_numpy(np.stack([scores, scores], 1))[:, 0]
    for same in (scores.tolist(), torch.from_numpy(scores).double(), strided):
        monitor.add(same, 7)
    monitor.add(torch.from_numpy(scores), torch.tensor([7], dtype=torch.int32))
    alone = Monitor(calibrated(normal(100)))
    alone.add(torch.from_numpy(scores), 7)
    assert (monitor.totals().histogram == 4 * alone.totals().histogram).all()
    assert monitor.totals().routed == 28


def test_threads_count_what_one_does():
    monitor, batches = Monitor(calibrated(normal(100))), [routed(normal(n, seed=n), 0.0) for n in range(1, 9)]

    def count(i):
        monitor.update(batches[i % 8])
        monitor.add_shadow([True, False])
        return monitor.read()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(160)))
    alone = Monitor(calibrated(normal(100)))
    for batch in batches:
        alone.update(batch)
    totals = monitor.totals()
    assert (totals.histogram == 20 * alone.totals().histogram).all()
    assert totals[1:] == (20 * alone.totals().routed, 320, 160)


# The shadow sample


def test_shadow_rows_are_kept_ones_at_the_share():
    scores = normal(4000)
    scores[::50] = math.nan
    routing, monitor = routed(scores, 0.5), Monitor(calibrated(normal(100)))
    assert_partition(routing, 0.5)
    kept = routing.score >= 0.5
    for share in (0.01, 0.3):
        picked = monitor.shadow_rows(routing, share)
        assert picked.dtype == torch.bool
        assert not (picked & ~kept).any()
        expected = share * kept.sum().item()
        assert abs(picked.sum().item() - expected) < 4 * math.sqrt(expected)
    assert torch.equal(monitor.shadow_rows(routing, 1.0), kept)


def test_shadow_rows_are_those_of_the_seed():
    routing, c = routed(normal(300), -INF), calibrated(normal(100))
    one, same, other = Monitor(c, seed=1), Monitor(c, seed=1), Monitor(c, seed=2)
    picks = [one.shadow_rows(routing, 0.5) for _ in range(2)]
    assert all(torch.equal(pick, same.shadow_rows(routing, 0.5)) for pick in picks)
    assert not torch.equal(*picks)
    assert not torch.equal(picks[0], other.shadow_rows(routing, 0.5))


def test_shadow_disagreements_are_counted():
    monitor = Monitor(calibrated(normal(100), confidence=0.9))
    monitor.add([0.0], 0)
    monitor.add_shadow(torch.tensor([True, False, False]))
    monitor.add_shadow([True, True])
    report = monitor.read(restart=True)
    assert report.shadow == Shadow(5, 3, 0.9)
    assert " Super answers 3 of 5 kept rows otherwise: at most 88.78% with 90% confidence" in report.summary()
    assert monitor.read().shadow is None
    assert monitor.totals()[2:] == (5, 3)


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


# The budget


def serve(router, monitor, controller, mean, steps=30, size=500, seed=0):
    """Share routed in each step and the thresholds behind them."""
    generator = np.random.default_rng(seed)
    shares, thresholds = [], []
    for _ in range(steps):
        routing = routed(generator.normal(mean, 1, size).astype(np.float32), router.threshold.item())
        monitor.update(routing)
        shares.append(routing.n_routed.item() / size)
        thresholds.append(controller.step())
    return np.array(shares), np.array(thresholds)


def budget(then, share, limits=(-INF, INF), **options):
    router, monitor = Router(threshold=0.0), Monitor(calibrated(then))
    return router, monitor, BudgetController(router, monitor, share, limits=limits, **options)


def test_controller_begins_at_the_calibrations_quantile():
    then = normal(1000)
    router, *_ = budget(then, 0.3)
    assert 0.29 <= (then < router.threshold.item()).mean() <= 0.3


@pytest.mark.parametrize("mean", [-2.5, -0.7, 1.5])
def test_controller_holds_the_share_through_a_shift(mean):
    router, monitor, controller = budget(normal(1000), 0.3)
    before, _ = serve(router, monitor, controller, 0.0)
    assert abs(before.mean() - 0.3) < 0.03
    shares, thresholds = serve(router, monitor, controller, mean, steps=60, seed=1)
    assert abs(shares[0] - 0.3) > 0.15
    assert abs(shares[40:].mean() - 0.3) < 0.03
    # It goes where the share is and stays: no way back of more than the noise of a quantile.
    moves = np.diff(thresholds) * np.sign(mean)
    assert moves.sum() > 0.5 * abs(mean)
    assert -moves[moves < 0].sum() < 0.15
    assert stats.norm.cdf(thresholds[-1] - mean) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize(("mean", "ends_at"), [(-3.0, 0), (3.0, 1)])
def test_controller_stays_within_its_limits(mean, ends_at):
    then = normal(1000)
    limits = tuple(np.sort(then)[[200, 400]].tolist())
    router, monitor, controller = budget(then, 0.3, limits)
    _, thresholds = serve(router, monitor, controller, mean)
    assert limits[0] <= thresholds.min() <= thresholds.max() <= limits[1]
    assert thresholds[-1] == router.threshold.item() == limits[ends_at]


def test_controller_brings_a_threshold_within_its_limits():
    then = normal(1000)
    high = float(np.sort(then)[299])
    router, monitor = Router(threshold=float(np.sort(then)[300])), Monitor(calibrated(then))
    BudgetController(router, monitor, 0.3, limits=(-INF, high), tolerance=0.5)
    assert router.threshold.item() <= high


def test_controller_never_exceeds_the_share_for_a_tie():
    """Between the two scores there is no half: half of the rows go to Super, or all."""
    then = np.repeat([0.0, 1.0], 500)
    router, monitor, controller = budget(then, 0.7)
    assert router.threshold.item() == 1
    monitor.update(routed(then.astype(np.float32), 1.0))
    assert controller.step() == 1


def test_every_move_is_logged(caplog):
    caplog.set_level(logging.INFO, "elang.monitoring")
    router, monitor, controller = budget(normal(1000), 0.3)
    start = router.threshold.item()
    share = f"{(normal(1000) < start).mean():.1%}"
    assert caplog.messages == [
        f"threshold 0 -> {start:.7g}, which routes {share} of the traffic as it is now (30.0% wanted)"
    ]
    caplog.clear()
    _, thresholds = serve(router, monitor, controller, 1.0)
    moves = np.diff([start, *thresholds])
    assert len(caplog.messages) == np.count_nonzero(moves) < len(moves)


def test_half_life_is_in_rows():
    """After so many rows of nothing but 2.0, the calibration counts half: its median is the quarter's place."""
    then = normal(1000)
    _, monitor, controller = budget(then, 0.2501, tolerance=0.0, half_life=100.0)
    monitor.add(torch.full((100,), 2.9), 0)
    total = 100 / math.log(2)
    place = 0.2501 * (total / 2 + 100) / (total / 2)
    assert abs((then < controller.step()).mean() - place) <= 0.005


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, m: Monitor("cal.json"), "calibration: got str, wanted Calibration"),
        (lambda c, m: Monitor(calibrated([1.0, 1.0])), "calibration: got one whose energy is the same on all rows"),
        (lambda c, m: Monitor(c, psi_limit=0), "psi_limit: got 0,"),
        (lambda c, m: Monitor(c, significance=0.6), "significance: got 0.6,"),
        (lambda c, m: m.add(torch.zeros(2, 2), 0), "score: got torch.float32 [2, 2], wanted floats [N]"),
        (lambda c, m: m.add(torch.zeros(2, dtype=int), 0), "score: got torch.int64 [2],"),
        (lambda c, m: m.add([1.0], 2), "n_routed: got 2, wanted a whole number from 0 to N = 1"),
        (lambda c, m: m.add([1.0], 0.5), "n_routed: got 0.5, wanted a whole"),
        (lambda c, m: m.add([1.0], torch.zeros(2, dtype=int)), "n_routed: got torch.int64 [2] on cpu, wanted"),
        (lambda c, m: m.add([1.0], torch.zeros(1)), "n_routed: got torch.float32 [1] on cpu, wanted"),
        (lambda c, m: m.add([1.0], torch.zeros(1, dtype=int, device="meta")), "n_routed: got torch.int64 [1] on meta"),
        (lambda c, m: m.shadow_rows(routed([1.0], 0.0), 0.0), "share: got 0.0,"),
        (lambda c, m: m.add_shadow(torch.zeros(2)), "disagree: got torch.float32 [2], wanted bool [K]"),
        (lambda c, m: BudgetController(Router("margin", threshold=0), m, 0.3, limits=(0, 1)), "router: got margin at"),
        (
            lambda c, m: BudgetController(Router(threshold=0, temperature=2), m, 0.3, limits=(0, 1)),
            "router: got energy",
        ),
        (lambda c, m: BudgetController(Router(threshold=0), m, 1.1, limits=(0, 1)), "max_super_share: got 1.1"),
        (lambda c, m: BudgetController(Router(threshold=0), m, 0.3, limits=(1, 0)), "limits: got (1, 0), wanted low"),
        (lambda c, m: BudgetController(Router(threshold=0), m, 0.3, limits=(math.nan, 1)), "limits: got (nan, 1)"),
        (
            lambda c, m: BudgetController(Router(threshold=0), m, 0.3, limits=(0, 1), half_life=0),
            "half_life: got 0, wanted",
        ),
        (
            lambda c, m: BudgetController(Router(threshold=0), m, 0.3, limits=(0, 1), tolerance=-1),
            "tolerance: got -1, wanted",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    c = calibrated(normal(100))
    monitor = Monitor(c)
    with pytest.raises((ValueError, TypeError)) as error:
        call(c, monitor)
    assert str(error.value).startswith(message)
    assert monitor.totals().histogram.sum() == 0


# Prometheus


def scraped(registry):
    """name -> labels -> value, from the text as Prometheus reads it."""
    samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = frozenset(sample.labels.items())
            assert labels not in samples.setdefault(sample.name, {}), "a sample twice"
            samples[sample.name][labels] = sample.value
    return samples


def of(samples, name, **labels):
    return samples[name][frozenset(labels.items())]


@pytest.fixture
def exported():
    registry = CollectorRegistry()
    return registry, Metrics(registry)


def test_metrics_of_several_joint_models(exported, swift, super_, inputs):
    registry, exporter = exported
    joints = {
        "exact": tiny_models.half_way(swift, super_, inputs),
        "bucket": tiny_models.half_way(swift, super_, inputs, dispatch="bucket"),
        "capacity": tiny_models.half_way(swift, super_, inputs, dispatch="capacity", capacity=1),
    }
    then = joints["exact"](**inputs).routing.score.numpy()
    monitor = Monitor(calibrated(then, 0.5))
    timers = {name: exporter.watch(name, joint, monitor if name == "exact" else None) for name, joint in joints.items()}
    for name, joint in joints.items():
        with timers[name].time():
            routing = joint(**inputs).routing
        if name == "exact":
            monitor.update(routing)
            monitor.add_shadow([True, False, False])
    samples = scraped(registry)
    for name, joint in joints.items():
        counted = joint.stats
        assert of(samples, "elang_rows_total", model=name, route="super") == counted.routed
        assert of(samples, "elang_rows_total", model=name, route="swift") == counted.rows - counted.routed
        assert of(samples, "elang_degraded_rows_total", model=name) == counted.degraded
        sizes = {size: of(samples, "elang_super_bucket_total", model=name, size=str(size)) for size in counted.buckets}
        assert sizes == counted.buckets
        threshold = of(samples, "elang_threshold_info", model=name, score="energy")
        assert threshold == joint.router.threshold.item()
        assert of(samples, "elang_route_seconds_count", model=name) == 1
    assert joints["capacity"].stats.degraded > 0
    assert of(samples, "elang_shadow_rows_total", model="exact") == 3
    assert of(samples, "elang_shadow_disagreement_total", model="exact") == 1
    assert of(samples, "elang_score_bucket", model="exact", le="+Inf") == len(then)
    assert {dict(labels)["model"] for labels in samples["elang_score_bucket"]} == {"exact"}
    list(parse_openmetrics(generate_openmetrics(registry).decode()))  # strict about names and counts

    joints["exact"].router.set_threshold(-INF)
    assert of(scraped(registry), "elang_threshold_info", model="exact", score="energy") == -INF
    exporter.unwatch("exact")
    samples = scraped(registry)
    assert {dict(labels)["model"] for name in samples for labels in samples[name]} == {"bucket", "capacity"}
    exporter.watch("exact", joints["exact"])


def test_score_buckets_are_exact_for_scores_on_their_bounds(exported):
    registry, exporter = exported
    then = normal(100).round(1)
    monitor = Monitor(calibrated(then))
    now = np.concatenate([then, monitor.bins.edges[monitor.bins.tenths], [INF, -INF, math.nan]])
    monitor.add(torch.from_numpy(now), 0)
    exporter.watch("m", SimpleNamespace(stats=Stats(0, 0, 0, 0, {}), router=Router(threshold=0)), monitor)
    buckets = {dict(labels)["le"]: value for labels, value in scraped(registry)["elang_score_bucket"].items()}
    bounds = np.float32([bound for bound in buckets if bound != "+Inf"])
    assert len(bounds) == len(monitor.bins.tenths) >= 7
    assert (np.float32(bounds) < monitor.bins.edges[monitor.bins.tenths]).all()
    for bound in buckets:
        counted = len(now) if bound == "+Inf" else (now <= np.float32(bound)).sum()
        assert buckets[bound] == counted


def test_every_gate_has_its_threshold(exported):
    registry, exporter = exported
    both = SimpleNamespace(
        stats=Stats(0, 0, 0, 0, {}), router=Router("logit", threshold=0.5), late=LateRouter(threshold=-1)
    )
    exporter.watch("both", both)
    exporter.watch("late", SimpleNamespace(stats=both.stats, router=None, late=both.late))
    samples = scraped(registry)["elang_threshold_info"]
    gates = {frozenset({("model", "both"), ("score", "logit")}): 0.5}
    gates |= {frozenset({("model", model), ("score", both.late.score)}): -1 for model in ("both", "late")}
    assert samples == gates


def test_seconds_begin_at_50_us(exported):
    registry, exporter = exported
    timer = exporter.watch("m", SimpleNamespace(stats=Stats(0, 0, 0, 0, {}), router=Router(threshold=0)))
    timer.observe(40e-6)
    timer.observe(0.003)
    samples = scraped(registry)
    assert of(samples, "elang_route_seconds_bucket", model="m", le="5e-05") == 1
    assert of(samples, "elang_route_seconds_bucket", model="m", le="0.002") == 1
    assert of(samples, "elang_route_seconds_bucket", model="m", le="0.005") == 2
    assert of(samples, "elang_route_seconds_sum", model="m") == pytest.approx(0.00304)


def test_names_are_taken_once(exported):
    registry, exporter = exported
    assert scraped(registry) == {}
    with pytest.raises(ValueError, match="elang_rows"):
        Metrics(registry)
    exporter.watch("m", None)
    with pytest.raises(ValueError, match=r"^model: got 'm', which is watched already"):
        exporter.watch("m", None)


def test_without_prometheus_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "elang.prometheus")
    with pytest.raises(
        ImportError, match=r"^elang.prometheus needs prometheus-client: pip install 'elang\[metrics\]'$"
    ):
        importlib.import_module("elang.prometheus")
    assert sys.modules.setdefault("elang.prometheus", prometheus) is prometheus
