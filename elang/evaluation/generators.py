"""Encoder-decoders on a task: they write the answer, in T5's form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from elang.energy_head import EnergyHead
from elang.evaluation.flops import generate_flops, row_flops
from elang.evaluation.metrics import Values, read_predictions
from elang.evaluation.predict import CLASSIFIER_SCORES, Encoded, scored_name
from elang.evaluation.rows import Rows
from elang.evaluation.task_model import Call, Columns, TaskModel
from elang.fingerprint import fingerprint
from elang.gated import ENCODER_INPUTS
from elang.late import LATE_SCORES, LateRouter, ends_of, late_scores
from elang.progress import Report, silent
from elang.router import Router
from elang.seq2seq import JointSeq2Seq

MAX_NEW_TOKENS = 128  # where the task does not know its answers: of a translation


@dataclass(frozen=True, eq=False)
class Generator(TaskModel):
    """An encoder-decoder that decodes greedily. T5 and its kin read T5's form of a row, others a translation's source.

    Swift is scored after decoding (`LATE_SCORES`), and before by its energy head, if it has one.
    """

    head: EnergyHead | None = None

    @property
    def early_scores(self) -> tuple[str, ...]:
        if self.head is None:
            return ()
        if self.head.output.out_features == 1:
            return ("logit",)
        return ("energy",) if self.head.form == "token" else CLASSIFIER_SCORES

    @property
    def scores(self) -> tuple[str, ...]:
        return self.early_scores + LATE_SCORES

    @property
    def op(self) -> str:
        if self.head is None:
            return "route_logits"
        return "route" if self.head.form == "pooled" else "vocab_energy"

    def settings(self, rows: Rows) -> list[Any]:
        return [self.options(rows), self.head_sha256, None if self.head is None else self.head.form]

    @property
    def head_sha256(self) -> str | None:
        return None if self.head is None else fingerprint(self.head)

    def check(self) -> None:
        fitted = None if self.head is None else self.head.fitted
        if fitted is not None and fitted.encoder != fingerprint(self.model.get_encoder()):
            raise ValueError("head: got one that was fitted on another encoder, wanted one of Swift's")
        if self.task.kind != "generation" and not self._is_t5:
            raise ValueError(
                f"{self.role}: got an encoder-decoder of the type {self.model.config.model_type} for {self.task.name}, "
                "wanted one of T5's kin, which know the form of the task"
            )

    @property
    def _is_t5(self) -> bool:
        return "t5" in self.model.config.model_type

    def source_texts(self, rows: Rows) -> list[str]:
        return list(rows.source_texts) if self._is_t5 else [texts[0] for texts in rows.texts]

    def encode(self, rows: Rows) -> Encoded:
        return self._encoded(self.source_texts(rows))

    def options(self, rows: Rows) -> dict[str, Any]:
        """For `generate`: greedy, and no longer than the longest answer there is."""
        words = {*self.task.labels, *self.task.target_texts, *(word for of in rows.candidates for word in of)}
        longest = MAX_NEW_TOKENS
        if self.task.kind != "generation":
            longest = max(len(self.tokenizer(word)["input_ids"]) for word in words)
        return {"max_new_tokens": longest, "num_beams": 1, "do_sample": False}

    def answer(self, rows: Rows, texts: Encoded, batch_size: int = 32, report: Report = silent) -> Columns:
        return self._answer(rows, texts, (), batch_size, report)

    def answer_scored(
        self,
        rows: Rows,
        texts: Encoded,
        temperatures: Sequence[float] = (1.0,),
        batch_size: int = 32,
        report: Report = silent,
    ) -> Columns:
        if any(t != 1 for t in temperatures) and self.early_scores in ((), ("logit",)):
            raise ValueError(
                f"temperature: got {max(temperatures):g}, wanted 1: none of {', '.join(self.scores)} has one"
            )
        columns = self._answer(rows, texts, temperatures, batch_size, report)
        if self.head is not None:
            outputs, width = self.head.output.weight.shape
            positions = texts.lengths if self.head.form == "token" else np.ones_like(texts.lengths)
            gate = row_flops(self.model.get_encoder(), texts.lengths) + 2 * positions * outputs * width
            for name in self._early_names(temperatures):
                columns[f"gate_flops.{name}"] = gate
        return columns

    def values(self, rows: Rows, columns: Columns) -> Values:
        texts = self.tokenizer.batch_decode(columns["tokens"], skip_special_tokens=True)
        return read_predictions(self.task, texts, rows)

    def joined(self, super_: TaskModel, score: str, threshold: float, temperature: float) -> Any:
        if not isinstance(super_, Generator):
            raise ValueError("time: got an encoder-decoder before another kind of model, wanted two alike")
        if score in LATE_SCORES:
            return JointSeq2Seq(self.model, super_.model, late=LateRouter(score, threshold=threshold))
        router = Router(score, threshold=threshold, temperature=temperature)
        return JointSeq2Seq(self.model, super_.model, self.head, router)

    def run(self, model: Any, rows: Rows, batch: dict[str, Tensor]) -> Call:
        return partial(model.generate, **_read(batch), **self.options(rows))

    def _early_names(self, temperatures: Sequence[float]) -> list[str]:
        return [scored_name(name, t, temperatures) for t in temperatures for name in self.early_scores]

    @torch.inference_mode()
    def _answer(
        self, rows: Rows, texts: Encoded, temperatures: Sequence[float], batch_size: int, report: Report
    ) -> Columns:
        """With scores if there are temperatures."""
        options, of_rows = self.options(rows), list(texts.by_length(batch_size))
        outputs: list[dict[str, Tensor]] = []
        for batch in of_rows:
            inputs = {name: value.to(self.model.device) for name, value in _read(texts.batch(batch)).items()}
            mask = inputs["attention_mask"]
            states = self.model.get_encoder()(**inputs).last_hidden_state
            output = self.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=mask,
                **options,
                return_dict_in_generate=True,
                output_logits=bool(temperatures),
            )
            ends = ends_of(self.model, options)
            found = {"tokens": output.sequences[:, 1:], **self._early(states, mask, temperatures)}
            if temperatures:
                found |= {f"score.{name}": values for name, values in late_scores(output, ends).items()}
            found["new_tokens"] = _written_tokens(found["tokens"], ends)
            outputs.append({name: value.cpu() for name, value in found.items()})
            report(sum(len(each["tokens"]) for each in outputs), len(texts))
        columns = _in_order(of_rows, outputs, self.tokenizer.pad_token_id)
        return {**columns, "flops": generate_flops(self.model, texts.lengths, columns["new_tokens"])}

    def _early(self, states: Tensor, mask: Tensor, temperatures: Sequence[float]) -> dict[str, Tensor]:
        scores = {}
        if self.head is not None:
            for temperature in temperatures:
                for name in self.early_scores:
                    router = Router(name, threshold=-math.inf, temperature=temperature).to(states.device)
                    decided = self.head.decide(states, mask, router)
                    scores[f"score.{scored_name(name, temperature, temperatures)}"] = decided.score
        return scores


def _read(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name in ENCODER_INPUTS}


def _written_tokens(tokens: Tensor, ends: int | list[int] | None) -> Tensor:
    """[N] int64: up to the first that ends a sequence, which counts, or all."""
    if ends is None:
        return torch.full((len(tokens),), tokens.shape[1])
    is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device))
    return (is_end.cumsum(dim=1) - is_end.long() == 0).sum(dim=1)


def _in_order(batches: list[NDArray[np.int64]], outputs: list[dict[str, Tensor]], pad: int) -> Columns:
    """The columns of all batches, sequences padded alike, in the order of the rows."""
    order = np.argsort(np.concatenate(batches))
    length = max(each["tokens"].shape[1] for each in outputs)
    for each in outputs:
        missing = length - each["tokens"].shape[1]
        each["tokens"] = torch.nn.functional.pad(each["tokens"], (0, missing), value=pad)
    return {name: torch.cat([each[name] for each in outputs]).numpy()[order] for name in outputs[0]}
