"""What the commands have in common: options, how values are read, what is said where something goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

INFEASIBLE = 3  # the exit code


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise typer.BadParameter(f"got {text!r}, wanted a number, inf or -inf")
    return value


def positive(text: str) -> float:
    if not 0 < (value := number(text)) < math.inf:
        raise typer.BadParameter(f"got {text}, wanted a finite number > 0")
    return value


def share(text: str) -> float:
    if not 0 <= (value := number(text)) <= 1:
        raise typer.BadParameter(f"got {text}, wanted a share in [0, 1]")
    return value


def probability(text: str) -> float:
    if not 0 < (value := number(text)) < 1:
        raise typer.BadParameter(f"got {text}, wanted a number in (0, 1)")
    return value


def alpha_delta(text: str) -> Any:  # a pair; typer would take the annotation of one for two values
    parts = text.split(",")
    if len(parts) != 2:
        raise typer.BadParameter(f"got {text!r}, wanted ALPHA,DELTA such as 0.02,0.05")
    return tuple(map(probability, parts))


def positives(text: str) -> Any:
    return tuple(positive(part) for part in text.split(","))


Task = Annotated[str | None, typer.Option(help="A task of GLUE, SuperGLUE or WMT, such as sst2 or wmt_en_de.")]
Csv = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="Your own rows in place of a task: UTF-8, columns text, label, text2."
    ),
]
Swift = Annotated[str, typer.Option(help="Folder or hub id of the small fine-tuned model.")]
Super = Annotated[str, typer.Option("--super", help="Folder or hub id of the large one.")]
Head = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Folder of the energy head of a Swift that is an encoder-decoder."),
]
DataDir = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Folder of the original files; without it, rows by `datasets`."),
]
Split = Annotated[str | None, typer.Option(help="train or validation; of WMT validation or test.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many rows, from the start.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows that a model answers at once.")]
Device = Annotated[str | None, typer.Option(help="Where both models go, such as cuda; the CPU by default.")]
Out = Annotated[Path, typer.Option(file_okay=False, help="Folder where answers are kept, for any later run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def typed(context: typer.Context) -> tuple[str, ...]:
    """The command and the options that were given to it."""
    words = context.command_path.split()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        if given is not None and given.name == "COMMANDLINE":
            value = context.params[parameter.name or ""]
            words.append(parameter.opts[-1])
            if value is not True:
                words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return tuple(words)


@contextmanager
def one_line(command: str) -> Iterator[None]:
    """What goes wrong, on one line and without a traceback."""
    from safetensors import SafetensorError

    from elang.calibration import InfeasibleTarget

    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        typer.echo(f"{command}: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(INFEASIBLE if isinstance(error, InfeasibleTarget) else 1) from error
