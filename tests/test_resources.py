"""What the CUDA kernels take of a multiprocessor, as cuobjdump reads it off the library: no local memory, no spills."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import cuda_home

from elang import backend

REGISTERS = 128  # of a thread, so that two blocks of 256 fit a multiprocessor
KERNELS = {
    *("route_kernel", "route_logits_kernel", "gather_kernel", "merge_kernel", "extent_kernel"),
    *("copy_kernel", "branch_kernel"),
}


def cuobjdump() -> str | None:
    """Of the toolkit, or else the one in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    found = [shutil.which("cuobjdump"), cuda_home() and Path(str(cuda_home())) / "bin" / "cuobjdump"]
    if triton and triton.origin:
        found.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(path) for path in found if path and Path(path).exists()), None)


def resources() -> list[tuple[str, str, dict[str, int]]]:
    """(arch, kernel, usage) of every kernel in the library."""
    dumped = subprocess.run(
        [str(cuobjdump()), "-res-usage", backend.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    readable = subprocess.run(["c++filt"], input=dumped, capture_output=True, text=True, check=True).stdout
    arch, kernel, rows = "", "", []
    for line in readable.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r" Function (?:void )?elang::(.*)\(.*\):", line):
            kernel = found[1].replace("elang::", "")
        elif line.startswith("  REG:"):
            rows.append((arch, kernel, {key: int(n) for key, n in re.findall(r"([A-Z]+):(\d+)", line)}))
    return rows


@pytest.mark.compiled
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump: of the CUDA toolkit, or of Triton's wheel")
def test_no_kernel_uses_local_memory(capsys):
    from elang._C import build_config

    archs = [re.sub("-.*", "", arch) for arch in build_config()["cuda_archs"].split()]
    if not archs:
        pytest.skip("elang was built without CUDA")
    rows = resources()
    with capsys.disabled():
        print(f"\n{'arch':7} {'registers':>9} {'shared':>7}  kernel")
        for arch, kernel, usage in rows:
            print(f"{arch:7} {usage['REG']:9} {usage['SHARED']:7}  {kernel}")
    for arch in archs:
        mine = [(kernel, usage) for a, kernel, usage in rows if a == f"sm_{arch}"]
        assert {re.sub("<.*", "", kernel) for kernel, _ in mine} == KERNELS
        for kernel, usage in mine:
            assert usage["STACK"] == usage["LOCAL"] == 0, (arch, kernel, usage)
            assert usage["REG"] <= REGISTERS, (arch, kernel, usage)
