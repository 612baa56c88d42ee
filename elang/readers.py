"""The sides of a pipeline: models behind their own tokenizers, and functions; text in, answers out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from elang.backbones import Backbone, logits_of
from elang.contract import check_eval, refuse_other_heads
from elang.evaluation.predict import longest_input
from elang.gated import ENCODER_INPUTS, GatedSwift
from elang.late import ends_of, late_scores
from elang.router import Router

CLASSIFICATION = "text-classification"
TASKS = {  # and the key of each one's answers
    "translation": "translation_text",
    "summarization": "summary_text",
    "text2text-generation": "generated_text",
    CLASSIFICATION: "label",
}

Source = str | Path | tuple[Any, Any]  # folder or hub id; model and tokenizer
Function = Callable[[list[str]], list[str]]
Texts = Mapping[int, str]  # by their places in the input
# What `generate` can return beside sequences.
_OUTPUTS = ("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits")

_log = logging.getLogger(__name__)
# A fast tokenizer keeps it as a state of its own whether it truncates, and may fail while another thread changes that.
_tokenizing = threading.Lock()


class Answer(NamedTuple):
    text: str
    score: float | None
    model: str | None = None  # which, of several behind one reader


class Decision(NamedTuple):
    energy: dict[int, float]  # of every text
    kept: dict[int, Answer]  # Swift's, to those it keeps


@dataclass(frozen=True)
class Reader:
    """A model behind its own tokenizer."""

    role: str  # "swift" or "super"
    model: Any
    tokenizer: Any

    def inputs(self, texts: Texts) -> dict[str, Tensor]:
        """[K, M] of these texts, padded to the longest, or to one column, on the model's device."""
        check_eval((self.role, self.model))
        limit = longest_input(self.tokenizer, self.model.config)
        with _tokenizing:
            columns = self.tokenizer(list(texts.values()), verbose=False)
            lengths = dict(zip(texts, map(len, columns["input_ids"]), strict=True))
            too_long = [place for place in texts if limit is not None and lengths[place] > limit]
            if too_long:
                columns = self.tokenizer(list(texts.values()), truncation=True, max_length=limit)
        for place in too_long:
            _log.warning("%s: text %d has %d tokens, cut to %d", self.role, place, lengths[place], limit)
        padding: dict[str, Any] = {} if any(lengths.values()) else {"padding": "max_length", "max_length": 1}
        padded = self.tokenizer.pad(columns, return_attention_mask=True, return_tensors="pt", **padding)
        return dict(padded.to(next(self.model.parameters()).device))


@dataclass(frozen=True)
class Classifier(Reader):
    @torch.no_grad()
    def answer(self, texts: Texts) -> list[Answer]:
        return self.labels(logits_of(self.model(**self.inputs(texts))))

    def labels(self, logits: Tensor) -> list[Answer]:  # [K, C]
        score, label = logits.float().softmax(dim=-1).max(dim=-1)
        names = self.model.config.id2label
        return [Answer(names[i], p) for i, p in zip(label.tolist(), score.tolist(), strict=True)]


@dataclass(frozen=True)
class Generator(Reader):
    options: dict[str, Any]
    strip: bool  # what it writes, to a label

    @torch.no_grad()
    def answer(self, texts: Texts) -> list[Answer]:
        options = {**self.options, "return_dict_in_generate": True, "output_logits": True}
        output = self.model.generate(**self.inputs(texts), **options)
        score = late_scores(output, ends_of(self.model, self.options))["mean_log_prob"].exp()
        return list(map(Answer, self.written(output.sequences), score.tolist()))

    def inputs(self, texts: Texts) -> dict[str, Tensor]:
        return {name: value for name, value in super().inputs(texts).items() if name in ENCODER_INPUTS}

    def written(self, sequences: Tensor) -> list[str]:  # [K, L]
        with _tokenizing:
            texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return [text.strip() for text in texts] if self.strip else texts


