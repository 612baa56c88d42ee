"""FLOPs of a model's forward, each row counted at its own length."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


def row_flops(model: PreTrainedModel, lengths: ArrayLike) -> NDArray[np.int64]:
    """FLOPs of `model` on each row alone, without padding. A multiply-add is two; only matrix products count.

    Runs a copy of the model once per distinct length, with `attn_implementation="eager"`: the counter has no formula
    for the CPU's fused attention.

    Args:
        model: a Hugging Face model that takes `input_ids`; left as it is.
        lengths: [N] integers >= 1, tokens of each row.

    Returns:
        [N] int64.

    Raises:
        ValueError: `lengths` has not one dimension, or holds a number below 1.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if tokens.ndim != 1 or (tokens < 1).any():
        raise ValueError(f"lengths: got {lengths!r}, wanted one dimension of integers >= 1")
    eager = deepcopy(model)
    eager.set_attn_implementation("eager")
    distinct, row = np.unique(tokens, return_inverse=True)
    return np.array([_count(eager, int(length)) for length in distinct], dtype=np.int64)[row]


def _count(model: PreTrainedModel, length: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, length, dtype=torch.long, device=model.device))
    return int(counter.get_total_flops())
