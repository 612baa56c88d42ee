"""What a Cascade computes: which model answers each row, what its record says; and two models are a JointClassifier."""

from __future__ import annotations

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import torch._dynamo
import transformers
from test_joint_hf import TEXTS, named, tokenizer  # noqa: F401  a fixture
from torch import Tensor
from torch.nn import functional as F

from elang import reference
from elang.calibration.cascade import CascadeCosts, calibrate_cascade
from elang.cascade import Cascade, CascadeRouting
from elang.export import Exportable
from elang.fingerprint import fingerprint
from elang.joint import JointClassifier
from elang.router import Router

pytestmark = pytest.mark.usefixtures("one_thread")

INF, NAN = float("inf"), float("nan")
# Room for every row, so that all modes have to give the same answers.
MODES = {"exact": {}, "bucket": {"buckets": (2, 4)}, "capacity": {"capacity": 1.0}}
LENGTHS = (9, 3, 5, 1, 7, 2, 8)


@pytest.fixture(scope="module")
def models():
    return [
        tiny_models.classifier("DistilBert"),
        tiny_models.classifier("Bert", seed=1),
        tiny_models.classifier("Roberta", seed=2),
        tiny_models.classifier("Bert", seed=3),
    ]


def routers(*thresholds: float) -> list[Router]:
    return [Router(threshold=t) for t in thresholds]


class Scripted:
    """Model k, as sure of a row as its token k says, if it works at all; its answer is class k."""

    def __init__(self, k: int, classes: int = 4) -> None:
        self.k, self.classes = k, classes
        self.calls: list[dict[str, Any]] = []
        self.fails: Any = None

    def __call__(self, **inputs: Any) -> Tensor:
        self.calls.append(inputs)
        if self.fails is not None:
            self.fails(inputs["input_ids"])
        sure = inputs["input_ids"][:, self.k].float()
        return torch.zeros(len(sure), self.classes).index_copy(1, torch.tensor([self.k]), sure[:, None])


def scripted(*sure: tuple[int, ...], n: int = 3, threshold: float = 5.0, **options: Any) -> tuple[Any, Any, Any]:
    """A cascade of n of them, and rows of which model k is as sure as said."""
    parts = [Scripted(k) for k in range(n)]
    options["label_maps"] = {i: i for i in range(4)}
    cascade = Cascade(parts, routers(*[threshold] * (n - 1)), **options)
    ids = torch.tensor(sure)
    return cascade, parts, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def answers_alone(models: list[Any], inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each model's logits of all rows, and its scores."""
    with torch.no_grad():
        logits = [model(**inputs).logits for model in models]
    return logits, [reference.score_logits(each) for each in logits]


def half_way(score: Tensor, routed: int) -> float:
    """A threshold that routes so many of the rows."""
    edges = torch.cat([torch.tensor([-INF]), score.sort().values, torch.tensor([INF])])
    return edges[routed : routed + 2].mean().item()


def same_record(got: Any, want: Any) -> None:
    for name in ("score", "order", "n_routed", "overflow", "degraded"):
        ours, theirs = getattr(got, name), getattr(want, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype), name
    assert got.mode == want.mode


@pytest.mark.parametrize(
    "options", [*({"dispatch": m, **MODES[m]} for m in MODES), dict(dispatch="capacity", capacity=2)]
)
def test_two_models_are_a_joint_classifier_bit_for_bit(models, options):
    inputs, labels = tiny_models.inputs(LENGTHS), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    score = answers_alone(models[:1], inputs)[1][0]
    joint = JointClassifier(models[0], models[1], Router(threshold=0.0), **options)
    cascade = Cascade(models[:2], routers(0.0), **options)
    for routed in range(8):
        for each in (joint, cascade):
            each.router.set_threshold(half_way(score, routed))
        got, want = cascade(**inputs, labels=labels), joint(**inputs, labels=labels)
        assert type(got) is type(want)
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.loss, want.loss)
        same_record(got.routing, want.routing)
        (stage,) = got.routing.stages
        same_record(stage, want.routing)
        by_super = torch.zeros(7, dtype=torch.int64)
        by_super[want.routing.order[: int(want.routing.n_routed)]] = 1
        if want.routing.degraded is not None:
            by_super[want.routing.degraded] = 0
        assert torch.equal(got.routing.answered_by, by_super)
    assert cascade.stats == joint.stats == cascade.stage_stats[0]
    assert len(cascade.stage_stats) == 1


