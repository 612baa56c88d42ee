"""What a pair of models costs on this machine, and what dispatch takes of it."""

from __future__ import annotations

from typing import Literal

from elang.calibration.artefact import Artefact, Record
from elang.calibration.costs import BatchCosts


class Point(Record):
    """A joint model at one share of the rows routed, in one mode. Speed-ups are ratios of medians."""

    mode: str  # of dispatch
    batch_size: int
    share_routed: float  # measured
    joint_seconds: float  # over all batches: the sum of each batch's median
    dispatch_efficiency: float  # Swift alone plus Super alone on just the routed rows, over the joint model
    over_super: float
    over_naive: float  # the naive cascade


class PairBench(Artefact):
    version: Literal[1] = 1
    swift: str
    super: str
    device: str
    threads: int
    dtype: str
    torch: str  # version
    library: str  # version of elang
    date: str
    length: int  # tokens of a row
    rounds: int
    costs: BatchCosts  # in seconds, of Swift on a whole batch and of Super on each size
    points: tuple[Point, ...]
