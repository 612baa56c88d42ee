"""Choice and loading of a backend, each in a process of its own: it is settled when elang.ops is imported."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import elang
from elang import backend

ROUTE = "import torch, elang; print(elang.route_logits(torch.zeros(2, 3), 0.0).n_routed.item())"


def python(code: str, folder: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in `folder`, whose packages come first."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **env}, capture_output=True, text=True
    )


def test_reference_backend_passes_the_tests_of_the_ops():
    folder = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            folder / "test_route.py",
            folder / "test_rows.py",
            folder / "test_vocab.py",
            folder / "test_properties.py",
        ],
        env={**os.environ, "ELANG_BACKEND": "reference"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "ELANG_BACKEND=reference: about the compiled kernel" in done.stdout


@pytest.mark.parametrize(
    ("variable", "known"), [("ELANG_BACKEND", "cpp, triton, reference"), ("ELANG_ISA", "baseline, avx2")]
)
def test_an_unknown_setting_is_refused(variable, known):
    done = python(ROUTE, **{variable: "fast"})
    assert done.returncode != 0
    assert f"{variable}: got 'fast', wanted one of {known}" in done.stderr


def test_importing_elang_loads_neither_torch_nor_native_code():
    code = "import sys, elang; print({'torch', 'numpy', 'transformers', 'elang._C', 'elang.ops'} & set(sys.modules))"
    assert python(code).stdout.strip() == "set()"


def test_using_an_op_starts_no_cuda_context_and_imports_no_transformers():
    code = f"{ROUTE}; import sys; print(torch.cuda.is_initialized(), 'transformers' in sys.modules)"
    assert python(code).stdout.split() == ["0", "False", "False"]


@pytest.fixture
def broken_install(tmp_path):
    """A copy of the package whose ops library is not one."""
    shutil.copytree(
        Path(elang.__file__).parent, tmp_path / "elang", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (tmp_path / "elang" / "libelang_ops.so").write_text("not a library")
    return tmp_path


def test_a_library_that_does_not_load_says_why_on_first_use(broken_install):
    assert python("import elang, elang.ops; elang.Route", broken_install).returncode == 0
    for use in (ROUTE, "import elang; elang.warmup()"):
        done = python(use, broken_install)
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: elang's compiled ops did not load under torch")
        for part in ("libelang_ops.so", "ELANG_BACKEND=reference", "python -m elang.info"):
            assert part in last


def test_the_reference_needs_no_library(broken_install):
    assert python(ROUTE, broken_install, ELANG_BACKEND="reference").stdout.strip() == "0"


def test_info_reports_and_never_raises(broken_install):
    env = {"ELANG_BACKEND": "", "ELANG_ISA": ""}
    good = python("from elang.info import collect; import json; print(json.dumps(collect()))", **env)
    facts = json.loads(good.stdout)
    assert facts["elang"] == elang.__version__
    cpu, cuda = facts["op route"].split("; cuda: ")
    assert cpu == f"cpu: cpp, {backend.cpu_isa()} kernels (the default)"
    if torch.cuda.is_available() and backend.cuda_obstacle() is None:
        assert cuda == "cpp (the default)"
    elif torch.version.cuda is None:
        assert cuda == f"nothing (torch {torch.__version__} is built without a GPU)"
    assert "isa_levels baseline" in facts["build"]
    bad = python("import elang.info; elang.info.main()", broken_install)
    assert bad.returncode == 0, bad.stderr
    assert "op route" in bad.stdout
    assert "ImportError" in bad.stdout


OLD_DRIVER, NO_TRITON = "the driver is too old", "Triton is not installed"
# op, device, ELANG_BACKEND, what stands in the way of compiled CUDA and of Triton -> what serves, and why
CHOICES = [
    ("route", "cpu", None, None, None, "cpp", "the default"),
    ("route", "cpu", None, OLD_DRIVER, NO_TRITON, "cpp", "the default"),
    ("route", "cuda", None, None, None, "cpp", "the default"),
    ("route", "cuda", None, OLD_DRIVER, None, "triton", OLD_DRIVER),
    ("route", "cuda", None, OLD_DRIVER, NO_TRITON, "reference", f"{OLD_DRIVER}; {NO_TRITON}"),
    ("route", "cuda", "cpp", OLD_DRIVER, None, None, OLD_DRIVER),
    ("route", "cuda", "triton", None, None, "triton", "ELANG_BACKEND forces it"),
    ("route", "cuda", "triton", None, NO_TRITON, None, NO_TRITON),
    ("route", "cuda", "reference", None, None, "reference", "ELANG_BACKEND forces it"),
    ("vocab_energy", "cpu", None, None, None, "cpp", "the default"),
    ("vocab_energy", "cuda", None, None, None, "triton", "vocab_energy has no compiled CUDA kernel"),
    ("vocab_energy", "cuda", "cpp", None, None, None, "vocab_energy has no compiled CUDA kernel"),
]


@pytest.mark.parametrize("case", CHOICES, ids=lambda c: "-".join(str(part) for part in c[:3]))
def test_choice(case):
    *asked, serves, why = case
    assert backend.choose(*asked) == (serves, why)


def test_a_driver_older_than_the_build_is_an_obstacle(monkeypatch):
    """The one obstacle that only the driver tells, and without starting CUDA."""
    monkeypatch.setattr(backend, "_driver_version", lambda: 11)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    backend.cuda_build_obstacle.cache_clear()
    try:
        obstacle = backend.cuda_build_obstacle()
        built = importlib.import_module("elang._C").build_config()["cuda"]
        wanted = f"the driver is for CUDA 11, elang was built with CUDA {built}" if built else "built without CUDA"
        assert wanted in obstacle
    finally:
        backend.cuda_build_obstacle.cache_clear()


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        ("80-real 90-real 100-real 120", (8, 0), True),
        ("80-real 90-real 100-real 120", (8, 9), True),
        ("80-real 90-real 100-real 120", (7, 5), False),
        ("80-real 90-real 100-real 120", (11, 0), False),
        ("80-real 90-real 100-real 120", (12, 1), True),
        ("90-real", (10, 0), False),
        ("90", (10, 0), True),
        ("90a-real", (9, 0), True),
        ("100a", (10, 3), False),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_a_build_is_for(archs, capability, covered):
    assert backend._covers(archs, capability) == covered


def test_a_failure_for_want_of_kernels_is_explained(monkeypatch):
    class OnCuda(torch.Tensor):
        is_cuda = True

    tensor, serves = torch.ones(1).as_subclass(OnCuda), {"route": "cpp", "vocab_energy": "triton"}
    monkeypatch.setattr(backend, "cuda_obstacle", lambda: "it was built for 90")
    monkeypatch.setattr(backend, "served", lambda op, device: backend.Served(serves[op], ""))
    with pytest.raises(RuntimeError, match=r"cannot run: it was built for 90\. ELANG_BACKEND=triton"):
        backend.explain("route", tensor)
    backend.explain("route", torch.ones(1))
    backend.explain("vocab_energy", tensor)  # Triton's own error is the one to see


def test_what_cannot_serve_says_so_and_what_would():
    code = "import torch, elang; elang.vocab_energy(torch.zeros(2, 3), torch.zeros(4, 3))"
    done = python(code, ELANG_BACKEND="triton", TRITON_INTERPRET="")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "vocab_energy cannot run on cpu: Triton serves CPU tensors only under TRITON_INTERPRET=1" in last
    assert "ELANG_BACKEND=reference" in last


@pytest.mark.filterwarnings("error")
def test_plain_pytorch_on_a_gpu_warns_once():
    plain = backend._warned("route", OLD_DRIVER, lambda x: x + 1)
    with pytest.warns(RuntimeWarning, match=f"route runs in plain PyTorch on this GPU: {OLD_DRIVER}"):
        assert plain(1) == 2
    assert plain(2) == 3


def test_public_names_resolve():
    for name in elang.__all__:
        assert getattr(elang, name).__name__
    assert set(elang.__all__) <= set(dir(elang))
    with pytest.raises(AttributeError, match="no attribute 'rout'"):
        elang.rout  # noqa: B018
