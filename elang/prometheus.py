"""What joint models count, as Prometheus metrics: read when scraped, so that a request pays nothing for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
except ImportError as error:
    raise ImportError("elang.prometheus needs prometheus-client: pip install 'elang[metrics]'") from error

if TYPE_CHECKING:
    from elang.joint import JointClassifier
    from elang.monitoring import Monitor
    from elang.pipelines import JointPipeline
    from elang.seq2seq import JointSeq2Seq
    from elang.serve.batcher import Batcher

    Joint = JointClassifier | JointPipeline | JointSeq2Seq | Batcher[Any]

# Seconds. The usual ones begin at 5 ms, where a small model has long answered.
BUCKETS = (5e-5, 1e-4, 2e-4, 5e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Exports joint models to Prometheus, each under a label `model`. Threads may share it; one does for a process.

    | metric | labels beside `model` | what |
    |---|---|---|
    | `elang_rows_total` | `route`: swift, super | rows by the router's decision |
    | `elang_degraded_rows_total` | | rows for Super that Swift answered, for want of room or since Super failed |
    | `elang_super_bucket_total` | `size` | Super's batches by their rows, padding included |
    | `elang_unanswered_rows_total` | `reason`: busy, cancelled, failed | of a batcher: refused, or given up |
    | `elang_waiting_rows` | `for`: swift, super | of a batcher, a gauge: rows that a model has not begun |
    | `elang_threshold_info` | `score` | the threshold of each gate, a gauge |
    | `elang_route_seconds` | | histogram of what is timed by the caller: see `watch` |
    | `elang_score` | `le` | histogram of the scores, in tenths of the calibration's; without sum and count |
    | `elang_shadow_rows_total` | | kept rows that Super answered too |
    | `elang_shadow_disagreement_total` | | of these, where it answered otherwise |

    The last three need a monitor. A bucket of `elang_score` ends just below a tenth's threshold, whose rows are the
    next one's; NaN is in the bucket `+Inf` alone. A scrape waits for the devices that count.

    Args:
        registry: where to register; by default the one that prometheus-client serves.

    Raises:
        ValueError: the registry has metrics of these names already.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._watched: dict[str, tuple[Joint, Monitor | None]] = {}
        self._lock = threading.Lock()
        self._seconds = Histogram(
            "elang_route_seconds", "Time of a call, as the caller takes it", ["model"], registry=None, buckets=BUCKETS
        )
        registry.register(self)

    def watch(self, model: str, joint: Joint, monitor: Monitor | None = None) -> Histogram:
        """Export a joint model under the label `model`, with what its monitor counts.

        Returns:
            Its `elang_route_seconds`: `with seconds.time(): joint(**inputs)`, or `seconds.observe(0.003)`. On a GPU the
            call is over before the work is, unless its answer is read within.

        Raises:
            ValueError: another one is watched under this label.
        """
        with self._lock:
            if model in self._watched:
                raise ValueError(f"model: got {model!r}, which is watched already; unwatch it before")
            self._watched[model] = joint, monitor
            return self._seconds.labels(model)

    def unwatch(self, model: str) -> None:
        """Export this joint model no longer, and let go of it."""
        with self._lock:
            del self._watched[model]
            self._seconds.remove(model)

    def describe(self) -> Iterator[Metric]:
        """The metrics without a value, for a registry to see their names."""
        yield from _Families().all()
        yield from self._seconds.describe()

    def collect(self) -> Iterator[Metric]:
        """The metrics of all joint models, for a registry to serve."""
        with self._lock:
            watched = dict(self._watched)
        families = _Families()
        for model, (joint, monitor) in watched.items():
            families.add_joint(model, joint)
            if monitor is not None:
                families.add_monitor(model, monitor)
        yield from families.all()
        yield from self._seconds.collect()


class _Families:
    """Each metric once, with the samples of all models."""

    def __init__(self) -> None:
        self.rows = CounterMetricFamily("elang_rows", "Rows by the router's decision", labels=["model", "route"])
        self.degraded = CounterMetricFamily(
            "elang_degraded_rows", "Rows for Super that Swift answered", labels=["model"]
        )
        self.batches = CounterMetricFamily(
            "elang_super_bucket", "Batches of Super by their rows, padding included", labels=["model", "size"]
        )
        self.unanswered = CounterMetricFamily(
            "elang_unanswered_rows", "Rows that a batcher did not answer", labels=["model", "reason"]
        )
        self.waiting = GaugeMetricFamily(
            "elang_waiting_rows", "Rows that wait in a batcher for a model", labels=["model", "for"]
        )
        self.threshold = GaugeMetricFamily(
            "elang_threshold_info", "Rows of at least this score stay with Swift", labels=["model", "score"]
        )
        self.score = HistogramMetricFamily(
            "elang_score", "Scores, in tenths of those of the calibration", labels=["model"]
        )
        self.shadow_rows = CounterMetricFamily(
            "elang_shadow_rows", "Rows kept by Swift that Super answered too", labels=["model"]
        )
        self.disagreement = CounterMetricFamily(
            "elang_shadow_disagreement", "Of the shadow rows, where Super answered otherwise", labels=["model"]
        )

    def all(self) -> Iterator[Metric]:
        yield from vars(self).values()

    def add_joint(self, model: str, joint: Joint) -> None:
        stats: Any = joint.stats
        self.rows.add_metric([model, "swift"], stats.rows - stats.routed)
        self.rows.add_metric([model, "super"], stats.routed)
        self.degraded.add_metric([model], stats.degraded)
        for size, batches in stats.buckets.items():
            self.batches.add_metric([model, str(size)], batches)
        if hasattr(stats, "busy"):  # a batcher's, which stands above this file
            for reason in ("busy", "cancelled", "failed"):
                self.unanswered.add_metric([model, reason], getattr(stats, reason))
            self.waiting.add_metric([model, "swift"], stats.waiting)
            self.waiting.add_metric([model, "super"], stats.routed_waiting)
        for gate in filter(None, (joint.router, getattr(joint, "late", None))):
            self.threshold.add_metric([model, gate.score], gate.threshold.item())

    def add_monitor(self, model: str, monitor: Monitor) -> None:
        bins, totals = monitor.bins, monitor.totals()
        below = totals.histogram.cumsum()  # each edge, the scores below it; at the end, all
        # The rows of a tenth's own score are not below it, but Prometheus counts up to a bound, itself included.
        bounds = np.nextafter(bins.edges[bins.tenths], np.float32(-np.inf))
        buckets = [(str(bound), float(below[edge])) for bound, edge in zip(bounds, bins.tenths, strict=True)]
        self.score.add_metric([model], [*buckets, ("+Inf", float(below[-1]))], sum_value=None)
        self.shadow_rows.add_metric([model], totals.shadow_rows)
        self.disagreement.add_metric([model], totals.shadow_disagreements)
