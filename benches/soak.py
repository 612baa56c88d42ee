"""`make soak`: a million rows through the batcher and a hundred thousand through HTTP, and what became of each.

Every row is answered once, by the model that is due, whatever its client does: requests come in bursts, some are
cancelled, some have tight deadlines; for a part of the run the threshold moves, for another Super fails now and then.
Exits 1 if a row is lost, doubled, swapped or answered by the wrong model, or if memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout  # the built-in one from Python 3.11 on
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from ledger import Asked, Ledger, Part, parts_of, requests, slope
from rich.console import Console
from telling import MOST, MOVED, USUAL, Seen, telling_batcher, told
from wire import Client, Server, served, super_batches

from elang.progress import Report, bar, silent
from elang.serve import Answer, Batcher, Busy
from elang.serve.app import create_app

ROWS, HTTP_ROWS, CLIENTS = 1_000_000, 100_000, 32
BURSTS = (1, 1, 1, 8)  # requests that a client has under way at once
MEMORY_BAR = 2.0  # MiB for 100 000 rows: 21 bytes a row, less than any object
QUEUE_ROWS = {"batcher": 512, "HTTP": 256}  # few enough to refuse some
PATIENCE = 30.0  # seconds that a client waits for an answer
TOKEN = "a token"
AUTHORIZED = f"Authorization: Bearer {TOKEN}\r\n"


def soak_batcher(
    rows: int, clients: int = CLIENTS, patience: float = PATIENCE, report: Report = silent
) -> dict[str, Any]:
    """Threads ask a batcher whose Super, where it fails, fails the requests. Returns a cell of the results."""
    parts, seen, ledger = parts_of(rows), Seen(rows), Ledger(rows)
    batcher = telling_batcher(seen, parts[-1].rows, "raise", queue_rows=QUEUE_ROWS["batcher"])
    start = time.perf_counter()
    with _sampled(os.getpid(), ledger, partial(report, total=rows)) as samples, ThreadPoolExecutor(clients) as pool:
        try:
            for part in parts:
                with _moving(batcher) if part.moves else _still(batcher):
                    asking = [
                        pool.submit(_ask_batcher, batcher, part, client, clients, ledger, patience)
                        for client in range(clients)
                    ]
                    for done in asking:
                        done.result()
        finally:
            seconds = time.perf_counter() - start
            batcher.close(patience)
    stats = batcher.stats
    ledger.close(seen)
    # A request may be cancelled when the batcher has ended it, and the future not been told yet.
    counts = ledger.counts
    if (
        stats.held
        or stats.busy != counts["refused"]
        or not (stats.cancelled <= counts["cancelled"] and stats.failed >= counts["failed"])
    ):
        ledger.problems["booked otherwise by the batcher"] += 1
    batches = {"swift_batches": stats.swift_batches, "super_batches": stats.buckets}
    return _cell("batcher", clients, ledger, seconds, samples, batches)


def _ask_batcher(batcher: Batcher[str], part: Part, client: int, clients: int, ledger: Ledger, patience: float) -> None:
    chance, todo = random.Random(-client), requests(part, client, clients)
    while not ledger.broken:
        burst = list(islice(todo, chance.choice(BURSTS)))
        if not burst:
            return
        futures = [(asked, _submitted(batcher, asked, ledger, patience)) for asked in burst]
        for asked, future in futures:
            if asked.cancelled and future is not None:
                future.cancel()
        for asked, future in futures:
            if future is not None:
                _wait(asked, future, ledger, patience)


def _submitted(batcher: Batcher[str], asked: Asked, ledger: Ledger, patience: float) -> Future[list[Answer]] | None:
    ledger.asks(asked)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            return batcher.submit([str(row) for row in asked.rows], asked.deadline)
        except Busy:
            ledger.refused(asked)
            time.sleep(5e-3)
    ledger.gone()
    return None


def _wait(asked: Asked, future: Future[list[Answer]], ledger: Ledger, patience: float) -> None:
    try:
        answers = future.result(patience)
    except CancelledError:
        ledger.ends(asked, "cancelled", due=asked.cancelled)
    except FutureTimeout:
        ledger.gone()
    except Exception:
        ledger.ends(asked, "failed", due=asked.part.fails)
    else:
        ledger.answered(asked, [told(each.label, each.model, each.degraded, each.probabilities) for each in answers])


@contextmanager
def _still(batcher: Batcher[str]) -> Iterator[None]:
    batcher.router.set_threshold(USUAL)
    yield


@contextmanager
def _moving(batcher: Batcher[str]) -> Iterator[None]:
    end = threading.Event()

    def move() -> None:
        while not end.wait(2e-3):
            batcher.router.set_threshold(MOVED if batcher.router.threshold.item() == USUAL else USUAL)

    mover = threading.Thread(target=move)
    mover.start()
    try:
        yield
    finally:
        end.set()
        mover.join()
        batcher.router.set_threshold(USUAL)


def telling_service(seen: Seen, faulty: range) -> FastAPI:
    batcher = telling_batcher(seen, faulty, "swift", queue_rows=QUEUE_ROWS["HTTP"])
    return create_app(batcher, warm_up=["0"], token=TOKEN)


def soak_http(rows: int, clients: int = CLIENTS, patience: float = PATIENCE, report: Report = silent) -> dict[str, Any]:
    """Tasks ask a service, in another process, whose Super, where it fails, is stood in for by Swift."""
    parts, seen, ledger = parts_of(rows), Seen(rows), Ledger(rows)
    with (
        served(telling_service, seen, parts[-1].rows) as server,
        _sampled(server.pid, ledger, partial(report, total=rows)) as samples,
    ):
        start = time.perf_counter()
        asyncio.run(_ask_service(server, parts, clients, ledger, patience))
        seconds, batches = time.perf_counter() - start, super_batches(server.get("/metrics"))
    ledger.close(seen)
    return _cell("HTTP", clients, ledger, seconds, samples, {"super_batches": batches})


async def _ask_service(server: Server, parts: list[Part], clients: int, ledger: Ledger, patience: float) -> None:
    for part in parts:
        mover = asyncio.ensure_future(_move_over_http(server)) if part.moves else None
        tasks = [_ask_over_http(server, part, client, clients, ledger, patience) for client in range(clients)]
        try:
            await asyncio.gather(*tasks)
        finally:
            if mover is not None:
                mover.cancel()
                await asyncio.gather(mover, return_exceptions=True)
                async with Client(server.port) as client:
                    await _put_threshold(client, USUAL)


async def _move_over_http(server: Server) -> None:
    async with Client(server.port) as client:
        while True:
            for threshold in (MOVED, USUAL):
                await _put_threshold(client, threshold)
                await asyncio.sleep(0.01)


async def _put_threshold(client: Client, threshold: float) -> None:
    status, body = await client.request("PUT", "/threshold", json.dumps({"threshold": threshold}).encode(), AUTHORIZED)
    if status != 200:
        raise RuntimeError(f"PUT /threshold: got {status}, {body!r}")


async def _ask_over_http(
    server: Server, part: Part, number: int, clients: int, ledger: Ledger, patience: float
) -> None:
    chance = random.Random(-number)
    async with Client(server.port) as client:
        for asked in requests(part, number, clients):
            if ledger.broken:
                return
            ledger.asks(asked)
            body: dict[str, Any] = {"text": [str(row) for row in asked.rows]}
            if asked.deadline is not None:
                body["deadline_ms"] = 1e3 * asked.deadline
            try:
                await asyncio.wait_for(_settle(client, asked, json.dumps(body).encode(), ledger, chance), patience)
            except asyncio.TimeoutError:
                client.leave()
                ledger.gone()


async def _settle(client: Client, asked: Asked, body: bytes, ledger: Ledger, chance: random.Random) -> None:
    """Ask until there is room, or leave."""
    while True:
        await client.send("POST", "/classify", body)
        if asked.cancelled:
            await asyncio.sleep(chance.uniform(0, 5e-3))
            client.leave()
            ledger.ends(asked, "cancelled")
            return
        status, reply = await client.receive()
        if status == 503:
            ledger.refused(asked)
            await asyncio.sleep(5e-3)
            continue
        if status != 200:
            ledger.ends(asked, f"status {status}", due=False)
        else:
            answers = json.loads(reply)["answers"]
            ledger.answered(
                asked,
                [
                    told(each["label"], each["model"], each["degraded"], list(each["probabilities"].values()))
                    for each in answers
                ],
            )
        return


@contextmanager
def _sampled(pid: int, ledger: Ledger, report: Callable[[int], None]) -> Iterator[list[tuple[int, float]]]:
    """The resident memory of a process, (rows, MiB), about fifty times a second."""
    samples, end = list[tuple[int, float]](), threading.Event()

    def sample() -> None:
        while not end.wait(0.02):
            samples.append((ledger.ended, resident(pid)))
            report(ledger.ended)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield samples
    finally:
        end.set()
        sampler.join()


def resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _cell(
    way: str, clients: int, ledger: Ledger, seconds: float, samples: list[tuple[int, float]], batches: dict[str, Any]
) -> dict[str, Any]:
    return {
        "way": way,
        "clients": clients,
        "seconds": seconds,
        "counts": dict(ledger.counts),
        **batches,
        "memory": {"first": samples[0][1], "last": samples[-1][1], "slope": slope(samples), "bar": MEMORY_BAR},
        "problems": dict(ledger.problems),
    }


def wrong(cell: dict[str, Any]) -> list[str]:
    """What a run is to be failed for."""
    found, memory = [f"{cell['way']}: {count} x {name}" for name, count in cell["problems"].items()], cell["memory"]
    if not memory["slope"] <= memory["bar"]:
        found.append(f"{cell['way']}: memory grows by {memory['slope']:.1f} MiB for 100 000 rows")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"through the batcher; 0: none (default {ROWS})")
    parser.add_argument("--http-rows", type=int, default=HTTP_ROWS, help=f"through HTTP (default {HTTP_ROWS})")
    parser.add_argument("--clients", type=int, default=CLIENTS, help=f"threads, then tasks (default {CLIENTS})")
    parser.add_argument("--save", action="store_true", help="keep the results in benches/results/soak.json")
    given = parser.parse_args()
    if not (0 <= given.rows <= MOST and 0 <= given.http_rows <= MOST and given.clients > 0):
        parser.error(f"wanted up to {MOST} rows, and a client")
    torch.set_num_threads(1)
    logging.getLogger("elang").setLevel(logging.ERROR)  # Super's failures are wanted
    console, cells = Console(width=150), []
    for title, soak, rows in (("batcher", soak_batcher, given.rows), ("HTTP", soak_http, given.http_rows)):
        if rows:
            with bar(title) as shown:
                cells.append(soak(rows, given.clients, report=shown))
    import report  # not before: the tests of elang.report are a module of this name too

    if given.save:
        report.save({"soak": cells}, report.results_file("soak"), " ".join(["python", *sys.argv]))
    report.SECTIONS["soak"](console, cells)
    found = [line for cell in cells for line in wrong(cell)]
    console.print("\n".join(found) or "every row was answered once, by the model that was due; memory is flat")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
