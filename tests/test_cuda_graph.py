"""`graph` dispatch.

On the host a stand-in for CUDA runs each captured part again and leaves its results where the first run left them;
everything above it is the real thing. On a GPU the same tests take the real one.
"""

from __future__ import annotations

import copy
import gc
import logging
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from elang import cuda_graph
from elang.cuda_graph import Weights, sizes_of
from elang.joint import JointClassifier
from elang.router import Router

INF = float("inf")


class Part(NamedTuple):
    run: Callable[[], Any]
    result: Any

    def replay(self) -> None:
        """Leaves its results where the captured run left them."""
        result = self.run()
        for old, new in zip(tensors_of(self.result), tensors_of(result), strict=True):
            old.copy_(new)


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [] if result is None else list(result)


class Host:
    """Stands in for `elang.cuda_graph.Cuda`."""

    grown = 1000  # bytes that each capture takes
    capturing = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launches: list[int] = []  # the bucket of each; 0: none
        self.idle = True
        self.waits = 0

    def warm_up(self, run: Callable[[], Any]) -> Any:
        return run()

    def random_state(self) -> list[Tensor]:
        return [torch.get_rng_state()]

    def capture(self, run: Callable[[], Any]) -> tuple[Part, Any, int]:
        Host.capturing = True
        try:
            result = run()
        finally:
            Host.capturing = False
        for tensor in tensors_of(result):  # a capture runs nothing
            tensor.zero_()
        return Part(run, result), result, self.grown

    def compose(self, *parts: Any) -> Any:
        return parts

    def launch(self, graph: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        assert all(tensor.is_contiguous() for tensor in inputs + outputs), "addresses alone are taken"
        assert self.idle, "one launch after the other"
        self.idle = False
        time.sleep(1e-3)  # in which another thread would come
        self._launch(graph, inputs, outputs)
        self.idle = True

    def _launch(self, graph: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        decide, bodies, merge, n_routed, counts, batches, own_inputs, own_outputs = graph
        for own, given in zip(own_inputs, inputs, strict=True):
            own.copy_(given)
        decide.replay()
        n, sizes = int(n_routed), sorted(bodies)
        counts += torch.tensor([sizes[-1], n, 0, 0])
        chosen = next(size for size in sizes if size >= n) if n else 0
        self.launches.append(chosen)
        if n:
            bodies[chosen].replay()
            batches[sizes.index(chosen)] += 1
        merge.replay()
        for given, own in zip(outputs, own_outputs, strict=True):
            given.copy_(own)

    def wait(self) -> None:
        self.waits += 1


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request, monkeypatch) -> str:
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr(cuda_graph, "obstacle", lambda: None)
    monkeypatch.setattr(cuda_graph, "Cuda", Host)
    return "cpu"


@pytest.fixture
def on_host(where):
    if where != "cpu":
        pytest.skip("looks into the stand-in")


def inputs_of(lengths: tuple[int, ...], where: str, seed: int = 0) -> dict[str, Tensor]:
    return {name: value.to(where) for name, value in tiny_models.inputs(lengths, seed).items()}


def joint_of(swift: Any, super_: Any, where: str, threshold: float = 0.0, **options: Any) -> JointClassifier:
    swift, super_ = (copy.deepcopy(m).to(where) if isinstance(m, nn.Module) else m for m in (swift, super_))
    return JointClassifier(swift, super_, Router(threshold=threshold), "graph", **options).to(where)


def threshold_for(score: Tensor, routed: int) -> float:
    """Half way between two scores: captured they may differ in the last bit."""
    edges = torch.cat([score.new_tensor([-INF]), score.sort().values, score.new_tensor([INF])])
    return edges[routed : routed + 2].mean().item()


@pytest.mark.parametrize("buckets", [None, (2, 4)])
def test_answers_are_those_of_exact_dispatch_for_every_share_routed(swift, super_, where, buckets):
    joint = joint_of(swift, super_, where, buckets=buckets)
    exact = JointClassifier(joint.swift, joint.super_, joint.router)
    for seed, lengths in enumerate([(9, 3, 5, 1, 7, 2, 8), (4, 9, 9), (5,)]):
        inputs = inputs_of(lengths, where, seed)
        score = exact(**inputs).routing.score
        for routed in range(len(lengths) + 1):
            joint.router.set_threshold(threshold_for(score, routed))  # in place: no new capture
            got, want = joint(**inputs), exact(**inputs)
            assert got.routing.mode == "graph"
            assert int(got.routing.n_routed) == routed
            assert torch.equal(got.routing.order, want.routing.order)
            torch.testing.assert_close(got.routing.score, want.routing.score)
            torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    assert len(joint.graphs.memory) == 3
    assert joint.stats.rows == 7 * 8 + 3 * 4 + 2
    assert joint.stats.routed == 28 + 6 + 1
    sizes = [next(b for b in sizes_of(n, joint.plan.buckets) if b >= k) for n in (7, 3, 1) for k in range(1, n + 1)]
    assert joint.stats.buckets == {size: sizes.count(size) for size in sorted(set(sizes))}


def test_an_answer_outlives_the_next_call(swift, super_, where):
    joint = joint_of(swift, super_, where, INF)
    first = joint(**inputs_of((9, 3, 5), where, 0))
    kept = [t.clone() for t in (first.logits, first.routing.score, first.routing.order)]
    joint(**inputs_of((4, 4, 4), where, 1))
    assert all(map(torch.equal, (first.logits, first.routing.score, first.routing.order), kept))


def test_strided_inputs_of_the_caller_are_read_and_left_alone(swift, super_, where):
    inputs = inputs_of((9, 3, 5), where)
    wide = {name: torch.cat([value, value + 1], dim=1)[:, : value.shape[1]] for name, value in inputs.items()}
    before = {name: value.clone() for name, value in wide.items()}
    joint = joint_of(swift, super_, where, INF)
    assert torch.equal(joint(**wide).logits, joint(**inputs).logits)
    assert all(torch.equal(wide[name], before[name]) for name in wide)


def test_nothing_routed_leaves_super_alone_and_the_rest_runs_in_the_least_bucket(swift, super_, where, on_host):
    joint = joint_of(swift, super_, where, buckets=(2, 4))
    inputs = inputs_of((9, 3, 5, 1, 7), where)
    score = joint(**inputs).routing.score
    host = joint.graphs._runtime
    host.launches.clear()
    for routed in range(6):
        joint.router.set_threshold(threshold_for(score, routed))
        joint(**inputs)
    assert host.launches == [0, 2, 2, 4, 4, 5]


def test_threads_give_the_answers_of_one(swift, super_, where):
    joint = joint_of(swift, super_, where)
    batches = [inputs_of(tuple(range(1, n + 2)), where, seed=n) for n in range(6)]
    joint.router.set_threshold(torch.cat([joint(**b).routing.score for b in batches]).median().item())
    alone = [joint(**b).logits for b in batches]

    def answer(i: int) -> Tensor:
        if where == "cpu":
            return joint(**batches[i % 6]).logits
        with torch.cuda.stream(torch.cuda.Stream()):
            logits = joint(**batches[i % 6]).logits
            torch.cuda.current_stream().synchronize()
            return logits

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, range(36)))
    assert all(torch.equal(together[i], alone[i % 6]) for i in range(36))


