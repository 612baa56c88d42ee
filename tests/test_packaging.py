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

import elang

ROOT = Path(__file__).parent.parent
OPS_LIBRARY = Path(elang.__file__).parent / "libelang_ops.so"


def run(*command: object, **kwargs) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the sdist, so that nothing the build needs can be missing from it."""
    out = tmp_path_factory.mktemp("dist")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", out, ROOT, env=env)
    (sdist,) = out.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, sdist, env=env, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_elang_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"elang", f"elang-{elang.__version__}.dist-info"}
    for wanted in ("libelang_ops.so", "py.typed", "triton_kernels/__init__.py", "demo/__init__.py"):
        assert f"elang/{wanted}" in names
    assert not any(name.endswith((".cpp", ".h")) for name in names)


def test_wheel_runs_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    before = {p.name for p in site.iterdir()}
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    assert {p.name for p in site.iterdir()} - before == {"elang", f"elang-{elang.__version__}.dist-info"}
    # Without torch: the package, the build report and the info page.
    assert "isa_levels" in run(python, "-c", "import elang._C; print(elang._C.build_config())", cwd=tmp_path)
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
    assert set(re.findall(r" T (\w*elang\w*)", exported)) == {"elang_cpu_isa"}
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
