"""`route` on a GPU: against the least its grid can take, against the chain it fuses, against memory bandwidth."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from bench_route import chain, static_chain
from measure_cuda import copy_bandwidth, in_graph, on_the_clock

import elang

pytestmark = pytest.mark.gpu

H = 768
THRESHOLD = 2.0
SETS = 8


@pytest.fixture(scope="session")
def skeleton(tmp_path_factory):
    """The function of skeleton.cu, built for this device; None without nvcc."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    library = tmp_path_factory.mktemp("skeleton") / "skeleton.so"
    source = Path(__file__).with_name("skeleton.cu")
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch={arch}", source, "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library)).skeleton


def blocks(rows: int, classes: int) -> int:
    """The grid of csrc/cuda/launch.cu while tiles are few: eight warps, a row each, or sharing a row's classes."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    class_warps = 1
    while class_warps < 8 and math.ceil(rows * class_warps / 8) < 2 * sms and class_warps * 4 < classes:
        class_warps *= 2
    return math.ceil(rows * class_warps / 8)


def bare(skeleton, hidden: list[torch.Tensor], classes: int):
    rows = len(hidden[0])
    order, ticket = (
        torch.empty(rows, dtype=torch.int64, device="cuda"),
        torch.zeros(1, dtype=torch.int32, device="cuda"),
    )
    sink, grid = torch.empty(16, dtype=torch.uint8, device="cuda"), blocks(rows, classes)
    pointer = ctypes.c_void_p

    def run(i: int) -> None:
        rows_of = hidden[i % SETS]
        error = skeleton(
            pointer(rows_of.data_ptr()), ctypes.c_int64(rows_of.numel() * rows_of.element_size()), grid,
            pointer(order.data_ptr()), ctypes.c_int64(rows), pointer(ticket.data_ptr()), pointer(sink.data_ptr()),
            pointer(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
        assert error == 0

    return run


@pytest.mark.parametrize("classes", [3, 32, 150])
@pytest.mark.parametrize("rows", [1, 8, 64, 256])
def test_route_latency(benchmark, record, skeleton, rows, classes):
    from elang.triton_kernels import route as triton_route

    weight = torch.randn(classes, H, dtype=torch.bfloat16, device="cuda") / H**0.5
    bias = torch.zeros(classes, dtype=torch.bfloat16, device="cuda")
    hidden = [torch.randn(rows, H, dtype=torch.bfloat16, device="cuda") for _ in range(SETS)]
    with torch.inference_mode():
        torch.compiler.reset()
        compiled = torch.compile(static_chain, dynamic=False)
        variants = {
            "elang": lambda i: elang.route(hidden[i % SETS], weight, bias, THRESHOLD),
            "static chain": lambda i: static_chain(hidden[i % SETS], weight, bias),
            "torch.compile": lambda i: compiled(hidden[i % SETS], weight, bias),
            "triton": lambda i: triton_route.route(hidden[i % SETS], weight, bias, THRESHOLD, 0, 1.0),
        }
        if skeleton:
            variants["skeleton"] = bare(skeleton, hidden, classes)
        graph = in_graph(variants)
        eager = {
            "chain": lambda: chain(hidden[0], weight, bias),
            "elang": lambda: elang.route(hidden[0], weight, bias, THRESHOLD),
        }
        cell = {"rows": rows, "H": H, "C": classes, "dtype": "bfloat16"}
        record("route_latency", {**cell, "in_graph": graph, "eager": on_the_clock(eager)})
        benchmark.pedantic(eager["elang"], rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("share_routed", [0.0, 0.01, 0.1, 0.32, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "classes"), [(4096, 3), (65_536, 3), (65_536, 20), (1 << 20, 3)])
def test_route_bandwidth(benchmark, record, rows, classes, share_routed):
    weight = torch.randn(classes, H, dtype=torch.bfloat16, device="cuda") / H**0.5
    sets = max(2, min(SETS, (1 << 28) // (rows * H * 2)))
    hidden = [torch.randn(rows, H, dtype=torch.bfloat16, device="cuda") for _ in range(sets)]
    score = elang.route(hidden[0], weight, None, 0.0).score.sort().values
    threshold = math.inf if share_routed == 1 else score[int(share_routed * rows)].item()

    def run(i: int) -> elang.Route:
        return elang.route(hidden[i % sets], weight, None, threshold)

    microseconds = in_graph({"elang": run}, rounds=20)["elang"]
    moved = rows * (H * 2 + classes * 2 + 4 + 8)  # hidden read; logits, score and order written
    ceiling = copy_bandwidth()
    cell = {
        "rows": rows,
        "H": H,
        "C": classes,
        "dtype": "bfloat16",
        "share_routed": share_routed,
        "microseconds": microseconds,
        "bytes": moved,
        "bytes_per_second": moved / microseconds["p50"] * 1e6,
        "copy_bytes_per_second": ceiling,
        "share_of_copy": moved / microseconds["p50"] * 1e6 / ceiling,
    }
    record("route_bandwidth", cell)
    benchmark.pedantic(run, args=(0,), rounds=5)
