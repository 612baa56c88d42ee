from __future__ import annotations

import math

import pytest
import tiny_models
import torch

from elang.evaluation.timing import (
    NaiveCascade,
    PerSampleLoop,
    alternate,
    dispatch_efficiency,
    eta,
    medians,
    routed_inputs,
)
from elang.joint import JointClassifier
from elang.router import Router


class Clock:
    """Stands still but for what the runs take."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, *seconds: float):
        left = list(seconds)

        def step():
            self.order.append(name)
            self.now += left.pop(0)

        return step


def test_runs_alternate_and_every_other_round_goes_backwards():
    clock = Clock()
    runs = {"a": clock.run("a", 9, 1, 2, 3), "b": clock.run("b", 9, 10, 20, 30)}
    assert alternate(runs, 3, clock=clock) == {"a": [1, 2, 3], "b": [10, 20, 30]}
    assert "".join(clock.order) == "ab" + "ab" + "ba" + "ab"


def test_warm_up_is_not_timed_and_can_be_left_out():
    clock = Clock()
    assert alternate({"a": clock.run("a", 5)}, 1, warm_up=0, clock=clock) == {"a": [5]}


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds: got 0, wanted >= 1"):
        alternate({"a": lambda: None}, 0)


def test_medians():
    assert medians({"a": [3, 1, 100], "b": [1, 2]}) == {"a": 3, "b": 1.5}


def test_ratios():
    # 4 times fewer FLOPs, 3 times as fast.
    assert eta(super_seconds=6, joint_seconds=2, super_flops=400, joint_flops=100) == 0.75
    assert dispatch_efficiency(swift_seconds=1, routed_seconds=2, joint_seconds=4) == 0.75


def test_routed_inputs_are_the_rows_padded_to_the_longest_of_them():
    batch = {**tiny_models.inputs((9, 3, 5)), "row": torch.arange(3)}
    routed = routed_inputs(batch, torch.tensor([1, 2]))
    assert torch.equal(routed["input_ids"], batch["input_ids"][1:, :5])
    assert torch.equal(routed["attention_mask"], batch["attention_mask"][1:, :5])
    assert routed["row"].tolist() == [1, 2]


@pytest.mark.parametrize("kept", ["none", "some", "all"])
def test_naive_cascade_answers_as_the_joint_model_does(kept):
    swift, super_, batch = tiny_models.classifier(seed=0), tiny_models.classifier(seed=1), tiny_models.inputs()
    joint = JointClassifier(swift, super_, Router("energy", threshold=-math.inf), trim=False)
    score = joint(**batch).routing.score
    threshold = {"none": math.inf, "some": score.sort().values[2:4].mean().item(), "all": -math.inf}[kept]
    joint.router.set_threshold(threshold)
    expected = joint(**batch)
    assert int(expected.routing.n_routed) == {"none": 6, "some": 3, "all": 0}[kept]
    torch.testing.assert_close(NaiveCascade(swift, super_, joint.router)(**batch), expected.logits)
    row_by_row = PerSampleLoop(swift, super_, joint.router)(**batch)
    torch.testing.assert_close(row_by_row, expected.logits, rtol=1e-4, atol=1e-5)


def test_naive_cascade_calls_super_once_untrimmed():
    shapes = []

    def super_(**batch):
        shapes.append(tuple(batch["input_ids"].shape))
        return torch.zeros(len(batch["input_ids"]), tiny_models.CLASSES)

    swift, batch = tiny_models.classifier(), tiny_models.inputs((9, 3, 5, 1))
    NaiveCascade(swift, super_, Router("max_prob", threshold=2.0))(**batch)
    assert shapes == [(4, tiny_models.LENGTH)]
