from __future__ import annotations

import math

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from transformers import BertModel

from elang import JointClassifier, Router, calibrate, fingerprint
from elang.evaluation import timing
from elang.evaluation.pair_bench import PairBench, bench_pair, random_rows
from elang.evaluation.timing import NaiveCascade

pytestmark = pytest.mark.usefixtures("one_thread")

OF_SWIFT, OF_SUPER = 1.0, 4.0  # seconds of a row, on the tests' clock
OF_DISPATCH, OF_NAIVE = 0.5, 0.25  # of a batch


@pytest.fixture(scope="module")
def swift():
    return tiny_models.classifier("Bert", num_hidden_layers=1)


@pytest.fixture(scope="module")
def super_():
    return tiny_models.classifier("Bert", seed=1, num_hidden_layers=2)


@pytest.fixture
def clock(monkeypatch):
    """Stands still but for the models' work, which it knows: what Super is given stays in `clock.seen`."""

    class Clock:
        now = 0.0

        def __init__(self):
            self.seen = []

        def __call__(self):
            return self.now

    clock = Clock()
    forward, joint, naive = BertModel.forward, JointClassifier.forward, NaiveCascade.__call__

    def of_model(self, input_ids=None, **inputs):
        of_super = self.config.num_hidden_layers == 2
        clock.now += len(input_ids) * (OF_SUPER if of_super else OF_SWIFT)
        if of_super:
            clock.seen.append(input_ids)
        return forward(self, input_ids=input_ids, **inputs)

    def of_joint(self, **inputs):
        clock.now += OF_DISPATCH
        return joint(self, **inputs)

    def of_naive(self, **inputs):
        clock.now += OF_NAIVE
        return naive(self, **inputs)

    monkeypatch.setattr(BertModel, "forward", of_model)
    monkeypatch.setattr(JointClassifier, "forward", of_joint)
    monkeypatch.setattr(NaiveCascade, "__call__", of_naive)
    return clock


def lowest(swift, inputs, count):
    """Which rows [N] have the lowest energies."""
    with torch.no_grad():
        score = swift(**inputs).logits.logsumexp(dim=1)
    return torch.zeros(len(score), dtype=torch.bool).scatter(0, score.argsort()[:count], True)


# ---- a pair


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_seconds_and_ratios_by_hand(swift, super_, clock, share):
    inputs = random_rows(swift, super_, 8, length=9, seed=7)
    in_batch = lowest(swift, inputs, round(8 * share)).view(2, 4).sum(dim=1).tolist()
    assert sorted(in_batch) == {0.0: [0, 0], 0.5: [1, 3], 1.0: [4, 4]}[share]
    found = bench_pair(swift, super_, inputs, batch_sizes=[4], shares=[share], rounds=3, clock=clock)
    routed, of_bucket = OF_SUPER * sum(in_batch), OF_SUPER * sum({3: 4}.get(n, n) for n in in_batch)
    joint = {
        "exact": 8 * OF_SWIFT + routed + 2 * OF_DISPATCH,
        "bucket": 8 * OF_SWIFT + of_bucket + 2 * OF_DISPATCH,
        "capacity": 8 * OF_SWIFT + OF_SUPER * 2 * max(in_batch) + 2 * OF_DISPATCH,
    }
    naive = 8 * OF_SWIFT + routed + 2 * OF_NAIVE
    assert [point.mode for point in found.points] == list(joint)
    for point in found.points:
        seconds = joint[point.mode]
        assert point.share_routed == share
        assert (point.swift_seconds, point.routed_seconds, point.super_seconds) == (8 * OF_SWIFT, routed, 8 * OF_SUPER)
        assert (point.naive_seconds, point.joint_seconds) == (naive, seconds)
        assert point.dispatch_efficiency == pytest.approx((8 * OF_SWIFT + routed) / seconds)
        assert point.over_super == pytest.approx(8 * OF_SUPER / seconds)
        assert point.over_naive == pytest.approx(naive / seconds)
        assert point.capacity == (max(in_batch) if point.mode == "capacity" else None)


