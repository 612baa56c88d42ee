"""The joint encoder-decoder against its parts, either model on everything and the naive cascade. Bar: report.py.

The ideal is Swift's encoder on the whole batch, its decoding of the kept rows from those states, and Super on exactly
the routed rows, neither with columns that are padding in all of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from bench_joint import batches
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from elang import EnergyHead, JointSeq2Seq, Router
from elang.evaluation.timing import alternate, dispatch_efficiency, routed_inputs
from elang.reference import Route, score_logits

LENGTHS = (8, 64)  # least and most tokens of a source
NEW_TOKENS = 16
ROWS = 16  # one batch at the largest batch size
ROUNDS = {1: 2, ROWS: 5}  # the sums of batch 1 are over many calls
SHARES = (0.0, 0.1, 0.32, 0.5)  # routed; 0.32 is the average of the paper's BERT table

# Greedy, and as many tokens for each row: the weights are random, and so would be where a row ends.
OPTIONS = {"do_sample": False, "num_beams": 1, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}

Batch = dict[str, Tensor]
Run = Callable[[], Any]


def t5(**sizes: int) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)).eval()


@pytest.fixture(scope="module")
def pair():
    """The shapes of T5-small and T5-base, with random weights."""
    small = dict(d_model=512, d_ff=2048, num_layers=6, num_heads=8)
    base = dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    return t5(**small), t5(**base)


def sources() -> Batch:
    generator = torch.Generator().manual_seed(1)
    least, most = LENGTHS
    size = torch.randint(least, most + 1, (ROWS,), generator=generator)
    mask = (torch.arange(most) < size[:, None]).long()
    return {"input_ids": torch.randint(3, 32000, (ROWS, most), generator=generator) * mask, "attention_mask": mask}


def joints_of(pair: tuple[Any, Any], split: list[Batch]) -> dict[float, JointSeq2Seq]:
    """One for each share routed, its threshold half way between two of the rows' scores."""
    torch.manual_seed(0)
    head = EnergyHead(pair[0].config.d_model, 2)
    joints = {share: JointSeq2Seq(*pair, head, Router("energy", threshold=0.0)) for share in SHARES}
    score = torch.cat([decided(joints[0.0], b).score for b in split]).sort().values
    edges = torch.cat([torch.tensor([float("-inf")]), score, torch.tensor([float("inf")])])
    for share, joint in joints.items():
        count = round(share * len(score))
        joint.router.set_threshold(edges[count : count + 2].mean().item())
    return joints


def decided(joint: JointSeq2Seq, batch: Batch) -> Route:
    return joint.head.decide(
        joint.swift.get_encoder()(**batch).last_hidden_state, batch["attention_mask"], joint.router
    )


def swift_part(swift: Any, batch: Batch, kept: Tensor) -> Tensor | None:
    """What Swift has to do: its encoder on all rows, its decoder on the kept ones."""
    states = swift.get_encoder()(**batch).last_hidden_state
    if not len(kept):
        return None
    chosen = routed_inputs({"states": states, "attention_mask": batch["attention_mask"]}, kept)
    encoded = BaseModelOutput(last_hidden_state=chosen["states"])
    return swift.generate(encoder_outputs=encoded, attention_mask=chosen["attention_mask"], **OPTIONS)


def naive_cascade(joint: JointSeq2Seq, batch: Batch) -> Tensor:
    """As people write it by hand: Swift decodes every row, Super the rows that a mask selects. Nothing is trimmed."""
    mask = batch["attention_mask"]
    encoded = joint.swift.get_encoder()(**batch)
    pooled = (encoded.last_hidden_state * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    score = score_logits(joint.head.output(pooled), joint.router.score)
    sequences = joint.swift.generate(encoder_outputs=encoded, attention_mask=mask, **OPTIONS)
    rows = (~(score >= joint.router.threshold)).nonzero().squeeze(1)
    if len(rows):
        sequences[rows] = joint.super_.generate(**{name: v[rows] for name, v in batch.items()}, **OPTIONS)
    return sequences


def runs_of(joint: JointSeq2Seq, batch: Batch, n_routed: int, order: Tensor) -> dict[str, Run]:
    routed, kept = order[:n_routed], order[n_routed:]
    runs: dict[str, Run] = {
        "joint": partial(joint.generate, **batch, **OPTIONS),
        "swift_part": partial(swift_part, joint.swift, batch, kept),
        "naive": partial(naive_cascade, joint, batch),
    }
    if n_routed:
        runs["super_part"] = partial(joint.super_.generate, **routed_inputs(batch, routed), **OPTIONS)
    return runs


@pytest.mark.parametrize("batch", ROUNDS)
@torch.inference_mode()
def test_seq2seq(benchmark, record, pair, batch):
    split = batches(sources(), batch)
    joints = joints_of(pair, split)
    for joint in joints.values():
        joint.generate(**split[0], **OPTIONS)  # the only warm-up: a round takes long
    total = {share: dict.fromkeys(("joint", "swift_part", "super_part", "naive"), 0.0) for share in SHARES}
    alone, routed = {"swift": 0.0, "super": 0.0}, dict.fromkeys(SHARES, 0)
    for b in split:
        n_routed, runs = {}, {}
        for share, joint in joints.items():
            route = decided(joint, b)
            n_routed[share] = int(route.n_routed)
            # Shares that route equally many rows of a batch route the same ones, and are measured once.
            of_share = runs_of(joint, b, n_routed[share], route.order)
            runs |= {(name, n_routed[share]): run for name, run in of_share.items()}
        runs |= {name: partial(model.generate, **b, **OPTIONS) for name, model in zip(alone, pair, strict=True)}
        seconds = {name: median(each) for name, each in alternate(runs, ROUNDS[batch], warm_up=0).items()}
        alone = {name: value + seconds[name] for name, value in alone.items()}
        for share, count in n_routed.items():
            routed[share] += count
            total[share] = {name: value + seconds.get((name, count), 0.0) for name, value in total[share].items()}
    for share, parts in total.items():
        cell = {"batch": batch, "rows": ROWS, "new_tokens": NEW_TOKENS, "share_routed": routed[share] / ROWS}
        cell |= {"seconds": {**parts, **alone}}
        cell |= {
            "dispatch_efficiency": dispatch_efficiency(parts["swift_part"], parts["super_part"], parts["joint"]),
            "speedup_naive": parts["naive"] / parts["joint"],
            "speedup_super": alone["super"] / parts["joint"],
        }
        record("seq2seq", cell)
    benchmark.pedantic(joints[SHARES[-1]].generate, kwargs={**split[0], **OPTIONS}, rounds=1)
