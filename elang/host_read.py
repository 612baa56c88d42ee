"""What the host has to know to size Super's batch: the one place where it waits for the device.

On CUDA a kernel writes the answer to pinned host memory, where the host polls for it: it waits for what the stream has
queued so far, and for nothing queued behind it. `ELANG_HOST_READ=copy` copies it instead, which synchronises the
stream, and so does a platform without mapped memory.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elang import backend, ops

if TYPE_CHECKING:
    from elang._C import Mailbox

WAYS = ("mailbox", "copy")
TIMEOUT = 600.0  # seconds; a stream that fails or runs dry ends the wait at once

_thread = threading.local()


def way() -> str:
    """How counts come from a CUDA device, one of `WAYS`; `ELANG_HOST_READ` forces one."""
    asked = os.environ.get("ELANG_HOST_READ") or WAYS[0]
    if asked not in WAYS:
        raise ValueError(f"ELANG_HOST_READ: got {asked!r}, wanted one of {', '.join(WAYS)}")
    return asked


def _mailbox(device: torch.device) -> Mailbox | RuntimeError:
    """This thread's mailbox on the device, or why there can be none."""
    boxes: dict[torch.device, Mailbox | RuntimeError] = _thread.__dict__.setdefault("boxes", {})
    if device not in boxes:
        from elang._C import Mailbox

        chosen, why = backend.served("routed_extent", "cuda")
        try:
            if chosen != "cpp":
                raise RuntimeError(f"a mailbox needs the compiled kernels, but {chosen} serves: {why}")
            boxes[device] = Mailbox(str(backend.LIBRARY), device.index)
        except RuntimeError as error:
            boxes[device] = error
    return boxes[device]


def in_use(device: torch.device) -> str:
    """How counts come from this CUDA device, and why not by mailbox where they do not."""
    if way() == "copy":
        return "copy (ELANG_HOST_READ)"
    box = _mailbox(device)
    return f"copy ({box})" if isinstance(box, RuntimeError) else "mailbox"


def routed_extent(order: Tensor, n_routed: Tensor, mask: Tensor | None) -> tuple[int, int]:
    """How many rows are routed, and how long the longest of them is by `mask` [N, M] (0 without one).

    Synchronizes: yes; see above. CUDA graph: no.
    """
    box = _mailbox(n_routed.device) if n_routed.is_cuda and way() == "mailbox" else None
    if box is not None and not isinstance(box, RuntimeError):
        seen: tuple[int, int, bool, int, int, int] = (0, 1, False, 0, 0, 0)
        if mask is not None:
            row_stride, col_stride = mask.stride()
            is_float = mask.dtype.is_floating_point
            seen = (mask.data_ptr(), mask.element_size(), is_float, row_stride, col_stride, mask.shape[1])
        partition = (order.data_ptr(), order.stride(0), len(order), n_routed.data_ptr())
        return box.read(*seen, *partition, TIMEOUT)
    if mask is None or n_routed.is_cpu:
        count = int(n_routed)
        if mask is None or count == 0:
            return count, 0
    count, length = ops.routed_extent(mask, order, n_routed).tolist()
    return count, length
