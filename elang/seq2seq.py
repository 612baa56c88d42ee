"""Swift and Super behind one `generate()`: encoder-decoders, of which only one decodes each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.generation.utils import GenerateEncoderDecoderOutput
from transformers.modeling_outputs import Seq2SeqLMOutput

from elang import dispatch, ops
from elang.contract import check_eval
from elang.energy_head import EnergyHead
from elang.gated import ENCODER_INPUTS, Gated, GatedSwift, by_row
from elang.late import LateRouter
from elang.router import Router
from elang.stats import Counts, Stats
from elang.super_model import sent

# What one model says of itself, and two cannot say together.
_OF_ONE_MODEL = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")


class JointSeq2Seq(nn.Module):
    """Swift decodes the rows that it is sure of, Super the others; used like either of them.

    Swift's encoder runs once, over all rows. Gate 1, an energy head on its states, sends rows to Super that Swift's
    decoder never meets; gate 2 sends those that Swift has decoded without conviction. A kept row is decoded from the
    states that the encoder gave; a routed row goes to Super as it came, without the padding that only others needed.
    For inference only, both models in eval mode and of one vocabulary (else: `elang.pipeline`); neither is changed.
    Nothing is kept between calls: threads may share a joint model.

    Args:
        swift, super_: Hugging Face encoder-decoders (`AutoModelForSeq2SeqLM`). Each generates by its own
            `generation_config`; what is passed to `generate` holds for both.
        head, router: gate 1, or neither; moved to Swift's device, the head to its dtype.
        late: gate 2, or none; moved to Swift's device.
        super_device: where Super's inputs are sent, if Super is not on Swift's device.

    Raises:
        ValueError: no encoder-decoder, no gate, a head of another encoder, vocabularies or special tokens that differ.
    """

    swift: Any
    super_: Any
    config: Any

    def __init__(
        self,
        swift: nn.Module,
        super_: nn.Module,
        head: EnergyHead | None = None,
        router: Router | None = None,
        *,
        late: LateRouter | None = None,
        super_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        gated = GatedSwift(swift, head, router, late)
        _check_pair(swift, super_)
        parameter = next(swift.parameters())
        self.swift, self.super_ = swift, super_
        self.head = None if head is None else head.to(parameter.device, parameter.dtype)
        self.router = None if router is None else router.to(parameter.device)
        self.late = None if late is None else late.to(parameter.device)
        self.gated = gated
        self.counts = Counts().to(parameter.device)
        self.super_device = None if super_device is None else torch.device(super_device)
        self.config = super_.config
        self.training = False

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,  # [N, M]
        attention_mask: Tensor | None = None,  # [N, M]
        return_dict_in_generate: bool | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateEncoderDecoderOutput:
        """Sequences of every row, in input order, padded alike: [N * num_return_sequences, L].

        Args:
            attention_mask: None: whatever is not the padding token.
            return_dict_in_generate: for an output with `.sequences` and `.routing`, in place of a plain tensor.
            kwargs: as for either model's `generate`. Tensors with N rows are split like the inputs.

        Raises:
            ValueError: `output_scores` and the like asked for, or numbers of sequences that differ between the models.
            RuntimeError: Swift or Super is in training mode.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        rows, options = self._split(inputs)
        gated = self.gated.generate(rows, **options)
        routed = self._routed(rows, gated, lambda inputs: self.super_.generate(**inputs, **options))
        if routed is not None:
            routed = by_row(routed, gated.n_routed)
        parts = [part for part in (routed, gated.kept) if part is not None]
        if len({part.shape[1] for part in parts}) > 1:
            raise ValueError(
                f"num_return_sequences: got {parts[0].shape[1]} of Super and {parts[1].shape[1]} of Swift, "
                "wanted the same"
            )
        sequences = _merged(_padded(parts, self.config.pad_token_id), gated.routing.order).flatten(0, 1)
        if not return_dict_in_generate:
            return sequences
        output = GenerateEncoderDecoderOutput(sequences=sequences)  # type: ignore[arg-type]
        output.routing = gated.routing
        return output

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,  # [N, M]
        attention_mask: Tensor | None = None,  # [N, M]
        decoder_input_ids: Tensor | None = None,  # [N, L]
        labels: Tensor | None = None,  # [N, L] int64, -100 where there is none
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Teacher-forced logits [N, L, V] of every row, by the model that answers it; with labels their loss too.

        Raises:
            ValueError: neither `decoder_input_ids` nor `labels`; outputs of one model asked for; a late router, which
                scores what `generate` decodes.
            RuntimeError: Swift or Super is in training mode.
        """
        if self.late is not None:
            raise ValueError("late: scores what generate() decodes; wanted a joint model without it for forward()")
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids: got None, wanted them or labels")
            decoder_input_ids = self.super_.prepare_decoder_input_ids_from_labels(labels=labels)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
        rows, options = self._split({**inputs, **kwargs, "use_cache": False})

        def swift(kept: dict[str, Any]) -> Tensor:
            return self.swift(**kept, **options).logits.to(self.super_.dtype)  # type: ignore[no-any-return]

        gated = self.gated.before(rows, swift)
        routed = self._routed(rows, gated, lambda inputs: self.super_(**inputs, **options).logits)
        logits = _merged([part for part in (routed, gated.kept) if part is not None], gated.routing.order)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).flatten())
        output = Seq2SeqLMOutput(loss=loss, logits=logits)
        if return_dict is False:
            return output.to_tuple()
        output.routing = gated.routing
        return output

    @property
    def stats(self) -> Stats:
        """What has been answered so far, by whom. Synchronizes: yes; nothing that counts does."""
        return self.counts.read()

    @property
    def device(self) -> torch.device:
        """Where inputs go: Swift's device."""
        return next(self.swift.parameters()).device  # type: ignore[no-any-return]

    def can_generate(self) -> bool:
        return True

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What has a row for each row of the input, the mask included, and what holds for all of them."""
        check_eval(("swift", self.swift), ("super_", self.super_))
        if asked := [name for name in _OF_ONE_MODEL if inputs.get(name)]:
            raise ValueError(f"{', '.join(asked)}: of two models only sequences and logits merge")
        inputs = {name: value for name, value in inputs.items() if value is not None}
        given = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if not isinstance(given, Tensor):
            raise ValueError(f"input_ids: got {type(given).__name__}, wanted a tensor [N, M], or inputs_embeds")
        if "attention_mask" not in inputs:
            pad = self.config.pad_token_id
            real = (
                given != pad if given.dim() == 2 and pad is not None else torch.ones(given.shape[:2], dtype=torch.bool)
            )
            inputs["attention_mask"] = real.to(given.device, torch.int64)
        rows = {
            name: value
            for name, value in inputs.items()
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(given)
        }
        return rows, {name: value for name, value in inputs.items() if name not in rows}

    def _routed(
        self, rows: dict[str, Tensor], gated: Gated, super_: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor | None:
        """Super's answers to the routed rows, on Swift's device; None where there are none."""
        order, n_routed = gated.routing.order, gated.n_routed
        self.counts.add(len(order), n_routed, n_routed)
        if n_routed == 0:
            return None
        of_encoder = {name: value for name, value in rows.items() if name in ENCODER_INPUTS}
        inputs = {**rows, **dispatch.trimmed(of_encoder, rows["attention_mask"].shape[1], gated.length)}
        routed = dict(
            zip(inputs, ops.gather_rows(list(inputs.values()), order, gated.routing.n_routed, n_routed), strict=True)
        )
        answers = super_(routed if self.super_device is None else dict(sent(routed, self.super_device)))
        return answers.to(order.device)


def _merged(parts: list[Tensor], order: Tensor) -> Tensor:
    """The parts, which are one behind the other in `order`, in input order."""
    together = torch.cat(parts)
    return torch.empty_like(together).index_copy_(0, order, together)


def _padded(parts: list[Tensor], pad: int | None) -> list[Tensor]:
    """Sequences [K, num_return_sequences, L] of each part, padded at the end to the longest of all."""
    length = max(part.shape[-1] for part in parts)
    return [F.pad(part, (0, length - part.shape[-1]), value=0 if pad is None else pad) for part in parts]


def _check_pair(swift: Any, super_: Any) -> None:
    if not getattr(getattr(super_, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"super_: got {type(super_).__name__}, wanted an encoder-decoder")
    for name in ("vocab_size", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        ours, theirs = getattr(swift.config, name, None), getattr(super_.config, name, None)
        if ours != theirs:
            raise ValueError(
                f"super_: got {name} {theirs}, wanted Swift's {ours}: models of different vocabularies are joined as "
                "text, by elang.pipeline"
            )
