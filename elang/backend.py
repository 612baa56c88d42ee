"""What serves each op on each kind of device: compiled kernels, Triton's, or plain PyTorch.

On the CPU the compiled library serves. On a GPU its CUDA kernels do, where they were built and the driver is new enough
for them; else Triton's; else plain PyTorch, with a warning. `ELANG_BACKEND` forces one of `BACKENDS` for every op: what
it cannot serve raises. A library that does not load raises on the first call of an op, with the original error.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

BACKENDS = ("cpp", "triton", "reference")
ISAS = ("baseline", "avx2", "avx512")
LIBRARY = Path(__file__).with_name("libelang_ops.so")

# Every op of the library, and the module of elang.triton_kernels that has its twin.
TRITON_KERNELS = {
    "route": "route",
    "route_logits": "route",
    "vocab_energy": "vocab_energy",
    "gather_rows": "rows",
    "merge_rows": "rows",
    "routed_extent": "rows",
}
_WITHOUT_CUDA_KERNEL = ("vocab_energy",)


def _env(name: str, known: tuple[str, ...]) -> str | None:
    value = os.environ.get(name) or None
    if value is not None and value not in known:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(known)}")
    return value


def _load() -> OSError | None:
    _env("ELANG_ISA", ISAS)  # csrc/cpu/isa.cpp reads it, and would take a misspelt one for none
    try:
        torch.ops.load_library(LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return error
    return None


FORCED = _env("ELANG_BACKEND", BACKENDS)
LOAD_ERROR = _load() if FORCED != "reference" else None


def warmup() -> None:
    """Load the compiled library now rather than on first use. Triton compiles a kernel when it is first called.

    Raises:
        ImportError: the compiled library is missing or does not load; says why, and what to do.
    """
    if LOAD_ERROR is not None:
        raise ImportError(
            f"elang's compiled ops did not load under torch {torch.__version__}: {LOAD_ERROR}. Reinstall elang with "
            "`pip install --no-build-isolation .`, or set ELANG_BACKEND=reference to run in plain PyTorch; "
            "`python -m elang.info` tells more."
        ) from LOAD_ERROR


def cpu_isa() -> str:
    """Instruction set of the CPU kernels in use, one of `ISAS`; `ELANG_ISA` caps it.

    Raises:
        ImportError: the compiled library does not load.
    """
    warmup()
    library = ctypes.CDLL(str(LIBRARY))
    library.elang_cpu_isa.restype = ctypes.c_char_p
    return cast(bytes, library.elang_cpu_isa()).decode()


# ---- what stands in the way of a backend: a sentence, or None


@cache
def cuda_build_obstacle() -> str | None:
    """Why the compiled CUDA kernels cannot serve this torch and driver. Does not start CUDA: a fork stays safe."""
    if LOAD_ERROR is not None:
        return f"the compiled library does not load: {LOAD_ERROR}"
    if not hasattr(ctypes.CDLL(str(LIBRARY)), "elang_cuda_obstacle"):
        return "elang was built without CUDA: install the CUDA toolkit (nvcc) and reinstall elang"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    built = importlib.import_module("elang._C").build_config()["cuda"]
    driver = _driver_version()
    if driver is not None and driver < int(built.split(".")[0]):
        return f"the driver is for CUDA {driver}, elang was built with CUDA {built}: install a newer driver"
    return None


def _driver_version() -> int | None:
    """Major version of CUDA that the driver knows; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000


@cache
def cuda_obstacle() -> str | None:
    """Why the compiled kernels cannot serve CUDA tensors in this process. Starts CUDA, but no context."""
    if (obstacle := cuda_build_obstacle()) is not None:
        return obstacle
    library = ctypes.CDLL(str(LIBRARY))
    library.elang_cuda_obstacle.restype = ctypes.c_char_p
    said: bytes | None = library.elang_cuda_obstacle()
    if said is not None:
        return said.decode()
    archs = importlib.import_module("elang._C").build_config()["cuda_archs"]
    for index in range(torch.cuda.device_count()):
        if not _covers(archs, torch.cuda.get_device_capability(index)):
            name = torch.cuda.get_device_name(index)
            return f"elang was built for {archs}, which leaves out {name}: set TORCH_CUDA_ARCH_LIST and reinstall elang"
    return None


