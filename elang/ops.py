"""The ops: wrappers, fakes, and the choice of backend.

Schemas and kernels live in `csrc/`; `elang.reference` has the same functions in plain PyTorch. `ELANG_BACKEND` forces
a backend (`cpp` or `reference`); without it the compiled library serves, and where that cannot be loaded every call
raises with the original error: nothing falls back in silence.

Ops are for inference: inputs may require grad, a backward through an op raises.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from elang import checks, reference
from elang.reference import SCORES, Route

BACKENDS = ("cpp", "reference")
ISAS = ("baseline", "avx2", "avx512")

LIBRARY = Path(__file__).with_name("libelang_ops.so")

# Bound once, and a NamedTuple made as a plain tuple is: a call of `route` takes 4 us, of which these would be a tenth.
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_new_tuple = tuple.__new__
_SCORE_INDEX = {name: index for index, name in enumerate(SCORES)}


# ---- backend


def _env(name: str, default: str, known: tuple[str, ...]) -> str:
    value = os.environ.get(name) or default
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(known)}")
    return value


def _load() -> OSError | None:
    _env("ELANG_ISA", ISAS[-1], ISAS)  # csrc/cpu/isa.cpp reads it, and would take a misspelt one for none
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return error
    return None


_BACKEND = _env("ELANG_BACKEND", "cpp", BACKENDS)
_LOAD_ERROR = _load() if _BACKEND == "cpp" else None


def backend() -> str:
    """Name of what serves the ops, one of `BACKENDS`."""
    return _BACKEND


def cpu_isa() -> str:
    """Instruction set of the CPU kernels in use, one of `ISAS`; `ELANG_ISA` caps it.

    Raises:
        ImportError: the compiled library does not load.
    """
    warmup()
    library = ctypes.CDLL(str(LIBRARY))
    library.elang_cpu_isa.restype = ctypes.c_char_p
    return cast(bytes, library.elang_cpu_isa()).decode()


@cache
def cuda_obstacle() -> str | None:
    """Why the compiled kernels cannot serve CUDA tensors in this process, or None. Starts no CUDA context."""
    if _BACKEND == "reference":
        return "ELANG_BACKEND=reference is set"
    if _LOAD_ERROR is not None:
        return f"the compiled library does not load: {_LOAD_ERROR}"
    library = ctypes.CDLL(str(LIBRARY))
    if not hasattr(library, "elang_cuda_obstacle"):
        return "elang was built without CUDA: install the CUDA toolkit (nvcc) and reinstall elang"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    library.elang_cuda_obstacle.restype = ctypes.c_char_p
    said: bytes | None = library.elang_cuda_obstacle()
    return None if said is None else said.decode()


def _explain_no_kernel(tensor: Any) -> None:
    """Once an op has failed: whether it is for want of a kernel for the tensor's device."""
    if isinstance(tensor, Tensor) and tensor.is_cuda and (obstacle := cuda_obstacle()):
        raise RuntimeError(
            f"elang's CUDA kernels cannot run: {obstacle}. ELANG_BACKEND=reference runs the ops in plain PyTorch"
        )


def warmup() -> None:
    """Load all that an op needs now rather than on first use.

    Raises:
        ImportError: the compiled library is missing or does not load; says why, and what to do.
    """
    if _LOAD_ERROR is not None:
        raise ImportError(
            f"elang's compiled ops did not load under torch {torch.__version__}: {_LOAD_ERROR}. Reinstall elang with "
            "`pip install --no-build-isolation .`, or set ELANG_BACKEND=reference to run in plain PyTorch; "
            "`python -m elang.info` tells more."
        ) from _LOAD_ERROR


def _missing(*_: Any) -> Any:
    warmup()


def _bind(name: str, plain: Callable[..., Any], overload: str = "default") -> Callable[..., Any]:
    """What a wrapper calls. The overload is looked up once: a call through its packet costs more."""
    if _BACKEND == "reference":
        return plain
    if _LOAD_ERROR is not None:
        return _missing
    return cast(Callable[..., Any], getattr(getattr(torch.ops.elang, name), overload))


def _reference_route(hidden, weight, bias, threshold, score, temperature):  # type: ignore[no-untyped-def]
    checks.route(hidden, weight, bias, threshold, SCORES[score], temperature)
    return reference.route(hidden, weight, bias, threshold, score=SCORES[score], temperature=temperature)


def _reference_route_logits(logits, threshold, score, temperature):  # type: ignore[no-untyped-def]
    checks.route_logits(logits, threshold, SCORES[score], temperature)
    return reference.route_logits(logits, threshold, score=SCORES[score], temperature=temperature)[1:]


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


_ROUTE = _eager_and_compiled(_bind("route", _reference_route))
_ROUTE_DEVICE_THRESHOLD = _eager_and_compiled(_bind("route", _reference_route, "device_threshold"))
_ROUTE_LOGITS = _eager_and_compiled(_bind("route_logits", _reference_route_logits))
_ROUTE_LOGITS_DEVICE_THRESHOLD = _eager_and_compiled(_bind("route_logits", _reference_route_logits, "device_threshold"))
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


def _fake_gather_rows(tensors, order, n_routed, capacity):  # type: ignore[no-untyped-def]
    checks.gather_rows(tensors, order, n_routed, capacity)
    return [t.new_empty((capacity, *t.shape[1:])) for t in tensors]


def _fake_merge_rows(kept, routed, order, n_routed):  # type: ignore[no-untyped-def]
    checks.merge_rows(kept, routed, order, n_routed)
    return kept.new_empty(kept.shape)


def _fake_routed_extent(mask, order, n_routed):  # type: ignore[no-untyped-def]
    checks.routed_extent(mask, order, n_routed)
    return n_routed.new_empty((2,))


_FAKES: dict[str, Callable[..., Any]] = {
    "route": _fake_route,
    "route.device_threshold": _fake_route,
    "route_logits": _fake_route_logits,
    "route_logits.device_threshold": _fake_route_logits,
    "gather_rows": _fake_gather_rows,
    "merge_rows": _fake_merge_rows,
    "routed_extent": _fake_routed_extent,
}

if _BACKEND == "cpp" and _LOAD_ERROR is None:
    _registrations = torch.library.Library("elang", "IMPL")  # type: ignore[no-untyped-call]
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"elang::{_name}", _fake)
        # register_autograd would cost 5 us a call under no_grad; _InferenceOnly refuses a backward for nothing.
        _registrations.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]


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
        _explain_no_kernel(hidden)
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
        _explain_no_kernel(logits)
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
        _explain_no_kernel(order)
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
        _explain_no_kernel(order)
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
        _explain_no_kernel(order)
        checks.partition_values(order, n_routed)
        raise
