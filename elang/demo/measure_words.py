"""Every figure of the demo for encoder-decoders: quality, FLOPs and wall-clock on the same words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from elang.calibration import GateCalibration, GateCosts
from elang.energy_head import EnergyHead
from elang.evaluation.flops import generate_flops, row_flops
from elang.evaluation.predict import Encoded
from elang.evaluation.timing import alternate, dispatch_efficiency, eta, medians, routed_inputs
from elang.late import LateRouter
from elang.progress import Report
from elang.router import Router
from elang.seq2seq import JointSeq2Seq

SWIFT, SUPER = "Swift", "Super"
TIMED_ROWS = {1: 48, 256: 1024}  # by batch size: one word at a time, and many at leisure
COST_BATCHES = 4

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Sources:
    """What is known of N held-out words: every score and what both models say."""

    early: dict[str, NDArray[np.float32]]  # each [N], before anything is decoded
    late: dict[str, NDArray[np.float32]]  # each [N], of what Swift decoded
    swift_exact: Bools  # [N]
    super_exact: Bools
    swift_errors: NDArray[np.float64]  # [N], phoneme errors per phoneme
    super_errors: NDArray[np.float64]
    swift_tokens: NDArray[np.int64]  # [N], written
    super_tokens: NDArray[np.int64]

    def kept(self, score: str | None, threshold: float) -> Bools:
        if score is None:
            return np.ones(len(self.swift_exact), dtype=np.bool_)
        values = self.early[score] if score in self.early else self.late[score]
        return np.isfinite(values) & (values >= np.float32(threshold))


class System(NamedTuple):
    """A way to gate, and its thresholds."""

    name: str
    early: str | None
    early_threshold: float
    late: str | None
    late_threshold: float


class Clock(NamedTuple):
    speed_up: float  # over Super
    eta: float | None
    efficiency: float | None  # of dispatch


class Row(NamedTuple):
    """A line of the table, of the test words; clocks are of the first of them."""

    name: str
    share_decoded: float  # by Swift
    share_kept: float
    exact: float
    errors: float
    flops_speed_up: float
    clocks: dict[int, Clock]  # by batch size


def inputs(texts: Encoded, rows: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
    return {name: value for name, value in texts.batch(rows).items() if name != "token_type_ids"}


@torch.inference_mode()
def costs(swift: Any, super_: Any, head: EnergyHead, texts: Encoded, size: int, report: Report) -> GateCosts:
    """Seconds of each part of a batch of `size` words, by how many of them it sees: medians over several batches."""
    router, parts = Router("logit", threshold=0.0), sorted({1 << i for i in range(size.bit_length())} | {size})
    seconds: dict[Any, list[float]] = {}
    for done in range(COST_BATCHES):
        start = done * size % max(1, len(texts) - size)
        batch = inputs(texts, range(start, min(start + size, len(texts))))
        states = swift.get_encoder()(**batch).last_hidden_state

        def encode(batch: dict[str, Tensor] = batch) -> None:
            head.decide(swift.get_encoder()(**batch).last_hidden_state, batch["attention_mask"], router)

        runs: dict[Any, Callable[[], Any]] = {"encode": encode}
        for rows in parts:
            first = torch.arange(min(rows, len(states)))
            runs["decode", rows] = partial(swift.generate, **_from_states(batch, states, first))
            runs["super", rows] = partial(super_.generate, **routed_inputs(batch, first))
        for key, values in alternate(runs, rounds=1, warm_up=int(done == 0)).items():
            seconds.setdefault(key, []).extend(values)
        report(done + 1, COST_BATCHES)
    return GateCosts(
        rows=size,
        encode=median(seconds["encode"]),
        decode={rows: median(seconds["decode", rows]) for rows in parts},
        super={rows: median(seconds["super", rows]) for rows in parts},
    )


def _from_states(batch: dict[str, Tensor], states: Tensor, rows: Tensor) -> dict[str, Any]:
    """What Swift's decoder needs to go on from the states of these rows."""
    return {"attention_mask": batch["attention_mask"][rows], "encoder_outputs": BaseModelOutput(states[rows])}


def systems(gates: GateCalibration) -> list[System]:
    """The quickest early gate, late gate and pair within the target on the calibration words, where there is one."""
    found: dict[tuple[bool, bool], tuple[float, System]] = {}
    for name, c in gates.curves.items():
        points = zip(c.seconds, c.quality, c.early_threshold, c.late_threshold, strict=True)
        for seconds, quality, early, late in points:
            kind = c.early is not None, c.late is not None
            if quality >= gates.super_quality - gates.value and seconds < found.get(kind, (np.inf,))[0]:
                found[kind] = seconds, System(name, c.early, early, c.late, late)
    return [system for _, system in found.values()]


