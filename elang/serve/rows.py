"""What a batcher's rows may be: texts, or what a tokenizer made of texts and pairs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elang.calibration import Calibration
from elang.contract import LabelMap
from elang.evaluation.predict import longest_input
from elang.joint import JointClassifier
from elang.readers import CLASSIFICATION, Classifier, Reader, Source, reader_of
from elang.router import Router
from elang.serve.batcher import Batcher
from elang.super_model import OnError


@dataclass(frozen=True)
class TextRows:
    """Texts, tokenised where the model runs. What is too long is cut as its tokenizer cuts, and a warning logged."""

    reader: Reader

    def check(self, rows: Sequence[str]) -> None:
        for index, text in enumerate(rows):
            if not isinstance(text, str):
                raise TypeError(f"rows[{index}]: got {type(text).__name__}, wanted a str")
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"rows[{index}]: got half of a surrogate pair at {error.start}, wanted text that is Unicode"
                    ) from None

    def __call__(self, rows: Sequence[str]) -> Mapping[str, Tensor]:
        return self.reader.inputs(dict(enumerate(rows)))


class EncodedRows:
    """What a tokenizer returned for each text or pair of texts: lists of the same length under its `model_input_names`.

    Args:
        tokenizer: pads them.
        model: sets their device and longest length.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer = tokenizer
        self._names = set(tokenizer.model_input_names)
        self._tokens = len(tokenizer)
        self._longest = longest_input(tokenizer, model.config)
        self._model = model

    def check(self, rows: Sequence[Mapping[str, list[int]]]) -> None:
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping) or set(row) != self._names:
                got = sorted(row) if isinstance(row, Mapping) else type(row).__name__
                raise TypeError(f"rows[{index}]: got {got}, wanted a mapping of {sorted(self._names)}")
            lengths = {name: len(values) for name, values in row.items()}
            tokens = lengths["input_ids"]
            if set(lengths.values()) != {tokens} or not 0 < tokens <= (self._longest or tokens):
                wanted = "one length" if self._longest is None else f"one length up to {self._longest}"
                raise ValueError(f"rows[{index}]: got lengths {lengths}, wanted {wanted}")
            # On a GPU such a token would end the process's use of the device, for all requests.
            low, high = min(row["input_ids"]), max(row["input_ids"])
            if not 0 <= low <= high < self._tokens:
                raise ValueError(f"rows[{index}]: got tokens from {low} to {high}, wanted them in [0, {self._tokens})")

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> Mapping[str, Tensor]:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        padded = self._tokenizer.pad(columns, return_tensors="pt")
        return dict(padded.to(next(self._model.parameters()).device))


def text_batcher(
    *,
    swift: Source,
    super: Source,
    router: Router | Calibration | str | Path,
    label_map: LabelMap | None = None,
    device: torch.device | str | None = None,
    super_device: torch.device | str | None = None,
    on_super_error: OnError = "raise",
    super_timeout: float | None = None,
    **options: Any,
) -> Batcher[str]:
    """A `Batcher` of texts for two sequence classifiers, each behind its own tokenizer.

    Args:
        swift, super: a folder or hub id, of which safetensors are read; or a pair (model, tokenizer).
        router, label_map, on_super_error, super_timeout: as of `JointClassifier`.
        device: where a Swift that is loaded by name goes, and such a Super too; None: they are not moved.
        super_device: where a Super that is loaded by name goes instead.
        options: of `Batcher`.

    Raises:
        ValueError, TypeError: an argument that is not as described, by its name.
    """
    first = reader_of("swift", swift, CLASSIFICATION, device, {})
    second = reader_of("super", super, CLASSIFICATION, super_device or device, {})
    for reader in (first, second):
        if not isinstance(reader, Classifier):
            raise ValueError(f"{reader.role}: got {type(reader.model).__name__}, wanted a sequence classifier")
    joint = JointClassifier(
        first.model,
        second.model,
        router,
        label_map=label_map,
        on_super_error=on_super_error,
        super_timeout=super_timeout,
    )
    return Batcher(joint, TextRows(first), TextRows(second), **options)
