"""A Swift for a Super that has none: Super's first layers and its head, taught Super's own answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from elang import backend, checks
from elang.calibration import InfeasibleTarget, Provenance, calibrate
from elang.calibration.artefact import Artefact, Record
from elang.calibration.bounds import wilson_interval
from elang.evaluation.flops import row_flops
from elang.evaluation.predict import CLASSIFIER_SCORES, Encoded, longest_input, predict, predict_scored
from elang.evaluation.run import labels_of, load_model
from elang.evaluation.task_model import TaskModel
from elang.evaluation.tasks import Task
from elang.evaluation.timing import alternate, medians
from elang.fingerprint import fingerprint
from elang.progress import Report, bar
from elang.store import Columns, kept, key_of, published
from elang.texts import as_texts, split
from elang.training import Loss, Recipe, distillation_loss, first_layers, fit

if TYPE_CHECKING:
    from rich.table import Table

CONFIDENCE = 0.95  # of the intervals
BATCH_SIZES = (1, 32)  # that are timed
TIMED_ROWS, ROUNDS = 64, 3
MADE_OF = "distilled.json"  # in a student's folder: the key of all that made it


class Student(Record):
    """A Swift of Super's first layers. Speed-ups are over Super alone, on the held-out texts."""

    layers: int
    folder: str  # beside this file
    parameters: int
    agreement: float  # share of the texts that it answers as Super does
    lower: float  # two-sided Wilson interval of `agreement`
    upper: float
    flops_speedup: float  # each text at its own length
    time_speedup: dict[int, float]  # by batch size
    calibration: str | None  # file beside this one; None: no threshold meets alpha and delta
    share_kept: float | None  # of the texts, by that threshold
    joint_flops_speedup: float | None  # of Swift on every text and Super on those that it does not keep
    infeasible: str | None  # why there is no threshold


