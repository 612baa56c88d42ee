"""The decision: a score, its temperature and a threshold that can move while models serve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from elang import checks, ops
from elang.reference import Route


class Gate(nn.Module):
    """A score and its threshold: a row stays with Swift iff its score is finite and at least `threshold`.

    The threshold is a float32 buffer of shape [1]: it moves between devices with the module, stays float32 through
    `.half()`, `.bfloat16()` and `.to(dtype)` (1.31044 would be 1.3125 in bfloat16), and the ops read it where it
    lies, so that `set_threshold` needs no recompilation. Never synchronises.
    """

    threshold: Tensor  # [1] float32

    def __init__(self, score: str, threshold: float) -> None:
        super().__init__()
        self.score = score
        self.register_buffer("threshold", torch.empty(1, dtype=torch.float32))
        self.set_threshold(threshold)

    def set_threshold(self, threshold: float) -> None:
        """Replace the threshold in place: captured graphs and compiled code see it at the next call."""
        checks.threshold(threshold)
        self.threshold.copy_(torch.tensor([threshold], dtype=torch.float32))

    def extra_repr(self) -> str:
        return f"score={self.score!r}, threshold={self.threshold.item()}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        exact = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.threshold.dtype != torch.float32:  # rounded to the models' dtype: only the choice of device is taken
            self.threshold = exact.to(self.threshold.device)
        return self


class Router(Gate):
    """The gate at Swift's logits (the paper's J(x)).

    Args:
        score: one of `elang.reference.SCORES`; every score is higher where Swift is surer.
        threshold: rounded to float32. `-inf` keeps every finite row, `inf` routes all.
        temperature: finite and > 0.

    Raises:
        TypeError, ValueError: unknown score, NaN threshold, temperature not finite or not > 0.
    """

    def __init__(self, score: str = "energy", *, threshold: float, temperature: float = 1.0) -> None:
        checks.score(score)
        checks.temperature(temperature)
        super().__init__(score, threshold)
        self.temperature = float(temperature)

    def forward(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [C, H]
        bias: Tensor | None,  # [C]
    ) -> Route:
        """Run the head and decide, in one op: see `elang.route`."""
        return ops.route(hidden, weight, bias, self.threshold, score=self.score, temperature=self.temperature)

    def from_logits(self, logits: Tensor) -> Route:  # [N, C]
        """Decide on logits that a model has already computed: see `elang.route_logits`."""
        return ops.route_logits(logits, self.threshold, score=self.score, temperature=self.temperature)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"
