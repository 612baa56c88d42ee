from __future__ import annotations

import pytest
import torch

from elang import ops
from elang.evaluation import route_bench
from elang.evaluation.route_bench import CALLS, RouteBench, bench_route

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_op_against_its_chain_by_hand(monkeypatch, tmp_path):
    seen, progress, now = [], [], [0.0]

    def of(name, seconds):
        def op(hidden, weight, bias, threshold):
            seen.append((name, tuple(hidden.shape), tuple(weight.shape)))
            now[0] += seconds

        return op

    monkeypatch.setattr(route_bench, "_OPS", {"eager": of("eager", 3.0), "route": of("route", 0.5)})
    found = bench_route(
        heads=[(4, 2), (6, 3)],
        rows=[1, 5],
        rounds=3,
        threads=2,
        clock=lambda: now[0],
        report=lambda *each: progress.append(each),
    )
    assert [(p.hidden, p.classes, p.rows) for p in found.points] == [(4, 2, 1), (4, 2, 5), (6, 3, 1), (6, 3, 5)]
    assert {(p.eager_seconds, p.route_seconds, p.speedup) for p in found.points} == {(3.0, 0.5, 6.0)}
    assert seen.count(("route", (5, 6), (3, 6))) == CALLS * 4
    assert (found.rounds, found.threads, found.dtype) == (3, 2, "float32")
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    found.save(tmp_path / "bench.json")
    assert RouteBench.load(tmp_path / "bench.json") == found


def test_op_and_chain_do_the_same_work(monkeypatch):
    given = []

    def chain(*arguments):
        given.append(arguments)
        return route_bench._chain(*arguments)

    monkeypatch.setattr(route_bench, "CALLS", 1)
    monkeypatch.setattr(route_bench, "_OPS", {"eager": chain, "route": ops.route})
    bench_route(heads=[(16, 3)], rows=[9], rounds=1)
    logits, score, routed = route_bench._chain(*given[0])
    route = ops.route(*given[0])
    torch.testing.assert_close(route.logits, logits)
    torch.testing.assert_close(route.score, score)
    assert route.order[: int(route.n_routed)].tolist() == routed.squeeze(1).tolist()
    assert len(routed) == 4


def test_the_op_that_is_timed_is_the_one_that_is_public():
    assert route_bench._OPS["route"] is ops.route
    assert route_bench._OPS["eager"] is route_bench._chain


def test_threads_and_random_numbers_stay_as_they_were():
    before = torch.get_num_threads(), torch.get_rng_state().tolist()
    assert bench_route(heads=[(8, 2)], rows=[2], rounds=1, threads=3).threads == 3
    assert (torch.get_num_threads(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": []}, "heads: got none"),
        ({"heads": [(0, 2)]}, r"heads: got \(0, 2\), wanted \(H, C\) with H >= 1 and C >= 2"),
        ({"heads": [(8, 1)]}, r"heads: got \(8, 1\)"),
        ({"rows": [0]}, "rows: got 0, wanted rows >= 1"),
        ({"rounds": 0}, "rounds: got 0"),
        ({"threads": 0}, "threads: got 0"),
    ],
)
def test_what_is_refused_of_the_op(change, message):
    with pytest.raises(ValueError, match=message):
        bench_route(**{"heads": [(8, 2)], "rows": [1], **change})