def test_costs_are_of_whole_batches_by_size(swift, super_, clock):
    inputs = random_rows(swift, super_, 10, length=4)
    found = bench_pair(swift, super_, inputs, batch_sizes=[1, 5], shares=[0], dispatch=["exact"], rounds=1, clock=clock)
    assert (found.costs.unit, found.costs.rows, found.costs.swift) == ("s", 5, 5 * OF_SWIFT)
    assert found.costs.super == {size: size * OF_SUPER for size in (1, 2, 4, 5)}
    assert found.costs.of_share([0, 1]).tolist() == pytest.approx([OF_SWIFT, OF_SWIFT + OF_SUPER])
    score = np.linspace(0, 1, 50)
    right = np.ones(50, dtype=np.bool_)
    made = calibrate({"energy": score}, ~right, right, max_cost=OF_SWIFT + 0.5 * OF_SUPER, costs=found.costs)
    assert made.target.share_kept == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("rows", [1, 6, 13])
def test_the_sizes_measured_are_those_that_bucket_dispatch_makes(swift, super_, rows):
    inputs = random_rows(swift, super_, rows, length=4)
    joint = JointClassifier(swift, super_, Router(threshold=-math.inf), "bucket")
    scores = joint(**inputs).routing.score
    for threshold in (*scores.tolist(), math.inf):
        joint.router.set_threshold(threshold)
        joint(**inputs)
    found = bench_pair(swift, super_, inputs, batch_sizes=[rows], shares=[0], dispatch=["exact"], rounds=1)
    assert list(found.costs.super) == list(joint.stats.buckets)


def test_costs_are_of_other_rows_in_every_round(swift, super_, clock):
    inputs = random_rows(swift, super_, 6, length=9, ragged=True)
    bench_pair(swift, super_, inputs, batch_sizes=[2], shares=[0], dispatch=["exact"], rounds=3, clock=clock)
    single = [ids for ids in clock.seen if len(ids) == 1]
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) > 2
    assert [ids.tolist() for ids in single] == [inputs["input_ids"][i : i + 1, : lengths[i]].tolist() for i in range(4)]


def test_a_share_is_met_by_the_rows_of_lowest_energy(swift, super_, clock):
    inputs = random_rows(swift, super_, 14, length=9, ragged=True)
    shares = (0, 0.12, 0.31, 0.5, 1)
    found = bench_pair(
        swift, super_, inputs, batch_sizes=[1, 4], shares=shares, dispatch=["exact"], rounds=1, clock=clock
    )
    for size, rows in ((1, 14), (4, 12)):  # two rows make no batch of four
        points = [point for point in found.points if point.batch_size == size]
        assert [point.share_routed for point in points] == [round(share * rows) / rows for share in shares]
        assert [point.swift_seconds for point in points] == [rows * OF_SWIFT] * len(shares)
    clock.seen.clear()
    bench_pair(swift, super_, inputs, batch_sizes=[1], shares=[0.31], dispatch=["exact"], rounds=1, clock=clock)
    of_costs = 2  # the warm-up and the round
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    routed = lowest(swift, inputs, 4).tolist()
    rows = [inputs["input_ids"][i, : lengths[i]].tolist() for i in range(14)]
    seen = [ids.squeeze(0).tolist() for ids in clock.seen[of_costs:]]
    # Super sees every row when it is timed alone; a routed one to be told, by the joint model, the cascade and alone.
    for row, by_joint in zip(rows, routed, strict=True):
        assert seen.count(row) == 2 + by_joint * (1 + 3 * 2)


def test_the_share_is_the_one_that_was_measured(swift, super_):
    one = random_rows(swift, super_, 1, length=5)
    alike = {name: value.repeat(4, 1) for name, value in one.items()}
    found = bench_pair(swift, super_, alike, batch_sizes=[1], shares=[0.5], rounds=1)
    assert {point.share_routed for point in found.points} == {0.0}


def test_what_always_runs_super_has_a_turn_of_its_own(swift, super_, monkeypatch):
    turns = []
    alternate = timing.alternate
    monkeypatch.setattr(timing, "alternate", lambda runs, *a, **k: turns.append([*runs]) or alternate(runs, *a, **k))
    inputs = random_rows(swift, super_, 2, length=3)
    bench_pair(swift, super_, inputs, batch_sizes=[2], shares=[0, 1], rounds=1)
    parts, apart = ["swift", "naive", "exact", "bucket"], ["super", "capacity"]
    assert turns == [["1", "2", "swift"], parts, apart, [*parts, "routed"], apart]


def test_everything_timed_waits_for_its_device(swift, super_, monkeypatch):
    waited = []
    monkeypatch.setattr(timing, "awaited", lambda run, device: waited.append(device) or run)
    inputs = random_rows(swift, super_, 2, length=3)
    bench_pair(swift, super_, inputs, batch_sizes=[2], shares=[1], rounds=1)
    assert waited == [torch.device("cpu")] * (3 + 5 + 2)


