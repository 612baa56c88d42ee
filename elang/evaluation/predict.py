"""What Swift and Super answer on N texts, or pairs of them, as numpy arrays: the input of calibration and tables."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from elang import backbones
from elang.progress import Report, silent
from elang.reference import SCORES
from elang.router import Router

CLASSIFIER_SCORES = tuple(name for name in SCORES if name != "logit")


def label_columns(name: str, model: Any, labels: Sequence[str], source: str) -> list[int]:
    """For each of these labels, which of a sequence classifier's outputs stands for it.

    Names match whatever their case and order. Default names (LABEL_0, ...) are taken in the order of `labels`.

    Raises:
        ValueError: the model's labels are others than those of `source`.
    """
    wanted = [label.casefold() for label in labels]
    got = [str(model.config.id2label[i]).casefold() for i in range(model.config.num_labels)]
    if sorted(got) == sorted(wanted):
        return [got.index(label) for label in wanted]
    if got == [f"label_{i}" for i in range(len(wanted))]:
        return list(range(len(wanted)))
    raise ValueError(f"{name}: got a model with the labels {', '.join(got)}, wanted {', '.join(wanted)} as in {source}")


def longest_input(tokenizer: Any, config: Any) -> int | None:
    """The tokens that tokenizer and model say they take; None if neither does."""
    said = tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)
    known = [length for length in said if length is not None and length < VERY_LARGE_INTEGER]
    return min(known, default=None)


def scored_name(name: str, temperature: float, temperatures: Sequence[float]) -> str:
    """A score at the first of these temperatures is named plainly, at another "NAME@T", as `calibrate` takes them."""
    return name if temperature == temperatures[0] else f"{name}@{temperature:g}"


class Encoded:
    """N tokenised texts, or pairs of them, cut at `max_length` tokens if it is given, and the batches made of them."""

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        max_length: int | None,
        second_texts: Sequence[str] | None = None,
    ) -> None:
        pairs = [list(texts)] if second_texts is None else [list(texts), list(second_texts)]
        self._tokenizer = tokenizer
        self._columns = dict(tokenizer(*pairs, truncation=max_length is not None, max_length=max_length))
        self.lengths = np.array([len(ids) for ids in self._columns["input_ids"]], dtype=np.int64)  # [N]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def ids(self) -> list[list[int]]:
        """The tokens of each text."""
        return list(self._columns["input_ids"])

    @property
    def sha256(self) -> str:
        """Of all that a model is given: tokens, and where the tokenizer makes them the mask and the segments."""
        return hashlib.sha256(json.dumps(self._columns, sort_keys=True).encode()).hexdigest()

    def batch(self, rows: Sequence[int] | NDArray[np.int64], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The models' inputs for these rows, padded to the longest of them."""
        columns = {name: [values[i] for i in rows] for name, values in self._columns.items()}
        return dict(self._tokenizer.pad(columns, return_tensors="pt").to(device))

    def by_length(self, batch_size: int, noise: ArrayLike = 0.0) -> Iterator[NDArray[np.int64]]:
        """All rows, each once, in batches of similar length; `noise` (tokens, one number or [N]) loosens that."""
        order = np.argsort(self.lengths + np.asarray(noise), kind="stable")
        return (order[i : i + batch_size] for i in range(0, len(order), batch_size))


@torch.inference_mode()
def predict(
    model: Any,
    texts: Encoded,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    report: Report = silent,
) -> NDArray[np.float32]:
    """Logits [N, C] of a model on that device, in the order of `texts`."""
    rows = list(texts.by_length(batch_size))
    logits = []
    for batch in rows:
        logits.append(backbones.logits_of(model(**texts.batch(batch, device))).float().cpu().numpy())
        report(sum(map(len, logits)), len(texts))
    return _in_order(rows, logits)


@torch.inference_mode()
def predict_scored(
    swift: Any,
    texts: Encoded,
    *,
    scores: Sequence[str] = CLASSIFIER_SCORES,
    temperatures: Sequence[float] = (1.0,),
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    report: Report = silent,
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """Swift's logits [N, C] and each score [N], from the very op that a `JointClassifier` decides by.

    Scores at the first temperature go by their names, those at another by `scored_name`.
    """
    backbone = backbones.find(swift)
    head = backbone.head
    routers = {
        scored_name(name, t, temperatures): Router(name, threshold=-math.inf, temperature=t).to(device)
        for t in temperatures
        for name in scores
    }
    rows = list(texts.by_length(batch_size))
    logits: list[NDArray[np.float32]] = []
    values: dict[str, list[NDArray[np.float32]]] = {name: [] for name in routers}
    for batch in rows:
        hidden = backbones.logits_of(backbone.run(**texts.batch(batch, device)))
        for name, router in routers.items():
            route = router.from_logits(hidden) if head is None else router(hidden, head.weight, head.bias)
            values[name].append(route.score.cpu().numpy())
        logits.append(route.logits.float().cpu().numpy())
        report(sum(map(len, logits)), len(texts))
    return _in_order(rows, logits), {name: _in_order(rows, parts) for name, parts in values.items()}


def _in_order(rows: list[NDArray[np.int64]], parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    values = np.concatenate(parts)
    ordered = np.empty_like(values)
    ordered[np.concatenate(rows)] = values
    return ordered
