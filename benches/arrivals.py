"""Requests that come at their own times, however long a service takes: an open loop, of Poisson arrivals."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from wire import Client

GRACE = 5.0  # seconds after the last arrival in which answers are still waited for
CONNECTIONS = 256
SPIN = 2e-3  # seconds before an arrival from which on the clock is watched: asyncio sleeps by the millisecond
NONE = 0  # the status of a request without an answer


@dataclass
class Traffic:
    """What came of N requests. Latencies count from when a request was to be sent, whenever it was."""

    rows: NDArray[np.int64]  # [N]: which text
    late: NDArray[np.float64]  # [N] seconds: of the sending
    latency: NDArray[np.float64]  # [N] seconds; without an answer, how long it has been waited for
    status: NDArray[np.int64]  # [N]
    labels: list[str]  # N; "": not answered
    seconds: float  # from the first arrival to the last answer


async def open_loop(port: int, texts: Sequence[str], rate: float, seconds: float, seed: int) -> Traffic:
    """`rate * seconds` requests of one text each, every text as often as every other."""
    chance, count = np.random.default_rng(seed), max(2, round(rate * seconds))
    rounds = -(-count // len(texts))
    rows = np.concatenate([chance.permutation(len(texts)) for _ in range(rounds)])[:count]
    bodies = [json.dumps({"text": texts[row]}).encode() for row in rows]
    late, latency, status = np.zeros(count), np.zeros(count), np.full(count, NONE)
    labels, idle, free = [""] * count, list[Client](), asyncio.Semaphore(CONNECTIONS)
    # A Poisson process of so many arrivals: given their number, they are anywhere, independently of each other.
    due = time.perf_counter() + 0.1 + np.sort(chance.uniform(0, seconds, count))

    async def ask(i: int) -> None:
        async with free:
            client = idle.pop() if idle else Client(port)
            try:
                late[i] = time.perf_counter() - due[i]
                status[i], reply = await client.request("POST", "/classify", bodies[i])
                latency[i] = time.perf_counter() - due[i]
            except asyncio.CancelledError:
                client.leave()
                raise
            idle.append(client)
        if status[i] == 200:
            said = json.loads(reply)
            labels[i] = said["answers"][0]["label"] if "answers" in said else said["label"]

    tasks = []
    for i in range(count):
        if (wait := due[i] - time.perf_counter()) > SPIN:
            await asyncio.sleep(wait - SPIN)
        while time.perf_counter() < due[i]:
            await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(ask(i)))
    _, unanswered = await asyncio.wait(tasks, timeout=GRACE)
    latency = np.where(status == NONE, time.perf_counter() - due, latency)
    for task in unanswered:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
    for client in idle:
        client.leave()
    return Traffic(rows, late, latency, status, labels, float((due + latency)[status != NONE].max() - due[0]))


async def closed_loop(port: int, texts: Sequence[str], seconds: float, clients: int) -> float:
    """Answers per second to so many clients, each of which asks again when it is answered."""
    end, answered = time.perf_counter() + seconds, 0

    async def ask(first: int) -> None:
        nonlocal answered
        async with Client(port) as client:
            row = first
            while True:
                body = json.dumps({"text": texts[row % len(texts)]}).encode()
                status, reply = await client.request("POST", "/classify", body)
                if status != 200:
                    raise RuntimeError(f"POST /classify: got {status}, {reply!r}")
                if time.perf_counter() > end:
                    return
                answered, row = answered + 1, row + clients

    await asyncio.gather(*(ask(first) for first in range(clients)))
    return answered / seconds