def test_weights_changed_in_place_are_seen_and_replaced_ones_noticed(swift, super_, where, caplog):
    inputs = inputs_of((9, 3, 5), where)
    joint = joint_of(swift, super_, where, INF)
    exact = JointClassifier(joint.swift, joint.super_, joint.router)
    joint(**inputs)

    def check(builds_anew: bool) -> None:
        caplog.clear()
        before = joint.stats
        torch.testing.assert_close(joint(**inputs).logits, exact(**inputs).logits, rtol=1e-4, atol=1e-5)
        assert ("weights were replaced" in caplog.text) == builds_anew
        after = joint.stats
        assert (after.rows - before.rows, after.routed - before.routed) == (3, 3)
        assert after.buckets == {3: before.buckets[3] + 1}

    with torch.no_grad():
        joint.super_.classifier.weight.mul_(2)
    check(builds_anew=False)
    joint.super_.classifier.weight.data = joint.super_.classifier.weight.data * 2
    check(builds_anew=True)
    joint.super_.classifier.weight = nn.Parameter(joint.super_.classifier.weight.detach() * 2)
    check(builds_anew=True)
    joint.super_.load_state_dict({k: v * 0.5 for k, v in joint.super_.state_dict().items()}, assign=True)
    check(builds_anew=True)
    joint.super_.classifier = copy.deepcopy(joint.super_.classifier)
    check(builds_anew=True)
    check(builds_anew=False)


