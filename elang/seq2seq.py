"""Swift and Super behind one `generate()`: encoder-decoders, of which only one decodes each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.generation.utils import GenerateEncoderDecoderOutput
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from elang import dispatch
from elang.contract import check_eval
from elang.dispatch import MODES, Plan, Routing
from elang.energy_head import EnergyHead
from elang.reference import Route
from elang.router import Router
from elang.stats import Counts, Stats
from elang.super_model import SuperModel, sent

ENCODER_INPUTS = ("input_ids", "attention_mask", "inputs_embeds")
# What one model says of itself, and two cannot say together.
_OF_ONE_MODEL = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")


class JointSeq2Seq(nn.Module):
    """Swift decodes the rows that an energy head on its encoder is sure of, Super the others; used like either of them.

    Swift's encoder runs once, over all rows. A kept row is decoded from the states that it gave; a routed row never
    meets Swift's decoder and goes to Super as it came, without the padding that only others needed. For inference only,
    both models in eval mode and of one vocabulary; neither is changed. Nothing is kept between calls: threads may share
    a joint model.

    Args:
        swift, super_: Hugging Face encoder-decoders (`AutoModelForSeq2SeqLM`). Each generates by its own
            `generation_config`; what is passed to `generate` holds for both.
        head: on Swift's encoder; moved to Swift's device and dtype.
        router: score and threshold; moved to Swift's device.
        super_device: where Super's inputs are sent, if Super is not on Swift's device.

    Raises:
        ValueError: no encoder-decoder, a head of another width, vocabularies or special tokens that differ.
    """

    swift: Any
    super_: Any
    config: Any
    head: EnergyHead

    def __init__(
        self,
        swift: nn.Module,
        super_: nn.Module,
        head: EnergyHead,
        router: Router,
        super_device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_pair(swift, super_, head)
        parameter = next(swift.parameters())
        self.swift, self.super_ = swift, super_
        self.head = head.to(parameter.device, parameter.dtype)
        self.router = router.to(parameter.device)
        self.counts = Counts().to(parameter.device)
        device = None if super_device is None else torch.device(super_device)
        self.plan = Plan(SuperModel(super_, device), counts=self.counts)
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
        route, states, count = self._decide(rows)

        def swift(kept: dict[str, Any]) -> Tensor:
            return self.swift.generate(**kept, **options)  # type: ignore[no-any-return]

        def super_(routed: dict[str, Any]) -> Tensor:
            return self.super_.generate(**routed, **options)  # type: ignore[no-any-return]

        parts = self._answer(rows, route, states, count, swift, super_)
        rows_of_parts = [n for n in (count.n_routed, len(route.order) - count.n_routed) if n]
        each, *other = {len(part) // n for part, n in zip(parts, rows_of_parts, strict=True)}
        if other:
            raise ValueError(
                f"num_return_sequences: got {each} of one model and {other[0]} of the other, wanted the same"
            )
        sequences = _merged_sequences(parts, route.order, each, self.config.pad_token_id)
        if not return_dict_in_generate:
            return sequences
        output = GenerateEncoderDecoderOutput(sequences=sequences)  # type: ignore[arg-type]
        output.routing = self._routing(route)
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
            ValueError: neither `decoder_input_ids` nor `labels`; outputs of one model asked for.
            RuntimeError: Swift or Super is in training mode.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids: got None, wanted them or labels")
            decoder_input_ids = self.super_.prepare_decoder_input_ids_from_labels(labels=labels)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
        rows, options = self._split({**inputs, **kwargs, "use_cache": False})
        route, states, count = self._decide(rows)

        def swift(kept: dict[str, Any]) -> Tensor:
            return self.swift(**kept, **options).logits.to(self.super_.dtype)  # type: ignore[no-any-return]

        def super_(routed: dict[str, Any]) -> Tensor:
            return self.super_(**routed, **options).logits  # type: ignore[no-any-return]

        logits = _merged(self._answer(rows, route, states, count, swift, super_), route.order)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).flatten())
        output = Seq2SeqLMOutput(loss=loss, logits=logits)
        if return_dict is False:
            return output.to_tuple()
        output.routing = self._routing(route)
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

    def _decide(self, rows: dict[str, Tensor]) -> tuple[Route, Tensor, dispatch.Count]:
        encoded = {name: rows[name] for name in ENCODER_INPUTS if name in rows}
        states = self.swift.get_encoder()(**encoded).last_hidden_state
        route = self.head.decide(states, rows["attention_mask"], self.router)
        return route, states, dispatch.read(MODES["exact"], route, rows, self.plan)

    def _answer(
        self,
        rows: dict[str, Tensor],
        route: Route,
        states: Tensor,
        count: dispatch.Count,
        swift: Callable[[dict[str, Any]], Tensor],
        super_: Callable[[dict[str, Any]], Tensor],
    ) -> list[Tensor]:
        """Super's answers to the routed rows, then Swift's to the kept ones; nobody's where there are none."""
        answers = []
        if count.n_routed:
            of_encoder = {name: value for name, value in rows.items() if name in ENCODER_INPUTS}
            assert count.length is not None, "there is a mask"
            trimmed = dispatch.trimmed(of_encoder, rows["attention_mask"].shape[1], count.length)
            routed = dispatch.gathered(route, {**rows, **trimmed}, self.plan, count.n_routed)
            device = self.plan.super_.device
            answers.append(super_(dict(routed) if device is None else sent(routed, device)).to(states.device))
        if count.n_routed < len(route.order):
            order = route.order[count.n_routed :]
            kept = {name: value[order] for name, value in rows.items() if name not in ("input_ids", "inputs_embeds")}
            answers.append(swift({**kept, "encoder_outputs": BaseModelOutput(last_hidden_state=states[order])}))
        return answers

    def _routing(self, route: Route) -> Routing:
        return Routing(route.score, route.order, route.n_routed, None, None, "exact")


def _merged(parts: list[Tensor], order: Tensor) -> Tensor:
    """The parts, which are one behind the other in `order`, in input order."""
    together = torch.cat(parts)
    return torch.empty_like(together).index_copy_(0, order, together)


def _merged_sequences(parts: list[Tensor], order: Tensor, each: int, pad: int | None) -> Tensor:
    """As many sequences for each row, in input order, padded at the end to the longest."""
    length = max(part.shape[1] for part in parts)
    padded = [F.pad(part, (0, length - part.shape[1]), value=0 if pad is None else pad) for part in parts]
    groups = [part.view(-1, each, length) for part in padded]
    return _merged(groups, order).flatten(0, 1)


def _check_pair(swift: Any, super_: Any, head: EnergyHead) -> None:
    for name, model in (("swift", swift), ("super_", super_)):
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"{name}: got {type(model).__name__}, wanted an encoder-decoder")
    for name in ("vocab_size", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        ours, theirs = getattr(swift.config, name, None), getattr(super_.config, name, None)
        if ours != theirs:
            raise ValueError(
                f"super_: got {name} {theirs}, wanted Swift's {ours}: different vocabularies only join as text"
            )
    if head.output.in_features != swift.config.hidden_size:
        raise ValueError(
            f"head: got one for states of {head.output.in_features}, wanted {swift.config.hidden_size}, as Swift's are"
        )
