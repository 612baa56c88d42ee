"""A pair of models whose answers tell which row they are of and which model gave them, and what is due to each row.

Rows are whole numbers from 1 on, written as texts. Which third a row is of decides how sure Swift is of it: unsure rows
are routed, sure ones are kept, and the threshold may stand on either side of those in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elang.joint import JointClassifier
from elang.router import Router
from elang.serve import Batcher
from elang.super_model import OnError

BASE = 2048  # a row's two digits
MOST = BASE**2 - 1
STEP = 1024.0  # digits over STEP are logits, in [0, 2)
MARK = 4.0  # the logit of who answers
UNSURE, BETWEEN, SURE = range(3)  # a row's third
FAR = 10.0  # by which the energy of one third is above that of the one before, which lies in [4, 5)
USUAL, MOVED = 10.0, 20.0  # thresholds: below the rows in between, and above them
FAULT_EVERY = 999  # rows, of which Super fails on one


class Numbers:
    """How inputs are made of rows."""

    def check(self, rows: Sequence[str]) -> None:
        for row in rows:
            if not (row.isascii() and row.isdigit() and int(row) <= MOST):
                raise ValueError(f"rows: got {row!a}, wanted a whole number up to {MOST}")

    def __call__(self, rows: Sequence[str]) -> dict[str, Tensor]:
        return {"rows": torch.tensor([int(row) for row in rows])}


def third(row: Any) -> Any:  # int or Tensor
    return row % 3


def fails_on(rows: Tensor, faulty: range) -> Tensor:
    """Those that Super fails on, all of them unsure."""
    return (rows % FAULT_EVERY == 0) & (rows >= faulty.start) & (rows < faulty.stop)


class Seen:
    """How often each model was given each row, counted where all processes can look."""

    def __init__(self, rows: int) -> None:
        self._shared = {name: RawArray("B", rows + 1) for name in ("swift", "super")}

    def __getitem__(self, model: str) -> NDArray[np.uint8]:
        counts: NDArray[np.uint8] = np.frombuffer(self._shared[model], dtype=np.uint8)
        return counts


@dataclass(frozen=True)
class Swift:
    seen: NDArray[np.uint8]

    def __call__(self, rows: Tensor) -> Tensor:
        np.add.at(self.seen, rows.numpy(), 1)
        none = torch.zeros(len(rows))
        return torch.stack([none + MARK, *_digits(rows), none], dim=1) + FAR * third(rows)[:, None]


@dataclass(frozen=True)
class Super:
    seen: NDArray[np.uint8]
    faulty: range

    def __call__(self, rows: Tensor) -> Tensor:
        np.add.at(self.seen, rows.numpy(), 1)
        if fails_on(rows, self.faulty).any():
            raise RuntimeError("Super fails, as it was told to")
        none = torch.zeros(len(rows))
        return torch.stack([none, *_digits(rows), none + MARK], dim=1)


def _digits(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows // BASE / STEP, rows % BASE / STEP


def telling_batcher(seen: Seen, faulty: range, on_super_error: OnError, **options: Any) -> Batcher[str]:
    joint = JointClassifier(
        Swift(seen["swift"]),
        Super(seen["super"], faulty),
        Router(threshold=USUAL),
        label_map={label: label for label in range(4)},
        on_super_error=on_super_error,
    )
    return Batcher(joint, Numbers(), **options)


class Told(NamedTuple):
    """What an answer says."""

    row: int | None  # whose; None: nobody's
    by: str  # whose logits these are
    model: str  # which it names
    degraded: bool


def told(label: str, model: str, degraded: bool, probabilities: Sequence[float]) -> Told:
    by, reference = ("swift", 3) if label == "LABEL_0" else ("super", 0)
    digits = [STEP * math.log(probabilities[column] / probabilities[reference]) for column in (1, 2)]
    high, low = map(round, digits)
    exact = max(abs(high - digits[0]), abs(low - digits[1])) < 0.1
    return Told(high * BASE + low if exact else None, by, model, degraded)