def test_weights_are_held_while_a_graph_reads_them():
    linear = nn.Linear(2, 2)
    address, weights = linear.weight.data_ptr(), Weights(linear)
    linear.weight.data = torch.zeros(2, 2)
    assert weights.replaced()
    assert weights._storages[0].data_ptr() == address


def test_another_score_or_temperature_is_another_graph(swift, super_, where):
    inputs = inputs_of((9, 3, 5), where)
    joint = joint_of(swift, super_, where, -INF)
    first = joint(**inputs).routing.score
    joint.router.temperature = 2.0
    assert not torch.equal(joint(**inputs).routing.score, first)
    joint.router.temperature = 1.0
    assert torch.equal(joint(**inputs).routing.score, first)
    assert len(joint.graphs.memory) == 2


def test_constants_are_told_apart_by_type_too(where):
    def model(input_ids: Tensor, flag: Any) -> Tensor:
        return torch.full((len(input_ids), 2), 1.0 if flag is True else 2.0, device=where)

    joint = joint_of(model, model, where, label_map={0: 0, 1: 1})
    ids = torch.zeros(3, 4, dtype=torch.int64, device=where)
    for flag, want in ((True, 1.0), (1, 2.0), (1.0, 2.0)):
        assert (joint(input_ids=ids, flag=flag).logits == want).all()


def test_graphs_built_in_inference_mode_serve_outside_of_it(swift, super_, where):
    joint, inputs = joint_of(swift, super_, where, INF), inputs_of((9, 3, 5), where)
    with torch.inference_mode():
        first = joint(**inputs).logits
    assert torch.equal(joint(**inputs).logits, first)
    joint.super_.classifier.weight.data = joint.super_.classifier.weight.data.clone()
    assert torch.equal(joint(**inputs).logits, first)
    assert joint.stats.buckets == {3: 3}


def test_warmup_builds_ahead_and_memory_is_reported_for_each_bucket(swift, super_, where):
    joint, inputs = joint_of(swift, super_, where, buckets=(2, 4)), inputs_of((9, 3, 5, 1, 7), where)
    memory = joint.warmup(
        **dict(reversed(inputs.items())), labels=torch.zeros(5), token_type_ids=None, return_dict=True
    )
    assert sorted(memory.buckets) == [2, 4, 5]
    assert memory.inputs == f"attention_mask [5, {tiny_models.LENGTH}], input_ids [5, {tiny_models.LENGTH}]"
    joint(**inputs)
    assert joint.graphs.memory == [memory]
    assert joint.stats.rows == 5
    if where == "cpu":
        assert (memory.swift, memory.buckets, memory.total) == (2000, {2: 1000, 4: 1000, 5: 1000}, 5000)


def test_memory_is_capped(swift, super_, where, on_host):
    joint = joint_of(swift, super_, where, graph_memory=9000)
    joint(**inputs_of((9, 3), where))  # decide, merge and two buckets
    with pytest.raises(
        MemoryError, match="graph_memory: got 9000 bytes, of which other graphs take 4000, wanted at least 6000"
    ):
        joint(**inputs_of((9, 3, 5, 1, 7), where))
    assert [memory.total for memory in joint.graphs.memory] == [4000]
    assert len(joint(**inputs_of((9, 3), where, seed=1)).logits) == 2


