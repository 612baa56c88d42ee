"""Collects what the benches measure into benches/results/<device>.json and prints it beside the bars."""

from __future__ import annotations

from importlib.util import find_spec

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
    for path in {report.results_file(bench) for bench in cells}:
        report.save({bench: rows for bench, rows in cells.items() if report.results_file(bench) == path}, path)
        print(f"\n\n{report.render(path) if find_spec('rich') else path}")


@pytest.fixture
def record(_cells, benchmark):
    """`record(bench, cell)` keeps a cell for the results file, and beside pytest-benchmark's own timing."""

    def keep(bench: str, cell: dict) -> None:
        benchmark.extra_info.update(cell)
        _cells.setdefault(bench, []).append(cell)

    return keep


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
