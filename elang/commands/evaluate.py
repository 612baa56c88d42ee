"""`elang eval` and `elang calibrate`: a pair of models on the tasks of the paper, or on the user's own rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from elang.commands.options import (
    AsJson,
    BatchSize,
    Csv,
    DataDir,
    Device,
    Head,
    Limit,
    Out,
    Split,
    Super,
    Swift,
    Task,
    alpha_delta,
    number,
    one_line,
    positive,
    positives,
    probability,
    share,
    typed,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from elang.calibration import BatchCosts, Calibration
    from elang.evaluation import tasks
    from elang.evaluation.answers import Answers
    from elang.evaluation.rows import Rows
    from elang.evaluation.task_model import TaskModel

SPLIT = "validation"


def eval_(
    context: typer.Context,
    swift: Swift,
    super_: Super,
    task: Task = None,
    csv: Csv = None,
    data_dir: DataDir = None,
    split: Split = None,
    head: Head = None,
    score: Annotated[
        str | None, typer.Option(help="What is compared with the threshold; by default energy, or that of a head.")
    ] = None,
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
    device: Device = None,
    time: Annotated[
        bool, typer.Option("--time", help="Time the joint model against Super too, at batch size 1.")
    ] = False,
    out: Out = Path("eval_output"),
    as_json: AsJson = False,
) -> None:
    """The rows of the paper's table for your pair: quality, FLOPs and time, beside the published ones.

    Wants one of --task and --csv, and one of --threshold, --calibration and --sweep. A sweep picks its thresholds on
    the very rows that it is measured on. Writes evaluation.json, evaluation.csv and rows.json, all that `elang report`
    shows, into --out; a second run computes no answer again. Classifiers answer tasks of classification, and STS-B in
    its classes; models for multiple choice COPA and ReCoRD; T5 every task, greedily; other encoder-decoders WMT. Labels
    match by name; default ones (LABEL_0, ...) are taken in the task's order.

    The authors' SST-2 command: elang eval --task sst2 --swift ID --super ID --score energy_probs --threshold 1.31044
    """
    given = {"--threshold": threshold is not None, "--calibration": calibration is not None, "--sweep": sweep}
    if sum(given.values()) != 1:
        got = ", ".join(name for name in given if given[name]) or "none"
        raise typer.BadParameter(f"got {got}, wanted exactly one of {', '.join(given)}")
    if calibration is not None and (score is not None or temperature is not None):
        raise typer.BadParameter("--score, --temperature: got one beside --calibration, which has both")
    _check_usage(task, csv, data_dir, split, score)
    with one_line("elang eval"):
        from elang.calibration import Calibration
        from elang.evaluation import run
        from elang.evaluation.answered import FILE
        from elang.evaluation.own_rows import NO_LABEL

        of_file = None if calibration is None else Calibration.load(calibration)
        if of_file is not None:
            score, temperature, threshold = of_file.score, of_file.temperature, of_file.threshold
        source = _source(task, csv, data_dir, split, swift, limit)
        if csv is not None and NO_LABEL in source.rows.targets:
            raise ValueError(f"{csv}: got no column label, wanted one: `elang calibrate --agree` does without")
        pair = _load(source, swift, super_, head, device, of_file)
        answers = _answer(pair, source, out, (1.0 if temperature is None else temperature,), batch_size)
        score = score or pair[0].scores[0]
        if score not in answers.scores:
            raise ValueError(f"score: got {score!r}, wanted one of {', '.join(answers.scores)}")
        thresholds = run.sweep(answers.scores[score]) if threshold is None else [threshold]
        timing = run.time_task(*pair, score, thresholds, answers) if time else None
        evaluation = run.measure(answers, score, thresholds, timing)
        evaluation.save(out / "evaluation.json")
        (out / "evaluation.csv").write_text(evaluation.csv(), encoding="utf-8", newline="")
        answers.record(typed(context), score, thresholds).save(out / FILE)
        if of_file is not None and of_file.provenance.data_sha256 == answers.provenance.data_sha256:
            typer.echo("The calibration was made on these very rows: expect less on others.", err=True)
        if as_json:
            typer.echo(evaluation.model_dump_json(indent=2))
            return
        from rich.console import Console

        Console().print(evaluation.table())
        typer.echo(f"Written: {out / 'evaluation.json'}, {out / 'evaluation.csv'} and {out / FILE}")
        typer.echo(f"To look at: elang report {out}")


def calibrate(
    swift: Swift,
    super_: Super,
    task: Task = None,
    csv: Csv = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", dir_okay=False, help="The calibration; by default calibration.json in --out."),
    ] = None,
    data_dir: DataDir = None,
    split: Annotated[
        str | None,
        typer.Option(help="train or validation: rows that neither model was trained on, nor will be judged by."),
    ] = None,
    limit: Limit = None,
    head: Head = None,
    score: Annotated[
        str, typer.Option(help="What is compared with the threshold; auto picks it on one half of the rows.")
    ] = "auto",
    temperatures: Annotated[
        Any,
        typer.Option(parser=positives, metavar="T,...", help="Each score is considered at each of them; 1 by default."),
    ] = None,
    swift_share: Annotated[
        float | None, typer.Option(parser=share, metavar="SHARE", help="Keep this share of the rows with Swift.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(parser=probability, metavar="DROP", help="Lose at most this accuracy to Super, proven at 95 %."),
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(
            parser=positive, metavar="COST", help="The best accuracy at this mean cost of a row; see --costs."
        ),
    ] = None,
    costs: Annotated[
        str | None,
        typer.Option(help="What rows cost: flops, or the file of `elang bench` (seconds) or of your own prices."),
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
    device: Device = None,
    out: Out = Path("eval_output"),
    as_json: AsJson = False,
) -> None:
    """Choose the threshold of a pair on rows of a task or your own, and say what it means there.

    Wants one of --task and --csv, and at most one of --swift-share, --max-drop, --max-cost, --agree and
    --selective-error; without one the threshold is the one of best accuracy. Rows that nothing judges one by one (no
    labels, translations, similarities) are judged by whether Swift answers as Super does. Exit code 3: no threshold
    meets the target, and the message says what might do.

    Example: elang calibrate --task sst2 --swift ID --super ID --max-drop 0.01 -o calibration.json --plot curve.png
    """
    targets = {
        "swift_share": swift_share,
        "max_drop": max_drop,
        "max_cost": max_cost,
        "agree": agree,
        "selective_error": selective_error,
    }
    asked = [name for name, value in targets.items() if value is not None]
    if len(asked) > 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise typer.BadParameter(f"{names}: got {len(asked)} targets, wanted at most one")
    if (max_cost is None) != (costs is None):
        raise typer.BadParameter("--max-cost, --costs: got one of them, wanted both or neither")
    _check_usage(task, csv, data_dir, split, None if score == "auto" else score)
    with one_line("elang calibrate"):
        from elang import calibration

        output = output or out / "calibration.json"
        for path in filter(None, (output, plot)):
            path.parent.mkdir(parents=True, exist_ok=True)
        source = _source(task, csv, data_dir, split, swift, limit)
        pair = _load(source, swift, super_, head, device, None)
        answers = _answer(pair, source, out, temperatures or (1.0,), batch_size)
        if answers.swift_right is None and selective_error is not None:
            raise ValueError(f"selective_error: got rows that nothing judges one by one ({source.data}), wanted others")
        chosen = calibration.calibrate(
            answers.scores,
            answers.swift_right,
            answers.super_right,
            score=score,
            costs=None if costs is None else _costs(costs, answers),
            disagree=answers.disagree,
            ids=answers.rows.ids,
            temperature=answers.temperature,
            provenance=answers.provenance,
            **targets,
        )
        chosen.save(output)
        if plot is not None:
            chosen.plot(plot)
        typer.echo(chosen.model_dump_json(indent=2) if as_json else chosen.summary())


class _Source(NamedTuple):
    task: tasks.Task
    rows: Rows
    data: str  # what the rows are


def _source(
    task: str | None, csv: Path | None, data_dir: Path | None, split: str | None, swift: str, limit: int | None
) -> _Source:
    from elang.evaluation import own_rows, run
    from elang.evaluation.rows import load_task
    from elang.evaluation.tasks import get_task

    if csv is not None:
        known, rows = own_rows.read_rows(csv, run.labels_of("swift", swift))
        data = csv.name
    else:
        assert task is not None, "_check_usage has seen to it"
        known, rows = get_task(task), load_task(task, split or SPLIT, data_dir)
        data = f"{task}, {split or SPLIT}"
    rows = run.first_rows(rows, limit)
    return _Source(known, rows, data + (f", first {len(rows)} rows" if limit is not None else ""))


def _load(
    source: _Source, swift: str, super_: str, head: Path | None, device: str | None, calibration: Calibration | None
) -> tuple[TaskModel, TaskModel]:
    """The models. A calibration has to be of these weights."""
    from transformers.utils import logging

    from elang.contract import check_weights
    from elang.evaluation import run

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    first = run.load_model("swift", swift, source.task, head, device)
    second = run.load_model("super", super_, source.task, device=device)
    if calibration is not None:
        check_weights(calibration.provenance, first.model, second.model)
        if calibration.provenance.head_sha256 not in (None, first.head_sha256):
            raise ValueError("head: got another than the calibration was made with: a threshold is of one head")
    return first, second


def _answer(
    pair: tuple[TaskModel, TaskModel], source: _Source, out: Path, temperatures: Sequence[float], batch_size: int
) -> Answers:
    from elang.evaluation.answers import answer_task

    return answer_task(*pair, source.rows, out, data=source.data, temperatures=temperatures, batch_size=batch_size)


def _costs(name: str, answers: Answers) -> BatchCosts:
    from elang.calibration import BatchCosts
    from elang.evaluation.pair_bench import PairBench

    if name == "flops":
        return answers.row_costs()
    text = Path(name).read_text(encoding="utf-8")
    return PairBench.model_validate_json(text).costs if '"costs"' in text else BatchCosts.model_validate_json(text)


def _check_usage(
    task: str | None, csv: Path | None, data_dir: Path | None, split: str | None, score: str | None
) -> None:
    """Names that do not exist are wrong usage."""
    from elang.evaluation.predict import CLASSIFIER_SCORES
    from elang.evaluation.tasks import TASKS
    from elang.late import LATE_SCORES

    if (task is None) == (csv is None):
        raise typer.BadParameter(f"got {'neither' if task is None else 'both'}, wanted one of --task, --csv")
    if csv is not None and (data_dir is not None or split is not None):
        raise typer.BadParameter("--data-dir, --split: got one beside --csv, wanted none: they are a task's")
    scores = (*CLASSIFIER_SCORES, "logit", *LATE_SCORES)
    known = TASKS.get(task or "")
    release = None if known is None else known.release
    for option, got, wanted in (
        ("--task", task, tuple(TASKS)),
        ("--split", split or (None if release is None else SPLIT), tuple(release.splits) if release else (split,)),
        ("--score", score, scores),
    ):
        if got is not None and got not in wanted:
            raise typer.BadParameter(f"{option}: got {got!r}, wanted one of {', '.join(map(str, wanted))}")
