"""The command line: `elang demo`, `elang info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Energy-routed inference: Swift first, Super if need be."
)


@app.command()
def demo(
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
) -> None:
    """Train, calibrate and measure a Swift in front of a Super on real text, and say what came of it.

    The default is movie-review sentences (label = mean human rating above 0): Super is a six-layer encoder fine-tuned
    on them, Swift its first layer distilled from Super. They contain most of the SST-2 development set word for word:
    never evaluate these models on SST-2. Training on their 6 600 rows takes about five minutes the first time, on two
    cores; on your rows, in proportion. Downloads and models are kept in ~/.cache/elang, or $ELANG_CACHE.
    """
    from elang.demo import run

    try:
        run(out, csv=csv, swift=swift, super_=super_)
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(f"elang demo: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def info() -> None:
    """What is installed, which devices there are, and which backend serves each op and why."""
    from elang.info import main

    main()
