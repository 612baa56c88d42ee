"""Every op in plain PyTorch: the oracle of the tests, the baseline of the benches, and the backend of last resort.

Each function takes and returns exactly what the op of the same name in `elang.ops` does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCORES = ("energy", "energy_probs", "energy_centered", "max_prob", "neg_entropy", "margin", "logit")


class Route(NamedTuple):
    """What `route` returns. Equal inputs on the same backend give bit-identical values."""

    logits: Tensor  # [N, C] the dtype of `hidden`
    score: Tensor  # [N] float32, higher = more confident
    order: Tensor  # [N] int64, a stable partition of the rows: the routed ones first, then the kept ones
    n_routed: Tensor  # [1] int32, on the device of `score`


class VocabEnergy(NamedTuple):
    """What `vocab_energy` returns."""

    score: Tensor  # [N] or [B] float32, higher = more confident; NaN for a sequence without a token
    argmax: Tensor  # [N] or [B, M] int64; -1 where a token is masked


def score_logits(logits: Tensor, score: str = "energy", temperature: float = 1.0) -> Tensor:
    """Confidence of each row: logits [N, C] of any float dtype -> [N] in float32 (float64 stays float64)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if score == "logit":
        return z[:, 0].clone()
    if score == "energy":
        return temperature * torch.logsumexp(z / temperature, dim=1)
    if score == "energy_centered":
        return temperature * torch.logsumexp((z - z.mean(dim=1, keepdim=True)) / temperature, dim=1)
    p = torch.softmax(z / temperature, dim=1)
    if score == "energy_probs":
        return torch.logsumexp(p, dim=1)
    if score == "max_prob":
        return p.amax(dim=1)
    if score == "neg_entropy":
        return torch.xlogy(p, p).sum(dim=1)
    if score == "margin":
        top = p.topk(2, dim=1).values
        return top[:, 0] - top[:, 1]
    raise ValueError(f"score: got {score!r}, wanted one of {', '.join(SCORES)}")


def keep_mask(score: Tensor, threshold: float | Tensor) -> Tensor:
    """Rows that stay with Swift: finite and >= threshold, compared in float32. score [N] -> [N] bool."""
    t = torch.as_tensor(threshold, dtype=torch.float32, device=score.device)
    return torch.isfinite(score) & (score >= t)


def partition(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Stable partition, routed rows first. keep [N] bool -> (order [N] int64, n_routed [1] int32)."""
    order = torch.argsort(keep.to(torch.uint8), stable=True)
    return order, (~keep).sum(dtype=torch.int32).reshape(1)


def route(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [C, H]
    bias: Tensor | None,  # [C]
    threshold: float | Tensor,  # [] or [1] float32
    *,
    score: str = "energy",
    temperature: float = 1.0,
) -> Route:
    with torch.autocast(hidden.device.type, enabled=False):  # it would take the product back to a short dtype
        z = hidden.float() @ weight.float().t()
    if bias is not None:
        z = z + bias.float()
    values = score_logits(z, score, temperature)
    return Route(z.to(hidden.dtype), values, *partition(keep_mask(values, threshold)))


def route_logits(
    logits: Tensor,  # [N, C]
    threshold: float | Tensor,
    *,
    score: str = "energy",
    temperature: float = 1.0,
) -> Route:
    values = score_logits(logits, score, temperature)
    return Route(logits, values, *partition(keep_mask(values, threshold)))


def vocab_energy(
    hidden: Tensor,  # [N, H] or [B, M, H]
    weight: Tensor,  # [C, H]
    bias: Tensor | None = None,  # [C]
    mask: Tensor | None = None,  # [B, M]
    *,
    temperature: float = 1.0,
) -> VocabEnergy:
    with torch.autocast(hidden.device.type, enabled=False):
        z = hidden.float() @ weight.float().t()
    if bias is not None:
        z = z + bias.float()
    values = temperature * torch.logsumexp(z / temperature, dim=-1)
    argmax = z.argmax(dim=-1)
    if hidden.dim() == 2:
        return VocabEnergy(values, argmax)
    real = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    # Where, not a product: what stands at a masked token may be anything.
    score = values.where(real, 0.0).sum(dim=1) / real.sum(dim=1)
    return VocabEnergy(score, argmax.where(real, -1))


def gather_rows(
    tensors: list[Tensor],  # each [N, ...]
    order: Tensor,  # [N] int64
    n_routed: Tensor,  # [1] int32
    capacity: int,
) -> list[Tensor]:
    slot = torch.arange(capacity, device=order.device)
    # A slot past the last routed row repeats it: real data, so that attention over it is never all-masked.
    slot = torch.minimum(slot, (n_routed.long() - 1).clamp(min=0))
    rows = order[slot] if order.numel() else slot
    return [t[rows] for t in tensors]


def merge_rows(
    kept: Tensor,  # [N, ...]
    routed: Tensor,  # [K, ...]
    order: Tensor,  # [N] int64
    n_routed: Tensor,  # [1] int32
) -> Tensor:
    k = min(routed.shape[0], kept.shape[0])
    rows = order[:k]
    valid = torch.arange(k, device=order.device) < n_routed
    valid = valid.reshape(-1, *[1] * (kept.dim() - 1))
    merged = kept.to(routed.dtype, copy=True)
    merged[rows] = torch.where(valid, routed[:k], merged[rows])
    return merged


def routed_extent(
    mask: Tensor,  # [N, M]
    order: Tensor,  # [N] int64
    n_routed: Tensor,  # [1] int32
) -> Tensor:
    rows, columns = mask.shape
    ends = torch.arange(1, columns + 1, dtype=torch.int32, device=mask.device)
    if not mask.numel():
        return torch.cat([n_routed, torch.zeros_like(n_routed)])
    routed = torch.arange(rows, device=mask.device) < n_routed
    lengths = ((mask != 0) * ends).amax(dim=1)[order] * routed
    return torch.cat([n_routed, lengths.amax(dim=0, keepdim=True)])
