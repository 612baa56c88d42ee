"""Swift and Super may fail in any way: who is concerned hears of it, nobody else does, and the next batch is served."""

from __future__ import annotations

import concurrent.futures
import random
import threading
from collections import Counter
from concurrent.futures import Future

import pytest
import torch
from fake_pair import (
    LIMIT,
    FakePair,
    assert_answers,
    assert_same,
    of_super,
    of_swift,
    routed,
    super_logits,
    swift_logits,
    until,
)
from torch import Tensor

from elang.serve import Answer, Closed

pytestmark = pytest.mark.usefixtures("one_thread")


def raises(ids: Tensor) -> Tensor:
    raise ConnectionError("the line is dead")


def out_of_memory(ids: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("no more")


FAULTS = {
    "raises": (raises, ConnectionError, "the line is dead"),
    "out of memory": (out_of_memory, torch.OutOfMemoryError, "no more"),
    "wrong shape": (lambda ids: torch.zeros(1, 5), ValueError, r"super_: got logits \[1, 5\] for 2 rows"),
    "wrong type": (lambda ids: {"answer": 1}, TypeError, r"wanted \.logits, a tensor"),
    "NaN": (lambda ids: torch.full((len(ids), 2), float("nan")), ValueError, "super_: got logits that are no numbers"),
    "infinite": (lambda ids: torch.tensor([[torch.inf, 0.0]] * len(ids)), ValueError, "no numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("policy", ["raise", "swift"])
def test_a_fault_of_super_is_dealt_with_as_asked_and_then_forgotten(fault, policy):
    broken, error, message = FAULTS[fault]
    with FakePair(on_super_error=policy) as pair:
        pair.super.fault = broken
        concerned = pair.batcher.submit([3, 1, 6])
        if policy == "raise":
            with pytest.raises(error, match=message):
                concerned.result(LIMIT)
        else:
            wanted = [of_swift(3, degraded=True), of_swift(1), of_swift(6, degraded=True)]
            assert_same(concerned.result(LIMIT), wanted)
        assert_answers([1, 2], pair.batcher.submit([1, 2]).result(LIMIT))
        pair.super.fault = None
        assert_answers([3, 1, 6], pair.batcher.submit([3, 1, 6]).result(LIMIT))
        stats = pair.batcher.stats
        assert (stats.failed, stats.degraded) == ((3, 0) if policy == "raise" else (0, 2))
        assert stats.held == 0


@pytest.mark.parametrize("policy", ["raise", "swift"])
def test_a_fault_meets_the_requests_of_its_batch_alone(policy):
    """One request fails in Super's first batch, one that waited is served by the second."""
    with FakePair(on_super_error=policy) as pair:
        pair.super.gate.clear()
        first = pair.batcher.submit([3])
        pair.super.wait_until_called()
        second = pair.batcher.submit([6, 1])
        until(lambda: pair.batcher.stats.routed_waiting == 1)
        calls = iter([raises])
        pair.super.fault = lambda ids: next(calls, super_logits)(ids)
        pair.super.gate.set()
        assert_answers([6, 1], second.result(LIMIT))
        if policy == "raise":
            with pytest.raises(ConnectionError):
                first.result(LIMIT)
        else:
            assert_same(first.result(LIMIT), [of_swift(3, degraded=True)])


@pytest.mark.parametrize("policy", ["raise", "swift"])
def test_logits_that_are_no_numbers_concern_their_own_rows(policy):
    with FakePair(on_super_error=policy) as pair:
        pair.swift.gate.clear()
        first = pair.batcher.submit([1])
        pair.swift.wait_until_called()
        sick, healthy = pair.batcher.submit([3, 6]), pair.batcher.submit([9])
        pair.super.fault = lambda ids: torch.where((ids == 6)[:, None], torch.nan, super_logits(ids))
        pair.swift.gate.set()
        assert_answers([9], healthy.result(LIMIT))
        assert_answers([1], first.result(LIMIT))
        assert pair.super.batches == [[3, 6, 9]]
        if policy == "raise":
            with pytest.raises(ValueError, match="no numbers"):
                sick.result(LIMIT)
        else:
            assert_same(sick.result(LIMIT), [of_super(3), of_swift(6, degraded=True)])


def test_out_of_memory_is_tried_once_more_in_halves():
    def short_of_memory(ids: Tensor) -> Tensor:
        return out_of_memory(ids) if len(ids) > 2 else super_logits(ids)

    with FakePair() as pair:
        pair.super.fault = short_of_memory
        assert_answers([3, 6, 9, 12], pair.batcher.submit([3, 6, 9, 12]).result(LIMIT))
        assert pair.super.batches == [[3, 6, 9, 12], [3, 6], [9, 12]]


@pytest.mark.parametrize("policy", ["raise", "swift"])
def test_a_super_that_hangs_is_left_behind(policy):
    with FakePair(on_super_error=policy, super_timeout=0.05) as pair:
        pair.super.gate.clear()
        hung = pair.batcher.submit([3])
        if policy == "raise":
            with pytest.raises(TimeoutError, match=r"super_: no answer within 0\.05 s"):
                hung.result(LIMIT)
        else:
            assert_same(hung.result(LIMIT), [of_swift(3, degraded=True)])
        pair.super.gate.set()  # the call that was left behind returns, unheard, and the next ones are made
    with FakePair(on_super_error=policy, super_timeout=LIMIT) as pair:
        assert_answers([3, 1], pair.batcher.submit([3, 1]).result(LIMIT))


def test_after_a_hang_the_next_call_is_made():
    with FakePair(super_timeout=0.05) as pair:
        held = threading.Event()
        calls = iter([lambda ids: held.wait(LIMIT)])
        pair.super.fault = lambda ids: next(calls, super_logits)(ids)
        with pytest.raises(TimeoutError):
            pair.batcher.submit([3]).result(LIMIT)
        pair.super.fault = None
        until(lambda: _answered(pair))
        held.set()


def _answered(pair: FakePair) -> bool:
    """Whether this call was made in time, which a busy machine may prevent."""
    try:
        assert_answers([6], pair.batcher.submit([6]).result(LIMIT))
    except TimeoutError:
        return False
    return True


def test_a_row_of_which_swift_has_no_answer_has_supers_or_none():
    """Its score is NaN, so it is routed; there is nothing to fall back on, at its deadline or where Super fails."""
    with FakePair(on_super_error="swift") as pair:
        pair.swift.fault = lambda ids: torch.full((len(ids), 2), float("nan"))
        pair.super.gate.clear()
        future = pair.batcher.submit([4], deadline=0.05)
        pair.super.wait_until_called()
        pair.clock.time += 1.0
        pair.super.gate.set()
        (answer,) = future.result(LIMIT)
        assert (answer.model, answer.degraded) == ("super", False)
        pair.super.fault = raises
        with pytest.raises(ConnectionError):
            pair.batcher.submit([4]).result(LIMIT)


def test_where_swift_fails_on_a_row_only_its_request_does():
    def refuses_5(ids: Tensor) -> Tensor:
        if 5 in ids:
            raise IndexError("5 is no token")
        return pair.swift.logits(ids)

    with FakePair() as pair:
        pair.swift.gate.clear()
        pair.swift.fault = refuses_5
        futures = {rows: pair.batcher.submit(list(rows)) for rows in [(1,), (2, 3), (4, 5), (6, 7)]}
        pair.swift.wait_until_called()
        pair.swift.gate.set()
        with pytest.raises(IndexError, match="5 is no token"):
            futures.pop((4, 5)).result(LIMIT)
        for rows, future in futures.items():
            assert_answers(rows, future.result(LIMIT))
        assert_answers([1, 3], pair.batcher.submit([1, 3]).result(LIMIT))
        stats = pair.batcher.stats
        assert (stats.failed, stats.held, stats.degraded) == (2, 0, 0)


def test_swift_of_the_wrong_shape_is_named():
    with FakePair() as pair:
        pair.swift.fault = lambda ids: torch.zeros(len(ids) + 1, 2)
        with pytest.raises(ValueError, match=r"swift: got logits \[3, 2\], wanted \[2, 2\]"):
            pair.batcher.submit([1, 2]).result(LIMIT)


@pytest.mark.parametrize("policy", ["raise", "swift"])
def test_in_a_storm_of_faults_deadlines_and_cancellations_every_request_ends_with_its_own(policy):
    poison = 4001  # Swift fails on it
    dice = random.Random(0)  # of Super's thread alone

    def swift(ids: Tensor) -> Tensor:
        if poison in ids:
            raise IndexError("poison")
        return swift_logits(ids)

    def super_(ids: Tensor) -> Tensor:
        luck = dice.random()
        if luck < 0.2:
            raises(ids)
        return torch.where((ids % 5 == 0)[:, None], torch.nan, super_logits(ids)) if luck < 0.4 else super_logits(ids)

    def client(seed: int, pair: FakePair) -> list[tuple[list[int], Future[list[Answer]]]]:
        rng, requests = random.Random(seed), []
        for _ in range(80):
            rows = rng.sample(range(1, 4000), rng.randint(1, 9)) + [poison] * (rng.random() < 0.1)
            requests.append((rows, pair.batcher.submit(rows, rng.choice([None, 1e-4, 1e-3, 1e-2]))))
            if rng.random() < 0.2:
                rng.choice(requests)[1].cancel()
            if rng.random() < 0.2:
                concurrent.futures.wait([rng.choice(requests)[1]], LIMIT)
        return requests

    with FakePair(on_super_error=policy, clock=None, queue_rows=10**4, super_batch=5) as pair:
        pair.swift.fault, pair.super.fault = swift, super_
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(client, seed, pair) for seed in range(8)]
            requests = [request for client in clients for request in client.result(LIMIT)]
        pair.batcher.drain(LIMIT)
        stats = pair.batcher.stats
    assert stats.held == stats.waiting == stats.routed_waiting == 0
    ends = Counter[str]()
    for rows, future in requests:
        assert future.done()
        if future.cancelled():
            ends["cancelled"] += 1
        elif error := future.exception():
            assert poison in rows if isinstance(error, IndexError) else policy == "raise"
            ends[type(error).__name__] += 1
        else:
            answers = future.result()
            due = [
                of_super(r) if a.model == "super" else of_swift(r, degraded=routed(r))
                for r, a in zip(rows, answers, strict=True)
            ]
            assert_same(answers, due)
            ends["degraded" if any(answer.degraded for answer in answers) else "answered"] += 1
    faults = {"IndexError"} if policy == "swift" else {"IndexError", "ConnectionError", "ValueError"}
    assert set(ends) == {"cancelled", "answered", "degraded"} | faults


@pytest.mark.parametrize("name", ["take", "take_super", "decided", "answered"])
def test_a_batcher_that_fails_itself_leaves_nobody_waiting(name, monkeypatch, caplog):
    def bug(*_: object) -> None:
        raise ArithmeticError("a bug")

    with FakePair() as pair:
        monkeypatch.setattr(pair.batcher._queues, name, bug)
        with pytest.raises(ArithmeticError, match="a bug"):
            pair.batcher.submit([3, 1]).result(LIMIT)
        with pytest.raises(Closed):
            pair.batcher.submit([1])
    assert "the batcher stops" in caplog.text


def test_an_error_that_a_client_keeps_keeps_no_batch():
    with FakePair() as pair:
        pair.super.fault = raises
        with pytest.raises(ConnectionError) as caught:
            pair.batcher.submit([3]).result(LIMIT)
    traceback, held = caught.value.__traceback__, []
    while traceback is not None:
        held += [name for name, value in traceback.tb_frame.f_locals.items() if isinstance(value, Tensor)]
        traceback = traceback.tb_next
    assert held == []
