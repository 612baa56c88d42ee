"""A progress bar for what takes long, on a terminal; elsewhere silence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[int, int], None]  # so many done, of so many

PATIENCE = 2.0  # seconds without a bar


def silent(done: int, total: int) -> None:
    """Reports nothing."""


@contextmanager
def bar(title: str, shown: bool = True, console: Console | None = None) -> Iterator[Report]:
    """A `Report` that draws on stderr, if that is a terminal, once the work has taken `PATIENCE` seconds."""
    console = console or Console(stderr=True)
    if not (shown and console.is_terminal):
        yield silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    task, begun = progress.add_task(title, total=None), time.monotonic()

    def report(done: int, total: int) -> None:
        if time.monotonic() - begun > PATIENCE:
            progress.start()
        progress.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        progress.stop()
