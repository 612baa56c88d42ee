"""Which rows Super sees, and how its answers get back: the modes of dispatch.

| mode | Super's batch | host reads | for |
|---|---|---|---|
| `exact` | exactly the routed rows | one, of 8 bytes | eager |
| `bucket` | their number rounded up to one of a few sizes | the same one | `torch.compile`: few shapes |
| `capacity` | a fixed number of rows | none | one graph: `fullgraph=True`, export, CUDA-graph capture |
| `graph` | as `bucket`, picked on the device | none | CUDA, the least latency: `elang.cuda_graph` |
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elang import host_read, ops
from elang.reference import Route, partition
from elang.stats import Counts
from elang.super_model import Reply, SuperModel

Capacity = int | tuple[int, int]  # rows, or a share of the batch: numerator and denominator
ALL = (1, 1)
REAL = "row_is_real"  # of a Super that routes itself, an input: [K] bool, False for the copies that fill its batch
SuperInputs = Callable[[dict[str, Any], Tensor], Mapping[str, Any]]

# Powers of two, and from 8 on the sizes half way: on a GPU 8 rows cost about twice as much as 1, and from there on time
# goes with rows.
BUCKETS = (1, 2, 4, 8, *(size for power in range(4, 13) for size in (3 * 2 ** (power - 2), 2**power)))


class Routing(NamedTuple):
    """What a joint model decided about a batch of N rows."""

    score: Tensor  # [N] float32, Swift's confidence
    order: Tensor  # [N] int64, the routed rows first, each part in input order
    n_routed: Tensor  # [1] int32
    overflow: Tensor | None  # [1] int32, routed rows that Super had no room for; None: the mode has room for all
    degraded: Tensor | None  # [N] bool, routed rows that Swift answers, for want of room or of Super; None: none can be
    mode: str  # the dispatch mode, and "+route_logits" where Swift's head could not be taken over
    late_score: Tensor | None = None  # [N] float32, of what Swift decoded, NaN where it did not; None: no second gate


@dataclass(frozen=True)
class Plan:
    """What a mode needs to know beside the batch."""

    super_: SuperModel
    super_inputs: SuperInputs | None = None  # makes Super's inputs from all inputs and the rows [K] it is to see
    trim: bool = True
    buckets: tuple[int, ...] = BUCKETS
    capacity: Capacity | None = None
    counts: Counts | None = None
    marks_real: bool = False  # whether Super gets `REAL`


class Answer(NamedTuple):
    logits: Tensor  # [N, C], in Super's dtype if it was called
    outputs: tuple[Any, ...]  # what Super returned, as in Reply; none if it was not called
    overflow: Tensor | None = None  # as in Routing
    degraded: Tensor | None = None


class Count(NamedTuple):
    """What the host reads before it calls Super, and what it makes of it: a compiler is to see no comparison of counts,
    each of whose outcomes would be a graph of its own."""

    n_routed: int
    size: int  # rows of Super's batch: the routed ones, then copies of the last of them
    everything: bool  # the batch is all rows in their order, nothing else
    length: int | None  # columns of the inputs that a routed row needs; None: nothing is trimmed


class Mode(NamedTuple):
    run: Callable[..., Answer]  # of (route, inputs, plan, count); the count is None without size_of
    size_of: Callable[[int, int, Plan], int] | None = None  # rows of Super's batch for so many routed ones, of so many


def read(mode: Mode, route: Route, inputs: dict[str, Any], plan: Plan) -> Count:
    """The one host read of a batch, of 8 bytes: see `elang.host_read`.

    Raises:
        RuntimeError: under export or CUDA-graph capture, where there can be none.
    """
    if in_one_graph():
        raise RuntimeError(
            "dispatch: this mode reads the number of routed rows on the host, which a graph under export or capture "
            "cannot; dispatch='capacity' reads none"
        )
    rows = route.order.shape[0]
    mask = inputs.get("attention_mask") if plan.trim and plan.super_inputs is None else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != rows:
        mask = None
    n_routed, length = host_read.routed_extent(route.order, route.n_routed, mask)
    assert mode.size_of is not None, "a mode that counts"
    size = mode.size_of(n_routed, rows, plan)
    everything = n_routed == size == rows  # the order of all rows is the identity
    if plan.counts is not None:
        plan.counts.add(rows, n_routed, size)
    if mask is not None:
        columns = mask.shape[1]
        # No routed row has a token: all of it stays. A single column is a shape of its own to a compiler.
        length = min(max(length, 2), columns) if length else columns
    return Count(n_routed, size, everything, None if mask is None else length)


# For a compiler to break its graph at; the wrapper costs several microseconds where nothing compiles.
read_between_graphs = torch.compiler.disable(  # type: ignore[no-untyped-call]
    read, reason="the number of routed rows is read on the host; dispatch='capacity' reads none"
)


def counted(route: Route, inputs: dict[str, Any], plan: Plan, count: Count) -> Answer:
    """Call Super on the routed rows and put its logits in their places: `exact` and `bucket`.

    Tensors in `inputs` whose first dimension is N are row tensors; whatever else is there passes as it is. With trim
    the trailing columns that `attention_mask` [N, M] hides in every routed row are cut from all inputs whose second
    dimension is M. Nothing routed: Super is not called. Everything routed: the inputs are not copied.

    Args:
        route: Swift's decision; its logits are in Super's label order.

    Raises:
        ValueError: Super's logits are not [rows, C].
    """
    # Where Super's errors are caught there is a mask, whether or not there were any.
    nobody = torch.zeros_like(route.order, dtype=torch.bool) if plan.super_.guarded else None
    if count.size == 0:
        return Answer(route.logits, (), None, nobody)
    if count.length is not None:
        inputs = trimmed(inputs, inputs["attention_mask"].shape[1], count.length)
    as_they_are = count.everything and plan.super_inputs is None
    routed = inputs if as_they_are else gathered(route, inputs, plan, count.size)
    reply = _reply(route, routed, plan, count.size)
    if reply.logits is None:
        if plan.counts is not None:
            plan.counts.add_failed(count.n_routed)
        return Answer(route.logits, (), None, first(route.order, route.n_routed))
    if count.everything:
        # A copy: a captured graph, say, writes its next answer where this one lies.
        return Answer(reply.logits.clone(), reply.outputs, None, nobody)
    merged = ops.merge_rows(route.logits, reply.logits, route.order, route.n_routed)
    return Answer(merged, reply.outputs, None, nobody)


def capacity(route: Route, inputs: dict[str, Any], plan: Plan, count: None = None) -> Answer:
    """Call Super on a fixed number K of rows, whatever is routed. No host read, every shape static, nothing trimmed.

    More routed than K: rows whose score is not finite go first, then the others from the lowest score up; Swift answers
    the rest, which `overflow` counts and `degraded` names. Fewer: copies of a row fill up.
    """
    rows = route.order.shape[0]
    room = capacity_of(plan.capacity, rows)
    routed = first(route.order, route.n_routed)
    order, n_routed = (route.order, route.n_routed) if plan.capacity == ALL else _worst(route.score, routed, room)
    overflow, degraded = route.n_routed - n_routed, routed & ~first(order, n_routed)
    chosen = route._replace(order=order, n_routed=n_routed)
    reply = _reply(chosen, gathered(chosen, inputs, plan, room), plan, room) if room else Reply(route.logits, ())
    failed = None if reply.logits is not None else n_routed
    if plan.counts is not None and not torch.compiler.is_exporting():  # a program counts nothing
        plan.counts.add_on_device(rows, route.n_routed, overflow, failed)
        plan.counts.add_batch(room)
    if reply.logits is None or room == 0:
        return Answer(route.logits, (), overflow, degraded if failed is None else routed)
    return Answer(ops.merge_rows(route.logits, reply.logits, order, n_routed), reply.outputs, overflow, degraded)


MODES = {
    "exact": Mode(counted, lambda n_routed, rows, plan: n_routed),
    "bucket": Mode(counted, lambda n_routed, rows, plan: bucket_of(n_routed, rows, plan.buckets)),
    "capacity": Mode(capacity),
}


def in_one_graph() -> bool:
    """Whether what runs here becomes one graph, in which nothing can be read on the host."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
    return torch.compiler.is_exporting() or capturing


