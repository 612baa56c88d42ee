"""A pair's calibration and what is due to every test text, computed without any service."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from services import names_of, reader, routes_by

from elang import contract
from elang.calibration import InfeasibleTarget, calibrate
from elang.demo.data import Dataset, Rows
from elang.evaluation.predict import Encoded, label_columns, longest_input, predict, predict_scored

MAX_DROP = 0.01
BAND = 1e-4  # where a score is as near to the threshold, or two logits to each other, padding may decide

Bools = NDArray[np.bool_]


class Offline:
    """By Super's classes; `due` and `unsettled` [N] by the name of a service.

    The threshold is the one of `elang demo`: proven to lose at most a point, or else of the best accuracy.
    """

    def __init__(self, dataset: Dataset, swift: str, super_: str) -> None:
        self._swift, self._super = reader("swift", swift), reader("super", super_)
        self._columns = contract.swift_columns(self._swift.model, self._super.model, None)
        self.names = names_of(self._super)
        self._classes = np.array(label_columns("super", self._super.model, dataset.label_names, "the data"))

        swift_logits, super_logits, scores, labels = self._answers(dataset.calibration)
        correct = [logits.argmax(axis=1) == labels for logits in (swift_logits, super_logits)]
        try:
            self.calibration = calibrate(scores, *correct, max_drop=MAX_DROP)
        except InfeasibleTarget:
            self.calibration = calibrate(scores, *correct)

        swift_logits, super_logits, scores, self.labels = self._answers(dataset.test)
        score, threshold = scores[self.calibration.score], routes_by(self.calibration).threshold.item()
        routed = ~(score >= threshold)
        cascade = np.where(routed[:, None], super_logits, swift_logits)
        self.share_routed = float(routed.mean())
        self.due = {"super": super_logits.argmax(axis=1), **dict.fromkeys(("elang", "naive"), cascade.argmax(axis=1))}
        at_threshold = np.abs(score - threshold) < BAND
        self.unsettled = {
            "super": _close(super_logits),
            **dict.fromkeys(("elang", "naive"), _close(cascade) | at_threshold),
        }

    def differ(self, service: str, rows: NDArray[np.int64], labels: Sequence[str]) -> Bools:
        """Whether an answer to a row is another than the one that is due; an unsettled one does not."""
        said = np.array([self.names.index(label) for label in labels], dtype=np.int64)
        different: Bools = (said != self.due[service][rows]) & ~self.unsettled[service][rows]
        return different

    def accuracy(self, service: str) -> float:
        """On all test texts."""
        return float((self.due[service] == self.labels).mean())

    def _answers(
        self, part: Rows
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[str, NDArray[np.float32]], NDArray[np.int64]]:
        """Logits of both in Super's classes [N, C], Swift's scores [N], and labels [N]."""
        first, second = (
            Encoded(each.tokenizer, part.texts, longest_input(each.tokenizer, each.model.config))
            for each in (self._swift, self._super)
        )
        logits, scores = predict_scored(self._swift.model, first)
        labels: NDArray[np.int64] = self._classes[part.labels]
        return logits[:, self._columns], predict(self._super.model, second), scores, labels


def _close(logits: NDArray[np.float32]) -> Bools:
    """[N]: whether the two largest are."""
    second, first = np.sort(logits, axis=1)[:, -2:].T
    close: Bools = first - second < BAND
    return close
