"""Unlabelled texts, or pairs of them: read from a file, taken once each, and a share of them held out."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elang.evaluation.loaders import jsonl

Text = tuple[str, ...]  # one, or two that are read as a pair

FIELDS = ("text", "text2")
HELD_OUT, MOST_HELD_OUT = 0.1, 2_000
SMALLEST = 40


def read_texts(path: str | Path, *, fewest: int = 1) -> list[Text]:
    """A text a line (.txt), or the columns (.csv, with a header) or fields (.jsonl) `text` and, for pairs, `text2`.

    UTF-8; empty lines are skipped, other columns and fields left alone.

    Raises:
        ValueError: another kind of file, less than `fewest` texts, or a line that has not what the first one has. The
            message names file and line.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: got a file named so, wanted one that ends in {', '.join(_READERS)}")
    try:
        texts = list(_READERS[path.suffix](path))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: got {error}, wanted {path.suffix} in UTF-8") from error
    if len(texts) < fewest:
        raise ValueError(f"{path}: got {len(texts)} texts, wanted at least {fewest}")
    return texts


def as_texts(texts: Sequence[str | Sequence[str]]) -> list[Text]:
    """Strings, or pairs of them, in one form.

    Raises:
        TypeError, ValueError: neither, or some of both.
    """
    same_form = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
    for place, text in enumerate(same_form):
        if not all(isinstance(part, str) for part in text):
            raise TypeError(f"texts[{place}]: got {text!r:.80}, wanted a str, or a pair of them")
        if len(text) != len(same_form[0]) or len(text) not in (1, 2):
            raise ValueError(f"texts[{place}]: got {len(text)} of them, wanted one everywhere or two everywhere")
    return same_form


def split(texts: Sequence[Text], *, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which texts to learn from and which to hold out: a tenth, 2 000 at most. Places in `texts`, shuffled.

    Texts that differ in case, spacing and punctuation only are one text: the first of them stays.

    Raises:
        ValueError: fewer than 40 distinct texts.
    """
    first = {tuple(map(normalised, text)): place for place, text in reversed(list(enumerate(texts)))}
    distinct = np.array(sorted(first.values()), dtype=np.int64)
    if len(distinct) < SMALLEST:
        raise ValueError(f"texts: got {len(distinct)} distinct ones, wanted at least {SMALLEST}")
    shuffled = np.random.default_rng(seed).permutation(distinct)
    held_out, lessons = np.split(shuffled, [min(MOST_HELD_OUT, int(HELD_OUT * len(distinct)))])
    return lessons, held_out


def normalised(text: str) -> str:
    """Words only, in one case; a text without words is itself."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _txt(path: Path) -> Iterator[Text]:
    lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not str.splitlines: texts hold what that splits at
    return ((line.removesuffix("\r"),) for line in lines if line.strip())


def _csv(path: Path) -> Iterator[Text]:
    def records(lines: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        reader = csv.DictReader(lines)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                wanted = len(reader.fieldnames or ())
                raise ValueError(f"{where}: got more than {wanted} values: a text with a comma in it wants quotes")
            yield where, row

    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _of_records(records(file))


def _of_records(records: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[Text]:
    wanted: list[str] = []
    for where, record in records:
        got = [name for name in FIELDS if name in record]
        wanted = wanted or got
        if FIELDS[0] not in got:
            raise ValueError(f"{where}: got the fields {', '.join(record) or '(none)'}, wanted {FIELDS[0]}")
        if got != wanted:
            raise ValueError(f"{where}: got {' and '.join(got)}, wanted {' and '.join(wanted)} as in the first one")
        for name in wanted:
            if not isinstance(record[name], str) or not record[name].strip():
                raise ValueError(f"{where}: got {record[name]!r:.40} as {name}, wanted a text")
        yield tuple(record[name] for name in wanted)


_READERS: dict[str, Callable[[Path], Iterator[Text]]] = {
    ".txt": _txt,
    ".csv": _csv,
    ".jsonl": lambda path: _of_records(jsonl()(path)),
}