def choose() -> str:
    """What `auto` stands for here: no host read where there can be none, few shapes for a compiler, else `exact`."""
    if torch.compiler.is_exporting():
        return "capacity"
    if torch.compiler.is_compiling():
        return "bucket"
    return "capacity" if in_one_graph() else "exact"


def bucket_of(n_routed: int, rows: int, buckets: tuple[int, ...]) -> int:
    """The least bucket that holds them, and no more than all rows; past the largest bucket, all rows."""
    if n_routed == 0:
        return 0
    at = bisect_left(buckets, n_routed)
    return min(buckets[at], rows) if at < len(buckets) else rows


def as_capacity(asked: float) -> Capacity:
    """A whole number of rows, or a share of the batch (any float) as a fraction, which a compiler keeps as it is.

    As the share is written: 0.1 of 30 rows is 3, and not the 4 that binary floats make of it.
    """
    if isinstance(asked, Integral):
        return int(asked)
    share = Fraction(str(float(asked))).limit_denominator(10**6)
    return share.numerator, share.denominator


def capacity_of(capacity: Capacity | None, rows: int) -> int:
    """K of a batch of `rows`: at most all of them, and of a share at least that."""
    if capacity is None:
        raise ValueError("capacity: got None, wanted rows or a share of the batch, as this mode reads no count")
    if isinstance(capacity, int):
        return torch.sym_min(capacity, rows)  # type: ignore[no-untyped-call, no-any-return]
    numerator, denominator = capacity
    return (rows * numerator + denominator - 1) // denominator


