"""Row movement: gather, merge, and the longest routed row. Elements go as integers of their size, whatever their type.

The count and the order are read on the device. An order or a count that points outside is a bug of the caller and stops
the kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elang import checks
from elang.triton_kernels.common import ceil_div, launch, on_device

BLOCK = 4096  # elements that a program moves
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@triton.jit
def _row_at(order, stride_order, slot, N):
    row = tl.load(order + slot.to(tl.int64) * stride_order)
    tl.device_assert((row >= 0) & (row < N), "order: wanted rows in [0, N)")
    return row


@triton.jit
def _routed_count(n_routed, N):
    count = tl.load(n_routed)
    tl.device_assert((count >= 0) & (count <= N), "n_routed: wanted 0 to N")
    return count


@triton.jit(do_not_specialize=["N"])
def _gather_kernel(
    tensors,  # each [N, units]
    strides,
    units,
    gathered,  # each [K, units]
    order,  # [N] int64
    stride_order,
    n_routed,  # [1] int32
    N,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0)
    last = tl.maximum(_routed_count(n_routed, N) - 1, 0)
    row = _row_at(order, stride_order, tl.minimum(slot, last), N)
    u = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for t in tl.static_range(TENSORS):
        if tl.program_id(2) == t:
            inside = u < units[t]
            values = tl.load(tensors[t] + row * strides[t] + u, mask=inside)
            tl.store(gathered[t] + slot.to(tl.int64) * units[t] + u, values, mask=inside)


@triton.jit(do_not_specialize=["N", "K"])
def _merge_kernel(
    kept,  # [N, units]
    stride_kept,
    routed,  # [K, units]
    stride_routed,
    merged,  # [N, units]
    units,
    order,  # [N] int64
    stride_order,
    n_routed,  # [1] int32
    N,
    K,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0)
    row = _row_at(order, stride_order, slot, N)
    u = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = u < units
    if slot < tl.minimum(_routed_count(n_routed, N), K):
        values = tl.load(routed + slot.to(tl.int64) * stride_routed + u, mask=inside)
    else:
        values = tl.load(kept + row * stride_kept + u, mask=inside)
    tl.store(merged + row * units + u, values, mask=inside)


@triton.jit(do_not_specialize=["N", "M"])
def _extent_kernel(
    mask,  # [N, M]
    stride_n,
    stride_m,
    order,  # [N] int64
    stride_order,
    n_routed,  # [1] int32
    extent,  # [2] int32, zeros
    N,
    M,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0)
    count = _routed_count(n_routed, N)
    if slot == 0:
        tl.store(extent, count)
    if slot < count:
        row = _row_at(order, stride_order, slot, N)
        length = 0
        for start in range(0, M, BLOCK):
            m = start + tl.arange(0, BLOCK)
            counts = tl.load(mask + row * stride_n + m.to(tl.int64) * stride_m, mask=m < M, other=0) != 0
            length = tl.maximum(length, tl.max(tl.where(counts, m + 1, 0)))
        tl.atomic_max(extent + 1, length)


def _units(tensor: Tensor) -> Tensor:
    """[N, units] as integers. Rows that are not contiguous are made so, by a copy."""
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    return rows.view(_INTEGERS[tensor.element_size()])


def gather_rows(
    tensors: list[Tensor],  # each [N, ...]
    order: Tensor,  # [N] int64
    n_routed: Tensor,  # [1] int32
    capacity: int,
) -> list[Tensor]:
    """See `elang.gather_rows`."""
    checks.gather_rows(tensors, order, n_routed, capacity)
    gathered = [t.new_empty((capacity, *t.shape[1:])) for t in tensors]
    moves = [(_units(t), _units(out)) for t, out in zip(tensors, gathered, strict=True) if out.numel()]
    if moves:
        sources, outs = zip(*moves, strict=True)
        units = tuple(s.shape[1] for s in sources)
        with on_device(order):
            launch(
                _gather_kernel,
                (capacity, ceil_div(max(units), BLOCK), len(moves)),
                *(sources, tuple(s.stride(0) for s in sources), units, outs),
                *(order, order.stride(0), n_routed, len(order)),
                TENSORS=len(moves),
                BLOCK=BLOCK,
                debug=True,
            )
    return gathered


def merge_rows(
    kept: Tensor,  # [N, ...]
    routed: Tensor,  # [K, ...]
    order: Tensor,  # [N] int64
    n_routed: Tensor,  # [1] int32
) -> Tensor:
    """See `elang.merge_rows`."""
    checks.merge_rows(kept, routed, order, n_routed)
    if kept.dtype != routed.dtype:
        raise TypeError(f"kept: got {kept.dtype}, wanted {routed.dtype}, that of routed")
    merged = kept.new_empty(kept.shape)
    if merged.numel():
        from_kept, from_routed, to = _units(kept), _units(routed), _units(merged)
        units = to.shape[1]
        with on_device(order):
            launch(
                _merge_kernel,
                (len(order), ceil_div(units, BLOCK)),
                *(from_kept, from_kept.stride(0), from_routed, from_routed.stride(0), to, units),
                *(order, order.stride(0), n_routed, len(order), len(routed)),
                BLOCK=BLOCK,
                debug=True,
            )
    return merged


def routed_extent(
    mask: Tensor,  # [N, M]
    order: Tensor,  # [N] int64
    n_routed: Tensor,  # [1] int32
) -> Tensor:
    """See `elang.ops.routed_extent`."""
    checks.routed_extent(mask, order, n_routed)
    extent = n_routed.new_zeros(2)
    if len(order):
        with on_device(order):
            launch(
                _extent_kernel,
                (len(order),),
                *(mask, *mask.stride(), order, order.stride(0), n_routed, extent, len(order), mask.shape[1]),
                BLOCK=1024,
                debug=True,
            )
    return extent
