"""Timing of calls that take microseconds: every call on its own clock reading, the variants in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch.profiler import ProfilerActivity, profile

BURST = 10  # calls of one variant before the next takes its turn


def microseconds(variants: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """`{variant: {"p50", "p99"}}` of single calls, over about `seconds` of wall-clock in all."""
    for run in variants.values():
        for _ in range(BURST):
            run()
    clock = time.perf_counter_ns
    samples: dict[str, list[int]] = {name: [] for name in variants}
    end = clock() + int(seconds * 1e9)
    while clock() < end:
        for name, run in variants.items():
            for _ in range(BURST):
                start = clock()
                run()
                samples[name].append(clock() - start)
    return {
        name: {f"p{q}": round(float(np.percentile(ns, q)) / 1e3, 3) for q in (50, 99)} for name, ns in samples.items()
    }


def allocations(run: Callable[[], Any]) -> int:
    """Tensor allocations of one call, as torch's profiler counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = trace.profiler.kineto_results.events()
    return sum(1 for event in events if event.name() == "[memory]" and event.nbytes() > 0)
