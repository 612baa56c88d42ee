"""What tells one set of weights from another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and values of the parameters and buffers, floats rounded to bfloat16.

    A model and its copy on another device or in bfloat16 have one fingerprint. Reads every weight once.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(value.shape)}".encode())
        rounded = value.to(torch.bfloat16) if value.is_floating_point() else value
        digest.update(rounded.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
