"""Made-up text, and tiny models with a tokenizer for it, as folders: what the demo's tests run on."""

from __future__ import annotations

from pathlib import Path

import tiny_models
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

GOOD, BAD = ("bright", "moving", "warm", "witty"), ("dull", "flat", "cold", "noisy")
NOUNS = ("story", "film", "cast", "ending", "score", "plot", "scene", "joke", "start", "middle")

TEXTS = [
    " ".join(["a"] * (1 + i % 7) + [word, noun])
    for i, (word, noun) in enumerate((word, noun) for noun in NOUNS for word in (*GOOD, *BAD))
]
LABELS = ["good" if any(word in text for word in GOOD) else "bad" for text in TEXTS]


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "a", *GOOD, *BAD, *NOUNS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def save_model(folder: Path, *, labels: tuple[str, ...] = ("bad", "good"), seed: int = 0, layers: int = 2) -> str:
    model = tiny_models.classifier("Bert", seed=seed, num_labels=len(labels), num_hidden_layers=layers)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {name: i for i, name in enumerate(labels)}
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_csv(path: Path, texts: list[str] = TEXTS, labels: list[str] = LABELS) -> Path:
    path.write_text("text,label\n" + "".join(f"{t},{y}\n" for t, y in zip(texts, labels, strict=True)), "utf-8")
    return path
