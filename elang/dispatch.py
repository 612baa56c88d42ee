"""Which rows Super sees, and how its answers get back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elang import host_read, ops
from elang.backbones import logits_of
from elang.reference import Route

SuperInputs = Callable[[dict[str, Any], Tensor], Mapping[str, Any]]


class Routing(NamedTuple):
    """What a joint model decided about a batch of N rows."""

    score: Tensor  # [N] float32, Swift's confidence
    order: Tensor  # [N] int64, the rows that went to Super first, each part in input order
    n_routed: Tensor  # [1] int32
    overflow: Tensor | None  # [1] int32, rows that Super had no room for; None: the mode has room for all
    degraded: Tensor | None  # [N] bool, which rows these are; None: the mode has room for all
    mode: str  # the dispatch mode, and "+route_logits" where Swift's head could not be taken over


def exact(
    route: Route,
    super_: Callable[..., Any],
    inputs: dict[str, Any],
    *,
    super_inputs: SuperInputs | None = None,
    trim: bool = True,
    super_device: torch.device | None = None,
) -> tuple[Tensor, Any]:
    """Call Super once, on exactly the routed rows, and put its logits in their places.

    Tensors in `inputs` whose first dimension is N are row tensors; whatever else is there passes as it is. With
    `trim` the trailing columns that `attention_mask` [N, M] hides in every routed row are cut from all inputs whose
    second dimension is M. Nothing routed: Super is not called. Everything routed: the inputs are not copied. One host
    read, of 8 bytes: see `elang.host_read`.

    Args:
        route: Swift's decision; its logits are in Super's label order.
        super_: takes keyword inputs, returns logits in one of the forms of `elang.backbones.logits_of`.
        super_inputs: makes Super's inputs from all inputs and the routed rows [n_routed] int64, in place of gathering
            and trimming.
        super_device: where Super's inputs are sent; the logits come back to Swift's device.

    Returns:
        The logits [N, C], in Super's dtype if it was called, and what Super returned (None if it was not).

    Raises:
        ValueError: Super's logits are not [n_routed, C].
    """
    rows, classes = route.logits.shape
    mask = inputs.get("attention_mask") if trim and super_inputs is None else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != rows:
        mask = None
    n_routed, length = host_read.routed_extent(route.order, route.n_routed, mask)
    if n_routed == 0:
        return route.logits, None

    if super_inputs is not None:
        routed = super_inputs(inputs, route.order[:n_routed])
    else:
        routed = inputs if mask is None else _trimmed(inputs, mask.shape[1], length)
        if n_routed < rows:
            routed = _gathered(routed, route, n_routed)
    if super_device is not None:
        routed = {name: v.to(super_device) if isinstance(v, Tensor) else v for name, v in routed.items()}

    output = super_(**routed)
    logits = logits_of(output)
    if logits.shape != (n_routed, classes):
        raise ValueError(f"super_: got logits {list(logits.shape)} for {n_routed} rows, wanted [{n_routed}, {classes}]")
    logits = logits.to(route.logits.device)
    # With every row routed the order is the identity.
    return (logits if n_routed == rows else ops.merge_rows(route.logits, logits, route.order, route.n_routed)), output


MODES = {"exact": exact}


def _trimmed(inputs: dict[str, Any], columns: int, length: int) -> dict[str, Any]:
    """The first `length` columns of every input that has `columns` of them, as views."""
    if not 0 < length < columns:
        return inputs
    return {
        name: v[:, :length] if isinstance(v, Tensor) and v.dim() > 1 and v.shape[1] == columns else v
        for name, v in inputs.items()
    }


def _gathered(inputs: dict[str, Any], route: Route, n_routed: int) -> dict[str, Any]:
    """The routed rows of every row tensor, all copied in one call."""
    rows = len(route.order)
    names = [name for name, v in inputs.items() if isinstance(v, Tensor) and v.dim() > 0 and len(v) == rows]
    gathered = ops.gather_rows([inputs[name] for name in names], route.order, route.n_routed, n_routed)
    return {**inputs, **dict(zip(names, gathered, strict=True))}
