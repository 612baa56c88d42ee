"""What a JointClassifier computes: which model answers, from which inputs, and what it returns."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import assert_accurate
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput, SequenceClassifierOutputWithPast

from elang.backbones import register_backbone
from elang.calibration import calibrate
from elang.fingerprint import fingerprint
from elang.joint import JointClassifier
from elang.router import Router

INF = float("inf")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_each_row_is_answered_by_the_right_model_in_input_order(family, super_, inputs):
    swift = tiny_models.classifier(family)
    weights = copy.deepcopy(swift.state_dict())
    joint = JointClassifier(swift, super_, Router(threshold=-INF))

    kept = joint(**inputs)
    with torch.no_grad():
        eager = swift(**inputs).logits
    assert_accurate(kept.logits, eager, tiny_models.float64_logits(swift, **inputs))
    assert kept.routing.n_routed.item() == 0
    assert kept.routing.mode == "exact"

    joint.router.set_threshold(INF)
    routed = joint(**inputs)
    assert torch.equal(routed.logits, tiny_models.super_alone(super_, inputs, torch.arange(6)))
    assert routed.routing.n_routed.item() == 6

    threshold = kept.routing.score.sort().values[3]
    joint.router.set_threshold(threshold.item())
    answer = joint(**inputs)
    rows = torch.nonzero(kept.routing.score < threshold).flatten()
    want = kept.logits.clone()
    want[rows] = tiny_models.super_alone(super_, inputs, rows)
    assert torch.equal(answer.logits, want)
    assert answer.routing.n_routed.item() == 3
    assert answer.routing.order[:3].tolist() == rows.tolist()
    assert torch.equal(answer.routing.score, kept.routing.score)

    assert list(swift.state_dict()) == list(weights)
    assert all(torch.equal(weights[name], value) for name, value in swift.state_dict().items())


@pytest.mark.parametrize("family", ["GPT2", "XLNet"])
def test_a_super_of_another_family(family, swift):
    super_, inputs = tiny_models.classifier(family), tiny_models.inputs(left=family == "XLNet")
    joint = tiny_models.half_way(swift, super_, inputs)
    answer = joint(**inputs)
    rows = answer.routing.order[:3]
    with torch.no_grad():
        want = super_(**{name: value[rows] for name, value in inputs.items()})
    assert type(answer) is type(want)
    truth = tiny_models.float64_logits(super_, **{name: value[rows] for name, value in inputs.items()})
    assert_accurate(answer.logits[rows], want.logits, truth)


@pytest.mark.parametrize("extra", ["position_ids", "token_type_ids", "inputs_embeds", "4-D mask"])
def test_other_inputs_reach_both_models(extra, super_, inputs):
    swift = tiny_models.classifier("Bert")
    if extra == "position_ids":
        inputs["position_ids"] = torch.arange(9).flip(0).expand(6, 9)
    elif extra == "token_type_ids":
        inputs["token_type_ids"] = (torch.arange(9) > 2).long().expand(6, 9)
    elif extra == "inputs_embeds":
        del inputs["input_ids"]
        inputs["inputs_embeds"] = torch.randn(6, 9, 16)
    else:
        inputs["attention_mask"] = inputs["attention_mask"].bool()[:, None, None, :].expand(6, 1, 9, 9)
    plain = tiny_models.inputs()
    joint = tiny_models.half_way(swift, super_, inputs)
    answer = joint(**inputs)
    rows = answer.routing.order
    for part, model in ((rows[:3], super_), (rows[3:], swift)):
        mine = {name: value[part] for name, value in inputs.items()}
        truth = tiny_models.float64_logits(
            model, **{n: v.double() if v.is_floating_point() else v for n, v in mine.items()}
        )
        with torch.no_grad():
            assert_accurate(answer.logits[part], model(**mine).logits, truth)
    if extra != "4-D mask":
        assert not torch.equal(joint(**plain).routing.score, answer.routing.score)


def test_no_mask(swift, super_, inputs):
    del inputs["attention_mask"]
    joint = tiny_models.half_way(swift, super_, inputs)
    answer = joint(**inputs)
    rows = answer.routing.order[:3]
    with torch.no_grad():
        assert torch.equal(answer.logits[rows], super_(input_ids=inputs["input_ids"][rows]).logits)


def test_a_row_of_nans_goes_to_super_and_touches_no_other_row(super_, inputs):
    swift = tiny_models.classifier("Bert")
    embeds = torch.randn(6, 9, 16)
    poisoned = embeds.clone()
    poisoned[2] = float("nan")
    mask = inputs["attention_mask"]
    joint = tiny_models.half_way(swift, super_, {"inputs_embeds": embeds, "attention_mask": mask}, trim=False)
    joint.router.set_threshold(-INF)
    clean = joint(inputs_embeds=embeds, attention_mask=mask)
    answer = joint(inputs_embeds=poisoned, attention_mask=mask)
    assert answer.routing.n_routed.item() == 1
    assert answer.routing.order[0].item() == 2
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(answer.logits[others], clean.logits[others])
    assert answer.logits[2].isnan().all()


def test_one_row(swift, super_):
    joint = JointClassifier(swift, super_, Router(threshold=INF))
    one = tiny_models.inputs((4,))
    assert torch.equal(joint(**one).logits, tiny_models.super_alone(super_, one, torch.tensor([0])))


def test_threads_over_one_joint_give_the_answers_of_one(swift, super_):
    batches = [tiny_models.inputs(seed=seed) for seed in range(8)]
    joint = tiny_models.half_way(swift, super_, batches[0])
    want = [joint(**batch).logits for batch in batches]
    answers: list[list[Tensor]] = [[] for _ in range(4)]

    def work(own: list[Tensor]) -> None:
        own.extend(joint(**batch).logits for batch in batches)

    threads = [threading.Thread(target=work, args=(own,)) for own in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in answers:
        assert len(own) == len(want)
        assert all(map(torch.equal, own, want))


class Answers(torch.utils.data.Dataset):
    """Batches that are answered where they are loaded."""

    def __init__(self, joint: JointClassifier, batches: list[dict[str, Tensor]]) -> None:
        self.joint, self.batches = joint, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor:
        return self.joint(**self.batches[index]).logits


@pytest.mark.parametrize("dispatch", ["exact", "bucket"])
def test_workers_of_a_dataloader_may_answer(swift, super_, dispatch):
    joint = JointClassifier(swift, super_, Router(threshold=0.0), dispatch)
    batches = [tiny_models.inputs(tuple(range(1, n + 2)), seed=n) for n in range(6)]
    joint.router.set_threshold(joint(**batches[5]).routing.score.median().item())
    want = [joint(**batch).logits for batch in batches]
    loader = torch.utils.data.DataLoader(
        Answers(joint, batches), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for got, wanted in zip(loader, want, strict=True):
        torch.testing.assert_close(got, wanted)


def test_two_joints_share_a_swift(swift, super_, inputs):
    first, second = (JointClassifier(swift, super_, Router(threshold=t)) for t in (-INF, INF))
    assert first(**inputs).routing.n_routed.item() == 0
    assert second(**inputs).routing.n_routed.item() == 6


def test_the_view_adds_nothing_to_the_state(swift, super_):
    joint = JointClassifier(swift, super_, Router(threshold=0.0))
    assert set(joint.state_dict()) == {
        "router.threshold",
        *(f"swift.{name}" for name in swift.state_dict()),
        *(f"super_.{name}" for name in super_.state_dict()),
    }


def test_a_copy_stands_alone(swift, super_, inputs):
    joint = tiny_models.half_way(swift, super_, inputs)
    want = joint(**inputs).logits
    twin = copy.deepcopy(joint)
    with torch.no_grad():
        for parameter in twin.swift.parameters():
            parameter.zero_()
    assert torch.equal(joint(**inputs).logits, want)
    assert not torch.equal(twin(**inputs).routing.score, joint(**inputs).routing.score)


# ---- the output


def test_the_output_is_super_s_class_and_routing_is_no_key(swift, inputs):
    super_ = tiny_models.classifier("GPT2")
    joint = JointClassifier(swift, super_, Router(threshold=-INF))
    for threshold in (-INF, INF):
        joint.router.set_threshold(threshold)
        answer = joint(**inputs)
        assert type(answer) is SequenceClassifierOutputWithPast
        assert list(answer) == ["logits"]
        assert answer.routing.overflow is None
        assert answer.routing.degraded is None


def test_the_output_of_a_super_that_is_no_hugging_face_model(swift, super_, inputs):
    labels = {0: 0, 1: 1, 2: 2}
    joint = JointClassifier(swift, lambda **i: super_(**i).logits, Router(threshold=-INF), label_map=labels)
    for threshold in (-INF, INF):
        joint.router.set_threshold(threshold)
        assert type(joint(**inputs)) is SequenceClassifierOutput


@pytest.mark.parametrize("threshold", [-INF, INF])
def test_loss_on_the_merged_logits_and_labels_reach_neither_model(swift, super_, inputs, threshold):
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    problem_types = swift.config.problem_type, super_.config.problem_type
    joint = JointClassifier(swift, super_, Router(threshold=threshold))
    answer = joint(**inputs, labels=labels)
    assert torch.equal(answer.loss, F.cross_entropy(answer.logits, labels))
    assert list(answer) == ["loss", "logits"]
    assert (swift.config.problem_type, super_.config.problem_type) == problem_types
    loss, logits = joint(**inputs, labels=labels, return_dict=False)
    assert torch.equal(loss, answer.loss)
    assert torch.equal(logits, answer.logits)
    assert len(joint(**inputs, return_dict=False)) == 1


@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states", "use_cache"])
def test_what_cannot_be_merged_is_refused(swift, super_, inputs, option):
    joint = JointClassifier(swift, super_, Router(threshold=0.0))
    with pytest.raises(ValueError, match=option):
        joint(**inputs, **{option: True})
    assert joint(**inputs, **{option: False}).logits.shape == (6, 3)


@pytest.mark.parametrize("threshold", [-INF, INF])
def test_logits_are_in_super_s_dtype_and_carry_no_gradient(swift, super_, inputs, threshold):
    joint = JointClassifier(swift, copy.deepcopy(super_).bfloat16(), Router(threshold=threshold))
    answer = joint(**inputs)
    assert answer.logits.dtype == joint.dtype == torch.bfloat16
    assert not answer.logits.requires_grad


def test_autocast_does_not_let_the_answers_dtype_depend_on_the_rows(swift, super_, inputs):
    for threshold in (-INF, INF):
        joint = JointClassifier(swift, super_, Router(threshold=threshold))
        with torch.autocast("cpu", torch.bfloat16):
            assert joint(**inputs).logits.dtype == torch.float32


def test_a_bfloat16_pair_keeps_the_threshold_exact(swift, super_, inputs):
    joint = JointClassifier(copy.deepcopy(swift), copy.deepcopy(super_), Router(threshold=1.31044)).bfloat16()
    assert joint.swift.dtype == torch.bfloat16
    assert joint.router.threshold.item() == torch.tensor(1.31044).item()
    assert joint(**inputs).logits.dtype == torch.bfloat16


def test_device_dtype_config_and_can_generate(swift, super_):
    joint = JointClassifier(swift, super_, Router(threshold=0.0))
    assert joint.device == torch.device("cpu")
    assert joint.dtype == torch.float32
    assert joint.config is super_.config
    assert joint.can_generate() is False


@pytest.mark.parametrize("which", ["swift", "super_"])
def test_training_mode_is_refused_and_building_does_not_change_it(which, inputs):
    models = {"swift": tiny_models.classifier("DistilBert"), "super_": tiny_models.classifier("Bert")}
    models[which].train()
    joint = JointClassifier(**models, router=Router(threshold=0.0))
    assert {name: model.training for name, model in models.items()} == {name: name == which for name in models}
    with pytest.raises(RuntimeError, match=f"{which}: in training mode"):
        joint(**inputs)
    joint.eval()
    assert joint(**inputs).logits.shape == (6, 3)


# ---- what may be a Swift or a Super


def test_a_swift_that_stays_whole_says_so(swift, super_, inputs):
    labels = {0: 0, 1: 1, 2: 2}
    split = tiny_models.half_way(swift, super_, inputs)
    whole = JointClassifier(
        lambda **i: (swift(**i).logits, "more"),
        super_,
        Router(threshold=split.router.threshold.item()),
        label_map=labels,
    )
    answer = whole(**inputs)
    assert answer.routing.mode == "exact+route_logits"
    assert torch.equal(answer.routing.order, split(**inputs).routing.order)


def test_a_made_up_backbone(super_, inputs):
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.EmbeddingBag(tiny_models.VOCAB, 5)
            self.out = nn.Linear(5, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.out(self.embedding(input_ids))

    register_backbone(Bag, head="out")
    swift = Bag().eval()
    joint = JointClassifier(swift, super_, Router(threshold=-INF), label_map={0: 0, 1: 1, 2: 2})
    answer = joint(**inputs)
    assert answer.routing.mode == "exact"
    with torch.no_grad():
        assert_accurate(answer.logits, swift(**inputs), copy.deepcopy(swift).double()(**inputs))


def test_a_backbone_whose_head_is_not_the_last_step(super_, inputs):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.EmbeddingBag(tiny_models.VOCAB, 5)
            self.out = nn.Linear(5, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.out(self.embedding(input_ids)).repeat(1, 2)

    register_backbone(Gated, head="out")
    joint = JointClassifier(Gated().eval(), super_, Router(threshold=0.0), label_map={0: 0, 1: 1, 2: 2})
    with pytest.raises(ValueError, match=r"swift: got \[6, 10\] as the input of its head, wanted \[N, 5\]"):
        joint(**inputs)


def test_super_inputs_and_super_device_reach_the_dispatcher(swift, super_, inputs):
    rows_seen, devices = [], []

    def super_inputs(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        rows_seen.append(rows.tolist())
        return {"ids": inputs["input_ids"][rows]}

    def other(ids: Tensor) -> Tensor:
        devices.append(ids.device.type)
        return torch.zeros(len(ids), 3)

    joint = tiny_models.half_way(
        swift, other, inputs, super_inputs=super_inputs, super_device="meta", label_map={0: 0, 1: 1, 2: 2}
    )
    answer = joint(**inputs)
    assert rows_seen == [answer.routing.order[:3].tolist()]
    assert devices == ["meta"]


def test_trim_reaches_the_dispatcher(swift, super_, inputs):
    lengths = []

    def spy(**inputs: Tensor) -> Any:
        lengths.append(inputs["input_ids"].shape[1])
        return super_(**inputs).logits

    for trim in (True, False):
        joint = JointClassifier(swift, spy, Router(threshold=INF), trim=trim, label_map={0: 0, 1: 1, 2: 2})
        joint(**tiny_models.inputs((3, 4)))
    assert lengths == [4, 9]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"problem_type": "multi_label_classification"}, "a multi-label head"),
        ({"num_labels": 1}, "a regression head"),
        ({"problem_type": "regression"}, "a regression head"),
    ],
)
@pytest.mark.parametrize("which", ["swift", "super_"])
def test_other_heads_are_refused(swift, super_, which, config, reason):
    models = {"swift": swift, "super_": super_, which: tiny_models.classifier("Bert", **config)}
    with pytest.raises(ValueError, match=f"{which}: {reason}"):
        JointClassifier(**models, router=Router(threshold=0.0))


def test_an_unknown_dispatch_mode_lists_those_that_exist(swift, super_):
    with pytest.raises(ValueError, match="dispatch: got 'buckets', wanted one of auto, exact, bucket, capacity"):
        JointClassifier(swift, super_, Router(threshold=0.0), dispatch="buckets")


def test_a_calibration_is_a_router_for_the_weights_it_was_made_of(swift, super_, inputs, tmp_path):
    score = np.arange(100, dtype=np.float32)
    known = {"swift_sha256": fingerprint(swift), "super_sha256": fingerprint(super_)}
    right = np.arange(100) > 50
    c = calibrate({"margin": score}, right, ~right, swift_share=0.3, temperature=2.0, provenance=known)
    c.save(tmp_path / "c.json")
    for source in (c, tmp_path / "c.json", str(tmp_path / "c.json")):
        router = JointClassifier(swift, super_, source).router
        assert (router.score, router.temperature, router.threshold.item()) == ("margin", 2.0, c.threshold)
    other = tiny_models.classifier("DistilBert", seed=9)
    with pytest.raises(ValueError, match="swift: got other weights than the calibration was made with"):
        JointClassifier(other, super_, c)
    with pytest.raises(ValueError, match="super_: got other weights"):
        JointClassifier(swift, tiny_models.classifier("Bert", seed=9), tmp_path / "c.json")
    JointClassifier(swift, lambda **inputs: super_(**inputs), c, label_map={i: i for i in range(3)})  # has no weights
    with pytest.raises(TypeError, match="router: got float, wanted a Router, a Calibration or its file"):
        JointClassifier(swift, super_, 0.5)
