"""Every dispatch mode answers every row once, in input order; what else each of them promises."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elang import dispatch, ops
from elang.dispatch import BUCKETS, Answer, Plan
from elang.joint import JointClassifier
from elang.reference import Route
from elang.router import Router
from elang.super_model import SuperModel

INF, NAN = float("inf"), float("nan")
# Room for every row, so that all modes have to give the same answers.
MODES = {"exact": {}, "bucket": {"buckets": (1, 2, 4)}, "capacity": {"capacity": 1.0}}


class Super:
    """Answers each row with its first token, and remembers the inputs of its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **inputs: Any) -> Tensor:
        self.calls.append(inputs)
        first = inputs["input_ids"][:, :1].float()
        return torch.cat([first, -first], dim=1)


def decide(keep: list[bool]) -> Route:
    logits = torch.stack([torch.arange(len(keep)) + 1.0, torch.zeros(len(keep))], dim=1)
    return ops.route_logits(logits.where(torch.tensor(keep, dtype=torch.bool)[:, None], -100.0), 0.0)


def scored(*scores: float, threshold: float) -> Route:
    """The decision about rows of these scores."""
    logits = torch.tensor(scores).repeat_interleave(2).reshape(-1, 2) - math.log(2)
    return ops.route_logits(logits, threshold)


def run(mode: str, route: Route, super_: Any, inputs: dict[str, Any], **options: Any) -> Answer:
    if "capacity" in options:
        options["capacity"] = dispatch.as_capacity(options["capacity"])
    plan = Plan(SuperModel(super_), **options)
    chosen = dispatch.MODES[mode]
    count = None if chosen.size_of is None else dispatch.read(chosen, route, inputs, plan)
    return chosen.run(route, inputs, plan, count)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None)
@given(keep=st.lists(st.booleans(), max_size=23), seed=st.integers(0, 1000))
def test_every_row_is_answered_once_in_input_order(mode, keep, seed):
    lengths = torch.randint(1, 10, (len(keep),), generator=torch.Generator().manual_seed(seed)).tolist()
    inputs, route = tiny_models.inputs(tuple(lengths), seed), decide(keep)
    answer = run(mode, route, Super(), inputs, **MODES[mode])
    first = inputs["input_ids"][:, 0].float()
    want = torch.where(torch.tensor(keep, dtype=torch.bool)[:, None], route.logits, torch.stack([first, -first], dim=1))
    assert torch.equal(answer.logits, want)
    if mode == "capacity":
        assert answer.overflow.tolist() == [0]
        assert not answer.degraded.any()


@pytest.mark.parametrize("mode", MODES)
def test_a_joint_model_answers_as_its_two_models_do(mode, swift, super_):
    inputs = tiny_models.inputs((9, 3, 5, 1, 7, 2, 8))
    joint = JointClassifier(swift, super_, Router(threshold=-INF), dispatch=mode, **MODES[mode])
    alone = joint(**inputs)
    for share in range(8):
        joint.router.set_threshold(INF if share == 7 else alone.routing.score.sort().values[share].item())
        answer = joint(**inputs)
        assert answer.routing.mode == mode
        rows = answer.routing.order[: int(answer.routing.n_routed)]
        assert len(rows) == share
        want = alone.logits.clone()
        with torch.no_grad():
            want[rows] = super_(**inputs).logits[rows]
        torch.testing.assert_close(answer.logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_threads_give_the_answers_of_one(mode, swift, super_):
    joint = JointClassifier(swift, super_, Router(threshold=-INF), dispatch=mode, **MODES[mode])
    batches = [tiny_models.inputs(tuple(range(1, n + 2)), seed=n) for n in range(8)]
    joint.router.set_threshold(torch.cat([joint(**b).routing.score for b in batches]).median().item())
    before, alone = joint.stats, [joint(**b).logits for b in batches]
    one = joint.stats
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: joint(**batches[i % 8]).logits, range(48)))
    assert all(torch.equal(together[i], alone[i % 8]) for i in range(48))
    many = joint.stats
    assert many.rows - one.rows == 6 * (one.rows - before.rows)
    assert many.routed - one.routed == 6 * (one.routed - before.routed)


