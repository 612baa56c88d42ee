"""The joint model against its parts: dispatch efficiency, the naive cascade, eta and its ceiling. Bars: report.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from elang import JointClassifier, Router
from elang.dispatch import BUCKETS, bucket_of
from elang.evaluation.flops import row_flops
from elang.evaluation.timing import (
    NaiveCascade,
    PerSampleLoop,
    alternate,
    dispatch_efficiency,
    eta,
    routed_inputs,
)

LENGTH = 128
SHARE_ROUTED = 0.32  # the average of the paper's BERT table
ROWS = 32  # at least; one batch at the largest batch size
ROWS_OF_MODES = 8
ROUNDS = 5
ROUNDS_OF_MODES = 11  # each cell has a bar
ROUNDS_WITH_SUPER = 2  # of Super on everything, which takes most of the time
ROUNDS_OF_SWIFT = 100  # where nothing is routed, which takes little
CAPACITY = 0.5

# Without guards on the modules, as services compile models that nobody changes under them: guards take longer than the
# rest of dispatch.
UNGUARDED = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
COMPILED: dict[str, Callable[[Any], Any]] = {
    "eager": lambda model: model,
    "compiled": partial(torch.compile, dynamic=True),
    "compiled, modules unguarded": partial(torch.compile, dynamic=True, options=UNGUARDED),
}

Batch = dict[str, Tensor]
Model = Callable[..., Any]


def bert(**sizes) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=2, **sizes)).eval()


@pytest.fixture(scope="module")
def pair():
    """The shapes of the paper's pair, TinyBERT-4L-312 and BERT-base, with random weights."""
    tiny = dict(hidden_size=312, num_hidden_layers=4, num_attention_heads=12, intermediate_size=1200)
    return bert(**tiny), bert()


