"""What a pair of models costs on this machine, what dispatch takes of it, and what the fused op wins there."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import cycle
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from elang import __version__, backend, contract, ops
from elang.backbones import logits_of
from elang.calibration.artefact import Artefact, Record
from elang.calibration.costs import BatchCosts
from elang.cuda_graph import sizes_of
from elang.dispatch import BUCKETS, MODES
from elang.evaluation.predict import label_columns
from elang.evaluation.timing import NaiveCascade, alternate, awaited, dispatch_efficiency, medians, routed_inputs
from elang.joint import JointClassifier
from elang.progress import Report, silent
from elang.router import Router

BATCH_SIZES = (1, 8, 32)
SHARES = (0.0, 0.12, 0.31, 0.5, 1.0)
ROWS, LENGTH, ROUNDS = 32, 128, 7
HEADS, ROWS_OF_HEADS = ((312, 2), (768, 3), (1024, 20)), (1, 8, 64, 512)
CALLS = 100  # of an op between two looks at the clock

Batch = dict[str, Tensor]
Clock = Callable[[], float]


class Measured(Artefact):
    """Where and how something was measured."""

    version: Literal[1] = 1
    device: str
    threads: int
    dtype: str
    rounds: int
    torch: str = str(torch.__version__)
    library: str = __version__  # of elang
    date: str = Field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))


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
    clock: Clock = time.perf_counter,
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
    _check("batch_sizes", batch_sizes, "rows >= 1", lambda size: size >= 1)
    _check("shares", shares, "shares in [0, 1]", lambda share: 0 <= share <= 1)
    _check("dispatch", dispatch, f"some of {', '.join(MODES)}", lambda mode: mode in MODES)
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

    with _on_threads(threads):
        pair = _Pair(swift, super_, label_map, _Stopwatch(rounds, clock, device))
        return PairBench(
            **_machine(device, swift.dtype, super_.dtype),
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


@torch.inference_mode()
def bench_route(
    *,
    heads: Sequence[tuple[int, int]] = HEADS,
    rows: Sequence[int] = ROWS_OF_HEADS,
    rounds: int = ROUNDS,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    report: Report = silent,
    clock: Clock = time.perf_counter,
) -> RouteBench:
    """Time `elang.route` and the eager chain that it fuses, in alternation, on random rows of which half are routed.

    Args:
        heads: (H, C) of each.
        rows: N of each.
        threads: of torch, meanwhile; None: as many as it has.

    Raises:
        ValueError: no head or rows, H or N below 1, fewer than two classes, rounds or threads below 1.
    """
    _check("heads", heads, "(H, C) with H >= 1 and C >= 2", lambda head: head[0] >= 1 and head[1] >= 2)
    _check("rows", rows, "rows >= 1", lambda n: n >= 1)
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    stopwatch, points = _Stopwatch(rounds, clock, device), []
    with _on_threads(threads):
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
            **_machine(device, torch.float32),
            rounds=rounds,
            backend=str(backend.served("route", device.type).backend),
            points=tuple(points),
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
    _check("rows", (rows,), ">= 1", lambda n: n >= 1)
    _check("length", (length,), ">= 1", lambda n: n >= 1)
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
class _Stopwatch:
    rounds: int
    clock: Clock
    device: torch.device

    def __call__(self, runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each run, in alternation."""
        waiting = {name: awaited(run, self.device) for name, run in runs.items()}
        return medians(alternate(waiting, self.rounds, clock=self.clock))


@dataclass(frozen=True)
class _Pair:
    swift: Any
    super_: Any
    label_map: contract.LabelMap
    stopwatch: _Stopwatch

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
            models = {"swift": self.swift, "naive": NaiveCascade(self.swift, self._super_like_swift, router), **joints}
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

    def _super_like_swift(self, **inputs: Tensor) -> Tensor:
        """For the naive cascade, which puts Super's logits among Swift's."""
        return logits_of(self.super_(**inputs)).to(self.swift.dtype)

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


def _chain(hidden: Tensor, weight: Tensor, bias: Tensor, threshold: float) -> Any:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    score = torch.logsumexp(logits, dim=1)
    return logits, score, torch.lt(score, threshold).nonzero()


_OPS: dict[str, Callable[..., Any]] = {"eager": _chain, "route": ops.route}


def _repeat(call: Callable[[], Any]) -> None:
    for _ in range(CALLS):
        call()


def _answer_next(model: Callable[..., Any], batches: Iterator[Batch]) -> None:
    model(**next(batches))


def _batches(inputs: Batch, size: int) -> list[Batch]:
    """The complete batches of so many rows, each padded to its longest."""
    starts = range(0, len(inputs["attention_mask"]) - size + 1, size)
    return [routed_inputs(inputs, torch.arange(start, start + size)) for start in starts]


@contextmanager
def _on_threads(threads: int | None) -> Iterator[None]:
    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}, wanted >= 1")
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine(device: torch.device, *dtypes: torch.dtype) -> dict[str, Any]:
    on_cpu = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "threads": torch.get_num_threads(),
        "dtype": ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes)),
    }


def _check(name: str, values: Sequence[Any], wanted: str, holds: Callable[[Any], bool]) -> None:
    if not values or not all(map(holds, values)):
        raise ValueError(f"{name}: got {', '.join(map(str, values)) or 'none'}, wanted {wanted}")


def _check_rows(inputs: Mapping[str, Tensor], most: int) -> None:
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or not mask[:, :1].all() or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("attention_mask: got none or other than [R, M], wanted each row's tokens first, then padding")
    for name, value in inputs.items():
        if value.shape[:1] != mask.shape[:1]:
            raise ValueError(f"{name}: got {list(value.shape)}, wanted [{len(mask)}, ...] as in attention_mask")
    if len(mask) < most:
        raise ValueError(f"inputs: got {len(mask)} rows, wanted at least {most}, those of the largest batch")
