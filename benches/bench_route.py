"""`route` against the chain it fuses: linear, logsumexp, comparison, nonzero. Bars: report.py."""

from __future__ import annotations

import pytest
import torch
from measure import allocations, microseconds

import elang

HEADS = [(312, 2), (768, 3), (1024, 20), (768, 150)]  # (H, C)
SECONDS = 1.5  # of measuring per cell
THRESHOLD = 2.0


def chain(hidden, weight, bias):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    score = torch.logsumexp(logits, dim=1)
    return logits, score, torch.lt(score, THRESHOLD).nonzero()


def static_chain(hidden, weight, bias):
    """The chain with a result of fixed size, as torch.compile and CUDA graphs want it."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    score = torch.logsumexp(logits, dim=1)
    return logits, score, torch.nonzero_static(torch.lt(score, THRESHOLD), size=hidden.shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 8, 64, 512])
@pytest.mark.parametrize(("width", "classes"), HEADS)
def test_route(benchmark, record, rows, width, classes, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, width, dtype=dtype), torch.randn(classes, width, dtype=dtype) / width**0.5
    bias = torch.zeros(classes, dtype=dtype)
    torch.compiler.reset()
    compiled = torch.compile(static_chain, dynamic=False)
    with torch.inference_mode():
        variants = {
            "eager": lambda: chain(hidden, weight, bias),
            "torch.compile": lambda: compiled(hidden, weight, bias),
            "elang": lambda: elang.route(hidden, weight, bias, THRESHOLD),
        }
        cell = {
            "rows": rows,
            "H": width,
            "C": classes,
            "dtype": str(dtype).removeprefix("torch."),
            "microseconds": microseconds(variants, SECONDS),
            "allocations": {name: allocations(run) for name, run in variants.items()},
        }
        record("route", cell)
        benchmark.pedantic(variants["elang"], rounds=50, warmup_rounds=5)
