"""Everything that wants a GPU, in one go: `make check-gpu`, or `make check-gpu STAGES="tests sanitizer"`.

Builds elang for this GPU into build/check_gpu, runs every test marked `gpu`, those of the ops once more with the Triton
kernels, the kernel tests under compute-sanitizer and the benches, prints one table and keeps it with the results of the
benches in benches/results/<device>.json. Needs no network, no .git and no Python package beyond torch, triton, numpy,
transformers, pytest and pytest-benchmark, and what the build needs: nvcc, CMake, Ninja, pybind11, setuptools. Every
stage has a limit; all together come to at most twenty minutes, most of it Triton's compiler: stages run one by one too.

`vocab_energy` is measured beside its peers, where they are installed or lie as wheels in build/peers:
pip download --no-deps -d build/peers cut-cross-entropy liger-kernel quack-kernels
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "build" / "check_gpu"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Small enough for a tool that is a hundred times slower: every kernel, one block and many, one finisher and several.
SANITIZED = "(any_number_of_rows and (31 or 4097)) or other_layouts or nothing_waits or agrees_with_the_cpu"
UNSUPPORTED = "Device not supported"  # what compute-sanitizer says where it cannot run

Row = dict[str, object]  # stage, result, seconds, said


def run(stage: str, command: list[object], limit: float, **variables: str) -> Row:
    """Runs a command in the build's folder, its output on the screen and its last line in the row."""
    print(f"\n== {stage}: {' '.join(map(str, command))}", flush=True)
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    start, last, unavailable = time.monotonic(), "", ""
    process = subprocess.Popen(
        [str(word) for word in command], cwd=TARGET, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    timer = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip(" =\n") or last
        if UNSUPPORTED in line:
            unavailable = last
    code = process.wait()
    timer.cancel()
    if unavailable:
        return row(stage, "unavailable", start, unavailable)
    if code == -signal.SIGKILL:
        return row(stage, "timed out", start, f"after {limit:.0f} s: {last}")
    return row(stage, "ok" if code == 0 else "failed", start, last)


def row(stage: str, result: str, start: float, said: str) -> Row:
    return {"stage": stage, "result": result, "seconds": round(time.monotonic() - start, 1), "said": said[:200]}


def pytest(*arguments: object) -> list[object]:
    config = ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *config, "-q", "-m", "gpu", *arguments]


def marked(folder: Path, pattern: str) -> list[Path]:
    """Files with anything for a GPU: the others may import packages that are not here."""
    words = ("mark.gpu", '"device"')
    return [path for path in sorted(folder.rglob(pattern)) if any(word in path.read_text() for word in words)]


def build() -> list[Row]:
    """elang and, beside it, whatever wheels of peers there are."""
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--upgrade", "--target", TARGET]
    arch = "{}.{}".format(*torch.cuda.get_device_capability())
    command = [sys.executable, "-m", "pip", "install", *flags, ROOT]
    rows = [run("build", command, 150, ELANG_CUDA="1", TORCH_CUDA_ARCH_LIST=arch)]
    if peers := sorted((ROOT / "build" / "peers").glob("*.whl")):
        flags = ["--no-deps", "--no-index", "--quiet", "--target", TARGET]
        rows.append(run("peers", [sys.executable, "-m", "pip", "install", *flags, *peers], 60))
    return rows


def tests() -> list[Row]:
    return [run("tests", pytest(*marked(ROOT / "tests", "test_*.py")), 150)]


def triton() -> list[Row]:
    """The tests of the ops with Triton's kernels."""
    files = [ROOT / "tests" / f"test_{name}.py" for name in ("route", "rows", "vocab", "properties")]
    return [run("triton", pytest(*files, "-k", "not 40000"), 420, ELANG_BACKEND="triton")]


def sanitizer() -> list[Row]:
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return [row("sanitizer", "unavailable", time.monotonic(), "there is no compute-sanitizer on PATH")]
    rows = []
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", 77]
        command += pytest("-k", SANITIZED, ROOT / "tests" / "test_cuda.py")
        # Without torch's cache every tensor is an allocation of its own, with its own bounds.
        rows.append(run(name, command, 30, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    return rows


def benches() -> list[Row]:
    return [run("benches", pytest(*marked(ROOT / "benches", "bench_*.py"), "-s"), 300)]


STAGES: dict[str, Callable[[], list[Row]]] = {
    "build": build,
    "tests": tests,
    "triton": triton,
    "sanitizer": sanitizer,
    "benches": benches,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages", nargs="*", default=list(STAGES), help=f"of {', '.join(STAGES)}; all where none is named"
    )
    stages = parser.parse_args().stages
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"stages: got {', '.join(unknown)}, wanted some of {', '.join(STAGES)}")
    if not torch.cuda.is_available():
        parser.error(f"no CUDA device that torch {torch.__version__} can use; on a CPU there is `make test`")
    if "build" not in stages and not (TARGET / "elang").exists():
        parser.error(f"{TARGET} holds no build: run the build stage first")
    rows: list[Row] = []
    for stage in STAGES:
        if stage in stages:
            rows += STAGES[stage]()
            if stage == "build" and rows[0]["result"] != "ok":
                break
    sys.path.insert(0, str(TARGET))  # the report reads elang's version
    import report

    if rows[0]["result"] == "ok" or "build" not in stages:
        print(f"\nkept in {report.save({'check': rows}, report.results_file(), 'make check-gpu')}")
    print(f"\n{'stage':10} {'result':12} {'seconds':>7}  last line")
    for r in rows:
        print(f"{r['stage']:10} {r['result']:12} {r['seconds']:7}  {r['said']}")
    return int(any(r["result"] in ("failed", "timed out") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
