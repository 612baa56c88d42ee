"""route and route_logits against reference.py in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import assert_accurate, assert_partition, on_default_device
from torch.library import opcheck

import elang
from elang import backend, reference
from elang.reference import SCORES

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MULTI = [s for s in SCORES if s != "logit"]
# (N, H, C): below, at and past every tile of rows, columns and classes
SHAPES = [
    (1, 312, 2),
    (3, 5, 2),
    (8, 64, 3),
    (15, 17, 4),
    (16, 16, 5),
    (17, 312, 7),
    (33, 768, 3),
    (64, 48, 20),
    (5, 33, 150),
    (4, 0, 3),
]

pytestmark = pytest.mark.usefixtures("device")


def head(n, h, c, dtype=torch.float32, weight_dtype=None):
    hidden = torch.randn(n, h).to(dtype)
    weight = (torch.randn(c, h) / max(h, 1) ** 0.5 * 3).to(weight_dtype or dtype)
    return hidden, weight, torch.randn(c).to(weight_dtype or dtype)


def truth_of(hidden, weight, bias, score, temperature=1.0):
    z = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
    return z, reference.score_logits(z, score, temperature)


def eager_of(hidden, weight, bias, score, temperature=1.0):
    z = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return z, reference.score_logits(z, score, temperature)


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) or torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize("score", MULTI)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, score):
    args = head(*shape, dtype)
    temperature = 1.7
    z, s = truth_of(*args, score, temperature)
    threshold = float(s.median())
    got = elang.route(*args, threshold, score=score, temperature=temperature)
    z_eager, s_eager = eager_of(*args, score, temperature)
    assert got.logits.dtype == dtype
    assert got.score.dtype == torch.float32
    assert_accurate(got.logits, z_eager, z)
    assert_accurate(got.score, s_eager, s)
    assert_partition(got, threshold)
    band = 2 * (s_eager - s).abs().max() + 1e-5 * s.abs().max()
    clear = (s - threshold).abs() > band
    kept = torch.ones(len(s), dtype=torch.bool).index_fill_(0, got.order[: int(got.n_routed)], False)
    assert torch.equal(kept[clear], (s >= threshold)[clear])


@pytest.mark.parametrize("classes", [6, 1000, 40_000])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_route_logits_matches_float64(dtype, score, classes):
    logits = (torch.randn(37, 1 if score == "logit" else classes) * 4).to(dtype)
    truth = reference.score_logits(logits.double(), score)
    got = elang.route_logits(logits, 0.5, score=score)
    assert got.logits is logits
    assert_accurate(got.score, reference.score_logits(logits, score), truth)
    assert_partition(got, 0.5)


def test_logit_scores_a_single_output_head():
    hidden, weight, bias = head(9, 20, 1)
    got = elang.route(hidden, weight, bias, 0.0, score="logit", temperature=3.0)
    assert torch.equal(got.score, got.logits[:, 0])
    assert_partition(got, 0.0)


@pytest.mark.parametrize("hidden_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
def test_mixed_dtypes_accumulate_in_float32(hidden_dtype, weight_dtype):
    args = head(19, 100, 5, hidden_dtype, weight_dtype)
    got = elang.route(*args, 1.0)
    _, s = truth_of(*args, "energy")
    exact = (args[0].float(), args[1].float(), args[2].float())
    assert_accurate(got.score, eager_of(*exact, "energy")[1], s)
    assert got.logits.dtype == hidden_dtype


def test_no_bias():
    hidden, weight, _ = head(6, 40, 3)
    got = elang.route(hidden, weight, None, 0.0)
    assert_accurate(
        got.logits, eager_of(hidden, weight, None, "energy")[0], truth_of(hidden, weight, None, "energy")[0]
    )


def test_empty_batch():
    got = elang.route(torch.empty(0, 8), torch.randn(3, 8), None, 0.0)
    assert got.logits.shape == (0, 3)
    assert got.score.shape == got.order.shape == (0,)
    assert got.n_routed.tolist() == [0]


def test_infinite_thresholds_keep_all_and_route_all():
    args = head(21, 30, 3)
    assert elang.route(*args, -INF).n_routed.tolist() == [0]
    got = elang.route(*args, INF)
    assert got.n_routed.tolist() == [21]
    assert torch.equal(got.order, torch.arange(21))


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_tensor_threshold_is_the_float_one(shape):
    args = head(50, 30, 3)
    for value in (-INF, 1.31044, 2.0, INF):
        assert_same_bits(elang.route(*args, value), elang.route(*args, torch.full(shape, value)))
        logits = args[0][:, :4]
        assert_same_bits(
            elang.route_logits(logits, value)[1:], elang.route_logits(logits, torch.full(shape, value))[1:]
        )


def test_threshold_is_compared_in_float32():
    logits = torch.tensor([[1.31044, -INF]])  # energy = 1.31044 as float32, which is above the double 1.31044
    as_float32 = logits[0, 0].item()
    assert elang.route_logits(logits, as_float32).n_routed.tolist() == [0]
    assert elang.route_logits(logits, float(torch.nextafter(logits[0, 0], torch.tensor(INF)))).n_routed.tolist() == [1]


def test_nan_in_a_tensor_threshold_routes_every_row():
    assert elang.route(*head(5, 8, 2), torch.tensor([NAN])).n_routed.tolist() == [5]


@pytest.mark.parametrize("score", MULTI)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_row_is_routed_and_touches_no_other(score, bad):
    hidden, weight, bias = head(40, 33, 5)
    clean = elang.route(hidden, weight, bias, -INF, score=score)
    rows = [0, 17, 39]
    hidden[rows] = bad
    got = elang.route(hidden, weight, bias, -INF, score=score)
    healthy = [i for i in range(40) if i not in rows]
    assert torch.equal(got.score[healthy], clean.score[healthy])
    assert torch.equal(got.logits[healthy], clean.logits[healthy])
    assert got.order[:3].tolist() == rows
    assert got.n_routed.tolist() == [3]


@pytest.mark.parametrize("score", MULTI)
@pytest.mark.parametrize("masked", [[0], [3], [1, 2], [0, 1, 2, 3]], ids=str)
def test_masked_classes(score, masked):
    logits = torch.randn(20, 5)
    logits[:, masked] = -INF
    got = elang.route_logits(logits, -INF, score=score)
    truth = reference.score_logits(logits.double(), score)
    assert_accurate(got.score, reference.score_logits(logits, score), truth)
    assert got.score.isfinite().all() == (score != "energy_centered")


@pytest.mark.parametrize("score", MULTI)
@pytest.mark.parametrize("row", [[INF, 0.0], [INF, INF], [-INF, -INF], [0.0, NAN], [NAN, 0.0], [INF, -INF]], ids=str)
def test_rows_without_probabilities_are_routed(score, row):
    assert elang.route_logits(torch.tensor([row]), -INF, score=score).n_routed.tolist() == [1]


@pytest.mark.parametrize("score", MULTI)
@pytest.mark.parametrize("scale", [1e-30, 80.0, 1e4, 1e30])
def test_extreme_logits_neither_overflow_nor_cancel(score, scale):
    logits = torch.randn(64, 4) * scale
    got = elang.route_logits(logits, -INF, score=score)
    assert_accurate(got.score, reference.score_logits(logits, score), reference.score_logits(logits.double(), score))


@pytest.mark.compiled
def test_large_common_offset_does_not_hurt_the_centred_energy():
    logits = torch.randn(64, 4) + 4096.0
    got = elang.route_logits(logits, 0.0, score="energy_centered").score
    truth = reference.score_logits(logits.double(), "energy_centered")
    assert (got - truth).abs().max() < 1e-5


def strided(t: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "slice":  # rows and columns of a larger buffer
        buffer = t.new_full((t.shape[0] * 2, t.shape[1] + 3), NAN)
        view = buffer[::2, 1 : 1 + t.shape[1]]
    elif kind == "columns":
        view = t.new_full((t.shape[0], t.shape[1] * 2), NAN)[:, ::2]
    else:  # transposed
        view = t.new_empty((t.shape[1], t.shape[0])).t()
    return view.copy_(t)


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["slice", "columns", "transposed"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("c", [2, 7])
def test_strided_inputs(kind, dtype, c):
    hidden, weight, bias = head(21, 37, c, dtype)
    wanted = elang.route(hidden, weight, bias, 1.0)
    assert_same_bits(elang.route(strided(hidden, kind), weight, bias, 1.0), wanted)
    assert_same_bits(elang.route(hidden, strided(weight, kind), bias, 1.0), wanted)
    assert_same_bits(elang.route(hidden, weight, strided(bias[:, None], kind)[:, 0], 1.0), wanted)
    logits = torch.randn(21, c).to(dtype)
    assert_same_bits(elang.route_logits(strided(logits, kind), 1.0)[1:], elang.route_logits(logits, 1.0)[1:])


def test_inputs_are_unchanged_and_outputs_are_new():
    args = head(9, 16, 3)
    before = [a.clone() for a in args]
    got = elang.route(*args, 1.0)
    assert_same_bits(args, before)
    assert len({t.untyped_storage().data_ptr() for t in (*args, *got)}) == 7


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="numpy's product depends on a row's place")
@pytest.mark.compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_does_not_depend_on_its_batch(shape, dtype):
    hidden, weight, bias = head(*shape, dtype)
    whole = elang.route(hidden, weight, bias, 0.0)
    for i in range(shape[0]):
        alone = elang.route(hidden[i : i + 1], weight, bias, 0.0)
        assert torch.equal(alone.logits[0], whole.logits[i])
        assert torch.equal(alone.score[0], whole.score[i])


@pytest.mark.cpu_only
@pytest.mark.compiled
def test_threads_do_not_change_a_bit():
    args = head(4099, 768, 20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = elang.route(*args, 1.0)
        torch.set_num_threads(4)
        assert_same_bits(elang.route(*args, 1.0), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.cpu_only
@pytest.mark.compiled
@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set_matches_float64(isa):
    """The accuracy and stride tests once more in a process that is held to `isa`, or to the best below it."""
    if os.environ.get("ELANG_ISA"):
        pytest.skip("ELANG_ISA is set: this is such a process")
    tests = "matches_float64 or strided or masked or not_depend"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        tests,
        "-m",
        "not gpu",
    ]
    done = subprocess.run(command, env={**os.environ, "ELANG_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def op_cases():
    hidden, weight, bias = head(6, 10, 3)
    t = torch.tensor([1.0])
    library = torch.ops.elang
    return {
        "route": (library.route.default, (hidden, weight, bias, 1.0, 0, 1.0)),
        "route.device_threshold": (library.route.device_threshold, (hidden, weight, None, t, 3, 2.0)),
        "route.requires_grad": (library.route.default, (hidden.requires_grad_(), weight, bias, 1.0, 0, 1.0)),
        "route_logits": (library.route_logits.default, (torch.randn(6, 3), 1.0, 4, 1.0)),
        "route_logits.device_threshold": (library.route_logits.device_threshold, (torch.randn(6, 3), t, 1, 1.0)),
    }


@pytest.mark.compiled
@pytest.mark.parametrize(
    "name", ["route", "route.device_threshold", "route.requires_grad", "route_logits", "route_logits.device_threshold"]
)
def test_opcheck(name):
    op, args = op_cases()[name]
    opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_torch_compile_without_a_break(dynamic, kind):
    threshold = 1.0 if kind == "float" else torch.tensor([1.0])
    linear = torch.nn.Linear(24, 16)
    weight, bias = torch.randn(3, 16), torch.randn(3)

    def f(x, t):
        got = elang.route(linear(x).tanh(), weight, bias, t)
        return got.score * 2, got.order, got.n_routed

    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    with torch.inference_mode():
        for n in (4, 9):
            x = torch.randn(n, 24)
            for t in (threshold, threshold + 0.5):
                for got, wanted in zip(compiled(x, t), f(x, t), strict=True):
                    torch.testing.assert_close(got, wanted)


def test_autocast_hands_over_mixed_dtypes(device):
    linear = torch.nn.Linear(24, 16)
    weight, bias = torch.randn(3, 16), torch.randn(3)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        hidden = linear(torch.randn(5, 24))
        got = elang.route(hidden, weight, bias, 1.0)
    assert hidden.dtype == got.logits.dtype == torch.bfloat16
    assert got.score.dtype == torch.float32
    assert_same_bits(got, elang.route(hidden.clone(), weight, bias, 1.0))


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_takes_parameters_and_backward_is_refused(compiled):
    hidden, weight, bias = head(6, 10, 3)
    call = partial(elang.route, weight=weight.requires_grad_(), bias=bias, threshold=1.0)
    if compiled:
        torch.compiler.reset()
        call = torch.compile(call, fullgraph=True)
    got = call(hidden)
    with pytest.raises(RuntimeError, match="inference"):
        (got.logits.sum() + weight.sum()).backward()
    logits = torch.randn(6, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="inference"):
        elang.route_logits(logits, 1.0).score.sum().backward()


BAD_ROUTE = {
    "integer hidden": (dict(hidden=torch.ones(4, 8, dtype=torch.int64)), TypeError, "hidden: got torch.int64"),
    "float64 hidden": (dict(hidden=torch.ones(4, 8, dtype=torch.float64)), TypeError, "hidden: got torch.float64"),
    "hidden of 3 dims": (dict(hidden=torch.ones(4, 2, 8)), ValueError, r"hidden: .*wanted \[N, H\]"),
    "hidden not a tensor": (dict(hidden=[[1.0]]), TypeError, "hidden: got list"),
    "weight shape": (dict(weight=torch.ones(3, 9)), ValueError, r"weight: .*\[3, 9\].*wanted \[C, 8\]"),
    "weight dtype": (dict(weight=torch.ones(3, 8, dtype=torch.int32)), TypeError, "weight: got torch.int32"),
    "weight device": (dict(weight=torch.ones(3, 8, device="meta")), ValueError, "weight: got a tensor on meta"),
    "bias shape": (dict(bias=torch.ones(4)), ValueError, r"bias: .*\[4\].*wanted \[3\]"),
    "bias dtype": (dict(bias=torch.ones(3, dtype=torch.int64)), TypeError, "bias: got torch.int64"),
    "bias device": (dict(bias=torch.ones(3, device="meta")), ValueError, "bias: got a tensor on meta"),
    "regression head": (dict(weight=torch.ones(1, 8), bias=None), ValueError, "a regression head has no energy"),
    "logit of many": (dict(score="logit"), ValueError, "wanted a single-output head"),
    "NaN threshold": (dict(threshold=NAN), ValueError, "threshold: got NaN"),
    "threshold dtype": (dict(threshold=torch.ones(1, dtype=torch.float64)), TypeError, "threshold: .*wanted float32"),
    "threshold shape": (dict(threshold=torch.ones(2)), ValueError, r"threshold: .*\[2\]"),
    "threshold device": (dict(threshold=torch.ones(1, device="meta")), ValueError, "threshold: got a tensor on meta"),
    "threshold type": (dict(threshold="high"), TypeError, "threshold: got 'high'"),
    "temperature": (dict(temperature=0.0), ValueError, "temperature: got 0.0"),
    "NaN temperature": (dict(temperature=NAN), ValueError, "temperature: got nan"),
    "no classes": (dict(weight=torch.ones(0, 8), bias=None), ValueError, "got C = 0"),
    "temperature type": (dict(temperature="warm"), TypeError, "temperature: got 'warm'"),
    "unknown score": (dict(score="enrgy"), ValueError, "score: got 'enrgy', wanted one of energy, energy_probs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROUTE)
def test_route_refuses(case):
    bad, error, message = BAD_ROUTE[case]
    bad = {name: on_default_device(value) for name, value in bad.items()}
    hidden, weight, bias = head(4, 8, 3)
    args = {"hidden": hidden, "weight": weight, "bias": bias, "threshold": 1.0} | bad
    with pytest.raises(error, match=message):
        elang.route(**args)


@pytest.mark.parametrize(
    "case", [c for c in BAD_ROUTE if BAD_ROUTE[c][0].keys() <= {"threshold", "temperature", "score"}]
)
def test_route_logits_refuses(case):
    bad, error, message = BAD_ROUTE[case]
    bad = {name: on_default_device(value) for name, value in bad.items()}
    with pytest.raises(error, match=message):
        elang.route_logits(**{"logits": torch.randn(4, 3), "threshold": 1.0} | bad)


def test_route_logits_refuses_what_is_not_logits():
    with pytest.raises(TypeError, match=r"logits: got torch\.int64"):
        elang.route_logits(torch.ones(3, 2, dtype=torch.int64), 0.0)
    with pytest.raises(ValueError, match=r"logits: .*wanted \[N, C\]"):
        elang.route_logits(torch.ones(3), 0.0)
