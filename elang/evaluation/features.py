"""The states of a frozen encoder, computed once: in memory, or in a file that an interrupted run goes on with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elang.energy_head import Form, pooled
from elang.evaluation.predict import Encoded
from elang.fingerprint import fingerprint
from elang.progress import Report, silent

SAVE_EVERY = 64  # batches


@torch.inference_mode()
def encoder_features(
    swift: Any,
    texts: Encoded,
    form: Form,
    *,
    cache: Path | None = None,
    batch_size: int = 32,
    report: Report = silent,
) -> NDArray[np.float32]:
    """What an energy head of this form sees of each text, in their order: float32.

    `pooled`: [N, H], the mean over each text's tokens. `token`: [sum of `texts.lengths`, H], the states of the first
    text's tokens, then of the second's, and so on.

    Args:
        swift: a Hugging Face encoder-decoder in eval mode.
        cache: folder in which the result is kept, memory-mapped, under a key of encoder, tokens, form and batch size.
            What an interrupted run had finished is not computed again.
    """
    encoder, batches = swift.get_encoder(), list(texts.by_length(batch_size))
    starts = np.concatenate(([0], np.cumsum(texts.lengths)))
    shape = (len(texts) if form == "pooled" else int(starts[-1]), int(swift.config.hidden_size))
    if cache is None:
        features, done, record = np.empty(shape, dtype=np.float32), 0, None
    else:
        key = hashlib.sha256(json.dumps([fingerprint(encoder), texts.sha256, form, batch_size]).encode()).hexdigest()
        cache.mkdir(parents=True, exist_ok=True)
        record, file = cache / f"{key[:16]}.json", cache / f"{key[:16]}.npy"
        done = json.loads(record.read_text())["batches"] if record.exists() and file.exists() else 0
        features = np.lib.format.open_memmap(file, mode="r+" if done else "w+", dtype=np.float32, shape=shape)
    rows_done = np.cumsum([len(rows) for rows in batches])
    for i, rows in enumerate(batches[done:], done):
        batch = texts.batch(rows)
        inputs = {name: value.to(swift.device) for name, value in batch.items() if name != "token_type_ids"}
        states = encoder(**inputs).last_hidden_state
        if form == "pooled":
            features[rows] = pooled(states, inputs["attention_mask"]).float().cpu().numpy()
        else:
            real = inputs["attention_mask"] != 0
            at = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
            features[at] = states[real].float().cpu().numpy()
        if record is not None and ((i + 1) % SAVE_EVERY == 0 or i + 1 == len(batches)):
            features.flush()  # type: ignore[attr-defined]
            unfinished = record.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({"batches": i + 1}))
            unfinished.replace(record)  # only what has been written counts as done
        report(int(rows_done[i]), len(texts))
    return features