def test_buckets_round_up():
    for n, size in [(1, 1), (3, 4), (5, 8), (9, 12), (13, 16), (17, 24), (33, 48), (64, 64), (65, 96)]:
        assert dispatch.bucket_of(n, 100, BUCKETS) == size
        assert dispatch.bucket_of(n, n, BUCKETS) == n


@pytest.mark.parametrize(("routed", "sizes"), [(0, []), (1, [2]), (2, [2]), (3, [5]), (5, [5]), (6, [12]), (11, [12])])
def test_super_sees_a_bucket_of_rows_and_copies_of_the_last(routed, sizes):
    inputs, super_ = tiny_models.inputs((4,) * 12), Super()
    answer = run("bucket", decide([False] * routed + [True] * (12 - routed)), super_, inputs, buckets=(2, 5))
    seen = [call["input_ids"] for call in super_.calls]
    assert [len(ids) for ids in seen] == sizes
    if seen:
        rows = [min(slot, routed - 1) for slot in range(sum(sizes))]
        assert torch.equal(torch.cat(seen), inputs["input_ids"][rows, :4])
    first = inputs["input_ids"][:routed, 0].float()
    assert torch.equal(answer.logits[:routed], torch.stack([first, -first], dim=1))


@pytest.mark.parametrize("rows", [4, 5])
def test_a_whole_batch_is_not_copied(rows):
    inputs, super_ = tiny_models.inputs((9,) * rows), Super()
    run("bucket", decide([False] * rows), super_, inputs)
    assert len(super_.calls[0]["input_ids"]) == rows
    assert super_.calls[0]["input_ids"].data_ptr() == inputs["input_ids"].data_ptr()


@pytest.mark.parametrize(("share", "room"), [(0.5, 4), (0.3, 3), (0.0, 0), (1.0, 8), (3, 3), (9, 8), (1, 1)])
def test_capacity_is_rows_or_a_share_of_at_least_that(share, room):
    rows = 8
    assert dispatch.capacity_of(dispatch.as_capacity(0.1), 30) == 3
    assert dispatch.capacity_of(dispatch.as_capacity(share), rows) == room
    super_ = Super()
    run("capacity", decide([False] * rows), super_, tiny_models.inputs((4,) * rows), capacity=share)
    assert [call["input_ids"].shape for call in super_.calls] == [(room, tiny_models.LENGTH)] * (room > 0)


def test_room_goes_to_rows_that_are_not_finite_and_then_to_the_lowest_scores():
    scores = (5.0, -1.0, NAN, -3.0, 2.0, -1.0, INF, -2.0)
    route, inputs = scored(*scores, threshold=0.0), tiny_models.inputs((9,) * 8)
    assert route.n_routed.item() == 6
    for room, chosen in enumerate([[], [2], [2, 6], [2, 3, 6], [2, 3, 6, 7], [1, 2, 3, 6, 7], [1, 2, 3, 5, 6, 7]]):
        super_ = Super()
        answer = run("capacity", route, super_, inputs, capacity=room)
        if room:
            assert torch.equal(super_.calls[0]["input_ids"], inputs["input_ids"][chosen])
        assert answer.overflow.tolist() == [6 - room]
        assert (answer.overflow.dtype, answer.degraded.dtype) == (torch.int32, torch.bool)
        assert answer.degraded.nonzero().flatten().tolist() == [i for i in (1, 2, 3, 5, 6, 7) if i not in chosen]
        first = inputs["input_ids"][chosen, 0].float()
        assert torch.equal(answer.logits[chosen], torch.stack([first, -first], dim=1))
        others = [i for i in range(8) if i not in chosen]
        torch.testing.assert_close(answer.logits[others], route.logits[others], rtol=0, atol=0, equal_nan=True)


def test_padding_of_capacity_is_real_rows():
    inputs, super_ = tiny_models.inputs((9, 3, 5, 1)), Super()
    run("capacity", decide([True, False, True, True]), super_, inputs, capacity=3)
    assert torch.equal(super_.calls[0]["attention_mask"], inputs["attention_mask"][[1, 1, 1]])
    run("capacity", decide([True] * 4), super_, inputs, capacity=2)
    assert super_.calls[1]["attention_mask"].any(dim=1).all()


