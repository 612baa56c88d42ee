"""The soak of `make soak`, small: a service as it is passes, and what it is there to find is found."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from elang.serve.pair import Pair
from elang.serve.queues import Queues

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHES = Path(__file__).parents[2] / "benches"
ROWS, CLIENTS, PATIENCE = 3000, 8, 20.0


@pytest.fixture(scope="module")
def soak():
    """The module; its folder stays on the path no longer than these tests, as another `report` lies there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHES)
        yield importlib.import_module("soak")


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("elang").setLevel(logging.ERROR)
    yield
    logging.getLogger("elang").setLevel(logging.NOTSET)


# ---- a service as it is


def test_every_row_through_the_batcher(soak):
    cell = soak.soak_batcher(ROWS, CLIENTS, PATIENCE)
    counts = cell["counts"]
    assert cell["problems"] == {}
    assert counts["rows"] == ROWS
    assert sum(counts[how] for how in ("swift", "super", "degraded", "cancelled", "failed")) == ROWS
    # Everything that can happen does: of the rows 2551 to 3000 Super fails on 2997.
    assert min(counts[how] for how in ("swift", "super", "degraded", "cancelled", "failed")) > 0
    assert sum(int(size) * count for size, count in cell["super_batches"].items()) >= counts["super"]


def test_every_row_through_http(soak):
    cell = soak.soak_http(ROWS, CLIENTS, PATIENCE)
    counts = cell["counts"]
    assert cell["problems"] == {}
    assert counts["rows"] == ROWS
    assert sum(counts[how] for how in ("swift", "super", "degraded", "cancelled")) == ROWS
    assert min(counts[how] for how in ("swift", "super", "degraded", "cancelled")) > 0


def test_a_client_waits_where_there_is_no_room(soak, monkeypatch):
    monkeypatch.setattr(soak, "QUEUE_ROWS", {"batcher": 16})
    cell = soak.soak_batcher(ROWS, CLIENTS, PATIENCE)
    assert cell["problems"] == {}
    assert cell["counts"]["refused"] > 0


# ---- what it finds


def now_and_then(broken, sound):
    """A method that is broken at every fifth call: one alone may hit a cancelled request, or a batch of one row."""
    calls = itertools.count(1)

    def method(*arguments):
        return (broken if next(calls) % 5 == 0 else sound)(*arguments)

    return method


def test_a_lost_row(soak, monkeypatch):
    take = Queues.take
    monkeypatch.setattr(Queues, "take", now_and_then(lambda *given: take(*given)[:-1], take))
    cell = soak.soak_batcher(ROWS, CLIENTS, 0.5)
    assert cell["problems"]["lost"] > 0
    assert any("lost" in line for line in soak.wrong(cell))


def test_a_row_that_is_answered_twice(soak, monkeypatch):
    take = Queues.take

    def twice(*given):
        rows = take(*given)
        return [*rows, *rows[:1]]

    monkeypatch.setattr(Queues, "take", now_and_then(twice, take))
    assert soak.soak_batcher(ROWS, CLIENTS, PATIENCE)["problems"]["doubled"] > 0


def test_a_row_that_super_is_asked_twice(soak, monkeypatch):
    ask = Pair.ask_super

    def twice(pair, rows):
        ask(pair, rows)
        return ask(pair, rows)

    monkeypatch.setattr(Pair, "ask_super", now_and_then(twice, ask))
    assert soak.soak_batcher(ROWS, CLIENTS, PATIENCE)["problems"]["doubled"] > 0


def test_two_answers_that_are_swapped(soak, monkeypatch):
    ask = Pair.ask_super
    monkeypatch.setattr(Pair, "ask_super", now_and_then(lambda *given: ask(*given)[::-1], ask))
    assert soak.soak_batcher(ROWS, 32, PATIENCE)["problems"]["swapped"] > 0


def test_an_answer_by_the_wrong_model(soak, monkeypatch):
    decide = Pair.decide

    def otherwise(*given):
        return [verdict._replace(routed=not verdict.routed) for verdict in decide(*given)]

    monkeypatch.setattr(Pair, "decide", now_and_then(otherwise, decide))
    assert soak.soak_batcher(ROWS, CLIENTS, PATIENCE)["problems"]["not by the model that is due"] > 0


