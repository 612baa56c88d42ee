"""The rows of a task, from a folder of the original files or by `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elang.evaluation.loaders import Record, from_hub
from elang.evaluation.records import stsb_class
from elang.evaluation.tasks import Files, Task, get_task


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows of a task: what models read and what is right."""

    ids: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]  # one or two each, for an encoder
    source_texts: tuple[str, ...]  # what a text-to-text model reads, in T5's form
    # Labels [N] int64, similarities [N] float64 (STS-B), or for each row the texts that are right (ReCoRD, WMT).
    targets: NDArray[np.int64] | NDArray[np.float64] | tuple[tuple[str, ...], ...]
    target_texts: tuple[str, ...]  # what a text-to-text model is to write; "" where T5 has nothing (WSC: another noun)
    groups: tuple[str, ...]  # rows that are judged as one have the same (MultiRC: the question); "" elsewhere
    candidates: tuple[tuple[str, ...], ...]  # COPA's two choices, ReCoRD's entities, WSC's noun; () elsewhere

    def __len__(self) -> int:
        return len(self.ids)


def load_task(name: str, split: str = "validation", data_dir: str | Path | None = None) -> Rows:
    """The rows of a split, in the order of the source.

    Args:
        name: a key of `TASKS`.
        split: "train" or "validation"; of WMT "validation" or "test".
        data_dir: the folder that the benchmark was unpacked to, such as one with `SST-2/dev.tsv` in it, or the folder
            of the task alone. Nothing else is read then. None takes the rows from `datasets` (extra `eval`).

    Raises:
        ValueError: no such task or split; a file is missing, empty or not in the format of its release; a label is
            unknown. The message names file and line.
        ImportError: `datasets` is needed and not installed.
        OSError: `datasets` has the rows neither in its cache nor from the Hub.
    """
    task = get_task(name)
    release = task.release
    assert release is not None, "every entry of TASKS has one"
    if split not in release.splits:
        raise ValueError(f"split: got {split!r}, wanted one of {', '.join(release.splits)} for {name}")
    hub_split, files = release.splits[split]
    if data_dir is None:
        return _rows(task, " ".join([*release.hub, hub_split]), from_hub(*release.hub, hub_split), task.labels)
    paths = _find(files, Path(data_dir))
    return _rows(task, str(paths[0]), release.read(*paths), task.written or task.labels)


class _Row(NamedTuple):
    """One row of `Rows`, or all of its columns."""

    id: Any
    texts: Any
    source_text: Any
    target: Any
    target_text: Any
    group: Any
    candidates: Any


def _find(files: Files, folder: Path) -> list[Path]:
    for names in files:
        for paths in ([folder / name for name in names], [folder / Path(name).name for name in names]):
            if all(path.is_file() for path in paths):
                return paths
    wanted = " or ".join(" and ".join(names) for names in files)
    raise ValueError(f"data_dir: got {folder}, wanted {wanted} in it, with or without the subfolder")


def _rows(task: Task, source: str, records: Iterator[tuple[str, Record]], written: tuple[Any, ...]) -> Rows:
    rows = []
    for where, record in records:
        try:
            rows.append(_row(task, record, written))
        except KeyError as error:
            raise ValueError(f"{where}: got no field {error}, wanted one") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not rows:
        raise ValueError(f"{source}: got no rows, wanted at least one")
    columns = _Row(*zip(*rows, strict=True))
    if task.labels:
        dtype = np.float64 if task.kind == "regression" else np.int64
        columns = columns._replace(target=np.array(columns.target, dtype=dtype))
    return Rows(*columns)


def _row(task: Task, record: Record, written: tuple[Any, ...]) -> _Row:
    if task.prepare is not None:
        record = task.prepare(record)
    target, target_text = _target(task, record, written)
    return _Row(
        str(record["idx"]),
        tuple(text.format_map(record) for text in task.texts),
        task.source_text.format_map(record),
        target,
        target_text,
        record.get("group", ""),
        record.get("candidates", ()),
    )


def _target(task: Task, record: Record, written: tuple[Any, ...]) -> tuple[Any, str]:
    """What is right, and as a text."""
    if not task.labels:
        references = record["references"]
        if not references:
            raise ValueError("answers: got none, wanted at least one")
        return references, references[0]
    label = record["label"]
    if task.kind == "regression":
        try:
            score = float(label)
        except ValueError as error:
            raise ValueError(f"score: got {label!r}, wanted a number from 0 to 5") from error
        return score, task.labels[stsb_class(score)]
    if label not in written:
        raise ValueError(f"label: got {label!r}, wanted one of {', '.join(map(repr, written))}")
    index = written.index(label)
    return index, (task.target_texts or task.labels)[index].format_map(record)
