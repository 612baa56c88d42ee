"""What a joint model has done, counted without waiting for a device."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Stats(NamedTuple):
    """Sums over all calls since the joint model was made."""

    rows: int  # that the router has seen
    routed: int  # of these, how many it sent to Super
    overflow: int  # of the routed, how many Super had no room for
    degraded: int  # of the routed, how many Swift answered, for want of room or since Super failed
    buckets: dict[int, int]  # rows of a batch of Super, padding included -> how many such; none inside a graph


class Counts(nn.Module):
    """Counts on the host what the host knows, and on the device what it does not.

    A module, so that its counter moves with the joint model. Threads may share it; where graphs or several streams
    count on the device, two at the same moment may count as one.
    """

    on_device: Tensor  # [4] int64: rows, routed, overflow, failed

    def __init__(self) -> None:
        super().__init__()
        with torch.inference_mode(False):  # it is written to later, in whatever mode
            self.register_buffer("on_device", torch.zeros(4, dtype=torch.int64), persistent=False)
        self._on_host = [0, 0, 0, 0]
        self._buckets = Counter[int]()
        self._batches_on_device: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self._lock = threading.Lock()

    def add(self, rows: int, routed: int, size: int) -> None:
        """Of a call whose count is on the host; `size` rows were or will be Super's batch."""
        with self._lock:
            self._on_host[0] += rows
            self._on_host[1] += routed
            if size:
                self._buckets[size] += 1

    def add_batch(self, size: int) -> None:
        """Of a call whose counts are on the device."""
        if size and not torch.compiler.is_compiling():
            with self._lock:
                self._buckets[size] += 1

    def batches_on_device(self, sizes: list[int]) -> Tensor:
        """[len(sizes)] int64, for graphs of these buckets to count up the batches of Super of each size."""
        key = self.on_device.device, tuple(sizes)
        with self._lock:
            if key not in self._batches_on_device:
                zeros = torch.zeros(len(sizes), dtype=torch.int64, device=self.on_device.device)
                self._batches_on_device[key] = zeros
            return self._batches_on_device[key]

    def add_failed(self, rows: int) -> None:
        with self._lock:
            self._on_host[3] += rows

    def add_on_device(self, rows: int, routed: Tensor, overflow: Tensor, failed: Tensor | None = None) -> None:
        """Of a call whose counts [1] int32 are on the device."""
        new = [torch.full_like(routed, rows), routed, overflow, torch.zeros_like(routed) if failed is None else failed]
        if torch.compiler.is_compiling():
            self.on_device.add_(torch.cat(new))
        else:
            with self._lock:
                self.on_device.add_(torch.cat(new))

    def read(self) -> Stats:
        """Synchronizes: yes, with the device of a joint model whose mode counts there."""
        with self._lock:
            on_host, on_device, buckets = list(self._on_host), self.on_device.clone(), self._buckets.copy()
            in_graphs = dict(self._batches_on_device)
        for (_, sizes), batches in in_graphs.items():
            buckets.update(dict(zip(sizes, batches.tolist(), strict=True)))
        rows, routed, overflow, failed = map(sum, zip(on_host, on_device.tolist(), strict=True))
        return Stats(rows, routed, overflow, overflow + failed, {size: n for size, n in sorted(buckets.items()) if n})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}  # a lock cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