@pytest.mark.parametrize("mode", MODES)
def test_each_row_is_answered_by_the_first_model_that_is_sure(models, mode):
    inputs = tiny_models.inputs(LENGTHS)
    logits, scores = answers_alone(models, inputs)
    cascade = Cascade(models, routers(0.0, 0.0, 0.0), mode, **MODES[mode])
    for routed in itertools.product((0, 5, 7), (0, 3, 7), (0, 4, 7)):
        thresholds = [half_way(score, count) for score, count in zip(scores, routed, strict=False)]
        for router, threshold in zip(cascade.routers, thresholds, strict=True):
            router.set_threshold(threshold)
        before = cascade.stage_stats
        answer = cascade(**inputs)

        unsure = torch.stack([score < t for score, t in zip(scores, [*thresholds, -INF], strict=True)]).long()
        who = unsure.argmin(dim=0)
        assert torch.equal(answer.routing.answered_by, who)
        want = torch.stack(logits)[who, torch.arange(7)]
        torch.testing.assert_close(answer.logits, want, rtol=1e-4, atol=1e-5)

        assert len(answer.routing.stages) == 3
        for k, stage in enumerate(answer.routing.stages):
            seen, sent = who >= k, who > k
            want = scores[k].where(seen, torch.tensor(NAN))
            torch.testing.assert_close(stage.score, want, rtol=1e-4, atol=1e-5, equal_nan=True)
            rows = torch.arange(7)
            assert torch.equal(stage.order, torch.cat([rows[sent], rows[~sent]]))
            assert stage.n_routed.tolist() == [int(sent.sum())]
            now, then = cascade.stage_stats[k], before[k]
            assert (now.rows - then.rows, now.routed - then.routed) == (int(seen.sum()), int(sent.sum()))
            assert now.degraded == 0
        assert int(answer.routing.overflow or 0) == 0


def test_exact_is_the_nest_of_joint_classifiers_bit_for_bit(models):
    inputs = tiny_models.inputs(LENGTHS)
    scores = answers_alone(models, inputs)[1]
    one, two = half_way(scores[0], 5), half_way(scores[1], 3)
    nest = JointClassifier(
        models[0], JointClassifier(models[1], models[2], Router(threshold=two)), Router(threshold=one)
    )
    assert torch.equal(Cascade(models[:3], routers(one, two))(**inputs).logits, nest(**inputs).logits)


def test_later_models_see_their_rows_alone_and_no_input_of_ours():
    for options in ({}, {"dispatch": "bucket", "buckets": (2, 4)}, {"dispatch": "capacity", "capacity": 1.0}):
        cascade, parts, inputs = scripted((9, 0, 0), (1, 1, 1), (2, 9, 0), (3, 0, 2), (9, 0, 0), **options)
        answer = cascade(**inputs)
        assert answer.routing.answered_by.tolist() == answer.logits.argmax(dim=1).tolist() == [0, 2, 1, 2, 0]
        for part in parts:
            (call,) = part.calls
            assert set(call) == set(inputs)
    cascade, parts, inputs = scripted((9, 0, 0), (1, 1, 1), (2, 9, 0), (3, 0, 2), (9, 0, 0))
    cascade(**inputs)
    seen = [part.calls[0]["input_ids"].tolist() for part in parts]
    rows = inputs["input_ids"].tolist()
    assert seen == [rows, rows[1:4], [rows[1], rows[3]]]


