"""vocab_energy against reference.py in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import assert_accurate, on_default_device
from torch.library import opcheck

import elang
from elang import backend

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# (N, H, C): one row, below, at and past every tile of rows and classes, every part of the vocabulary
SHAPES = [
    (1, 64, 5003),
    (3, 5, 1),
    (5, 32, 128),
    (16, 33, 129),
    (130, 16, 4211),
    (257, 8, 300),
    (200, 64, 1003),
    (4, 0, 7),
]

pytestmark = pytest.mark.usefixtures("device")


def head(shape, classes, dtype=torch.float32, weight_dtype=None, scale=2.0):
    width = shape[-1]
    hidden = torch.randn(*shape).to(dtype)
    weight = (torch.randn(classes, width) / max(width, 1) ** 0.5 * scale).to(weight_dtype or dtype)
    return hidden, weight, torch.randn(classes).to(weight_dtype or dtype)


def logits_of(hidden, weight, bias, dtype):
    z = hidden.to(dtype) @ weight.to(dtype).t()
    return z if bias is None else z + bias.to(dtype)


def energies(hidden, weight, bias, temperature=1.0, dtype=torch.float64):
    """[N] or [B, M]: the truth in float64; what eager PyTorch makes of it in any other dtype."""
    z = logits_of(hidden, weight, bias, dtype)
    z = z if dtype == torch.float64 else z.float()
    return temperature * torch.logsumexp(z / temperature, dim=-1)


def mean_of(values, mask):
    mask = mask != 0
    return values.where(mask, 0.0).sum(1) / mask.sum(1)


def assert_argmax(got, hidden, weight, bias):
    """The class is the best one up to what float32 can tell apart."""
    z = logits_of(hidden, weight, bias, torch.float64)
    chosen = z.gather(-1, got.unsqueeze(-1)).squeeze(-1)
    best = z.amax(-1)
    assert (best - chosen <= 1e-5 * best.abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_matches_float64(shape, dtype, with_bias):
    n, h, c = shape
    hidden, weight, bias = head((n, h), c, dtype)
    bias = bias if with_bias else None
    got = elang.vocab_energy(hidden, weight, bias, temperature=1.7)
    assert (got.score.dtype, got.argmax.dtype) == (torch.float32, torch.int64)
    truth = energies(hidden, weight, bias, 1.7)
    assert_accurate(got.score, energies(hidden, weight, bias, 1.7, dtype), truth)
    assert_argmax(got.argmax, hidden, weight, bias)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_mean_over_the_tokens_that_count(mask_dtype):
    hidden, weight, bias = head((5, 19, 64), 700)
    mask = (torch.rand(5, 19) < 0.6).to(mask_dtype)
    mask[0], mask[1] = 1, 0
    got = elang.vocab_energy(hidden, weight, bias, mask, temperature=0.7)
    truth = mean_of(energies(hidden, weight, bias, 0.7), mask)
    assert_accurate(got.score, mean_of(energies(hidden, weight, bias, 0.7, torch.float32), mask), truth)
    assert got.score[1].isnan()
    assert got.argmax.shape == (5, 19)
    assert (got.argmax[mask == 0] == -1).all()
    assert_argmax(got.argmax[mask != 0], hidden[mask != 0], weight, bias)


def test_without_a_mask_every_token_counts():
    hidden, weight, bias = head((3, 4, 12), 300)
    got = elang.vocab_energy(hidden, weight, bias)
    masked = elang.vocab_energy(hidden, weight, bias, torch.ones(3, 4))
    torch.testing.assert_close(got.score, masked.score)
    assert torch.equal(got.argmax, masked.argmax)


def test_what_stands_at_a_masked_token_is_never_looked_at():
    hidden, weight, bias = head((2, 6, 12), 300)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1]])
    clean = elang.vocab_energy(hidden, weight, bias, mask)
    hidden[mask == 0] = NAN
    dirty = elang.vocab_energy(hidden, weight, bias, mask)
    assert torch.equal(clean.score, dirty.score)
    assert torch.equal(clean.argmax, dirty.argmax)


def test_bad_rows_touch_no_other():
    hidden, weight, bias = head((70, 24), 1500)
    clean = elang.vocab_energy(hidden, weight, bias)
    hidden[3], hidden[40, 5], hidden[69, 0] = NAN, INF, -INF
    got = elang.vocab_energy(hidden, weight, bias)
    bad = torch.zeros(70, dtype=torch.bool)
    bad[[3, 40, 69]] = True
    assert not got.score[bad].isfinite().any()
    assert ((got.argmax >= 0) & (got.argmax < 1500)).all()
    assert torch.equal(got.score[~bad], clean.score[~bad])
    assert torch.equal(got.argmax[~bad], clean.argmax[~bad])


def test_masked_classes():
    """A bias of -inf hides a class; a row all of whose classes are hidden is not finite."""
    hidden, weight, bias = head((6, 12), 900)
    bias[::2], bias[:640] = -INF, -INF
    got = elang.vocab_energy(hidden, weight, bias)
    assert_accurate(got.score, energies(hidden, weight, bias, 1.0, torch.float32), energies(hidden, weight, bias))
    assert torch.equal(got.argmax, logits_of(hidden, weight, bias, torch.float64).argmax(-1))
    hidden_all = elang.vocab_energy(hidden, weight, torch.full_like(bias, -INF))
    assert not hidden_all.score.isfinite().any()
    assert (hidden_all.argmax == 0).all()


def test_of_equal_logits_the_lowest_class_is_the_argmax():
    weight = torch.zeros(5000, 8)
    weight[[700, 701, 4096, 4999]] = 1.0
    got = elang.vocab_energy(torch.ones(2, 8), weight)
    assert got.argmax.tolist() == [700, 700]
    assert elang.vocab_energy(torch.zeros(2, 8), weight).argmax.tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [1e-6, 0.01, 1.0, 300.0])
def test_large_logits_and_any_temperature(temperature):
    hidden, weight, bias = head((9, 16), 1000, scale=300.0)
    got = elang.vocab_energy(hidden, weight, bias, temperature=temperature)
    eager = energies(hidden, weight, bias, temperature, torch.float32)
    assert_accurate(got.score, eager, energies(hidden, weight, bias, temperature))


@pytest.mark.parametrize("hidden_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
def test_mixed_dtypes_accumulate_in_float32(hidden_dtype, weight_dtype):
    args = head((19, 48), 600, hidden_dtype, weight_dtype)
    got = elang.vocab_energy(*args)
    assert_accurate(got.score, energies(*args, 1.0, torch.float32), energies(*args))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_slices_of_larger_buffers(dtype):
    hidden, weight, bias = head((4, 6, 20), 400, dtype)
    plain = elang.vocab_energy(hidden, weight, bias, torch.ones(4, 6))

    def sliced(t, *dims):
        """The same values as every second element, from the second on, of `dims` of a buffer of NaN."""
        size = list(t.shape)
        for d in dims:
            size[d] = 2 * size[d] + 1
        buffer = torch.full(size, NAN, dtype=t.dtype)
        for d in dims:
            buffer = buffer.narrow(d, 1, size[d] - 1).unflatten(d, (-1, 2)).select(d + 1, 0)
        return buffer.copy_(t)

    for of_hidden, of_weight in (((0,), ()), ((1,), (0,)), ((0, 1, 2), (0, 1)), ((2,), (1,))):
        args = sliced(hidden, *of_hidden), sliced(weight, *of_weight), sliced(bias, 0)
        for got in (elang.vocab_energy(*args, sliced(torch.ones(4, 6), 0, 1)), elang.vocab_energy(*args)):
            torch.testing.assert_close(got.score, plain.score)
            assert torch.equal(got.argmax, plain.argmax)
    transposed = elang.vocab_energy(hidden.transpose(0, 1), weight, bias)
    assert torch.equal(transposed.argmax, plain.argmax.t())


def test_empty():
    _, weight, bias = head((1, 8), 300)
    assert [t.shape for t in elang.vocab_energy(torch.empty(0, 8), weight)] == [(0,), (0,)]
    assert [t.shape for t in elang.vocab_energy(torch.empty(0, 5, 8), weight, bias)] == [(0,), (0, 5)]
    no_tokens = elang.vocab_energy(torch.empty(2, 0, 8), weight)
    assert no_tokens.score.isnan().all()
    assert no_tokens.argmax.shape == (2, 0)


def test_inputs_are_left_alone_and_outputs_are_new():
    args = *head((3, 4, 12), 300), torch.ones(3, 4)
    before = [t.clone() for t in args]
    got = elang.vocab_energy(*args)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    assert {t.data_ptr() for t in got}.isdisjoint(t.data_ptr() for t in args)


@pytest.mark.parametrize("rows", [20, 200])
def test_same_bits_again(rows):
    args = head((rows, 64), 5000)
    one = elang.vocab_energy(*args)
    for _ in range(4):
        two = elang.vocab_energy(*(t.clone() for t in args))
        assert torch.equal(one.score, two.score)
        assert torch.equal(one.argmax, two.argmax)


@pytest.mark.cpu_only
@pytest.mark.compiled
def test_threads_do_not_change_a_bit():
    args = head((300, 64), 9000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = elang.vocab_energy(*args)
        torch.set_num_threads(3)
        three = elang.vocab_energy(*args)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.score, three.score)
    assert torch.equal(one.argmax, three.argmax)


@pytest.mark.cpu_only
@pytest.mark.compiled
@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set_matches_float64(isa):
    """The tests of values once more in a process that is held to `isa`, or to the best below it."""
    if os.environ.get("ELANG_ISA"):
        pytest.skip("ELANG_ISA is set: this is such a process")
    tests = "matches_float64 or masked_classes or bad_rows or large_logits"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-m", "not gpu"]
    done = subprocess.run([*command, "-k", tests], env={**os.environ, "ELANG_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


OP_CASES = {
    "rows": lambda h, w, b, m: (h[0], w, b, None, 1.0),
    "tokens": lambda h, w, b, m: (h, w, None, m, 2.0),
    "requires_grad": lambda h, w, b, m: (h.requires_grad_(), w, b, None, 1.0),
}


@pytest.mark.compiled
@pytest.mark.parametrize("case", OP_CASES)
def test_opcheck(case):
    hidden, weight, bias = head((3, 4, 10), 50)
    opcheck(torch.ops.elang.vocab_energy.default, OP_CASES[case](hidden, weight, bias, torch.ones(3, 4)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_without_a_break(dynamic):
    _, weight, bias = head((1, 16), 300)
    linear = torch.nn.Linear(24, 16)

    def f(x, mask):
        got = elang.vocab_energy(linear(x).tanh(), weight, bias, mask)
        return got.score * 2, got.argmax

    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    with torch.inference_mode():
        for b, m in ((2, 5), (3, 7)):
            x, mask = torch.randn(b, m, 24), torch.ones(b, m)
            for got, wanted in zip(compiled(x, mask), f(x, mask), strict=True):
                torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_takes_parameters_and_backward_is_refused(compiled):
    hidden, weight, bias = head((6, 10), 30)
    call = partial(elang.vocab_energy, weight=weight.requires_grad_(), bias=bias)
    if compiled:
        torch.compiler.reset()
        call = torch.compile(call, fullgraph=True)
    score = call(hidden).score
    with pytest.raises(RuntimeError, match="inference"):
        (score.sum() + weight.sum()).backward()


def test_autocast_hands_over_mixed_dtypes(device):
    linear = torch.nn.Linear(24, 16)
    _, weight, bias = head((1, 16), 300)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        hidden = linear(torch.randn(5, 24))
        got = elang.vocab_energy(hidden, weight, bias)
    assert hidden.dtype == torch.bfloat16
    assert_accurate(got.score, energies(hidden, weight, bias, 1.0, torch.float32), energies(hidden, weight, bias))


BAD = {
    "integer hidden": (dict(hidden=torch.ones(4, 8, dtype=torch.int64)), TypeError, "hidden: got torch.int64"),
    "hidden of 4 dims": (dict(hidden=torch.ones(1, 1, 4, 8)), ValueError, r"hidden: .*wanted \[N, H\] or \[B, M, H\]"),
    "weight shape": (dict(weight=torch.ones(3, 9)), ValueError, r"weight: .*\[3, 9\].*wanted \[C, 8\]"),
    "weight device": (dict(weight=torch.ones(3, 8, device="meta")), ValueError, "weight: got a tensor on meta"),
    "no classes": (dict(weight=torch.ones(0, 8), bias=None), ValueError, "weight: got C = 0"),
    "bias shape": (dict(bias=torch.ones(4)), ValueError, r"bias: .*\[4\].*wanted \[3\]"),
    "bias dtype": (dict(bias=torch.ones(3, dtype=torch.int64)), TypeError, "bias: got torch.int64"),
    "mask shape": (dict(mask=torch.ones(4, 6)), ValueError, r"mask: .*\[4, 6\].*wanted \[4, 5\]"),
    "mask of rows": (dict(hidden=torch.ones(4, 8), mask=torch.ones(4, 1)), ValueError, r"mask: .*wanted None"),
    "mask dtype": (dict(mask=torch.ones(4, 5, dtype=torch.complex128)), TypeError, "mask: got torch.complex128"),
    "uint16 mask": (dict(mask=torch.ones(4, 5, dtype=torch.uint16)), TypeError, "mask: got torch.uint16"),
    "no integer rows": (dict(hidden=torch.ones(0, 8, dtype=torch.int64)), TypeError, "hidden: got torch.int64"),
    "weight of no rows": (
        dict(hidden=torch.ones(0, 8), weight=torch.ones(3, 8).double()), TypeError, "weight: got torch.float64",
    ),
    "mask device": (dict(mask=torch.ones(4, 5, device="meta")), ValueError, "mask: got a tensor on meta"),
    "mask type": (dict(mask=[[1]]), ValueError, r"mask: got \[\[1\]\]"),
    "temperature": (dict(temperature=-1.0), ValueError, "temperature: got -1.0"),
    "temperature type": (dict(temperature="warm"), TypeError, "temperature: got 'warm'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    bad, error, message = BAD[case]
    bad = {name: on_default_device(value) for name, value in bad.items()}
    hidden, weight, bias = head((4, 5, 8), 3)
    with pytest.raises(error, match=message):
        elang.vocab_energy(**{"hidden": hidden, "weight": weight, "bias": bias} | bad)
