"""What is shipped: the sdist builds, the wheel holds elang alone, the ops library keeps to torch's stable ABI."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import cuda_home

import elang
from elang._C import build_config

ROOT = Path(__file__).parent.parent
OPS_LIBRARY = Path(elang.__file__).parent / "libelang_ops.so"


def run(*command: object, **kwargs) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def with_build_tools() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the sdist, so that nothing the build needs can be missing from it; for one GPU, to be quick."""
    out = tmp_path_factory.mktemp("dist")
    env = {**with_build_tools(), "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", out, ROOT, env=env)
    (sdist,) = out.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, sdist, env=env, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_elang_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"elang", f"elang-{elang.__version__}.dist-info"}
    for wanted in ("libelang_ops.so", "py.typed", "triton_kernels/__init__.py", "demo/__init__.py", "report/page.html"):
        assert f"elang/{wanted}" in names
    assert not any(name.endswith((".cpp", ".h", ".cu", ".cuh")) for name in names)


def test_wheel_runs_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    before = {p.name for p in site.iterdir()}
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    assert {p.name for p in site.iterdir()} - before == {"elang", f"elang-{elang.__version__}.dist-info"}
    # Without torch: the package, the build report and the info page.
    config = run(python, "-c", "import elang._C; print(elang._C.build_config())", cwd=tmp_path)
    assert "isa_levels" in config
    assert ("'cuda_archs': '90'" if cuda_home() else "'cuda_archs': ''") in config
    assert "not installed" in run(python, "-m", "elang.info", cwd=tmp_path)
    # With the torch of this environment behind it.
    code = "import torch, elang; print(elang.__file__, elang.route_logits(torch.zeros(2, 3), 9.0).n_routed.item())"
    env = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{sysconfig.get_path('purelib')}"}
    file, n_routed = run(python, "-c", code, cwd=tmp_path, env=env).split()
    assert Path(file).is_relative_to(site)
    assert n_routed == "2"


def test_ops_library_keeps_to_the_stable_abi():
    symbols = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", OPS_LIBRARY).splitlines()]
    demangled = run("c++filt", *symbols)
    assert not re.search(r"\b(at|c10|torch)::", demangled), "a C++ symbol of torch"
    shim = {s.split("@")[0] for s in symbols if s.startswith(("aoti_torch_", "torch_"))}
    assert shim, "nothing of torch at all"
    headers = Path(
        run(sys.executable, "-c", "import importlib.util as u; print(u.find_spec('torch').origin)").strip()
    ).parent
    for header in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h"):
        newer = newer_than_2_10(headers / "include/torch/csrc" / header)
        assert newer, "the header was read wrongly"
        assert not shim & newer


def test_the_library_needs_no_cuda_library():
    """One file for every torch: the CUDA runtime is inside, torch's CUDA library is looked up when it is there."""
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", OPS_LIBRARY))
    assert not [name for name in needed if "cuda" in name or "c10" in name]


@pytest.mark.skipif(cuda_home() is None, reason="no CUDA toolkit")
def test_the_build_can_leave_cuda_out_and_says_so(tmp_path):
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"]
    assert "CUDA kernels: not built, ELANG_CUDA=0" in run(*configure, env={**with_build_tools(), "ELANG_CUDA": "0"})
    assert "csrc/cuda" not in (tmp_path / "build" / "build.ninja").read_text()


@pytest.mark.skipif(cuda_home() is None, reason="no CUDA toolkit")
def test_an_architecture_that_is_none_is_refused(tmp_path):
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"]
    env = {**with_build_tools(), "TORCH_CUDA_ARCH_LIST": "8.0;hopper"}
    done = subprocess.run([str(word) for word in configure], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST: got 'hopper', wanted entries like 8.0" in done.stderr


def newer_than_2_10(header: Path) -> set[str]:
    """Functions that the stable shim declares for versions after 2.10 only."""
    names, newer, depth = set(), False, 0
    for line in header.read_text().splitlines():
        if re.match(r"#if", line):
            depth += 1
            if version := re.match(r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)_0", line):
                newer, outer = int(version[1]) > 10, depth
        elif line.startswith("#endif"):
            if newer and depth == outer:
                newer = False
            depth -= 1
        elif newer:
            names |= set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", line))
    return names


def test_ops_library_exports_its_c_abi_alone():
    exported = run("nm", "-D", "--defined-only", OPS_LIBRARY)
    functions = {"elang_cpu_isa"}
    if build_config()["cuda_archs"]:
        functions |= {"elang_cuda_obstacle", *(f"elang_mailbox_{what}" for what in ("new", "read", "delete"))}
        functions |= {f"elang_graph_{what}" for what in ("nodes", "new", "launch", "delete")}
    assert set(re.findall(r" T (\w+)", exported)) == functions
    assert "RPATH" not in run("readelf", "-d", OPS_LIBRARY).replace("RUNPATH", "RPATH")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86-64's wide registers")
def test_wide_instructions_stay_in_their_own_functions():
    """The linker merges equal inline functions: one compiled for AVX-512 must never serve a machine without it."""
    wide, function = set(), ""
    for line in run("objdump", "-d", "--no-show-raw-insn", OPS_LIBRARY).splitlines():
        if label := re.match(r"[0-9a-f]+ <(.*)>:", line):
            function = label[1]
        elif re.search(r"%[yz]mm", line):
            wide.add(function)
    assert any("6avx512" in f for f in wide)
    assert [f for f in wide if "6avx512" not in f and "4avx2" not in f] == []
