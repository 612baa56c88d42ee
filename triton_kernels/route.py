"""`route` and `route_logits`: logits, scores, decision and stable partition of all rows in one launch (on AMD in two).

Every program scores its rows; the last to arrive, whichever it is, writes the order of all of them from their scores.
Tiles hang on the head alone, so that a row's results do not depend on its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elang import checks
from elang.reference import SCORES
from elang.triton_kernels.common import LAST_PROGRAM_READS, ceil_div, dot, is_short, launch, on_device, power_of_two


@triton.jit
def _tile(
    hidden,  # [N, H], or the logits [N, C] without a head
    stride_n,
    stride_h,
    weight,  # [C, H]
    stride_c,
    stride_k,
    bias,  # [C]
    stride_bias,
    row,  # [BLOCK_N] int64, every one a row
    start,
    H,
    C,
    HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Logits of classes from start on, [BLOCK_N, BLOCK_C] float32; the last class stands for those past it."""
    c = tl.minimum(start + tl.arange(0, BLOCK_C), C - 1).to(tl.int64)
    if HEAD:
        k = tl.arange(0, BLOCK_H)
        z = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for first in range(0, H, BLOCK_H):
            inside = (first + k < H)[None, :]
            at = (first + k).to(tl.int64)[None, :]
            h = tl.load(hidden + row[:, None] * stride_n + at * stride_h, mask=inside, other=0.0)
            w = tl.load(weight + c[:, None] * stride_c + at * stride_k, mask=inside, other=0.0)
            z = dot(h, tl.trans(w), z)
        if HAS_BIAS:
            z += tl.load(bias + c * stride_bias).to(tl.float32)[None, :]
    else:
        z = tl.load(hidden + row[:, None] * stride_n + c[None, :] * stride_h).to(tl.float32)
    return z


# The scores as csrc/score.h has them, a tile of classes at a time: z is divided by the temperature, `real` says which
# columns are classes. top, total: maximum, sum of exp(z - top). aux is neg_entropy's sum of (z - top) exp(z - top),
# margin's second largest z, energy_centered's sum of z - first.


