"""A batcher behind HTTP: FastAPI's schemas and OpenAPI, and what a service needs around them (extra `serve`)."""

# Annotations are evaluated as they stand: FastAPI could not resolve the name of a local class.
import asyncio
import hmac
import logging
import math
import signal
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Annotated, Any

from elang.calibration import Calibration
from elang.serve.batcher import Batcher
from elang.serve.requests import Answer, Busy, Closed
from elang.serve.schemas import (
    REFUSALS,
    Answers,
    BodyLimit,
    Limits,
    NewThreshold,
    Problem,
    Status,
    Threshold,
    classified,
    no_request,
    texts_model,
)

try:
    from fastapi import Depends, FastAPI, HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
except ImportError as error:
    raise ImportError("elang.serve.app needs FastAPI: pip install 'elang[serve]'") from error

from elang.monitoring import Monitor
from elang.prometheus import Metrics

_log = logging.getLogger(__name__)


def create_app(
    batcher: Batcher[str],
    *,
    warm_up: Sequence[str] = ("warm-up",),
    limits: Limits | None = None,
    token: str | None = None,
    reload: Callable[[], Calibration] | None = None,
    monitor: Monitor | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """The service of a batcher, which drains and closes when the service stops.

    | route | |
    |---|---|
    | `POST /classify` | `{"text": str or list, "deadline_ms": number}` -> an answer for each text |
    | `GET /healthz` | 200 while the batcher's threads run |
    | `GET /readyz` | 200 once both models have answered `warm_up`, until the service stops; else 503 |
    | `GET /metrics` | Prometheus: `elang.prometheus.Metrics`; `elang_route_seconds` is of whole requests |
    | `GET /threshold` | score, temperature, threshold |
    | `PUT /threshold` | `{"threshold": number}` with the token; there is no such route without one |

    A request that cannot be served says why: 400 a body that is not UTF-8, 413 one that is too large, 422 what is no
    request, 503 with `Retry-After` where there is no room or the service stops, 502 where a model failed. A client that
    goes away takes its rows with it. SIGHUP takes the threshold of `reload()`, if it is of the same score and
    temperature.

    Args:
        warm_up: texts that both models answer before the service is ready.
        token: of `Authorization: Bearer`, to move the threshold.
        reload: reads the calibration anew.
        monitor: that counts what the batcher decides (`on_route=monitor.update`), to be exported with it.
        registry: that the metrics go to and `/metrics` serves; None: one of its own.
    """
    limits = Limits() if limits is None else limits
    registry = CollectorRegistry() if registry is None else registry
    seconds = Metrics(registry).watch("service", batcher, monitor)
    ready = threading.Event()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        if reload is not None and threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGHUP, _reload, batcher, reload)
        await _warm_up(batcher, warm_up)
        ready.set()
        try:
            yield
        finally:
            ready.clear()
            try:
                await asyncio.to_thread(batcher.drain, limits.drain)
            except TimeoutError as error:
                _log.warning("%s; they are ended", error)
            await asyncio.to_thread(batcher.close)

    app = FastAPI(
        title="elang", description="Answers by a small model, and a large one where it is unsure.", lifespan=lifespan
    )
    app.add_middleware(BodyLimit, most=limits.bytes)
    app.exception_handler(RequestValidationError)(no_request)
    Texts: Any = texts_model(limits)

    @app.post("/classify", responses=REFUSALS)
    async def classify(asked: Texts, request: Request) -> Answers:
        texts = [asked.text] if isinstance(asked.text, str) else asked.text
        deadline = limits.deadline if asked.deadline_ms is None else asked.deadline_ms / 1000
        with seconds.time(), _span(len(texts)) as span:
            answers = await _answered(batcher, texts, deadline, request)
            _describe(span, answers)
        return Answers(answers=[classified(answer, batcher.labels) for answer in answers])

    @app.get("/healthz", responses={503: REFUSALS[503]})
    async def healthz() -> Status:
        if not batcher.alive:
            raise HTTPException(503, "the batcher's threads have ended")
        return Status(status="alive")

    @app.get("/readyz", responses={503: REFUSALS[503]})
    async def readyz() -> Status:
        if not (ready.is_set() and batcher.alive):
            raise HTTPException(503, "warming up or stopping")
        return Status(status="ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}})
    def exported() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/threshold")
    async def threshold() -> Threshold:
        return _threshold(batcher)

    if token is not None:
        bearer = HTTPBearer(auto_error=False)

        refusals: dict[int | str, Any] = {status: REFUSALS[status] for status in (400, 413, 422)}
        refusals[401] = {"model": Problem, "description": "not the token"}

        @app.put("/threshold", responses=refusals)
        async def move_threshold(
            new: NewThreshold, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
        ) -> Threshold:
            if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
                raise HTTPException(401, "wanted the service's token", {"WWW-Authenticate": "Bearer"})
            if math.isnan(new.threshold):
                raise HTTPException(422, "threshold: got NaN, wanted a number")
            batcher.router.set_threshold(new.threshold)
            _log.info("the threshold is %s", batcher.router.threshold.item())
            return _threshold(batcher)

    return app


async def _warm_up(batcher: Batcher[str], texts: Sequence[str]) -> None:
    """Both models answer: by a threshold that routes every row, and by one that keeps every row."""
    router, own = batcher.router, batcher.router.threshold.item()
    try:
        for threshold in (math.inf, -math.inf):
            router.set_threshold(threshold)
            await batcher.answer(texts)
    finally:
        router.set_threshold(own)


def _reload(batcher: Batcher[str], reload: Callable[[], Calibration]) -> None:
    try:
        new, router = reload(), batcher.router
        if (new.score, new.temperature) != (router.score, router.temperature):
            raise ValueError(
                f"got the score {new.score} at {new.temperature}, wanted {router.score} at {router.temperature}"
            )
        router.set_threshold(new.threshold)
    except (OSError, ValueError) as error:
        _log.error("the threshold stays: %s", error)
    else:
        _log.info("the threshold is %s", router.threshold.item())


async def _answered(
    batcher: Batcher[str], texts: Sequence[str], deadline: float | None, request: Request
) -> list[Answer]:
    try:
        answering = asyncio.wrap_future(batcher.submit(texts, deadline))
    except (Busy, Closed) as error:
        raise HTTPException(503, str(error), {"Retry-After": "1"}) from error
    except (ValueError, TypeError) as error:
        raise HTTPException(422, str(error)) from error
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise HTTPException(499, "the client has gone")
        return answering.result()
    except Closed as error:
        raise HTTPException(503, str(error), {"Retry-After": "1"}) from error
    except HTTPException:
        raise
    except Exception as error:
        _log.exception("a model failed")
        raise HTTPException(502, f"a model failed: {type(error).__name__}") from error
    finally:
        answering.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _threshold(batcher: Batcher[str]) -> Threshold:
    router = batcher.router
    value = router.threshold.item()
    written: Any = value if math.isfinite(value) else str(value)
    return Threshold(score=router.score, temperature=router.temperature, threshold=written)


def _span(rows: int) -> AbstractContextManager[Any]:
    """A span of OpenTelemetry, where its API is installed; what becomes of it is the process's own business."""
    try:
        from opentelemetry import trace
    except ImportError:
        return nullcontext()
    tracer = trace.get_tracer("elang")
    return tracer.start_as_current_span("elang.classify", attributes={"elang.rows": rows})


def _describe(span: Any, answers: Sequence[Answer]) -> None:
    if span is not None:
        span.set_attribute("elang.routed", sum(answer.model == "super" or answer.degraded for answer in answers))
        span.set_attribute("elang.degraded", sum(answer.degraded for answer in answers))
