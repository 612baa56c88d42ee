"""What a batcher is asked, what it answers, and how it refuses."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Generic, Literal, NamedTuple, TypeVar

R = TypeVar("R")


class Busy(Exception):
    """The batcher holds as many rows as it may: try again later, or elsewhere."""


class Closed(Exception):
    """The batcher takes no requests, or was closed before it had answered this one."""


class Answer(NamedTuple):
    label: str
    model: Literal["swift", "super"]
    degraded: bool  # Swift's, though the router wanted Super's
    score: float  # what the router compared
    probabilities: tuple[float, ...]  # of each label, in the order of `Batcher.labels`


class Guess(NamedTuple):
    """What a model says of a row."""

    label: int
    probabilities: tuple[float, ...]


class Verdict(NamedTuple):
    """What Swift and the router say of a row."""

    score: float
    routed: bool
    guess: Guess | None  # None: Swift's logits are no numbers, and cannot stand in for Super's


class Request(Future[list[Answer]]):
    """The future that `submit` returns, and what is known of its rows. Cancellable until it has its result."""

    def __init__(self, rows: int, deadline: float | None) -> None:
        super().__init__()
        self.deadline = deadline  # on the batcher's clock
        self.answers: list[Answer | None] = [None] * rows
        self.unanswered = rows
        self.error: BaseException | None = None
        self.ended = False  # answered, failed or cancelled: nothing more happens to it


class Row(Generic[R]):
    """A row on its way. Rows know their request, not the reverse: a cycle would wait for the garbage collector."""

    __slots__ = ("place", "request", "since", "value", "verdict")

    def __init__(self, request: Request, place: int, value: R) -> None:
        self.request = request
        self.place = place
        self.value = value
        self.verdict: Verdict | None = None
        self.since = 0.0  # it waits for Super

    @property
    def done(self) -> bool:
        return self.request.ended or self.request.answers[self.place] is not None

    @property
    def guess(self) -> Guess | None:
        """Swift's, to fall back on."""
        return None if self.verdict is None else self.verdict.guess

    def late(self, end: float) -> bool:
        """Whether an answer at that time is past the deadline, where there is one to give before."""
        deadline = self.request.deadline
        return deadline is not None and deadline < end and self.guess is not None


class BatcherStats(NamedTuple):
    """Sums over all requests since the batcher was made, and what waits now."""

    rows: int  # that the router has seen
    routed: int  # of these, how many it sent to Super
    degraded: int  # of the routed, how many Swift answered, for want of time or since Super failed
    failed: int  # rows of requests that ended in an error
    cancelled: int  # rows of requests that were cancelled
    busy: int  # rows that were refused for want of room
    swift_batches: dict[int, int]  # rows of a batch of Swift -> how many such
    buckets: dict[int, int]  # rows of a batch of Super -> how many such
    held: int  # rows of requests that have not ended
    waiting: int  # of these, how many Swift has not begun
    routed_waiting: int  # and how many were routed and Super has not begun