def test_an_error_that_nobody_asked_for(soak, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(Pair, "ask_super", now_and_then(fail, Pair.ask_super))
    assert soak.soak_batcher(ROWS, CLIENTS, PATIENCE)["problems"]["failed, and was not to be"] > 0


def test_memory_that_grows(soak):
    ledger = importlib.import_module("ledger")
    rows = np.linspace(0, 1e6, 50)
    warming = np.where(rows < 2e5, rows / 1e3, 200)  # MiB; a leap that is over in the first fifth
    samples = {leak: list(zip(rows.astype(int), warming + leak * rows / 1e5, strict=True)) for leak in (0.0, 1.9, 2.1)}
    for leak, pairs in samples.items():
        assert ledger.slope(pairs) == pytest.approx(leak, abs=1e-6)
    for leak, found in ((1.9, False), (2.1, True)):
        memory = {"slope": ledger.slope(samples[leak]), "bar": soak.MEMORY_BAR}
        assert bool(soak.wrong({"way": "batcher", "problems": {}, "memory": memory})) == found


def test_memory_is_what_the_system_says(soak):
    before = soak.resident(os.getpid())
    held = np.full(32 << 20, 1, dtype=np.uint8)
    assert soak.resident(os.getpid()) - before == pytest.approx(held.nbytes >> 20, abs=4)


# ---- an open loop


def test_requests_come_whether_or_not_others_are_answered(soak):
    """Nobody is answered before all have come, and everybody has waited since their own time."""
    arrivals = importlib.import_module("arrivals")
    count, came = 40, []

    async def serve(reader, writer):
        while not reader.at_eof():
            with suppress(asyncio.IncompleteReadError):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.split(b"Content-Length: ")[1].split()[0])
                came.append(json.loads(await reader.readexactly(length))["text"])
                if len(came) == count:
                    everybody.set()
                await everybody.wait()
                body = json.dumps({"label": came[-1]}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    async def main():
        nonlocal everybody
        everybody = asyncio.Event()
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await arrivals.open_loop(port, ["a", "b"], rate=200, seconds=count / 200, seed=0)

    everybody = None
    traffic = asyncio.run(main())
    assert (traffic.status == 200).all()
    assert sorted(came) == ["a"] * 20 + ["b"] * 20
    assert (traffic.late >= 0).all()
    # Answered together, they have waited the longer the earlier they were due.
    due = np.cumsum(np.diff(-traffic.latency))
    assert due[-1] > 0.5 * count / 200
    assert (traffic.latency >= traffic.late).all()


# ---- how it tells


def test_answers_tell_their_rows(soak):
    telling = importlib.import_module("telling")
    rows = [1, 2, 3, 2047, 2048, 2049, 4096, 999_999, 1_000_000, telling.MOST]
    seen = telling.Seen(telling.MOST)
    with telling.telling_batcher(seen, range(0), "raise") as batcher:
        for answer, row in zip(batcher.submit([str(row) for row in rows]).result(PATIENCE), rows, strict=True):
            by = "super" if row % 3 == 0 else "swift"
            assert telling.told(answer.label, answer.model, answer.degraded, answer.probabilities) == (
                row,
                by,
                by,
                False,
            )
    assert [seen["swift"][row] for row in rows] == [1] * len(rows)
    assert seen["super"].sum() == sum(row % 3 == 0 for row in rows)


@pytest.mark.parametrize(
    ("row", "model", "degraded", "moves", "fails", "hurried", "wrong"),
    [
        (3, "super", False, False, False, False, None),
        (3, "swift", False, False, False, False, "not by the model that is due"),
        (3, "swift", True, False, False, False, "not by the model that is due"),
        (3, "swift", True, False, False, True, None),
        (3, "swift", True, False, True, False, None),
        (4, "swift", False, False, False, False, None),
        (4, "super", False, False, False, True, "not by the model that is due"),
        (4, "super", False, True, False, False, None),
        (4, "swift", False, True, False, False, None),
        (5, "super", False, True, False, False, "not by the model that is due"),
        (5, "swift", True, True, True, True, "not by the model that is due"),
        (999, "super", False, False, True, False, "not by the model that is due"),
        (999, "super", False, False, False, False, None),
    ],
)
def test_what_is_due(soak, row, model, degraded, moves, fails, hurried, wrong):
    ledger, telling = map(importlib.import_module, ("ledger", "telling"))
    asked = ledger.Asked(ledger.Part("", range(1, 2000), moves, fails), range(row, row + 1), hurried or None, False)
    assert ledger.problem(row, telling.Told(row, model, model, degraded), asked) == wrong
    assert ledger.problem(row + 1, telling.Told(row, model, model, degraded), asked) == "swapped"
    other = {"swift": "super", "super": "swift"}[model]
    assert ledger.problem(row, telling.Told(row, other, model, degraded), asked) == "not by the model that is due"


def test_every_row_is_asked_for_now_and_then(soak):
    ledger = importlib.import_module("ledger")
    rows = [
        row
        for part in ledger.parts_of(1000)
        for client in range(7)
        for asked in ledger.requests(part, client, 7)
        for row in asked.rows
    ]
    assert rows == list(range(1, 1001))
