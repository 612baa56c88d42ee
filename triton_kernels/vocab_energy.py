"""`vocab_energy`: the energy of rows over a vocabulary, a tile of logits at a time.

Programs share the rows, and the vocabulary too where there are few rows. Each keeps an online maximum and sum for its
rows; where several share a row block, the last of them to arrive (on AMD, a second launch) combines their partial
results in the order of the vocabulary, so that the bits do not depend on which is last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elang import checks
from elang.triton_kernels.common import LAST_PROGRAM_READS, ceil_div, dot, is_short, launch, on_device
from elang.triton_kernels.configs import gpu, vocab_config

_NO_CLASS = tl.constexpr(2**31 - 1)


@triton.jit
def _logits(
    hidden_row,  # [BLOCK_N] pointers to rows of H
    stride_h,
    weight,  # [C, H]
    stride_c,
    stride_k,
    c,  # [BLOCK_C] int64, every one a class
    H,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
    CLASSES_FIRST: tl.constexpr,
):
    """[BLOCK_N, BLOCK_C] float32. CLASSES_FIRST gives the classes the side of the matrix units that has to be full."""
    k = tl.arange(0, BLOCK_H)
    h_at = hidden_row[:, None] + k[None, :] * stride_h
    w_at = weight + c[:, None] * stride_c + k[None, :] * stride_k
    if CLASSES_FIRST:
        acc = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    else:
        acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, H, BLOCK_H):
        if EVEN_H:
            h = tl.load(h_at)
            w = tl.load(w_at)
        else:
            inside = (start + k < H)[None, :]
            h = tl.load(h_at, mask=inside, other=0.0)
            w = tl.load(w_at, mask=inside, other=0.0)
        if CLASSES_FIRST:
            acc = dot(w, tl.trans(h), acc)
        else:
            acc = dot(h, tl.trans(w), acc)
        h_at += BLOCK_H * stride_h
        w_at += BLOCK_H * stride_k
    if CLASSES_FIRST:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _base(top):
    """What terms are taken relative to: the maximum, unless every logit so far is -inf, whose terms are then 0."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _add(best, total, best_class, top, terms, top_class, per_unit):
    """Takes up classes after those already seen: their maximum, the sum of exp((z - top) / T), and where top is."""
    new_best = tl.maximum(best, top)
    base = _base(new_best)
    total = total * tl.exp((best - base) * per_unit) + terms * tl.exp((top - base) * per_unit)
    return new_best, total, tl.where(top > best, top_class, best_class)


@triton.jit
def _combine(part_max, part_sum, part_argmax, slot, valid, tokens, splits, per_unit, BLOCK_N: tl.constexpr):
    """Of all parts of the vocabulary, in its order."""
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    best_class = tl.zeros([BLOCK_N], tl.int32)
    for part in range(0, splits):
        at = tl.cast(part, tl.int64) * tokens + slot
        # Written by other multiprocessors: from L2, past this one's own cache.
        top = tl.load(part_max + at, mask=valid, other=0.0, cache_modifier=".cg")
        terms = tl.load(part_sum + at, mask=valid, other=1.0, cache_modifier=".cg")
        top_class = tl.load(part_argmax + at, mask=valid, other=0, cache_modifier=".cg")
        best, total, best_class = _add(best, total, best_class, top, terms, top_class, per_unit)
    return best, total, best_class


