"""What a pair of models makes of the rows of a task: computed once, kept, looked at under any threshold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from elang import backend, checks
from elang.calibration import BatchCosts, Provenance
from elang.evaluation.answered import AnsweredRows
from elang.evaluation.metrics import Values, judge, right
from elang.evaluation.predict import Encoded, scored_name
from elang.evaluation.records import stsb_class
from elang.evaluation.rows import Rows
from elang.evaluation.task_model import Columns, TaskModel
from elang.evaluation.tasks import Task
from elang.fingerprint import fingerprint
from elang.progress import bar

Bools = NDArray[np.bool_]
Flops = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What both models make of N rows of a task."""

    task: Task
    rows: Rows
    swift: Values  # [N] as the metrics read them: labels in the task's order, similarities or texts
    super: Values
    scores: Mapping[str, NDArray[np.float32]]  # each [N], Swift's; "NAME@T" at another temperature
    temperature: float  # of the scores that are named plainly
    swift_flops: Flops  # [N] each row at its own length
    gate_flops: Mapping[str, Flops]  # [N] by score: spent on a row before it is routed
    super_flops: Flops
    provenance: Provenance

    def kept(self, score: str, threshold: float) -> Bools:  # [N]
        values = self.scores[score]
        return np.isfinite(values) & (values >= np.float32(threshold))

    def joined(self, kept: Bools) -> Values:
        """The joint model's answers [N]."""
        return np.where(kept, self.swift, self.super)

    def flops(self, score: str, kept: Bools) -> int:
        """Of the joint model, over all rows."""
        return int(np.where(kept, self.swift_flops, self.gate_flops[score] + self.super_flops).sum())

    def quality(self, values: Values) -> dict[str, float]:
        return judge(self.task, values, self.rows)

    @property
    def swift_right(self) -> Bools | None:  # [N]
        """None where nothing says what is right for a row: translations, similarities, rows without labels."""
        return self._right(self.swift)

    @property
    def super_right(self) -> Bools | None:
        return self._right(self.super)

    @property
    def disagree(self) -> Bools:  # [N]
        """Whether the answers differ; similarities, by T5's classes of them."""
        if self.task.kind == "regression":
            a, b = (np.array([stsb_class(v) for v in np.clip(x, 0, 5)]) for x in (self.swift, self.super))
            return np.asarray(a != b)
        return np.asarray(self.swift != self.super)

    def row_costs(self) -> BatchCosts:
        """In FLOPs: the mean of each model over the rows.

        Raises:
            ValueError: a score of an energy head is among them, for which what a row costs is not a sum of the two.
        """
        if any(self.gate_flops[name] is not self.swift_flops for name in self.scores):
            raise ValueError("costs: got an energy head's scores, wanted none: `calibrate_gates` knows what they save")
        swift, super_ = float(self.swift_flops.mean()), float(self.super_flops.mean())
        return BatchCosts(unit="FLOPs", rows=1, swift=swift, super={1: super_})

    def record(self, command: Sequence[str], score: str, thresholds: Sequence[float]) -> AnsweredRows:
        """For a report: what was answered, row by row."""
        swift, super_ = self.swift_right, self.super_right
        judged = swift is not None and super_ is not None
        return AnsweredRows(
            command=tuple(command),
            task=self.task.name,
            kind=self.task.kind,
            labels=self.task.labels if self.task.kind == "classification" else (),
            score=score,
            temperature=self.temperature,
            thresholds=tuple(thresholds),
            id=self.rows.ids,
            text=tuple(" | ".join(texts) for texts in self.rows.texts),
            target=tuple(map(self._target, self.rows.targets)),
            swift=tuple(map(self._text, self.swift)),
            super=tuple(map(self._text, self.super)),
            swift_right=_listed(swift if judged else ~self.disagree),
            super_right=_listed(super_ if judged else np.ones_like(self.disagree)),
            judged_by="target" if judged else "super",
            scores={n: tuple(x if np.isfinite(x) else None for x in v.tolist()) for n, v in self.scores.items()},
            swift_flops=_listed(self.swift_flops),
            gate_flops={name: _listed(flops) for name, flops in self.gate_flops.items()},
            super_flops=_listed(self.super_flops),
            provenance=self.provenance,
        )

    def _right(self, values: Values) -> Bools | None:
        labelled = isinstance(self.rows.targets, tuple) or not (np.asarray(self.rows.targets) < 0).any()
        return right(self.task, values, self.rows) if labelled else None

    def _text(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        if self.task.kind == "regression":
            return f"{value:.2f}"
        return self.task.labels[value] if value >= 0 else "(none)"

    def _target(self, target: Any) -> str:
        return " / ".join(target) if isinstance(target, tuple) else self._text(target)


def answer_task(
    swift: TaskModel,
    super_: TaskModel,
    rows: Rows,
    out: str | Path,
    *,
    data: str | None = None,
    temperatures: Sequence[float] = (1.0,),
    batch_size: int = 32,
) -> Answers:
    """What a pair answers, with every score of Swift from the op that serves, on the devices that the models are on.

    Answers, scores and FLOPs are kept in `out`, in one file of each model. It is written when it is complete, so that
    an interrupted run goes on with the model it was at, and found again for the same weights, config, tokens, dtype and
    batch size; Swift's for the same temperatures, energy head and backend too.

    Args:
        swift, super_: of one task.
        data: what the rows are; recorded. None: the name of the task.
        temperatures: of the scores; the first is that of those that are named plainly.

    Raises:
        ValueError: models on different tasks; a temperature that is not finite or not > 0.
    """
    if swift.task is not super_.task:
        raise ValueError(f"super_: got a model on {super_.task.name}, wanted {swift.task.name} as swift")
    for temperature in temperatures:
        checks.temperature(temperature)
    texts = swift.encode(rows), super_.encode(rows)
    served = backend.served(swift.op, swift.model.device.type).backend
    sha256 = fingerprint(swift.model), fingerprint(super_.model)
    folder = Path(out)

    def of_swift() -> Columns:
        with bar("Swift: answering") as report:
            return swift.answer_scored(rows, texts[0], temperatures, batch_size, report)

    settings = [sha256[0], batch_size, list(temperatures), served]
    ours = _stored(folder, swift, rows, texts[0], settings, of_swift)
    theirs = _answered(folder, super_, rows, texts[1], sha256[1], batch_size)
    names = [scored_name(name, t, temperatures) for t in temperatures for name in swift.scores]
    scores = {name: ours[f"score.{name}"] for name in names if f"score.{name}" in ours}  # a late score has no T
    content = json.dumps([rows.texts, np.asarray(rows.targets, dtype=object).tolist()])
    return Answers(
        task=swift.task,
        rows=rows,
        swift=swift.values(rows, ours),
        super=super_.values(rows, theirs),
        scores=scores,
        temperature=float(temperatures[0]),
        swift_flops=ours["flops"],
        gate_flops={name: ours.get(f"gate_flops.{name}", ours["flops"]) for name in scores},
        super_flops=theirs["flops"],
        provenance=Provenance(
            swift=swift.model.name_or_path,
            super=super_.model.name_or_path,
            swift_sha256=sha256[0],
            super_sha256=sha256[1],
            head_sha256=swift.head_sha256,
            data=data or swift.task.name,
            data_sha256=hashlib.sha256(content.encode()).hexdigest(),
            dtype=str(swift.model.dtype).removeprefix("torch."),
            backend=served,
        ),
    )


def right_of(model: TaskModel, rows: Rows, out: str | Path, batch_size: int = 32) -> Bools | None:
    """Whether a model answers each row rightly, [N]; None where the task judges no row by itself. Kept in `out`."""
    columns = _answered(Path(out), model, rows, model.encode(rows), fingerprint(model.model), batch_size)
    return right(model.task, model.values(rows, columns), rows)


def _answered(folder: Path, of: TaskModel, rows: Rows, texts: Encoded, sha256: str, batch_size: int) -> Columns:
    def compute() -> Columns:
        with bar(f"{of.role.capitalize()}: answering") as report:
            return of.answer(rows, texts, batch_size, report)

    return _stored(folder, of, rows, texts, [sha256, batch_size], compute)


def _stored(
    folder: Path, of: TaskModel, rows: Rows, texts: Encoded, settings: list[Any], compute: Callable[[], Columns]
) -> Columns:
    config = {name: v for name, v in of.model.config.to_dict().items() if name not in ("_name_or_path", "dtype")}
    made_of = [*settings, *of.settings(rows), str(of.model.dtype), of.model.device.type, config, texts.sha256]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"answers-{key}.safetensors"
    if not path.exists():
        unfinished = folder / f"{path.name}.{os.getpid()}"
        try:
            save_file({name: np.ascontiguousarray(column) for name, column in compute().items()}, unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return load_file(path)


def _listed(values: Any) -> tuple[Any, ...]:
    return tuple(values.tolist())