def test_copies_that_fill_a_batch_take_no_room():
    """Of the rows that model 0 routes, the last, which fills the next batch, is the one model 1 is least sure of."""
    sure = [(0, 1, 9), (0, 2, 9), (0, 0, 9), (9, 0, 0), (9, 0, 0), (9, 0, 0)]
    cascade, _, inputs = scripted(*sure, dispatch="capacity", capacity=[6, 3])
    answer = cascade(**inputs)
    assert answer.routing.answered_by.tolist() == [2, 2, 2, 0, 0, 0]
    assert answer.routing.overflow.tolist() == [0]
    cascade(input_ids=inputs["input_ids"][3:], attention_mask=inputs["attention_mask"][3:])  # nothing is routed
    assert [stats[:4] for stats in cascade.stage_stats] == [(9, 3, 0, 0), (3, 3, 0, 0)]
    bucket, _, inputs = scripted(*sure, dispatch="bucket", buckets=(5, 6))
    assert bucket(**inputs).routing.answered_by.tolist() == [2, 2, 2, 0, 0, 0]
    assert [stats[:4] for stats in bucket.stage_stats] == [(6, 3, 0, 0), (3, 3, 0, 0)]


def test_want_of_room_is_told_of_every_stage():
    sure = [(0, 1, 9), (1, 2, 9), (2, 0, 9), (3, 4, 9), (9, 0, 0)]
    cascade, _, inputs = scripted(*sure, dispatch="capacity", capacity=(3, 2))
    routing = cascade(**inputs).routing
    assert routing.answered_by.tolist() == [2, 1, 2, 0, 0]  # row 3 had no room at model 1, row 1 none at model 2
    first, second = routing.stages
    assert first.degraded.tolist() == [False, False, False, True, False]
    assert second.degraded.tolist() == [False, True, False, False, False]
    assert routing.degraded.tolist() == [False, True, False, True, False]
    assert (first.overflow.tolist(), second.overflow.tolist(), routing.overflow.tolist()) == ([1], [1], [2])
    assert (second.n_routed.tolist(), second.order.tolist()) == ([3], [0, 1, 2, 3, 4])
    assert [stats[:4] for stats in cascade.stage_stats] == [(5, 4, 1, 1), (3, 3, 1, 1)]
    none, _, inputs = scripted(*sure, dispatch="capacity", capacity=0)
    assert none(**inputs).routing.answered_by.tolist() == [0] * 5
    assert none(**inputs).routing.overflow.tolist() == [4]


def broken(ids: Tensor) -> None:
    raise RuntimeError("down")


@pytest.mark.parametrize(("fails", "who"), [(1, [0, 0, 0, 0]), (2, [0, 1, 1, 1])])
def test_rows_whose_next_model_fails_keep_the_answer_they_have(fails, who):
    sure = [(9, 0, 0), (1, 1, 9), (2, 9, 0), (3, 2, 9)]
    for options in ({}, {"dispatch": "bucket"}, {"dispatch": "capacity", "capacity": 4}):
        cascade, parts, inputs = scripted(*sure, on_super_error="swift", **options)
        parts[fails].fails = broken
        routing = cascade(**inputs).routing
        assert routing.answered_by.tolist() == who
        assert routing.degraded.tolist() == ([False, True, True, True] if fails == 1 else [False, True, False, True])
        parts[fails].fails = None
        assert cascade(**inputs).routing.answered_by.tolist() == [0, 2, 1, 2]
        loud, parts, inputs = scripted(*sure, **options)
        parts[fails].fails = broken
        with pytest.raises(RuntimeError, match="down"):
            loud(**inputs)


def test_a_last_model_that_hangs_costs_no_answer_of_the_models_before_it():
    cascade, parts, inputs = scripted(
        (9, 0, 0), (1, 1, 9), (2, 9, 0), (3, 2, 9), on_super_error="swift", super_timeout=0.4
    )
    done = threading.Event()
    parts[2].fails = lambda ids: done.wait()
    assert cascade(**inputs).routing.answered_by.tolist() == [0, 1, 1, 1]
    done.set()


