"""The services that a load is put on: a batcher's, and as people write them Super alone and the naive cascade."""

# Annotations are evaluated as they stand: FastAPI could not resolve the name of a local class.
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from fastapi import FastAPI
from pydantic import BaseModel

from elang import Router, contract
from elang.backbones import logits_of
from elang.calibration import Calibration
from elang.readers import CLASSIFICATION, Classifier, reader_of
from elang.reference import score_logits
from elang.serve import text_batcher
from elang.serve.app import create_app


class Models(NamedTuple):
    """What a service loads: two folders or hub ids, and the calibration's file."""

    swift: str
    super_: str
    calibration: str


class Asked(BaseModel):
    text: str


class Said(BaseModel):
    label: str
    probabilities: dict[str, float]


def reader(role: str, source: str) -> Classifier:
    found = reader_of(role, source, CLASSIFICATION, None, {})
    if not isinstance(found, Classifier):
        raise ValueError(f"{role}: got {source}, wanted a sequence classifier")
    return found


def routes_by(calibration: Calibration) -> Router:
    return Router(calibration.score, threshold=calibration.threshold, temperature=calibration.temperature)


def batched(models: Models) -> FastAPI:
    """As `elang serve` makes it."""
    return create_app(text_batcher(swift=models.swift, super=models.super_, router=models.calibration))


def super_alone(models: Models) -> FastAPI:
    super_ = reader("super", models.super_)
    return plain(lambda text: logits_of(super_.model(**super_.inputs({0: text})))[0], names_of(super_))


def naive_cascade(models: Models) -> FastAPI:
    swift, super_ = reader("swift", models.swift), reader("super", models.super_)
    router = routes_by(Calibration.load(models.calibration))
    columns = contract.swift_columns(swift.model, super_.model, None)

    def answer(text: str) -> torch.Tensor:
        logits = logits_of(swift.model(**swift.inputs({0: text})))
        score = score_logits(logits, router.score, router.temperature)
        if score.item() >= router.threshold.item():
            return logits[0, columns]
        return logits_of(super_.model(**super_.inputs({0: text})))[0]

    return plain(answer, names_of(super_))


def names_of(model: Classifier) -> list[str]:
    names = model.model.config.id2label
    return [names[label] for label in range(len(names))]


def plain(answer: Callable[[str], torch.Tensor], names: list[str]) -> FastAPI:
    """A request runs on a thread of FastAPI's pool, and has the models to itself."""
    app, lock = FastAPI(), threading.Lock()
    answer = torch.inference_mode()(answer)
    answer("warm-up")

    @app.post("/classify")
    def classify(asked: Asked) -> Said:
        with lock:
            probabilities = answer(asked.text).softmax(dim=-1).tolist()
        return Said(
            label=names[probabilities.index(max(probabilities))],
            probabilities=dict(zip(names, probabilities, strict=True)),
        )

    @app.get("/readyz")
    def readyz() -> dict[str, str]:
        return {"status": "ready"}

    return app


SERVICES: dict[str, Callable[[Models], FastAPI]] = {"elang": batched, "super": super_alone, "naive": naive_cascade}
