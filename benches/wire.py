"""A service in a process of its own on loopback, and a client of HTTP that takes less time than the service does."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from transformers.utils import logging as transformers_logging

HOST = "127.0.0.1"
START, STOP = 120.0, 30.0  # seconds that a service has to become ready, and to end


class Server(NamedTuple):
    pid: int
    port: int

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=STOP) as reply:
            text: str = reply.read().decode()
            return text


@contextmanager
def served(app: Callable[..., FastAPI], *arguments: Any, core: int | None = None) -> Iterator[Server]:
    """`app(*arguments)` is made and served in a process of its own, one thread of torch, and one core if named."""
    with socket.create_server((HOST, 0), backlog=2048) as listening:
        process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(listening, core, app, arguments), daemon=True
        )
        process.start()
        assert process.pid is not None
        server = Server(process.pid, listening.getsockname()[1])
    try:
        end = time.monotonic() + START
        while not _ready(server):
            if time.monotonic() > end or not process.is_alive():
                raise RuntimeError(f"{app.__name__}: the service did not become ready (exit code {process.exitcode})")
            time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        process.join(STOP)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(listening: socket.socket, core: int | None, app: Callable[..., FastAPI], arguments: tuple[Any, ...]) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    # uvicorn ends by the signal that it was given: let the process end as any other does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("elang").setLevel(logging.ERROR)
    # A client may leave a connection idle for as long as a bench takes.
    config = uvicorn.Config(app(*arguments), log_level="error", access_log=False, timeout_keep_alive=3600)
    uvicorn.Server(config).run(sockets=[listening])


def _ready(server: Server) -> bool:
    try:
        server.get("/readyz")
    except (urllib.error.URLError, OSError):
        return False
    return True


class Client:
    """One connection at a time, kept alive. As much of HTTP/1.1 as uvicorn answers by."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Client:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()

    async def request(self, method: str, path: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
        """Status and body of the reply."""
        await self.send(method, path, body, headers)
        return await self.receive()

    async def send(self, method: str, path: str, body: bytes, headers: str = "") -> None:
        _, writer = await self._open()
        head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n{headers}\r\n".encode() + body)

    async def receive(self) -> tuple[int, bytes]:
        reader, _ = await self._open()
        status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        length = next(int(line.split(":")[1]) for line in fields if line.lower().startswith("content-length:"))
        return int(status.split()[1]), await reader.readexactly(length)

    def leave(self) -> None:
        """Close the connection, whatever the service may be doing; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self._port)
        return self._streams


def super_batches(metrics: str) -> dict[int, int]:
    """Rows of a batch of Super -> how many such there have been, of what `/metrics` says."""
    return {
        int(sample.labels["size"]): int(sample.value)
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "elang_super_bucket_total"
    }
