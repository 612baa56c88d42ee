"""Timing of calls that take microseconds: every call on its own clock reading, the variants in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
from torch.profiler import ProfilerActivity, profile

BURST = 10  # calls of one variant before the next takes its turn


def microseconds(
    variants: Mapping[str, Callable[[], Any]], seconds: float, burst: int = BURST
) -> dict[str, dict[str, float]]:
    """`{variant: {"p50", "p99"}}` of single calls, over about `seconds` of wall-clock in all."""
    for run in variants.values():
        for _ in range(burst):
            run()
    clock = time.perf_counter_ns
    samples: dict[str, list[int]] = {name: [] for name in variants}
    end = clock() + int(seconds * 1e9)
    while clock() < end:
        for name, run in variants.items():
            for _ in range(burst):
                start = clock()
                run()
                samples[name].append(clock() - start)
    return {
        name: {f"p{q}": round(float(np.percentile(ns, q)) / 1e3, 3) for q in (50, 99)} for name, ns in samples.items()
    }


def _memory(run: Callable[[], Any]) -> list[int]:
    """Bytes that one call takes (> 0) and gives back (< 0) in the course of time, as torch's profiler counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def allocations(run: Callable[[], Any]) -> int:
    """Tensor allocations of one call."""
    return sum(1 for nbytes in _memory(run) if nbytes > 0)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that a call's tensors, its results among them, take at once."""
    return max(accumulate(_memory(run), initial=0))
