from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elang import backend


def cuda_home() -> Path | None:
    """Where the CUDA toolkit is, as CMakeLists.txt looks for it."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    homes = [Path(home) for home in [*homes, "/usr/local/cuda"] if home]
    return next((home for home in homes if (home / "include" / "cuda_runtime_api.h").exists()), None)


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") == "1":
        _interpret_programs_in_random_order()


def _interpret_programs_in_random_order() -> None:
    """As a GPU may run them. In sequence, as the interpreter does by itself, the last program is always the last."""
    from triton.runtime.interpreter import interpreter_builder as builder

    shuffler, set_dim, set_idx, order = random.Random(0), builder.set_grid_dim, builder.set_grid_idx, []

    def set_grid_dim(x, *rest):
        order[:] = shuffler.sample(range(x), x)
        set_dim(x, *rest)

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, lambda x, *rest: set_idx(order[x], *rest)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that they wait longer for a second thread than they gain by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The tests of the ops need no transformers: these import it when a test asks for them.


@pytest.fixture(scope="module")
def swift():
    import tiny_models

    return tiny_models.classifier("DistilBert")


@pytest.fixture(scope="module")
def super_():
    import tiny_models

    return tiny_models.classifier("Bert", seed=1)


@pytest.fixture
def inputs():
    import tiny_models

    return tiny_models.inputs()


@pytest.fixture
def device(request):
    """Where a test's tensors are made: it runs once for each, `cpu_only` ones on the CPU alone."""
    if request.param != "cpu":
        torch.set_default_device(request.param)
    yield torch.device(request.param)
    torch.set_default_device(None)


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        gpu = (
            [] if metafunc.definition.get_closest_marker("cpu_only") else [pytest.param("cuda", marks=pytest.mark.gpu)]
        )
        metafunc.parametrize("device", ["cpu", *gpu], indirect=True)


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    no_cpu_kernel = pytest.mark.skip(reason="ELANG_BACKEND=triton: about the CPU kernel")
    no_kernel = pytest.mark.skip(reason="ELANG_BACKEND=reference: about the compiled kernel")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "cpu_only" in item.keywords and backend.FORCED == "triton":
            item.add_marker(no_cpu_kernel)
        if "compiled" in item.keywords and backend.FORCED == "reference":
            item.add_marker(no_kernel)


def on_default_device(value):
    """A test's table of arguments is made on the CPU: its tensors go where the test runs."""
    on_cpu = isinstance(value, torch.Tensor) and value.is_cpu
    return value.to(torch.get_default_device()) if on_cpu else value


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return (values.abs() * info.eps).clamp(min=info.tiny)


def assert_accurate(actual: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The error of `actual` against the float64 `truth` is at most twice that of same-dtype `eager`, plus 4 ulp."""
    assert actual.shape == truth.shape
    finite = truth.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    truth = truth[finite]
    if not truth.numel():
        return
    eager_error = (eager.double()[finite] - truth).abs().max()
    error = (actual.double()[finite] - truth).abs()
    allowed = 2 * eager_error + 4 * _ulp(truth, actual.dtype)
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), f"error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"


def assert_partition(route, threshold: float) -> None:
    """`order` and `n_routed` are exactly the stable partition that the returned scores ask for."""
    keep = route.score.isfinite() & (route.score >= torch.tensor(threshold, dtype=torch.float32))
    rows = torch.arange(len(keep))
    assert torch.equal(route.order, torch.cat([rows[~keep], rows[keep]]))
    assert route.n_routed.tolist() == [int((~keep).sum())]
    assert (route.order.dtype, route.n_routed.dtype) == (torch.int64, torch.int32)
