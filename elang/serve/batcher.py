"""One process that answers many requests at once: Swift's batches form at once, Super's across requests."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Generic, cast

import torch

from elang.joint import JointClassifier
from elang.reference import Route
from elang.router import Router
from elang.serve.pair import Pair, Rows
from elang.serve.queues import Queues
from elang.serve.requests import Answer, BatcherStats, Closed, R, Request, Row

_log = logging.getLogger(__name__)


class Clock:
    """The time, and a wait for it or for a notice, whichever comes first. Tests bring their own."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        condition.wait(seconds)


class Batcher(Generic[R]):
    """Answers the requests of many threads and tasks by one pair of models, each on a worker thread of its own.

    Rows that wait for Swift are its next batch as soon as it is free. Routed rows, of whatever requests, are Super's
    next batch when Super is free; if waiting for more of them pays (`Pace.waiting_pays`), up to `super_wait` seconds
    later. Swift goes on meanwhile: PyTorch lets other threads run while it computes, and on a GPU Super has a stream of
    its own. A row is answered as by `joint(...)`: by the joint model's own decision, with the threshold as it is when
    Swift sees the row, in Super's labels. Models and threshold are shared, not copied.

    A row whose deadline is before Super's estimated answer is answered by Swift at once, marked `degraded`; so is at
    its deadline a row that Super then still has. Swift's own time is not planned: a late row is still answered.

    Where Super raises, times out, or returns logits of another shape or that are no numbers, the rows of that batch (of
    logits that are no numbers, those rows) are answered as the joint model's `on_super_error` says: "raise" fails their
    requests by the error, "swift" has Swift answer, degraded. Out of memory is tried once more in halves before. Its
    `super_timeout` limits every call; without one, a Super that hangs keeps its rows until their deadlines. A row of
    which Swift's logits are no numbers has nothing to fall back on: it waits for Super, and fails with it. Where Swift
    fails on rows of several requests, each is tried once more by itself, so that a bad row fails its own request alone.
    The next batch is tried as ever: a model that has recovered serves again.

    As a context manager it drains, then closes; after an error it closes at once.

    Args:
        joint: the pair, its router, and what to do about errors of Super; its dispatch "exact" or "auto".
        rows: makes Swift's inputs.
        super_rows: makes Super's, where they are made otherwise.
        max_batch: rows of Swift's batch at most.
        super_batch: rows of Super's batch at most.
        super_wait: seconds that a routed row may wait for others while Super is idle; 0: none does.
        queue_rows: rows of all requests that have not ended, at most; past that, `submit` raises `Busy`.
        on_route: called on Swift's thread with the decision about each of its batches: `monitor.update`, say. Its
            errors are logged.

    Raises:
        ValueError, TypeError: an argument that is not as described, by its name.
    """

    def __init__(
        self,
        joint: JointClassifier,
        rows: Rows[R],
        super_rows: Rows[R] | None = None,
        *,
        max_batch: int = 32,
        super_batch: int = 32,
        super_wait: float = 2e-3,
        queue_rows: int = 1024,
        on_route: Callable[[Route], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("super_batch", super_batch), ("queue_rows", queue_rows)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number >= 1")
        if not isinstance(super_wait, int | float) or not 0 <= super_wait < math.inf:
            raise ValueError(f"super_wait: got {super_wait!r}, wanted a finite number of seconds >= 0")
        self._pair = Pair(joint, rows, super_rows, on_route)
        self._queues = Queues[R](
            self._pair.labels,
            super_batch=super_batch,
            super_wait=float(super_wait),
            queue_rows=queue_rows,
            swift_stands=joint.plan.super_.on_error == "swift",
        )
        self.joint = joint
        self.max_batch = max_batch
        self._clock = Clock() if clock is None else clock
        self._unsettled = 0  # requests whose future has no result yet
        self._open, self._stopped = True, False
        self._lock = threading.Lock()
        self._for_swift, self._for_super, self._all_settled = (threading.Condition(self._lock) for _ in range(3))
        self._threads = [
            threading.Thread(target=self._work, args=(loop,), name=f"elang-batcher-{name}", daemon=True)
            for name, loop in (("swift", self._swift_loop), ("super", self._super_loop))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, rows: Sequence[R], deadline: float | None = None) -> Future[list[Answer]]:
        """Ask for an answer to each row, in their order. From any thread; returns at once.

        A request of which a row fails fails as a whole. Cancelling the future takes its rows out of the queues.

        Args:
            deadline: seconds from now by which every row is to be answered, in need by Swift.

        Raises:
            Busy: there is no room for all rows; none is taken.
            Closed: the batcher drains or is closed.
            ValueError, TypeError: a row that cannot be read, more rows than `queue_rows`, no time to answer them.
        """
        if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Sequence):
            raise TypeError(f"rows: got {type(rows).__name__}, wanted a list of them")
        if deadline is not None and not (isinstance(deadline, int | float) and 0 < deadline < math.inf):
            raise ValueError(f"deadline: got {deadline!r}, wanted None or a finite number of seconds > 0")
        if len(rows) > self._queues.queue_rows:
            raise ValueError(f"rows: got {len(rows)}, wanted at most queue_rows={self._queues.queue_rows}")
        self._pair.check(rows)
        request = Request(len(rows), None if deadline is None else self._clock.now() + deadline)
        with self._lock:
            if not self._open:
                raise Closed("the batcher takes no more requests: it drains or is closed")
            if rows:
                self._queues.admit(request, rows)
                self._unsettled += 1
                self._for_swift.notify()
        if not rows:
            request.set_result([])
        request.add_done_callback(self._forget_if_cancelled)
        return request

    async def answer(self, rows: Sequence[R], deadline: float | None = None) -> list[Answer]:
        """`submit` for asyncio: a task that is cancelled cancels its request."""
        return await asyncio.wrap_future(self.submit(rows, deadline))

    @property
    def labels(self) -> tuple[str, ...]:
        """By their class numbers: Super's."""
        return self._pair.labels

    @property
    def router(self) -> Router:
        """Whose threshold may move at any time."""
        return self.joint.router

    @property
    def stats(self) -> BatcherStats:
        """What has been answered so far, by whom, and what waits. Synchronizes: no."""
        with self._lock:
            return self._queues.stats()

    @property
    def alive(self) -> bool:
        """Both threads run, as they do until it is closed."""
        return not self._stopped and all(thread.is_alive() for thread in self._threads)

    def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait until all have ended.

        Raises:
            TimeoutError: some have not within `timeout` seconds; they go on.
        """
        end = None if timeout is None else self._clock.now() + timeout
        with self._lock:
            self._open = False
            while self._unsettled:
                left = None if end is None else end - self._clock.now()
                if left is not None and left <= 0:
                    raise TimeoutError(f"timeout: {self._unsettled} requests have not ended within {timeout:g} s")
                self._clock.wait(self._all_settled, left)

    def close(self, timeout: float | None = 5.0) -> None:
        """Take no more requests, end those that are left by `Closed`, and stop both threads.

        Args:
            timeout: seconds to wait for each model to return from a call that it is in; None: until it does.
        """
        self._abandon(Closed("the batcher was closed"))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)

    def __enter__(self) -> Batcher[R]:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.drain()
        finally:
            self.close()

    def _abandon(self, error: BaseException) -> None:
        with self._lock:
            self._open, self._stopped = False, True
            ended = self._queues.abandon(error)
            self._for_swift.notify_all()
            self._for_super.notify_all()
        self._settle(ended)

    def _forget_if_cancelled(self, request: Future[list[Answer]]) -> None:
        assert isinstance(request, Request)
        if request.cancelled():
            with self._lock:
                mine = self._queues.cancel(request)
            if mine:  # else whoever ended it settles it
                self._settle([request])

    def _settle(self, requests: Sequence[Request]) -> None:
        """Give the futures of ended requests their results. Without the lock: they call back."""
        for request in requests:
            if not request.set_running_or_notify_cancel():
                continue
            if request.error is None:
                request.set_result(cast("list[Answer]", request.answers))
            else:
                request.set_exception(request.error)
        if requests:
            with self._lock:
                self._unsettled -= len(requests)
                if not self._unsettled:
                    self._all_settled.notify_all()

    def _work(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:  # of the batcher's own: rather none than one that never answers
            _log.exception("the batcher stops")
            self._abandon(error)

    @torch.no_grad()
    def _swift_loop(self) -> None:
        while True:
            with self._lock:
                while not (ended := self._queues.give_up(self._clock.now())) and not self._queues.waiting:
                    if self._stopped:
                        return
                    look = self._queues.next_look
                    self._clock.wait(self._for_swift, None if look is None else look - self._clock.now())
                rows = self._queues.take(self.max_batch)
            self._settle(ended)
            if rows:
                self._decide(rows)

    def _decide(self, rows: Sequence[Row[R]]) -> None:
        try:
            verdicts = self._pair.decide([row.value for row in rows])
        except Exception as error:
            # Rows of a request wait, and so are taken, one after the other.
            parts = [list(part) for _, part in groupby(rows, key=lambda row: row.request)]
            if len(parts) > 1:
                for part in parts:
                    self._decide(part)
                return
            traceback.clear_frames(error.__traceback__)  # they hold the batch, and a client may hold the error
            with self._lock:
                ended = self._queues.swift_failed(rows, error)
        else:
            with self._lock:
                ended = self._queues.decided(rows, verdicts, self._clock.now())
                if self._queues.routed:
                    self._for_super.notify()
        self._settle(ended)

    @torch.no_grad()
    def _super_loop(self) -> None:
        with self._pair.super_stream():
            while True:
                with self._lock:
                    while (hold := self._queues.hold(self._clock.now())) != 0:
                        if self._stopped:
                            return
                        self._clock.wait(self._for_super, hold)
                    rows, ended = self._queues.take_super(self._clock.now())
                self._settle(ended)
                if rows:
                    self._ask_super(rows)

    def _ask_super(self, rows: Sequence[Row[R]]) -> None:
        try:
            guesses = self._pair.ask_super([row.value for row in rows])
        except Exception as error:
            _log.warning("Super failed on %d rows", len(rows), exc_info=True)
            traceback.clear_frames(error.__traceback__)
            with self._lock:
                ended = self._queues.super_failed(rows, error)
        else:
            with self._lock:
                ended = self._queues.answered(rows, guesses, self._clock.now())
        self._settle(ended)