def test_random_draws_are_refused(swift, super_, where):
    inputs = inputs_of((9, 3, 5), where)

    def draws(**inputs: Any) -> Tensor:
        return torch.rand(len(inputs["input_ids"]), tiny_models.CLASSES, device=where)

    names = {i: f"LABEL_{i}" for i in range(tiny_models.CLASSES)}
    with pytest.raises(RuntimeError, match=r"super_: draws random numbers.*dispatch='exact' can run it"):
        joint_of(swift, draws, where, label_map={v: k for k, v in names.items()})(**inputs)
    with pytest.raises(RuntimeError, match="swift: draws random numbers"):
        joint_of(draws, super_, where, label_map=names)(**inputs)
    dropout = tiny_models.classifier(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.5)
    joint_of(swift, dropout, where)(**inputs)  # in eval mode it draws none


def test_what_cannot_be_captured_is_refused_by_name(swift, super_, where):
    joint, inputs = joint_of(swift, super_, where), inputs_of((9, 3, 5), where)
    with pytest.raises(ValueError, match="past_key_values: got list, wanted a tensor, a number"):
        joint(**inputs, past_key_values=[1])
    with pytest.raises(ValueError, match="input_ids: got a tensor on meta, wanted one on"):
        joint(**{**inputs, "input_ids": inputs["input_ids"].to("meta")})
    assert joint.graphs.memory == []


def test_a_compiled_joint_model_launches_its_graph_between_two_others(swift, super_, where):
    torch._dynamo.reset()
    joint, inputs = joint_of(swift, super_, where, INF), inputs_of((9, 3, 5), where)
    compiled = torch.compile(joint, backend="eager")
    assert torch.equal(compiled(**inputs).logits, joint(**inputs).logits)
    assert len(joint.graphs.memory) == 1
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="launches a graph of its own"):
        torch.compile(joint, backend="eager", fullgraph=True)(**inputs)


def test_a_capture_that_fails_names_the_model_and_leaves_nothing(swift, super_, where):
    joint, inputs = joint_of(swift, super_, where), inputs_of((9, 3, 5), where)
    joint.warmup(**inputs)
    model = joint.super_
    forward = model.forward

    def looks(**inputs: Any) -> Any:
        inputs["input_ids"].sum().item()  # an error in a capture
        if Host.capturing:
            raise RuntimeError("not permitted when stream is capturing")
        return forward(**inputs)

    model.forward = looks
    before = torch.cuda.current_stream() if where == "cuda" else None
    with pytest.raises(
        RuntimeError, match=r"super_: cannot be captured as a CUDA graph, dispatch='exact' can run it: "
    ):
        joint(**inputs_of((9, 3), where))
    assert before is None or torch.cuda.current_stream() == before
    assert joint.graphs.memory == []
    del model.forward
    assert len(joint(**inputs_of((9, 3), where)).logits) == 2


def test_models_that_moved_to_another_device_get_new_graphs(swift, super_, where, on_host):
    joint, inputs = joint_of(swift, super_, where), inputs_of((9, 3, 5), where)
    joint(**inputs)
    first = joint.graphs._runtime
    first.device = torch.device("meta")  # as if they had been there
    joint(**inputs)
    assert joint.graphs._runtime is not first
    assert first.waits == 1


def test_a_joint_model_is_gone_once_nobody_has_it(swift, super_, where):
    joint = joint_of(swift, super_, where)
    if where == "cuda":  # the stand-in keeps what it ran
        joint(**inputs_of((9, 3), where))
    gone = weakref.ref(joint)
    gc.disable()
    try:
        del joint
        assert gone() is None
    finally:
        gc.enable()


def test_an_empty_input_beside_full_rows_keeps_nobody_from_super(swift, where):
    def super_(input_ids: Tensor, extra: Tensor) -> Tensor:
        return torch.full((len(input_ids), tiny_models.CLASSES), 7.0, device=where)

    def swift_of(input_ids: Tensor, extra: Tensor) -> Tensor:
        return input_ids[:, : tiny_models.CLASSES].float()

    joint = joint_of(swift_of, super_, where, INF, label_map={i: i for i in range(tiny_models.CLASSES)})
    ids = inputs_of((9, 3), where)["input_ids"]
    assert (joint(input_ids=ids, extra=torch.zeros(0, device=where)).logits == 7.0).all()


