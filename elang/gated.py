"""Swift, an encoder-decoder, and its gates: one before it decodes a row, one behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from elang import host_read
from elang.dispatch import Routing
from elang.energy_head import EnergyHead
from elang.fingerprint import fingerprint
from elang.late import LateRouter, ends_of, late_scores
from elang.reference import Route
from elang.router import Router

ENCODER_INPUTS = ("input_ids", "attention_mask", "inputs_embeds")


class Gated(NamedTuple):
    routing: Routing
    n_routed: int
    length: int  # columns of the inputs that a routed row needs
    kept: Tensor | None  # what Swift decoded for the rows order[n_routed:], one behind the other; None: there are none
    late: dict[str, Tensor] | None = None  # of these rows every late score [K]; None: no second gate, or there are none


@dataclass(frozen=True)
class GatedSwift:
    """Runs Swift's encoder once over all rows and its decoder over those that gate 1 keeps, from their states.

    Args:
        model: a Hugging Face encoder-decoder.
        head, router: gate 1, at the encoder's states. None: every row is decoded.
        late: gate 2, at the decoder's logits. None: every decoded row is kept.

    Raises:
        ValueError: no encoder-decoder, no gate, half of one, or a head of another encoder.
    """

    model: Any
    head: EnergyHead | None
    router: Router | None
    late: LateRouter | None = None

    def __post_init__(self) -> None:
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"swift: got {type(self.model).__name__}, wanted an encoder-decoder")
        if (self.head is None) != (self.router is None):
            raise ValueError("head, router: got one of them, wanted both or neither")
        if self.head is None and self.late is None:
            raise ValueError("head, late: got neither, wanted a head with its router, a late router, or both")
        if self.head is not None:
            width, wanted = self.head.output.in_features, self.model.config.hidden_size
            if width != wanted:
                raise ValueError(f"head: got one for states of {width}, wanted {wanted}, as Swift's are")
            if self.head.fitted is not None and self.head.fitted.encoder != fingerprint(self.model.get_encoder()):
                raise ValueError("head: got one that was fitted on another encoder, wanted one of Swift's")

    def encode(self, rows: dict[str, Tensor]) -> Tensor:
        """[N, M, H]"""
        encoded = {name: rows[name] for name in ENCODER_INPUTS if name in rows}
        return self.model.get_encoder()(**encoded).last_hidden_state  # type: ignore[no-any-return]

    def generate(self, rows: dict[str, Tensor], **options: Any) -> Gated:
        """Sequences [K, num_return_sequences, L] of the K rows that stay.

        Args:
            rows: everything that has a row for each of the N; `attention_mask` [N, M] among them.
            options: for the model's `generate`.
        """
        if self.late is None:

            def decode(kept: dict[str, Any]) -> Tensor:
                return by_row(self.model.generate(**kept, **options), len(kept["attention_mask"]))

            return self.before(rows, decode)
        states = self.encode(rows)
        first, n_routed, _ = self._first(states, rows)
        kept = first.order[n_routed:]
        late_score = torch.full_like(first.score, torch.nan)
        sequences = scores = None
        if len(kept):
            inputs = _kept_inputs(rows, states, kept)
            output = self.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
            sequences = by_row(output.sequences, len(kept))
            each = late_scores(output, ends_of(self.model, options))
            # Of several sequences of a row the first decides: the likeliest of beams.
            scores = {name: value.view(len(kept), -1)[:, 0] for name, value in each.items()}
            late_score[kept] = scores[self.late.score]
        second = self.late(late_score)  # a row that was not decoded has no score, and stays routed
        n_routed, length = _extent(second, rows)
        if sequences is not None and scores is not None:
            stay = torch.searchsorted(kept, second.order[n_routed:])
            sequences, scores = sequences[stay], {name: value[stay] for name, value in scores.items()}
        score = late_score if self.head is None else first.score
        routing = Routing(score, second.order, second.n_routed, None, None, "exact", late_score)
        return Gated(routing, n_routed, length, sequences, scores)

    def before(self, rows: dict[str, Tensor], decode: Callable[[dict[str, Any]], Tensor]) -> Gated:
        """Behind gate 1 alone: `decode` makes of Swift's inputs for K kept rows what is to be kept, [K, ...]."""
        states = self.encode(rows)
        route, n_routed, length = self._first(states, rows)
        kept = route.order[n_routed:]
        decoded = decode(_kept_inputs(rows, states, kept)) if len(kept) else None
        routing = Routing(route.score, route.order, route.n_routed, None, None, "exact")
        return Gated(routing, n_routed, length, decoded)

    def _first(self, states: Tensor, rows: dict[str, Tensor]) -> tuple[Route, int, int]:
        if self.head is not None and self.router is not None:
            route = self.head.decide(states, rows["attention_mask"], self.router)
            return route, *_extent(route, rows)
        n, device = len(states), states.device
        nobody, score = torch.zeros(1, dtype=torch.int32, device=device), torch.full((n,), torch.inf, device=device)
        return Route(states[:, :0, 0], score, torch.arange(n, device=device), nobody), 0, 0


def _extent(route: Route, rows: dict[str, Tensor]) -> tuple[int, int]:
    """How many rows are routed and the columns they need; if none of them has a token, all."""
    mask = rows["attention_mask"]
    n_routed, length = host_read.routed_extent(route.order, route.n_routed, mask)
    return n_routed, length or mask.shape[1]


def by_row(sequences: Tensor, rows: int) -> Tensor:
    """[rows, num_return_sequences, L] of what `generate` returns."""
    return sequences.view(rows, -1, sequences.shape[1])


def _kept_inputs(rows: dict[str, Tensor], states: Tensor, kept: Tensor) -> dict[str, Any]:
    inputs = {name: value[kept] for name, value in rows.items() if name not in ("input_ids", "inputs_embeds")}
    return {**inputs, "encoder_outputs": BaseModelOutput(last_hidden_state=states[kept])}
