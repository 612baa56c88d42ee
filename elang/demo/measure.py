"""Every figure of the demo's table: accuracy, FLOPs and wall-clock of each system on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elang.evaluation.flops import row_flops
from elang.evaluation.predict import Encoded
from elang.evaluation.timing import NaiveCascade, alternate, dispatch_efficiency, eta, medians, routed_inputs
from elang.joint import JointClassifier
from elang.progress import Report
from elang.router import Router

SWIFT, SUPER, NAIVE = "Swift", "Super", "naive"
TIMED_ROWS = 256
BATCH_SIZES = (1, 32)

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Answered:
    """What both models make of a held-out part."""

    swift_correct: Bools  # [N]
    super_correct: Bools  # [N]
    scores: Mapping[str, NDArray[np.float32]]  # each [N], Swift's

    def routed(self, score: str, threshold: float) -> Bools:  # [N]
        values = self.scores[score]
        return ~(np.isfinite(values) & (values >= np.float32(threshold)))

    def accuracy(self, routed: Bools) -> float:
        return float(np.where(routed, self.super_correct, self.swift_correct).mean())

    def random_accuracy(self, share_routed: float) -> float:
        """Expected accuracy when this share is routed at random."""
        return float(share_routed * self.super_correct.mean() + (1 - share_routed) * self.swift_correct.mean())


@dataclass(frozen=True)
class Point:
    """A threshold at which the joint model is measured."""

    name: str
    score: str
    threshold: float


@dataclass(frozen=True)
class Clock:
    """Wall-clock of a system over the timed rows, at one batch size."""

    speed_up: float  # over Super
    eta: float | None  # share of the FLOPs speed-up that reaches the clock; None for a single model
    efficiency: float | None  # dispatch efficiency; None for a single model


@dataclass(frozen=True)
class Row:
    """A line of the table. Shares, random routing and FLOPs are of the test rows."""

    name: str
    calibration_accuracy: float
    accuracy: float
    random_accuracy: float
    share_routed: float
    flops_speed_up: float  # over Super, each row at its own length
    clocks: Mapping[int, Clock]  # by batch size


def figures(
    swift: Any,
    super_: Any,
    texts: Encoded,
    calibration: Answered,
    test: Answered,
    points: Sequence[Point],
    report: Report,
) -> list[Row]:
    """Swift, Super, the naive cascade at the last of the points, and the joint model at each of them.

    Accuracy and FLOPs over all test rows (`texts`), wall-clock over the first 256 on the threads that torch has now.
    """
    routed, on_calibration = _decisions(test, points), _decisions(calibration, points)
    swift_flops, super_flops = row_flops(swift, texts.lengths), row_flops(super_, texts.lengths)
    timed = slice(TIMED_ROWS)

    def flops(name: str, rows: slice) -> float:
        return float((swift_flops[rows] * (name != SUPER) + super_flops[rows] * routed[name][rows]).sum())

    def clock(name: str, seconds: Mapping[str, float]) -> Clock:
        alone, ours = seconds[SUPER], seconds[name]
        if name in (SWIFT, SUPER):
            return Clock(alone / ours, None, None)
        return Clock(
            alone / ours,
            eta(alone, ours, flops(SUPER, timed), flops(name, timed)),
            dispatch_efficiency(seconds[SWIFT], seconds[_alone(name)], ours),
        )

    everything = slice(None)
    seconds = _seconds(swift, super_, texts, points, {name: mask[timed] for name, mask in routed.items()}, report)
    return [
        Row(
            name=name,
            calibration_accuracy=calibration.accuracy(on_calibration[name]),
            accuracy=test.accuracy(routed[name]),
            random_accuracy=test.random_accuracy(float(routed[name].mean())),
            share_routed=float(routed[name].mean()),
            flops_speed_up=flops(SUPER, everything) / flops(name, everything),
            clocks={size: clock(name, seconds[size]) for size in BATCH_SIZES},
        )
        for name in routed
    ]


def _decisions(part: Answered, points: Sequence[Point]) -> dict[str, Bools]:
    """Which rows each system hands to Super."""
    masks = {point.name: part.routed(point.score, point.threshold) for point in points}
    none = np.zeros(len(part.swift_correct), dtype=np.bool_)
    return {SWIFT: none, SUPER: ~none, NAIVE: masks[points[-1].name], **masks}


@torch.inference_mode()
def _seconds(
    swift: Any,
    super_: Any,
    texts: Encoded,
    points: Sequence[Point],
    routed: Mapping[str, Bools],  # by system, of the timed rows
    report: Report,
) -> dict[int, dict[str, float]]:
    """By batch size and system, the time of all batches together; and `_alone` of the systems that route.

    Systems alternate batch by batch, so that whatever else the machine does meets all of them alike, and every other
    batch goes through them backwards, so that none of them always finds the caches as the same other one left them.
    """
    last = points[-1]
    systems = {
        SWIFT: swift,
        SUPER: super_,
        NAIVE: NaiveCascade(swift, super_, Router(last.score, threshold=last.threshold)),
        **{
            point.name: JointClassifier(swift, super_, Router(point.score, threshold=point.threshold))
            for point in points
        },
    }
    rows = len(routed[SUPER])
    seconds = {size: {name: 0.0 for system in systems for name in (system, _alone(system))} for size in BATCH_SIZES}
    done = 0
    for size in BATCH_SIZES:
        for start in range(0, rows, size):
            batch = texts.batch(range(start, min(start + size, rows)))
            runs: dict[str, Callable[[], Any]] = {name: partial(model, **batch) for name, model in systems.items()}
            masks = {name: mask[start : start + size] for name, mask in routed.items()}
            for name, mask in masks.items():
                if name != NAIVE and mask.any() and not mask.all():
                    runs[_alone(name)] = partial(super_, **routed_inputs(batch, torch.from_numpy(np.flatnonzero(mask))))
            if start // size % 2:
                runs = dict(reversed(runs.items()))
            measured = medians(alternate(runs, rounds=1, warm_up=int(start == 0)))
            # Super on the whole batch is timed as it is.
            measured |= {_alone(name): measured[SUPER] for name, mask in masks.items() if mask.all()}
            for name, value in measured.items():
                seconds[size][name] += value
            done += min(size, rows - start)
            report(done, rows * len(BATCH_SIZES))
        seconds[size][_alone(NAIVE)] = seconds[size][_alone(last.name)]  # the same rows
    return seconds


def _alone(system: str) -> str:
    """The name under which Super's time on just the rows that `system` routes is kept."""
    return f"{SUPER} on what {system} routes"
