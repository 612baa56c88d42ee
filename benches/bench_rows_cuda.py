"""Row movement on a GPU against copy bandwidth, and the ways in which a count reaches the host."""

from __future__ import annotations

import pytest
import torch
from measure_cuda import copy_bandwidth, in_graph, on_the_clock

import elang
from elang import host_read, ops, reference

pytestmark = pytest.mark.gpu

SHARE_ROUTED = 0.32


def partition(rows: int, share_routed: float = SHARE_ROUTED) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return reference.partition(torch.rand(rows, device="cuda") >= share_routed)


@pytest.mark.parametrize("share_routed", [0.01, 0.1, 0.32, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "row_bytes"), [(64, 1024), (64, 1 << 20), (4096, 1 << 17), (65_536, 1 << 12)])
def test_gather_and_merge(benchmark, record, rows, row_bytes, share_routed):
    order, n_routed = partition(rows, share_routed)
    count = int(n_routed)
    kept = torch.randn(rows, row_bytes // 4, device="cuda")
    routed = torch.randn(max(count, 1), row_bytes // 4, device="cuda")
    variants = {
        "gather": lambda i: elang.gather_rows([kept], order, n_routed, count),
        "index_select": lambda i: kept.index_select(0, order[:count]),
        "merge": lambda i: elang.merge_rows(kept, routed, order, n_routed),
    }
    microseconds = in_graph(variants, rounds=20)
    ceiling = copy_bandwidth()
    moved = {"gather": 2 * count * row_bytes, "index_select": 2 * count * row_bytes, "merge": 2 * rows * row_bytes}
    cell = {
        "rows": rows,
        "row_bytes": row_bytes,
        "share_routed": share_routed,
        "microseconds": microseconds,
        "copy_bytes_per_second": ceiling,
        "share_of_copy": {n: moved[n] / microseconds[n]["p50"] * 1e6 / ceiling for n in variants},
    }
    record("rows", cell)
    benchmark.pedantic(variants["gather"], args=(0,), rounds=5)


@pytest.mark.parametrize("rows", [1, 16, 256])
def test_batch_of_inputs_in_one_launch(benchmark, record, rows):
    """What a dispatcher moves: ids, mask and types of 128 tokens."""
    from elang.triton_kernels import rows as triton_rows

    order, n_routed = partition(rows)
    tensors = [torch.ones(rows, 128, dtype=torch.int64, device="cuda") for _ in range(3)]
    count = max(int(n_routed), 1)
    variants = {
        "gather": lambda i: elang.gather_rows(tensors, order, n_routed, count),
        "triton": lambda i: triton_rows.gather_rows(tensors, order, n_routed, count),
        "index_select": lambda i: [t.index_select(0, order[:count]) for t in tensors],
    }
    record("batch", {"rows": rows, "microseconds": in_graph(variants)})
    benchmark.pedantic(variants["gather"], args=(0,), rounds=5)


@pytest.mark.parametrize("rows", [1, 16, 64, 256])
def test_host_read(benchmark, record, monkeypatch, rows):
    """From an idle device to a count on the host, the launch of what computes it included."""
    order, n_routed = partition(rows)
    mask = torch.ones(rows, 128, dtype=torch.int64, device="cuda")

    def mailbox() -> tuple[int, int]:
        monkeypatch.setenv("ELANG_HOST_READ", "mailbox")
        return host_read.routed_extent(order, n_routed, mask)

    def copy() -> tuple[int, int]:
        monkeypatch.setenv("ELANG_HOST_READ", "copy")
        return host_read.routed_extent(order, n_routed, mask)

    in_use = host_read.in_use(torch.device("cuda", 0))
    variants = {
        "mailbox": mailbox,
        "copy": copy,
        "item": n_routed.item,
        "extent": lambda: ops.routed_extent(mask, order, n_routed),
    }
    record("host_read", {"rows": rows, "in_use": in_use, "microseconds": on_the_clock(variants)})
    benchmark.pedantic(mailbox, rounds=20, warmup_rounds=3)
