"""The bodies of the CUDA kernels, compiled as C++ and run on the host under sanitizers, against reference.py.

tests/cpp/cuda_on_host.h stands in for the GPU: blocks in random order, threads in random order between the points where
they meet. AddressSanitizer and UndefinedBehaviorSanitizer watch every case; ThreadSanitizer a part of them, and must
report a barrier or a fence that is left out.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import assert_accurate, assert_partition, cuda_home
from torch import Tensor

from elang import reference
from elang.reference import SCORES, Route

SOURCE = Path(__file__).parent / "cpp" / "run_kernels.cpp"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("g++") is None or cuda_home() is None, reason="needs g++ and CUDA's headers"),
]

BUILDS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"],
    "thread": ["-fsanitize=thread", "-O1"],
}


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Callable[[str], Path]:
    """Compiles run_kernels.cpp with one of BUILDS, once."""
    folder, built = tmp_path_factory.mktemp("kernels"), {}

    def build(name: str) -> Path:
        if name not in built:
            built[name] = folder / name
            include = ["-isystem", str(Path(str(cuda_home())) / "include")]
            command = ["g++", "-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *include]
            command += [*BUILDS[name], str(SOURCE), "-o", str(built[name]), "-pthread"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
        return built[name]

    return build


@dataclass
class Case:
    """One launch, and what its results have to satisfy."""

    op: str
    words: list[object]
    tensors: list[Tensor]
    results: list[tuple[tuple[int, ...], torch.dtype]]
    check: Callable[[list[Tensor]], None]
    counted: bool = False  # the number of tensors is an argument

    def line(self) -> str:
        described = [
            [t.untyped_storage().nbytes(), t.storage_offset(), t.element_size(), t.dim(), *t.shape, *t.stride()]
            for t in self.tensors
        ]
        if self.counted:  # the partition comes first
            described = [*described[:2], [len(self.tensors) - 2], *described[2:]]
        return " ".join(str(w) for w in itertools.chain([self.op, *self.words], *described))

    def data(self) -> bytes:
        storages = (torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in self.tensors)
        return b"".join(storage.numpy().tobytes() for storage in storages)


def run(program: Path, cases: list[Case], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the cases and checks their results, unless the program failed."""
    (folder / "cases").write_text("".join(case.line() + "\n" for case in cases))
    (folder / "data").write_bytes(b"".join(case.data() for case in cases))
    env = {**os.environ, **variables, "ASAN_OPTIONS": "detect_stack_use_after_return=0", "TSAN_OPTIONS": "exitcode=66"}
    command = [program, folder / "cases", folder / "data", folder / "results"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        return done
    raw, at = (folder / "results").read_bytes(), 0
    for case in cases:
        results = []
        for shape, dtype in case.results:
            result = torch.empty(shape, dtype=dtype)
            size = result.numel() * result.element_size()
            if size:
                result = torch.frombuffer(bytearray(raw[at : at + size]), dtype=dtype).reshape(shape)
            results.append(result)
            at += size
        case.check(results)
    assert at == len(raw)
    return done


def route_case(hidden, weight, bias, threshold, score="energy", temperature=1.0, on_device=False, check=None) -> Case:
    """`weight` None: route_logits of `hidden`."""
    n, c = hidden.shape[0], hidden.shape[1] if weight is None else weight.shape[0]
    kind = [FLOATS.index(t.dtype) if t is not None else 0 for t in (hidden, weight, bias)]
    head = [] if weight is None else [weight]

    def accurate(results: list[Tensor]) -> None:
        logits, s, order, n_routed = results if weight is not None else [hidden, *results]
        z = hidden.double() if weight is None else hidden.double() @ weight.double().t()
        z_eager = hidden if weight is None else torch.nn.functional.linear(hidden, weight.to(hidden.dtype))
        if bias is not None:
            z, z_eager = z + bias.double(), z_eager + bias.to(hidden.dtype)
        assert_accurate(logits, z_eager, z)
        eager = reference.score_logits(z_eager, score, temperature)
        assert_accurate(s, eager, reference.score_logits(z, score, temperature))
        assert_partition(Route(logits, s, order, n_routed), threshold)
        if check:
            check(Route(logits, s, order, n_routed))

    return Case(
        "route_logits" if weight is None else "route",
        [SCORES.index(score), temperature, int(on_device), *kind, int(bias is not None)],
        [torch.tensor([threshold]), hidden, *head, *([] if bias is None else [bias])],
        [*([((n, c), hidden.dtype)] if head else []), ((n,), torch.float32), ((n,), torch.int64), ((1,), torch.int32)],
        accurate,
    )


def head(n, h, c, dtype=torch.float32, weight_dtype=None):
    weight = torch.randn(c, h) / max(h, 1) ** 0.5 * 3
    return torch.randn(n, h).to(dtype), weight.to(weight_dtype or dtype), torch.randn(c).to(weight_dtype or dtype)


def strided(t: Tensor) -> Tensor:
    """The same values as rows and columns of a larger buffer full of NaN, at an odd offset."""
    return t.new_full((t.shape[0] * 2, t.shape[1] + 3), NAN)[::2, 1 : 1 + t.shape[1]].copy_(t)


def padded(t: Tensor) -> Tensor:
    """The same values as aligned rows of a larger buffer."""
    return t.new_full((t.shape[0], t.shape[1] + 16), NAN)[:, 16:].copy_(t)


def route_cases() -> list[Case]:
    cases = []
    # Below, at and past every tile of rows, columns and classes; one block, several, and more classes than warps share.
    shapes = [(1, 8, 2), (3, 5, 2), (8, 264, 3), (17, 40, 7), (33, 256, 33), (40, 16, 2), (2, 24, 150), (4, 0, 3)]
    for (n, h, c), dtype in itertools.product(shapes, FLOATS):
        cases.append(route_case(*head(n, h, c, dtype), 1.5))
    # Enough tiles for the large ones, and more classes than one block of them has room for.
    cases += [route_case(*head(70, 40, 5, dtype), 1.0, temperature=1.7) for dtype in FLOATS]
    cases.append(route_case(*head(9, 8, 1700), 7.0))
    cases.append(route_case(*head(2, 8, 3100), 7.0))
    for hidden_dtype, weight_dtype in itertools.product(FLOATS, FLOATS):
        cases.append(route_case(*head(5, 32, 3, hidden_dtype, weight_dtype), 1.0))
    for score in SCORES:
        c = 1 if score == "logit" else 6
        cases.append(route_case(*head(19, 32, c), 0.3, score, 1.7))
        cases.append(route_case(torch.randn(21, c) * 3, None, None, 0.3, score, 1.7, on_device=True))
    cases += [route_case((torch.randn(5, 700) * 4).to(d), None, None, 6.0, s) for d in FLOATS for s in SCORES[:-1]]
    hidden, weight, bias = head(20, 32, 3)
    cases += [route_case(hidden, weight, None, t, on_device=d) for t in (-INF, 0.5, INF) for d in (False, True)]
    for make in (strided, padded, lambda t: t.t().contiguous().t(), lambda t: t[:1].expand_as(t)):
        cases.append(route_case(make(hidden), make(weight), bias, 1.0))
        cases.append(route_case(make(torch.randn(9, 5)), None, None, 1.0))
    # A bad row beside healthy ones, and a threshold that keeps nothing.
    sick = hidden.clone()
    sick[[0, 7, 19]] = torch.tensor([[NAN], [INF], [-INF]])
    cases.append(route_case(sick, weight, bias, -INF, check=lambda r: healthy(r, hidden, weight, bias)))
    masked = torch.randn(7, 5)
    masked[:, [0, 3]] = -INF
    cases += [route_case(masked, None, None, -INF, score) for score in SCORES[:-1]]
    cases.append(nan_threshold())
    cases += same_rows_in_other_tiles()
    return cases


def healthy(route: Route, hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
    rows = [i for i in range(20) if i not in (0, 7, 19)]
    assert route.order[:3].tolist() == [0, 7, 19]
    torch.testing.assert_close(route.logits[rows], torch.nn.functional.linear(hidden, weight, bias)[rows])


def same_rows_in_other_tiles() -> list[Case]:
    """The same five rows in a batch of their own, amid others, and read an element at a time: bit for bit the same."""
    hidden, weight, bias = head(70, 40, 5, torch.bfloat16)
    seen: list[Route] = []

    def compare(route: Route) -> None:
        seen.append(Route(*(t[:5] for t in route[:2]), *route[2:]))
        assert torch.equal(seen[-1].logits, seen[0].logits)
        assert torch.equal(seen[-1].score, seen[0].score)

    batches = [(hidden, weight), (hidden[:5], weight), (strided(hidden), weight), (hidden, strided(weight))]
    return [route_case(h, w, bias, 1.0, check=compare) for h, w in batches]


def nan_threshold() -> Case:
    case = route_case(torch.randn(5, 3), None, None, NAN, on_device=True)
    case.check = lambda results: torch.testing.assert_close(results[2], torch.tensor([5], dtype=torch.int32))
    return case


def many_rows(n: int, share: float) -> Case:
    """More rows than one block orders alone."""
    logits = torch.randn(n, 2)
    threshold = reference.score_logits(logits).quantile(share).item()
    return route_case(logits, None, None, threshold)


def same(wanted: list[Tensor]) -> Callable[[list[Tensor]], None]:
    def check(results: list[Tensor]) -> None:
        for got, want in zip(results, wanted, strict=True):
            assert torch.equal(got, want)

    return check


def gather_case(tensors, keep, capacity) -> Case:
    order, n_routed = reference.partition(keep)
    wanted = reference.gather_rows(tensors, order, n_routed, capacity)
    results = [(tuple(w.shape), w.dtype) for w in wanted]
    return Case("gather", [capacity], [order, n_routed, *tensors], results, same(wanted), counted=True)


def merge_case(kept, routed, keep) -> Case:
    order, n_routed = reference.partition(keep)
    wanted = reference.merge_rows(kept, routed, order, n_routed)
    return Case("merge", [], [order, n_routed, kept, routed], [(tuple(kept.shape), kept.dtype)], same([wanted]))


def extent_case(mask, keep, by_mail) -> Case:
    order, n_routed = reference.partition(keep)
    wanted = reference.routed_extent(mask, order, n_routed)
    words = [int(mask.dtype.is_floating_point), int(by_mail)]
    return Case("extent", words, [order, n_routed, mask], [((2,), torch.int32)], same([wanted]))


def row_cases() -> list[Case]:
    cases = []
    for n, share in [(1, 0.0), (1, 1.0), (7, 0.0), (7, 1.0), (9, 0.5), (300, 0.3)]:
        keep = torch.rand(n) >= share
        routed = int((~keep).sum())
        ids, mask = torch.randint(0, 9999, (n, 7)), torch.rand(n, 7) < 0.5
        embeddings, label = torch.randn(n, 3, 8).to(torch.bfloat16), torch.randn(n)
        tensors = [ids, mask, embeddings, label, torch.randint(0, 9, (n, 5), dtype=torch.int16)]
        for capacity in {0, max(routed - 1, 0), routed, routed + 3}:
            cases.append(gather_case(tensors, keep, capacity))
        logits = torch.randn(n, 3)
        for k in {1, max(routed, 1), routed + 2}:
            answers = torch.full((k, 3), NAN)
            answers[:routed] = torch.randn(min(k, routed), 3)
            cases.append(merge_case(logits, answers, keep))
            cases.append(merge_case(padded(logits), strided(torch.randn(k, 3)), keep))
    keep = torch.rand(40) < 0.5
    cases.append(gather_case([torch.randn(40, 3)] * 18, keep, 11))  # more tensors than one launch takes
    cases.append(gather_case([torch.randn(40, 800), torch.empty(40, 0)], keep, 20))
    cases.append(merge_case(torch.randn(40, 1100), torch.randn(20, 1100), keep))
    for n, m in [(1, 1), (5, 32), (33, 70), (200, 9)]:
        lengths = torch.randint(0, m + 1, (n, 1))
        mask = torch.arange(m) < lengths
        keep = torch.rand(n) < 0.5
        for dtype in (torch.int64, torch.bool, torch.float32, torch.float16, torch.int32):
            cases.append(extent_case(mask.to(dtype), keep, by_mail=dtype is torch.int64))
    for m in (torch.zeros(3, 5), torch.full((3, 5), -0.0), torch.full((3, 5), NAN), torch.randn(5, 6).t()[:3, ::2]):
        cases.append(extent_case(m, torch.zeros(3, dtype=torch.bool), by_mail=True))
    cases.append(extent_case(torch.ones(3, 5), torch.ones(3, dtype=torch.bool), by_mail=True))
    return cases


def thread_cases() -> list[Case]:
    """Every kernel once, with blocks that have to wait for each other."""
    keep = torch.rand(40) < 0.5
    return [
        route_case(*head(70, 40, 5, torch.bfloat16), 1.0),
        route_case(*head(20, 8, 9), 1.0, "energy_probs"),
        many_rows(300, 0.3),
        many_rows(4000, 0.3),  # two rounds of one finisher
        *(many_rows(4500, 0.3) for _ in range(4)),  # several finishers; each launch has another order of blocks
        Case("mail", [], [], [], same([])),
        gather_case([torch.randn(40, 33), torch.randint(0, 9, (40, 5))], keep, 15),
        merge_case(torch.randn(40, 33), torch.randn(20, 33), keep),
        extent_case((torch.rand(200, 40) < 0.1).long(), torch.rand(200) < 0.5, by_mail=True),
        *graph_cases()[1::3],
    ]


def graph_cases() -> list[Case]:
    """A graph with a SWITCH node and one with IF nodes; one bucket, a few, and more than a warp has lanes."""
    sizes = [[1], [1, 2, 4, 7], list(range(2, 66))]
    return [Case("graph", [int(switch), len(s), *s], [], [], same([])) for switch in (True, False) for s in sizes]


def test_graphs_under_address_sanitizer(build, tmp_path):
    done = run(build("address"), graph_cases(), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_route_under_address_sanitizer(build, tmp_path):
    cases = [*route_cases(), *(many_rows(n, share) for n, share in [(4500, 0.0), (4500, 0.3), (9000, 1.0)])]
    done = run(build("address"), cases, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_rows_under_address_sanitizer(build, tmp_path):
    done = run(build("address"), row_cases(), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_races(build, tmp_path):
    done = run(build("thread"), thread_cases(), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("planted", ["barrier", "fence"])
def test_a_planted_race_is_found(build, tmp_path, planted):
    done = run(build("thread"), thread_cases(), tmp_path, PLANT=planted)
    assert done.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


def test_an_order_that_points_outside_stops_the_kernel(build, tmp_path):
    case = gather_case([torch.randn(4, 3)], torch.tensor([True, False, True, False]), 2)
    case.tensors[0] = torch.tensor([4, 3, 0, 2])
    done = run(build("address"), [case], tmp_path)
    assert done.returncode != 0
    assert "order: wanted rows in [0, N)" in done.stderr
