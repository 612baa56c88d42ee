"""Texts, tokenizers of different vocabularies and tiny models, in pipelines: what the pipeline's tests run on."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models
import torch
from test_seq2seq import encoder_decoder, late_by_hand
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from elang.energy_head import EnergyHead
from elang.pipelines import JointPipeline, pipeline
from elang.router import Router

INF = math.inf
COMMON = [f"w{i}" for i in range(20)]
GENERATION = {"greedy": {}, "beam": {"num_beams": 3}}
TOKENS = ("input_ids", "attention_mask")
# Another family and another vocabulary than Swift's.
PAIRS = [("T5", "Bart"), ("Bart", "Marian"), ("Marian", "T5")]
SEEDS = {"T5": (4, 7), "Bart": (23, 24), "Marian": (3, 14)}  # of models that answer one text unlike another


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(COMMON, k=words))


TEXTS = [text(words, seed) for seed, words in enumerate((9, 3, 5, 1, 7, 2))]


def tokenizer(
    own: str, seed: int, size: int = 40, end: bool = True, limit: int | None = None, kind: Any = PreTrainedTokenizerFast
) -> Any:
    """Words of its own beside the common ones, each at another place than elsewhere, and "</s>" behind each text.

    Its own words begin with a space, so that a text may too.
    """
    words = [*COMMON, *(f" {own}{i}" for i in range(size - 3 - len(COMMON)))]
    random.Random(seed).shuffle(words)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return kind(tokenizer_object=backend, model_max_length=limit, **special)


def classifier(*labels: str, seed: int = 0, **config: Any) -> Any:
    model = tiny_models.classifier("Bert", seed, num_labels=len(labels), **config)
    model.config.id2label, model.config.label2id = dict(enumerate(labels)), {y: i for i, y in enumerate(labels)}
    return model


SWIFT_TOKENIZER, SUPER_TOKENIZER, BERT_TOKENIZER = tokenizer("s", 0), tokenizer("S", 1), tokenizer("b", 2, size=64)
T5, T5_SUPER = encoder_decoder("T5", SEEDS["T5"][0]), encoder_decoder("T5", SEEDS["T5"][1], width=24, layers=2)
NO_END = tokenizer("s", 0, end=False)
BERT, BERT_SUPER = classifier("no", "yes", "maybe", seed=2), classifier("-", "+")


def head(outputs: int = 5) -> EnergyHead:
    torch.manual_seed(5)
    return EnergyHead(16, outputs)


def t5_before(super_: Any, threshold: float = 0.0, task: str = "translation", **options: Any) -> JointPipeline:
    gates = {"head": head(), "router": Router(threshold=threshold), "swift": (T5, SWIFT_TOKENIZER)}
    return pipeline(task, **{**gates, "super": super_, **options})


def upper(texts: list[str]) -> list[str]:
    return [t.upper() for t in texts]


def alone(model: Any, own: Any, texts: list[str], rows: list[int] | None = None, **options: Any) -> list[str]:
    """What a model writes, given these rows of a batch of texts."""
    batch = own(texts, padding=True, return_tensors="pt")
    part = {name: batch[name][list(range(len(texts))) if rows is None else rows] for name in TOKENS}
    return own.batch_decode(model.generate(**part, **options), skip_special_tokens=True)


def probabilities(model: Any, own: Any, texts: list[str], rows: list[int] | None = None, **options: Any) -> Any:
    """The geometric mean of the tokens' probabilities of what `alone` returns, by a teacher-forced pass."""
    batch = own(texts, padding=True, return_tensors="pt")
    part = {name: batch[name][list(range(len(texts))) if rows is None else rows] for name in TOKENS}
    each = []
    for i, sequence in enumerate(model.generate(**part, **options)):
        one = {name: values[i : i + 1] for name, values in part.items()}
        each.append(math.exp(late_by_hand(model, one, sequence)["mean_log_prob"]))
    return pytest.approx(each, rel=1e-3)


def energies(p: JointPipeline, texts: list[str] = TEXTS) -> list[float]:
    return [answer["energy"] for answer in p(texts)]


def route(p: JointPipeline, energy: list[float], routed: int) -> list[int]:
    """Moves the threshold so that so many texts of these energies are routed; their places."""
    edges = [-INF, *sorted(energy), INF]
    p.router.set_threshold(sum(edges[routed : routed + 2]) / 2)
    return sorted(sorted(range(len(energy)), key=energy.__getitem__)[:routed])


@contextmanager
def shapes(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """Of the inputs that the model's encoder gets meanwhile."""
    seen: list[tuple[int, ...]] = []
    hook = model.get_encoder().register_forward_hook(
        lambda m, a, k, o: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    hook.remove()
