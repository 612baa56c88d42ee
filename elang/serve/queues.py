"""Which rows wait for Swift, which for Super, and what has become of every request."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count, islice
from typing import Generic, Literal

from elang.serve.pace import Pace
from elang.serve.requests import Answer, BatcherStats, Busy, Guess, R, Request, Row, Verdict


class Queues(Generic[R]):
    """The books of a batcher. They wait for nothing and call no model; the batcher holds its lock around every call.

    What ends requests returns them, for the batcher to settle once it has let go of the lock: a future calls back, and
    who is called may submit. A row is answered once, by whoever comes first: Swift, Super, or its deadline.

    Args:
        labels: by their class numbers.
        super_batch, super_wait, queue_rows: as of `Batcher`.
        swift_stands: Swift answers where Super fails.
    """

    def __init__(
        self, labels: Sequence[str], *, super_batch: int, super_wait: float, queue_rows: int, swift_stands: bool
    ) -> None:
        self.labels = labels
        self.super_batch = super_batch
        self.super_wait = super_wait
        self.queue_rows = queue_rows
        self.swift_stands = swift_stands
        self.pace = Pace()
        # Ordered, and yet left from the middle at no cost.
        self.waiting = OrderedDict[Row[R], None]()
        self.routed = OrderedDict[Row[R], None]()
        self._running: tuple[float, int] | None = None  # since when Super works, and on how many rows
        self._live: dict[Request, None] = {}
        self._held = 0
        self._looks: list[tuple[float, int, Row[R]]] = []  # a heap: when to look at a row with a deadline; ties by age
        self._ages = count()
        self._rows = self._n_routed = self._degraded = self._failed = self._cancelled = self._busy = 0
        self._swift_batches, self._super_batches = Counter[int](), Counter[int]()

    def admit(self, request: Request, values: Sequence[R]) -> None:
        """Let the rows of a request wait for Swift.

        Raises:
            Busy: there is no room for all of them.
        """
        if self._held + len(values) > self.queue_rows:
            self._busy += len(values)
            raise Busy(
                f"rows: got {len(values)} where {self._held} are not answered yet, wanted at most "
                f"queue_rows={self.queue_rows} in all: try again later"
            )
        self._held += len(values)
        self._live[request] = None
        self.waiting.update((Row(request, place, value), None) for place, value in enumerate(values))

    def take(self, limit: int) -> list[Row[R]]:
        """Swift's next batch: the rows that have waited longest."""
        return [self.waiting.popitem(last=False)[0] for _ in range(min(limit, len(self.waiting)))]

    def decided(self, rows: Sequence[Row[R]], verdicts: Sequence[Verdict], now: float) -> list[Request]:
        """Swift has seen these rows: those kept are answered, and those that Super would answer too late."""
        ended: list[Request] = []
        self._rows += len(rows)
        self._swift_batches[len(rows)] += 1
        arrived = 0
        for row, verdict in zip(rows, verdicts, strict=True):
            self._n_routed += verdict.routed
            if row.done:
                continue
            row.verdict = verdict
            if verdict.guess is not None and not verdict.routed:
                self._answer(row, "swift", verdict.guess, ended)
                continue
            arrived += 1
            hurried = row.request.deadline is not None and verdict.guess is not None
            if hurried and row.late(self._end_of_next(now)):
                self._degrade(row, ended)
                continue
            row.since = now
            self.routed[row] = None
            if hurried:
                self._look(row, now)
        if arrived:
            self.pace.arrived(now, arrived)
        return ended

    def hold(self, now: float) -> float | None:
        """Seconds that Super should still wait for more rows to join the routed ones: see `Pace.waiting_pays`. None:
        until there is one.
        """
        rows = len(self.routed)
        if not rows:
            return None
        if rows >= self.super_batch or not self.pace.waiting_pays(rows, now):
            return 0.0
        end = next(iter(self.routed)).since + self.super_wait
        deadlines = [row.request.deadline for row in self.routed if row.request.deadline is not None]
        if deadlines:
            end = min(end, min(deadlines) - self.pace.seconds(rows + 1, now))
        return max(0.0, end - now)

    def take_super(self, now: float) -> tuple[list[Row[R]], list[Request]]:
        """Super's next batch, and the requests that ended as their rows would have been too late in it.

        All that wait, up to `super_batch`. Where some have deadlines, fewer, if that has more rows answered in time per
        second of Super.
        """
        rows = list(islice(self.routed, self.super_batch))
        size = len(rows)
        if any(row.request.deadline is not None for row in rows):
            sizes = [size, *(2**power for power in reversed(range((size - 1).bit_length())))]
            size = max(sizes, key=lambda size: self._worth(rows[:size], now))
        end, batch, ended = now + self.pace.seconds(size, now), list[Row[R]](), list[Request]()
        for row in rows[:size]:
            del self.routed[row]
            if row.late(end):
                self._degrade(row, ended)
            else:
                batch.append(row)
        if batch:
            self._running = now, len(batch)
            self._super_batches[len(batch)] += 1
        return batch, ended

    def answered(self, rows: Sequence[Row[R]], guesses: Sequence[Guess | None], now: float) -> list[Request]:
        """Super is back from a batch; None for a row whose logits are no numbers."""
        ended: list[Request] = []
        assert self._running is not None, "taken before"
        self.pace.took(now, len(rows), now - self._running[0])
        self._running = None
        for row, guess in zip(rows, guesses, strict=True):
            if row.done:
                continue
            if guess is None:
                self._without_super(row, ValueError("super_: got logits that are no numbers for a row"), ended)
            else:
                self._answer(row, "super", guess, ended)
        return ended

    def super_failed(self, rows: Iterable[Row[R]], error: BaseException) -> list[Request]:
        """Super has no answer to these rows."""
        ended: list[Request] = []
        self._running = None
        for row in rows:
            if not row.done:
                self._without_super(row, error, ended)
        return ended

    def swift_failed(self, rows: Iterable[Row[R]], error: BaseException) -> list[Request]:
        """Nobody has an answer to these rows."""
        ended: list[Request] = []
        for row in rows:
            self._fail(row.request, error, ended)
        return ended

    def give_up(self, now: float) -> list[Request]:
        """Answer by Swift the rows that Super can no longer begin in time, or has not answered by their deadline."""
        ended: list[Request] = []
        while self._looks and self._looks[0][0] <= now:
            row = heapq.heappop(self._looks)[2]
            if row.done:
                continue
            if self._last_moment(row, now) <= now:
                self.routed.pop(row, None)
                self._degrade(row, ended)
            else:
                self._look(row, now)
        return ended

    @property
    def next_look(self) -> float | None:
        """When to call `give_up` next."""
        return self._looks[0][0] if self._looks else None

    def cancel(self, request: Request) -> bool:
        """Forget a request, unless it has ended."""
        if request.ended:
            return False
        self._cancelled += len(request.answers)
        self._end(request)
        return True

    def abandon(self, error: BaseException) -> list[Request]:
        """End every request by this error."""
        ended: list[Request] = []
        self.waiting.clear()
        self.routed.clear()
        for request in list(self._live):
            self._fail(request, error, ended)
        return ended

    def stats(self) -> BatcherStats:
        return BatcherStats(
            self._rows,
            self._n_routed,
            self._degraded,
            self._failed,
            self._cancelled,
            self._busy,
            dict(sorted(self._swift_batches.items())),
            dict(sorted(self._super_batches.items())),
            self._held,
            len(self.waiting),
            len(self.routed),
        )

    def _end_of_next(self, now: float) -> float:
        """When Super will have answered a row that is routed now: the batch it works on, those that wait, its own."""
        since, size = self._running or (now, 0)
        free = max(now, since + self.pace.seconds(size, now)) if size else now
        full, rest = divmod(len(self.routed), self.super_batch)
        return free + full * self.pace.seconds(self.super_batch, now) + self.pace.seconds(rest + 1, now)

    def _worth(self, rows: Sequence[Row[R]], now: float) -> float:
        seconds = self.pace.seconds(len(rows), now)
        return sum(not row.late(now + seconds) for row in rows) / max(seconds, 1e-9)

    def _last_moment(self, row: Row[R], now: float) -> float:
        """Until when a row with a deadline may be left to Super."""
        assert row.request.deadline is not None
        return row.request.deadline - (self.pace.seconds(1, now) if row in self.routed else 0.0)

    def _look(self, row: Row[R], now: float) -> None:
        # Most rows are answered long before: they are not to pile up until their deadlines.
        if len(self._looks) > 2 * self.queue_rows:
            self._looks = [look for look in self._looks if not look[2].done]
            heapq.heapify(self._looks)
        heapq.heappush(self._looks, (self._last_moment(row, now), next(self._ages), row))

    def _without_super(self, row: Row[R], error: BaseException, ended: list[Request]) -> None:
        if self.swift_stands and row.guess is not None:
            self._degrade(row, ended)
        else:
            self._fail(row.request, error, ended)

    def _degrade(self, row: Row[R], ended: list[Request]) -> None:
        assert row.guess is not None
        self._degraded += 1
        self._answer(row, "swift", row.guess, ended, degraded=True)

    def _answer(
        self,
        row: Row[R],
        model: Literal["swift", "super"],
        guess: Guess,
        ended: list[Request],
        *,
        degraded: bool = False,
    ) -> None:
        request = row.request
        assert row.verdict is not None
        request.answers[row.place] = Answer(
            self.labels[guess.label], model, degraded, row.verdict.score, guess.probabilities
        )
        request.unanswered -= 1
        if not request.unanswered:
            self._end(request)
            ended.append(request)

    def _fail(self, request: Request, error: BaseException, ended: list[Request]) -> None:
        if request.ended:
            return
        request.error = error
        self._failed += len(request.answers)
        self._end(request)
        ended.append(request)

    def _end(self, request: Request) -> None:
        request.ended = True
        self._held -= len(request.answers)
        del self._live[request]
        if request.unanswered:
            for queue in (self.waiting, self.routed):
                for row in [row for row in queue if row.request is request]:
                    del queue[row]
