"""The joint model on a GPU against its parts in the same mode, and what it costs to pick a branch on the device.

`ideal` is Swift alone and Super alone on exactly the routed rows: each captured for `graph`, eager for `exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from measure_cuda import on_the_clock, queued
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from elang import JointClassifier, Router, host_read
from elang.cuda_graph import Cuda, sizes_of
from elang.dispatch import BUCKETS
from elang.evaluation.timing import NaiveCascade, routed_inputs

pytestmark = pytest.mark.gpu

LENGTH = 128
CUDA = torch.device("cuda", 0)


def bert(**sizes) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=2, **sizes)).eval().to(CUDA, torch.bfloat16)


@pytest.fixture(scope="module")
def pair():
    """The shapes of the paper's pair, TinyBERT-4L-312 and BERT-base, with random weights."""
    tiny = dict(hidden_size=312, num_hidden_layers=4, num_attention_heads=12, intermediate_size=1200)
    return bert(**tiny), bert()


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def branching(nodes: str, n_routed: int, rows: int) -> Callable[[], None]:
    """A launch of a graph of which every part is one small kernel, with this many rows routed."""
    cuda, sizes = Cuda(CUDA, nodes), sizes_of(rows, BUCKETS)
    given, count, answer = (torch.full((1,), n_routed, dtype=torch.int32, device=CUDA) for _ in range(3))
    counts, batches = (torch.zeros(n, dtype=torch.int64, device=CUDA) for n in (4, len(sizes)))
    own, out = torch.empty_like(given), torch.empty_like(given)
    decide, *_ = cuda.capture(lambda: count.copy_(own))
    bodies = {size: cuda.capture(lambda: answer.add_(1))[0] for size in sizes}
    merge, *_ = cuda.capture(lambda: out.copy_(answer))
    graph = cuda.compose(decide, bodies, merge, count, counts, batches, [own], [out])
    held = (decide, bodies, merge, count, answer, counts, batches, own, out)

    def launch(_: tuple[Any, ...] = held) -> None:
        cuda.launch(graph, [given], [torch.empty_like(out)])

    return launch


@pytest.mark.parametrize("rows", [1, 64, 4096])
@torch.inference_mode()
def test_branch(benchmark, record, rows):
    """One branch among the buckets of so many rows, beside a read of the count on the host: on the host's clock from an
    idle device to the end, and for what the device does alone its own time.

    `without` is the same small kernels without a branch: what a branch costs is past it.
    """
    given, own, out = (torch.ones(1, dtype=torch.int32, device=CUDA) for _ in range(3))
    order, n_routed = torch.arange(rows, device=CUDA), torch.ones(1, dtype=torch.int32, device=CUDA)
    mask = torch.ones(rows, LENGTH, dtype=torch.int64, device=CUDA)
    variants = {
        "without": captured(lambda: [a.copy_(b) for a, b in ((own, given), (n_routed, own), (out, own), (given, out))])
    }
    for nodes in ("switch", "if"):
        variants |= {f"{nodes}, {n or 'none'} routed": branching(nodes, n, rows) for n in (0, 1)}
    device_time = {name: queued(run) for name, run in variants.items()}
    variants |= {"mailbox": partial(host_read.routed_extent, order, n_routed, mask), "item": n_routed.item}
    record("branch", {"rows": rows, "microseconds": on_the_clock(variants), "queued": device_time})
    benchmark.pedantic(variants["switch, 1 routed"], rounds=20, warmup_rounds=3)


def inputs_of(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = torch.randint(8, LENGTH + 1, (rows,), generator=generator)
    mask = (torch.arange(LENGTH) < size[:, None]).long()
    ids = torch.randint(1000, 30000, (rows, LENGTH), generator=generator) * mask
    return {"input_ids": ids.to(CUDA), "attention_mask": mask.to(CUDA)}


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@torch.inference_mode()
def test_joint_cuda(benchmark, record, pair, batch):
    swift, super_ = pair
    inputs, router = inputs_of(batch), Router("energy", threshold=float("-inf"))
    joints = {mode: JointClassifier(*pair, router, mode) for mode in ("exact", "bucket", "graph")}
    score = joints["exact"](**inputs).routing.score.sort().values
    edges = torch.cat([score.new_tensor([float("-inf")]), score, score.new_tensor([float("inf")])])
    swift_graph = captured(partial(swift, **inputs))
    none, nothing = branching("switch", 0, batch), torch.ones(1, dtype=torch.int32, device=CUDA)
    plain = captured(lambda: [nothing.copy_(nothing) for _ in range(4)])
    empty = queued(none)["p50"] - queued(plain)["p50"]
    for share in (0.0, 0.1, 0.32, 0.5, 1.0):
        count = round(share * batch)
        router.set_threshold(edges[count : count + 2].mean().item())
        routing = joints["exact"](**inputs).routing
        routed = routing.order[: int(routing.n_routed)]
        variants: dict[str, Callable[[], Any]] = {name: partial(joint, **inputs) for name, joint in joints.items()}
        variants |= {"naive": partial(NaiveCascade(*pair, router), **inputs), "super": partial(super_, **inputs)}
        ideal: dict[str, Callable[[], Any]] = {"graph": swift_graph, "exact": partial(swift, **inputs)}
        if len(routed):
            whole = {name: value[routed].contiguous() for name, value in inputs.items()}
            super_graph, trimmed = captured(partial(super_, **whole)), routed_inputs(inputs, routed)
            ideal = {
                "graph": lambda super_graph=super_graph: (swift_graph(), super_graph()),
                "exact": lambda trimmed=trimmed: (swift(**inputs), super_(**trimmed)),
            }
        cell = {"batch": batch, "share_routed": len(routed) / batch}
        found = on_the_clock({**variants, **{f"ideal {name}": run for name, run in ideal.items()}}, rounds=100)
        cell["microseconds"] = {name: found[name] for name in variants}
        cell["ideal"] = {name: found[f"ideal {name}"] for name in ideal}
        record("joint_cuda", {**cell, "branch_microseconds": empty})
    benchmark.pedantic(partial(joints["graph"], **inputs), rounds=10, warmup_rounds=2)
