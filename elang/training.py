"""How a classifier is made of another one's first layers: the recipe, the loss of a teacher's answers, the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

from elang.evaluation.predict import Encoded
from elang.progress import Report

TRAINING_ATTENTION = "eager"  # on sentences the backward of the fused one takes a CPU half as long again
LENGTH_NOISE = 4.0  # tokens: batches are of similar length, yet not the same every epoch

# What configs call the dropout of attention, and what they say of every layer by itself.
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
_LAYER_TYPES = ("layer_types", "mlp_layer_types")

Loss = Callable[[Tensor, NDArray[np.int64]], Tensor]  # of float32 logits [B, C] and their rows [B]


@dataclass(frozen=True)
class Recipe:
    """How a model is made of another one's first layers; part of the key that it is kept under."""

    layers: int
    epochs: int
    batch_size: int
    learning_rate: float
    embedding_rate: float  # learning rate of the word embeddings
    attention_dropout: float | None  # None: the other model's own. Drawing its mask is a tenth of a step
    weight_decay: float = 0.01
    warm_up: float = 0.1  # share of the steps
    seed: int = 0


def first_layers(name: str | Path, recipe: Recipe, **settings: Any) -> tuple[Any, Any]:
    """A float32 classifier of a model's first layers and all that is around them, to train, and the tokenizer.

    Args:
        name: folder or hub id. Weights that it lacks (a head, of an encoder) are drawn with the recipe's seed.
        settings: of the config, such as `id2label`.

    Raises:
        ValueError: a config that cannot have so many layers, or has no dropout of attention.
    """
    config = AutoConfig.from_pretrained(name, num_hidden_layers=recipe.layers, **settings)
    for types in _LAYER_TYPES:
        if len(getattr(config, types, None) or ()) > recipe.layers:
            setattr(config, types, getattr(config, types)[: recipe.layers])
    if recipe.attention_dropout is not None:
        known = [dropout for dropout in _ATTENTION_DROPOUT if hasattr(config, dropout)]
        if not known:
            raise ValueError(
                f"attention_dropout: got {recipe.attention_dropout} for {name}, whose config has none, wanted None"
            )
        setattr(config, known[0], recipe.attention_dropout)
    type(config).from_dict(config.to_dict())  # a config that cannot be read again is found out before any training
    torch.manual_seed(recipe.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        name, config=config, attn_implementation=TRAINING_ATTENTION
    )
    return model.float(), AutoTokenizer.from_pretrained(name)


def distillation_loss(teacher: NDArray[np.float32], temperature: float) -> Loss:
    """`T**2 * KL(softmax(teacher / T) || softmax(logits / T))`, mean over the rows (Hinton et al. 2015, section 2).

    Args:
        teacher: logits [N, C] of all rows.
        temperature: T > 0. T**2 keeps the gradients of one size whatever it is.
    """
    answers = (torch.from_numpy(teacher) / temperature).softmax(dim=1)

    def loss(logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
        log_p = (logits / temperature).log_softmax(dim=1)
        return temperature**2 * F.kl_div(log_p, answers[rows], reduction="batchmean")

    return loss


def fit(model: Any, texts: Encoded, loss: Loss, recipe: Recipe, report: Report) -> None:
    """AdamW, linear warm-up and decay, batches of similar length; on the CPU."""
    model.train()
    embeddings = list(model.get_input_embeddings().parameters())
    others = [p for p in model.parameters() if all(p is not e for e in embeddings)]
    optimizer = torch.optim.AdamW(
        [
            {"params": others, "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay},
            {"params": embeddings, "lr": recipe.embedding_rate, "weight_decay": 0.0},
        ],
        fused=True,
    )
    steps = recipe.epochs * -(-len(texts) // recipe.batch_size)
    warm_up = int(recipe.warm_up * steps)
    schedule = get_linear_schedule_with_warmup(optimizer, warm_up, steps)  # type: ignore[no-untyped-call]
    rng = np.random.default_rng(recipe.seed)
    done = 0
    for _ in range(recipe.epochs):
        batches = list(texts.by_length(recipe.batch_size, noise=rng.uniform(0, LENGTH_NOISE, len(texts))))
        for i in rng.permutation(len(batches)):
            with autocast():
                logits = model(**texts.batch(batches[i])).logits
            loss(logits.float(), batches[i]).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done += 1
            report(done, steps)


def autocast(enabled: bool = True) -> torch.autocast:
    """bfloat16 where the processor multiplies it natively: elsewhere it is slower than float32."""
    native: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot tell
    return torch.autocast(
        "cpu", torch.bfloat16, enabled=enabled and any(native.get(isa, False) for isa in ("avx512_bf16", "amx_bf16"))
    )