def _covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for `archs` run there: on a later minor version of the same major, or anywhere from PTX on.

    archs: as CMake has them, "80-real 90a-real 120"; without "-real" there is PTX too.
    """
    for arch in archs.split():
        found = re.fullmatch(r"(\d+)(\d)(a?)(-real)?", arch)
        assert found, arch
        built = int(found[1]), int(found[2])
        if found[3]:
            if built == capability:
                return True
        elif built <= capability and (built[0] == capability[0] or not found[4]):
            return True
    return False


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_obstacle(device: str) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed: `pip install triton`"
    if device == "cpu" and not _interpreting():
        return "Triton serves CPU tensors only under TRITON_INTERPRET=1"
    return None


# ---- the choice


class Served(NamedTuple):
    backend: str | None  # one of `BACKENDS`; None: nothing can
    why: str


def choose(op: str, device: str, forced: str | None, cuda_obstacle: str | None, triton_obstacle: str | None) -> Served:
    """What serves `op` on a `device` type, given what stands in the way of the compiled CUDA kernels and of Triton."""
    compiled_obstacle = cuda_obstacle if device != "cpu" else None
    if device != "cpu" and op in _WITHOUT_CUDA_KERNEL:
        compiled_obstacle = f"{op} has no compiled CUDA kernel"
    obstacles = {"cpp": compiled_obstacle, "triton": triton_obstacle, "reference": None}
    if forced is not None:
        obstacle = obstacles[forced]
        return Served(None if obstacle else forced, obstacle or "ELANG_BACKEND forces it")
    passed_over: list[str] = []
    for backend, obstacle in obstacles.items():
        if obstacle is None:
            return Served(backend, "; ".join(passed_over) or "the default")
        passed_over.append(obstacle)
    raise AssertionError("the reference has no obstacle")


@cache
def served(op: str, device: str) -> Served:
    """What serves `op` in this process on a `device` type, and why. Does not start CUDA."""
    gpu_obstacle = cuda_build_obstacle() if device != "cpu" and FORCED != "reference" else None
    return choose(op, device, FORCED, gpu_obstacle, _triton_obstacle(device))


def explain(op: str, tensor: Any) -> None:
    """Once an op has failed: whether it is for want of compiled kernels for its GPU, where they are what serves it."""
    if not (isinstance(tensor, torch.Tensor) and tensor.is_cuda and served(op, "cuda").backend == "cpp"):
        return
    if why := cuda_obstacle():
        raise RuntimeError(f"elang's CUDA kernels cannot run: {why}. ELANG_BACKEND=triton runs the ops in Triton")


# ---- what the wrappers in ops.py call


def bind(name: str, plain: Callable[..., Any], overload: str = "default") -> Callable[..., Any]:
    """The op, looked up once: a call through its packet costs more. `plain` is it in plain PyTorch, checks included."""
    if FORCED == "reference":
        return plain
    if LOAD_ERROR is not None:
        return lambda *_: warmup()
    return cast(Callable[..., Any], getattr(getattr(torch.ops.elang, name), overload))


def kernel(op: str, device: str, plain: Callable[..., Any]) -> Callable[..., Any] | None:
    """What has to be registered from Python for `op` on a `device` type; None where the compiled kernel serves."""
    backend, why = served(op, device)
    if backend == "triton":
        return _triton_kernel(op)
    if backend == "reference":
        return _warned(op, why, plain)
    if backend is None:
        return _refused(op, device, why)
    return None


def _triton_kernel(op: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        module = importlib.import_module(f"elang.triton_kernels.{TRITON_KERNELS[op]}")  # Triton loads on first use
        return getattr(module, op)(*args)

    return call


def _warned(op: str, why: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    @cache
    def warn() -> None:
        warnings.warn(f"{op} runs in plain PyTorch on this GPU: {why}", RuntimeWarning, stacklevel=4)

    def call(*args: Any) -> Any:
        warn()
        return plain(*args)

    return call


def _refused(op: str, device: str, why: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise RuntimeError(f"{op} cannot run on {device}: {why}. ELANG_BACKEND=reference runs the ops in plain PyTorch")

    return call
