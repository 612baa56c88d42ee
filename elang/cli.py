"""The command line: every command of `elang`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from elang.commands import bench, distill, evaluate, fit_head, report, serve
from elang.commands.options import AsJson, one_line

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Energy-routed inference: Swift first, Super if need be."
)


demos = typer.Typer(add_completion=False)
app.add_typer(demos, name="demo")
app.command("eval")(evaluate.eval_)
app.command()(evaluate.calibrate)
app.command("fit-head")(fit_head.fit_head)
app.command()(distill.distill)
app.command()(report.report)
app.command()(bench.bench)
app.command()(serve.serve)


@demos.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    csv: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Your rows in place of the reviews: UTF-8, columns text and label."
        ),
    ] = None,
    swift: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a fine-tuned small classifier; needs --super."),
    ] = None,
    super_: Annotated[
        str | None, typer.Option("--super", help="Folder or hub id of a fine-tuned large classifier; needs --swift.")
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for calibration.json and curve.png.")] = Path(
        "demo_output"
    ),
    as_json: AsJson = False,
) -> None:
    """Train, calibrate and measure a Swift in front of a Super on real text, and say what came of it.

    The default is movie-review sentences (label = mean human rating above 0): Super is a six-layer encoder fine-tuned
    on them, Swift its first layer distilled from Super. They contain most of the SST-2 development set word for word:
    never evaluate these models on SST-2. Training on their 6 600 rows takes about five minutes the first time, on two
    cores; on your rows, in proportion. Downloads and models are kept in ~/.cache/elang, or $ELANG_CACHE.

    Example: elang demo --csv reviews.csv --out reviews
    """
    if context.invoked_subcommand is not None:
        if csv or swift or super_ or as_json:
            raise typer.BadParameter("--csv, --swift, --super and --json are for `elang demo` alone")
        context.obj = out
        return
    from elang.demo import run

    with one_line("elang demo"):
        rows = run(out, csv=csv, swift=swift, super_=super_, console=_console(as_json))
        if as_json:
            typer.echo(json.dumps([asdict(row) for row in rows], indent=2))


@demos.command()
def seq2seq(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for the gates, the energy head and the plots.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Two encoder-decoders that say English words, and the gates between them.

    Two small T5 models learn pronunciations (letters to phonemes, the CMU Pronouncing Dictionary) from scratch. An
    energy head on Swift's encoder, fitted here too, says before anything is decoded which words Super should say, and
    token probabilities say it afterwards: all of them compared, one gate and two, in quality, FLOPs and time. The first
    run takes up to ten minutes on two cores. Downloads and models are kept in ~/.cache/elang, or $ELANG_CACHE.

    Example: elang demo seq2seq --out words
    """
    from elang.demo.seq2seq import run

    with one_line("elang demo seq2seq"):
        gates = run(out or context.obj / "seq2seq", console=_console(as_json))
        if as_json:
            typer.echo(gates.model_dump_json(indent=2))


@app.command()
def info(as_json: AsJson = False) -> None:
    """What is installed, which devices there are, and which backend serves each op and why.

    Example: elang info --json
    """
    from elang.info import collect, main

    if as_json:
        typer.echo(json.dumps(collect(), indent=2))
    else:
        main()


def _console(as_json: bool) -> Console:
    """Where words and bars go: with JSON on stdout, to stderr."""
    return Console(stderr=as_json)
