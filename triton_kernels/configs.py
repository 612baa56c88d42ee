"""The tiles of the Triton kernels, by kind of GPU. Chosen here and not by an autotuner: equal arguments give equal
tiles, hence the same bits, on every run. Not yet tuned on a GPU: see the status table in README.md.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    kind: str  # key of the tables: the major compute capability, "hip", or "interpreter"
    multiprocessors: int


@cache
def gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu("interpreter", 1)
    properties = torch.cuda.get_device_properties(device)
    kind = "hip" if torch.version.hip else str(properties.major)
    return Gpu(kind if kind in VOCAB else "8", properties.multi_processor_count)


class VocabConfig(NamedTuple):
    BLOCK_N: int  # rows of a tile
    BLOCK_C: int  # classes of a tile
    BLOCK_H: int  # columns that a step multiplies
    CLASSES_FIRST: bool  # the classes take the side of the matrix units that has to be full
    num_warps: int
    num_stages: int
    programs: int  # that a multiprocessor runs at once


FEW_ROWS = 64  # up to here reading the head is the work, beyond it the matrix product is

# (few rows, many rows)
VOCAB = {
    "8": (VocabConfig(16, 128, 64, True, 4, 4, 2), VocabConfig(128, 128, 64, False, 8, 3, 1)),
    "9": (VocabConfig(16, 128, 64, True, 4, 4, 3), VocabConfig(128, 256, 64, False, 8, 3, 1)),
    "10": (VocabConfig(16, 128, 64, True, 8, 4, 2), VocabConfig(128, 128, 64, False, 8, 4, 1)),
    "12": (VocabConfig(16, 128, 64, True, 4, 2, 2), VocabConfig(128, 128, 32, False, 8, 3, 1)),
    "hip": (VocabConfig(16, 64, 64, True, 4, 2, 2), VocabConfig(64, 64, 32, False, 4, 2, 1)),
    # Its time goes by steps, whatever their size. Few programs, so that each has several tiles.
    "interpreter": (VocabConfig(16, 128, 128, True, 4, 1, 6), VocabConfig(64, 512, 128, False, 4, 1, 6)),
}
# Without matrix units, or with loads of single elements.
VOCAB_ANY = (VocabConfig(16, 32, 64, False, 4, 2, 4), VocabConfig(32, 64, 32, False, 4, 2, 4))


# In place of the tile for many rows: a thread has a row to itself, and needs a register for the bias of each class.
VOCAB_BIAS = {"10": VocabConfig(128, 64, 64, False, 8, 4, 1)}


def vocab_config(kind: str, fast: bool, tokens: int, has_bias: bool) -> VocabConfig:
    """`fast`: rows and head are of one dtype of 16 bits, which the matrix units take, and are read in whole vectors."""
    many = tokens > FEW_ROWS
    if not fast and kind != "interpreter":
        return VOCAB_ANY[many]
    return VOCAB_BIAS[kind] if many and has_bias and kind in VOCAB_BIAS else VOCAB[kind][many]