@triton.jit
def _add_tile(z, real, first, top, total, aux, SCORE: tl.constexpr):
    masked = tl.where(real, z, float("-inf"))
    tile_top = tl.max(masked, 1)
    new_top = tl.maximum(top, tile_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # so that masked (-inf) classes add 0 and not NaN
    d = masked - base[:, None]
    e = tl.exp(d)
    scale = tl.exp(top - base)
    if SCORE == "neg_entropy":
        # A vanished exponential leaves 0 log 0 = 0.
        moved = tl.where(scale > 0, scale * (aux + (top - base) * total), 0.0)
        aux = moved + tl.sum(tl.where(e > 0, d * e, 0.0), 1)
    if SCORE == "margin":
        largest = masked == tile_top[:, None]
        several = tl.sum(largest.to(tl.int32), 1) > 1
        second = tl.where(several, tile_top, tl.max(tl.where(largest, float("-inf"), masked), 1))
        aux = tl.maximum(tl.minimum(top, tile_top), tl.maximum(aux, second))
    if SCORE == "energy_centered":
        aux += tl.sum(tl.where(real, z - first[:, None], 0.0), 1)
    return new_top, total * scale + tl.sum(e, 1), aux


@triton.jit
def _finish(first, top, total, aux, looked, C, temperature, SCORE: tl.constexpr):
    defined = top - top  # 0, or NaN where the maximum is infinite: such a row has no probabilities
    if SCORE == "energy":
        score = (top + tl.log(total)) * temperature
    elif SCORE == "energy_probs":
        score = tl.log(looked)
    elif SCORE == "energy_centered":
        score = ((top - first) - tl.div_rn(aux, tl.cast(C, tl.float32)) + tl.log(total)) * temperature
    elif SCORE == "max_prob":
        score = tl.div_rn(1.0, total) + defined
    elif SCORE == "neg_entropy":
        score = tl.div_rn(aux, total) - tl.log(total) + defined
    elif SCORE == "margin":
        score = tl.div_rn(1.0 - tl.exp(aux - top), total) + defined
    else:
        score = top
    return score


@triton.jit
def _is_routed(score, threshold):
    """Not kept: keep iff finite and >= threshold. A NaN threshold keeps nothing."""
    return ((score - score == 0.0) & (score >= threshold)) == 0


@triton.jit
def _write_order(score, order, n_routed, N, threshold, BLOCK: tl.constexpr):
    """The stable partition of all rows: the routed ones, then the kept ones."""
    i = tl.arange(0, BLOCK)
    total = 0
    for start in range(0, N, BLOCK):
        valid = start + i < N
        # Written by other multiprocessors: from L2, past this one's own cache.
        s = tl.load(score + start + i, mask=valid, other=0.0, cache_modifier=".cg")
        total += tl.sum((_is_routed(s, threshold) & valid).to(tl.int32))
    before = 0
    for start in range(0, N, BLOCK):
        valid = start + i < N
        s = tl.load(score + start + i, mask=valid, other=0.0, cache_modifier=".cg")
        routed = (_is_routed(s, threshold) & valid).to(tl.int32)
        rank = before + tl.cumsum(routed, 0) - routed  # routed rows in front of this one
        place = tl.where(routed == 1, rank, total + start + i - rank)
        tl.store(order + place, (start + i).to(tl.int64), mask=valid)
        before += tl.sum(routed)
    tl.store(n_routed, total)


@triton.jit(do_not_specialize=["N"])
def _order_kernel(score, order, n_routed, threshold, N, DEVICE_THRESHOLD: tl.constexpr, BLOCK_ORDER: tl.constexpr):
    if DEVICE_THRESHOLD:
        limit = tl.load(threshold)
    else:
        limit = threshold
    _write_order(score, order, n_routed, N, limit, BLOCK_ORDER)


@triton.jit(do_not_specialize=["N"])
def _route_kernel(
    hidden,  # [N, H], or the logits [N, C] without a head
    stride_n,
    stride_h,
    weight,  # [C, H]
    stride_c,
    stride_k,
    bias,  # [C]
    stride_bias,
    threshold,  # float, or [1] float32
    logits,  # [N, C]
    score,  # [N] float32
    order,  # [N] int64
    n_routed,  # [1] int32, zero: counts programs that have arrived until the last one writes the rows routed
    N,
    H,
    C,
    temperature,
    HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEVICE_THRESHOLD: tl.constexpr,
    LAST_READS: tl.constexpr,
    SCORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_ORDER: tl.constexpr,
):
    if DEVICE_THRESHOLD:
        limit = tl.load(threshold)
    else:
        limit = threshold
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < N
    row = tl.minimum(n, N - 1).to(tl.int64)
    i = tl.arange(0, BLOCK_C)

    first = tl.zeros([BLOCK_N], tl.float32)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    aux = tl.full([BLOCK_N], float("-inf") if SCORE == "margin" else 0.0, tl.float32)
    for start in range(0, C, BLOCK_C):
        z = _tile(
            *(hidden, stride_n, stride_h, weight, stride_c, stride_k, bias, stride_bias, row, start, H, C),
            *(HEAD, HAS_BIAS, BLOCK_N, BLOCK_C, BLOCK_H),
        )
        real = (start + i < C)[None, :]
        if HEAD:
            at = row[:, None] * C + (start + i)[None, :]
            tl.store(logits + at, z.to(logits.dtype.element_ty), mask=valid[:, None] & real)
        if SCORE != "logit":
            z = tl.div_rn(z, tl.zeros_like(z) + temperature)
        if start == 0:
            first = tl.sum(tl.where((i == 0)[None, :], z, 0.0), 1)
        top, total, aux = _add_tile(z, real, first, top, total, aux, SCORE)

    looked = tl.zeros([BLOCK_N], tl.float32)
    if SCORE == "energy_probs":
        # A second look at every logit: it needs the maximum and the sum of all.
        for start in range(0, C, BLOCK_C):
            z = _tile(
                *(hidden, stride_n, stride_h, weight, stride_c, stride_k, bias, stride_bias, row, start, H, C),
                *(HEAD, HAS_BIAS, BLOCK_N, BLOCK_C, BLOCK_H),
            )
            p = tl.div_rn(
                tl.exp(tl.div_rn(z, tl.zeros_like(z) + temperature) - top[:, None]), tl.zeros_like(z) + total[:, None]
            )
            looked += tl.sum(tl.where((start + i < C)[None, :], tl.exp(p), 0.0), 1)
    tl.store(score + n, _finish(first, top, total, aux, looked, C, temperature, SCORE), mask=valid)

    if LAST_READS:
        tl.debug_barrier()  # every thread's scores before the arrival
        if tl.atomic_add(n_routed, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.debug_barrier()
            _write_order(score, order, n_routed, N, limit, BLOCK_ORDER)


def _launch(
    hidden: Tensor,  # [N, H], or the logits [N, C] without a head
    weight: Tensor | None,  # [C, H]
    bias: Tensor | None,  # [C]
    threshold: float | Tensor,
    score: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    rows, width = hidden.shape
    classes = width if weight is None else weight.shape[0]
    logits = None if weight is None else hidden.new_empty((rows, classes))
    scores = hidden.new_empty(rows, dtype=torch.float32)
    order = hidden.new_empty(rows, dtype=torch.int64)
    n_routed = hidden.new_zeros(1, dtype=torch.int32)
    if rows:
        block_c = power_of_two(classes, 16, 128 if weight is not None else 512)
        block_n = 16 if weight is not None else power_of_two(2048 // block_c, 4, 32)
        with on_device(hidden):
            launch(
                _route_kernel,
                (ceil_div(rows, block_n),),
                *(hidden, *hidden.stride(), weight, *((0, 0) if weight is None else weight.stride())),
                *(bias, 0 if bias is None else bias.stride(0), threshold),
                *(logits, scores, order, n_routed, rows, width, classes, temperature),
                num_warps=4 if weight is not None else 8,
                HEAD=weight is not None,
                HAS_BIAS=bias is not None,
                DEVICE_THRESHOLD=isinstance(threshold, Tensor),
                LAST_READS=LAST_PROGRAM_READS,
                SCORE=SCORES[score],
                BLOCK_N=block_n,
                BLOCK_C=block_c,
                BLOCK_H=64 if weight is not None and is_short(hidden, weight) else 32,
                BLOCK_ORDER=1024,
            )
            if not LAST_PROGRAM_READS:
                launch(
                    _order_kernel,
                    (1,),
                    *(scores, order, n_routed, threshold, rows),
                    DEVICE_THRESHOLD=isinstance(threshold, Tensor),
                    BLOCK_ORDER=1024,
                )
    return scores, order, n_routed, logits


def route(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [C, H]
    bias: Tensor | None,  # [C]
    threshold: float | Tensor,
    score: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `elang.route`; `score` indexes `elang.reference.SCORES`."""
    checks.route(hidden, weight, bias, threshold, SCORES[score], temperature)
    scores, order, n_routed, logits = _launch(hidden, weight, bias, threshold, score, temperature)
    assert logits is not None
    return logits, scores, order, n_routed


def route_logits(
    logits: Tensor,  # [N, C]
    threshold: float | Tensor,
    score: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `elang.route_logits`; `score` indexes `elang.reference.SCORES`."""
    checks.route_logits(logits, threshold, SCORES[score], temperature)
    return _launch(logits, None, None, threshold, score, temperature)[:3]
