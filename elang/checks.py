"""Argument checks, above all of the ops: each names the argument, what it got and what it wanted.

The compiled ops check for themselves, so a good call never pays for these. They run for the reference and the fakes,
and once a compiled op has refused, to say why as a ValueError or TypeError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from elang.reference import SCORES

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MASKS = (*FLOATS, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return repr(value)


def _check_matrix(name: str, value: Any, wanted: str, dims: tuple[int, ...] = (2,)) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a tensor {wanted}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: got {_describe(value)}, wanted float32, bfloat16 or float16 {wanted}")
    if value.dim() not in dims:
        raise ValueError(f"{name}: got {_describe(value)}, wanted {wanted}")


def _check_device(name: str, value: Tensor, other: str, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, wanted {device} like {other}")


def score(value: Any) -> None:
    if value not in SCORES:
        raise ValueError(f"score: got {value!r}, wanted one of {', '.join(SCORES)}")


def threshold(value: Any) -> None:
    """Of a threshold on the host."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"threshold: got {value!r}, wanted a float or a float32 tensor")
    if value != value:  # NaN, in a form that torch.compile traces through symbolic floats
        raise ValueError("threshold: got NaN, wanted a number; -inf keeps every finite row, inf routes all")


def temperature(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"temperature: got {value!r}, wanted a float")
    if not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"temperature: got {value}, wanted a finite number > 0")


def each(name: str, values: Sequence[Any], wanted: str, holds: Callable[[Any], bool]) -> None:
    """Of a sequence: there is a value in it, and `holds` of every one."""
    if not values or not all(map(holds, values)):
        raise ValueError(f"{name}: got {', '.join(map(str, values)) or 'none'}, wanted {wanted}")


def _check_decision(
    classes: int, device: torch.device, owner: str, t: Any, score_name: Any, temperature_value: Any
) -> None:
    if isinstance(t, Tensor):
        if t.dtype != torch.float32:
            raise TypeError(f"threshold: got {_describe(t)}, wanted float32")
        if t.shape not in ((), (1,)):
            raise ValueError(f"threshold: got {_describe(t)}, wanted one element, [] or [1]")
        _check_device("threshold", t, owner, device)
    else:
        threshold(t)
    score(score_name)
    temperature(temperature_value)
    if classes == 0:
        raise ValueError("weight, logits: got C = 0, wanted at least one class")
    if classes == 1 and score_name != "logit":
        raise ValueError(
            f"score: got {score_name!r} with C = 1, wanted 'logit': a regression head has no energy, use an energy head"
        )
    if classes != 1 and score_name == "logit":
        raise ValueError(f"score: got 'logit' with C = {classes}, wanted a single-output head, C = 1")


def _check_head(weight: Any, bias: Any, hidden: Tensor) -> None:
    _check_matrix("weight", weight, "[C, H]")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: got {_describe(weight)}, wanted [C, {hidden.shape[-1]}], the H of hidden")
    _check_device("weight", weight, "hidden", hidden.device)
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.dtype not in FLOATS:
        raise TypeError(f"bias: got {_describe(bias)}, wanted None or float32, bfloat16 or float16 [C]")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got {_describe(bias)}, wanted [{weight.shape[0]}], the C of weight")
    _check_device("bias", bias, "hidden", hidden.device)


def route(hidden: Any, weight: Any, bias: Any, threshold: Any, score: Any, temperature: Any) -> None:
    _check_matrix("hidden", hidden, "[N, H]")
    _check_head(weight, bias, hidden)
    _check_decision(weight.shape[0], hidden.device, "hidden", threshold, score, temperature)


def route_logits(logits: Any, threshold: Any, score: Any, temperature: Any) -> None:
    _check_matrix("logits", logits, "[N, C]")
    _check_decision(logits.shape[1], logits.device, "logits", threshold, score, temperature)


def vocab_energy(hidden: Any, weight: Any, bias: Any, mask: Any, temperature_value: Any) -> None:
    _check_matrix("hidden", hidden, "[N, H] or [B, M, H]", (2, 3))
    _check_head(weight, bias, hidden)
    if weight.shape[0] == 0:
        raise ValueError("weight: got C = 0, wanted at least one class")
    temperature(temperature_value)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
        wanted = f"{list(hidden.shape[:2])}, the [B, M] of hidden" if hidden.dim() == 3 else "None with hidden [N, H]"
        raise ValueError(f"mask: got {_describe(mask)}, wanted {wanted}")
    _check_mask_dtype(mask)
    _check_device("mask", mask, "hidden", hidden.device)


def _check_mask_dtype(mask: Tensor) -> None:
    if mask.dtype not in MASKS:
        raise TypeError(f"mask: got {_describe(mask)}, wanted bool, an integer or a float")


def _check_partition(order: Any, n_routed: Any) -> None:
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.dim() != 1:
        raise ValueError(f"order: got {_describe(order)}, wanted int64 [N]")
    if not isinstance(n_routed, Tensor) or n_routed.dtype != torch.int32 or n_routed.shape != (1,):
        raise ValueError(f"n_routed: got {_describe(n_routed)}, wanted int32 [1]")
    _check_device("n_routed", n_routed, "order", order.device)


def partition_values(order: Tensor, n_routed: Tensor) -> None:
    """Reads the tensors: not for fakes, nor before an op has refused."""
    rows = order.shape[0]
    if rows and not 0 <= int(order.min()) <= int(order.max()) < rows:
        raise ValueError(f"order: got rows from {int(order.min())} to {int(order.max())}, wanted them in [0, {rows})")
    if not 0 <= int(n_routed) <= rows:
        raise ValueError(f"n_routed: got {int(n_routed)}, wanted 0 to N = {rows}")


def _check_rows(name: str, value: Any, order: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a tensor [N, ...]")
    if value.dim() == 0 or value.shape[0] != order.shape[0]:
        raise ValueError(f"{name}: got {_describe(value)}, wanted [{order.shape[0]}, ...], the N of order")
    _check_device(name, value, "order", order.device)


def gather_rows(tensors: Any, order: Any, n_routed: Any, capacity: Any) -> None:
    _check_partition(order, n_routed)
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"tensors: got {type(tensors).__name__}, wanted a list of tensors [N, ...]")
    for index, tensor in enumerate(tensors):
        _check_rows(f"tensors[{index}]", tensor, order)
    if not isinstance(capacity, (int, torch.SymInt)) or isinstance(capacity, bool):
        raise TypeError(f"capacity: got {capacity!r}, wanted an int")
    if capacity < 0 or (capacity > 0 and order.shape[0] == 0):
        raise ValueError(f"capacity: got {capacity}, wanted >= 0, and 0 where there are no rows")


def merge_rows(kept: Any, routed: Any, order: Any, n_routed: Any) -> None:
    _check_partition(order, n_routed)
    _check_rows("kept", kept, order)
    if not isinstance(routed, Tensor) or routed.dim() == 0 or routed.shape[1:] != kept.shape[1:]:
        raise ValueError(
            f"routed: got {_describe(routed)}, wanted [K, ...] with the inner shape of kept, {list(kept.shape)}"
        )
    _check_device("routed", routed, "order", order.device)


def routed_extent(mask: Any, order: Any, n_routed: Any) -> None:
    _check_partition(order, n_routed)
    _check_rows("mask", mask, order)
    if mask.dim() != 2:
        raise ValueError(f"mask: got {_describe(mask)}, wanted [{order.shape[0]}, M]")
    _check_mask_dtype(mask)