@triton.jit
def _rows_of(real, n_real, row_block, tokens, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slots of a row block, which of them hold a token, and that token; past the last, the last one's."""
    count = tokens
    if HAS_MASK:
        count = tl.load(n_real)
    slot = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.minimum(slot, count - 1).to(tl.int64)
    if HAS_MASK:
        token = tl.load(real + tl.maximum(token, 0))
    return slot, slot < count, token


@triton.jit
def _store(energy, argmax, token, valid, best, total, best_class, temperature):
    tl.store(energy + token, best + temperature * tl.log(total), mask=valid)
    tl.store(argmax + token, best_class.to(tl.int64), mask=valid)


@triton.jit(do_not_specialize=["tokens", "M", "row_blocks", "splits"])
def _vocab_energy_kernel(
    hidden,  # [B, M, H]
    stride_b,
    stride_m,
    stride_h,
    weight,  # [C, H]
    stride_c,
    stride_k,
    bias,  # [C]
    stride_bias,
    real,  # [B * M] int64, the tokens that count in front
    n_real,  # [1] int32, how many do
    part_max,  # [SPLITS, B * M] float32
    part_sum,  # [SPLITS, B * M] float32
    part_argmax,  # [SPLITS, B * M] int32
    arrived,  # [row blocks] int32, zeros
    energy,  # [B * M] float32
    argmax,  # [B * M] int64
    tokens,  # B * M
    M,
    H,
    C,
    row_blocks,
    splits,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SPLIT: tl.constexpr,
    LAST_READS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
    CLASSES_FIRST: tl.constexpr,
):
    # Neighbours read the same part of the head, for different rows: it comes from memory once.
    row_block = tl.program_id(0) % row_blocks
    split = tl.program_id(0) // row_blocks
    slot, valid, token = _rows_of(real, n_real, row_block, tokens, HAS_MASK, BLOCK_N)
    if tl.max(valid.to(tl.int32), 0) == 0:
        return
    hidden_row = hidden + (token // M) * stride_b + (token % M) * stride_m

    per_unit = 1.0 / temperature
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    best_class = tl.zeros([BLOCK_N], tl.int32)
    tiles = tl.cdiv(C, BLOCK_C)
    for tile in range(
        (split.to(tl.int64) * tiles // splits).to(tl.int32), ((split + 1).to(tl.int64) * tiles // splits).to(tl.int32)
    ):
        c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        read = tl.minimum(c, C - 1).to(tl.int64)
        z = _logits(
            hidden_row, stride_h, weight, stride_c, stride_k, read, H, BLOCK_N, BLOCK_C, BLOCK_H, EVEN_H, CLASSES_FIRST
        )
        if HAS_BIAS:
            z += tl.load(bias + read * stride_bias).to(tl.float32)[None, :]
        z = tl.where((c < C)[None, :], z, float("-inf"))
        top = tl.max(z, 1)
        top_class = tl.min(tl.where(z == top[:, None], c[None, :], _NO_CLASS), 1)
        best_class = tl.where(top > best, top_class, best_class)
        new_best = tl.maximum(best, top)
        base = _base(new_best)
        terms = tl.exp((z - base[:, None]) * per_unit)
        total = total * tl.exp((best - base) * per_unit) + tl.sum(terms, 1)
        best = new_best

    if SPLIT:
        at = split.to(tl.int64) * tokens + slot
        tl.store(part_max + at, best, mask=valid)
        tl.store(part_sum + at, total, mask=valid)
        tl.store(part_argmax + at, best_class, mask=valid)
        if LAST_READS:
            tl.debug_barrier()  # every thread's partial results before the arrival
            if tl.atomic_add(arrived + row_block, 1, sem="acq_rel") == splits - 1:
                tl.debug_barrier()
                best, total, best_class = _combine(
                    part_max, part_sum, part_argmax, slot, valid, tokens, splits, per_unit, BLOCK_N
                )
                _store(energy, argmax, token, valid, best, total, best_class, temperature)
    else:
        _store(energy, argmax, token, valid, best, total, best_class, temperature)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _combine_kernel(
    part_max,  # [SPLITS, B * M] float32
    part_sum,  # [SPLITS, B * M] float32
    part_argmax,  # [SPLITS, B * M] int32
    real,  # [B * M] int64
    n_real,  # [1] int32
    energy,  # [B * M] float32
    argmax,  # [B * M] int64
    tokens,
    splits,
    temperature,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slot, valid, token = _rows_of(real, n_real, tl.program_id(0), tokens, HAS_MASK, BLOCK_N)
    best, total, best_class = _combine(
        part_max, part_sum, part_argmax, slot, valid, tokens, splits, 1.0 / temperature, BLOCK_N
    )
    _store(energy, argmax, token, valid, best, total, best_class, temperature)


@triton.jit(do_not_specialize=["M"])
def _mean_kernel(
    energy,  # [B, M] float32
    mask,  # [B, M]
    stride_b,
    stride_m,
    score,  # [B] float32
    M,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        real = m < M
        if HAS_MASK:
            real = real & (tl.load(mask + sequence * stride_b + m * stride_m, mask=real, other=0) != 0)
        total += tl.load(energy + sequence * M + m, mask=real, other=0.0)
        count += real.to(tl.int32)
    # NaN without a token: such a row is routed.
    tl.store(score + sequence, tl.sum(total) / tl.sum(count).to(tl.float32))


def vocab_energy(
    hidden: Tensor,  # [N, H] or [B, M, H]
    weight: Tensor,  # [C, H]
    bias: Tensor | None,  # [C]
    mask: Tensor | None,  # [B, M]
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """See `elang.vocab_energy`."""
    checks.vocab_energy(hidden, weight, bias, mask, temperature)
    with on_device(hidden):
        energy, argmax = _energies(hidden, weight, bias, mask, temperature)
        return (energy if hidden.dim() == 2 else _means(energy, mask)), argmax


def _energies(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Of every token: [N] or [B, M]; what stands at a masked one is undefined, and -1."""
    shape = hidden.shape[:-1]
    tokens, (classes, width) = shape.numel(), weight.shape
    energy = hidden.new_empty(shape, dtype=torch.float32)
    argmax = hidden.new_full(shape, -1, dtype=torch.int64)
    if tokens == 0:
        return energy, argmax
    real = n_real = None
    if mask is not None:
        counts = mask.reshape(-1) != 0
        real = counts.nonzero_static(size=tokens)
        n_real = counts.sum(dtype=torch.int32)

    kind, multiprocessors = gpu(hidden.device)
    # Otherwise every element is a load of its own, whose address takes registers that a large tile does not leave.
    in_vectors = width % 64 == 0 and all(
        t.data_ptr() % 16 == 0 and t.stride(-1) == 1 and all(stride % 16 == 0 for stride in t.stride()[:-1])
        for t in (hidden, weight)
    )
    config = vocab_config(kind, in_vectors and is_short(hidden, weight), tokens, bias is not None)
    row_blocks = ceil_div(tokens, config.BLOCK_N)
    # Parts of the vocabulary: programs for every multiprocessor at once, with a tile at least for each.
    splits = max(1, min(config.programs * multiprocessors // row_blocks, ceil_div(classes, config.BLOCK_C)))
    parts = hidden.new_empty((3, splits, tokens) if splits > 1 else (3, 0), dtype=torch.float32)
    arrived = hidden.new_zeros(row_blocks, dtype=torch.int32)
    stride_m = hidden.stride(1) if hidden.dim() == 3 else 0
    partial = parts[0], parts[1], parts[2].view(torch.int32)
    launch(
        _vocab_energy_kernel,
        (row_blocks * splits,),
        *(hidden, hidden.stride(0), stride_m, hidden.stride(-1)),
        *(weight, *weight.stride(), bias, 0 if bias is None else bias.stride(0), real, n_real),
        *(*partial, arrived, energy, argmax),
        *(tokens, shape[1] if len(shape) == 2 else 1, width, classes, row_blocks, splits, temperature),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        HAS_BIAS=bias is not None,
        HAS_MASK=mask is not None,
        SPLIT=splits > 1,
        LAST_READS=LAST_PROGRAM_READS,
        BLOCK_N=config.BLOCK_N,
        BLOCK_C=config.BLOCK_C,
        BLOCK_H=config.BLOCK_H,
        EVEN_H=width % config.BLOCK_H == 0,
        CLASSES_FIRST=config.CLASSES_FIRST,
    )
    if splits > 1 and not LAST_PROGRAM_READS:
        launch(
            _combine_kernel,
            (row_blocks,),
            *(*partial, real, n_real, energy, argmax, tokens, splits, temperature),
            HAS_MASK=mask is not None,
            BLOCK_N=config.BLOCK_N,
        )
    return energy, argmax


def _means(energy: Tensor, mask: Tensor | None) -> Tensor:
    sequences, tokens = energy.shape
    score = energy.new_empty(sequences)
    if sequences:
        strides = (0, 0) if mask is None else mask.stride()
        launch(
            _mean_kernel,
            (sequences,),
            *(energy, mask, *strides, score, tokens),
            HAS_MASK=mask is not None,
            BLOCK_M=256,
        )
    return score