def test_what_is_recorded(swift, super_, tmp_path):
    progress = []
    inputs = random_rows(swift, super_, 7, length=9, ragged=True)
    found = bench_pair(
        swift,
        super_,
        inputs,
        batch_sizes=[3, 2],
        shares=[0, 1],
        dispatch=["bucket"],
        rounds=2,
        data="seven rows",
        report=lambda *each: progress.append(each),
    )
    assert (found.rows, found.length, found.rounds, found.threads) == (7, 9, 2, 1)
    assert (found.data, found.dtype, found.device[:3]) == ("seven rows", "float32", "cpu")
    assert (found.torch, found.swift) == (torch.__version__, "BertForSequenceClassification")
    assert [(p.batch_size, p.share_routed) for p in found.points] == [(3, 0), (3, 1), (2, 0), (2, 1)]
    assert progress == [(done, 24) for done in (3, 6, 9, 12, 14, 16, 18, 20, 22, 24)]
    found.save(tmp_path / "bench.json")
    assert PairBench.load(tmp_path / "bench.json") == found


def test_both_dtypes_are_named(swift, super_):
    inputs = random_rows(swift, super_, 1, length=3)
    halved = tiny_models.classifier("Bert", num_hidden_layers=1).bfloat16()
    found = bench_pair(halved, super_, inputs, batch_sizes=[1], shares=[1], dispatch=["exact"], rounds=1)
    assert found.dtype == "bfloat16, float32"


def test_models_threads_and_random_numbers_stay_as_they_were(swift, super_, monkeypatch):
    def state():
        numbers = torch.get_rng_state().tolist()
        return fingerprint.fingerprint(swift), fingerprint.fingerprint(super_), torch.get_num_threads(), numbers

    before = state()
    inputs = random_rows(swift, super_, 2, length=3, ragged=True)
    given = {name: value.clone() for name, value in inputs.items()}
    assert bench_pair(swift, super_, inputs, batch_sizes=[2], shares=[1], rounds=1, threads=3).threads == 3
    assert all(torch.equal(inputs[name], value) for name, value in given.items())
    assert not any(module.training for model in (swift, super_) for module in model.modules())
    monkeypatch.setattr(BertModel, "forward", None)
    with pytest.raises(TypeError):
        bench_pair(swift, super_, inputs, batch_sizes=[2], rounds=1, threads=3)
    assert state() == before


def test_labels_match_by_name_whatever_their_order(swift):
    other = tiny_models.classifier("Bert", seed=1, num_hidden_layers=2)
    other.config.id2label = {0: "label_2", 1: "LABEL_0", 2: "LABEL_1"}
    inputs = random_rows(swift, other, 1, length=3)
    assert bench_pair(swift, other, inputs, batch_sizes=[1], shares=[1], rounds=1).points[0].share_routed == 1


def test_default_labels_of_swift_are_taken_in_the_order_of_super_s(swift):
    super_ = tiny_models.classifier("Bert", seed=1, num_hidden_layers=2)
    super_.config.id2label = {0: "no", 1: "perhaps", 2: "yes"}
    inputs = random_rows(swift, super_, 1, length=3)
    assert bench_pair(swift, super_, inputs, batch_sizes=[1], shares=[1], rounds=1).points[0].share_routed == 1


