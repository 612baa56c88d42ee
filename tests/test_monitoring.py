from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import assert_partition
from monitored import calibrated, normal, routed
from scipy import stats

from elang.drift import Shadow
from elang.monitoring import BudgetController, Monitor
from elang.router import Router

INF = math.inf


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
