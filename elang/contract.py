"""What two models have to share to be one: kind of head, labels, config, output class, a calibration made of them."""

from __future__ import annotations

import copy
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import ModelOutput

from elang.calibration import Calibration, Provenance
from elang.fingerprint import fingerprint
from elang.router import Router

LabelMap = Mapping[str | int, str | int]


def refuse_other_heads(model: Any, argument: str) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise ValueError(
            f"{argument}: a multi-label head, wanted one label per row: scores compare classes that exclude each other"
        )
    if getattr(config, "num_labels", None) == 1 or getattr(config, "problem_type", None) == "regression":
        raise ValueError(
            f"{argument}: a regression head, wanted a classifier of at least two classes: one output has no energy"
        )


def _label_names(model: Any) -> list[str] | None:
    id2label = getattr(getattr(model, "config", None), "id2label", None)
    return None if id2label is None else [id2label[i].casefold() for i in range(len(id2label))]


def swift_columns(swift: Any, super_: Any, label_map: LabelMap | None) -> list[int]:
    """For each of Super's labels, the column of Swift's logits that holds it."""
    swift_names, super_names = _label_names(swift), _label_names(super_)
    if label_map is None:
        if swift_names is None or super_names is None or sorted(swift_names) != sorted(super_names):
            raise ValueError(
                f"label_map: got None, wanted one, as Swift's labels are {swift_names} and Super's are {super_names}"
            )
        label_map = {name: name for name in swift_names}
    columns = {_class_number(b, super_names): _class_number(a, swift_names) for a, b in label_map.items()}
    if sorted(columns) != list(range(len(super_names or label_map))) or (
        sorted(columns.values()) != list(range(len(swift_names or label_map)))
    ):
        raise ValueError(
            f"label_map: got {dict(label_map)}, wanted each of Swift's labels {swift_names or ''} "
            f"paired with one of Super's {super_names or ''}"
        )
    return [columns[label] for label in sorted(columns)]


def _class_number(label: str | int, names: list[str] | None) -> int:
    if isinstance(label, int):
        return label
    if names is None or label.casefold() not in names:
        raise ValueError(f"label_map: got {label!r}, wanted a class number or one of {names}")
    return names.index(label.casefold())


def config_of(swift: Any, super_: Any, columns: list[int]) -> Any:
    """Super's config; Swift's with its labels in the order of the answers if Super has none."""
    config = getattr(super_, "config", None)
    if config is None and _label_names(swift) is not None:
        config = copy.deepcopy(swift.config)
        config.id2label = {label: swift.config.id2label[column] for label, column in enumerate(columns)}
        config.label2id = {name: label for label, name in config.id2label.items()}
    return config


def annotated_output(super_: Any) -> type[ModelOutput]:
    """The output class that Super's `forward` says it returns, for batches that never reach it."""
    try:
        returned = typing.get_type_hints(getattr(super_, "forward", super_)).get("return")
    except Exception:  # a hint that does not resolve says nothing
        returned = None
    for kind in (returned, *typing.get_args(returned)):
        if isinstance(kind, type) and issubclass(kind, ModelOutput):
            return kind
    return SequenceClassifierOutput


def check_eval(*models: tuple[str, Any]) -> None:
    """Raises RuntimeError if a named model is in training mode, where it would answer at random."""
    for name, model in models:
        if getattr(model, "training", False):
            raise RuntimeError(f"{name}: in training mode, wanted eval mode: call .eval() on it or on the joint model")


def router_of(router: Router | Calibration | str | Path, swift: Any, super_: Any) -> Router:
    """The router that a calibration, or its file, chose for these models; a router is taken as it is.

    Raises:
        ValueError: the calibration was made of other weights.
    """
    c = Calibration.load(router) if isinstance(router, str | Path) else router
    if isinstance(c, Router):
        return c
    if not isinstance(c, Calibration):
        raise TypeError(f"router: got {type(c).__name__}, wanted a Router, a Calibration or its file")
    check_weights(c.provenance, swift, super_)
    return Router(c.score, threshold=c.threshold, temperature=c.temperature)


def check_weights(source: Provenance, swift: Any, super_: Any) -> None:
    """Raises ValueError if a calibration knows the weights that it was made of, and a model's are others."""
    for name, model, known in (("swift", swift, source.swift_sha256), ("super_", super_, source.super_sha256)):
        if known is not None and isinstance(model, nn.Module) and fingerprint(model) != known:
            raise ValueError(
                f"{name}: got other weights than the calibration was made with: a threshold is of one pair"
            )