@pytest.mark.parametrize(("mode", "rows"), [("exact", [1, 3]), ("bucket", [1, 3, 3, 3]), ("capacity", [1, 3, 3])])
def test_super_inputs_gets_the_rows_that_super_is_to_see(mode, rows):
    seen = []

    def super_inputs(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        seen.append(rows.tolist())
        return {"input_ids": inputs["input_ids"][rows]}

    options = {"bucket": {"buckets": (4,)}, "capacity": {"capacity": 3}}.get(mode, {})
    route, inputs = decide([True, False, True, False, True]), tiny_models.inputs((9, 3, 5, 1, 7))
    run(mode, route, Super(), inputs, super_inputs=super_inputs, **options)
    assert seen == [rows]


def test_an_answer_is_not_where_super_writes_the_next(swift, inputs):
    answers = torch.zeros(6, 3)
    joint = JointClassifier(swift, lambda **_: answers, Router(threshold=INF), label_map={0: 0, 1: 1, 2: 2})
    first = joint(**inputs).logits
    answers.fill_(7.0)
    assert not first.any()


def test_auto_says_what_it_chose(swift, super_, inputs):
    assert JointClassifier(swift, super_, Router(threshold=0.0), dispatch="auto")(**inputs).routing.mode == "exact"


def test_what_was_done_is_counted(swift, super_, inputs):
    exact = JointClassifier(swift, super_, Router(threshold=INF))
    for threshold in (INF, -INF, INF):
        exact.router.set_threshold(threshold)
        exact(**inputs)
    assert exact.stats == (18, 12, 0, 0, {6: 2})
    bucket = JointClassifier(swift, super_, Router(threshold=INF), dispatch="bucket")
    bucket(**inputs)
    assert bucket.stats == (6, 6, 0, 0, {6: 1})
    capacity = JointClassifier(swift, super_, Router(threshold=INF), dispatch="capacity", capacity=2)
    capacity(**inputs)
    assert capacity.stats == (6, 6, 4, 4, {2: 1})


BAD = {
    "no capacity": (dict(dispatch="capacity"), "capacity: got None"),
    "capacity elsewhere": (dict(dispatch="bucket", capacity=3), "capacity: got 3 with dispatch='bucket'"),
    "negative capacity": (dict(dispatch="capacity", capacity=-1), "capacity: got -1"),
    "share above one": (dict(dispatch="capacity", capacity=1.5), "capacity: got 1.5"),
    "NaN share": (dict(dispatch="capacity", capacity=NAN), "capacity: got nan"),
    "buckets elsewhere": (dict(buckets=(1, 2)), "buckets: got some with dispatch='exact'"),
    "no buckets": (dict(dispatch="bucket", buckets=()), r"buckets: got \(\)"),
    "unsorted buckets": (dict(dispatch="bucket", buckets=(4, 2)), r"buckets: got \(4, 2\), wanted .* ascending"),
    "on_super_error": (dict(on_super_error="ignore"), "on_super_error: got 'ignore', wanted one of raise, swift"),
    "super_timeout": (dict(super_timeout=0), "super_timeout: got 0"),
    "endless timeout": (dict(super_timeout=INF), "super_timeout: got inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_settings_that_fit_nothing_are_refused(swift, super_, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        JointClassifier(swift, super_, Router(threshold=0.0), **options)


def test_settings_survive_saving(swift, super_, tmp_path):
    options = dict(dispatch="bucket", buckets=(2, 8), on_super_error="swift", super_timeout=3.0)
    JointClassifier(swift, super_, Router(threshold=0.0), **options).save_pretrained(tmp_path)
    back = JointClassifier.from_pretrained(tmp_path)
    assert (back.dispatch, back.plan.buckets) == ("bucket", (2, 8))
    assert (back.plan.super_.on_error, back.plan.super_.timeout) == ("swift", 3.0)
    JointClassifier(swift, super_, Router(threshold=0.0), "capacity", capacity=0.3).save_pretrained(tmp_path)
    assert JointClassifier.from_pretrained(tmp_path).plan.capacity == (3, 10)