def _reply(route: Route, inputs: Mapping[str, Any], plan: Plan, rows: int) -> Reply:
    return plan.super_(inputs, rows, route.logits.shape[1], route.logits.device)


def first(order: Tensor, count: Tensor) -> Tensor:
    """[N] bool: the rows order[:count]."""
    slots = torch.arange(order.shape[0], device=order.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter(0, order, slots < count)


def _worst(score: Tensor, routed: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """The partition that sends at most `room` of the routed rows: not finite, then the lowest scores, ties in order."""
    by_score = torch.argsort(score.where(score.isfinite(), -math.inf), stable=True)
    by_need = by_score[torch.argsort((~routed)[by_score].to(torch.uint8), stable=True)]
    within = torch.arange(routed.shape[0], device=routed.device) < room
    return partition(~(torch.zeros_like(routed).scatter(0, by_need, within) & routed))


def trimmed(inputs: dict[str, Any], columns: int, length: int) -> dict[str, Any]:
    """The first `length` columns of every input that has `columns` of them, as views."""
    return {
        name: v[:, :length] if isinstance(v, Tensor) and v.dim() > 1 and v.shape[1] == columns else v
        for name, v in inputs.items()
    }


def gathered(route: Route, inputs: dict[str, Any], plan: Plan, size: int) -> Mapping[str, Any]:
    """Super's inputs for `size` rows, the routed ones and copies of the last: every row tensor copied in one call."""
    rows = route.order.shape[0]
    routed: Mapping[str, Any]
    if plan.super_inputs is not None:
        (padded,) = ops.gather_rows([torch.arange(rows, device=route.order.device)], route.order, route.n_routed, size)
        routed = plan.super_inputs(inputs, padded)
    else:
        names = [name for name, v in inputs.items() if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == rows]
        gathered = ops.gather_rows([inputs[name] for name in names], route.order, route.n_routed, size)
        routed = {**inputs, **dict(zip(names, gathered, strict=True))}
    if not plan.marks_real:
        return routed
    return {**routed, REAL: torch.arange(size, device=route.order.device) < route.n_routed}
