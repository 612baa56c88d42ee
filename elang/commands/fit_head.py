"""`elang fit-head`: the energy head of an encoder-decoder, on the rows of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elang.commands.options import AsJson, BatchSize, DataDir, Device, Limit, one_line

TARGETS = ("right", "class", "tokens")


def fit_head(
    task: Annotated[str, typer.Option(help="A task of GLUE, SuperGLUE or WMT, such as rte or wmt_en_de.")],
    swift: Annotated[str, typer.Option(help="Folder or hub id of the small encoder-decoder.")],
    output: Annotated[Path, typer.Option("-o", "--output", file_okay=False, help="Folder for the head.")],
    targets: Annotated[
        str,
        typer.Option(
            help="What the head learns: right (Swift's answer is right), class (the task's label), both of the mean "
            "state, or tokens (the next one, at each position)."
        ),
    ] = "right",
    data_dir: DataDir = None,
    split: Annotated[
        str, typer.Option(help="Rows that no threshold will be chosen on, nor anything judged by.")
    ] = "train",
    limit: Limit = None,
    epochs: Annotated[int, typer.Option(min=1, help="The head is that of the best.")] = 30,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At the start.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the order of rows and the first weights.")] = 0,
    batch_size: BatchSize = 32,
    device: Device = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder where answers and states are kept, for any later run.")
    ] = Path("eval_output"),
    as_json: AsJson = False,
) -> None:
    """Fit the energy head that decides, before anything is decoded, which rows Swift will get right.

    Swift answers the rows first, if the head is to learn where it is right; its encoder's states are computed once.
    Neither model is changed. `elang calibrate` and `elang eval` take the head by --head.

    Example: elang fit-head --task rte --swift ID -o head
    """
    if targets not in TARGETS:
        raise typer.BadParameter(f"--targets: got {targets!r}, wanted one of {', '.join(TARGETS)}")
    with one_line("elang fit-head"):
        import numpy as np

        from elang.evaluation import answers, run
        from elang.evaluation.generators import Generator
        from elang.evaluation.rows import load_task
        from elang.evaluation.tasks import get_task
        from elang.head_fitting import fit_energy_head

        rows = run.first_rows(load_task(task, split, data_dir), limit)
        model = run.load_model("swift", swift, get_task(task), device=device)
        if not isinstance(model, Generator):
            raise ValueError(f"swift: got {type(model.model).__name__}, wanted an encoder-decoder")
        labels = None
        if targets == "class":
            if model.task.kind not in ("classification", "multiple_choice"):
                raise ValueError(f"targets: got class for {task}, wanted right or tokens: its rows have no label")
            labels = np.asarray(rows.targets)
        elif targets == "right":
            labels = answers.right_of(model, rows, out, batch_size)
            if labels is None:
                raise ValueError(f"targets: got right for {task}, wanted tokens: it judges no row by itself")
        head = fit_energy_head(
            model.model,
            model.tokenizer,
            model.source_texts(rows),
            labels,
            form="token" if targets == "tokens" else "pooled",
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            batch_size=batch_size,
            cache=out,
        )
        head.save(output)
        assert head.fitted is not None, "it has just been"
        typer.echo(head.fitted.model_dump_json(indent=2) if as_json else head.fitted.summary())
