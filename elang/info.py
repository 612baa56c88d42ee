"""What is installed here and which backend serves each op: `python -m elang.info`, or `elang info`. Never raises."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

PACKAGES = ("elang", "torch", "numpy", "transformers", "safetensors", "triton")
OPS = ("route", "route_logits", "vocab_energy", "gather_rows", "merge_rows", "routed_extent")


def _try(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _build() -> str:
    config = importlib.import_module("elang._C").build_config()
    return ", ".join(f"{key} {value or 'none'}" for key, value in config.items())


def _devices() -> str:
    torch = importlib.import_module("torch")
    cpu = f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
    if not torch.cuda.is_available():
        return f"{cpu}; no CUDA device"
    return "; ".join([cpu, *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))])


def _served(op: str) -> str:
    torch = importlib.import_module("torch")
    backend = importlib.import_module("elang.backend")
    chosen, why = backend.served(op, "cpu")
    if chosen == "cpp":
        chosen = f"cpp, {backend.cpu_isa()} kernels"
    cpu = f"cpu: {chosen or 'nothing'} ({why})"
    if not (torch.version.cuda or torch.version.hip):
        return f"{cpu}; cuda: nothing (torch {torch.__version__} is built without a GPU)"
    chosen, why = backend.served(op, "cuda")
    if chosen == "cpp" and (obstacle := backend.cuda_obstacle()):
        chosen, why = None, obstacle
    return f"{cpu}; cuda: {chosen or 'nothing'} ({why})"


def _host_read() -> str:
    host_read = importlib.import_module("elang.host_read")
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return f"{host_read.way()}, of no use without a CUDA device"
    return "; ".join(f"cuda:{i} {host_read.in_use(torch.device('cuda', i))}" for i in range(torch.cuda.device_count()))


def collect() -> dict[str, str]:
    """Everything a bug report needs, as printable values; what cannot be read holds its error instead."""
    facts = {
        "python": sys.version.replace("\n", " "),
        "platform": platform.platform(),
        **{package: _version(package) for package in PACKAGES},
        "build": _try(_build),
        "devices": _try(_devices),
    }
    facts["host read"] = _try(_host_read)
    return facts | {f"op {op}": _try(partial(_served, op)) for op in OPS}


def main() -> None:
    facts = collect()
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")


if __name__ == "__main__":
    main()
