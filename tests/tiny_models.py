"""Tiny random models and inputs, shared by the tests of the models' side."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from elang.joint import JointClassifier
from elang.router import Router

VOCAB, PAD, LENGTH, CLASSES = 64, 0, 9, 3

_COMMON = {"vocab_size": VOCAB, "pad_token_id": PAD, "num_labels": CLASSES}
_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, **_COMMON}
_CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": _BERT,
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, **_COMMON},
    "Roberta": _BERT,
    "XLMRoberta": _BERT,
    "Electra": {**_BERT, "embedding_size": 12},
    "Albert": {**_BERT, "embedding_size": 12},
    "DebertaV2": {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    "XLNet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, **_COMMON},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **_COMMON},
}
FAMILIES = tuple(_CONFIGS)


def classifier(family: str = "Bert", seed: int = 0, **overrides: Any) -> Any:
    """A tiny `*ForSequenceClassification` in eval mode, its weights spread wide enough for rows to differ."""
    config = getattr(transformers, f"{family}Config")(**{**_CONFIGS[family], **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(lengths: tuple[int, ...] = (9, 3, 5, 1, 7, 2), seed: int = 0, left: bool = False) -> dict[str, Tensor]:
    """Right-padded (or left-padded) rows of these lengths: `input_ids` and `attention_mask`, [N, LENGTH] int64."""
    ids = torch.randint(1, VOCAB, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": torch.where(mask.bool(), ids, PAD), "attention_mask": mask}


@torch.no_grad()
def float64_logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return copy.deepcopy(model).double()(**inputs).logits


def half_way(swift: Any, super_: Any, inputs: dict[str, Tensor], **options: Any) -> JointClassifier:
    """A joint model whose threshold, between two scores, keeps half of these six rows."""
    joint = JointClassifier(swift, super_, Router(threshold=-float("inf")), **options)
    joint.router.set_threshold(joint(**inputs).routing.score.sort().values[2:4].mean().item())
    return joint


@torch.no_grad()
def super_alone(super_: Any, inputs: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Super's logits on these rows, cut to the longest of them."""
    length = int(inputs["attention_mask"][rows].sum(dim=1).max())
    return super_(**{name: value[rows, :length] for name, value in inputs.items()}).logits
