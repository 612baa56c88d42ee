"""Compiles every Triton kernel for one GPU, without having it: `python tests/triton_compile.py 90` (or gfx942), with
one score of each kind of accumulator where `few` follows.

What is compiled is what the ops would launch there: the launches of calls on small or uninitialised CPU tensors are
caught in place of being run. Prints a JSON line for each kernel: what it takes of a multiprocessor, and the matrix
instructions in its code.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from elang.reference import SCORES
from elang.triton_kernels import configs, route, rows, vocab_energy

BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
POINTERS = {F32: "*fp32", BF16: "*bf16", I32: "*i32", I64: "*i64", torch.int8: "*i8", torch.bool: "*i1"}
MATRIX = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")
MULTIPROCESSORS = 132


def calls(scores: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(what it is, a call of an op)."""
    order, n_routed, threshold = torch.arange(64), torch.ones(1, dtype=I32), torch.ones(1)
    tensors = [torch.zeros(64, 128, dtype=I64), torch.zeros(64, 128, dtype=torch.bool), torch.zeros(64, 12, 64)]
    yield "gather", lambda: rows.gather_rows(tensors, order, n_routed, 16)
    yield "merge", lambda: rows.merge_rows(torch.zeros(64, 3), torch.zeros(16, 3), order, n_routed)
    yield "extent", lambda: rows.routed_extent(tensors[0], order, n_routed)
    for score in scores:
        index, classes = SCORES.index(score), 1 if score == "logit" else 20
        head = torch.zeros(64, 768, dtype=BF16), torch.zeros(classes, 768, dtype=BF16), None
        yield f"route bf16 {score}", lambda head=head, index=index: route.route(*head, 1.0, index, 1.0)
    head32 = torch.zeros(64, 768), torch.zeros(150, 768), torch.zeros(150)
    yield "route f32 energy_probs", lambda: route.route(*head32, threshold, SCORES.index("energy_probs"), 1.0)
    for classes in (3, 150, 1000):
        logits, index = torch.zeros(64, classes), SCORES.index("energy_probs")
        yield f"route_logits energy_probs C={classes}", partial(route.route_logits, logits, 0.5, index, 1.0)
    bias = torch.empty(32128, dtype=BF16)
    for shape, dtype, width, extra in [
        ((16,), BF16, 1024, ()),
        ((4096,), BF16, 1024, ()),
        ((40_000,), BF16, 1024, ()),  # enough row blocks for every multiprocessor: the vocabulary is not split
        ((2, 8), BF16, 1024, (bias, torch.ones(2, 8, dtype=I64))),
        ((8, 500), BF16, 1024, (bias, torch.ones(8, 500, dtype=I64))),
        ((8, 500), BF16, 1000, (bias, torch.ones(8, 500, dtype=I64))),
        ((16,), F32, 1024, ()),
        ((4096,), F32, 1024, ()),
    ]:
        args = torch.empty(*shape, width, dtype=dtype), torch.empty(32128, width, dtype=dtype)
        name = f"vocab {'bf16' if dtype == BF16 else 'f32'} {list(shape)} H={width}{' bias mask' if extra else ''}"
        yield name, lambda args=args, extra=extra: vocab_energy.vocab_energy(*args, *(extra or (None, None)), 1.0)


def signature(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """The type that Triton gives an argument, and into the two dicts what it makes of its value."""
    if isinstance(value, tuple):
        return tuple(signature(v, (*path, i), constants, attributes) for i, v in enumerate(value))
    if isinstance(value, Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype]
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compiled(kernel: Any, args: Any, constexprs: dict[str, Any], options: dict[str, Any], target: GPUTarget) -> Any:
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    types = {
        p.name: "i32" if p.do_not_specialize else signature(a, (i,), constants, attributes)
        for i, (p, a) in enumerate(zip(kernel.params, args, strict=False))
    }
    types |= dict.fromkeys(constexprs, "constexpr")
    constants |= {(kernel.arg_names.index(name),): value for name, value in constexprs.items()}
    return triton.compile(ASTSource(kernel, types, constants, attributes), target=target, options=options)


def usage(kernel: Any) -> dict[str, int]:
    """Registers of a thread, and bytes of local memory, where spills go."""
    if "amdgcn" in kernel.asm:
        found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", kernel.asm["amdgcn"]))
        return {"registers": int(found["vgpr_count"]), "local": int(found["private_segment_fixed_size"])}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "local": int(found["STACK"]) + int(found["LOCAL"])}


def main(arch: str, few: str = "") -> None:
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
    kind = "hip" if amd else str(int(arch) // 10)
    for name, call in calls(("energy", "margin") if few else SCORES):
        caught: list[Any] = []

        def catch(
            kernel: Any, grid: Any, *args: Any, num_warps=4, num_stages=3, debug=False, caught=caught, **rest: Any
        ):
            options = {"num_warps": num_warps, "num_stages": num_stages, "debug": debug}
            caught.append((kernel, args, rest, {**options, "sanitize_overflow": False, "enable_fp_fusion": True}))

        with (
            mock.patch.object(route, "launch", catch),
            mock.patch.object(rows, "launch", catch),
            mock.patch.object(vocab_energy, "launch", catch),
            mock.patch.object(vocab_energy, "gpu", return_value=configs.Gpu(kind, MULTIPROCESSORS)),
            mock.patch.object(vocab_energy, "LAST_PROGRAM_READS", not amd),
            mock.patch.object(route, "LAST_PROGRAM_READS", not amd),
        ):
            call()
        for launch in caught:
            kernel = compiled(*launch, target)
            code = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
            print(
                json.dumps(
                    {"case": name, "kernel": launch[0].fn.__name__, "shared": kernel.metadata.shared, **usage(kernel)}
                    | {"matrix": [instruction for instruction in MATRIX if instruction in code]}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
