"""What only a GPU can show: graphs, streams, devices, and that nothing waits."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_partition

import elang
from elang import host_read, ops, reference
from elang.reference import Route
from elang.super_model import SuperModel

pytestmark = [pytest.mark.gpu, pytest.mark.compiled]


def head(n, h=64, c=3, device="cuda", dtype=torch.bfloat16):
    weight = torch.randn(c, h, device=device, dtype=dtype) / h**0.5
    return torch.randn(n, h, device=device, dtype=dtype), weight, torch.randn(c, device=device, dtype=dtype)


def on_cpu(route: Route) -> Route:
    return Route(*(t.cpu() for t in route))


def same(got: Route, wanted: Route) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# Around what one block orders alone, around a finisher's part, and past 65 536.
@pytest.mark.parametrize("n", [1, 31, 256, 4095, 4096, 4097, 65_536, 300_001])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.32, 1.0])
def test_any_number_of_rows(n, share):
    hidden, weight, bias = head(n)
    score = elang.route(hidden, weight, bias, 0.0).score
    threshold = torch.sort(score).values[min(int(share * n), n - 1)].item() if share < 1 else float("inf")
    for _ in range(3):
        got = on_cpu(elang.route(hidden, weight, bias, threshold))
        assert_partition(got, threshold)
        assert_partition(on_cpu(elang.route_logits(got.logits.cuda(), threshold)), threshold)


def test_the_cpu_agrees():
    for n, h, c in [(70, 312, 2), (33, 768, 3), (9, 1024, 150), (5, 33, 7)]:
        args = [t.float() for t in head(n, h, c)]
        got, wanted = elang.route(*args, 1.0), elang.route(*(a.cpu() for a in args), 1.0)
        torch.testing.assert_close(got.logits.cpu(), wanted.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.score.cpu(), wanted.score, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [8, 256, 9000])
def test_a_captured_graph_sees_new_data_and_a_new_threshold(n):
    hidden, weight, bias = head(n)
    threshold = torch.tensor([1.0], device="cuda")
    ids = torch.arange(n, device="cuda")

    def infer():
        route = elang.route(hidden, weight, bias, threshold)
        (rows,) = elang.gather_rows([ids], route.order, route.n_routed, n)
        return route, rows, elang.merge_rows(torch.zeros_like(ids), rows + 1, route.order, route.n_routed)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the very first call is captured too
        captured, rows, merged = infer()
    for seed, value in enumerate((0.8, 1.2, float("inf"), float("-inf"), float("nan"))):
        torch.manual_seed(seed)
        hidden.copy_(torch.randn_like(hidden))
        threshold.fill_(value)
        for _ in range(3):
            graph.replay()
        route, eager_rows, eager_merged = infer()
        assert same(captured, route)
        assert torch.equal(rows, eager_rows)
        assert torch.equal(merged, eager_merged)
        routed = captured.order[: int(captured.n_routed)]
        assert torch.equal(merged.nonzero()[:, 0], routed.sort().values)


def test_two_graphs_and_eager_calls_at_once():
    """Each captured launch has a ticket of its own: replays on other streams do not disturb it."""
    inputs = [head(9000) for _ in range(3)]
    wanted = [elang.route(*args, 1.0) for args in inputs]
    graphs, captured = [], []
    for args in inputs[:2]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            captured.append(elang.route(*args, 1.0))
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    eager = []
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager.append(elang.route(*inputs[2], 1.0))
    torch.cuda.synchronize()
    assert all(same(route, wanted[2]) for route in eager)
    assert same(captured[0], wanted[0])
    assert same(captured[1], wanted[1])


def test_side_streams_at_once():
    args = head(20_000)
    wanted = elang.route(*args, 1.0)
    streams = [torch.cuda.Stream() for _ in range(6)]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(elang.route(*args, 1.0))
    torch.cuda.synchronize()
    assert all(same(got, wanted) for got in results)


def test_work_goes_to_the_current_stream():
    hidden, weight, bias = head(64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # an op on another stream would read the rows before they change
        hidden.mul_(2)
        got = elang.route(hidden, weight, bias, 1.0)
    torch.cuda.synchronize()
    assert same(got, elang.route(hidden, weight, bias, 1.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_second_device():
    hidden, weight, bias = head(5000, device="cuda:1")
    assert torch.cuda.current_device() == 0
    got = elang.route(hidden, weight, bias, 1.0)
    assert torch.cuda.current_device() == 0
    assert got.order.device == hidden.device
    assert_partition(on_cpu(got), 1.0)
    with pytest.raises(ValueError, match="weight: got a tensor on cuda:0, wanted cuda:1"):
        elang.route(hidden, weight.to("cuda:0"), bias, 1.0)


def test_nothing_waits():
    hidden, weight, bias = head(200)
    threshold = torch.tensor([1.0], device="cuda")
    mask = torch.ones(200, 16, dtype=torch.long, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        route = elang.route(hidden, weight, bias, threshold)
        elang.route_logits(route.logits, 1.0)
        (rows,) = elang.gather_rows([hidden], route.order, route.n_routed, 50)
        elang.merge_rows(hidden, rows, route.order, route.n_routed)
        ops.routed_extent(mask, route.order, route.n_routed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("b", "m"), [(2, 8), (30, 40)])
def test_vocab_energy_in_a_graph_sees_new_data_without_a_wait(b, m):
    make = {"device": "cuda", "dtype": torch.bfloat16}
    hidden, weight = torch.randn(b, m, 256, **make), torch.randn(5003, 256, **make) / 16
    mask = torch.ones(b, m, dtype=torch.long, device="cuda")
    elang.vocab_energy(hidden, weight, None, mask)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = elang.vocab_energy(hidden, weight, None, mask)
    for seed in range(3):
        torch.manual_seed(seed)
        hidden.copy_(torch.randn_like(hidden))
        mask.copy_(torch.rand(b, m) < 0.5)
        graph.replay()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = elang.vocab_energy(hidden, weight, None, mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(captured.score, eager.score, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(captured.argmax, eager.argmax)
        wanted = reference.vocab_energy(hidden, weight, None, mask)
        torch.testing.assert_close(eager.score, wanted.score, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_vocab_energy_agrees_with_the_cpu():
    for shape, classes in (((3, 64), 1003), ((5, 20, 64), 300), ((200, 33), 130)):
        hidden, weight = torch.randn(*shape, device="cuda"), torch.randn(classes, shape[-1], device="cuda")
        got, wanted = elang.vocab_energy(hidden, weight), elang.vocab_energy(hidden.cpu(), weight.cpu())
        torch.testing.assert_close(got.score.cpu(), wanted.score, rtol=1e-5, atol=1e-4)


def test_one_launch_per_call():
    hidden, weight, bias = head(300)
    tensors = [torch.ones(300, 16, device="cuda", dtype=torch.long) for _ in range(4)]
    route = elang.route(hidden, weight, bias, 1.0)
    calls = {
        "route": lambda: elang.route(hidden, weight, bias, 1.0),
        "gather": lambda: elang.gather_rows(tensors, route.order, route.n_routed, 60),
        "merge": lambda: elang.merge_rows(hidden, hidden[:60], route.order, route.n_routed),
        "extent": lambda: ops.routed_extent(tensors[0], route.order, route.n_routed),
    }
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize()
        kernels = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == 1, (name, kernels)


def test_reduce_overhead_behind_a_linear():
    linear = torch.nn.Linear(32, 64, device="cuda", dtype=torch.bfloat16)
    _, weight, bias = head(1)

    def f(x):
        return elang.route(linear(x), weight, bias, 1.0)

    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, mode="reduce-overhead")
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(16, 32, device="cuda", dtype=torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            got = Route(*(t.clone() for t in compiled(x)))
            torch.testing.assert_close(got.score, f(x).score, rtol=1e-2, atol=1e-2)
            assert_partition(on_cpu(got), 1.0)


def test_results_repeat_bit_for_bit():
    for n in (256, 20_000):
        args = head(n, 768, 20)
        first = elang.route(*args, 1.0)
        assert all(same(elang.route(*args, 1.0), first) for _ in range(20))


def test_too_many_classes_are_refused():
    with pytest.raises(RuntimeError, match=r"weight: got C = 12001, wanted at most 12000 on CUDA.*route_logits"):
        elang.route(torch.randn(2, 8, device="cuda"), torch.randn(12_001, 8, device="cuda"), None, 1.0)


def test_rows_of_other_layouts_are_gathered():
    keep = torch.rand(50, device="cuda") < 0.5
    order, n_routed = reference.partition(keep)
    wide = torch.randn(50, 6, 8, device="cuda")
    views = [wide, wide[:, :3], wide.transpose(1, 2), wide[:, :, ::2], wide[:, 0, 0], wide.half()[:, :, 1:]]
    wanted = reference.gather_rows(views, order, n_routed, 30)
    for got, want in zip(elang.gather_rows(views, order, n_routed, 30), wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("way", host_read.WAYS)
def test_a_joint_model_answers_as_on_the_cpu(monkeypatch, way):
    import tiny_models

    monkeypatch.setenv("ELANG_HOST_READ", way)
    swift, super_, inputs = (
        tiny_models.classifier("DistilBert"),
        tiny_models.classifier("Bert", seed=1),
        tiny_models.inputs(),
    )
    joint = elang.JointClassifier(swift, super_, elang.Router("energy", threshold=float("-inf")))
    with torch.inference_mode():
        score = joint(**inputs).routing.score
        joint.router.set_threshold(score.median().item())
        wanted = joint(**inputs)
        joint.to("cuda")
        got = joint(**{name: value.cuda() for name, value in inputs.items()})
    torch.testing.assert_close(got.logits.cpu(), wanted.logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(got.routing.order.cpu(), wanted.routing.order)
    assert got.routing.mode == "exact"


def test_a_super_on_a_gpu_gets_the_rows_of_a_swift_on_the_cpu():
    """Behind work that keeps Super's stream busy, so that a copy out of order would be seen."""
    super_ = SuperModel(lambda x, y, flag: (x * 2 + y) if flag else None, torch.device("cuda"))
    for seed in range(20):
        torch.manual_seed(seed)
        x, y = torch.randn(300, 300), torch.randn(300, 300, device="cuda")
        torch.cuda._sleep(10_000_000)
        logits = super_({"x": x, "y": y, "flag": True}, 300, 300, torch.device("cpu")).logits
        assert torch.equal(logits, x * 2 + y.cpu())
