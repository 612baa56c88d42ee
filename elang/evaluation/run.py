"""A pair of sequence classifiers on a task of the paper: answers that are kept, measured at any threshold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from elang import backbones, backend, checks, contract
from elang.calibration import Provenance
from elang.calibration.curve import every_threshold
from elang.evaluation.evaluation import Evaluation, System, Timing
from elang.evaluation.flops import row_flops
from elang.evaluation.metrics import evaluate
from elang.evaluation.predict import (
    CLASSIFIER_SCORES,
    Encoded,
    label_columns,
    longest_input,
    predict,
    predict_scored,
)
from elang.evaluation.published import PUBLISHED
from elang.evaluation.rows import Rows
from elang.evaluation.tasks import Task, get_task
from elang.evaluation.timing import alternate, medians
from elang.fingerprint import fingerprint
from elang.progress import bar

SHARES = np.linspace(0, 1, 21)  # kept, of a sweep
TIMED_ROWS, ROUNDS = 256, 3

Columns = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What both models make of N rows of a task, labels in the task's order."""

    task: Task
    rows: Rows
    swift: NDArray[np.int64]  # [N] labels
    super: NDArray[np.int64]
    scores: Mapping[str, NDArray[np.float32]]  # each [N], Swift's
    temperature: float  # of the scores
    swift_flops: NDArray[np.int64]  # [N] each row at its own length
    super_flops: NDArray[np.int64]
    provenance: Provenance

    def kept(self, score: str, threshold: float) -> NDArray[np.bool_]:  # [N]
        values = self.scores[score]
        return np.isfinite(values) & (values >= np.float32(threshold))

    def joined(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The labels [N] of the joint model."""
        return np.where(kept, self.swift, self.super)

    def quality(self, labels: NDArray[np.int64]) -> dict[str, float]:
        return evaluate(self.task, labels, self.rows)


def classification_task(name: str) -> Task:
    """Raises ValueError for an unknown task, and for one that sequence classifiers do not answer here."""
    task = get_task(name)
    if task.kind != "classification":
        raise ValueError(
            f"task: got {name}, which is {task.kind.replace('_', ' ')}, wanted a task of classification: regression, "
            "multiple choice, spans and generation are not supported yet"
        )
    return task


def load_classifier(role: str, name: str) -> tuple[Any, Any]:
    """Model, in eval mode, and tokenizer, by folder or hub id.

    Raises:
        ValueError: there is none, or its head was never trained; the message begins with `role`.
    """
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{role}: got {name}, wanted the folder or hub id of a classifier: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{role}: got no weights for {', '.join(missing)} in {name}, wanted a fine-tuned classifier")
    return model.eval(), tokenizer


def columns_for(role: str, model: Any, task: Task) -> list[int]:
    """`label_columns` of a task; refuses heads that are no classifier's."""
    contract.refuse_other_heads(model, role)
    return label_columns(role, model, task.labels, task.name)


def encode(role: str, model: Any, tokenizer: Any, rows: Rows) -> Encoded:
    """The rows as a model reads them, cut at the longest input that it takes."""
    if tokenizer.pad_token is None:
        raise ValueError(f"{role}: got a tokenizer without a padding token, wanted one")
    texts, *second_texts = zip(*rows.texts, strict=True)
    return Encoded(tokenizer, texts, longest_input(tokenizer, model.config), *second_texts)


def first_rows(rows: Rows, limit: int | None) -> Rows:
    """At most `limit` rows, from the start; None: all."""
    return Rows(*(getattr(rows, field.name)[:limit] for field in dataclasses.fields(rows)))


def answer_task(
    swift: Any,
    super_: Any,
    rows: Rows,
    tokenizers: tuple[Any, Any],
    out: str | Path,
    *,
    task: str,
    data: str | None = None,
    temperature: float = 1.0,
    batch_size: int = 32,
) -> Answers:
    """What a pair of sequence classifiers answers, with every score of Swift from the op that serves; on the CPU.

    Logits, scores and FLOPs are kept in `out`, in one file of each model. It is written when it is complete, so that an
    interrupted run goes on with the model it was at, and found again for the same weights, config, tokens, dtype and
    batch size; Swift's for the same temperature and backend too.

    Args:
        swift, super_: Hugging Face sequence classifiers in eval mode.
        tokenizers: Swift's and Super's.
        task: the name of a classification task.
        data: what the rows are; recorded. None: the name of the task.

    Raises:
        ValueError: another kind of task; labels that do not match; a tokenizer without a padding token; temperature
            not finite or not > 0.
        RuntimeError: a model is in training mode.
    """
    known = classification_task(task)
    checks.temperature(temperature)
    contract.check_eval(("swift", swift), ("super_", super_))
    columns = columns_for("swift", swift, known), columns_for("super", super_, known)
    texts = encode("swift", swift, tokenizers[0], rows), encode("super", super_, tokenizers[1], rows)
    served = backend.served("route_logits" if backbones.find(swift).head is None else "route", "cpu").backend
    sha256 = fingerprint(swift), fingerprint(super_)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    def of_swift() -> Columns:
        with bar("Swift: answering") as report:
            logits, scores = predict_scored(
                swift, texts[0], temperature=temperature, batch_size=batch_size, report=report
            )
        return {"logits": logits, **{f"score.{name}": values for name, values in scores.items()}}

    def of_super() -> Columns:
        with bar("Super: answering") as report:
            return {"logits": predict(super_, texts[1], batch_size=batch_size, report=report)}

    ours = _stored(folder, swift, texts[0], [sha256[0], batch_size, "swift", temperature, served], of_swift)
    theirs = _stored(folder, super_, texts[1], [sha256[1], batch_size, "super"], of_super)
    content = json.dumps([rows.texts, np.asarray(rows.targets).tolist()])
    return Answers(
        task=known,
        rows=rows,
        swift=ours["logits"][:, columns[0]].argmax(axis=1),
        super=theirs["logits"][:, columns[1]].argmax(axis=1),
        scores={name: ours[f"score.{name}"] for name in CLASSIFIER_SCORES},
        temperature=float(temperature),
        swift_flops=ours["flops"],
        super_flops=theirs["flops"],
        provenance=Provenance(
            swift=swift.name_or_path,
            super=super_.name_or_path,
            swift_sha256=sha256[0],
            super_sha256=sha256[1],
            data=data or task,
            data_sha256=hashlib.sha256(content.encode()).hexdigest(),
            dtype=str(swift.dtype).removeprefix("torch."),
            backend=served,
        ),
    )


def _stored(folder: Path, model: Any, texts: Encoded, settings: list[Any], compute: Callable[[], Columns]) -> Columns:
    config = {name: v for name, v in model.config.to_dict().items() if name not in ("_name_or_path", "dtype")}
    made_of = [*settings, str(model.dtype), config, texts.sha256]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = folder / f"answers-{key}.safetensors"
    if not path.exists():
        unfinished = folder / f"{path.name}.{os.getpid()}"
        try:
            save_file({**compute(), "flops": row_flops(model, texts.lengths)}, unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return load_file(path)


def sweep(score: NDArray[np.float32]) -> list[float]:
    """Thresholds that keep the shares of these rows nearest to 0, 5, ... 100 %, each once, from the highest."""
    neither = np.zeros(len(score), dtype=np.bool_)
    every = every_threshold(score, neither, neither)
    nearest = [int(np.abs(every.kept / len(score) - share).argmin()) for share in SHARES]
    return [float(every.threshold[i]) for i in sorted(set(nearest))]


def measure(answers: Answers, score: str, thresholds: Sequence[float], timing: Timing | None = None) -> Evaluation:
    """Quality, share kept and speed-ups at each threshold, and of each model alone; runs no model.

    Args:
        timing: from `time_task`, at these thresholds.

    Raises:
        ValueError: an unknown score, a threshold that is NaN, a timing of other thresholds.
    """
    if score not in answers.scores:
        raise ValueError(f"score: got {score!r}, wanted one of {', '.join(answers.scores)}")
    for threshold in thresholds:
        checks.threshold(threshold)
    if timing is not None and len(timing.joint) != len(thresholds):
        raise ValueError(f"timing: got {len(timing.joint)} thresholds, wanted {len(thresholds)}")
    super_flops = answers.super_flops.sum()
    swift_quality, super_quality = answers.quality(answers.swift), answers.quality(answers.super)

    def joint(i: int, threshold: float) -> System:
        kept = answers.kept(score, threshold)
        share = float(kept.mean())
        flops = answers.swift_flops.sum() + answers.super_flops[~kept].sum()
        at_random = None
        if (metric := answers.task.metrics[0]) == "accuracy":
            at_random = share * swift_quality[metric] + (1 - share) * super_quality[metric]
        return System(
            threshold=threshold,
            quality=answers.quality(answers.joined(kept)),
            random_accuracy=at_random,
            swift_ratio=100 * share,
            flops_speedup=float(super_flops / flops),
            time_speedup=None if timing is None else timing.super / timing.joint[i],
        )

    def alone(quality: dict[str, float], ratio: float, flops: np.int64, seconds: float | None) -> System:
        return System(
            threshold=None,
            quality=quality,
            random_accuracy=None,
            swift_ratio=ratio,
            flops_speedup=float(super_flops / flops),
            time_speedup=None if timing is None or seconds is None else timing.super / seconds,
        )

    return Evaluation(
        task=answers.task.name,
        n=len(answers.rows),
        score=score,
        temperature=answers.temperature,
        swift=alone(swift_quality, 100.0, answers.swift_flops.sum(), None if timing is None else timing.swift),
        super=alone(super_quality, 0.0, super_flops, None if timing is None else timing.super),
        joint=tuple(joint(i, threshold) for i, threshold in enumerate(thresholds)),
        timing=timing,
        published=PUBLISHED.get(answers.task.name),
        provenance=answers.provenance,
    )


@torch.inference_mode()
def time_task(
    swift: Any,
    super_: Any,
    joints: Sequence[Any],
    answers: Answers,
    tokenizers: tuple[Any, Any],
    *,
    rows: int = TIMED_ROWS,
    batch_size: int = 1,
) -> Timing:
    """Wall-clock of Swift, Super and joint models of the two, in alternation, on the threads that torch has now.

    Args:
        joints: such as `JointClassifier`, one for each threshold.
        rows: timed, evenly spread over those there are.
        batch_size: 1, as the authors measured.

    Raises:
        ValueError: the models read different tokens of the same rows.
    """
    texts = encode("swift", swift, tokenizers[0], answers.rows)
    if texts.sha256 != encode("super", super_, tokenizers[1], answers.rows).sha256:
        raise ValueError("time: got models that read different tokens, wanted a pair with one tokenizer")
    systems = {"Swift": swift, "Super": super_, **{f"joint {i}": joint for i, joint in enumerate(joints)}}
    timed = np.linspace(0, len(texts) - 1, min(rows, len(texts))).round().astype(np.int64)
    seconds = dict.fromkeys(systems, 0.0)
    with bar("timing") as report:
        for start in range(0, len(timed), batch_size):
            batch = texts.batch(timed[start : start + batch_size])
            runs = {name: partial(model, **batch) for name, model in systems.items()}
            for name, value in medians(alternate(runs, ROUNDS)).items():
                seconds[name] += value
            report(min(start + batch_size, len(timed)), len(timed))
    return Timing(
        rows=len(timed),
        batch_size=batch_size,
        rounds=ROUNDS,
        threads=torch.get_num_threads(),
        swift=seconds.pop("Swift"),
        super=seconds.pop("Super"),
        joint=tuple(seconds.values()),
    )
