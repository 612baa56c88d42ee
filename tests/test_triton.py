"""The Triton kernels without a GPU: interpreted, they pass the tests of the ops; compiled, they are what was meant."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton: the extra elang[triton]")

HERE = Path(__file__).parent
OLDEST = "3.6.0"  # that a supported torch comes with
SPILL = 8  # bytes: ptxas parts with a register or two to stay within 64, outside of any loop
# The matrix instruction that a product of 16-bit rows and head takes: for a vocabulary, and for a small head.
ARCHS = {
    "80": ("mma.sync", "mma.sync"),
    "90": ("wgmma.mma_async", "mma.sync"),
    "100": ("tcgen05.mma", "mma.sync"),
    "120": ("mma.sync", "mma.sync"),
    "gfx942": ("v_mfma", "v_mfma"),
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is such a process")
def test_interpreted_kernels_pass_the_tests_of_the_ops():
    """Programs in random order. Classes by the ten thousand take the interpreter minutes."""
    files = [HERE / f"test_{name}.py" for name in ("route", "rows", "vocab", "properties")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *files,
        "-k",
        "not 40000",
        "-m",
        "not gpu",
    ]
    env = {**os.environ, "ELANG_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "ELANG_BACKEND=triton: about the CPU kernel" in done.stdout


def compiled(arch: str, cache: Path, path: str) -> list[dict]:
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache / arch), "TRITON_INTERPRET": "0"}
    env["PYTHONPATH"] = os.pathsep.join(part for part in (path, env.get("PYTHONPATH")) if part)
    command = [sys.executable, HERE / "triton_compile.py", arch, *(["few"] if path else [])]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_and_print(cache: Path, capsys, archs: list[str], path: str = "") -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        of_arch = dict(zip(archs, pool.map(lambda arch: compiled(arch, cache, path), archs), strict=True))
    with capsys.disabled():
        print(f"\n{'arch':7} {'registers':>9} {'shared':>7}  kernel")
        for arch, rows in of_arch.items():
            for row in rows:
                print(f"{arch:7} {row['registers']:9} {row['shared']:7}  {row['case']} {' '.join(row['matrix'])}")
    for arch, rows in of_arch.items():
        vocab, head = ARCHS[arch]
        assert {row["kernel"] for row in rows} == {
            *("_gather_kernel", "_merge_kernel", "_extent_kernel"),
            *("_route_kernel", "_vocab_energy_kernel", "_mean_kernel"),
            *(("_order_kernel", "_combine_kernel") if arch.startswith("gfx") else ()),
        }
        for row in rows:
            assert row["local"] <= SPILL, (arch, row)
            meant = {"_vocab_energy_kernel": vocab, "_route_kernel": head}.get(row["kernel"])
            if "bf16" in row["case"] and "H=1000" not in row["case"] and meant:
                assert row["matrix"] == [meant], (arch, row)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's wheels are for x86-64")
def test_every_kernel_compiles_for_every_gpu(tmp_path, capsys):
    check_and_print(tmp_path, capsys, list(ARCHS))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's wheels are for x86-64")
def test_every_kernel_compiles_with_the_oldest_triton(tmp_path, capsys):
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        tmp_path / "old",
        f"triton=={OLDEST}",
    ]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "old")},
        capture_output=True,
        text=True,
    )
    assert said.stdout.strip() == OLDEST
    check_and_print(tmp_path, capsys, ["90", "100"], str(tmp_path / "old"))


def test_the_folder_is_no_module_of_its_own():
    """From the repository's root it could be imported twice, and would hold each kernel twice."""
    for code in ("import triton_kernels", "import triton_kernels.route"):
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True)
        assert done.returncode != 0
        assert "ImportError: import elang.triton_kernels" in done.stderr


def test_triton_is_loaded_by_its_first_use_alone():
    use = "elang.vocab_energy(torch.ones(2, 3), torch.ones(4, 3))"
    code = f"import sys, torch, elang; {use}; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
