"""A pair on Ray Serve: Swift and Super as two deployments, or both in each replica (extra `serve-ray`).

`serve run elang.serve.ray_app:app swift=FOLDER super=FOLDER calibration=FILE`, or a config file with such `args`.
Replicas, autoscaling, GPUs, health checks and queues are Ray's own settings of the deployments `Swift` and `Super`.
"""

# Annotations are evaluated as they stand: FastAPI reads those of the routes, Ray those of `app`.
import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from typing_extensions import Self

from elang.calibration import Calibration
from elang.contract import router_of
from elang.joint import JointClassifier
from elang.prometheus import BUCKETS
from elang.readers import CLASSIFICATION, Classifier, reader_of
from elang.router import Router
from elang.serve.batcher import Batcher
from elang.serve.pair import HOST, Pair
from elang.serve.requests import Answer, Busy, Closed, Guess, Verdict
from elang.serve.rows import TextRows, text_batcher
from elang.serve.schemas import REFUSALS, Answers, BodyLimit, Limits, NewThreshold, classified, no_request, texts_model
from elang.super_model import OnError, SuperModel

try:
    from fastapi import FastAPI, HTTPException
    from fastapi.exceptions import RequestValidationError
    from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
    from ray import serve
    from ray.serve import metrics
    from ray.serve.exceptions import BackPressureError
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise ImportError("elang.serve.ray_app needs Ray Serve: pip install 'elang[serve-ray]'") from error

_log = logging.getLogger(__name__)
WARM_UP = "warm-up"


class Settings(BaseModel):
    """Of `app`. Folders are read where the replicas run, the calibration where the application is built."""

    model_config = ConfigDict(extra="forbid")

    swift: str  # folder or hub id
    super: str
    calibration: str | None = None  # file
    score: str | None = None  # in place of a calibration, with a threshold; None: "energy"
    threshold: float | None = None
    label_map: dict[str | int, str | int] | None = None  # as of `JointClassifier`
    together: bool = False  # both models in each replica, and no call between replicas
    device: str | None = None
    super_device: str | None = None
    max_batch: PositiveInt = 32
    super_batch: PositiveInt = 32
    super_wait: NonNegativeFloat = 2e-3  # seconds
    # Seconds of a call of Super; where it is apart, of a row's whole way there and back, so that a Super that is gone
    # counts as one that hangs.
    super_timeout: PositiveFloat | None = None
    on_super_error: OnError = "swift"
    deadline: PositiveFloat | None = None  # seconds, of requests that name none

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if (self.calibration is None) == (self.threshold is None) or (self.calibration and self.score):
            raise ValueError("wanted either calibration, or threshold with or without score")
        return self


@dataclass(frozen=True)
class RemoteSuper:
    """What a joint model has to know of a Super elsewhere."""

    config: Any

    def __call__(self, **inputs: Any) -> Any:
        raise RuntimeError("called here, though its rows go to the deployment `Super`")


