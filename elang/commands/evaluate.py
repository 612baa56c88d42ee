"""`elang eval` and `elang calibrate`: a pair of sequence classifiers on the tasks of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from elang.commands.options import (
    AsJson,
    BatchSize,
    DataDir,
    Limit,
    Out,
    Super,
    Swift,
    Task,
    alpha_delta,
    number,
    one_line,
    positive,
    probability,
    share,
)

if TYPE_CHECKING:
    from elang.calibration import Calibration
    from elang.evaluation.run import Answers
    from elang.joint import JointClassifier


def eval_(
    task: Task,
    swift: Swift,
    super_: Super,
    data_dir: DataDir = None,
    split: Annotated[str, typer.Option(help="train or validation.")] = "validation",
    score: Annotated[str | None, typer.Option(help="What is compared with the threshold; energy by default.")] = None,
    temperature: Annotated[
        float | None, typer.Option(parser=positive, metavar="T", help="Of the score; 1 by default.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(parser=number, metavar="NUMBER", help="Swift keeps a row scored at least this.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Score, temperature and threshold, from `elang calibrate`."),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="21 thresholds: every 5 % of the rows kept.")] = False,
    limit: Limit = None,
    batch_size: BatchSize = 32,
    time: Annotated[
        bool, typer.Option("--time", help="Time the joint model against Super too, at batch size 1.")
    ] = False,
    out: Out = Path("eval_output"),
    as_json: AsJson = False,
) -> None:
    """The rows of the paper's table for your pair: quality, FLOPs and time, beside the published ones.

    Wants one of --threshold, --calibration and --sweep. A sweep picks its thresholds on the very rows that it is
    measured on. Writes evaluation.json and evaluation.csv into --out; a second run computes no answer again. Labels
    match by name; default ones (LABEL_0, ...) are taken in the task's order.

    The authors' SST-2 command: elang eval --task sst2 --swift ID --super ID --score energy_probs --threshold 1.31044
    """
    given = {"--threshold": threshold is not None, "--calibration": calibration is not None, "--sweep": sweep}
    if sum(given.values()) != 1:
        got = ", ".join(name for name in given if given[name]) or "none"
        raise typer.BadParameter(f"got {got}, wanted exactly one of {', '.join(given)}")
    if calibration is not None and (score is not None or temperature is not None):
        raise typer.BadParameter("--score, --temperature: got one beside --calibration, which has both")
    _check_usage(task, split, score)
    with one_line("elang eval"):
        from elang.calibration import Calibration
        from elang.evaluation import run

        of_file = None if calibration is None else Calibration.load(calibration)
        if of_file is not None:
            score, temperature, threshold = of_file.score, of_file.temperature, of_file.threshold
        score, temperature = score or "energy", 1.0 if temperature is None else temperature
        pair, answers = _answer(task, swift, super_, data_dir, split, limit, batch_size, out, temperature, of_file)
        thresholds = run.sweep(answers.scores[score]) if threshold is None else [threshold]
        timing = None
        if time:
            joints = [_joined(pair, answers, score, threshold) for threshold in thresholds]
            timing = run.time_task(pair.swift, pair.super, joints, answers, pair.tokenizers)
        evaluation = run.measure(answers, score, thresholds, timing)
        evaluation.save(out / "evaluation.json")
        (out / "evaluation.csv").write_text(evaluation.csv(), encoding="utf-8", newline="")
        if of_file is not None and of_file.provenance.data_sha256 == answers.provenance.data_sha256:
            typer.echo("The calibration was made on these very rows: expect less on others.", err=True)
        if as_json:
            typer.echo(evaluation.model_dump_json(indent=2))
            return
        from rich.console import Console

        Console().print(evaluation.table())
        typer.echo(f"Written: {out / 'evaluation.json'} and {out / 'evaluation.csv'}")


def calibrate(
    task: Task,
    swift: Swift,
    super_: Super,
    output: Annotated[Path, typer.Option("-o", "--output", dir_okay=False, help="The calibration, as JSON.")],
    data_dir: DataDir = None,
    split: Annotated[
        str, typer.Option(help="train or validation: rows that neither model was trained on, nor will be judged by.")
    ] = "validation",
    limit: Limit = None,
    score: Annotated[
        str, typer.Option(help="What is compared with the threshold; auto picks it on one half of the rows.")
    ] = "auto",
    swift_share: Annotated[
        float | None, typer.Option(parser=share, metavar="SHARE", help="Keep this share of the rows with Swift.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(parser=probability, metavar="DROP", help="Lose at most this accuracy to Super, proven at 95 %."),
    ] = None,
    agree: Annotated[
        Any,
        typer.Option(
            parser=alpha_delta,
            metavar="ALPHA,DELTA",
            help="At most this share of all rows is kept and answered otherwise than by Super, except with "
            "probability DELTA.",
        ),
    ] = None,
    selective_error: Annotated[
        Any,
        typer.Option(
            parser=alpha_delta,
            metavar="ALPHA,DELTA",
            help="At most this share of the kept rows is wrong, except with probability DELTA.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="The curve, such as curve.png.")] = None,
    batch_size: BatchSize = 32,
    out: Out = Path("eval_output"),
    as_json: AsJson = False,
) -> None:
    """Choose the threshold of a pair on rows of a task, and say what it means there.

    Wants at most one of --swift-share, --max-drop, --agree and --selective-error; without one the threshold is the one
    of best accuracy. Exit code 3: no threshold meets the target, and the message says what might do.

    Example: elang calibrate --task sst2 --swift ID --super ID --max-drop 0.01 -o calibration.json --plot curve.png
    """
    targets = {
        "swift_share": swift_share,
        "max_drop": max_drop,
        "agree": agree,
        "selective_error": selective_error,
    }
    asked = [name for name, value in targets.items() if value is not None]
    if len(asked) > 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise typer.BadParameter(f"{names}: got {len(asked)} targets, wanted at most one")
    _check_usage(task, split, None if score == "auto" else score)
    with one_line("elang calibrate"):
        from elang import calibration

        for path in filter(None, (output, plot)):
            path.parent.mkdir(parents=True, exist_ok=True)
        _, answers = _answer(task, swift, super_, data_dir, split, limit, batch_size, out, 1.0, None)
        chosen = calibration.calibrate(
            answers.scores,
            answers.swift == answers.rows.targets,
            answers.super == answers.rows.targets,
            score=score,
            disagree=answers.swift != answers.super,
            ids=answers.rows.ids,
            provenance=answers.provenance,
            **targets,
        )
        chosen.save(output)
        if plot is not None:
            chosen.plot(plot)
        typer.echo(chosen.model_dump_json(indent=2) if as_json else chosen.summary())


class _Pair(NamedTuple):
    swift: Any
    super: Any
    tokenizers: tuple[Any, Any]


def _answer(
    task: str,
    swift: str,
    super_: str,
    data_dir: Path | None,
    split: str,
    limit: int | None,
    batch_size: int,
    out: Path,
    temperature: float,
    calibration: Calibration | None,
) -> tuple[_Pair, Answers]:
    """The models and what they answer; what can be refused early is. A calibration has to be of these weights."""
    from transformers.utils import logging

    from elang.contract import check_weights
    from elang.evaluation import run
    from elang.evaluation.rows import load_task

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    run.classification_task(task)
    rows = run.first_rows(load_task(task, split, data_dir), limit)
    (first, of_first), (second, of_second) = run.load_classifier("swift", swift), run.load_classifier("super", super_)
    if calibration is not None:
        check_weights(calibration.provenance, first, second)
    pair = _Pair(first, second, (of_first, of_second))
    data = f"{task}, {split}" + (f", first {len(rows)} rows" if limit is not None else "")
    answers = run.answer_task(
        *pair[:2], rows, pair.tokenizers, out, task=task, data=data, temperature=temperature, batch_size=batch_size
    )
    return pair, answers


def _joined(pair: _Pair, answers: Answers, score: str, threshold: float) -> JointClassifier:
    from elang.evaluation.run import columns_for
    from elang.joint import JointClassifier
    from elang.router import Router

    labels = (columns_for(role, m, answers.task) for role, m in (("swift", pair.swift), ("super", pair.super)))
    router = Router(score, threshold=threshold, temperature=answers.temperature)
    return JointClassifier(pair.swift, pair.super, router, label_map=dict(zip(*labels, strict=True)))


def _check_usage(task: str, split: str, score: str | None) -> None:
    """Names that do not exist are wrong usage."""
    from elang.evaluation.predict import CLASSIFIER_SCORES
    from elang.evaluation.tasks import TASKS

    known = TASKS.get(task)
    for option, got, wanted in (
        ("--task", task, tuple(TASKS)),
        ("--split", split, tuple(known.splits) if known else (split,)),
        ("--score", score or CLASSIFIER_SCORES[0], CLASSIFIER_SCORES),
    ):
        if got not in wanted:
            raise typer.BadParameter(f"{option}: got {got!r}, wanted one of {', '.join(wanted)}")
