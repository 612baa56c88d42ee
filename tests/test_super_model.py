"""Super may fail, run out of memory, or never answer."""

from __future__ import annotations

import copy
import logging
import threading
import time
import weakref
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from elang import super_model
from elang.joint import JointClassifier
from elang.router import Router
from elang.super_model import SuperModel

INF = float("inf")
HOME = torch.device("cpu")


class OutOfMemoryAbove:
    """Has memory for so many rows in a call."""

    def __init__(self, rows: int) -> None:
        self.rows, self.calls = rows, []

    def __call__(self, x: Tensor, flag: str = "") -> Tensor:
        self.calls.append((len(x), flag))
        if len(x) > self.rows:
            raise torch.OutOfMemoryError("no more")
        return x * 2


def broken(**_: Any) -> Tensor:
    raise ConnectionError("the line is dead")


@pytest.mark.parametrize("on_error", ["raise", "swift"])
def test_out_of_memory_is_tried_once_more_in_halves(on_error):
    x, model = torch.randn(5, 2), OutOfMemoryAbove(3)
    reply = SuperModel(model, on_error=on_error)({"x": x, "flag": "f"}, 5, 2, HOME)
    assert torch.equal(reply.logits, x * 2)
    assert model.calls == [(5, "f"), (2, "f"), (3, "f")]
    model = OutOfMemoryAbove(2)
    if on_error == "raise":
        with pytest.raises(torch.OutOfMemoryError, match="no more"):
            SuperModel(model)({"x": x}, 5, 2, HOME)
    else:
        assert SuperModel(model, on_error="swift")({"x": x}, 5, 2, HOME) == (None, ())
    assert [rows for rows, _ in model.calls] == [5, 2, 3]
    with pytest.raises(torch.OutOfMemoryError):
        SuperModel(OutOfMemoryAbove(0))({"x": x[:1]}, 1, 2, HOME)


@pytest.mark.parametrize("mode", ["exact", "bucket", "capacity"])
def test_a_super_that_fails_leaves_swift_s_answers_and_says_so(mode, swift, inputs, caplog):
    labels = {0: 0, 1: 1, 2: 2}
    capacity = 4 if mode == "capacity" else None
    joint = JointClassifier(
        swift, broken, Router(threshold=-INF), mode, label_map=labels, capacity=capacity, on_super_error="swift"
    )
    swift_alone = joint(**inputs)
    joint.router.set_threshold(swift_alone.routing.score.sort().values[2].item())
    before = joint.stats
    with caplog.at_level(logging.WARNING):
        answer = joint(**inputs)
    assert torch.equal(answer.logits, swift_alone.logits)
    routed = answer.routing.order[: int(answer.routing.n_routed)]
    assert len(routed) == 2
    assert answer.routing.degraded.nonzero().flatten().tolist() == routed.tolist()
    assert joint.stats.degraded - before.degraded == 2
    assert "the line is dead" in caplog.text
    with pytest.raises(ConnectionError, match="the line is dead"):
        JointClassifier(swift, broken, Router(threshold=INF), label_map=labels)(**inputs)


def test_nothing_of_the_call_that_ran_out_of_memory_is_kept_for_the_halves():
    alive = []

    def model(x: Tensor) -> Tensor:
        activation = torch.zeros(3)
        alive.append(weakref.ref(activation))
        if len(x) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        assert alive[0]() is None
        return x

    x = torch.randn(5, 2)
    assert torch.equal(SuperModel(model)({"x": x}, 5, 2, HOME).logits, x)


def test_rows_that_do_not_come_in_halves_ran_out_of_memory():
    calls = []

    def model(texts: list[str]) -> Tensor:
        calls.append(texts)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no more")
        return torch.zeros(len(texts), 2)

    with pytest.raises(MemoryError, match="out of memory on 4 rows, which do not come in halves"):
        SuperModel(model)({"texts": ["a"] * 4}, 4, 2, HOME)


def test_an_answer_of_the_wrong_type_is_a_bug_and_no_failure(inputs):
    with pytest.raises(TypeError, match=r"wanted \.logits, a tensor"):
        SuperModel(lambda **_: {"answer": 1}, on_error="swift")(inputs, 6, 3, HOME)


def test_good_batches_have_a_mask_too_where_errors_are_caught(swift, super_, inputs):
    joint = JointClassifier(swift, super_, Router(threshold=INF), on_super_error="swift")
    for threshold in (INF, -INF):
        joint.router.set_threshold(threshold)
        assert joint(**inputs).routing.degraded.tolist() == [False] * 6


def test_logits_of_the_wrong_shape_are_a_bug_and_no_failure(swift, inputs):
    router, labels = Router(threshold=INF), {0: 0, 1: 1, 2: 2}
    joint = JointClassifier(swift, lambda **_: torch.zeros(1, 1), router, label_map=labels, on_super_error="swift")
    with pytest.raises(ValueError, match=r"super_: got logits \[1, 1\] for 6 rows, wanted \[6, 3\]"):
        joint(**inputs)


def test_a_super_that_does_not_answer_is_left_behind(inputs):
    release = threading.Event()

    def hangs(**_: Any) -> Tensor:
        release.wait(30)
        return torch.zeros(6, 3)

    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        SuperModel(hangs, timeout=0.05)(inputs, 6, 3, HOME)
    assert SuperModel(hangs, on_error="swift", timeout=0.05)(inputs, 6, 3, HOME).logits is None
    assert time.monotonic() - start < 20
    release.set()


def test_no_more_calls_are_left_behind_than_a_service_can_bear(inputs, monkeypatch):
    monkeypatch.setattr(super_model, "MAX_LATE", 2)
    release, calls = threading.Event(), []

    def hangs(**_: Any) -> Tensor:
        calls.append(threading.current_thread())
        release.wait(30)
        return torch.zeros(6, 3)

    model = SuperModel(hangs, timeout=0.05)
    for message in ("no answer within", "no answer within", "2 calls that timed out still run"):
        with pytest.raises(TimeoutError, match=message):
            model(inputs, 6, 3, HOME)
    assert len(calls) == 2
    assert copy.deepcopy(model).late.count() == 0
    release.set()
    for thread in calls:
        thread.join()
    assert model(inputs, 6, 3, HOME).logits is not None


def test_a_timeout_changes_neither_the_answer_nor_the_state_that_super_runs_in(super_, inputs):
    state = []

    def model(**kwargs: Any) -> Any:
        state.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return super_(**kwargs)

    for grad, inference, autocast in [(False, False, False), (False, True, False), (False, False, True)]:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
            slow = SuperModel(model, timeout=60.0)(inputs, 6, tiny_models.CLASSES, HOME).logits
            assert torch.equal(slow, super_(**inputs).logits)
        assert state[-1] == (grad, inference, autocast)


def test_errors_of_super_pass_through_a_timeout():
    with pytest.raises(ConnectionError, match="the line is dead"):
        SuperModel(broken, timeout=60.0)({}, 1, 2, HOME)