@pytest.mark.parametrize(
    "options", [{}, {"dispatch": "bucket", "buckets": (6,)}, {"dispatch": "capacity", "capacity": 6}]
)
def test_the_record_of_a_batch_that_ran_in_halves(options):
    sure = [(1, 1, 9), (9, 0, 0), (2, 9, 0), (3, 2, 9), (4, 9, 9), (0, 9, 9), (9, 9, 9), (2, 0, 0)]
    whole, _, inputs = scripted(*sure, **options)
    halves, parts, _ = scripted(*sure, **options)

    def out_of_memory(ids: Tensor) -> None:
        if len(ids) > 3:
            raise MemoryError

    parts[1].fails = out_of_memory
    want, got = whole(**inputs), halves(**inputs)
    assert [len(call["input_ids"]) for call in parts[1].calls] == [6, 3, 3]
    assert len(got.routing.rest) == 2
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.routing.answered_by, want.routing.answered_by)
    assert want.routing.answered_by.tolist() == [2, 0, 1, 2, 1, 1, 0, 2]
    torch.testing.assert_close(got.routing.stages[1].score, want.routing.stages[1].score, equal_nan=True)
    assert got.routing.stages[1].order.tolist() == want.routing.stages[1].order.tolist()
    assert got.routing.stages[1].n_routed.tolist() == [3]


@pytest.mark.parametrize("mode", MODES)
def test_threads_get_the_records_of_their_own_batches(models, mode):
    batches = [tiny_models.inputs(tuple(range(1, n + 2)), seed=n) for n in range(8)]
    scores = [answers_alone(models[:2], batch)[1] for batch in batches]
    medians = [torch.cat([each[k] for each in scores]).median().item() for k in range(2)]
    cascade = Cascade(models[:3], routers(*medians), mode, **MODES[mode])
    alone = [cascade(**batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: cascade(**batches[i % 8]), range(48)))
    for i, answer in enumerate(together):
        assert torch.equal(answer.logits, alone[i % 8].logits)
        assert torch.equal(answer.routing.answered_by, alone[i % 8].routing.answered_by)
        for got, want in zip(answer.routing.stages, alone[i % 8].routing.stages, strict=True):
            assert torch.equal(got.score.nan_to_num(-1), want.score.nan_to_num(-1))
    assert len({tuple(answer.routing.answered_by.tolist()) for answer in alone}) == 8


def test_a_row_that_is_not_finite_goes_through_to_the_last_model(models):
    mask, embeds = tiny_models.inputs(LENGTHS)["attention_mask"], torch.randn(7, 9, 16)
    embeds[2] = NAN
    cascade = Cascade([models[0], models[1], models[3]], routers(-INF, -INF))
    routing = cascade(inputs_embeds=embeds, attention_mask=mask).routing
    assert routing.answered_by.tolist() == [0, 0, 2, 0, 0, 0, 0]
    empty = {"input_ids": torch.zeros(0, 9, dtype=torch.int64)}
    for mode in MODES:
        parts = [Scripted(k) for k in range(3)]
        none = Cascade(parts, routers(5.0, 5.0), mode, label_maps={i: i for i in range(4)}, **MODES[mode])(**empty)
        assert none.logits.shape == (0, 4)
        assert none.routing.answered_by.shape == none.routing.stages[1].score.shape == (0,)


# ---- the Hugging Face model


def test_answers_are_in_the_last_model_s_label_order(inputs):
    parts = [
        named("DistilBert", "pos", "neg", "neutral"),
        named("Bert", "bad", "ok", "good", seed=1),
        named("Bert", "NEG", "Neutral", "POS", seed=2),
    ]
    maps = [None, {"bad": "neg", "ok": "neutral", 2: "pos"}]
    logits = answers_alone(parts, inputs)[0]
    for thresholds, want in (((-INF, 0), logits[0][:, [1, 2, 0]]), ((INF, -INF), logits[1]), ((INF, INF), logits[2])):
        answer = Cascade(parts, routers(*thresholds), label_maps=maps)(**inputs)
        torch.testing.assert_close(answer.logits, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="label_map: got None, wanted one, as Swift's labels are"):
        Cascade(parts, routers(0.0, 0.0))
    unnamed = Cascade(
        [*parts[:1], lambda **i: parts[0](**i).logits[:, [1, 0, 2]]], routers(0.0), label_maps=[{0: 1, 1: 0, 2: 2}]
    )
    assert unnamed.config.id2label == {0: "neg", 1: "pos", 2: "neutral"}