def test_no_rows_need_no_graph(swift, super_, where):
    joint = joint_of(
        lambda **i: i["input_ids"].float()[:, :3], super_, where, label_map={i: f"LABEL_{i}" for i in range(3)}
    )
    assert joint(input_ids=torch.zeros(0, 5, dtype=torch.int64, device=where)).logits.shape == (0, 3)
    assert joint.graphs.memory == []


def test_a_copy_builds_graphs_of_its_own(swift, super_, where):
    joint, inputs = joint_of(swift, super_, where, INF), inputs_of((9, 3, 5), where)
    want = joint(**inputs).logits
    twin = copy.deepcopy(joint)
    assert twin.graphs.memory == []
    with torch.no_grad():
        twin.super_.classifier.weight.zero_()
        twin.super_.classifier.bias.zero_()
    assert not twin(**inputs).logits.any()
    assert torch.equal(joint(**inputs).logits, want)


def test_the_buckets_of_a_batch():
    assert sizes_of(1, (1, 2, 4)) == [1]
    assert sizes_of(4, (1, 2, 4)) == [1, 2, 4]
    assert sizes_of(7, (1, 2, 4)) == [1, 2, 4, 7]


BAD = {
    "on_super_error": (dict(on_super_error="swift"), "on_super_error, super_timeout: got one with dispatch='graph'"),
    "timeout": (dict(super_timeout=1.0), "on_super_error, super_timeout: got one with dispatch='graph'"),
    "capacity": (dict(capacity=3), "capacity: got 3 with dispatch='graph'"),
    "graph_memory": (dict(graph_memory=0), "graph_memory: got 0 with dispatch='graph', wanted bytes"),
    "many buckets": (dict(buckets=tuple(range(1, 65))), "buckets: got 64, wanted fewer than 64 with 'graph'"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_fit_nothing_are_refused(swift, super_, where, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        joint_of(swift, super_, where, **options)


def test_settings_of_graphs_go_with_graphs(swift, super_):
    with pytest.raises(ValueError, match="graph_memory: got 5 with dispatch='exact'"):
        JointClassifier(swift, super_, Router(threshold=0.0), graph_memory=5)
    with pytest.raises(ValueError, match="dispatch: got 'exact', wanted 'graph'"):
        JointClassifier(swift, super_, Router(threshold=0.0)).warmup(input_ids=torch.zeros(1, 1))


def test_super_on_another_device_is_refused(swift, super_, where):
    joint = joint_of(swift, super_, where, super_device="meta")
    with pytest.raises(RuntimeError, match=r"super_device: got meta, wanted Swift's .*dispatch='exact' can have two"):
        joint(**inputs_of((3, 4), where))


def test_saved_settings_come_back_or_give_way_to_another_mode(swift, super_, where, tmp_path):
    joint_of(swift, super_, where, buckets=(2, 8), graph_memory=1 << 20).save_pretrained(tmp_path)
    back = JointClassifier.from_pretrained(tmp_path)
    assert (back.dispatch, back.plan.buckets, back.graph_memory) == ("graph", (2, 8), 1 << 20)
    assert JointClassifier.from_pretrained(tmp_path, dispatch="exact").dispatch == "exact"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_error_says_why_and_what_can(swift, super_):
    with pytest.raises(
        RuntimeError, match=r"dispatch: 'graph' cannot run here: .* no CUDA device; dispatch='exact' can"
    ):
        JointClassifier(swift, super_, Router(threshold=0.0), dispatch="graph")
    with pytest.raises(RuntimeError, match="'graph' cannot run on cpu, wanted a CUDA device; dispatch='exact' can"):
        cuda_graph.Cuda(torch.device("cpu"))


def test_building_says_so(swift, super_, where, caplog):
    with caplog.at_level(logging.INFO, logger="elang.cuda_graph"):
        joint_of(swift, super_, where).warmup(**inputs_of((3, 4, 5), where))
    assert "CUDA graph for attention_mask [3, " in caplog.text
    assert "3 buckets" in caplog.text
