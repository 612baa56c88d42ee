"""The ops: wrappers and fakes.

Schemas live in `csrc/`, kernels there and in `triton_kernels/`; `elang.reference` has the same functions in plain
PyTorch. `elang.backend` chooses among them.

Ops are for inference: inputs may require grad, a backward through an op raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elang import backend, checks, reference
from elang.reference import SCORES, Route, VocabEnergy

# Bound once, and a NamedTuple made as a plain tuple is: a call of `route` takes 4 us, of which these would be a tenth.
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_new_tuple = tuple.__new__
_SCORE_INDEX = {name: index for index, name in enumerate(SCORES)}


# ---- what the wrappers call


def _reference_route(hidden, weight, bias, threshold, score, temperature):  # type: ignore[no-untyped-def]
    checks.route(hidden, weight, bias, threshold, SCORES[score], temperature)
    return reference.route(hidden, weight, bias, threshold, score=SCORES[score], temperature=temperature)


def _reference_route_logits(logits, threshold, score, temperature):  # type: ignore[no-untyped-def]
    checks.route_logits(logits, threshold, SCORES[score], temperature)
    return reference.route_logits(logits, threshold, score=SCORES[score], temperature=temperature)[1:]


def _reference_vocab_energy(hidden, weight, bias, mask, temperature):  # type: ignore[no-untyped-def]
    checks.vocab_energy(hidden, weight, bias, mask, temperature)
    return reference.vocab_energy(hidden, weight, bias, mask, temperature=temperature)


def _reference_gather_rows(tensors, order, n_routed, capacity):  # type: ignore[no-untyped-def]
    checks.gather_rows(tensors, order, n_routed, capacity)
    return reference.gather_rows(tensors, order, n_routed, capacity)


def _reference_merge_rows(kept, routed, order, n_routed):  # type: ignore[no-untyped-def]
    checks.merge_rows(kept, routed, order, n_routed)
    return reference.merge_rows(kept, routed, order, n_routed)


def _reference_routed_extent(mask, order, n_routed):  # type: ignore[no-untyped-def]
    checks.routed_extent(mask, order, n_routed)
    return reference.routed_extent(mask, order, n_routed)


def _eager_and_compiled(op: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """To be indexed by `_is_compiling()`: torch.compile has to see the overload, whose __call__ is a Python frame that
    takes a tenth of an eager call of `route`."""
    return getattr(op, "_op", op), op


_bind = backend.bind
_ROUTE = _eager_and_compiled(_bind("route", _reference_route))
_ROUTE_DEVICE_THRESHOLD = _eager_and_compiled(_bind("route", _reference_route, "device_threshold"))
_ROUTE_LOGITS = _eager_and_compiled(_bind("route_logits", _reference_route_logits))
_ROUTE_LOGITS_DEVICE_THRESHOLD = _eager_and_compiled(_bind("route_logits", _reference_route_logits, "device_threshold"))
_VOCAB_ENERGY = _bind("vocab_energy", _reference_vocab_energy)
_GATHER_ROWS = _bind("gather_rows", _reference_gather_rows)
_MERGE_ROWS = _bind("merge_rows", _reference_merge_rows)
_ROUTED_EXTENT = _bind("routed_extent", _reference_routed_extent)


# ---- fakes: shapes and dtypes for torch.compile and torch.export


def _fake_decision(rows: Any, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty((rows,), dtype=torch.float32),
        like.new_empty((rows,), dtype=torch.int64),
        like.new_empty((1,), dtype=torch.int32),
    )


def _fake_route(hidden, weight, bias, threshold, score, temperature):  # type: ignore[no-untyped-def]
    checks.route(hidden, weight, bias, threshold, SCORES[score], temperature)
    rows = hidden.shape[0]
    return hidden.new_empty((rows, weight.shape[0])), *_fake_decision(rows, hidden)


def _fake_route_logits(logits, threshold, score, temperature):  # type: ignore[no-untyped-def]
    checks.route_logits(logits, threshold, SCORES[score], temperature)
    return _fake_decision(logits.shape[0], logits)


def _fake_vocab_energy(hidden, weight, bias, mask, temperature):  # type: ignore[no-untyped-def]
    checks.vocab_energy(hidden, weight, bias, mask, temperature)
    return (
        hidden.new_empty((hidden.shape[0],), dtype=torch.float32),
        hidden.new_empty(hidden.shape[:-1], dtype=torch.int64),
    )


def _fake_gather_rows(tensors, order, n_routed, capacity):  # type: ignore[no-untyped-def]
    checks.gather_rows(tensors, order, n_routed, capacity)
    return [t.new_empty((capacity, *t.shape[1:])) for t in tensors]


def _fake_merge_rows(kept, routed, order, n_routed):  # type: ignore[no-untyped-def]
    checks.merge_rows(kept, routed, order, n_routed)
    return kept.new_empty(kept.shape)


def _fake_routed_extent(mask, order, n_routed):  # type: ignore[no-untyped-def]
    checks.routed_extent(mask, order, n_routed)
    return n_routed.new_empty((2,))


# Of each overload: its fake, and it in plain PyTorch.
_OVERLOADS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "route": (_fake_route, _reference_route),
    "route.device_threshold": (_fake_route, _reference_route),
    "route_logits": (_fake_route_logits, _reference_route_logits),
    "route_logits.device_threshold": (_fake_route_logits, _reference_route_logits),
    "vocab_energy": (_fake_vocab_energy, _reference_vocab_energy),
    "gather_rows": (_fake_gather_rows, _reference_gather_rows),
    "merge_rows": (_fake_merge_rows, _reference_merge_rows),
    "routed_extent": (_fake_routed_extent, _reference_routed_extent),
}


def _register() -> None:
    devices = ["cpu", "cuda"] if torch.version.cuda or torch.version.hip else ["cpu"]
    for name, (fake, plain) in _OVERLOADS.items():
        torch.library.register_fake(f"elang::{name}", fake)
        # register_autograd would cost 5 us a call under no_grad; _InferenceOnly refuses a backward for nothing.
        _registrations.impl(name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
        for device in devices:
            if kernel := backend.kernel(name.split(".")[0], device, plain):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "[\\s\\S]*Overriding a previously registered kernel")  # meant
                    _registrations.impl(name, kernel, device.upper(), allow_override=True)  # type: ignore[no-untyped-call]


if backend.FORCED != "reference" and backend.LOAD_ERROR is None:
    _registrations = torch.library.Library("elang", "IMPL")  # type: ignore[no-untyped-call]
    _register()


# ---- inference only


@torch.library.custom_op("elang::refuse_backward", mutates_args=())
def _refuse_backward(grad: Tensor, like: Tensor) -> Tensor:
    raise RuntimeError("elang's ops are for inference: there is no backward through them; detach their inputs to train")


@_refuse_backward.register_fake
def _(grad: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like)


class _InferenceOnly(torch.autograd.Function):
    """Calls an op on inputs that require grad; the refusal is an op so that torch.compile can trace past it."""

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], *args: Any) -> Any:
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in args))
        out = op(*args)
        outputs = (out,) if isinstance(out, Tensor) else out
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # The gradient is passed along so that a compiled graph cannot move the refusal into its forward.
        refused = (None if t is None else _refuse_backward(grads[0], t) for t in ctx.saved_tensors)
        return None, *refused


def _needs_refusal(tensors: Iterable[Any]) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


# ---- the public ops


def route(
    hidden: Tensor,  # [N, H] float32, bfloat16 or float16
    weight: Tensor,  # [C, H]
    bias: Tensor | None,  # [C]
    threshold: float | Tensor,
    *,
    score: str = "energy",
    temperature: float = 1.0,
) -> Route:
    """Classifier head, confidence score, decision and stable partition of the rows, in one pass.

    `z = F.linear(hidden, weight, bias); s = temperature * logsumexp(z / temperature, 1);
    order = argsort(s.isfinite() & (s >= threshold), stable=True)`

    Args:
        hidden: the head's input, one row per example. Any strides.
        weight: the head. Its dtype may differ from that of `hidden`; all sums are float32. With strided columns the CPU
            packs it on each call. CUDA reads 16 bytes at a time where rows of `hidden` and `weight` are aligned to them
            and an element at a time elsewhere, and takes C up to 12 000.
        bias: None or the head's bias.
        threshold: a row stays with Swift iff its score is finite and >= threshold, in float32. A float (NaN refused),
            or a float32 tensor [] or [1], which the host never reads (a NaN in it routes every row).
        score: one of `elang.reference.SCORES`; `logit` goes with C = 1 and nothing else does.
        temperature: T > 0 of the score.

    Returns:
        Route(logits [N, C] in the dtype of `hidden`, score [N] float32, order [N] int64, n_routed [1] int32).
        A row's results are bit-identical whatever else is in the batch.

    Raises:
        TypeError, ValueError: names the argument, what it got and what it wanted.

    Synchronizes: no. CUDA graph: yes. Deterministic: yes.
    Source: E-LANG (arXiv 2203.00748), the free energy and the routing rule.
    """
    try:
        pair = _ROUTE if isinstance(threshold, (float, int)) else _ROUTE_DEVICE_THRESHOLD
        op = pair[_is_compiling()]
        if _grad_enabled() and _needs_refusal((hidden, weight, bias)):
            op = partial(_InferenceOnly.apply, op)
        return _new_tuple(Route, op(hidden, weight, bias, threshold, _SCORE_INDEX[score], temperature))
    except Exception:
        checks.route(hidden, weight, bias, threshold, score, temperature)
        backend.explain("route", hidden)
        raise


def route_logits(
    logits: Tensor,  # [N, C] float32, bfloat16 or float16
    threshold: float | Tensor,
    *,
    score: str = "energy",
    temperature: float = 1.0,
) -> Route:
    """`route` for a Swift whose logits are all there is to see.

    `s = temperature * logsumexp(logits / temperature, 1);
    order = argsort(s.isfinite() & (s >= threshold), stable=True)`

    Args:
        logits: one row per example. Any strides.
        threshold, score, temperature: as in `route`.

    Returns:
        Route, its logits being the argument itself.

    Raises:
        TypeError, ValueError: names the argument, what it got and what it wanted.

    Synchronizes: no. CUDA graph: yes. Deterministic: yes.
    Source: E-LANG (arXiv 2203.00748), the free energy and the routing rule.
    """
    try:
        pair = _ROUTE_LOGITS if isinstance(threshold, (float, int)) else _ROUTE_LOGITS_DEVICE_THRESHOLD
        op = pair[_is_compiling()]
        if _grad_enabled() and _needs_refusal((logits,)):
            op = partial(_InferenceOnly.apply, op)
        return Route(logits, *op(logits, threshold, _SCORE_INDEX[score], temperature))
    except Exception:
        checks.route_logits(logits, threshold, score, temperature)
        backend.explain("route_logits", logits)
        raise


def vocab_energy(
    hidden: Tensor,  # [N, H] or [B, M, H] float32, bfloat16 or float16
    weight: Tensor,  # [C, H]
    bias: Tensor | None = None,  # [C]
    mask: Tensor | None = None,  # [B, M] bool, integer or float
    *,
    temperature: float = 1.0,
) -> VocabEnergy:
    """Free energy and arg-max over a vocabulary, without its logits: they exist a tile at a time.

    `z = F.linear(hidden, weight, bias); s = temperature * logsumexp(z / temperature, -1); z.argmax(-1)`, and for
    [B, M, H] the mean of s over the tokens that count: `(s * mask).sum(1) / mask.sum(1)`

    Args:
        hidden: rows, or sequences of M tokens. Any strides.
        weight: the head, C of any size. Its dtype may differ from that of `hidden`; all sums are float32. The CPU reads
            float32 in place and widens other dtypes a tile at a time.
        bias: None or the head's bias.
        mask: with [B, M, H] alone: a token counts iff its element is not zero. What stands in `hidden` elsewhere is
            never looked at. None: every token counts.
        temperature: T > 0.

    Returns:
        VocabEnergy(score [N] or [B] float32, argmax [N] or [B, M] int64). A sequence without a token has the score NaN,
        so that it is routed; the argmax of a masked token is -1, that of a row whose score is not finite is some class.
        Of equal logits the lowest class is the argmax.

    Raises:
        TypeError, ValueError: names the argument, what it got and what it wanted.

    Synchronizes: no. CUDA graph: yes, once a call of the same shapes outside of it has compiled the kernels.
    Deterministic: yes, for the same shapes and device, on the CPU the same threads.
    Source: E-LANG (arXiv 2203.00748), the free energy of an encoder-decoder; csrc/vocab.cpp,
    triton_kernels/vocab_energy.py.
    """
    try:
        op = _VOCAB_ENERGY
        if _grad_enabled() and _needs_refusal((hidden, weight, bias)):
            op = partial(_InferenceOnly.apply, op)
        return _new_tuple(VocabEnergy, op(hidden, weight, bias, mask, temperature))
    except Exception:
        checks.vocab_energy(hidden, weight, bias, mask, temperature)
        raise


def gather_rows(
    tensors: Sequence[Tensor],  # each [N, ...], any dtype
    order: Tensor,  # [N] int64
    n_routed: Tensor,  # [1] int32
    capacity: int,
) -> list[Tensor]:
    """The routed rows of each tensor, padded to `capacity` rows with copies of the last routed one.

    `[t[order[arange(capacity).clamp(max=max(n_routed - 1, 0))]] for t in tensors]`

    Args:
        tensors: whatever Super takes row by row. Any strides; the results are contiguous. CUDA moves up to 16
            tensors in one launch, and copies those first whose rows are not contiguous.
        order, n_routed: of `Route`. CUDA checks their values on the device, where a bad one ends the process's context.
        capacity: rows of the results. Fewer than n_routed takes the first `capacity` of them.

    Returns:
        One tensor [capacity, ...] for each of `tensors`.

    Raises:
        TypeError, ValueError: names the argument, what it got and what it wanted.

    Synchronizes: no. CUDA graph: yes. Deterministic: yes.
    Source: csrc/cpu/rows.cpp, csrc/cuda/rows.cuh.
    """
    tensors = list(tensors)
    try:
        if _grad_enabled() and _needs_refusal(tensors):

            def gather(*rows: Tensor) -> tuple[Tensor, ...]:
                return tuple(_GATHER_ROWS(list(rows), order, n_routed, capacity))

            return list(_InferenceOnly.apply(gather, *tensors))  # type: ignore[no-untyped-call]
        gathered: list[Tensor] = _GATHER_ROWS(tensors, order, n_routed, capacity)
        return gathered
    except Exception:
        checks.gather_rows(tensors, order, n_routed, capacity)
        backend.explain("gather_rows", order)
        checks.partition_values(order, n_routed)
        raise


def merge_rows(
    kept: Tensor,  # [N, ...]
    routed: Tensor,  # [K, ...]
    order: Tensor,  # [N] int64
    n_routed: Tensor,  # [1] int32
) -> Tensor:
    """Super's rows over Swift's, every row in its place. Rows of `routed` past n_routed are padding and are not read.

    `out = kept.to(routed.dtype, copy=True); n = min(n_routed, K); out[order[:n]] = routed[:n]`

    Args:
        kept: Swift's answer for every row.
        routed: Super's answers in the order of `gather_rows`.
        order, n_routed: of `Route`.

    Returns:
        [N, ...] in the dtype of `routed`, contiguous.

    Raises:
        TypeError, ValueError: names the argument, what it got and what it wanted.

    Synchronizes: no. CUDA graph: yes. Deterministic: yes.
    Source: csrc/cpu/rows.cpp, csrc/cuda/rows.cuh.
    """
    try:
        if kept.dtype != routed.dtype:
            kept = kept.to(routed.dtype)
        op = _MERGE_ROWS
        if _grad_enabled() and _needs_refusal((kept, routed)):
            op = partial(_InferenceOnly.apply, op)
        merged: Tensor = op(kept, routed, order, n_routed)
        return merged
    except Exception:
        checks.merge_rows(kept, routed, order, n_routed)
        backend.explain("merge_rows", order)
        checks.partition_values(order, n_routed)
        raise


def routed_extent(
    mask: Tensor,  # [N, M] bool, integer or float
    order: Tensor,  # [N] int64
    n_routed: Tensor,  # [1] int32
) -> Tensor:
    """How many rows are routed and how long the longest of them is: what a host has to know to size Super's batch.

    `stack([n_routed, max(last nonzero column of mask[i] + 1 for i in order[:n_routed])])`

    Args:
        mask: an attention mask; a column counts iff it is not zero. Any strides.
        order, n_routed: of `Route`.

    Returns:
        [2] int32: n_routed, and the length after which every routed row is masked (0 where nothing is routed).

    Raises:
        TypeError, ValueError: names the argument, what it got and what it wanted.

    Synchronizes: no. CUDA graph: yes. Deterministic: yes.
    Source: csrc/cpu/rows.cpp, csrc/cuda/rows.cuh.
    """
    try:
        extent: Tensor = _ROUTED_EXTENT(mask, order, n_routed)
        return extent
    except Exception:
        checks.routed_extent(mask, order, n_routed)
        backend.explain("routed_extent", order)
        checks.partition_values(order, n_routed)
        raise