@dataclass(frozen=True)
class FunctionSuper:
    function: Function

    def answer(self, texts: Texts) -> list[Answer]:
        answers = self.function(list(texts.values()))
        if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
            raise TypeError(f"super: got {answers!r:.80} of the function, wanted a list of str")
        if len(answers) != len(texts):
            raise ValueError(
                f"super: got {len(answers)} answers of the function, wanted {len(texts)}, one for each text"
            )
        return [Answer(answer, None) for answer in answers]


@dataclass(frozen=True)
class RoutedClassifier:
    reader: Classifier
    backbone: Backbone
    router: Router

    @torch.no_grad()
    def decide(self, texts: Texts) -> Decision:
        hidden, head = logits_of(self.backbone.run(**self.reader.inputs(texts))), self.backbone.head
        route = self.router.from_logits(hidden) if head is None else self.router(hidden, head.weight, head.bias)
        kept = route.order[int(route.n_routed) :]
        return _decision(texts, route.score, kept, self.reader.labels(route.logits[kept]))


@dataclass(frozen=True)
class GatedGenerator:
    reader: Generator
    gated: GatedSwift

    @torch.no_grad()
    def decide(self, texts: Texts) -> Decision:
        gated = self.gated.generate(self.reader.inputs(texts), **self.reader.options)
        kept, answers = gated.routing.order[gated.n_routed :], list[Answer]()
        if gated.kept is not None and gated.late is not None:
            answers = list(
                map(Answer, self.reader.written(gated.kept[:, 0]), gated.late["mean_log_prob"].exp().tolist())
            )
        return _decision(texts, gated.routing.score, kept, answers)


def _decision(texts: Texts, score: Tensor, kept: Tensor, answers: list[Answer]) -> Decision:
    """From the scores [N] of these texts, and Swift's answers to the rows kept [K]."""
    places = list(texts)
    energy = dict(zip(places, score.tolist(), strict=True))
    return Decision(energy, {places[row]: answer for row, answer in zip(kept.tolist(), answers, strict=True)})


def reader_of(
    role: str, source: Any, task: str, device: torch.device | str | None, options: dict[str, Any]
) -> Classifier | Generator:
    wanted = "an encoder-decoder" + " or a sequence classifier" * (task == CLASSIFICATION)
    if isinstance(source, str | Path):
        config = AutoConfig.from_pretrained(source)
        classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
        generates = config.is_encoder_decoder and not (classifies and task == CLASSIFICATION)
        if not generates and task != CLASSIFICATION:
            raise ValueError(f"{role}: got {source}, of the type {config.model_type}, wanted {wanted}")
        auto: Any = AutoModelForSeq2SeqLM if generates else AutoModelForSequenceClassification
        model, tokenizer = auto.from_pretrained(source, use_safetensors=True), AutoTokenizer.from_pretrained(source)
        model = model.eval() if device is None else model.eval().to(device)
    elif isinstance(source, tuple) and len(source) == 2 and all(map(hasattr, source, ("config", "pad_token_id"))):
        model, tokenizer = source
    else:
        got = ", ".join(type(part).__name__ for part in (source if isinstance(source, tuple) else (source,)))
        raise TypeError(
            f"{role}: got {got}, wanted a folder or hub id, a pair (model, tokenizer) or, as super, a function or "
            "a pipeline"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{role}: got a tokenizer without a padding token, wanted one with it")
    generates = hasattr(model, "generate")
    if not (model.config.is_encoder_decoder if generates else task == CLASSIFICATION):
        raise ValueError(f"{role}: got {type(model).__name__}, wanted {wanted}")
    if not generates:
        refuse_other_heads(model, role)
        return Classifier(role, model, tokenizer)
    given = options.get("generation_config")
    settings = model.generation_config.to_diff_dict() | (given.to_diff_dict() if given else {}) | options
    if asked := [name for name in _OUTPUTS if settings.get(name)]:
        raise ValueError(f"{', '.join(asked)}: got for {role}, wanted none: only text is merged")
    if (several := settings.get("num_return_sequences") or 1) != 1:
        raise ValueError(f"num_return_sequences: got {several} for {role}, wanted 1: a text has one answer")
    return Generator(role, model, tokenizer, options, strip=task == CLASSIFICATION)
