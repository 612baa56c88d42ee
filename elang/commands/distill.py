"""`elang distill`: Swifts for a Super that has none, and what each of them gives up and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from elang.commands.options import AsJson, one_line, positive, probability


def numbers_of_layers(text: str) -> Any:  # a tuple; typer would take the annotation of one for several values
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise typer.BadParameter(f"got {text!r}, wanted K[,K...] such as 1,2,4")
    return tuple(map(int, text.split(",")))


def distill(
    super_: Annotated[str, typer.Option("--super", help="Folder or hub id of the fine-tuned classifier.")],
    data: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Texts without labels, like those to be served: .txt with one a line; .csv or .jsonl with text and, "
            "for pairs, text2.",
        ),
    ],
    layers: Annotated[
        Any, typer.Option(parser=numbers_of_layers, metavar="K[,K...]", help="How many of Super's layers to keep.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", file_okay=False, help="Folder for the students and what was measured.")
    ],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the texts.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that a student learns from at once.")] = 32,
    learning_rate: Annotated[
        float, typer.Option(parser=positive, metavar="NUMBER", help="The highest, after the warm-up.")
    ] = 2e-4,
    temperature: Annotated[
        float, typer.Option(parser=positive, metavar="T", help="Of the answers that are learnt.")
    ] = 2.0,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens after which a text is cut; as many as Super takes by default.")
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(
            parser=probability, metavar="ALPHA", help="At most this share of all texts is kept and answered otherwise."
        ),
    ] = 0.02,
    delta: Annotated[
        float, typer.Option(parser=probability, metavar="DELTA", help="The probability that it is more.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Of the held-out texts and the training.")] = 0,
    as_json: AsJson = False,
) -> None:
    """A Swift for your Super from texts without labels, and the trade-off of how many layers it has.

    A student is Super's first K layers and its head, trained on Super's answers; Super is only read. A tenth of the
    texts, 2 000 at most, is held out, and every figure is measured on it: agreement with Super, FLOPs, time, and how
    many texts a student can keep while at most ALPHA of all are answered otherwise than by Super. Training is on the
    CPU. Students and answers are kept in the folder: what is there is not made again.

    Example: elang distill --super ID --data texts.txt --layers 1,2,4 -o students
    """
    with one_line("elang distill"):
        from transformers.utils import logging

        from elang import distillation
        from elang.texts import SMALLEST, read_texts

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        made = distillation.distill(
            super_,
            read_texts(data, fewest=SMALLEST),
            layers,
            output,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            temperature=temperature,
            max_length=max_length,
            alpha=alpha,
            delta=delta,
            seed=seed,
            data=data.name,
        )
        if as_json:
            typer.echo(made.model_dump_json(indent=2))
            return
        from rich.console import Console

        Console().print(made.table())
        typer.echo(f"Written: {output / 'distillation.json'}, and beside it")
        for student in made.students:
            threshold = "no threshold" if student.calibration is None else f"its threshold in {student.calibration}"
            typer.echo(f"  {student.folder}: {threshold}")
