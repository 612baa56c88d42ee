"""Wall-clock of callables that do the same work, and the project's two ratios: eta and dispatch efficiency."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from elang.backbones import logits_of
from elang.reference import score_logits
from elang.router import Router

ROUNDS = 7  # of a benchmark


def alternate(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in each round, `{name: [rounds]}`, all in one process and in turn.

    Every other round goes through the runs backwards: a machine that slows down or speeds up favours none of them. For
    work on a GPU the runs have to wait for it themselves.

    Args:
        warm_up: untimed rounds before the first.

    Raises:
        ValueError: `rounds` below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, wanted >= 1")
    for _ in range(warm_up):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs)[:: -1 if i % 2 else 1]:
            start = clock()
            runs[name]()
            seconds[name].append(clock() - start)
    return seconds


def awaited(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The same run; on a GPU it is over when the GPU is."""
    if device.type != "cuda":
        return run

    def waits() -> None:
        run()
        torch.cuda.synchronize(device)

    return waits


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in seconds.items()}


@dataclass(frozen=True)
class Stopwatch:
    """Times runs in alternation, each until the device is done with it."""

    rounds: int
    clock: Callable[[], float]
    device: torch.device

    def __call__(self, runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each run."""
        waiting = {name: awaited(run, self.device) for name, run in runs.items()}
        return medians(alternate(waiting, self.rounds, clock=self.clock))


def eta(super_seconds: float, joint_seconds: float, super_flops: float, joint_flops: float) -> float:
    """How much of the FLOPs speed-up reaches the clock, 1 being all of it. All four are sums over the same rows."""
    return (super_seconds / joint_seconds) / (super_flops / joint_flops)


def dispatch_efficiency(swift_seconds: float, routed_seconds: float, joint_seconds: float) -> float:
    """`T_ideal / T_joint`: Swift alone on the batches and Super alone on exactly the routed rows, over the joint model.

    Args:
        routed_seconds: Super on the `routed_inputs` of the same batches.
    """
    return (swift_seconds + routed_seconds) / joint_seconds


def routed_inputs(inputs: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The batch that an ideal dispatcher would hand to Super: the given rows, padded to the longest of them only.

    Args:
        inputs: row tensors, padded at the end; `attention_mask` [N, M] among them.
        rows: [K] int64, K >= 1.
    """
    columns = inputs["attention_mask"].shape[1]
    length = int(inputs["attention_mask"][rows].sum(dim=1).max())
    return {
        name: (v[rows, :length] if v.dim() > 1 and v.shape[1] == columns else v[rows]).contiguous()
        for name, v in inputs.items()
    }


class NaiveCascade:
    """The cascade people write by hand, the baseline to beat: Swift in full, a mask, Super once on the rows it selects.

    Nothing is trimmed or fused; decisions are those of `router`, answers those of a `JointClassifier` of the three.
    Call it with the models' keyword inputs, all of them row tensors; returns logits [N, C].
    """

    def __init__(self, swift: Callable[..., Any], super_: Callable[..., Any], router: Router) -> None:
        self.swift, self.super_, self.router = swift, super_, router

    @torch.no_grad()
    def __call__(self, **inputs: Tensor) -> Tensor:
        logits = logits_of(self.swift(**inputs))
        score = score_logits(logits, self.router.score, self.router.temperature)
        rows = (~(score >= self.router.threshold)).nonzero().squeeze(1)
        if len(rows):
            answers = logits_of(self.super_(**{name: v[rows] for name, v in inputs.items()}))
            logits[rows] = answers.to(logits.dtype)
        return logits


class PerSampleLoop:
    """As the authors' released code runs a batch: row by row at batch size 1, waiting for each row's score on the host.

    Called as `NaiveCascade` is. A row's trailing padding is cut, as it would be at batch size 1.
    """

    def __init__(self, swift: Callable[..., Any], super_: Callable[..., Any], router: Router) -> None:
        self.swift, self.super_, self.router = swift, super_, router

    @torch.no_grad()
    def __call__(self, **inputs: Tensor) -> Tensor:
        answers = []
        for row in range(len(inputs["attention_mask"])):
            one = routed_inputs(inputs, torch.tensor([row]))
            logits = logits_of(self.swift(**one))
            score = score_logits(logits, self.router.score, self.router.temperature)
            kept = score.item() >= self.router.threshold.item()
            answers.append(logits if kept else logits_of(self.super_(**one)))
        return torch.cat(answers)
