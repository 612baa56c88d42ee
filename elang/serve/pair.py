"""The two models of a batcher: rows in, and what each says of them on the host."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from elang.joint import JointClassifier
from elang.reference import Route
from elang.serve.requests import Guess, R, Verdict

Read = TypeVar("Read", contravariant=True)
HOST = torch.device("cpu")

_log = logging.getLogger(__name__)


class Rows(Protocol[Read]):
    """How a model's inputs are made of rows: of texts by `elang.serve.TextRows`, say."""

    def check(self, rows: Sequence[Read]) -> None:
        """Raises ValueError or TypeError, in `submit`, for rows that inputs cannot be made of."""

    def __call__(self, rows: Sequence[Read]) -> Mapping[str, Any]:
        """The inputs [K, M] of K rows, padded to the longest, on the model's device."""


class Pair(Generic[R]):
    """Swift with its router, and Super, of a joint model; each is called from one thread."""

    def __init__(
        self,
        joint: JointClassifier,
        rows: Rows[R],
        super_rows: Rows[R] | None,
        on_route: Callable[[Route], None] | None,
    ) -> None:
        if not isinstance(joint, JointClassifier):
            raise TypeError(f"joint: got {type(joint).__name__}, wanted a JointClassifier")
        if joint.dispatch not in ("exact", "auto"):
            raise ValueError(f"joint: got dispatch={joint.dispatch!r}, wanted 'exact': a batcher forms Super's batches")
        if joint.plan.super_inputs is not None:
            raise ValueError("joint: got one with super_inputs, wanted super_rows: Super's batch is no part of Swift's")
        self.joint = joint
        self.labels = _labels(joint)
        self._rows = rows
        self._super_rows = rows if super_rows is None else super_rows
        self._on_route = on_route
        # Whose error it is, is found row by row here.
        self._super = replace(joint.plan.super_, on_error="raise")

    def check(self, rows: Sequence[R]) -> None:
        """Raises ValueError or TypeError for rows that one of the models cannot be given."""
        self._rows.check(rows)
        if self._super_rows is not self._rows:
            self._super_rows.check(rows)

    def decide(self, rows: Sequence[R]) -> list[Verdict]:
        """Swift's and the router's. Synchronizes: once."""
        self.joint.check_eval()
        route = self.joint.decide(dict(self._rows(rows)))
        wanted = [len(rows), len(self.labels)]
        if list(route.logits.shape) != wanted:
            raise ValueError(f"swift: got logits {list(route.logits.shape)}, wanted {wanted}")
        if self._on_route is not None:
            try:
                self._on_route(route)
            except Exception:  # whoever counts is not to stop who answers
                _log.exception("on_route failed")
        # One tensor, for the host to wait once; as float32, which holds row numbers up to 2^24 exactly.
        parts = route.score, route.order, route.n_routed, _probabilities(route.logits).flatten()
        values = iter(torch.cat(parts).tolist())
        score, order = list(islice(values, len(rows))), list(islice(values, len(rows)))
        routed = set(order[: int(next(values))])
        return [
            Verdict(score[row], row in routed, _guess(islice(values, len(self.labels)))) for row in range(len(rows))
        ]

    def ask_super(self, rows: Sequence[R]) -> list[Guess | None]:
        """Super's answers; None to a row whose logits are no numbers."""
        reply = self._super(self._super_rows(rows), len(rows), len(self.labels), HOST)
        assert reply.logits is not None, "whose errors are raised"
        return [_guess(row) for row in _probabilities(reply.logits).tolist()]

    def super_stream(self) -> AbstractContextManager[Any]:
        """For Super's thread: on a GPU a stream beside Swift's, behind what has been queued so far; else nothing."""
        model = self.joint.super_
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        if parameter is None or not parameter.is_cuda:
            return nullcontext()
        stream = torch.cuda.Stream(parameter.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.default_stream(parameter.device))
        return torch.cuda.stream(stream)


def _labels(joint: JointClassifier) -> tuple[str, ...]:
    """Super's, by their class numbers; where neither model has names, as Hugging Face calls them."""
    if joint.config is not None:
        return tuple(str(joint.config.id2label[i]) for i in range(len(joint.config.id2label)))
    assert joint.label_map is not None, "wanted by the joint model where there are no names"
    return tuple(f"LABEL_{i}" for i in range(len(joint.label_map)))


def _probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1, dtype=torch.float32)


def _guess(values: Iterable[float]) -> Guess | None:
    probabilities = tuple(values)
    # Where a logit is NaN or infinite, softmax makes all of them NaN.
    if math.isnan(probabilities[0]):
        return None
    return Guess(probabilities.index(max(probabilities)), probabilities)