class Apart:
    """Answers as a `Batcher` does: by Swift here, and by the deployment `Super`, where rows of all replicas meet."""

    alive = True  # a Swift that hangs keeps the health check from running

    def __init__(
        self, settings: Settings, router: Router | Calibration, super_: "DeploymentHandle[Any]", super_config: Any
    ) -> None:
        reader = _classifier("swift", settings.swift, settings.device)
        joint = JointClassifier(reader.model, RemoteSuper(super_config), router, label_map=settings.label_map)
        self.router = joint.router
        self._settings, self._super = settings, super_
        self._pair = Pair(joint, TextRows(reader), None, None)
        self.labels = self._pair.labels
        self._decide.set_max_batch_size(settings.max_batch)  # type: ignore[attr-defined]

    async def answer(self, texts: Sequence[str], deadline: float | None = None) -> list[Answer]:
        """A request of which a text fails fails as a whole; a task that is cancelled takes its texts along."""
        end = None if deadline is None else time.monotonic() + deadline
        asked = [asyncio.ensure_future(self._answer(text, end)) for text in texts]
        try:
            return await asyncio.gather(*asked)
        finally:
            for task in asked:
                task.cancel()

    async def _answer(self, text: str, end: float | None) -> Answer:
        verdict = await self._decide(text)
        if isinstance(verdict, Exception):
            raise verdict
        guess, degraded = verdict.guess, False
        if verdict.routed:
            try:
                # Without an answer of Swift's, there is none to give at the deadline.
                guess = await self._ask_super(text, None if guess is None else end)
            except Exception as error:
                late = end is not None and time.monotonic() >= end
                if guess is None or not (late or self._settings.on_super_error == "swift"):
                    raise
                _log.warning("Super did not answer: %s", _name(error))
                degraded = True
        assert guess is not None, "the router keeps no row whose logits are no numbers"
        model: Literal["swift", "super"] = "super" if verdict.routed and not degraded else "swift"
        return Answer(self.labels[guess.label], model, degraded, verdict.score, guess.probabilities)

    async def _ask_super(self, text: str, end: float | None) -> Guess:
        limits = self._settings.super_timeout, None if end is None else max(0.0, end - time.monotonic())
        response = self._super.answer.remote(text)
        try:
            guess: Guess | None = await asyncio.wait_for(
                response, min((x for x in limits if x is not None), default=None)
            )
        except (asyncio.TimeoutError, asyncio.CancelledError):
            response.cancel()  # type: ignore[no-untyped-call]
            raise
        if guess is None:
            raise ValueError("super: got logits that are no numbers")
        return guess

    @serve.batch(batch_wait_timeout_s=0)
    async def _decide(self, texts: list[str]) -> list[Verdict | Exception]:
        # Here on the event loop, though it blocks it: what arrives meanwhile is the next batch. Beside a model in
        # another thread, Ray would make a batch of each row that arrives.
        return self._verdicts(texts)

    @torch.no_grad()
    def _verdicts(self, texts: list[str]) -> list[Verdict | Exception]:
        try:
            return list(self._pair.decide(texts))
        except Exception as error:
            if len(texts) == 1:
                return [error]
        # Each by itself, so that a bad text fails its own request alone.
        return [self._verdicts([text])[0] for text in texts]


@serve.deployment(max_ongoing_requests=1024, max_queued_requests=4096)
class Super:
    """Batches of rows from all replicas of `Swift`."""

    def __init__(self, settings: Settings, router: Router | Calibration) -> None:
        reader = _classifier("super", settings.super, settings.super_device or settings.device)
        router_of(router, None, reader.model)  # refuses weights that the calibration was not made with
        self._rows = TextRows(reader)
        self._model = SuperModel(reader.model, timeout=settings.super_timeout)
        self._config = reader.model.config
        self._batches = metrics.Counter("elang_super_bucket", "Batches of Super by their rows", tag_keys=("size",))
        self.answer.set_max_batch_size(settings.super_batch)  # type: ignore[attr-defined]
        self.answer.set_batch_wait_timeout_s(settings.super_wait)  # type: ignore[attr-defined]

    async def config(self) -> Any:
        """Of its model."""
        return self._config

    @serve.batch
    async def answer(self, texts: list[str]) -> list[Guess | None]:
        """None to a text whose logits are no numbers."""
        # On the event loop, as Swift is.
        self._batches.inc(tags={"size": str(len(texts))})
        return self._guesses(texts)

    @torch.no_grad()
    def _guesses(self, texts: list[str]) -> list[Guess | None]:
        reply = self._model(self._rows(texts), len(texts), len(self._config.id2label), HOST)
        assert reply.logits is not None, "whose errors are raised"
        rows = map(tuple, reply.logits.softmax(dim=-1, dtype=torch.float32).tolist())
        return [None if math.isnan(row[0]) else Guess(row.index(max(row)), row) for row in rows]

    async def check_health(self) -> None:
        """Runs where the model does: one that hangs keeps it from running, and Ray replaces the replica."""
        if late := self._model.late.count():
            raise RuntimeError(f"{late} calls of Super that timed out still run")


def _together(settings: Settings, router: Router | Calibration) -> Batcher[str]:
    others = {"calibration", "score", "threshold", "together", "deadline"}
    return text_batcher(router=router, **settings.model_dump(exclude=others))


def _classifier(role: str, source: str, device: str | None) -> Classifier:
    reader = reader_of(role, source, CLASSIFICATION, device, {})
    if not isinstance(reader, Classifier):
        raise ValueError(f"{role}: got {type(reader.model).__name__}, wanted a sequence classifier")
    return reader


