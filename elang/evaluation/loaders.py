"""The formats that GLUE, SuperGLUE and WMT were released in, and `datasets`: both give the same records.

A reader takes the files of a split and yields every record with the place it was read from, for messages.
"""

from __future__ import annotations

import html
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Reader = Callable[..., Iterator[tuple[str, Record]]]

# No XML or HTML parser reads WMT's files as they are meant: bare ampersands and angle brackets occur in the text.
_DOC_OR_SEG = re.compile(
    r"<doc\b(?P<doc>[^>]*)>|<seg\b(?P<seg>[^>]*)>(?P<text>.*?)(?=</seg\b|<seg\b|</doc\b|\Z)", re.DOTALL | re.IGNORECASE
)


def eval_library(module: str, purpose: str) -> Any:
    """A library of the extra `eval`, imported where it is first needed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module.split('.')[0]}: pip install 'elang[eval]'") from error


def tsv(*, header: Sequence[str] = (), torn_lines: bool = False, **columns: str) -> Reader:
    """Tab-separated values in which a quote is a character like any other. Empty lines are skipped.

    Args:
        header: names of all columns, for a file that does not start with them.
        torn_lines: the released file has lines with too few or too many fields; they are left out with a warning
            instead of refused.
        columns: each field of a record and the column that it is read from; `idx` is the number of the row.
    """

    def read(path: Path) -> Iterator[tuple[str, Record]]:
        lines = ((number, line.split("\t")) for number, line in enumerate(_lines(path), 1) if line.strip())
        names = list(header) or next(lines, (0, []))[1]
        missing = [column for column in columns.values() if names and column not in names]
        if missing:
            raise ValueError(f"{path}: got the columns {', '.join(names)}, wanted also {', '.join(missing)}")
        torn = []
        for row, (number, values) in enumerate(lines):
            if len(values) == len(names):
                by_name = dict(zip(names, values, strict=True))
                record = {field: by_name[column] for field, column in columns.items()}
                yield f"{path}, line {number}", {**record, "idx": row}
            elif torn_lines:
                torn.append(number)
            else:
                raise ValueError(f"{path}, line {number}: got {len(values)} fields, wanted {len(names)}")
        if torn:
            warnings.warn(
                f"{path}: left out {len(torn)} lines without {len(names)} fields, the first being line {torn[0]}",
                stacklevel=4,  # at the caller of load_task
            )

    return read


def jsonl(flat: Callable[[Record], Iterable[Record]] = lambda record: (record,)) -> Reader:
    """One JSON object a line, empty lines skipped; `flat` makes one or several records of it."""

    def read(path: Path) -> Iterator[tuple[str, Record]]:
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: got {error}, wanted a JSON object") from error
            if not isinstance(value, dict):
                raise ValueError(f"{where}: got {line.strip()[:40]}, wanted a JSON object")
            try:
                records = list(flat(value))
            except KeyError as error:
                raise ValueError(f"{where}: got no field {error}, wanted one") from error
            yield from ((where, record) for record in records)

    return read


def parallel(source: str, target: str) -> Reader:
    """A text and its translation, segment by segment: two `.sgm` files, or two of plain text with a segment a line.

    In plain text an empty line is a segment too: the files are aligned by their lines.

    Args:
        source, target: the languages, such as "en" and "de".
    """

    def read(source_path: Path, target_path: Path) -> Iterator[tuple[str, Record]]:
        sources, targets = _segments(source_path), _segments(target_path)
        if len(sources) != len(targets):
            raise ValueError(
                f"{target_path}: got {len(targets)} segments, wanted {len(sources)}, as many as {source_path} has"
            )
        for (name, text), (_, translation) in zip(sources, targets, strict=True):
            record = {"translation": {source: text, target: translation}, "idx": name}
            yield f"{source_path}, segment {name}", record

    return read


def from_hub(path: str, config: str, split: str) -> Iterator[tuple[str, Record]]:
    """The records of a split by `datasets`, from its cache or the Hub, every label by its name (None: unknown)."""
    datasets = eval_library("datasets", "load_task without data_dir")
    try:
        rows = datasets.load_dataset(path, config, split=split)
    except OSError as error:
        raise OSError(
            f"{path} {config}: {error}; without a network, pass data_dir=, the folder of the original files"
        ) from error
    names = getattr(rows.features.get("label"), "names", None)
    for number, row in enumerate(rows):
        record = {"idx": number, **row}
        if names is not None:
            record["label"] = names[row["label"]] if row["label"] >= 0 else None
        yield f"{path} {config} {split}, row {number}", record


def _lines(path: Path) -> list[str]:
    """Split at line feeds alone: sentences hold other characters that `str.splitlines` takes for the end of a line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got {error}, wanted UTF-8") from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _segments(path: Path) -> list[tuple[str, str]]:
    """Name and text of each segment."""
    lines = _lines(path)
    if path.suffix != ".sgm":
        return [(str(number), line) for number, line in enumerate(lines)]
    document, segments = "", []
    for tag in _DOC_OR_SEG.finditer("\n".join(lines)):
        if tag["text"] is None:
            document = _attribute("docid", tag["doc"])
        else:
            text = re.sub(r"&#?\w+;", lambda reference: html.unescape(reference[0]), tag["text"])
            segments.append((f"{document}:{_attribute('id', tag['seg'])}", re.sub(r"\s*\n\s*", " ", text.strip())))
    return segments


def _attribute(name: str, tag: str) -> str:
    value = re.search(rf"""\b{name}\s*=\s*["']?([^"'>]*)""", tag, re.IGNORECASE)
    return value[1].strip() if value else ""
