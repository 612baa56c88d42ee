"""A pair whose answers tell which row they are of, models that can be held and broken, and a clock that is set."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elang.joint import JointClassifier
from elang.router import Router
from elang.serve import Answer, Batcher
from elang.serve.batcher import Clock

SCALE, FAR, THRESHOLD = 8192, 10.0, 5.0
LIMIT = 30.0  # seconds: a test that waits so long has failed


class Ids:
    """Rows are whole numbers in (0, SCALE)."""

    def check(self, rows: Sequence[int]) -> None:
        for index, row in enumerate(rows):
            if not isinstance(row, int):
                raise TypeError(f"rows[{index}]: got {type(row).__name__}, wanted an int")

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {"ids": torch.tensor(rows)}


def routed(row: int) -> bool:
    return row % 3 == 0


def swift_logits(ids: Tensor) -> Tensor:
    return torch.stack([ids / SCALE + FAR * (ids % 3 != 0), torch.zeros(len(ids))], dim=1)


def super_logits(ids: Tensor) -> Tensor:
    return torch.stack([torch.zeros(len(ids)), ids / SCALE], dim=1)


class Model:
    """Notes the rows of each call. Holds them while `gate` is shut; `fault` takes the place of its logits."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        self.logits = logits
        self.fault: Callable[[Tensor], Any] | None = None
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self._entered = threading.Semaphore(0)

    def __call__(self, ids: Tensor) -> Any:
        self.batches.append(ids.tolist())
        self._entered.release()
        assert self.gate.wait(LIMIT)
        return (self.fault or self.logits)(ids)

    def wait_until_called(self) -> None:
        assert self._entered.acquire(timeout=LIMIT)


class SetClock(Clock):
    """Its time passes when a test says so."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        condition.wait(0.001)  # for a look at a time that may have been set since


class FakePair:
    """A batcher over two `Model`s."""

    def __init__(self, *, on_super_error: Any = "raise", super_timeout: float | None = None, **options: Any) -> None:
        self.swift, self.super = Model(swift_logits), Model(super_logits)
        self.clock = SetClock()
        joint = JointClassifier(
            self.swift,
            self.super,
            Router(threshold=THRESHOLD),
            label_map={0: 0, 1: 1},
            on_super_error=on_super_error,
            super_timeout=super_timeout,
        )
        self.batcher = Batcher(joint, Ids(), **{"clock": self.clock, **options})

    def __enter__(self) -> FakePair:
        return self

    def __exit__(self, *_: object) -> None:
        self.swift.gate.set()
        self.super.gate.set()
        self.batcher.close(timeout=LIMIT)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.0005)


def of_swift(row: int, *, degraded: bool = False) -> Answer:
    z = row / SCALE + FAR * (not routed(row))
    return Answer("LABEL_0", "swift", degraded, np.logaddexp(z, 0), (1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))))


def of_super(row: int) -> Answer:
    z = row / SCALE
    score = np.logaddexp(z + FAR * (not routed(row)), 0)
    return Answer("LABEL_1", "super", False, score, (1 / (1 + np.exp(z)), 1 / (1 + np.exp(-z))))


def assert_same(answers: Sequence[Answer], wanted: Sequence[Answer]) -> None:
    """Neighbouring ids are 3e-5 and more apart in a score or a probability."""
    assert [answer[:3] for answer in answers] == [answer[:3] for answer in wanted]
    got, want = (np.array([[a.score, *a.probabilities] for a in each]) for each in (answers, wanted))
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6)


def assert_answers(rows: Sequence[int], answers: Sequence[Answer]) -> None:
    """Every row has its own answer, by the model that it is due."""
    assert_same(answers, [of_super(row) if routed(row) else of_swift(row) for row in rows])