class Distillation(Artefact):
    """What becomes of a Super's first layers, for each number of them. Saved as JSON."""

    version: Literal[1] = 1
    layers: int  # of Super
    parameters: int  # of Super
    most_frequent: float  # share of Super's most frequent answer: the agreement of answering nothing else
    n: int  # held-out texts
    n_lessons: int  # texts to learn from
    epochs: int
    batch_size: int
    learning_rate: float
    temperature: float
    max_length: int | None  # tokens
    seed: int
    alpha: float
    delta: float
    timed_rows: int
    threads: int
    students: tuple[Student, ...]
    provenance: Provenance  # of Super and the texts

    def table(self) -> Table:
        """The trade-off: one line per number of layers, Super's last."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        title = f"{self.provenance.data}: {self.n} held-out texts, {self.n_lessons} to learn from"
        table = Table(title=title, title_justify="left", caption=self._caption(), caption_justify="left")
        table.box, table.show_edge, table.padding = SIMPLE_HEAD, False, (0, 1, 0, 0)
        clocks = [f"time x\nbatch {size}" for size in BATCH_SIZES]
        for heading in ("layers", "parameters", "agreement %", "FLOPs x", *clocks, "kept %", "joint\nFLOPs x"):
            table.add_column(heading, justify="right")
        for s in self.students:
            table.add_row(
                str(s.layers),
                _millions(s.parameters),
                f"{100 * s.agreement:.1f} ({100 * s.lower:.1f} to {100 * s.upper:.1f})",
                f"{s.flops_speedup:.2f}",
                *(f"{s.time_speedup[size]:.2f}" for size in BATCH_SIZES),
                "none" if s.share_kept is None else f"{100 * s.share_kept:.1f}",
                "" if s.joint_flops_speedup is None else f"{s.joint_flops_speedup:.2f}",
            )
        ones = ["1.00"] * (1 + len(BATCH_SIZES))
        table.add_row(f"Super {self.layers}", _millions(self.parameters), "100.0", *ones, "", "")
        return table

    def _caption(self) -> str:
        caption = (
            f"agreement: with Super's answers, {CONFIDENCE:.0%} interval; its most frequent one alone would have "
            f"{self.most_frequent:.1%}. FLOPs x, time x: speed-up over Super alone; time of {self.timed_rows} texts, "
            f"medians of {ROUNDS}, {self.threads} threads. kept: by Swift, at most {self.alpha:g} of all texts "
            f"kept and answered otherwise than by Super, except with probability {self.delta:g} over the draw of the "
            "held-out texts, for each line by itself. joint: Swift on all texts, Super on the others."
        )
        infeasible = [f"{s.layers} layers: {s.infeasible}." for s in self.students if s.infeasible is not None]
        return "\n".join([caption, *infeasible])


class _Held(NamedTuple):
    """Super and what it is asked on: the held-out texts."""

    model: Any
    texts: Encoded
    places: list[int]  # of the texts, among all
    key: str  # of Super and all texts
    logits: NDArray[np.float32]  # [N, C]
    flops: NDArray[np.int64]  # [N] each text at its own length


def distill(
    super_: str | Path,
    texts: Sequence[str | Sequence[str]],
    layers: Sequence[int],
    out: str | Path,
    *,
    epochs: int = 3,
    batch_size: int = 32,
    learning_rate: float = 2e-4,
    temperature: float = 2.0,
    max_length: int | None = None,
    alpha: float = 0.02,
    delta: float = 0.05,
    seed: int = 0,
    data: str = "texts",
) -> Distillation:
    """Make a Swift of Super's first k layers, for each k asked for, and measure what it gives up and saves.

    A student is Super without its upper layers: its embeddings, first k layers and head, all of them then trained on
    Super's answers to unlabelled texts (Hinton et al. 2015). To start from a part of the teacher's layers is as in
    DistilBERT (Sanh et al. 2019), that the first ones are the part as in Sajjad et al. 2020 (arXiv 2004.03844). Super
    is read and never changed. A tenth of the distinct texts, 2 000 at most, is held out: no student learns from it, and
    every figure is measured on it. Everything runs on the CPU, on the threads that torch has now.

    Written into `out`, each file and folder when it is complete: `swift-k` (model in Super's dtype with its labels, and
    tokenizer), `calibration-k.json` (of the pair, for a `JointClassifier`; where there is a threshold),
    `distillation.json`, and answers and times as safetensors. What is there already, of the same Super, texts and
    settings, is not made again; a student of others is replaced.

    Args:
        super_: folder or hub id of a fine-tuned sequence classifier.
        texts: N strings, or N pairs of them.
        layers: numbers k, each from 1 to one below Super's.
        temperature: of both models' answers in the loss.
        max_length: tokens after which a text is cut; None: as many as Super and its tokenizer take.
        alpha, delta: of `calibrate(..., agree=(alpha, delta))`, the threshold of each pair.
        seed: of the held-out share, the batches and dropout.
        data: what the texts are; recorded.

    Raises:
        ValueError: an argument that is not as described; a model that is no classifier, regression, multi-label or an
            encoder-decoder; a tokenizer without a padding token; fewer than 40 distinct texts; in `out`, a `swift-k`
            that is no student.
        TypeError: texts that are neither strings nor pairs.
    """
    _check(epochs, batch_size, learning_rate, temperature, alpha, delta)
    rows = as_texts(texts)
    lessons_at, held_out_at = split(rows, seed=seed)
    loaded = _load("super", str(super_), data)
    model, tokenizer = loaded.model, loaded.tokenizer
    depth, limit = _check_super(model, tokenizer, layers, max_length, pairs=len(rows[0]) == 2)
    folder = Path(out)
    made_of = {k: _made_of(folder / f"swift-{k}") for k in sorted(map(int, set(layers)))}

    def encoded(places: NDArray[np.int64]) -> Encoded:
        first, *second = zip(*(rows[i] for i in places), strict=True)
        return Encoded(tokenizer, first, limit, *second)

    folder.mkdir(parents=True, exist_ok=True)
    lessons, held_out = encoded(lessons_at), encoded(held_out_at)
    of_super, config = fingerprint(model), model.config.to_dict()
    for name in ("_name_or_path", "dtype", "torch_dtype", "transformers_version"):
        config.pop(name, None)
    told = json.dumps(config, sort_keys=True, default=str)
    key = key_of(of_super, str(model.dtype), told, lessons.sha256, held_out.sha256)

    def answers() -> Columns:
        with bar("Super: answering the texts to learn from") as report:
            taught = predict(model, lessons, report=report)
        with bar("Super: answering the held-out texts") as report:
            asked = predict(model, held_out, report=report)
        return {"lessons": taught, "held_out": asked, "flops": row_flops(model, held_out.lengths)}

    of_texts = kept(folder / f"super-{key}.safetensors", answers)
    held = _Held(model, held_out, held_out_at.tolist(), key, of_texts["held_out"], of_texts["flops"])
    provenance = Provenance(
        super=str(super_),
        super_sha256=of_super,
        data=data,
        data_sha256=sha256(json.dumps(rows).encode()).hexdigest(),
        dtype=str(model.dtype).removeprefix("torch."),
    )
    students = []
    for k, found in made_of.items():
        recipe = Recipe(k, epochs, batch_size, learning_rate, learning_rate, attention_dropout=None, seed=seed)
        wanted = key_of(key, temperature, asdict(recipe))
        if found != wanted:
            loss = distillation_loss(of_texts["lessons"], temperature)
            _teach(str(super_), lessons, loss, recipe, model.dtype, folder / f"swift-{k}", wanted)
        students.append(_measure(held, k, folder, alpha, delta, provenance))
    answered = held.logits.argmax(axis=1)
    distillation = Distillation(
        layers=depth,
        parameters=_parameters(model),
        most_frequent=float(np.bincount(answered).max() / len(answered)),
        n=len(held_out),
        n_lessons=len(lessons),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        temperature=temperature,
        max_length=limit,
        seed=seed,
        alpha=alpha,
        delta=delta,
        timed_rows=min(TIMED_ROWS, len(held_out)),
        threads=torch.get_num_threads(),
        students=tuple(students),
        provenance=provenance,
    )
    with published(folder / "distillation.json") as unfinished:
        distillation.save(unfinished)
    return distillation


def _check(epochs: int, batch_size: int, learning_rate: float, temperature: float, alpha: float, delta: float) -> None:
    checks.temperature(temperature)
    for name, count in (("epochs", epochs), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, wanted at least 1")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate: got {learning_rate}, wanted a finite number > 0")
    for name, probability in (("alpha", alpha), ("delta", delta)):
        if not 0 < probability < 1:
            raise ValueError(f"{name}: got {probability}, wanted a number in (0, 1)")


def _load(role: str, name: str, data: str) -> TaskModel:
    """A classifier, in eval mode, with its own labels."""
    return load_model(role, name, Task(data, texts=(), source_text="", labels=tuple(labels_of(role, name))))


def _check_super(
    model: Any, tokenizer: Any, layers: Sequence[int], max_length: int | None, pairs: bool
) -> tuple[int, int | None]:
    """How many layers Super has, and the tokens that a text is cut at."""
    depth = getattr(model.config, "num_hidden_layers", None)
    if not isinstance(depth, int) or model.config.is_encoder_decoder:
        raise ValueError(
            f"super: got a {type(model).__name__}, wanted one stack of layers, the number of which is its config's "
            "num_hidden_layers"
        )
    if not layers or not set(layers) <= set(range(1, depth)):
        raise ValueError(f"layers: got {list(layers)}, wanted numbers from 1 to {depth - 1}: Super has {depth}")
    longest, fewest = longest_input(tokenizer, model.config), 1 + tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length is not None and not fewest <= max_length <= (longest or math.inf):
        raise ValueError(f"max_length: got {max_length}, wanted {fewest} to {longest or math.inf} tokens")
    return depth, longest if max_length is None else max_length


def _teach(
    super_: str, lessons: Encoded, loss: Loss, recipe: Recipe, dtype: torch.dtype, folder: Path, key: str
) -> None:
    with torch.random.fork_rng(devices=[]), bar(f"Swift of {recipe.layers}: learning Super's answers") as report:
        model, tokenizer = first_layers(super_, recipe)
        fit(model, lessons, loss, recipe, report)
    with published(folder) as unfinished:
        model.to(dtype).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / MADE_OF).write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")


def _measure(held: _Held, k: int, folder: Path, alpha: float, delta: float, of_super: Provenance) -> Student:
    loaded = _load("swift", str(folder / f"swift-{k}"), str(of_super.data))
    swift, served = loaded.model, backend.served(loaded.op, "cpu").backend
    of_swift = fingerprint(swift)

    def answers() -> Columns:
        with bar(f"Swift of {k}: answering the held-out texts") as report:
            logits, scores = predict_scored(swift, held.texts, report=report)
        with bar(f"Swift of {k}: timing") as report:
            seconds = {f"seconds.{size}": _seconds(swift, held, size, report) for size in BATCH_SIZES}
        scored = {f"score.{name}": values for name, values in scores.items()}
        return {"logits": logits, **scored, "flops": row_flops(swift, held.texts.lengths), **seconds}

    key = key_of(held.key, of_swift, str(swift.dtype), served, torch.get_num_threads())
    ours = kept(folder / f"swift-{k}-{key}.safetensors", answers)
    differ = ours["logits"].argmax(axis=1) != held.logits.argmax(axis=1)
    n, super_flops = len(differ), held.flops.sum()
    lower, upper = wilson_interval((~differ).sum(), n, CONFIDENCE)
    file = folder / f"calibration-{k}.json"
    share = joint = infeasible = None
    try:
        calibration = calibrate(
            {name: ours[f"score.{name}"] for name in CLASSIFIER_SCORES},
            disagree=differ,
            agree=(alpha, delta),
            ids=held.places,
            confidence=CONFIDENCE,
            provenance=of_super.model_copy(
                update={"swift": str(folder / f"swift-{k}"), "swift_sha256": of_swift, "backend": served}
            ),
        )
    except InfeasibleTarget as error:
        infeasible = str(error)
        file.unlink(missing_ok=True)  # of another alpha, it would be taken for this one's
    else:
        with published(file) as unfinished:
            calibration.save(unfinished)
        values = ours[f"score.{calibration.score}"]
        sure = np.isfinite(values) & (values >= np.float32(calibration.threshold))
        share, joint = float(sure.mean()), float(super_flops / (ours["flops"].sum() + held.flops[~sure].sum()))
    return Student(
        layers=k,
        folder=f"swift-{k}",
        parameters=_parameters(swift),
        agreement=float((~differ).mean()),
        lower=float(lower),
        upper=float(upper),
        flops_speedup=float(super_flops / ours["flops"].sum()),
        time_speedup={size: float(np.divide(*ours[f"seconds.{size}"][::-1])) for size in BATCH_SIZES},
        calibration=None if infeasible is not None else file.name,
        share_kept=share,
        joint_flops_speedup=joint,
        infeasible=infeasible,
    )


@torch.inference_mode()
def _seconds(swift: Any, held: _Held, batch_size: int, report: Report) -> NDArray[np.float64]:  # [2]
    """Of Swift and of Super, in alternation, over texts evenly spread: the sum of each batch's median."""
    timed = np.linspace(0, len(held.texts) - 1, min(TIMED_ROWS, len(held.texts))).round().astype(np.int64)
    seconds = np.zeros(2)
    for start in range(0, len(timed), batch_size):
        batch = held.texts.batch(timed[start : start + batch_size])
        runs = {"Swift": partial(swift, **batch), "Super": partial(held.model, **batch)}
        seconds += list(medians(alternate(runs, ROUNDS)).values())
        report(min(start + batch_size, len(timed)), len(timed))
    return seconds


def _made_of(folder: Path) -> str | None:
    """The key of the student in this folder, None if there is no folder."""
    if not folder.exists():
        return None
    try:
        return str(json.loads((folder / MADE_OF).read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: got {folder}, which is no student of an earlier run, wanted another folder") from error


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f}M"
