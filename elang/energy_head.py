"""The energy head: what tells from Swift's encoder, before anything is decoded, whether Swift is sure."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elang import ops
from elang.reference import Route
from elang.router import Router

Form = Literal["pooled", "token"]
FORMS = ("pooled", "token")
WEIGHTS, RECORD = "energy_head.safetensors", "energy_head.json"


class Fitted(BaseModel):
    """What a head was fitted on and how well it tells on held-out rows: `elang.fit_energy_head`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str  # fingerprint of the encoder that the head belongs to
    targets: Literal["right", "class", "next token"]
    score: Literal["logit", "energy"]  # that a router decides by
    n: int  # rows fitted on
    n_validation: int
    seed: int
    train_loss: tuple[float, ...]  # after each epoch
    validation_loss: tuple[float, ...]
    auroc: float | None  # of the score, for "Swift is right" on the validation rows; None: it was not said
    share_kept: tuple[float, ...]  # on the validation rows, from the surest on
    share_right: tuple[float, ...]  # of the rows kept; empty: it was not said
    library: str  # version of elang
    date: str

    def summary(self) -> str:
        """The head in a sentence, and how right Swift is on what it would keep."""
        if self.auroc is None:
            return f"Fitted on {self.n} rows; loss on {self.n_validation} others {min(self.validation_loss):.4g}."
        kept = ", ".join(
            f"{right:.1%} of {share:.0%}" for share, right in zip(self.share_kept, self.share_right, strict=True)
        )
        return (
            f"Fitted on {self.n} rows. On {self.n_validation} others the {self.score} tells where Swift is right with "
            f"an AUROC of {self.auroc:.3f}; right of those kept: {kept}."
        )


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
        self.fitted: Fitted | None = None  # a head that was fitted serves the encoder it was fitted on, and no other

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

    def save(self, folder: str | Path) -> None:
        """Write `energy_head.safetensors` and `energy_head.json` into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)
        outputs, size = self.output.weight.shape
        record = _Record(form=self.form, hidden_size=size, num_outputs=outputs, fitted=self.fitted)
        (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> EnergyHead:
        """Read what `save` wrote. Raises ValueError or OSError for anything else."""
        record = _Record.model_validate_json(Path(folder, RECORD).read_text(encoding="utf-8"))
        weights = load_file(Path(folder, WEIGHTS))
        head = cls(record.hidden_size, record.num_outputs, record.form)
        head = head.to(weights["output.weight"].dtype)
        head.load_state_dict(weights)
        head.fitted = record.fitted
        return head

    def extra_repr(self) -> str:
        return f"form={self.form!r}"


def pooled(states: Tensor, mask: Tensor | None) -> Tensor:
    """[N, H]: the mean over each row's real tokens, in float32 and back; of a row without any NaN, which is routed."""
    if mask is None:
        return states.mean(dim=1, dtype=torch.float32).to(states.dtype)
    weight = (mask != 0).to(torch.float32)
    total = torch.einsum("nmh,nm->nh", states.float(), weight)
    return (total / weight.sum(dim=1, keepdim=True)).to(states.dtype)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    form: Form
    hidden_size: int
    num_outputs: int
    fitted: Fitted | None
