"""What the services take and give as JSON, and what they refuse before a batcher sees it."""

# Annotations are evaluated as they stand: FastAPI could not resolve the name of a local class.
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from elang.serve.requests import Answer

try:
    from fastapi import HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict, Field, StringConstraints
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ImportError("services need FastAPI: pip install 'elang[serve]'") from error


class Limits(NamedTuple):
    """What a request may ask."""

    texts: int = 256
    characters: int = 20_000  # of a text
    bytes: int = 1 << 20  # of a body
    deadline: float | None = None  # seconds, of a request that names none
    drain: float = 30.0  # seconds for what is under way when the service stops


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Classified(Reply):
    label: str
    model: Literal["swift", "super"] = Field(description="who answered")
    degraded: bool = Field(description="Swift's answer, though the router wanted Super's")
    score: float | None = Field(description="what the router compared with the threshold; null: not finite")
    probabilities: dict[str, float]


class Answers(Reply):
    answers: list[Classified] = Field(description="one for each text, in their order")


class Threshold(Reply):
    score: str
    temperature: float
    threshold: float | Literal["inf", "-inf"]


class NewThreshold(Reply):
    threshold: Annotated[float, Field(allow_inf_nan=True)] = Field(description='a number, "inf" or "-inf"')


class Status(Reply):
    status: str


class Problem(BaseModel):
    detail: Any


def texts_model(limits: Limits) -> type[BaseModel]:
    """What `POST /classify` takes."""
    one = Annotated[str, StringConstraints(max_length=limits.characters)]
    several = Annotated[list[one], Field(min_length=1, max_length=limits.texts)]

    class Texts(Reply):
        text: one | several
        deadline_ms: float | None = Field(
            None, gt=0, le=86_400_000, description="by when every text is to be answered, in need by Swift"
        )

    return Texts


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": why}
    for status, why in (
        (400, "the body is not UTF-8"),
        (413, "the body is too large"),
        (422, "what is no request, and why"),
        (502, "a model failed"),
        (503, "no room, or the service stops: try again later"),
    )
}


def classified(answer: Answer, labels: Sequence[str]) -> Classified:
    return Classified(
        label=answer.label,
        model=answer.model,
        degraded=answer.degraded,
        score=answer.score if math.isfinite(answer.score) else None,
        probabilities=dict(zip(labels, answer.probabilities, strict=True)),
    )


class BodyLimit:
    """Refuses a body of more than so many bytes, before it is held in memory whole."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413, f"the body has more than {self.most} bytes")
            return message

        await self.app(scope, counted, send)


async def no_request(_: Request, error: Exception) -> JSONResponse:
    """What is wrong and where; not what was sent, which may be secret, or no text that a reply can hold."""
    assert isinstance(error, RequestValidationError)
    problems = [{name: each[name] for name in ("loc", "msg", "type")} for each in error.errors()]
    return JSONResponse({"detail": problems}, 422)
