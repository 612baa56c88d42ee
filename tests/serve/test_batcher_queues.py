"""The books of a batcher: whatever happens in whatever order, every request ends once, with its own answers."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elang.serve.queues import Queues
from elang.serve.requests import Answer, Busy, Guess, Request, Row, Verdict

ROOM, SUPER_BATCH, SUPER_WAIT = 16, 4, 0.5
ERROR = ConnectionError("dead")


def verdict(value: int) -> Verdict:
    """Two of three rows are routed; to one of seven Swift has no answer."""
    no_answer = value % 7 == 0
    return Verdict(float(value), no_answer or value % 3 > 0, None if no_answer else Guess(0, (float(value), 0.0)))


class Schedule(RuleBasedStateMachine):
    @initialize(swift_stands=st.booleans())
    def start(self, swift_stands: bool) -> None:
        self.swift_stands = swift_stands
        self.queues = Queues[int](
            ("a", "b"), super_batch=SUPER_BATCH, super_wait=SUPER_WAIT, queue_rows=ROOM, swift_stands=swift_stands
        )
        self.now, self.next = 100.0, 1
        self.requests: dict[Request, list[int]] = {}
        self.ended: set[Request] = set()
        self.failed: set[Request] = set()  # by a fault that nobody could stand in for
        self.cancelled: set[Request] = set()
        self.with_swift: list[Row[int]] = []
        self.with_super: list[Row[int]] = []
        self.order: list[int] = []  # in which Swift took rows

    def end(self, requests: list[Request]) -> None:
        for request in requests:
            assert request not in self.ended | self.cancelled
            assert request.ended
            self.ended.add(request)

    @rule(rows=st.integers(1, 6), deadline=st.none() | st.floats(0.01, 3.0))
    def submit(self, rows: int, deadline: float | None) -> None:
        values = list(range(self.next, self.next + rows))
        request = Request(rows, None if deadline is None else self.now + deadline)
        if self.held + rows > ROOM:
            with pytest.raises(Busy):
                self.queues.admit(request, values)
        else:
            self.queues.admit(request, values)
            self.requests[request] = values
            self.next += rows

    @precondition(lambda self: not self.with_swift)
    @rule(limit=st.integers(1, 8))
    def swift_takes(self, limit: int) -> None:
        self.with_swift = self.queues.take(limit)
        assert len(self.with_swift) <= limit
        self.order += [row.value for row in self.with_swift]
        assert self.order == sorted(self.order)

    @precondition(lambda self: self.with_swift)
    @rule()
    def swift_returns(self) -> None:
        rows, self.with_swift = self.with_swift, []
        self.end(self.queues.decided(rows, [verdict(row.value) for row in rows], self.now))

    @precondition(lambda self: self.with_swift)
    @rule()
    def swift_fails(self) -> None:
        rows, self.with_swift = self.with_swift, []
        self.failed |= {row.request for row in rows}
        self.end(self.queues.swift_failed(rows, ERROR))

    @precondition(lambda self: not self.with_super)
    @rule()
    def super_takes(self) -> None:
        hold = self.queues.hold(self.now)
        assert (hold is None) == (not self.queues.routed)
        assert hold is None or 0 <= hold <= SUPER_WAIT
        self.with_super, ended = self.queues.take_super(self.now)
        assert len(self.with_super) <= SUPER_BATCH
        values = [row.value for row in self.with_super]
        assert values == sorted(values)
        assert not any(row.done for row in self.with_super)
        self.end(ended)

    @precondition(lambda self: self.with_super)
    @rule(no_number=st.sets(st.integers(0, SUPER_BATCH - 1)))
    def super_returns(self, no_number: set[int]) -> None:
        rows, self.with_super = self.with_super, []
        guesses = [None if i in no_number else Guess(1, (0.0, float(row.value))) for i, row in enumerate(rows)]
        self.cannot_answer([row for row, guess in zip(rows, guesses, strict=True) if guess is None])
        self.end(self.queues.answered(rows, guesses, self.now))

    @precondition(lambda self: self.with_super)
    @rule()
    def super_fails(self) -> None:
        rows, self.with_super = self.with_super, []
        self.cannot_answer(rows)
        self.end(self.queues.super_failed(rows, ERROR))

    def cannot_answer(self, rows: list[Row[int]]) -> None:
        self.failed |= {row.request for row in rows if not self.swift_stands or row.guess is None}

    @rule(seconds=st.floats(0.001, 2.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.end(self.queues.give_up(self.now))
        look = self.queues.next_look
        assert look is None or look > self.now
        in_time = (row for row in [*self.queues.routed, *self.with_super] if not row.done and row.guess is not None)
        assert all(row.request.deadline is None or row.request.deadline > self.now for row in in_time)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        live = [request for request in self.requests if request not in self.ended | self.cancelled]
        request = data.draw(st.sampled_from(live))
        assert self.queues.cancel(request)
        self.cancelled.add(request)

    @precondition(lambda self: self.ended | self.cancelled)
    @rule()
    def cancel_too_late(self) -> None:
        assert not any(map(self.queues.cancel, self.ended | self.cancelled))

    @property
    def held(self) -> int:
        live = self.requests.keys() - self.ended - self.cancelled
        return sum(len(self.requests[request]) for request in live)

    @invariant()
    def the_books_are_right(self) -> None:
        stats = self.queues.stats()
        assert stats.held == self.held <= ROOM
        assert (stats.waiting, stats.routed_waiting) == (len(self.queues.waiting), len(self.queues.routed))
        assert not any(row.done for row in [*self.queues.waiting, *self.queues.routed])
        assert stats.cancelled == sum(len(request.answers) for request in self.cancelled)
        assert stats.failed == sum(len(request.answers) for request in self.ended if request.error)

    @invariant()
    def whoever_ended_has_its_own_answers(self) -> None:
        for request in self.ended:
            if request.error is not None:
                assert request in self.failed
                continue
            for value, answer in zip(self.requests[request], request.answers, strict=True):
                assert isinstance(answer, Answer)
                assert answer.score == value
                said = verdict(value)
                by_swift = answer.model == "swift"
                assert answer.probabilities == ((value, 0.0) if by_swift else (0.0, value))
                assert answer.label == ("a" if by_swift else "b")
                assert by_swift == (not said.routed or answer.degraded)
                assert said.routed or not answer.degraded
                assert said.guess is not None or not by_swift

    def teardown(self) -> None:
        """With nothing more to come, all that is left ends."""
        if not hasattr(self, "queues"):
            return
        for _ in range(2 * ROOM):
            if self.with_swift:
                self.swift_returns()
            if self.with_super:
                self.super_returns(set())
            self.swift_takes(8)
            self.super_takes()
        assert self.requests.keys() == self.ended | self.cancelled
        self.the_books_are_right()
        self.whoever_ended_has_its_own_answers()


TestSchedule = Schedule.TestCase
TestSchedule.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def decided(queues: Queues[int], values: list[int], now: float, deadline: float | None = None) -> Request:
    request = Request(len(values), deadline)
    queues.admit(request, values)
    rows = queues.take(len(values))
    queues.decided(rows, [Verdict(0.0, True, Guess(0, (1.0, 0.0)))] * len(rows), now)
    return request


def test_supers_batch_is_as_large_as_answers_most_rows_in_time():
    """Super takes 0.2 s and 0.1 s a row: eight rows would miss the deadline of the first four, which four meet."""
    queues = Queues[int](("a", "b"), super_batch=8, super_wait=0.0, queue_rows=99, swift_stands=False)
    for rows in (1, 2, 4, 8):
        queues.pace.took(0.0, rows, 0.2 + 0.1 * rows)
    decided(queues, [1, 2, 3, 4], 0.0, deadline=0.65)
    late = decided(queues, [5, 6, 7, 8], 0.0, deadline=1.05)
    batch, ended = queues.take_super(0.0)
    assert [row.value for row in batch] == [1, 2, 3, 4]
    assert ended == []
    queues.answered(batch, [Guess(1, (0.0, 1.0))] * 4, 0.6)
    batch, ended = queues.take_super(0.6)
    assert ended == []  # by now there is time for two of the four
    assert [row.value for row in batch] == [5, 6]
    queues.answered(batch, [Guess(1, (0.0, 1.0))] * 2, 1.0)
    assert queues.take_super(1.0) == ([], [late])
    assert [answer.model for answer in late.answers if answer is not None] == ["super", "super", "swift", "swift"]


def test_without_deadlines_supers_batch_is_all_that_waits():
    queues = Queues[int](("a", "b"), super_batch=8, super_wait=0.0, queue_rows=99, swift_stands=False)
    for rows, seconds in ((1, 0.1), (8, 9.0)):
        queues.pace.took(0.0, rows, seconds)
    decided(queues, list(range(10)), 0.0)
    assert [row.value for row in queues.take_super(0.0)[0]] == list(range(8))


def busy() -> Queues[int]:
    """Where rows come fast and a call costs 1 s, so that waiting pays."""
    queues = Queues[int](("a", "b"), super_batch=8, super_wait=0.5, queue_rows=99, swift_stands=False)
    for rows in (1, 8):
        queues.pace.took(0.0, rows, 1.0)
    queues.pace.arrived(0.0, 1000)
    return queues


def test_a_full_batch_ends_the_wait():
    queues = busy()
    decided(queues, [1, 2, 3, 4, 5, 6, 7], 0.0)
    assert queues.hold(0.0) == 0.5
    decided(queues, [8], 0.0)
    assert queues.hold(0.0) == 0.0


def test_a_row_with_little_time_ends_the_wait():
    queues = busy()
    assert queues.hold(0.0) is None
    decided(queues, [1], 0.0)
    assert queues.hold(0.1) == pytest.approx(0.4)
    decided(queues, [2], 0.1, deadline=1.2)
    assert queues.hold(0.1) == pytest.approx(0.1)
    assert queues.hold(0.3) == 0.0


def test_answered_rows_do_not_wait_for_their_deadlines():
    queues = Queues[int](("a", "b"), super_batch=8, super_wait=0.0, queue_rows=4, swift_stands=False)
    for _ in range(100):
        decided(queues, [1], 0.0, deadline=1e6)
        batch, _ = queues.take_super(0.0)
        queues.answered(batch, [Guess(1, (0.0, 1.0))], 0.0)
        assert len(queues._looks) <= 2 * 4 + 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_super_that_is_back_early_is_free(fails):
    """It takes 1 s, but is back after 0.2 s: a row that has 1.1 s left then is not late."""
    queues = Queues[int](("a", "b"), super_batch=8, super_wait=0.0, queue_rows=99, swift_stands=False)
    for _ in range(3):
        queues.pace.took(0.0, 1, 1.0)
    decided(queues, [1], 0.0)
    batch, _ = queues.take_super(0.0)
    if fails:
        queues.super_failed(batch, ERROR)
    else:
        queues.answered(batch, [Guess(1, (0.0, 1.0))], 0.2)
    assert not decided(queues, [2], 0.2, deadline=1.3).ended
    assert decided(queues, [3], 0.2, deadline=1.1).ended
