"""Late scores: how sure Swift was of what it has decoded, and the gate that decides by one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from elang import ops
from elang.reference import Route
from elang.router import Gate

LATE_SCORES = ("mean_log_prob", "sum_log_prob", "min_log_prob", "decoder_energy")


@torch.no_grad()
def late_scores(output: Any, eos_token_id: int | list[int] | None) -> dict[str, Tensor]:
    """Each of `LATE_SCORES` [R] float32 of R generated sequences, over their tokens up to the first end of sequence.

    Of a token, `log_prob = logits.log_softmax(-1)[token]` and `energy = logits.logsumexp(-1)`, of the logits before any
    processing, those of its own beam. `decoder_energy` is the mean energy; the others are named for what they are.

    Args:
        output: of `generate(..., return_dict_in_generate=True, output_logits=True)`: greedy, sampled or of beams.
        eos_token_id: None: no token ends a sequence.

    Source: the mean free energy over tokens is the paper's token-wise form, on the decoder.
    """
    beams = getattr(output, "beam_indices", None)  # [R, L]
    length = len(output.logits) if beams is None else beams.shape[1]
    tokens = output.sequences[:, output.sequences.shape[1] - length :]
    row = torch.arange(len(tokens), device=tokens.device)
    energy, log_prob = [], []
    for step, logits in enumerate(output.logits[:length]):  # each [beams, V]
        at = row if beams is None else beams[:, step].clamp(min=0)
        free = logits.float().logsumexp(dim=-1)[at]
        energy.append(free)
        log_prob.append(logits[at, tokens[:, step]].float() - free)
    ends = torch.isin(tokens, torch.tensor(eos_token_id if eos_token_id is not None else [], device=tokens.device))
    real = ends.cumsum(dim=1) - ends.long() == 0
    count = real.sum(dim=1)
    p = torch.stack(log_prob, dim=1).where(real, 0.0)
    return {
        "mean_log_prob": p.sum(dim=1) / count,
        "sum_log_prob": p.sum(dim=1),
        "min_log_prob": p.amin(dim=1),
        "decoder_energy": torch.stack(energy, dim=1).where(real, 0.0).sum(dim=1) / count,
    }


def ends_of(model: Any, options: Mapping[str, Any]) -> int | list[int] | None:
    """The tokens that end a sequence for `model.generate(..., **options)`."""
    config = options.get("generation_config") or model.generation_config
    ends: int | list[int] | None = options.get("eos_token_id", config.eos_token_id)
    return ends


class LateRouter(Gate):
    """The second gate of a `JointSeq2Seq`, at what Swift has decoded.

    Args:
        score: one of `LATE_SCORES`.
        threshold: rounded to float32. `-inf` keeps every finite row, `inf` routes all.

    Raises:
        TypeError, ValueError: an unknown score, a threshold that is NaN or no number.
    """

    def __init__(self, score: str = "mean_log_prob", *, threshold: float) -> None:
        if score not in LATE_SCORES:
            raise ValueError(f"score: got {score!r}, wanted one of {', '.join(LATE_SCORES)}")
        super().__init__(score, threshold)

    def forward(self, score: Tensor) -> Route:  # [N] float32, NaN for a row that Swift did not decode
        """Which rows stay with Swift: see `elang.route_logits`. Synchronizes: no."""
        return ops.route_logits(score.unsqueeze(1), self.threshold, score="logit")
