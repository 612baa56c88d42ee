"""What the fused op wins over the eager chain that it stands for, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elang import backend, checks, ops
from elang.calibration.artefact import Record
from elang.evaluation.machine import Measured, machine, on_threads
from elang.evaluation.timing import ROUNDS, Stopwatch
from elang.progress import Report, silent

HEADS = ((312, 2), (768, 3), (1024, 20))  # (H, C) of each
ROWS = (1, 8, 64, 512)
CALLS = 100  # of an op between two looks at the clock


class RoutePoint(Record):
    """One head on so many rows. Seconds are of one call."""

    hidden: int  # H
    classes: int  # C
    rows: int  # N
    eager_seconds: float
    route_seconds: float
    speedup: float


class RouteBench(Measured):
    """`elang.route` over the eager chain that it fuses: linear, logsumexp, lt, nonzero. Saved as JSON."""

    backend: str  # that serves the op: `elang.backend`
    points: tuple[RoutePoint, ...]


@torch.inference_mode()
def bench_route(
    *,
    heads: Sequence[tuple[int, int]] = HEADS,
    rows: Sequence[int] = ROWS,
    rounds: int = ROUNDS,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    report: Report = silent,
    clock: Callable[[], float] = time.perf_counter,
) -> RouteBench:
    """Time `elang.route` and the eager chain that it fuses, in alternation, on random rows of which half are routed.

    Args:
        heads: (H, C) of each.
        rows: N of each.
        threads: of torch, meanwhile; None: as many as it has.

    Raises:
        ValueError: no head or rows, H or N below 1, fewer than two classes, rounds or threads below 1.
    """
    checks.each("heads", heads, "(H, C) with H >= 1 and C >= 2", lambda head: head[0] >= 1 and head[1] >= 2)
    checks.each("rows", rows, "rows >= 1", lambda n: n >= 1)
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    stopwatch, points = Stopwatch(rounds, clock, device), []
    with on_threads(threads):
        for width, classes in heads:
            for n in rows:
                hidden = torch.randn(n, width, generator=generator).to(device)
                weight = torch.randn(classes, width, generator=generator).to(device) / width**0.5
                bias = torch.zeros(classes, device=device)
                threshold = torch.nn.functional.linear(hidden, weight, bias).logsumexp(dim=1).median().item()
                calls = {name: partial(op, hidden, weight, bias, threshold) for name, op in _OPS.items()}
                seconds = stopwatch({name: partial(_repeat, call) for name, call in calls.items()})
                eager, fused = seconds["eager"] / CALLS, seconds["route"] / CALLS
                points.append(
                    RoutePoint(
                        hidden=width,
                        classes=classes,
                        rows=n,
                        eager_seconds=eager,
                        route_seconds=fused,
                        speedup=eager / fused,
                    )
                )
                report(len(points), len(heads) * len(rows))
        return RouteBench(
            **machine(device, torch.float32),
            rounds=rounds,
            backend=str(backend.served("route", device.type).backend),
            points=tuple(points),
        )


def _chain(hidden: Tensor, weight: Tensor, bias: Tensor, threshold: float) -> Any:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    score = torch.logsumexp(logits, dim=1)
    return logits, score, torch.lt(score, threshold).nonzero()


_OPS: dict[str, Callable[..., Any]] = {"eager": _chain, "route": ops.route}


def _repeat(call: Callable[[], Any]) -> None:
    for _ in range(CALLS):
        call()
