"""The energy head: what tells from Swift's encoder, before anything is decoded, whether Swift is sure."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from elang import ops
from elang.reference import Route
from elang.router import Router

Form = Literal["pooled", "token"]
FORMS = ("pooled", "token")


class EnergyHead(nn.Module):
    """A linear layer `output` over the states of a frozen encoder, whose energy decides.

    `pooled`: `output((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))`, the logits of a task's classes,
    or one, "Swift will be right", for a router with score "logit".
    `token`: `(output(states).logsumexp(-1) * mask).sum(1) / mask.sum(1)`, the mean over real tokens, whose logits over
    the vocabulary are never made (`elang.vocab_energy`).

    Source: the two forms of h in the paper's framework figure.

    Args:
        hidden_size: H of the encoder.
        num_outputs: C: classes, 1, or the vocabulary.
        form: one of `FORMS`.

    Raises:
        ValueError: an unknown form, or a `token` head of one output, which has no energy.
    """

    def __init__(self, hidden_size: int, num_outputs: int, form: Form = "pooled") -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form: got {form!r}, wanted one of {', '.join(FORMS)}")
        if form == "token" and num_outputs < 2:
            raise ValueError(f"num_outputs: got {num_outputs}, wanted at least 2 for the form 'token'")
        self.form: Form = form
        self.output = nn.Linear(hidden_size, num_outputs)

    @torch.no_grad()
    def decide(
        self,
        states: Tensor,  # [N, M, H]
        mask: Tensor | None,  # [N, M]; None: every token is real
        router: Router,
    ) -> Route:
        """Which rows Swift keeps, in one op behind the pooling, or two behind the states. Synchronizes: no.

        Returns:
            Route: its logits are the head's [N, C], or the score [N, 1] of the form `token`.

        Raises:
            ValueError: a router with another score than "energy" for the form `token`; as the ops do.
        """
        if self.form == "pooled":
            return router(pooled(states, mask), self.output.weight, self.output.bias)  # type: ignore[no-any-return]
        if router.score != "energy":
            raise ValueError(f"router: got score {router.score!r}, wanted 'energy' for a head of the form 'token'")
        energy = ops.vocab_energy(states, self.output.weight, self.output.bias, mask, temperature=router.temperature)
        score = energy.score.unsqueeze(1)
        return ops.route_logits(score, router.threshold, score="logit")

    def extra_repr(self) -> str:
        return f"form={self.form!r}"


def pooled(states: Tensor, mask: Tensor | None) -> Tensor:
    """[N, H]: the mean over each row's real tokens, in float32 and back; of a row without any NaN, which is routed."""
    if mask is None:
        return states.mean(dim=1, dtype=torch.float32).to(states.dtype)
    weight = (mask != 0).to(torch.float32)
    total = torch.einsum("nmh,nm->nh", states.float(), weight)
    return (total / weight.sum(dim=1, keepdim=True)).to(states.dtype)
