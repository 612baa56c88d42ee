"""Models that tell by logits: one for each class, or one for each text that they choose among."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elang import backbones, contract
from elang.evaluation.flops import row_flops
from elang.evaluation.metrics import Values
from elang.evaluation.predict import CLASSIFIER_SCORES, Encoded, label_columns, predict, predict_scored, scored_name
from elang.evaluation.records import stsb_score
from elang.evaluation.rows import Rows
from elang.evaluation.task_model import Columns, TaskModel
from elang.joint import JointClassifier
from elang.progress import Report, silent
from elang.router import Router

PLACEHOLDER = "@placeholder"  # in ReCoRD's queries


class Classifier(TaskModel):
    """A sequence classifier. Of STS-B a Super may have one output, the similarity; Swift has its classes."""

    scores = CLASSIFIER_SCORES

    @property
    def op(self) -> str:
        return "route_logits" if backbones.find(self.model).head is None else "route"

    def check(self) -> None:
        if self.task.kind not in ("classification", "regression"):
            raise ValueError(
                f"{self.role}: got a sequence classifier for {self.task.name}, wanted "
                + ("an encoder-decoder" if self.task.kind == "generation" else "one that chooses or an encoder-decoder")
            )
        if self._columns is None and self.role == "swift":
            raise ValueError(
                f"swift: got one output for {self.task.name}, wanted {len(self.task.labels)} classes or an "
                "encoder-decoder: one output has no energy"
            )

    @cached_property
    def _columns(self) -> list[int] | None:
        """The output of each of the task's labels; None: the one output is the similarity."""
        if self.task.kind == "regression" and self.model.config.num_labels == 1:
            return None
        contract.refuse_other_heads(self.model, self.role)
        return label_columns(self.role, self.model, self.task.labels, self.task.name)

    def encode(self, rows: Rows) -> Encoded:
        return self._encoded(*zip(*rows.texts, strict=True))

    def answer(self, rows: Rows, texts: Encoded, batch_size: int = 32, report: Report = silent) -> Columns:
        logits = predict(self.model, texts, batch_size=batch_size, device=self.model.device, report=report)
        return {"logits": logits, "flops": row_flops(self.model, texts.lengths)}

    def answer_scored(
        self,
        rows: Rows,
        texts: Encoded,
        temperatures: Sequence[float] = (1.0,),
        batch_size: int = 32,
        report: Report = silent,
    ) -> Columns:
        logits, scores = predict_scored(
            self.model,
            texts,
            temperatures=temperatures,
            batch_size=batch_size,
            device=self.model.device,
            report=report,
        )
        return {
            "logits": logits,
            "flops": row_flops(self.model, texts.lengths),
            **{f"score.{name}": values for name, values in scores.items()},
        }

    def values(self, rows: Rows, columns: Columns) -> Values:
        if self._columns is None:
            return columns["logits"][:, 0].astype(np.float64)
        labels: Values = columns["logits"][:, self._columns].argmax(axis=1)
        if self.task.kind == "regression":
            return np.array([stsb_score(int(label)) for label in labels])
        return labels

    def joined(self, super_: TaskModel, score: str, threshold: float, temperature: float) -> Any:
        if not isinstance(super_, Classifier) or super_._columns is None or self._columns is None:
            raise ValueError("time: got a classifier before another kind of model, wanted two alike")
        router = Router(score, threshold=threshold, temperature=temperature)
        label_map: dict[str | int, str | int] = dict(zip(self._columns, super_._columns, strict=True))
        return JointClassifier(self.model, super_.model, router, label_map=label_map)


class Chooser(TaskModel):
    """A model with a head for multiple choice: one logit for each text that may be the answer.

    Each candidate of a row is read behind the row's text; in ReCoRD's query it takes the placeholder's place.
    """

    scores = CLASSIFIER_SCORES
    op = "route_logits"

    def check(self) -> None:
        if self.task.kind not in ("multiple_choice", "span"):
            raise ValueError(f"{self.role}: got a model for multiple choice for {self.task.name}, wanted another")

    def encode(self, rows: Rows) -> Encoded:
        """[sum of the rows' candidates]: those of the first row, then of the second, and so on."""
        pairs = [
            (texts[0], texts[1].replace(PLACEHOLDER, candidate) if len(texts) > 1 else candidate)
            for texts, candidates in zip(rows.texts, rows.candidates, strict=True)
            for candidate in candidates
        ]
        return self._encoded(*zip(*pairs, strict=True))

    def answer(self, rows: Rows, texts: Encoded, batch_size: int = 32, report: Report = silent) -> Columns:
        def one_choice(**inputs: Tensor) -> Any:
            return self.model(**{name: value.unsqueeze(1) for name, value in inputs.items()})

        each = predict(one_choice, texts, batch_size=batch_size, device=self.model.device, report=report)
        logits = np.full((len(rows), max(map(len, rows.candidates))), -np.inf, dtype=np.float32)
        logits[self._places(rows)] = each[:, 0]
        flops = np.zeros(logits.shape, dtype=np.int64)
        flops[self._places(rows)] = row_flops(self.model, texts.lengths, choices=True)
        return {"logits": logits, "flops": flops.sum(axis=1)}

    def answer_scored(
        self,
        rows: Rows,
        texts: Encoded,
        temperatures: Sequence[float] = (1.0,),
        batch_size: int = 32,
        report: Report = silent,
    ) -> Columns:
        columns, scores = self.answer(rows, texts, batch_size, report), {}
        for temperature in temperatures:
            for name in self.scores:
                router = Router(name, threshold=-np.inf, temperature=temperature)
                values = router.from_logits(torch.from_numpy(columns["logits"])).score.numpy()
                scores[f"score.{scored_name(name, temperature, temperatures)}"] = values
        return {**columns, **scores}

    def values(self, rows: Rows, columns: Columns) -> Values:
        chosen: Values = columns["logits"].argmax(axis=1)
        if self.task.kind == "span":
            return np.array([of[i] for of, i in zip(rows.candidates, chosen, strict=True)], dtype=object)
        return chosen

    def joined(self, super_: TaskModel, score: str, threshold: float, temperature: float) -> Any:
        raise ValueError("time: got models for multiple choice, wanted classifiers or encoder-decoders")

    @staticmethod
    def _places(rows: Rows) -> tuple[list[int], list[int]]:
        places = [(row, i) for row, of in enumerate(rows.candidates) for i in range(len(of))]
        return [row for row, _ in places], [i for _, i in places]