@pytest.mark.parametrize("thresholds", [(-INF, -INF), (INF, -INF), (INF, INF)])
def test_output_class_dtype_and_config_are_the_last_model_s(models, inputs, thresholds):
    last = tiny_models.classifier("GPT2").bfloat16()
    cascade = Cascade([models[0], models[1], last], routers(*thresholds))
    answer = cascade(**inputs)
    assert type(answer) is transformers.modeling_outputs.SequenceClassifierOutputWithPast
    assert list(answer) == ["logits"]
    assert answer.logits.dtype == cascade.dtype == torch.bfloat16
    assert isinstance(answer.routing, CascadeRouting)
    assert cascade.config is last.config
    assert cascade.device == torch.device("cpu")
    assert cascade.can_generate() is False
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    loss, logits = cascade(**inputs, labels=labels, return_dict=False)
    assert torch.equal(loss, F.cross_entropy(logits, labels))
    with pytest.raises(ValueError, match="output_attentions"):
        cascade(**inputs, output_attentions=True)


def test_training_mode_is_refused_by_the_model_s_place(models, inputs):
    parts = [copy.deepcopy(model) for model in models[:3]]
    parts[1].train()
    cascade = Cascade(parts, routers(INF, INF))
    with pytest.raises(RuntimeError, match=r"models\[1\]: in training mode"):
        cascade(**inputs)
    cascade.eval()
    assert cascade(**inputs).logits.shape == (6, 3)


def test_a_copy_stands_alone(models, inputs):
    cascade = Cascade(models[:3], routers(INF, INF))
    want = cascade(**inputs).logits
    twin = copy.deepcopy(cascade)
    twin.routers[1].set_threshold(-INF)
    assert torch.equal(cascade(**inputs).logits, want)
    assert twin(**inputs).routing.answered_by.tolist() == [1] * 6
    with torch.no_grad():
        for parameter in twin.bfloat16().parameters():
            parameter.zero_()
    assert twin.dtype == torch.bfloat16
    assert twin.routers[1].threshold.dtype == torch.float32
    assert torch.equal(cascade(**inputs).logits, want)