def named(*labels):
    model = tiny_models.classifier("Bert", num_hidden_layers=1, num_labels=len(labels))
    model.config.id2label = dict(enumerate(labels))
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_sizes": [0]}, "batch_sizes: got 0, wanted rows >= 1"),
        ({"batch_sizes": []}, "batch_sizes: got none, wanted rows >= 1"),
        ({"batch_sizes": [1, 3]}, "inputs: got 2 rows, wanted at least 3, those of the largest batch"),
        ({"shares": [0.5, 1.1]}, r"shares: got 0.5, 1.1, wanted shares in \[0, 1\]"),
        ({"shares": [math.nan]}, "shares: got nan"),
        ({"dispatch": ["exact", "graph"]}, "dispatch: got exact, graph, wanted some of exact, bucket, capacity"),
        ({"rounds": 0}, "rounds: got 0, wanted >= 1"),
        ({"threads": 0}, "threads: got 0, wanted >= 1"),
        ({"swift": named("a", "b")}, "swift: got a model with the labels a, b, wanted label_0, label_1, label_2 as in"),
        ({"attention_mask": None}, "attention_mask: got none"),
        ({"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, "wanted each row's tokens first, then padding"),
        ({"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}, "wanted each row's tokens first, then padding"),
        ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "wanted each row's tokens first, then padding"),
        ({"attention_mask": torch.ones(3, 3)}, r"input_ids: got \[2, 3\], wanted \[3, ...\] as in attention_mask"),
    ],
)
def test_what_is_refused(swift, super_, change, message):
    threads = torch.get_num_threads()
    inputs = random_rows(swift, super_, 2, length=3)
    if "attention_mask" in change:
        inputs["attention_mask"] = change["attention_mask"]
    inputs = {name: value for name, value in inputs.items() if value is not None}
    options = {name: value for name, value in change.items() if name not in ("swift", "attention_mask")}
    with pytest.raises(ValueError, match=message):
        bench_pair(change.get("swift", swift), super_, inputs, **{"batch_sizes": [2], **options})
    assert torch.get_num_threads() == threads


def test_training_mode_is_refused(super_):
    swift = tiny_models.classifier("Bert").train()
    with pytest.raises(RuntimeError, match="swift: in training mode"):
        bench_pair(swift, super_, random_rows(swift, super_, 1, length=3), batch_sizes=[1])


def test_two_devices_are_refused(swift):
    elsewhere = tiny_models.classifier("Bert").to("meta")
    with pytest.raises(ValueError, match="super_: got a model on meta, wanted it on cpu like swift"):
        bench_pair(swift, elsewhere, random_rows(swift, elsewhere, 1, length=3), batch_sizes=[1])


@pytest.mark.gpu
def test_a_pair_on_a_gpu():
    swift, super_ = (tiny_models.classifier("Bert", seed=seed).cuda() for seed in (0, 1))
    inputs = random_rows(swift, super_, 4, length=9, ragged=True)
    found = bench_pair(swift, super_, inputs, batch_sizes=[1, 4], rounds=2)
    assert found.device == torch.cuda.get_device_name()
    assert [p.share_routed for p in found.points if p.mode == "exact"] == [0, 0, 0.25, 0.5, 1] * 2


# ---- random rows


def test_random_rows_are_of_plain_words_that_both_models_know(swift):
    small = tiny_models.classifier("Bert", vocab_size=20, bos_token_id=3, eos_token_id=[5, 6])
    for pair in ((swift, small), (small, swift)):
        ids = random_rows(*pair, 200, length=9)["input_ids"]
        assert set(ids.flatten().tolist()) == set(range(1, 20)) - {3}


def test_random_rows_have_one_length_or_many(swift, super_):
    mask = random_rows(swift, super_, 5, length=9)["attention_mask"]
    assert torch.equal(mask, torch.ones(5, 9, dtype=torch.int64))
    rows = random_rows(swift, super_, 300, length=32, ragged=True)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    assert set(mask.sum(dim=1).tolist()) == set(range(2, 33))
    assert torch.equal(mask, (torch.arange(32) < mask.sum(dim=1, keepdim=True)).long())
    assert torch.equal(ids != tiny_models.PAD, mask.bool())
    again, other = (random_rows(swift, super_, 300, length=32, ragged=True, seed=seed)["input_ids"] for seed in (0, 1))
    assert torch.equal(again, ids)
    assert not torch.equal(other, ids)
    for length in (1, 32):
        assert int(random_rows(swift, super_, 1, length=length, ragged=True)["attention_mask"].sum()) == length


def test_rows_for_the_classifier_of_an_encoder_decoder_end_as_it_wants(swift):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 64}
    config = transformers.BartConfig(**sizes, num_labels=3)
    bart = transformers.BartForSequenceClassification(config).eval()
    rows = random_rows(bart, bart, 6, length=9, ragged=True)
    found = bench_pair(bart, bart, rows, batch_sizes=[2], shares=[0.5], rounds=1)
    assert [p.share_routed for p in found.points] == [0.5] * 3
    assert (rows["input_ids"] == config.eos_token_id).sum(dim=1).tolist() == [1] * 6


@pytest.mark.parametrize("change", [{"rows": 0}, {"length": 0}])
def test_no_rows_and_no_tokens_are_refused(swift, super_, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: got 0, wanted >= 1"):
        random_rows(swift, super_, **change)
