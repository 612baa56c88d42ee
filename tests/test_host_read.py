"""How the count reaches the host."""

from __future__ import annotations

import pytest
import torch

from elang import host_read, reference


def decided(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.partition(torch.arange(n) % 2 == 0)


MASK = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("way", host_read.WAYS)
@pytest.mark.usefixtures("device")
def test_both_ways_read_the_same(monkeypatch, way):
    monkeypatch.setenv("ELANG_HOST_READ", way)
    for dtype in (torch.int64, torch.bool, torch.bfloat16):
        assert host_read.routed_extent(*decided(), torch.tensor(MASK).to(dtype)) == (2, 3)
    assert host_read.routed_extent(*decided(), torch.tensor(MASK)[:, ::2]) == (2, 2)
    assert host_read.routed_extent(*decided(), None) == (2, 0)


def test_an_unknown_way_is_refused(monkeypatch):
    monkeypatch.setenv("ELANG_HOST_READ", "mail")
    with pytest.raises(ValueError, match="ELANG_HOST_READ: got 'mail', wanted one of mailbox, copy"):
        host_read.way()


@pytest.mark.compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a CUDA device")
def test_without_a_device_it_copies_and_says_why():
    assert host_read.in_use(torch.device("cuda", 0)).startswith("copy (")
    assert any(why in host_read.in_use(torch.device("cuda", 0)) for why in ("no NVIDIA driver", "without CUDA"))


@pytest.mark.gpu
@pytest.mark.compiled
def test_a_device_has_a_mailbox_for_each_thread():
    from concurrent.futures import ThreadPoolExecutor

    device = torch.device("cuda", 0)
    assert host_read.in_use(device) == "mailbox"

    def read(n: int) -> tuple[int, int]:
        with torch.cuda.stream(torch.cuda.Stream()):
            keep = torch.arange(40, device="cuda") >= n
            order, n_routed = reference.partition(keep)
            mask = torch.arange(50, device="cuda") < torch.arange(1, 41, device="cuda")[:, None]
            return host_read.routed_extent(order, n_routed, mask)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, [n % 41 for n in range(400)])) == [(n % 41, n % 41) for n in range(400)]


@pytest.mark.gpu
@pytest.mark.compiled
def test_a_capturing_stream_is_refused():
    order, n_routed = (t.cuda() for t in decided())
    host_read.routed_extent(order, n_routed, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="the stream is capturing a graph"):
        host_read.routed_extent(order, n_routed, None)
