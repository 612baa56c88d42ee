"""The folder of a run: what a report is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import ValidationError

from elang import __version__
from elang.calibration import Calibration
from elang.calibration.artefact import Artefact
from elang.evaluation.answered import FILE, AnsweredRows
from elang.evaluation.evaluation import Evaluation
from elang.evaluation.pair_bench import PairBench

Kind = TypeVar("Kind", bound=Artefact)
MODELS = ("swift_sha256", "super_sha256", "head_sha256")


class Run(NamedTuple):
    rows: AnsweredRows
    evaluation: Evaluation | None = None
    calibration: Calibration | None = None
    bench: PairBench | None = None


def load_run(folder: str | Path) -> Run:
    """`rows.json` of a folder and, where they are there, `evaluation.json`, `calibration.json` and `bench.json`.

    Raises:
        ValueError: no `rows.json`; a file that this version of elang did not write; one of other models, rows or
            scores than `rows.json`.
    """
    folder = Path(folder)
    rows = _load(AnsweredRows, folder / FILE)
    if rows is None:
        raise ValueError(f"{folder}: got no {FILE}, wanted the folder that `elang eval` wrote into")
    _check(folder / FILE, rows)
    run = Run(
        rows,
        _load(Evaluation, folder / "evaluation.json"),
        _load(Calibration, folder / "calibration.json"),
        _load(PairBench, folder / "bench.json"),
    )
    if (evaluation := run.evaluation) is not None:
        for field in ("task", "score", "temperature"):
            _same(folder / "evaluation.json", field, getattr(evaluation, field), getattr(rows, field))
        for field in (*MODELS, "data_sha256"):
            ours, theirs = getattr(evaluation.provenance, field), getattr(rows.provenance, field)
            _same(folder / "evaluation.json", field, ours, theirs)
    if run.calibration is not None:
        for field in MODELS:
            ours, theirs = getattr(run.calibration.provenance, field), getattr(rows.provenance, field)
            _same(folder / "calibration.json", field, ours, theirs)
    if run.bench is not None:
        for field in ("swift", "super"):
            _same(folder / "bench.json", field, getattr(run.bench, field), getattr(rows.provenance, field))
        costs = run.bench.costs
        if (least := min(costs.swift, costs.super[costs.rows])) <= 0:
            raise ValueError(f"{folder / 'bench.json'}: costs: got {least} for a whole batch, wanted more than 0")
    return run


def _load(kind: type[Kind], path: Path) -> Kind | None:
    if not path.exists():
        return None
    try:
        return kind.load(path)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path}: {place}: {first['msg']}; wanted what elang {__version__} writes") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got {error}; wanted what elang {__version__} writes") from error


def _check(path: Path, rows: AnsweredRows) -> None:
    """What a report cannot do without."""
    if not rows.id:
        raise ValueError(f"{path}: id: got 0 rows, wanted at least one")
    if not rows.thresholds:
        raise ValueError(f"{path}: thresholds: got none, wanted at least one")
    if not np.isfinite(rows.score_values(rows.score)).any():
        raise ValueError(f"{path}: scores.{rows.score}: got no finite value, wanted at least one")
    for name in ("swift_flops", "super_flops"):
        if (total := sum(getattr(rows, name))) <= 0:
            raise ValueError(f"{path}: {name}: got {total} in all, wanted more than 0")


def _same(path: Path, field: str, got: Any, wanted: Any) -> None:
    """A file without the field is taken at its word."""
    if got != wanted and got is not None and wanted is not None:
        raise ValueError(f"{path}: {field}: got {got}, wanted {wanted} as in {FILE}")
