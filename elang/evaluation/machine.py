"""The machine that something is measured on: what is recorded of it, and the threads that it lends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Literal

import torch
from pydantic import Field

from elang import __version__
from elang.calibration.artefact import Artefact


class Measured(Artefact):
    """Where and how something was measured."""

    version: Literal[1] = 1
    device: str
    threads: int
    dtype: str
    rounds: int
    torch: str = str(torch.__version__)
    library: str = __version__  # of elang
    date: str = Field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))


def machine(device: torch.device, *dtypes: torch.dtype) -> dict[str, Any]:
    """Fields of `Measured`: the device's name, the threads that torch has now, the dtypes of what runs."""
    on_cpu = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "threads": torch.get_num_threads(),
        "dtype": ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes)),
    }


@contextmanager
def on_threads(threads: int | None) -> Iterator[None]:
    """torch has so many threads meanwhile; None: as many as it has.

    Raises:
        ValueError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}, wanted >= 1")
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