def test_inputs_and_devices_of_each_model():
    devices = []

    def other_ids(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        return {"input_ids": inputs["input_ids"][rows] + 1, "attention_mask": inputs["attention_mask"][rows]}

    cascade, parts, inputs = scripted(
        (9, 0, 0), (1, 1, 1), (3, 0, 2), dispatch="bucket", super_inputs=[other_ids, None], super_devices=[None, "meta"]
    )
    parts[2].fails = lambda ids: devices.append(ids.device.type)
    with pytest.raises(RuntimeError):  # nothing comes back from that device
        cascade(**inputs)
    assert devices == ["meta"]
    assert parts[1].calls[0]["input_ids"].tolist() == [[2, 2, 2], [4, 1, 3]]
    assert set(parts[1].calls[0]) == set(inputs)


def test_a_saved_cascade_comes_back_the_same(tmp_path, inputs):
    parts = [
        named("DistilBert", "bad", "good"),
        named("Bert", "pos", "neg", seed=1),
        named("Bert", "neg", "pos", seed=2),
    ]
    chosen = [Router("margin", threshold=0.1, temperature=0.3), Router(threshold=INF)]
    maps = [{"bad": 0, 1: "pos"}, None]
    options = dict(dispatch="capacity", capacity=(0.5, 2), trim=False, on_super_error="swift", super_timeout=3.0)
    cascade = Cascade(parts, chosen, label_maps=maps, **options)
    cascade.save_pretrained(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == {
        "elang.json",
        *(f"{i}/{name}" for i in range(3) for name in ("config.json", "model.safetensors")),
    }
    back = Cascade.from_pretrained(tmp_path)
    assert back._settings == cascade._settings
    assert [type(each) for each in back._settings["capacity"]] == [float, int]
    got, want = back(**inputs), cascade(**inputs)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.routing.answered_by, want.routing.answered_by)
    for ours, theirs in zip(back.routers, chosen, strict=True):
        assert (ours.score, ours.temperature) == (theirs.score, theirs.temperature)
        assert torch.equal(ours.threshold, theirs.threshold)
    other = Cascade.from_pretrained(tmp_path, dispatch="bucket")
    assert (other.dispatch, other.super_.dispatch, other.capacity) == ("bucket", "bucket", None)


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path, models):
    cascade = Cascade([*models[:2], lambda **i: None], routers(0, 0), label_maps=[None, {i: i for i in range(3)}])
    with pytest.raises(TypeError, match=r"models\[2\]: got function, wanted a model with save_pretrained"):
        cascade.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []

    def super_inputs(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        return {name: value[rows] for name, value in inputs.items()}

    Cascade(models[:3], routers(0, 0), super_inputs=[None, super_inputs]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"super_inputs: got \[False, False\]"):
        Cascade.from_pretrained(tmp_path)
    back = Cascade.from_pretrained(tmp_path, super_inputs=[None, super_inputs])
    assert back.super_.plan.super_inputs is super_inputs


def test_a_calibration_is_the_routers_for_the_weights_it_was_made_of(models, tmp_path):
    rng = np.random.default_rng(0)
    scores, right = rng.normal(size=(2, 60)), rng.random((3, 60)) < 0.8
    costs = CascadeCosts(unit="ms", rows=1, first=1.0, later=({1: 3.0}, {1: 9.0}))
    c = calibrate_cascade(
        scores,
        right,
        costs=costs,
        max_cost=5.0,
        score="margin",
        temperature=[1.0, 2.0],
        fingerprints=[fingerprint(m) for m in models[:3]],
    )
    c.save(tmp_path / "c.json")
    for source in (c, tmp_path / "c.json"):
        got = Cascade(models[:3], source).routers
        assert [(r.score, r.temperature) for r in got] == [("margin", 1.0), ("margin", 2.0)]
        assert [r.threshold.item() for r in got] == [s.threshold for s in c.settings]
    with pytest.raises(ValueError, match=r"models\[1\]: got other weights than the calibration was made with"):
        Cascade([models[0], models[3], models[2]], c)
    with pytest.raises(ValueError, match="routers: got a calibration of 3 models, wanted of 4"):
        Cascade(models, c)


def test_transformers_pipeline(tokenizer):  # noqa: F811
    parts = [named("Bert", "neg", "pos", seed=s) for s in range(2)] + [named("Bert", "pos", "neg", seed=2)]
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    scores = answers_alone(parts, encoded)[1]
    cascade = Cascade(parts, routers(half_way(scores[0], 4), half_way(scores[1], 3)))
    want = cascade(**encoded)
    assert len(want.routing.answered_by.unique()) > 1
    classify = transformers.pipeline("text-classification", model=cascade, tokenizer=tokenizer, device="cpu")
    got = [answer["label"] for answer in classify(TEXTS, batch_size=6)]
    assert got == [("pos", "neg")[i] for i in want.logits.argmax(dim=1).tolist()]


# ---- compilers


def plain(k: int) -> Any:
    """A scripted model that a compiler may see: nothing is remembered."""

    def model(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return F.pad(input_ids[:, k, None].float(), (k, 3 - k))

    return model


BATCHES = [  # none, some and all rows routed, at either stage
    [(9, 0, 0), (1, 1, 9), (2, 9, 0), (3, 2, 9), (0, 9, 9)],
    [(9, 0, 0), (9, 0, 0), (9, 9, 0), (9, 2, 9), (9, 9, 9)],
    [(1, 0, 0), (2, 1, 9), (0, 3, 0), (3, 2, 9), (0, 2, 9)],
]


def plain_cascade(mode: str, **options: Any) -> Cascade:
    torch.compiler.reset()
    options["label_maps"] = {i: i for i in range(4)}
    return Cascade([plain(k) for k in range(3)], routers(5.0, 5.0), mode, **options)


def test_capacity_is_one_graph():
    cascade = plain_cascade("capacity", capacity=[3, 2])
    compiled = torch.compile(cascade, fullgraph=True, backend="aot_eager")
    mask, degraded = torch.ones(5, 3, dtype=torch.int64), 0
    exported = torch.export.export(
        Exportable(cascade), (), {"input_ids": torch.tensor(BATCHES[0]), "attention_mask": mask}
    ).module()
    for batch in BATCHES:
        inputs = {"input_ids": torch.tensor(batch), "attention_mask": mask}
        start = cascade.stage_stats
        want, middle = cascade(**inputs), cascade.stage_stats
        got, end = compiled(**inputs), cascade.stage_stats
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.routing.answered_by, want.routing.answered_by)
        assert torch.equal(got.routing.degraded, want.routing.degraded)
        for first, second, third in zip(start, middle, end, strict=True):
            assert [b - a for a, b in zip(first[:4], second[:4], strict=True)] == [
                c - b for b, c in zip(second[:4], third[:4], strict=True)
            ]
        assert torch.equal(exported(**inputs)[0], want.logits)
        assert cascade.stage_stats == end
        degraded += int(want.routing.degraded.sum())
    assert degraded > 0


def test_a_compiled_cascade_agrees():
    cascade = plain_cascade("auto")
    compiled = torch.compile(cascade, dynamic=True, backend="eager")
    for batch in BATCHES[:2]:
        inputs = {"input_ids": torch.tensor(batch), "attention_mask": torch.ones(5, 3, dtype=torch.int64)}
        got, want = compiled(**inputs), cascade(**inputs)
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.routing.answered_by, want.routing.answered_by)
        assert got.routing.mode == "bucket+route_logits"


