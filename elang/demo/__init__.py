"""`elang demo`: a Swift in front of a Super on real text, trained here, calibrated, measured and explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import elang
from elang import backend
from elang.calibration import Calibration, InfeasibleTarget, calibrate
from elang.demo import report
from elang.demo.data import Dataset, movie_reviews, read_csv, save_csv
from elang.demo.measure import Answered, Point, Row, figures
from elang.demo.store import cache_folder
from elang.demo.train import MAX_LENGTH, Pair, train_pair
from elang.demo.workers import prepared
from elang.evaluation.predict import Encoded, label_columns, predict, predict_scored
from elang.fingerprint import fingerprint
from elang.progress import Report

KEPT = (0.5, 0.7, 0.8)
MAX_DROP = 0.01


def run(
    out: Path,
    csv: Path | None = None,
    swift: str | None = None,
    super_: str | None = None,
    console: Console | None = None,
) -> list[Row]:
    """The whole demo; prints the table and writes `calibration.json`, `curve.png` and the held-out rows into `out`.

    Sets torch to one thread, which every time is measured on.

    Args:
        csv: text,label rows in place of the movie reviews.
        swift, super_: folders or hub ids of fine-tuned sequence classifiers in place of a pair trained here: both or
            neither.

    Raises:
        ValueError: only one model given; models that disagree with each other or with the labels; a file as
            `read_csv` and `fetch` refuse it.
    """
    if (swift is None) != (super_ is None):
        raise ValueError("swift, super: got one of them, wanted both or neither")
    console = console or Console()
    with prepared(console) as progress:
        task = progress.add_task("data", total=None)
        dataset = movie_reviews(cache_folder()) if csv is None else read_csv(csv)
        progress.update(task, total=1, completed=1)
        if swift is not None and super_ is not None:
            pair = Pair(swift, super_)
        else:
            pair = train_pair(dataset, cache_folder(), progress)
        rows, calibration, chosen = _evaluate(dataset, pair, progress)

    out.mkdir(parents=True, exist_ok=True)
    file, figure = (out / "calibration.json").resolve(), (out / "curve.png").resolve()
    calibration.save(file)
    calibration.plot(figure)
    for name, part in (("calibration", dataset.calibration), ("test", dataset.test)):
        save_csv(out / f"{name}.csv", part, dataset.label_names)
    n_test = len(dataset.test.texts)
    title = f"{dataset.name}: {len(dataset.calibration.texts)} calibration and {n_test} test rows"
    console.print(report.table(rows, title))
    console.print(f"\n[bold]What does this mean?[/bold]\n{report.meaning(rows, calibration, n_test)}\n{chosen}")
    console.print(f"\n[bold]What next?[/bold]\nWritten: {file}, {figure}, calibration.csv and test.csv\n")
    console.print(report.next_steps(pair.swift, pair.super_, file), markup=False, highlight=False, soft_wrap=True)
    return rows


def _evaluate(dataset: Dataset, pair: Pair, progress: Progress) -> tuple[list[Row], Calibration, str]:
    """The table's rows, the calibration, and a sentence about how its point was chosen."""
    swift, super_ = (
        AutoModelForSequenceClassification.from_pretrained(name).eval() for name in (pair.swift, pair.super_)
    )
    tokenizer = _shared_tokenizer(pair)
    swift_columns, super_columns = (
        label_columns(name, model, dataset.label_names, "the data")
        for name, model in ((pair.swift, swift), (pair.super_, super_))
    )
    encoded, answered = {}, {}
    for name, part, known in (
        ("calibration", dataset.calibration, pair.calibration_logits),
        ("test", dataset.test, pair.test_logits),
    ):
        texts = encoded[name] = Encoded(tokenizer, part.texts, MAX_LENGTH)
        reporter = _reporter(progress, f"Swift: answering the {name} rows")
        swift_logits, scores = predict_scored(swift, texts, report=reporter)
        if known is None:
            known = predict(super_, texts, report=_reporter(progress, f"Super: answering the {name} rows"))
        answered[name] = Answered(
            swift_logits[:, swift_columns].argmax(axis=1) == part.labels,
            known[:, super_columns].argmax(axis=1) == part.labels,
            scores,
        )

    held = answered["calibration"]
    provenance = {
        "swift": pair.swift,
        "super": pair.super_,
        "swift_sha256": fingerprint(swift),
        "super_sha256": fingerprint(super_),
        "data": f"{dataset.name}, calibration rows",
        "data_sha256": dataset.sha256,
        "dtype": str(swift.dtype).removeprefix("torch."),
        "backend": backend.served("route", "cpu").backend,
        "library": elang.__version__,
    }

    def calibrated(**target: Any) -> Calibration:
        return calibrate(held.scores, held.swift_correct, held.super_correct, provenance=provenance, **target)

    try:
        calibration = calibrated(max_drop=MAX_DROP)
        chosen = f"calibrated: at most {100 * MAX_DROP:g} point below Super, proven"
    except InfeasibleTarget as error:
        calibration = calibrated()
        chosen = f"calibrated: best accuracy, since {error}"
    shares = [calibrated(score=calibration.score, swift_share=share) for share in KEPT]
    points = [Point(f"elang {share:.0%}", c.score, c.threshold) for share, c in zip(KEPT, shares, strict=True)]
    points.append(Point("elang cal.", calibration.score, calibration.threshold))
    timer = _reporter(progress, "wall-clock: all systems in alternation")
    rows = figures(swift, super_, encoded["test"], held, answered["test"], points, timer)
    return rows, calibration, f"{chosen}. {calibration.summary()}"


def _shared_tokenizer(pair: Pair) -> Any:
    tokenizer, other = (AutoTokenizer.from_pretrained(name) for name in (pair.super_, pair.swift))
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(
            "swift, super: their tokenizers differ, and the demo feeds both the same tokens: "
            "build the pair in code, with JointClassifier(..., super_inputs=...)"
        )
    if tokenizer.pad_token is None:
        raise ValueError(f"super: got a tokenizer without a padding token ({pair.super_}), wanted one")
    return tokenizer


def _reporter(progress: Progress, title: str) -> Report:
    task = progress.add_task(title, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)
