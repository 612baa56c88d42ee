"""What a pair of models costs on this machine, and what dispatch takes of it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from elang import checks, contract
from elang.calibration.artefact import Record
from elang.calibration.costs import BatchCosts
from elang.cuda_graph import sizes_of
from elang.dispatch import BUCKETS, MODES
from elang.evaluation.machine import Measured, machine, on_threads
from elang.evaluation.predict import label_columns
from elang.evaluation.timing import ROUNDS, NaiveCascade, Stopwatch, dispatch_efficiency, routed_inputs
from elang.joint import JointClassifier
from elang.progress import Report, silent
from elang.router import Router

BATCH_SIZES = (1, 8, 32)
SHARES = (0.0, 0.12, 0.31, 0.5, 1.0)
ROWS, LENGTH = 32, 128

Batch = dict[str, Tensor]


class Point(Record):
    """A joint model at one share of the rows routed, in one mode. Seconds are sums over batches, of medians."""

    mode: str  # of dispatch
    batch_size: int
    share_routed: float  # measured
    swift_seconds: float
    routed_seconds: float  # Super alone on just the routed rows
    super_seconds: float  # Super alone on everything
    naive_seconds: float  # the naive cascade
    joint_seconds: float
    dispatch_efficiency: float  # Swift alone plus Super alone on just the routed rows, over the joint model
    over_super: float  # how many times as fast
    over_naive: float
    capacity: int | None = None  # rows of Super's batch in `capacity` mode: the most that any batch routes


class PairBench(Measured):
    """Costs of two models by the rows of a batch, and the joint model of the two at shares routed. Saved as JSON."""

    swift: str
    super: str
    data: str  # what the rows are
    rows: int  # of which complete batches are measured
    length: int  # tokens of the longest row
    costs: BatchCosts  # in seconds, of Swift on a whole batch and of Super on each size
    points: tuple[Point, ...]


@torch.inference_mode()
def bench_pair(
    swift: Any,
    super_: Any,
    inputs: Mapping[str, Tensor],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    shares: Sequence[float] = SHARES,
    dispatch: Sequence[str] = tuple(MODES),
    rounds: int = ROUNDS,
    threads: int | None = None,
    data: str = "given",
    report: Report = silent,
    clock: Callable[[], float] = time.perf_counter,
) -> PairBench:
    """Time two sequence classifiers and the joint model of the two, eagerly, in one process and in alternation.

    Costs are of batches of the largest batch size: Swift on all rows, Super on each number of them that `bucket`
    dispatch makes of the routed ones, other rows in every round. They are costs for `elang.calibrate`; where `bucket`
    dispatch will serve, with `buckets=True`.

    A share is met as nearly as whole rows allow, by an energy threshold half way between two scores. In `capacity` mode
    Super's batch has room for the most rows that any batch routes, so that none overflows and all modes answer alike.

    Args:
        swift, super_: Hugging Face sequence classifiers in eval mode, on one device. They stay as they are.
        inputs: row tensors of R rows, padded at the end; `attention_mask` [R, M] among them.
        batch_sizes: each at most R. Rows past the last complete batch are left out.
        dispatch: of `elang.dispatch.MODES`.
        threads: of torch, meanwhile; None: as many as it has.
        data: what the rows are; recorded.

    Raises:
        ValueError: labels that do not match, models on two devices, a batch size below 1 or above R, a share outside
            [0, 1], an unknown mode, rounds or threads below 1, padding that is not at the end.
        RuntimeError: a model is in training mode.
    """
    contract.check_eval(("swift", swift), ("super_", super_))
    checks.each("batch_sizes", batch_sizes, "rows >= 1", lambda size: size >= 1)
    checks.each("shares", shares, "shares in [0, 1]", lambda share: 0 <= share <= 1)
    checks.each("dispatch", dispatch, f"some of {', '.join(MODES)}", lambda mode: mode in MODES)
    _check_rows(inputs, max(batch_sizes))
    device = swift.device
    if super_.device != device:
        raise ValueError(f"super_: got a model on {super_.device}, wanted it on {device} like swift")
    labels = [super_.config.id2label[i] for i in range(super_.config.num_labels)]
    columns = label_columns("swift", swift, labels, "super")
    label_map: contract.LabelMap = dict(zip(columns, range(len(labels)), strict=True))

    inputs = {name: value.to(device) for name, value in inputs.items()}
    rows, length = inputs["attention_mask"].shape[0], int(inputs["attention_mask"].sum(dim=1).max())
    total, done = sum(rows // size * size for size in batch_sizes) * len(shares), 0

    def advance(answered: int) -> None:
        nonlocal done
        done += answered
        report(done, total)

    with on_threads(threads):
        pair = _Pair(swift, super_, label_map, Stopwatch(rounds, clock, device))
        return PairBench(
            **machine(device, swift.dtype, super_.dtype),
            rounds=rounds,
            swift=swift.name_or_path or type(swift).__name__,
            super=super_.name_or_path or type(super_).__name__,
            data=data,
            rows=rows,
            length=length,
            costs=pair.costs(inputs, max(batch_sizes)),
            points=tuple(
                point
                for size in batch_sizes
                for point in pair.points(_batches(inputs, size), size, shares, dispatch, advance)
            ),
        )


def random_rows(
    swift: Any, super_: Any, rows: int = ROWS, *, length: int = LENGTH, ragged: bool = False, seed: int = 0
) -> Batch:
    """Inputs of random tokens that both models know, none of them special: `input_ids` and `attention_mask`, [R, M].

    Args:
        length: tokens of a row; with `ragged` of the longest, the others being evenly distributed from a 16th of it on.

    Raises:
        ValueError: `rows` or `length` below 1.
    """
    checks.each("rows", (rows,), ">= 1", lambda n: n >= 1)
    checks.each("length", (length,), ">= 1", lambda n: n >= 1)
    configs = [model.config for model in (swift, super_)]
    named = [item for config in configs for item in config.to_dict().items()]
    special = {value for name, value in named if name.endswith("_token_id") and isinstance(value, int)}
    words = torch.tensor([i for i in range(min(config.vocab_size for config in configs)) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((rows,), length)
    if ragged:
        lengths[1:] = torch.randint(max(length // 16, 1), length + 1, (rows - 1,), generator=generator)
    ids = words[torch.randint(len(words), (rows, length), generator=generator)]
    if any(config.is_encoder_decoder for config in configs):  # their classifiers read the state where a row ends
        ids[torch.arange(rows), lengths - 1] = swift.config.eos_token_id
    mask = torch.arange(length) < lengths[:, None]
    return {"input_ids": ids.where(mask, swift.config.pad_token_id or 0), "attention_mask": mask.long()}


@dataclass(frozen=True)
class _Pair:
    swift: Any
    super_: Any
    label_map: contract.LabelMap
    stopwatch: Stopwatch

    def costs(self, inputs: Batch, rows: int) -> BatchCosts:
        """On as many rows as the buckets of such a batch."""
        sizes = sizes_of(rows, BUCKETS)
        runs = {str(size): partial(_answer_next, self.super_, cycle(_batches(inputs, size))) for size in sizes}
        runs["swift"] = partial(_answer_next, self.swift, cycle(_batches(inputs, rows)))
        seconds = self.stopwatch(runs)
        of_super = {size: seconds[str(size)] for size in sizes}
        return BatchCosts(unit="s", rows=rows, swift=seconds["swift"], super=of_super)

    def points(
        self,
        batches: Sequence[Batch],
        size: int,
        shares: Sequence[float],
        dispatch: Sequence[str],
        advance: Callable[[int], None],
    ) -> Iterator[Point]:
        router = Router("energy", threshold=-math.inf)
        decide = self._joint(router, "exact")
        score = torch.cat([decide(**batch).routing.score for batch in batches]).sort().values.cpu()
        edges = torch.tensor([-math.inf, *score.tolist(), math.inf])
        for share in shares:
            count = round(share * len(score))
            router.set_threshold(edges[count : count + 2].mean().item())
            routings = [decide(**batch).routing for batch in batches]
            routed = [routing.order[: int(routing.n_routed)] for routing in routings]
            room = max(map(len, routed))
            room_of = {mode: room if mode == "capacity" else None for mode in dispatch}
            joints = {mode: self._joint(router, mode, capacity) for mode, capacity in room_of.items()}
            models = {"swift": self.swift, "naive": NaiveCascade(self.swift, self.super_, router), **joints}
            seconds = defaultdict[str, float](float)
            for batch, rows in zip(batches, routed, strict=True):
                runs = {name: partial(model, **batch) for name, model in models.items()}
                if len(rows):
                    runs["routed"] = partial(self.super_, **routed_inputs(batch, rows))
                # What runs Super whatever is routed has a turn of its own: it leaves the others a cold cache.
                apart = {"super": partial(self.super_, **batch)}
                if "capacity" in runs:
                    apart["capacity"] = runs.pop("capacity")
                for name, each in {**self.stopwatch(runs), **self.stopwatch(apart)}.items():
                    seconds[name] += each
                advance(size)
            for mode, joint in joints.items():
                yield _point(mode, size, joint, seconds, room_of[mode])

    def _joint(self, router: Router, mode: str, capacity: int | None = None) -> JointClassifier:
        return JointClassifier(self.swift, self.super_, router, mode, label_map=self.label_map, capacity=capacity)


def _point(mode: str, size: int, joint: JointClassifier, seconds: Mapping[str, float], capacity: int | None) -> Point:
    stats = joint.stats
    return Point(
        mode=mode,
        batch_size=size,
        share_routed=stats.routed / stats.rows,
        swift_seconds=seconds["swift"],
        routed_seconds=seconds["routed"],
        super_seconds=seconds["super"],
        naive_seconds=seconds["naive"],
        joint_seconds=seconds[mode],
        dispatch_efficiency=dispatch_efficiency(seconds["swift"], seconds["routed"], seconds[mode]),
        over_super=seconds["super"] / seconds[mode],
        over_naive=seconds["naive"] / seconds[mode],
        capacity=capacity,
    )


def _answer_next(model: Callable[..., Any], batches: Iterator[Batch]) -> None:
    model(**next(batches))


def _batches(inputs: Batch, size: int) -> list[Batch]:
    """The complete batches of so many rows, each padded to its longest."""
    starts = range(0, len(inputs["attention_mask"]) - size + 1, size)
    return [routed_inputs(inputs, torch.arange(start, start + size)) for start in starts]


def _check_rows(inputs: Mapping[str, Tensor], most: int) -> None:
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or not mask[:, :1].all() or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("attention_mask: got none or other than [R, M], wanted each row's tokens first, then padding")
    for name, value in inputs.items():
        if value.shape[:1] != mask.shape[:1]:
            raise ValueError(f"{name}: got {list(value.shape)}, wanted [{len(mask)}, ...] as in attention_mask")
    if len(mask) < most:
        raise ValueError(f"inputs: got {len(mask)} rows, wanted at least {most}, those of the largest batch")