BAD = {
    "one model": (1, [], {}, ValueError, "models: got 1, wanted at least 2"),
    "too few routers": (3, [0.0], {}, ValueError, "routers: got 1, wanted 2, one less than models"),
    "graph": (3, [0.0, 0.0], dict(dispatch="graph"), ValueError, "dispatch: got 'graph' for 3 models"),
    "settings": (3, [0.0, 0.0], dict(capacity=[1]), ValueError, "capacity: got 1, wanted 2, one for each"),
    "dispatch": (3, [0.0, 0.0], dict(dispatch="buckets"), ValueError, "dispatch: got 'buckets', wanted one of"),
    "no capacity": (3, [0.0, 0.0], dict(dispatch="capacity"), ValueError, "capacity: got None"),
    "on_super_error": (3, [0.0, 0.0], dict(on_super_error="no"), ValueError, "on_super_error: got 'no'"),
    "super_timeout": (3, [0.0, 0.0], dict(super_timeout=0), ValueError, "super_timeout: got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_fits_nothing_is_refused(models, case):
    count, thresholds, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        Cascade(models[:count], routers(*thresholds), **options)


def test_routers_and_heads_of_the_wrong_kind(models):
    with pytest.raises(TypeError, match="routers: got Router, wanted a sequence of them"):
        Cascade(models[:2], Router(threshold=0.0))
    with pytest.raises(TypeError, match="router: got float, wanted a Router"):
        Cascade(models[:2], [0.5])
    for place in range(3):
        parts = list(models[:3])
        parts[place] = tiny_models.classifier("Bert", problem_type="multi_label_classification")
        with pytest.raises(ValueError, match=rf"models\[{place}\]: a multi-label head"):
            Cascade(parts, routers(0.0, 0.0))