def figures(
    ways: Sequence[System],
    swift: Any,
    super_: Any,
    head: EnergyHead,
    texts: Encoded,
    words: Sources,
    report: Report,
) -> list[Row]:
    """Swift, Super and each system. Quality and FLOPs of all words (`texts`), wall-clock of the first of them."""
    alone = [System(SWIFT, None, 0, None, 0), System(SUPER, None, 0, None, 0)]
    nobody = np.zeros(len(texts), dtype=np.bool_)
    decoded = {way.name: words.kept(way.early, way.early_threshold) for way in ways} | {SWIFT: ~nobody, SUPER: nobody}
    kept = {way.name: decoded[way.name] & words.kept(way.late, way.late_threshold) for way in ways}
    kept |= {SWIFT: ~nobody, SUPER: nobody}
    encoder = row_flops(swift.get_encoder(), texts.lengths)
    decoder = generate_flops(swift, texts.lengths, words.swift_tokens) - encoder
    of_super = generate_flops(super_, texts.lengths, words.super_tokens)

    def flops(name: str, rows: slice) -> float:
        ours = encoder * (name != SUPER) + decoder * decoded[name] + of_super * ~kept[name]
        return float(ours[rows].sum())

    seconds: dict[int, dict[str, float]] = {}
    for size, most in TIMED_ROWS.items():
        rows = min(most, len(texts))
        seconds[size] = _seconds(ways, swift, super_, head, texts, decoded, kept, size, rows, report)

    def clock(name: str, size: int) -> Clock:
        time, timed = seconds[size], slice(TIMED_ROWS[size])
        if name in (SWIFT, SUPER):
            return Clock(time[SUPER] / time[name], None, None)
        swift_alone = time[_ENCODE] + time[_part(name, "decoded")]
        return Clock(
            time[SUPER] / time[name],
            eta(time[SUPER], time[name], flops(SUPER, timed), flops(name, timed)),
            dispatch_efficiency(swift_alone, time[_part(name, "routed")], time[name]),
        )

    everything = slice(None)
    return [
        Row(
            name=way.name,
            share_decoded=float(decoded[way.name].mean()),
            share_kept=float(kept[way.name].mean()),
            exact=float(np.where(kept[way.name], words.swift_exact, words.super_exact).mean()),
            errors=float(np.where(kept[way.name], words.swift_errors, words.super_errors).mean()),
            flops_speed_up=flops(SUPER, everything) / flops(way.name, everything),
            clocks={size: clock(way.name, size) for size in TIMED_ROWS},
        )
        for way in (*alone, *ways)
    ]


@torch.inference_mode()
def _seconds(
    ways: Sequence[System],
    swift: Any,
    super_: Any,
    head: EnergyHead,
    texts: Encoded,
    decoded: Mapping[str, Bools],  # by system
    kept: Mapping[str, Bools],
    size: int,
    rows: int,
    report: Report,
) -> dict[str, float]:
    """The time of all batches together: of each system, of Swift's encoder, and of the rest of the ideal of each.

    Systems alternate batch by batch, and every other batch goes through them backwards, so that none of them always
    finds the caches as the same other one left them.
    """
    joints = {way.name: _joint(way, swift, super_, head) for way in ways}
    total: dict[str, float] = {}
    for start in range(0, rows, size):
        here = slice(start, min(start + size, rows))
        batch = inputs(texts, range(here.start, here.stop))
        states = swift.get_encoder()(**batch).last_hidden_state
        runs: dict[str, Callable[[], Any]] = {
            SWIFT: partial(swift.generate, **batch),
            SUPER: partial(super_.generate, **batch),
            _ENCODE: partial(swift.get_encoder(), **batch),
            **{name: partial(joint.generate, **batch) for name, joint in joints.items()},  # type: ignore[arg-type]
        }
        for name in joints:
            ours, theirs = (torch.from_numpy(np.flatnonzero(mask)) for mask in (decoded[name][here], ~kept[name][here]))
            if len(ours):
                runs[_part(name, "decoded")] = partial(swift.generate, **_from_states(batch, states, ours))
            if len(theirs):
                runs[_part(name, "routed")] = partial(super_.generate, **routed_inputs(batch, theirs))
        if start // size % 2:
            runs = dict(reversed(runs.items()))
        for name, value in medians(alternate(runs, rounds=1, warm_up=int(start == 0))).items():
            total[name] = total.get(name, 0.0) + value
        report(here.stop, rows)
    return {_part(name, what): 0.0 for name in joints for what in ("decoded", "routed")} | total


_ENCODE = "Swift's encoder"


def _part(name: str, what: str) -> str:
    return f"what is {what} of {name}"


def _joint(way: System, swift: Any, super_: Any, head: EnergyHead) -> JointSeq2Seq:
    late = None if way.late is None else LateRouter(way.late, threshold=way.late_threshold)
    if way.early is None:
        return JointSeq2Seq(swift, super_, late=late)
    return JointSeq2Seq(swift, super_, head, Router("logit", threshold=way.early_threshold), late=late)
