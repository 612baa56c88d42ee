"""The user's own rows, from a file, as a task of classification."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from elang.evaluation.rows import Rows
from elang.evaluation.tasks import Task

TEXT, SECOND_TEXT, LABEL = "text", "text2", "label"
NO_LABEL = -1


def read_rows(path: str | Path, labels: Sequence[str]) -> tuple[Task, Rows]:
    """A UTF-8 file of comma-separated values with the columns `text`, `label` and, where two are read, `text2`.

    Without the column `label` the targets are `NO_LABEL`: what can be judged then is whether two models agree.

    Args:
        labels: of the models, in their order: each row's is one of them, whatever its case. Default ones (LABEL_0, ...)
            stand for those of the file, sorted.

    Raises:
        ValueError: a column or a value is missing, there are no rows, a label is not one of the models'.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            if TEXT not in columns:
                raise ValueError(f"{path}: got the columns {', '.join(columns) or '(none)'}, wanted {TEXT} and {LABEL}")
            named = [name for name in (TEXT, SECOND_TEXT, LABEL) if name in columns]
            rows = [(reader.line_num, {name: (row[name] or "").strip() for name in named}) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}; wanted comma-separated values in UTF-8") from error
    if not rows:
        raise ValueError(f"{path}: got no rows, wanted at least one")
    for line, row in rows:
        if missing := [name for name in named if not row[name]]:
            raise ValueError(f"{path}, line {line}: got no {missing[0]}, wanted one")
    if not labels or all(name.casefold() == f"label_{i}" for i, name in enumerate(labels)):
        labels = sorted({row[LABEL] for _, row in rows}) if LABEL in named else labels
    known = {name.casefold(): i for i, name in enumerate(labels)}
    for line, row in rows:
        if LABEL in named and row[LABEL].casefold() not in known:
            raise ValueError(f"{path}, line {line}: got the label {row[LABEL]!r}, wanted one of {', '.join(labels)}")
    targets = [known[row[LABEL].casefold()] if LABEL in named else NO_LABEL for _, row in rows]
    task = Task(path.name, texts=(), source_text="", labels=tuple(labels))
    n = len(rows)
    texts = tuple(tuple(row[name] for name in named if name != LABEL) for _, row in rows)
    ids = tuple(f"line {line}" for line, _ in rows)
    nothing = ("",) * n
    return task, Rows(ids, texts, nothing, np.array(targets, dtype=np.int64), nothing, nothing, ((),) * n)
