"""torch.compile of a joint model: one graph, or two around the one host read, and none made anew once it is warm."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import torch._dynamo
from torch import Tensor

from elang.joint import JointClassifier
from elang.router import Router

INF = float("inf")
LONGEST = 64  # rows of a batch, and the largest bucket


def batch(rows: int, columns: int) -> dict[str, Tensor]:
    lengths = torch.randint(1, columns + 1, (rows,))
    lengths[0] = columns
    mask = (torch.arange(columns) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1, tiny_models.VOCAB, (rows, columns)) * mask, "attention_mask": mask}


def route_so_many(joint: JointClassifier, inputs: dict[str, Tensor], routed: int) -> None:
    """The threshold half way between two scores: a compiled Swift's may differ in the last bit."""
    score = torch.cat([torch.tensor([-INF]), joint(**inputs).routing.score.sort().values, torch.tensor([INF])])
    joint.router.set_threshold(score[routed : routed + 2].mean().item())


@pytest.fixture
def joint_of(swift, super_):
    torch.compiler.reset()
    yield lambda mode, **options: JointClassifier(swift, super_, Router(threshold=0.0), mode, **options)
    torch.compiler.reset()


def test_capacity_is_one_graph(joint_of, inputs):
    joint = joint_of("capacity", capacity=2)
    compiled = torch.compile(joint, fullgraph=True, backend="aot_eager")
    for routed in (0, 1, 2, 3, 6):
        route_so_many(joint, inputs, routed)
        wanted, before = joint(**inputs), joint.stats
        got = compiled(**inputs)
        torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(got.routing.order, wanted.routing.order)
        assert got.routing.overflow.tolist() == [max(routed - 2, 0)]
        assert torch.equal(got.routing.degraded, wanted.routing.degraded)
        assert joint.stats.routed - before.routed == routed


@pytest.mark.parametrize("mode", ["exact", "bucket"])
def test_the_host_read_is_the_only_break(joint_of, inputs, mode):
    joint = joint_of(mode)
    route_so_many(joint, inputs, 3)
    explained = torch._dynamo.explain(joint)(**inputs)
    assert (explained.graph_count, explained.graph_break_count) == (2, 1)
    assert "the number of routed rows is read on the host" in str(explained.break_reasons[0])


@pytest.mark.parametrize("mode", ["exact", "bucket"])
def test_nothing_is_compiled_anew_once_warm(joint_of, mode):
    """Batches of 1 to 64 rows of any length, any number routed, the largest bucket included."""
    joint = joint_of(mode)
    compiled = torch.compile(joint, dynamic=True, backend="eager")
    # What a compiler tells apart: one row or several in the batch, none, one, several or all of them routed.
    for rows, routed in [(LONGEST, (3, 1, 0, LONGEST)), (1, (0, 1))]:
        inputs = batch(rows, 9)
        for count in routed:
            route_so_many(joint, inputs, count)
            compiled(**inputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (1, 2, 5, 9, 31, 48, LONGEST):
            for columns in (2, 9, 23):
                inputs = batch(rows, columns)
                for count in {0, 1, rows // 3, rows - 1, rows}:
                    route_so_many(joint, inputs, count)
                    wanted, got = joint(**inputs), compiled(**inputs)
                    assert int(got.routing.n_routed) == count
                    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-5)


def test_shares_of_a_batch_of_any_size_are_one_graph_each(joint_of):
    for share in (0.5, 0.25, 1.0):
        joint = joint_of("capacity", capacity=share)
        compiled = torch.compile(joint, fullgraph=True, dynamic=True, backend="eager")
        for rows in (6, 9):
            inputs = batch(rows, 7)
            route_so_many(joint, inputs, rows)
            torch.testing.assert_close(compiled(**inputs).logits, joint(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_auto_under_a_compiler_is_bucket(joint_of, inputs):
    joint = joint_of("auto")
    assert torch.compile(joint, backend="eager")(**inputs).routing.mode == "bucket"


def test_a_super_whose_errors_are_caught_is_called_outside_of_the_graph(joint_of, inputs):
    joint = joint_of("capacity", capacity=2, on_super_error="swift")
    wanted = joint(**inputs).logits
    torch.testing.assert_close(torch.compile(joint, backend="eager")(**inputs).logits, wanted, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="on_super_error"):
        torch.compile(joint, fullgraph=True, backend="eager")(**inputs)