def _name(error: Exception) -> str:
    """Of what was raised in another process, rather than of what Ray wraps it in."""
    return type(getattr(error, "cause", error)).__name__


web = FastAPI(title="elang", description="Answers by a small model, and a large one where it is unsure.")
web.add_middleware(BodyLimit, most=Limits().bytes)
web.exception_handler(RequestValidationError)(no_request)
Texts: Any = texts_model(Limits())


# Ray copies the class as it is decorated, with the functions of this module that there are by then.
@serve.deployment(max_ongoing_requests=1024, max_queued_requests=4096)
@serve.ingress(web)
class Swift:
    """Answers requests: `POST /classify`, as `elang.serve.app` does. A new replica waits until Super is there."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: Settings, router: Router | Calibration, super_: "DeploymentHandle[Any] | None" = None
    ) -> None:
        self._deadline = settings.deadline
        self._pair: Batcher[str] | Apart
        if super_ is None:
            self._pair = _together(settings, router)
        else:
            self._pair = Apart(settings, router, super_, await super_.config.remote())
        self._rows = metrics.Counter("elang_rows", "Rows by the router's decision", tag_keys=("route",))
        self._degraded = metrics.Counter("elang_degraded_rows", "Rows for Super that Swift answered")
        self._batches = metrics.Counter("elang_super_bucket", "Batches of Super by their rows", tag_keys=("size",))
        self._counted = Counter[int]()
        self._seconds = metrics.Histogram("elang_route_seconds", "Time of a request", boundaries=list(BUCKETS))
        self._threshold = metrics.Gauge(
            "elang_threshold_info", "Rows of at least this score stay with Swift", tag_keys=("score",)
        )
        own = self._pair.router.threshold.item()
        for threshold in (math.inf, -math.inf, own):
            self._pair.router.set_threshold(threshold)
            await self._pair.answer([WARM_UP])

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Ray's `user_config`, `{"threshold": number}`: moves the threshold of replicas that serve."""
        self._pair.router.set_threshold(NewThreshold(**user_config).threshold)

    @web.post("/classify", responses=REFUSALS)
    async def classify(self, asked: Texts) -> Answers:
        texts = [asked.text] if isinstance(asked.text, str) else asked.text
        deadline = self._deadline if asked.deadline_ms is None else asked.deadline_ms / 1000
        start = time.monotonic()
        try:
            answers = await self._pair.answer(texts, deadline)
        except (Busy, Closed, BackPressureError) as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from error
        except Exception as error:
            _log.exception("a model failed")
            raise HTTPException(502, f"a model failed: {_name(error)}") from error
        finally:
            self._seconds.observe(time.monotonic() - start)
        self._count(answers)
        return Answers(answers=[classified(answer, self._pair.labels) for answer in answers])

    async def check_health(self) -> None:
        """Runs where Swift does: one that hangs keeps it from running, and Ray replaces the replica."""
        if not self._pair.alive:
            raise RuntimeError("the batcher's threads have ended")
        router = self._pair.router
        self._threshold.set(router.threshold.item(), tags={"score": router.score})  # Ray forgets one not set again

    def _count(self, answers: Sequence[Answer]) -> None:
        routed = sum(answer.model == "super" or answer.degraded for answer in answers)
        degraded = sum(answer.degraded for answer in answers)
        buckets = Counter(self._pair.stats.buckets) if isinstance(self._pair, Batcher) else Counter[int]()
        counts = [
            (self._rows, len(answers) - routed, {"route": "swift"}),
            (self._rows, routed, {"route": "super"}),
            (self._degraded, degraded, {}),
            *((self._batches, batches, {"size": str(size)}) for size, batches in (buckets - self._counted).items()),
        ]
        self._counted = buckets
        for counter, value, tags in counts:
            if value:  # Ray takes no 0
                counter.inc(value, tags)


def app(settings: Settings) -> serve.Application:
    """The application, for `serve run` and for config files."""
    if settings.calibration is not None:
        router: Router | Calibration = Calibration.load(settings.calibration)
    else:
        assert settings.threshold is not None, "one of the two is given"
        router = Router(settings.score or "energy", threshold=settings.threshold)
    beside = () if settings.together else (Super.bind(settings, router),)  # type: ignore[attr-defined]
    application: serve.Application = Swift.bind(settings, router, *beside)  # type: ignore[attr-defined]
    return application
