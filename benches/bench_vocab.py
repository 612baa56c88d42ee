"""`vocab_energy` on the CPU against the product that makes the logits, and that with its logsumexp. Bars: report.py."""

from __future__ import annotations

import pytest
import torch
from measure import microseconds, peak_bytes

import elang

H, C = 512, 32_128  # T5-small's
SECONDS = 12.0  # of measuring per cell


@pytest.mark.parametrize("rows", [1, 16, 64, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_vocab(benchmark, record, rows, dtype):
    torch.set_num_threads(2)
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, H, dtype=dtype), torch.randn(C, H, dtype=dtype) / H**0.5
    linear = torch.nn.functional.linear
    with torch.inference_mode():
        variants = {
            "linear": lambda: linear(hidden, weight),
            "linear, logsumexp": lambda: torch.logsumexp(linear(hidden, weight), dim=1),
            "elang": lambda: elang.vocab_energy(hidden, weight),
        }
        cell = {
            "rows": rows,
            "H": H,
            "C": C,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "microseconds": microseconds(variants, SECONDS, burst=1),
            "logits_bytes": rows * C * dtype.itemsize,
            "peak_bytes": {name: peak_bytes(run) for name, run in variants.items()},
        }
        record("vocab", cell)
        benchmark.pedantic(variants["elang"], rounds=3, warmup_rounds=1)
