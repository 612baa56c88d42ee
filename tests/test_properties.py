"""Properties of the ops on whatever hypothesis comes up with."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_accurate, assert_partition

import elang
from elang import reference

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("device")
settings.register_profile("elang", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("elang")

SCORES = [name for name in reference.SCORES if name != "logit"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


def partition(keep):
    return reference.partition(torch.tensor(keep, dtype=torch.bool))


def filled(shape, dtype):
    return torch.randint(0, 2 if dtype is torch.bool else 100, shape).to(dtype)


@settings(max_examples=200)
@given(
    rows=st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=0, max_size=70),
    threshold=st.floats(width=32, allow_nan=False),
    score=st.sampled_from(SCORES),
)
def test_any_logits_give_a_stable_partition(rows, threshold, score):
    logits = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 3)
    assert_partition(elang.route_logits(logits, threshold, score=score), threshold)


@settings(max_examples=150)
@given(keep=st.lists(st.booleans(), min_size=1, max_size=40), extra=st.integers(-3, 5), data=st.data())
def test_matches_reference(keep, extra, data):
    order, n_routed = partition(keep)
    capacity = max(int(n_routed) + extra, 0)
    dtype = data.draw(st.sampled_from(DTYPES))
    inner = data.draw(st.lists(st.integers(0, 5), max_size=3))
    ids, mask = filled((len(keep), *inner), dtype), filled((len(keep), 7), torch.int64)
    got = elang.gather_rows([ids, mask], order, n_routed, capacity)
    wanted = reference.gather_rows([ids, mask], order, n_routed, capacity)
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w)
        assert g.is_contiguous()
    answers = filled((capacity, *inner), dtype)
    merged = elang.merge_rows(ids, answers, order, n_routed)
    assert torch.equal(merged, reference.merge_rows(ids, answers, order, n_routed))


@settings(max_examples=100)
@given(keep=st.lists(st.booleans(), min_size=0, max_size=40), padding=st.integers(0, 4))
def test_every_row_gets_exactly_one_answer_in_input_order(keep, padding):
    n = len(keep)
    order, n_routed = partition(keep)
    rows = torch.arange(n)
    capacity = int(n_routed) + (padding if n else 0)
    (gathered,) = elang.gather_rows([rows], order, n_routed, capacity)
    merged = elang.merge_rows(rows, gathered + 1000, order, n_routed)
    assert merged.tolist() == [i if k else i + 1000 for i, k in enumerate(keep)]


@settings(max_examples=50)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(1, 40)),
    classes=st.integers(1, 3000),
    temperature=st.floats(0.05, 20),
    data=st.data(),
)
def test_any_shape_of_a_vocabulary(shape, classes, temperature, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    hidden, weight, bias = torch.randn(shape), torch.randn(classes, shape[2]), torch.randn(classes)
    mask = torch.rand(shape[:2]) < data.draw(st.sampled_from([0.5, 2.0]))
    got = elang.vocab_energy(hidden, weight, bias, mask, temperature=temperature)
    values = temperature * torch.logsumexp((hidden.double() @ weight.double().t() + bias.double()) / temperature, -1)
    eager = reference.vocab_energy(hidden, weight, bias, mask, temperature=temperature)
    assert_accurate(got.score, eager.score, values.where(mask, 0.0).sum(1) / mask.sum(1))
    assert torch.equal(got.argmax == -1, ~mask)
