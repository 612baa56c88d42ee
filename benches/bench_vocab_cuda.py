"""`vocab_energy` on a GPU against its peers: the fastest of them, the matrix rate, memory bandwidth, errors.

Peers that are not installed are named in the results: `pip install --no-deps cut-cross-entropy liger-kernel
quack-kernels`. Those that compute a cross entropy give the logsumexp less the target's logit. Times are of graph
replays, but for peers that wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from measure_cuda import between_events, copy_bandwidth, in_graph
from torch import Tensor
from torch.nn.functional import linear

import elang

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
COLD_BYTES = 1 << 28  # of heads that take turns: more than a cache holds
WAITING = ("Liger",)  # peers that read something on the host, and so cannot be captured
TRUTH_ROWS = 128  # at a time, in float64


def energy(hidden: Tensor, weight: Tensor) -> Tensor:
    return elang.vocab_energy(hidden, weight).score


def chain(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.logsumexp(linear(hidden, weight), dim=1)


def cross_entropies(target: Tensor) -> dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]]:
    """Peers that answer with logsumexp - logit of the target; each an import, since it may fail."""

    def liger():
        f = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        return lambda hidden, weight: f(hidden, weight, target, reduction="none")

    def quack():
        f = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy_fwd
        return lambda hidden, weight: f(hidden, weight, target, need_dx=False, need_dw=False)[0]

    return {"Liger": liger, "quack": quack}


def cut_cross_entropy():
    f = import_module("cut_cross_entropy.cce_lse_forward").cce_lse_forward_kernel
    return lambda hidden, weight: f(hidden, weight)


def _on_set(run: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, heads: list[Tensor], i: int) -> Tensor:
    return run(hidden, heads[i % len(heads)])


def truth(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp [N] and the target's logit [N] in float64."""
    lse, logit, head = [], [], weight.double()
    for rows, targets in zip(hidden.split(TRUTH_ROWS), target.split(TRUTH_ROWS), strict=True):
        z = rows.double() @ head.t()
        lse.append(torch.logsumexp(z, dim=1))
        logit.append(z.gather(1, targets[:, None])[:, 0])
    return torch.cat(lse), torch.cat(logit)


def matrix_rate() -> float:
    """Multiply-adds per second of torch's own product of large bfloat16 matrices, twice that in FLOPs."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 8192**3 / in_graph({"mm": lambda i: a @ b}, rounds=5)["mm"]["p50"] * 1e6


@pytest.mark.parametrize(("width", "classes"), [(768, 30_522), (1024, 32_128), (4096, 128_256)])
@pytest.mark.parametrize("rows", [1, 16, 256, 4096])
@torch.inference_mode()
def test_vocab(benchmark, record, rows, width, classes):
    torch.manual_seed(0)
    make = {"device": DEVICE, "dtype": torch.bfloat16}
    hidden, target = torch.randn(rows, width, **make), torch.randint(classes, (rows,), device=DEVICE)
    sets = math.ceil(COLD_BYTES / (classes * width * 2))
    heads = [torch.randn(classes, width, **make) / width**0.5 for _ in range(sets)]
    torch.compiler.reset()
    peers: dict[str, Callable[[], Any]] = {
        "linear, logsumexp": lambda: chain,
        "torch.compile": lambda: torch.compile(chain, dynamic=False),
        "cut-cross-entropy": cut_cross_entropy,
        **cross_entropies(target),
    }
    lse, logit = truth(hidden, heads[0], target)
    microseconds, error, missing = {}, {}, {}
    for name, load in {"elang": lambda: energy, **peers}.items():
        try:
            run = load()
            wanted = lse - logit if name in cross_entropies(target) else lse
            error[name] = (run(hidden, heads[0]).double() - wanted).abs().max().item()
            at, rounds = partial(_on_set, run, hidden, heads), 20 if rows < 4096 else 5
            if name in WAITING:
                microseconds[f"{name} (eager)"] = between_events(at, rounds)
                error[f"{name} (eager)"] = error.pop(name)
            else:
                microseconds |= in_graph({name: at}, rounds)
        except Exception as why:  # a peer that is not there, or not for this GPU, is no reason to know nothing
            if name == "elang":
                raise
            error.pop(name, None)
            missing[name] = f"{type(why).__name__}: {why}".splitlines()[0][:200]
    seconds = microseconds["elang"]["p50"] / 1e6
    read = (rows * width + classes * width) * 2
    cell = {
        "rows": rows,
        "H": width,
        "C": classes,
        "dtype": "bfloat16",
        "microseconds": microseconds,
        "error": error,
        "missing": missing,
        "share_of_matrix_rate": rows * width * classes / seconds / matrix_rate(),
        "share_of_copy": read / seconds / copy_bandwidth(),
    }
    record("vocab_cuda", cell)
    benchmark.pedantic(energy, args=(hidden, heads[0]), rounds=5)
