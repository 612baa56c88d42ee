"""GPU time, from graph replays between events: no launch gap, no host clock around work that is still under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

LAUNCHES = 20  # calls in one graph; each takes the next of the input sets
ROUNDS = 60

Spread = dict[str, float]


def _spread(samples: list[float]) -> Spread:
    return {f"p{q}": round(float(np.percentile(samples, q)), 3) for q in (20, 50, 80)}


def _captured(run: Callable[[int], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            run(i)
    return graph


def in_graph(variants: Mapping[str, Callable[[int], Any]], rounds: int = ROUNDS) -> dict[str, Spread]:
    """`{variant: {"p20", "p50", "p80"}}` microseconds of a call.

    run(i) takes input set i modulo their number: enough of them, and none is in the cache when its turn comes again.
    """
    graphs = {name: _captured(run) for name, run in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()  # so that the device is awake and the timed replay is queued behind it
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return {name: _spread(values) for name, values in samples.items()}


def between_events(run: Callable[[int], Any], rounds: int = ROUNDS) -> Spread:
    """As `in_graph` of what cannot be captured: calls queued one behind the other, launch gaps and waits included."""
    for i in range(3):
        run(i)
    samples = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(LAUNCHES):
            run(i)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return _spread(samples)


def queued(run: Callable[[], Any], rounds: int = ROUNDS) -> Spread:
    """As `between_events`, queued behind work that lasts longer than queueing does: without launch gaps."""
    for _ in range(3):
        run()
    samples = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(10_000_000)  # clock cycles: some 5 ms
        start.record()
        for _ in range(LAUNCHES):
            run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return _spread(samples)


def on_the_clock(variants: Mapping[str, Callable[[], Any]], rounds: int = 300) -> dict[str, Spread]:
    """Microseconds of the host's clock from an idle device to the end of the call, its results on the device."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 20):
        for name, run in variants.items():
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            run()
            torch.cuda.synchronize()
            if round_ >= 20:
                samples[name].append((time.perf_counter_ns() - start) / 1e3)
    return {name: _spread(values) for name, values in samples.items()}


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large device-to-device copy: the ceiling of whatever moves memory."""
    source = torch.randint(0, 99, (1 << 27,), device="cuda", dtype=torch.int64)  # 1 GiB
    target = torch.empty_like(source)
    microseconds = in_graph({"copy": lambda i: target.copy_(source)}, rounds=10)["copy"]["p50"]
    return 2 * source.numel() * source.element_size() / microseconds * 1e6
