from __future__ import annotations

import importlib
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from monitored import calibrated, normal
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from elang import prometheus
from elang.late import LateRouter
from elang.monitoring import Monitor
from elang.prometheus import Metrics
from elang.router import Router
from elang.stats import Stats

INF = math.inf


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
