"""gather_rows and merge_rows against reference.py."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import elang
from elang import ops, reference

pytestmark = pytest.mark.usefixtures("device")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)


def partition(keep):
    return reference.partition(torch.tensor(keep, dtype=torch.bool))


def filled(shape, dtype):
    return torch.randint(0, 2 if dtype is torch.bool else 100, shape).to(dtype)


def test_padding_repeats_a_real_row_and_never_reaches_an_answer():
    order, n_routed = partition([True, False, True, False])
    (got,) = elang.gather_rows([torch.tensor([10, 11, 12, 13])], order, n_routed, 5)
    assert got.tolist() == [11, 13, 13, 13, 13]
    poisoned = torch.tensor([1.0, 2.0, float("nan"), float("inf")])
    assert elang.merge_rows(torch.zeros(4), poisoned, order, n_routed).tolist() == [0, 1, 0, 2]


def test_nothing_routed_pads_with_a_kept_row():
    order, n_routed = partition([True, True])
    (got,) = elang.gather_rows([torch.tensor([7, 8])], order, n_routed, 2)
    assert got.tolist() == [7, 7]
    assert elang.merge_rows(torch.tensor([7, 8]), torch.tensor([0, 0]), order, n_routed).tolist() == [7, 8]


def test_strided_rows_of_a_larger_buffer():
    order, n_routed = partition([False, True, False])
    buffer = torch.arange(6 * 4 * 10).reshape(6, 4, 10)
    for view in (buffer[::2, :3, :5], buffer[::2, 1:3, ::3], buffer.permute(2, 1, 0)[:3], buffer[:1].expand(3, 4, 10)):
        (got,) = elang.gather_rows([view], order, n_routed, 2)
        assert torch.equal(got, view[[0, 2]])
        assert torch.equal(elang.merge_rows(view, -got, order, n_routed), torch.stack([-view[0], view[1], -view[2]]))
        assert torch.equal(elang.merge_rows(view, (-view)[[0, 2]], order, n_routed)[0], -view[0])


def test_empty_batch_and_no_tensors():
    order, n_routed = partition([])
    (got,) = elang.gather_rows([torch.empty(0, 3)], order, n_routed, 0)
    assert got.shape == (0, 3)
    assert elang.gather_rows([], order, n_routed, 0) == []
    assert elang.merge_rows(torch.empty(0, 3), torch.empty(0, 3), order, n_routed).shape == (0, 3)


@pytest.mark.parametrize("kept", DTYPES[:3], ids=str)
@pytest.mark.parametrize("routed", DTYPES[:3], ids=str)
def test_merge_answers_in_the_dtype_of_super(kept, routed):
    order, n_routed = partition([True, False])
    got = elang.merge_rows(torch.tensor([0.1, 0.2]).to(kept), torch.tensor([0.3]).to(routed), order, n_routed)
    assert got.dtype == routed
    assert torch.equal(got, torch.stack([torch.tensor(0.1).to(kept).to(routed), torch.tensor(0.3).to(routed)]))


def test_inputs_are_unchanged_and_outputs_are_new():
    order, n_routed = partition([False, False])
    x = torch.tensor([1.0, 2.0])
    (got,) = elang.gather_rows([x], order, n_routed, 2)
    merged = elang.merge_rows(x, got, order, n_routed)
    got += 1
    merged += 1
    assert x.tolist() == [1, 2]


@pytest.mark.compiled
def test_opcheck():
    order, n_routed = partition([True, False, False])
    x = torch.randn(3, 4)
    opcheck(torch.ops.elang.gather_rows.default, ([x, x.long()], order, n_routed, 3))
    opcheck(torch.ops.elang.merge_rows.default, (x, x[:2].clone(), order, n_routed))
    opcheck(torch.ops.elang.routed_extent.default, (x > 0, order, n_routed))


MASK_DTYPES = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, *DTYPES[:3], torch.float64)


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_routed_extent_is_the_count_and_the_longest_routed_row(dtype):
    order, n_routed = partition([True, False, True, False])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 1, 1, 0, 0]]).to(dtype)
    for view in (mask, mask.t().contiguous().t(), torch.stack([mask, mask], dim=2)[:, :, 1]):
        got = ops.routed_extent(view, order, n_routed)
        assert got.dtype == torch.int32
        assert got.tolist() == [2, 3]


def test_routed_extent_of_nothing():
    order, n_routed = partition([True, True])
    assert ops.routed_extent(torch.ones(2, 3), order, n_routed).tolist() == [0, 0]
    order, n_routed = partition([False, False])
    for mask in (torch.zeros(2, 3), torch.full((2, 3), -0.0), torch.empty(2, 0)):
        assert ops.routed_extent(mask, order, n_routed).tolist() == [2, 0]
    order, n_routed = partition([])
    assert ops.routed_extent(torch.ones(0, 3), order, n_routed).tolist() == [0, 0]


def test_routed_extent_over_many_rows():
    keep = torch.rand(3000) < 0.5
    order, n_routed = reference.partition(keep)
    mask = torch.arange(70) < torch.randint(0, 71, (3000, 1))
    wanted = reference.routed_extent(mask, order, n_routed)
    assert torch.equal(ops.routed_extent(mask, order, n_routed), wanted)


def test_torch_compile_without_a_break():
    def f(x, order, n_routed):
        rows = elang.gather_rows([x, x * 2], order, n_routed, 2)
        return elang.merge_rows(x, rows[1], order, n_routed)

    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for keep in ([True, False, False], [False, True, True, True]):
        order, n_routed = partition(keep)
        x = torch.randn(len(keep), 3)
        assert torch.equal(compiled(x, order, n_routed), f(x, order, n_routed))


def test_backward_is_refused():
    order, n_routed = partition([False, True])
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="inference"):
        elang.gather_rows([x], order, n_routed, 1)[0].sum().backward()
    with pytest.raises(RuntimeError, match="inference"):
        elang.merge_rows(x, x[:1].detach(), order, n_routed).sum().backward()


def test_refusals():
    order, n_routed = partition([True, False])
    x = torch.randn(2, 3)
    gather = elang.gather_rows
    with pytest.raises(ValueError, match=r"tensors\[1\]: .*\[3, 3\].*wanted \[2, ...\]"):
        gather([x, torch.randn(3, 3)], order, n_routed, 1)
    with pytest.raises(TypeError, match=r"tensors\[0\]: got list"):
        gather([[1, 2]], order, n_routed, 1)
    with pytest.raises(ValueError, match=r"order: .*wanted int64"):
        gather([x], order.int(), n_routed, 1)
    with pytest.raises(ValueError, match=r"n_routed: .*wanted int32"):
        gather([x], order, n_routed.long(), 1)
    with pytest.raises(ValueError, match="capacity: got -1"):
        gather([x], order, n_routed, -1)
    with pytest.raises(TypeError, match=r"capacity: got 1\.5"):
        gather([x], order, n_routed, 1.5)
    with pytest.raises(ValueError, match=r"kept: .*wanted \[2, ...\]"):
        elang.merge_rows(torch.randn(3, 3), x[:1], order, n_routed)
    with pytest.raises(ValueError, match=r"routed: .*\[1, 4\].*\[2, 3\]"):
        elang.merge_rows(x, torch.randn(1, 4), order, n_routed)
    with pytest.raises(ValueError, match=r"mask: .*\[3, 3\].*wanted \[2, ...\]"):
        ops.routed_extent(torch.ones(3, 3), order, n_routed)
    with pytest.raises(ValueError, match=r"mask: .*\[2\].*wanted \[2, M\]"):
        ops.routed_extent(torch.ones(2), order, n_routed)
    with pytest.raises(TypeError, match=r"mask: .*complex64"):
        ops.routed_extent(torch.ones(2, 3, dtype=torch.complex64), order, n_routed)


@pytest.mark.cpu_only  # a GPU stops the kernel instead, and with it the process's context
def test_an_order_that_points_outside_is_refused():
    _, n_routed = partition([False, True])
    with pytest.raises(ValueError, match=r"order: got rows from 0 to 2, wanted them in \[0, 2\)"):
        elang.gather_rows([torch.randn(2)], torch.tensor([2, 0]), n_routed, 1)


@pytest.mark.cpu_only
@pytest.mark.compiled
def test_a_count_past_the_rows_is_refused():
    with pytest.raises(ValueError, match="n_routed: got 3, wanted 0 to N = 2"):
        elang.merge_rows(torch.randn(2), torch.randn(1), torch.arange(2), torch.tensor([3], dtype=torch.int32))


def test_a_strided_order():
    order, n_routed = partition([True, False, False])
    spread = torch.stack([order, order], dim=1)[:, 0]
    x = torch.arange(3)
    assert torch.equal(elang.gather_rows([x], spread, n_routed, 2)[0], x[1:])


@pytest.mark.cpu_only
@pytest.mark.compiled
def test_threads_do_not_change_a_byte():
    keep = torch.rand(1000) < 0.5
    order, n_routed = reference.partition(keep)
    x = torch.randn(1000, 3000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        (rows,) = elang.gather_rows([x], order, n_routed, 700)
        merged = elang.merge_rows(x, -rows, order, n_routed)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(rows, reference.gather_rows([x], order, n_routed, 700)[0])
    assert torch.equal(merged, torch.where(keep[:, None], x, -x))
