"""Training in two processes of one thread each: threads of one process wait for each other on a busy machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from queue import Empty
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging


def prepared(console: Console) -> Progress:
    """The bars of a demo. From here on torch has one thread, which every time is measured on, transformers no word."""
    _one_quiet_thread()
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(SpinnerColumn(), *bar, console=console)


class Workers:
    """Two processes, of one thread each, whose progress is shown here."""

    def __init__(self, progress: Progress) -> None:
        context = multiprocessing.get_context("spawn")
        self._progress, self._reports = progress, context.Queue()
        self._pool = ProcessPoolExecutor(2, context, _start_worker, (self._reports,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, *jobs: tuple[Any, ...]) -> list[Any]:
        """Run jobs `(title, function, *args)` side by side and return what `function(report, *args)` returned."""
        futures: list[Future[Any]] = []
        for title, function, *args in jobs:
            futures.append(self._pool.submit(_work, self._progress.add_task(title, total=None), function, args))
        while not all(future.done() for future in futures):
            try:
                task, done, total = self._reports.get(timeout=0.2)
                self._progress.update(task, completed=done, total=total)
            except Empty:
                pass
        return [future.result() for future in futures]


def _start_worker(reports: Any) -> None:
    global _reports
    _reports = reports
    _one_quiet_thread()


def _one_quiet_thread() -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _work(task: int, function: Callable[..., Any], args: list[Any]) -> Any:
    return function(lambda done, total: _reports.put((task, done, total)), *args)


_reports: Any = None  # the queue to the parent, set in a worker
