"""Choice and loading of a backend, each in a process of its own: it is settled when elang.ops is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import elang
import elang.ops

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
            folder / "test_properties.py",
        ],
        env={**os.environ, "ELANG_BACKEND": "reference"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "ELANG_BACKEND=reference: about the compiled kernel" in done.stdout


@pytest.mark.parametrize(("variable", "known"), [("ELANG_BACKEND", "cpp, reference"), ("ELANG_ISA", "baseline, avx2")])
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
    cuda = elang.ops.cuda_obstacle()
    cuda = "compiled kernels" if cuda is None else f"none, {cuda}"
    assert facts["op route"] == f"cpu: cpp, {elang.ops.cpu_isa()} kernels (the default); cuda: {cuda}"
    assert "isa_levels baseline" in facts["build"]
    bad = python("import elang.info; elang.info.main()", broken_install)
    assert bad.returncode == 0, bad.stderr
    assert "op route" in bad.stdout
    assert "ImportError" in bad.stdout


def test_public_names_resolve():
    for name in elang.__all__:
        assert getattr(elang, name).__name__
    assert set(elang.__all__) <= set(dir(elang))
    with pytest.raises(AttributeError, match="no attribute 'rout'"):
        elang.rout  # noqa: B018
