"""The joint model against its parts: dispatch efficiency, the naive cascade, eta and its ceiling. Bars: report.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from elang import JointClassifier, Router
from elang.evaluation.flops import row_flops
from elang.evaluation.timing import NaiveCascade, alternate, dispatch_efficiency, eta, medians, routed_inputs

LENGTH = 128
SHARE_ROUTED = 0.32  # the average of the paper's BERT table
ROWS = 32  # at least; one batch at the largest batch size
ROUNDS = 5
ROUNDS_WITH_SUPER = 2  # of these, with Super on everything, which takes most of the time


def bert(**sizes) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=2, **sizes)).eval()


@pytest.fixture(scope="module")
def pair():
    """The shapes of the paper's pair, TinyBERT-4L-312 and BERT-base, with random weights."""
    tiny = dict(hidden_size=312, num_hidden_layers=4, num_attention_heads=12, intermediate_size=1200)
    return bert(**tiny), bert()


def rows(lengths: str, count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = torch.full((count,), LENGTH)
    if lengths == "ragged":
        size = torch.randint(8, LENGTH + 1, (count,), generator=generator)
    mask = (torch.arange(LENGTH) < size[:, None]).long()
    ids = torch.randint(1000, 30000, (count, LENGTH), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def batches(inputs: dict[str, torch.Tensor], batch: int) -> list[dict[str, torch.Tensor]]:
    """As a tokenizer pads them: each batch to its longest row."""
    split = zip(*(value.split(batch) for value in inputs.values()), strict=True)
    out = []
    for ids, mask in split:
        length = int(mask.sum(dim=1).max())
        out.append({"input_ids": ids[:, :length].contiguous(), "attention_mask": mask[:, :length].contiguous()})
    return out


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("lengths", ["fixed", "ragged"])
@torch.inference_mode()
def test_joint(benchmark, record, pair, lengths, batch):
    swift, super_ = pair
    inputs = rows(lengths, max(ROWS, batch))
    router = Router("energy", threshold=float("-inf"))
    joint = JointClassifier(swift, super_, router)
    score = torch.cat([joint(**b).routing.score for b in batches(inputs, batch)])
    router.set_threshold(score.quantile(SHARE_ROUTED).item())
    naive = NaiveCascade(swift, super_, router)

    total = dict.fromkeys(("joint", "naive", "swift", "super", "super_routed"), 0.0)
    routed_rows = []
    for b in batches(inputs, batch):
        routing = joint(**b).routing
        routed = routing.order[: int(routing.n_routed)]
        runs = {name: partial(model, **b) for name, model in (("joint", joint), ("naive", naive), ("swift", swift))}
        if len(routed):
            runs["super_routed"] = partial(super_, **routed_inputs(b, routed))
        measured = alternate({**runs, "super": partial(super_, **b)}, ROUNDS_WITH_SUPER)
        for name, seconds in alternate(runs, ROUNDS - ROUNDS_WITH_SUPER, warm_up=0).items():
            measured[name] += seconds
        for name, seconds in medians(measured).items():
            total[name] += seconds
        routed_rows.append(torch.isin(torch.arange(len(routing.order)), routed))

    own_length = inputs["attention_mask"].sum(dim=1)
    swift_flops, super_flops = row_flops(swift, own_length), row_flops(super_, own_length)
    joint_flops = swift_flops.sum() + super_flops[torch.cat(routed_rows).numpy()].sum()
    ideal_seconds = total["swift"] + total["super_routed"]
    record(
        "joint",
        {
            "batch": batch,
            "lengths": lengths,
            "rows": len(own_length),
            "share_routed": torch.cat(routed_rows).float().mean().item(),
            "seconds": total,
            "dispatch_efficiency": dispatch_efficiency(total["swift"], total["super_routed"], total["joint"]),
            "speedup_naive": total["naive"] / total["joint"],
            "speedup_super": total["super"] / total["joint"],
            "speedup_flops": float(super_flops.sum() / joint_flops),
            "eta": eta(total["super"], total["joint"], float(super_flops.sum()), float(joint_flops)),
            "eta_ceiling": eta(total["super"], ideal_seconds, float(super_flops.sum()), float(joint_flops)),
        },
    )
    first = batches(inputs, batch)[0]
    benchmark.pedantic(joint, kwargs=first, rounds=3, warmup_rounds=1)
