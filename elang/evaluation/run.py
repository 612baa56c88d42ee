"""A pair on a task of the paper: loaded, measured at any threshold, timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from elang import checks
from elang.calibration.curve import every_threshold
from elang.energy_head import EnergyHead
from elang.evaluation.answers import Answers
from elang.evaluation.classifiers import Chooser, Classifier
from elang.evaluation.evaluation import Evaluation, System, Timing
from elang.evaluation.generators import Generator
from elang.evaluation.published import PUBLISHED
from elang.evaluation.rows import Rows
from elang.evaluation.task_model import TaskModel
from elang.evaluation.tasks import Task
from elang.evaluation.timing import alternate, awaited, medians
from elang.progress import bar

SHARES = np.linspace(0, 1, 21)  # kept, of a sweep
TIMED_ROWS, ROUNDS = 256, 3


def task_model(role: str, model: Any, tokenizer: Any, task: Task, head: EnergyHead | None = None) -> TaskModel:
    """A Hugging Face model, by what it is, on a task.

    Args:
        role: "swift" or "super".
        head: of an encoder-decoder Swift.

    Raises:
        ValueError: a model that cannot answer the task, labels that are not the task's, a tokenizer without a padding
            token, an energy head where there is no encoder-decoder.
        RuntimeError: the model is in training mode.
    """
    if type(model).__name__.endswith("ForSequenceClassification"):
        kind: Any = Classifier
    elif type(model).__name__.endswith("ForMultipleChoice"):
        kind = Chooser
    elif getattr(model.config, "is_encoder_decoder", False):
        return Generator(role, model, tokenizer, task, head)
    else:
        raise ValueError(
            f"{role}: got {type(model).__name__}, wanted a sequence classifier, a model for multiple choice or an "
            "encoder-decoder"
        )
    if head is not None:
        raise ValueError(f"head: got one for {type(model).__name__}, wanted none: it is for an encoder-decoder")
    return kind(role, model, tokenizer, task)  # type: ignore[no-any-return]


def load_model(
    role: str,
    name: str,
    task: Task,
    head: str | Path | None = None,
    device: torch.device | str | None = None,
) -> TaskModel:
    """`task_model`, by folder or hub id.

    Args:
        head: the folder that it was saved in.
        device: where the model goes; None: the CPU.

    Raises:
        ValueError: as `task_model`; no such model, or its head was never trained. The message begins with `role`.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        architecture = (config.architectures or [""])[0]
        auto: Any = AutoModelForSequenceClassification
        if task.kind in ("multiple_choice", "span") and not config.is_encoder_decoder:
            auto = AutoModelForMultipleChoice
        elif config.is_encoder_decoder and not architecture.endswith("ForSequenceClassification"):
            auto = AutoModelForSeq2SeqLM
        model, loaded = auto.from_pretrained(name, output_loading_info=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{role}: got {name}, wanted the folder or hub id of a model: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{role}: got no weights for {', '.join(missing)} in {name}, wanted a fine-tuned model")
    energy_head = None if head is None else EnergyHead.load(head).to(device, model.dtype)
    return task_model(role, model.eval().to(device), tokenizer, task, energy_head)


def labels_of(role: str, name: str) -> list[str]:
    """The labels of a classifier, by folder or hub id, in its order. Raises ValueError where there is none."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{role}: got {name}, wanted the folder or hub id of a model: {error}") from error
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def first_rows(rows: Rows, limit: int | None) -> Rows:
    """At most `limit` rows, from the start; None: all."""
    return Rows(*(getattr(rows, field.name)[:limit] for field in dataclasses.fields(rows)))


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
        flops = answers.flops(score, kept)
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


def time_task(
    swift: TaskModel,
    super_: TaskModel,
    score: str,
    thresholds: Sequence[float],
    answers: Answers,
    *,
    rows: int = TIMED_ROWS,
    batch_size: int = 1,
) -> Timing:
    """Wall-clock of Swift, Super and the joint model at each threshold, on the threads that torch has now.

    Batch by batch in alternation. Where the models are on a GPU, every run waits for it.

    Args:
        rows: timed, evenly spread over those there are.
        batch_size: 1, as the authors measured.

    Raises:
        ValueError: the models are of different kinds, or read different tokens of the same rows.
    """
    texts = swift.encode(answers.rows)
    joints = [swift.joined(super_, score, threshold, answers.temperature) for threshold in thresholds]
    if texts.sha256 != super_.encode(answers.rows).sha256:
        raise ValueError("time: got models that read different tokens, wanted a pair with one tokenizer")
    systems = {"Swift": swift.model, "Super": super_.model, **{f"joint {i}": joint for i, joint in enumerate(joints)}}
    timed = np.linspace(0, len(texts) - 1, min(rows, len(texts))).round().astype(np.int64)
    seconds = dict.fromkeys(systems, 0.0)
    device = swift.model.device
    with bar("timing") as report, torch.inference_mode():
        for start in range(0, len(timed), batch_size):
            batch = texts.batch(timed[start : start + batch_size], device)
            runs = {name: awaited(swift.run(model, answers.rows, batch), device) for name, model in systems.items()}
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
