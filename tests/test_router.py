from __future__ import annotations

import pytest
import torch

from elang import ops
from elang.reference import SCORES
from elang.router import Router


@pytest.fixture
def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((7, 5), (3, 5), (3,)))


@pytest.mark.parametrize("score", [score for score in SCORES if score != "logit"])
def test_it_is_the_op_with_its_score_temperature_and_threshold(head, score):
    keep_all = ops.route(*head, float("-inf"), score=score, temperature=2.0)
    threshold = keep_all.score.median().item()
    router = Router(score, threshold=threshold, temperature=2.0)
    for got, want in (
        (router(*head), ops.route(*head, threshold, score=score, temperature=2.0)),
        (
            router.from_logits(keep_all.logits),
            ops.route_logits(keep_all.logits, threshold, score=score, temperature=2.0),
        ),
    ):
        assert 0 < want.n_routed.item() < 7
        assert all(map(torch.equal, got, want))


def test_a_new_threshold_takes_effect_in_place(head):
    router = Router(threshold=float("inf"))
    address = router.threshold.data_ptr()
    assert router(*head).n_routed.item() == 7
    router.set_threshold(float("-inf"))
    assert router(*head).n_routed.item() == 0
    assert router.threshold.data_ptr() == address


def test_a_row_that_is_not_finite_is_routed_alone(head):
    hidden, weight, bias = head
    hidden[4, 2] = float("nan")
    route = Router(threshold=float("-inf"))(hidden, weight, bias)
    assert route.n_routed.item() == 1
    assert route.order[0].item() == 4


@pytest.mark.parametrize(
    "cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double, lambda m: m.to(torch.float16)]
)
def test_the_threshold_stays_float32_and_exact(cast):
    router = Router("energy_probs", threshold=1.31044)
    inside = torch.nn.Sequential(torch.nn.Linear(2, 2), router)
    want = router.threshold.clone()
    cast(inside)
    assert inside[0].weight.dtype != torch.float32
    assert router.threshold.dtype == torch.float32
    assert torch.equal(router.threshold, want)


def test_the_threshold_follows_the_module_to_a_device():
    assert Router(threshold=0.5).to("meta").threshold.device.type == "meta"


def test_the_threshold_is_part_of_the_state():
    router = Router(threshold=0.1)
    router.load_state_dict(Router(threshold=0.7).state_dict())
    assert router.threshold.item() == torch.tensor(0.7).item()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match=r"temperature: got .*, wanted a finite number > 0"):
        Router(threshold=0.0, temperature=temperature)


def test_bad_score_lists_the_known_ones():
    with pytest.raises(ValueError, match=rf"score: got 'entropy', wanted one of {', '.join(SCORES)}"):
        Router("entropy", threshold=0.0)


def test_nan_threshold_is_refused_and_leaves_the_old_one():
    with pytest.raises(ValueError, match="threshold: got NaN"):
        Router(threshold=float("nan"))
    router = Router(threshold=0.5)
    with pytest.raises(ValueError, match="threshold: got NaN"):
        router.set_threshold(float("nan"))
    assert router.threshold.item() == 0.5


@pytest.mark.parametrize("argument", ["threshold", "temperature"])
@pytest.mark.parametrize("value", ["1", None, True], ids=str)
def test_what_is_no_number_is_refused_by_name(argument, value):
    with pytest.raises(TypeError, match=rf"{argument}: got {value!r}"):
        Router(**{"threshold": 0.0, argument: value})


def test_materialised_from_meta():
    router = Router(threshold=1.0).to("meta").to_empty(device="cpu")
    assert router.threshold.device.type == "cpu"
    router.set_threshold(2.0)
    assert router.threshold.item() == 2.0
