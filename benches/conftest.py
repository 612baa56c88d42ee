"""Collects what the benches measure into benches/results/<device>.json and prints it beside the bars."""

from __future__ import annotations

import pytest
import report
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _cells():
    cells: dict[str, list[dict]] = {}
    yield cells
    if cells:
        print(f"\n\n{report.render(report.save(cells))}")


@pytest.fixture
def record(_cells, benchmark):
    """`record(bench, cell)` keeps a cell for the results file, and beside pytest-benchmark's own timing."""

    def keep(bench: str, cell: dict) -> None:
        benchmark.extra_info.update(cell)
        _cells.setdefault(bench, []).append(cell)

    return keep
