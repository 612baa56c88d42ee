from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elang import dispatch, host_read, ops
from elang.dispatch import Plan
from elang.reference import Route
from elang.super_model import SuperModel

LENGTHS = (9, 3, 5, 1, 7, 2)


class Recorder:
    """A Super that remembers its inputs and answers each row with its first token, as [n, 2] logits."""

    def __init__(self, form: Any = lambda logits: logits) -> None:
        self.calls: list[dict[str, Any]] = []
        self.form = form

    def __call__(self, **inputs: Any) -> Any:
        self.calls.append(inputs)
        first = inputs["input_ids"][:, :1].float()
        return self.form(torch.cat([first, -first], dim=1))


def exact(route: Route, super_: Any, inputs: dict[str, Any], **settings: Any) -> tuple[Tensor, Any]:
    plan = Plan(SuperModel(super_, settings.pop("super_device", None)), **settings)
    mode = dispatch.MODES["exact"]
    answer = mode.run(route, inputs, plan, dispatch.read(mode, route, inputs, plan))
    assert answer.overflow is answer.degraded is None
    return answer.logits, answer.outputs[0] if answer.outputs else None


def decide(*routed: int, rows: int = len(LENGTHS)) -> Route:
    """A decision that sends exactly these rows to Super."""
    logits = torch.stack([torch.arange(rows) + 1.0, torch.zeros(rows)], dim=1)
    logits[list(routed)] -= 100
    return ops.route_logits(logits, 0.0)


def routed_rows(value: Tensor, *rows: int, length: int = tiny_models.LENGTH) -> Tensor:
    return value[list(rows), :length]


@pytest.mark.parametrize("routed", [(0,), (5,), (1, 3, 5), (0, 2, 4), (0, 1, 2, 3, 4)])
def test_super_sees_exactly_the_routed_rows_and_every_row_gets_one_answer(routed):
    route, inputs, super_ = decide(*routed), tiny_models.inputs(LENGTHS), Recorder()
    logits, output = exact(route, super_, inputs)
    (seen,) = super_.calls
    length = max(LENGTHS[row] for row in routed)
    assert {name: value.tolist() for name, value in seen.items()} == {
        name: routed_rows(value, *routed, length=length).tolist() for name, value in inputs.items()
    }
    want = route.logits.clone()
    first = inputs["input_ids"][list(routed), 0].float()
    want[list(routed)] = torch.stack([first, -first], dim=1)
    assert torch.equal(logits, want)
    assert torch.equal(output, want[list(routed)])


def test_nothing_routed_does_not_call_super():
    route, super_ = decide(), Recorder()
    logits, output = exact(route, super_, tiny_models.inputs(LENGTHS))
    assert super_.calls == []
    assert logits is route.logits
    assert output is None


@pytest.mark.parametrize("lengths", [LENGTHS, (2, 3, 5, 1, 4, 2)])
def test_everything_routed_passes_the_inputs_uncopied(lengths):
    inputs, super_ = tiny_models.inputs(lengths), Recorder()
    logits, output = exact(decide(*range(6)), super_, inputs)
    (seen,) = super_.calls
    for name, value in inputs.items():
        assert seen[name].data_ptr() == value.data_ptr()
        assert torch.equal(seen[name], value[:, : max(lengths)])
    assert torch.equal(logits, output)
    assert logits.data_ptr() != output.data_ptr()


def test_an_empty_batch():
    inputs = {name: value[:0] for name, value in tiny_models.inputs(LENGTHS).items()}
    logits, output = exact(decide(rows=0), Recorder(), inputs)
    assert logits.shape == (0, 2)
    assert output is None


@pytest.mark.parametrize(
    ("change", "length"),
    [
        pytest.param(lambda inputs: inputs, 5, id="right-padded"),
        pytest.param(lambda inputs: {**inputs, "attention_mask": inputs["attention_mask"].bool()}, 5, id="bool mask"),
        pytest.param(
            lambda inputs: {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}, 9, id="left-padded"
        ),
        pytest.param(lambda inputs: {"input_ids": inputs["input_ids"]}, 9, id="no mask"),
        pytest.param(
            lambda inputs: {**inputs, "attention_mask": inputs["attention_mask"][:, None, None, :].expand(6, 1, 9, 9)},
            9,
            id="4-D mask",
        ),
        pytest.param(
            lambda inputs: {**inputs, "attention_mask": torch.ones(1, 9, dtype=torch.long)}, 9, id="one mask for all"
        ),
        pytest.param(
            lambda inputs: {**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}, 9, id="all masked"
        ),
    ],
)
def test_only_trailing_columns_that_the_mask_hides_in_every_routed_row_are_cut(change, length):
    inputs, super_ = change(tiny_models.inputs(LENGTHS)), Recorder()
    exact(decide(1, 2), super_, inputs)
    (seen,) = super_.calls
    assert torch.equal(seen["input_ids"], routed_rows(inputs["input_ids"], 1, 2, length=length))
    mask = inputs.get("attention_mask")
    if mask is not None:
        columns = length if mask.dim() == 2 else None
        rows = [1, 2] if len(mask) == len(LENGTHS) else [0]
        assert torch.equal(seen["attention_mask"], mask[rows][:, :columns])


def test_a_hole_in_the_mask_is_not_a_trailing_column():
    inputs = tiny_models.inputs(LENGTHS)
    inputs["attention_mask"][2, 1:4] = 0
    super_ = Recorder()
    exact(decide(1, 2), super_, inputs)
    assert super_.calls[0]["input_ids"].shape == (2, 5)