def rows(lengths: str, count: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    size = torch.full((count,), LENGTH)
    if lengths == "ragged":
        size = torch.randint(8, LENGTH + 1, (count,), generator=generator)
    mask = (torch.arange(LENGTH) < size[:, None]).long()
    ids = torch.randint(1000, 30000, (count, LENGTH), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def batches(inputs: Batch, batch: int) -> list[Batch]:
    """As a tokenizer pads them: each batch to its longest row."""
    split = zip(*(value.split(batch) for value in inputs.values()), strict=True)
    out = []
    for ids, mask in split:
        length = int(mask.sum(dim=1).max())
        out.append({"input_ids": ids[:, :length].contiguous(), "attention_mask": mask[:, :length].contiguous()})
    return out


def threshold_for(joint: JointClassifier, split: list[Batch], share_routed: float) -> None:
    """Route this share of the rows; half way between two of their scores, as compiled they come out a little other."""
    joint.router.set_threshold(float("-inf"))
    score = torch.cat([joint(**b).routing.score for b in split]).sort().values
    count = round(share_routed * len(score))
    edges = torch.cat([torch.tensor([float("-inf")]), score, torch.tensor([float("inf")])])
    joint.router.set_threshold(edges[count : count + 2].mean().item())


def measured(
    joints: dict[str, Model],
    swift: Model,
    super_: Model,
    others: dict[str, Model],
    split: list[Batch],
    rounds: int,
    aside: Collection[str] = (),
) -> dict[str, Any]:
    """Seconds over all batches of each model, of Super on everything ("super"), just the routed rows ("super_routed")
    and these with the padding of a bucket ("super_bucket"); p50 and p99 of a joint model's calls; which were routed.
    """
    total: dict[str, float] = {}
    calls: dict[str, list[float]] = {name: [] for name in joints}
    routed_rows = []
    for b in split:
        routing = next(iter(joints.values()))(**b).routing
        routed = routing.order[: int(routing.n_routed)]
        runs = {name: partial(model, **b) for name, model in {**joints, **others, "swift": swift}.items()}
        size = bucket_of(len(routed), len(routing.order), BUCKETS)
        if len(routed):
            runs["super_routed"] = partial(super_, **routed_inputs(b, routed))
        if size > len(routed):
            padded = torch.cat([routed, routed[-1:].expand(size - len(routed))])
            runs["super_bucket"] = partial(super_, **routed_inputs(b, padded))
        # What has no bar, or runs Super whatever is routed, has a turn of its own: it leaves the others a cold cache.
        apart = [name for name in runs if name in aside]
        whole = {"super": partial(super_, **b), **{name: runs.pop(name) for name in apart}}
        seconds = {**alternate(runs, rounds), **alternate(whole, ROUNDS_WITH_SUPER)}
        if size == len(routed) > 0:
            seconds["super_bucket"] = seconds["super_routed"]
        for name, each in seconds.items():
            total[name] = total.get(name, 0.0) + median(each)
        for name in joints:
            calls[name] += seconds[name]
        routed_rows.append(torch.isin(torch.arange(len(routing.order)), routed))
    latency = {name: {f"p{q}": float(np.percentile(each, q)) for q in (50, 99)} for name, each in calls.items()}
    return {
        "seconds": {"super_routed": 0.0, "super_bucket": 0.0, **total},
        "latency": latency,
        "routed": torch.cat(routed_rows),
    }


def ratios(pair: tuple[Any, Any], own_length: Tensor, seconds: dict[str, float], routed: Tensor, joint: str) -> dict:
    """Of one joint model; by the definitions of `elang.evaluation.timing`."""
    swift_flops, super_flops = (row_flops(model, own_length) for model in pair)
    flops = float(super_flops.sum()), float(swift_flops.sum() + super_flops[routed.numpy()].sum())
    ideal = seconds["swift"] + seconds["super_routed"]
    return {
        "dispatch_efficiency": dispatch_efficiency(seconds["swift"], seconds["super_routed"], seconds[joint]),
        "efficiency_past_padding": dispatch_efficiency(seconds["swift"], seconds["super_bucket"], seconds[joint]),
        "speedup_naive": seconds["naive"] / seconds[joint],
        "speedup_super": seconds["super"] / seconds[joint],
        "speedup_flops": flops[0] / flops[1],
        "eta": eta(seconds["super"], seconds[joint], *flops),
        "eta_ceiling": eta(seconds["super"], ideal, *flops),
    }


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("lengths", ["fixed", "ragged"])
@torch.inference_mode()
def test_joint(benchmark, record, pair, lengths, batch):
    inputs = rows(lengths, max(ROWS, batch))
    split = batches(inputs, batch)
    joint = JointClassifier(*pair, Router("energy", threshold=0.0))
    threshold_for(joint, split, SHARE_ROUTED)
    found = measured({"joint": joint}, *pair, {"naive": NaiveCascade(*pair, joint.router)}, split, ROUNDS)
    own_length, routed = inputs["attention_mask"].sum(dim=1), found["routed"]
    cell = {"batch": batch, "lengths": lengths, "rows": len(own_length), "share_routed": routed.float().mean().item()}
    record(
        "joint", {**cell, "seconds": found["seconds"], **ratios(pair, own_length, found["seconds"], routed, "joint")}
    )
    benchmark.pedantic(joint, kwargs=split[0], rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("batch", [1, ROWS_OF_MODES])
@pytest.mark.parametrize("run", ["eager", "compiled"])
@torch.inference_mode()
def test_modes(benchmark, record, pair, run, batch):
    """Each mode at every share routed, on ragged rows, against the parts in the same compile mode."""
    torch._dynamo.reset()
    as_run = COMPILED[run]
    inputs = rows("ragged", ROWS_OF_MODES)
    split, own_length = batches(inputs, batch), inputs["attention_mask"].sum(dim=1)
    router = Router("energy", threshold=0.0)
    options = {"exact": {}, "bucket": {}, "capacity": {"capacity": CAPACITY}}
    plain = {mode: JointClassifier(*pair, router, mode, **of_mode) for mode, of_mode in options.items()}
    joints = {mode: as_run(joint) for mode, joint in plain.items()}
    swift, super_ = map(as_run, pair)
    others = {"naive": NaiveCascade(swift, super_, router)}
    if run == "eager":
        others["per_sample"] = PerSampleLoop(swift, super_, router)
    for share in (0.0, 0.1, 0.32, 0.5, 1.0):
        threshold_for(plain["exact"], split, share)
        padding = {mode: padding_of(joint, split) for mode, joint in plain.items()}
        found = measured(joints, swift, super_, others, split, ROUNDS_OF_MODES, ("capacity", *others))
        seconds, routed = found["seconds"], found["routed"]
        for mode in joints:
            cell = {"run": run, "batch": batch, "rows": len(own_length), "mode": mode}
            cell |= {"share_routed": routed.float().mean().item(), "seconds": {**seconds, "joint": seconds[mode]}}
            if "per_sample" in seconds:
                cell["speedup_per_sample"] = seconds["per_sample"] / seconds[mode]
            cell |= {"latency": found["latency"][mode], "padding": padding[mode]}
            record("modes", {**cell, **ratios(pair, own_length, seconds, routed, mode)})
    benchmark.pedantic(joints["exact"], kwargs=split[0], rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("batch", [1, ROWS_OF_MODES])
@pytest.mark.parametrize("run", COMPILED)
@torch.inference_mode()
def test_nothing_routed(benchmark, record, pair, run, batch):
    """Against Swift alone, which is all that is left to do: what is more is dispatch."""
    torch._dynamo.reset()
    as_run = COMPILED[run]
    split = batches(rows("ragged", ROWS_OF_MODES), batch)
    router = Router("energy", threshold=0.0)
    joints = {mode: as_run(JointClassifier(*pair, router, mode)) for mode in ("exact", "bucket")}
    swift, total = as_run(pair[0]), {}
    for threshold in (float("inf"), float("-inf")):  # what compiles for some rows routed does so now
        router.set_threshold(threshold)
        for model, b in itertools.product((*joints.values(), swift), split):
            model(**b)
    for b in split:
        runs = {name: partial(model, **b) for name, model in {"swift": swift, **joints}.items()}
        for name, each in alternate(runs, ROUNDS_OF_SWIFT).items():
            total[name] = total.get(name, 0.0) + median(each)
    record("nothing_routed", {"run": run, "batch": batch, "rows": ROWS_OF_MODES, "seconds": total})
    benchmark.pedantic(joints["exact"], kwargs=split[0], rounds=3, warmup_rounds=1)


def padding_of(joint: JointClassifier, split: list[Batch]) -> int:
    """Rows that Super sees beyond the routed ones it answers."""
    before = joint.stats
    for b in split:
        joint(**b)
    after = joint.stats
    seen = sum(size * (count - before.buckets.get(size, 0)) for size, count in after.buckets.items())
    return seen - (after.routed - after.overflow) + (before.routed - before.overflow)
