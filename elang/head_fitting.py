"""`fit_energy_head`: the one thing that is ever trained, on the states of a frozen encoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from elang import __version__, ops
from elang.calibration.curve import auroc
from elang.contract import check_eval
from elang.energy_head import FORMS, EnergyHead, Fitted, Form
from elang.evaluation.features import encoder_features
from elang.evaluation.predict import Encoded, longest_input
from elang.fingerprint import fingerprint
from elang.progress import Report, bar
from elang.reference import score_logits

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # kept, in the record
WEIGHT_DECAY = 0.01
STEP_ROWS, STEPS = 256, 16  # examples a step, at most; steps an epoch, at least, if there are as many examples
SCALED_ON = 100_000  # examples that mean and variance are taken from


def fit_energy_head(
    swift: Any,
    tokenizer: Any,
    texts: Sequence[str],  # N
    targets: ArrayLike | None = None,  # [N] bool or int
    *,
    form: Form = "pooled",
    right: ArrayLike | None = None,  # [N] bool
    validation: float = 0.2,
    cache: str | Path | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    epochs: int = 30,
    learning_rate: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> EnergyHead:
    """An `EnergyHead` fitted on what Swift's frozen encoder makes of these texts; Swift is left as it is.

    | `targets` | head | the router's score |
    |---|---|---|
    | bool: Swift's output is right, or agrees with Super's | `pooled`, one output | `logit` |
    | int: the task's classes | `pooled`, one output for each class | `energy` |
    | None | `token`, the vocabulary, each token's target the next token of the text | `energy` |

    The states are computed once. A part of the rows validates: the weights kept are those after the epoch with the
    least validation loss. Texts without a token are left out. AdamW with a cosine schedule, on features scaled to unit
    variance; the scale ends up in the weights. Same seed, same data, same machine: same head.

    Args:
        swift: a Hugging Face encoder-decoder in eval mode.
        tokenizer: Swift's.
        right: whether Swift's output is right, for the AUROC of a head with other targets.
        validation: share of the rows, in (0, 1).
        cache: folder for the encoder's states; see `elang.evaluation.features.encoder_features`.
        max_length: tokens at which texts are cut; None: as many as tokenizer and encoder take.
        progress: bars, where stderr is a terminal and it takes long.

    Returns:
        The head; `.fitted` has its record, `.fitted.summary()` in words, `.save(folder)` keeps both.

    Raises:
        ValueError, TypeError: an argument that is not as described, by its name; targets, or `right`, that are all
            alike, on all rows or on those that validate.
        RuntimeError: Swift is in training mode.

    Source: the energy head of the paper; one output scored by its logit, as logsumexp over "right" and "wrong" tells
    them no better than chance.
    """
    check_eval(("swift", swift))
    if form not in FORMS:
        raise ValueError(f"form: got {form!r}, wanted one of {', '.join(FORMS)}")
    if not 0 < validation < 1:
        raise ValueError(f"validation: got {validation}, wanted a share in (0, 1)")
    n = len(texts)
    task = _task(targets, n, form, swift)
    judged = task.labels if task.kind == "right" else None
    if right is not None:
        judged = _judged(right, n)

    encoded = Encoded(tokenizer, texts, max_length or longest_input(tokenizer, swift.config))
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(encoded.lengths))
    held_out = round(validation * len(rows))
    if not 0 < held_out < len(rows):
        raise ValueError(f"texts: got {len(rows)} with a token, too few for a validation share of {validation}")
    validating, training = (np.sort(part) for part in np.split(rows, [held_out]))
    if judged is not None and len(np.unique(judged[validating])) < 2:
        name, only = "targets" if right is None else "right", judged[validating[0]]
        raise ValueError(f"{name}: got nothing but {only!s} in the {held_out} rows that validate, wanted some of both")
    with bar("encoder's states", progress) as report:
        where = None if cache is None else Path(cache)
        features = encoder_features(swift, encoded, form, cache=where, batch_size=batch_size, report=report)
    examples = _examples(task, features, encoded, training), _examples(task, features, encoded, validating)
    torch.manual_seed(seed)
    head = EnergyHead(features.shape[1], task.outputs, form)
    with bar("energy head", progress) as report:
        losses = _fit(head, *examples, task.loss, epochs, learning_rate, seed, report)

    score = _scores(head, features, encoded, validating, task)
    kept = [math.ceil(share * held_out) for share in SHARES]
    by_sureness = None if judged is None else judged[validating][np.argsort(-score, kind="stable")]
    head.fitted = Fitted(
        encoder=fingerprint(swift.get_encoder()),
        targets=task.kind,
        score=task.score,
        n=len(training),
        n_validation=held_out,
        seed=seed,
        train_loss=losses[0],
        validation_loss=losses[1],
        auroc=None if judged is None else auroc(score, judged[validating]),
        share_kept=tuple(count / held_out for count in kept),
        share_right=() if by_sureness is None else tuple(float(by_sureness[:count].mean()) for count in kept),
        library=__version__,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return head


Loss = Callable[[Tensor, Tensor], Tensor]  # of logits [B, C] and targets [B]


class _Task(NamedTuple):
    kind: Literal["right", "class", "next token"]
    score: Literal["logit", "energy"]
    outputs: int
    labels: NDArray[Any] | None  # [N]
    loss: Loss


class _Examples(NamedTuple):
    features: NDArray[np.float32]  # of which only some rows are examples
    rows: NDArray[np.int64]  # [E]
    targets: Tensor  # [E]

    def batch(self, which: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.features[self.rows[which]]), self.targets[torch.from_numpy(which)]


def _task(targets: ArrayLike | None, n: int, form: Form, swift: Any) -> _Task:
    if (targets is None) != (form == "token"):
        raise ValueError(
            f"targets: got {'none' if targets is None else 'some'} for the form {form!r}, "
            "wanted one for each text for 'pooled', none for 'token', whose targets are the texts' own next tokens"
        )
    if targets is None:
        return _Task("next token", "energy", swift.config.vocab_size, None, F.cross_entropy)
    labels = np.asarray(targets)
    if labels.shape != (n,) or labels.dtype.kind not in "biu":
        raise ValueError(f"targets: got {labels.dtype} {list(labels.shape)}, wanted bool or int [{n}]")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"targets: got nothing but {labels[0]!s}, wanted rows of two kinds at least")
    if labels.dtype.kind == "b":
        return _Task("right", "logit", 1, labels, _binary)
    if labels.min() < 0:
        raise ValueError(f"targets: got {labels.min()}, wanted classes from 0 on")
    return _Task("class", "energy", int(labels.max()) + 1, labels.astype(np.int64), F.cross_entropy)


def _judged(right: ArrayLike, n: int) -> NDArray[np.bool_]:
    judged = np.asarray(right)
    if judged.shape != (n,) or judged.dtype.kind != "b":
        raise ValueError(f"right: got {judged.dtype} {list(judged.shape)}, wanted bool [{n}]")
    return judged


def _binary(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.squeeze(1), targets.float())


def _examples(task: _Task, features: NDArray[np.float32], texts: Encoded, rows: NDArray[np.int64]) -> _Examples:
    if task.labels is not None:
        return _Examples(features, rows, torch.from_numpy(task.labels[rows]))
    starts = np.concatenate(([0], np.cumsum(texts.lengths)))
    ids = texts.ids
    at = [np.arange(starts[row], starts[row + 1] - 1) for row in rows]  # the last token has no next
    following = [token for row in rows for token in ids[row][1:]]
    return _Examples(features, np.concatenate(at), torch.tensor(following))


def _fit(
    head: EnergyHead,
    training: _Examples,
    validating: _Examples,
    loss: Loss,
    epochs: int,
    learning_rate: float,
    seed: int,
    report: Report,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Fits the head's layer in place; the mean losses after each epoch, of training and validation."""
    rng = np.random.default_rng(seed)
    sample, _ = training.batch(rng.permutation(len(training.rows))[:SCALED_ON])
    mean, scale = sample.mean(dim=0), 1 / sample.std(dim=0).clamp(min=1e-6)
    layer = head.output
    optimizer = torch.optim.AdamW(layer.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    histories: tuple[list[float], list[float]] = ([], [])
    best = layer.state_dict()
    size = max(1, min(STEP_ROWS, len(training.rows) // STEPS))
    for epoch in range(epochs):
        for examples, history in zip((training, validating), histories, strict=True):
            learning, total = examples is training, 0.0
            order = rng.permutation(len(examples.rows)) if learning else np.arange(len(examples.rows))
            with torch.set_grad_enabled(learning):
                for which in np.split(order, range(size, len(order), size)):
                    states, targets = examples.batch(which)
                    value = loss(layer((states - mean) * scale), targets)
                    total += value.item() * len(which)
                    if learning:
                        optimizer.zero_grad()
                        value.backward()  # type: ignore[no-untyped-call]
                        optimizer.step()
            history.append(total / len(order))
        schedule.step()
        if histories[1][-1] == min(histories[1]):
            best = copy.deepcopy(layer.state_dict())
        report(epoch + 1, epochs)
    if not math.isfinite(min(histories[1])):
        raise ValueError("swift: its encoder's states on these texts are not all finite")
    layer.load_state_dict(best)
    with torch.no_grad():  # the layer is to see states as they come
        layer.weight.mul_(scale)
        layer.bias.sub_(layer.weight @ mean)
    layer.requires_grad_(False)
    return tuple(histories[0]), tuple(histories[1])


@torch.no_grad()
def _scores(
    head: EnergyHead, features: NDArray[np.float32], texts: Encoded, rows: NDArray[np.int64], task: _Task
) -> NDArray[np.float32]:
    """[len(rows)]: what a router would decide by."""
    weight, bias = head.output.weight, head.output.bias
    if head.form == "pooled":
        return score_logits(torch.from_numpy(features[rows]) @ weight.T + bias, task.score).numpy()
    starts = np.concatenate(([0], np.cumsum(texts.lengths)))
    at = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
    energy = ops.vocab_energy(torch.from_numpy(features[at]), weight, bias).score.numpy()
    lengths = texts.lengths[rows]  # none of them 0
    mean = np.add.reduceat(energy, np.cumsum(lengths) - lengths) / lengths
    return mean.astype(np.float32)
