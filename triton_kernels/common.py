"""What the Triton kernels share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETING = triton.knobs.runtime.interpret
# Whether the last program to arrive may read what the others wrote. On AMD a barrier does not wait for the stores of a
# program's other waves, which are then not part of what one wave releases: there a second launch reads it.
LAST_PROGRAM_READS = torch.version.hip is None
_INTERPRET = tl.constexpr(INTERPRETING)


@triton.jit
def dot(
    a,  # [M, K]
    b,  # [K, N]
    acc,  # [M, N] float32
):
    """acc + a @ b, products and sums in float32. Equal short dtypes take the matrix units, whose products are exact."""
    short: tl.constexpr = a.dtype == b.dtype and a.dtype != tl.float32
    # The interpreter multiplies bfloat16 as if its bits were integers.
    if short and not _INTERPRET:
        return tl.dot(a, b, acc)
    # A sum of its own for every block of columns: rounding grows with their number, not with that of the columns.
    return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


def is_short(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `dot` takes the matrix units for these."""
    return hidden.dtype == weight.dtype != torch.float32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int, most: int) -> int:
    """The power of two at or above n, within the two given."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    debug: bool = False,
    **constants: Any,
) -> None:
    """Runs `kernel` on the current device. `debug` keeps its device_assert, and no check of overflows with it."""
    options = {"num_warps": num_warps, "num_stages": num_stages, "debug": debug, "sanitize_overflow": False}
    # Asked for, since Triton's default is to change; nothing else of fast-math is.
    options["enable_fp_fusion"] = True
    kernel[grid](*args, **constants, **({} if INTERPRETING else options))
