"""torch.export and AOTInductor: programs agree with the joint model, also where there are torch and the ops alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny_models
import torch

from elang import backend
from elang.export import Exportable
from elang.joint import JointClassifier
from elang.router import Router

LENGTHS = [(9, 3, 5, 1, 7, 2), (4, 9, 2, 2), (1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9)]


@pytest.fixture
def exported(swift, super_, inputs):
    joint = JointClassifier(swift, super_, Router(threshold=0.0), "capacity", capacity=0.5)
    joint.router.set_threshold(joint(**inputs).routing.score.sort().values[3:5].mean().item())
    rows, columns = torch.export.Dim("rows", min=4, max=64), torch.export.Dim("columns", min=2, max=32)
    shapes = {name: {0: rows, 1: columns} for name in inputs}
    return joint, torch.export.export(Exportable(joint), (), inputs, dynamic_shapes=shapes)


def test_the_program_agrees_on_batches_of_other_sizes(exported):
    joint, program = exported
    overflow = 0
    for lengths in LENGTHS:
        inputs = tiny_models.inputs(lengths)
        want, before = joint(**inputs), joint.stats
        got = program.module()(**inputs)
        assert joint.stats == before
        for value, wanted in zip(got, (want.logits, *want.routing[:4]), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
        overflow += int(want.routing.overflow)
    assert overflow > 0


@pytest.mark.compiled
def test_the_package_agrees_where_there_is_neither_elang_nor_transformers(exported, tmp_path):
    joint, program = exported
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "joint.pt2"))
    cases = []
    for lengths in LENGTHS:
        inputs = tiny_models.inputs(lengths)
        want = joint(**inputs)
        cases.append((inputs, (want.logits, *want.routing[:4])))
    torch.save(cases, tmp_path / "cases.pt")
    code = f"""
import sys
sys.modules["elang"] = sys.modules["transformers"] = None  # importing either fails
import torch
torch.ops.load_library({str(backend.LIBRARY)!r})
run = torch._inductor.aoti_load_package({package!r})
for inputs, want in torch.load({str(tmp_path / "cases.pt")!r}):
    for value, wanted in zip(run(**inputs), want, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
print("agrees")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "agrees", done.stderr[-3000:]


@pytest.mark.parametrize("mode", ["exact", "bucket"])
def test_a_mode_that_reads_a_count_names_the_one_that_does_not(swift, super_, inputs, mode):
    joint = JointClassifier(swift, super_, Router(threshold=0.0), mode)
    with pytest.raises(RuntimeError, match="dispatch='capacity' reads none"):
        torch.export.export(joint, (), inputs)


def test_auto_under_export_is_capacity(swift, super_, inputs):
    joint = JointClassifier(swift, super_, Router(threshold=0.0), "auto", capacity=2)
    graph = torch.export.export(Exportable(joint), (), inputs).module()
    torch.testing.assert_close(graph(**inputs)[0], Exportable(joint)(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_what_a_graph_cannot_do_is_refused(swift, super_):
    router = Router(threshold=0.0)
    joint = JointClassifier(swift, super_, router, "capacity", capacity=2)
    swift.train()
    with pytest.raises(RuntimeError, match="swift: in training mode"):
        Exportable(joint)
    swift.eval()
    with pytest.raises(ValueError, match="joint: got no capacity"):
        Exportable(JointClassifier(swift, super_, router))
    with pytest.raises(ValueError, match="a graph cannot catch"):
        Exportable(JointClassifier(swift, super_, router, "capacity", capacity=2, on_super_error="swift"))
