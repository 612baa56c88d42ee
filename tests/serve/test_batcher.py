"""Requests in, answers out: every row once, in order, whatever else is under way."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import random
import threading
from concurrent.futures import Future

import fake_pair
import pytest
import torch
from fake_pair import LIMIT, FakePair, Ids, assert_answers, assert_same, of_super, of_swift, until

from elang.joint import JointClassifier
from elang.router import Router
from elang.serve import Batcher, Busy, Closed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pair():
    with FakePair() as pair:
        yield pair


def test_every_row_of_many_threads_is_answered_once_and_in_order():
    requests: list[tuple[list[int], Future]] = []

    def client(seed: int, batcher: Batcher[int]) -> None:
        rng, left = random.Random(seed), 200
        while left:
            rows = [rng.randrange(1, fake_pair.SCALE) for _ in range(min(left, rng.randint(1, 12)))]
            left -= len(rows)
            requests.append((rows, batcher.submit(rows)))
            if rng.random() < 0.3:
                requests[-1][1].result(LIMIT)

    with FakePair(clock=None, queue_rows=6400, super_batch=7) as pair:
        threads = [threading.Thread(target=client, args=(seed, pair.batcher)) for seed in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for rows, future in requests:
            assert_answers(rows, future.result(LIMIT))
        seen = [row for batch in pair.swift.batches for row in batch]
        assert sorted(seen) == sorted(row for rows, _ in requests for row in rows)
        to_super = [row for batch in pair.super.batches for row in batch]
        assert sorted(to_super) == sorted(row for row in seen if fake_pair.routed(row))
        stats = pair.batcher.stats
        assert (stats.rows, stats.routed) == (6400, len(to_super))
        assert stats.degraded == stats.failed == stats.cancelled == stats.busy == stats.held == 0
        assert sum(size * n for size, n in stats.swift_batches.items()) == 6400
        assert sum(size * n for size, n in stats.buckets.items()) == len(to_super)
        assert max(stats.swift_batches) <= 32
        assert max(stats.buckets) <= 7


def test_an_idle_batcher_calls_each_model_at_once_on_the_whole_request(pair):
    rows = [3, 1, 2, 6, 9]
    assert_answers(rows, pair.batcher.submit(rows).result(LIMIT))
    assert pair.swift.batches == [rows]
    assert pair.super.batches == [[3, 6, 9]]
    assert pair.clock.time == 1000.0  # nobody waited for it to pass
    assert pair.batcher.alive


def test_batches_form_across_requests(pair):
    pair.super.gate.clear()
    pair.swift.gate.clear()
    futures = [pair.batcher.submit([3])]
    pair.swift.wait_until_called()
    futures += [pair.batcher.submit(rows) for rows in ([6, 1], [9], [2, 12])]
    pair.swift.gate.set()
    pair.super.wait_until_called()
    until(lambda: pair.batcher.stats.routed_waiting == 3 or len(pair.super.batches[0]) > 1)
    pair.super.gate.set()
    for rows, future in zip(([3], [6, 1], [9], [2, 12]), futures, strict=True):
        assert_answers(rows, future.result(LIMIT))
    assert pair.swift.batches == [[3], [6, 1, 9, 2, 12]]
    assert pair.super.batches in ([[3], [6, 9, 12]], [[3, 6, 9, 12]])
    assert pair.batcher.stats.swift_batches == {1: 1, 5: 1}


def test_a_large_request_is_cut_into_batches(pair):
    rows = list(range(1, 101))
    assert_answers(rows, pair.batcher.submit(rows).result(LIMIT))
    assert list(map(len, pair.swift.batches)) == [32, 32, 32, 4]


def test_swift_goes_on_while_super_works(pair):
    pair.super.gate.clear()
    slow = pair.batcher.submit([3, 1])
    pair.super.wait_until_called()
    assert_answers([1, 2], pair.batcher.submit([1, 2]).result(LIMIT))
    assert not slow.done()
    pair.super.gate.set()
    assert_answers([3, 1], slow.result(LIMIT))


def test_super_waits_where_it_pays_and_no_longer_than_it_may():
    with FakePair(super_wait=0.002) as pair:
        pace = pair.batcher._queues.pace
        pace.took(1000.0, 1, 0.010)  # a call costs 10 ms, whatever its rows
        pace.took(1000.0, 32, 0.010)
        pace.arrived(1000.0, 100)  # 1 ms apart
        futures = [pair.batcher.submit([3])]
        until(lambda: pair.batcher.stats.routed_waiting == 1)
        futures.append(pair.batcher.submit([6]))
        until(lambda: pair.batcher.stats.routed_waiting == 2)
        assert pair.super.batches == []
        pair.clock.time += 0.0021
        assert_answers([3, 6], [future.result(LIMIT)[0] for future in futures])
        assert pair.super.batches == [[3, 6]]


def test_a_full_batcher_is_busy_and_has_room_when_a_result_is_there():
    with FakePair(queue_rows=4) as pair:
        pair.swift.gate.clear()
        first = pair.batcher.submit([1, 2, 3])
        with pytest.raises(Busy, match=r"rows: got 2 where 3 are not answered yet, wanted at most queue_rows=4"):
            pair.batcher.submit([4, 5])
        second = pair.batcher.submit([4])
        with pytest.raises(Busy):
            pair.batcher.submit([5])
        assert pair.batcher.submit([]).result(LIMIT) == []
        assert pair.batcher.stats.busy == 3
        pair.swift.gate.set()
        assert_answers([1, 2, 3], first.result(LIMIT))
        assert_answers([4], second.result(LIMIT))
        for row in range(1, 200):
            assert_answers([row] * 4, pair.batcher.submit([row] * 4).result(LIMIT))
        with pytest.raises(ValueError, match="rows: got 5, wanted at most queue_rows=4"):
            pair.batcher.submit([1] * 5)


# ---- deadlines


def test_a_row_that_super_still_has_at_its_deadline_is_swifts(pair):
    pair.super.gate.clear()
    hurried, patient = pair.batcher.submit([3, 1], deadline=0.05), pair.batcher.submit([6])
    until(lambda: pair.batcher.stats.rows == 3)
    pair.clock.time += 0.049
    assert not hurried.done()
    pair.clock.time += 0.002
    assert_same(hurried.result(LIMIT), [of_swift(3, degraded=True), of_swift(1)])
    assert pair.batcher.stats.degraded == 1
    pair.super.gate.set()
    assert_answers([6], patient.result(LIMIT))


def learn(pair: FakePair, seconds: float) -> None:
    """Let Super take so long for a row."""
    pair.super.gate.clear()
    future = pair.batcher.submit([3])
    pair.super.wait_until_called()
    pair.clock.time += seconds
    pair.super.gate.set()
    future.result(LIMIT)
    pair.super.batches.clear()


def test_a_row_that_super_would_answer_too_late_is_swifts_at_once(pair):
    learn(pair, 1.0)
    assert_same(pair.batcher.submit([6], deadline=0.9).result(LIMIT), [of_swift(6, degraded=True)])
    assert pair.super.batches == []
    assert_answers([6], pair.batcher.submit([6], deadline=1.1).result(LIMIT))
    assert_answers([9], pair.batcher.submit([9]).result(LIMIT))


def test_what_super_works_on_is_a_part_of_the_estimate(pair):
    learn(pair, 1.0)
    pair.super.gate.clear()
    first = pair.batcher.submit([3])
    pair.super.wait_until_called()
    assert_same(pair.batcher.submit([6], deadline=1.5).result(LIMIT), [of_swift(6, degraded=True)])
    second = pair.batcher.submit([9], deadline=2.5)
    until(lambda: pair.batcher.stats.routed_waiting == 1)
    pair.clock.time += 1.0
    pair.super.gate.set()
    assert_answers([3, 9], [first.result(LIMIT)[0], second.result(LIMIT)[0]])


def test_a_row_that_super_can_no_longer_begin_in_time_is_swifts(pair):
    learn(pair, 1.0)
    pair.super.gate.clear()
    first = pair.batcher.submit([3])
    pair.super.wait_until_called()
    second = pair.batcher.submit([9], deadline=2.5)
    until(lambda: pair.batcher.stats.routed_waiting == 1)
    pair.clock.time += 1.4  # Super is late
    assert not second.done()
    pair.clock.time += 0.2
    assert_same(second.result(LIMIT), [of_swift(9, degraded=True)])
    assert pair.batcher.stats.routed_waiting == 0
    pair.super.gate.set()
    assert_answers([3], first.result(LIMIT))
    assert pair.super.batches == [[3]]


def test_a_super_that_was_slow_is_tried_again(pair):
    learn(pair, 1.0)
    pair.clock.time += 10.1
    assert_answers([6], pair.batcher.submit([6], deadline=0.5).result(LIMIT))


def test_a_late_row_is_answered_all_the_same(pair):
    pair.swift.gate.clear()
    future = pair.batcher.submit([1, 3], deadline=0.05)
    pair.swift.wait_until_called()
    pair.clock.time += 1.0
    pair.swift.gate.set()
    assert_same(future.result(LIMIT), [of_swift(1), of_swift(3, degraded=True)])


# ---- cancellation, drain, close


@pytest.mark.parametrize("where", ["waiting", "with Swift", "routed", "with Super"])
def test_a_cancelled_request_leaves_no_trace_but_a_count(where):
    with FakePair(queue_rows=3) as pair:
        held = pair.swift if where in ("waiting", "with Swift") else pair.super
        held.gate.clear()
        first = pair.batcher.submit([3])
        held.wait_until_called()
        cancelled = pair.batcher.submit([6]) if where in ("waiting", "routed") else first
        if where == "routed":
            until(lambda: pair.batcher.stats.routed_waiting == 1)
        assert cancelled.cancel()
        assert concurrent.futures.wait([cancelled], LIMIT).not_done == set()
        stats = pair.batcher.stats
        assert (stats.cancelled, stats.held, stats.waiting, stats.routed_waiting) == (
            1,
            int(cancelled is not first),
            0,
            0,
        )
        other = pair.batcher.submit([9, 1])  # in the room that it left
        held.gate.set()
        assert_answers([9, 1], other.result(LIMIT))
        if cancelled is not first:
            assert_answers([3], first.result(LIMIT))
            assert all(6 not in batch for batch in held.batches)
        elif where == "with Swift":
            assert pair.super.batches == [[9]]
        pair.batcher.drain(LIMIT)
        assert pair.batcher.stats.held == 0


def test_an_answered_request_is_not_cancelled(pair):
    future = pair.batcher.submit([1])
    future.result(LIMIT)
    assert not future.cancel()
    assert pair.batcher.stats.cancelled == 0


def test_drain_answers_what_was_taken_and_takes_no_more():
    with FakePair(clock=None) as pair:
        pair.super.gate.clear()
        futures = [pair.batcher.submit([row, row + 1]) for row in (3, 6, 9)]
        pair.super.wait_until_called()
        drained = threading.Thread(target=pair.batcher.drain)
        drained.start()

        def refuses() -> bool:
            try:
                futures.append(pair.batcher.submit([12, 13]))
            except Closed:
                return True
            return False

        until(refuses)
        assert drained.is_alive()
        pair.super.gate.set()
        drained.join(LIMIT)
        assert not drained.is_alive()
        assert all(future.done() for future in futures)
        for row, future in zip((3, 6, 9), futures, strict=False):
            assert_answers([row, row + 1], future.result(0))


def test_a_drain_that_takes_too_long_says_so(pair):
    pair.super.gate.clear()
    future = pair.batcher.submit([3])
    pair.super.wait_until_called()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        drained = pool.submit(pair.batcher.drain, 2.0)
        until(lambda: not pair.batcher._open)
        pair.clock.time += 2.1
        with pytest.raises(TimeoutError, match="1 requests have not ended within 2 s"):
            drained.result(LIMIT)
    pair.super.gate.set()
    assert_answers([3], future.result(LIMIT))


def test_close_ends_what_is_left_and_both_threads(pair):
    pair.super.gate.clear()
    with_super = pair.batcher.submit([3])
    pair.super.wait_until_called()
    pair.swift.gate.clear()
    with_swift = pair.batcher.submit([1])
    until(lambda: len(pair.swift.batches) == 2)
    waiting = pair.batcher.submit([2])
    pair.batcher.close(timeout=0.0)
    for future in (with_super, with_swift, waiting):
        with pytest.raises(Closed, match="the batcher was closed"):
            future.result(LIMIT)
    with pytest.raises(Closed, match="takes no more requests"):
        pair.batcher.submit([1])
    assert pair.batcher.stats.failed == 3
    pair.super.gate.set()
    pair.swift.gate.set()
    pair.batcher.close(timeout=LIMIT)
    assert not any(thread.is_alive() for thread in pair.batcher._threads)
    assert not pair.batcher.alive


def test_the_context_drains_and_an_error_in_it_closes():
    with FakePair() as pair:
        with pair.batcher as batcher:
            future = batcher.submit([3, 1])
        assert future.done()
        assert_answers([3, 1], future.result(0))
    with FakePair() as pair:
        pair.super.gate.clear()
        future = pair.batcher.submit([3])
        pair.super.wait_until_called()
        future.add_done_callback(lambda _: pair.super.gate.set())
        with pytest.raises(KeyError), pair.batcher:
            raise KeyError
        with pytest.raises(Closed):
            future.result(0)


def test_who_is_called_back_may_submit_and_close(pair):
    answers: list[Future] = []
    closed = threading.Event()

    def again(_: Future) -> None:
        answers.append(pair.batcher.submit([3]))
        answers[0].add_done_callback(close)

    def close(_: Future) -> None:
        pair.batcher.close()
        closed.set()

    pair.batcher.submit([1]).add_done_callback(again)
    assert closed.wait(LIMIT)
    assert_answers([3], answers[0].result(LIMIT))


# ---- asyncio


def test_tasks_and_threads_together(pair):
    async def client(row: int) -> None:
        assert_answers([row, row + 1], await pair.batcher.answer([row, row + 1]))

    async def serve() -> None:
        await asyncio.gather(*(client(row) for row in range(1, 200)))

    threads = [threading.Thread(target=asyncio.run, args=(serve(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for row in range(1, 200):
        assert_answers([row], pair.batcher.submit([row]).result(LIMIT))
    for thread in threads:
        thread.join(LIMIT)
    until(lambda: pair.batcher.stats.held == 0)
    assert pair.batcher.stats.rows == 2 * 2 * 199 + 199


def test_a_cancelled_task_cancels_its_request(pair):
    async def client() -> None:
        pair.super.gate.clear()
        task = asyncio.ensure_future(pair.batcher.answer([3]))
        await asyncio.to_thread(pair.super.wait_until_called)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pair.batcher.stats[4] == 1
        pair.super.gate.set()
        assert_answers([3, 1], await pair.batcher.answer([3, 1], deadline=5.0))

    asyncio.run(client())


# ---- the decision


def test_each_row_is_decided_by_one_threshold_while_it_moves():
    low, high, stop = 0.0, 20.0, threading.Event()
    with FakePair(clock=None) as pair:

        def move() -> None:
            while not stop.is_set():
                for threshold in (low, high):
                    pair.batcher.router.set_threshold(threshold)

        mover = threading.Thread(target=move)
        mover.start()
        rows, by = list(range(1, 300)), set()
        while len(by) < 2:
            answers = pair.batcher.submit(rows).result(LIMIT)
            wanted = [of_super(r) if a.model == "super" else of_swift(r) for r, a in zip(rows, answers, strict=True)]
            assert_same(answers, wanted)
            by |= {answer.model for answer in answers}
        stop.set()
        mover.join()
        for threshold, model in ((low, "swift"), (high, "super")):
            pair.batcher.router.set_threshold(threshold)
            assert {answer.model for answer in pair.batcher.submit(rows).result(LIMIT)} == {model}


def test_on_route_sees_every_batch_and_stops_none(caplog):
    seen = []

    def on_route(route) -> None:
        seen.append((len(route.score), int(route.n_routed)))
        raise ArithmeticError("miscounted")

    with FakePair(on_route=on_route) as pair, caplog.at_level(logging.ERROR):
        assert_answers([3, 1], pair.batcher.submit([3, 1]).result(LIMIT))
    assert seen == [(2, 1)]
    assert "miscounted" in caplog.text


def test_metrics_export_a_batcher(pair):
    client = pytest.importorskip("prometheus_client")
    from elang.prometheus import Metrics

    registry = client.CollectorRegistry()
    Metrics(registry).watch("pair", pair.batcher)
    pair.batcher.submit([3, 6, 1]).result(LIMIT)
    value = registry.get_sample_value
    assert value("elang_rows_total", {"model": "pair", "route": "super"}) == 2
    assert value("elang_rows_total", {"model": "pair", "route": "swift"}) == 1
    assert value("elang_super_bucket_total", {"model": "pair", "size": "2"}) == 1
    assert value("elang_threshold_info", {"model": "pair", "score": "energy"}) == fake_pair.THRESHOLD


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch: got 0, wanted a whole number >= 1"),
        ({"super_batch": 2.0}, r"super_batch: got 2\.0, wanted a whole number"),
        ({"queue_rows": True}, "queue_rows: got True, wanted a whole number"),
        ({"super_wait": -1e-3}, r"super_wait: got -0\.001, wanted a finite number of seconds >= 0"),
        ({"super_wait": float("inf")}, "super_wait: got inf"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FakePair(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dispatch": "bucket"}, "joint: got dispatch='bucket', wanted 'exact'"),
        ({"super_inputs": lambda inputs, rows: inputs}, "joint: got one with super_inputs, wanted super_rows"),
    ],
)
def test_joint_models_that_do_not_fit_are_refused(options, message):
    swift, super_ = fake_pair.swift_logits, fake_pair.super_logits
    joint = JointClassifier(swift, super_, Router(threshold=0.0), label_map={0: 0, 1: 1}, **options)
    with pytest.raises(ValueError, match=message):
        Batcher(joint, Ids())
    with pytest.raises(TypeError, match="joint: got function, wanted a JointClassifier"):
        Batcher(swift, Ids())


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ("text", {}, TypeError, "rows: got str, wanted a list of them"),
        ({1: 2}, {}, TypeError, "rows: got dict"),
        (iter([1]), {}, TypeError, "rows: got list_iterator"),
        ([1, "2"], {}, TypeError, r"rows\[1\]: got str, wanted an int"),
        ([1], {"deadline": 0.0}, ValueError, r"deadline: got 0\.0, wanted None or a finite number of seconds > 0"),
        ([1], {"deadline": float("nan")}, ValueError, "deadline: got nan"),
    ],
)
def test_bad_requests_are_refused_whole(pair, rows, options, error, message):
    with pytest.raises(error, match=message):
        pair.batcher.submit(rows, **options)
    assert pair.batcher.stats.held == 0
    assert_answers([1], pair.batcher.submit([1]).result(LIMIT))
    assert torch.is_grad_enabled()


def test_rows_that_super_cannot_be_given_are_refused_too(pair):
    class Even(Ids):
        def check(self, rows):
            if any(row % 2 for row in rows):
                raise ValueError("rows: got an odd one")

    with Batcher(pair.batcher.joint, Ids(), Even()) as batcher:
        with pytest.raises(ValueError, match="rows: got an odd one"):
            batcher.submit([6, 7])
        assert_answers([6, 8], batcher.submit([6, 8]).result(LIMIT))
    assert pair.swift.batches == [[6, 8]]