def test_trim_off():
    super_ = Recorder()
    exact(decide(1, 2), super_, tiny_models.inputs(LENGTHS), trim=False)
    assert super_.calls[0]["input_ids"].shape == (2, 9)


def test_which_inputs_are_gathered_and_which_are_trimmed():
    flags = {"use_cache": False, "task": "topic", "scale": torch.tensor(3.0)}
    inputs = {
        **tiny_models.inputs(LENGTHS),
        "position_ids": torch.arange(9).expand(1, 9),
        "inputs_embeds": torch.rand(6, 9, 4),
        "image": torch.rand(6, 3, 8),
        "weight": torch.rand(6),
        "bias": torch.rand(2, 4),
        **flags,
    }
    super_ = Recorder()
    exact(decide(1, 2), super_, inputs)
    (seen,) = super_.calls
    assert list(seen) == list(inputs)
    assert torch.equal(seen["position_ids"], inputs["position_ids"][:, :5])
    assert torch.equal(seen["inputs_embeds"], inputs["inputs_embeds"][1:3, :5])
    assert torch.equal(seen["image"], inputs["image"][1:3])
    assert torch.equal(seen["weight"], inputs["weight"][1:3])
    assert seen["bias"] is inputs["bias"]
    assert all(seen[name] is value for name, value in flags.items())


def test_trimmed_columns_are_never_copied(monkeypatch):
    gathered = []
    gather_rows = ops.gather_rows

    def spy(tensors: list[Tensor], *args: Any) -> list[Tensor]:
        gathered.append([tuple(tensor.shape) for tensor in tensors])
        return gather_rows(tensors, *args)

    monkeypatch.setattr(ops, "gather_rows", spy)
    exact(decide(1, 2), Recorder(), tiny_models.inputs(LENGTHS))
    assert gathered == [[(6, 5), (6, 5)]]


def test_super_inputs_own_gathering_and_trimming():
    inputs, super_ = tiny_models.inputs(LENGTHS), Recorder()
    seen = []

    def super_inputs(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        seen.append((inputs, rows))
        return {"input_ids": inputs["input_ids"][rows] + 1}

    logits, _ = exact(decide(4, 2), super_, inputs, super_inputs=super_inputs)
    ((given, rows),) = seen
    assert given is inputs
    assert rows.tolist() == [2, 4]
    assert list(super_.calls[0]) == ["input_ids"]
    assert torch.equal(logits[[2, 4], 0], inputs["input_ids"][[2, 4], 0].float() + 1)


@pytest.mark.parametrize("routed", [(1, 2), tuple(range(6))])
def test_inputs_are_sent_to_super_s_device(routed):
    devices = []

    def super_(**inputs: Tensor) -> Tensor:
        devices.extend(value.device.type for value in inputs.values())
        return torch.zeros(len(routed), 2)

    exact(decide(*routed), super_, tiny_models.inputs(LENGTHS), super_device=torch.device("meta"))
    assert devices == ["meta", "meta"]


@pytest.mark.parametrize(
    "form",
    [lambda logits: (logits, "hidden states"), lambda logits: type("Output", (), {"logits": logits})()],
)
def test_the_forms_super_may_answer_in(form):
    inputs = tiny_models.inputs(LENGTHS)
    logits, output = exact(decide(1, 2), Recorder(form), inputs)
    want, _ = exact(decide(1, 2), Recorder(), inputs)
    assert torch.equal(logits, want)
    assert not isinstance(output, Tensor)


@pytest.mark.parametrize("routed", [(1, 2), tuple(range(6))])
def test_logits_are_in_super_s_dtype(routed):
    super_ = Recorder(lambda logits: logits.bfloat16())
    logits, _ = exact(decide(*routed), super_, tiny_models.inputs(LENGTHS))
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("form", [lambda z: z[:1], lambda z: z[:, :1], lambda z: z[0], lambda z: z[..., None]])
def test_super_s_logits_have_to_fit(form):
    with pytest.raises(ValueError, match=r"super_: got logits \[.*\] for 2 rows, wanted \[2, 2\]"):
        exact(decide(1, 2), Recorder(form), tiny_models.inputs(LENGTHS))


def test_inputs_are_not_written_to():
    inputs = tiny_models.inputs(LENGTHS)
    before = {name: value.clone() for name, value in inputs.items()}
    exact(decide(1, 2), Recorder(), inputs)
    assert list(inputs) == list(before)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func.overloadpacket._qualified_op_name in {
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::is_nonzero",
            "aten::equal",
            "aten::masked_select",
        }
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("routed", [(), (1, 2), tuple(range(6))])
def test_the_host_reads_once(monkeypatch, routed, masked):
    inputs = tiny_models.inputs(LENGTHS)
    if not masked:
        del inputs["attention_mask"]
    route, answers = decide(*routed), []
    read = host_read.routed_extent
    monkeypatch.setattr(host_read, "routed_extent", lambda *args: answers.append(read(*args)) or answers[-1])
    exact(route, Recorder(), inputs)
    longest = max((LENGTHS[row] for row in routed), default=0) if masked else 0
    assert answers == [(len(routed), longest)]

    monkeypatch.setattr(host_read, "routed_extent", lambda *args: answers[0])
    with HostReads() as host:
        exact(route, Recorder(), inputs)
    assert host.reads == 0
    with HostReads() as host:
        read(route.order, route.n_routed, None)
    assert host.reads == 1
