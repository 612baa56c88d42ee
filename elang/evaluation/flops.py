"""FLOPs of a model's forward, each row counted at its own length."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


def row_flops(model: PreTrainedModel, lengths: ArrayLike, *, choices: bool = False) -> NDArray[np.int64]:
    """FLOPs of `model` on each row alone, without padding. A multiply-add is two; only matrix products count.

    Runs a copy of the model once per distinct length, with `attn_implementation="eager"`: the counter has no formula
    for the CPU's fused attention.

    Args:
        model: a Hugging Face model that takes `input_ids`; left as it is.
        lengths: [N] integers >= 1, tokens of each row.
        choices: the model is one for multiple choice, of which each row is one choice.

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
    return np.array(
        [_count(eager, (1, 1, int(length)) if choices else (1, int(length))) for length in distinct], dtype=np.int64
    )[row]


def _count(model: PreTrainedModel, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(shape, dtype=torch.long, device=model.device))
    return int(counter.get_total_flops())


@torch.no_grad()
def generate_flops(model: PreTrainedModel, lengths: ArrayLike, new_tokens: ArrayLike) -> NDArray[np.int64]:
    """FLOPs of `model.generate` on each row alone, greedy and with a cache; counted as in `row_flops`.

    Args:
        model: a Hugging Face encoder-decoder; left as it is.
        lengths, new_tokens: [N] integers >= 1, tokens read and written of each row.

    Returns:
        [N] int64, the encoder's included.

    Raises:
        ValueError: arguments that are not as described, or of different lengths.
    """
    read, written = np.asarray(lengths, dtype=np.int64), np.asarray(new_tokens, dtype=np.int64)
    if read.ndim != 1 or read.shape != written.shape or (read < 1).any() or (written < 1).any():
        raise ValueError("lengths, new_tokens: wanted one dimension of as many integers >= 1 each")
    eager = deepcopy(model)
    eager.set_attn_implementation("eager")
    flops = np.empty(len(read), dtype=np.int64)
    for length in np.unique(read):
        rows = read == length
        after_step = _after_each_token(eager, int(length), int(written[rows].max()))
        flops[rows] = np.array(after_step, dtype=np.int64)[written[rows] - 1]
    return flops


def _after_each_token(model: Any, length: int, new_tokens: int) -> list[int]:
    counted: list[int] = []
    inputs = torch.ones(1, length, dtype=torch.long, device=model.device)
    with FlopCounterMode(display=False) as counter:
        hook = model.register_forward_hook(lambda *_: counted.append(int(counter.get_total_flops())))
        model.generate(inputs, attention_mask=inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, num_beams=1)
        hook.remove()
    return counted
