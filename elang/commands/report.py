"""`elang report`: what a run left, as one page to look at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from elang.commands.options import AsJson, one_line


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder that `elang eval` wrote into.")],
    output: Annotated[Path, typer.Option("-o", "--output", dir_okay=False, help="The page.")] = Path("report.html"),
    png: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for the figures as PNGs; made if need be.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One self-contained page about a run: accuracy against cost with a slider for the threshold, and what is behind.

    Reads rows.json of RUN_DIR and, where they are there, evaluation.json, calibration.json (`elang calibrate -o`) and
    bench.json. No model is run. The page needs no network; --json prints the operating point and what was written.

    Example: elang report eval_output -o report.html --png figures
    """
    with one_line("elang report"):
        from elang.report import charts, load_run, operating_points, outcomes, page, save_images

        for option, path in (("-o", output), ("--png", png)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{option}: got {path}, wanted one in a folder that is there")
        run = load_run(run_dir)
        points = operating_points(run.rows)
        drawn = charts(run, points)
        html = page(run, points, drawn)
        images: list[Path] = []
        if png is not None:
            png.mkdir(exist_ok=True)
            images = save_images(drawn, png)
        output.write_text(html, encoding="utf-8")
        if as_json:
            figures = outcomes(points, None if run.bench is None else run.bench.costs)
            point = {name: column[points.initial].item() for name, column in figures.items()}
            if math.isinf(point["threshold"]):
                point["threshold"] = str(point["threshold"])  # JSON has no infinity
            written = {"report": str(output), "images": [str(path) for path in images]}
            typer.echo(json.dumps({**point, **written}, indent=2, allow_nan=False))
            return
        typer.echo(f"Written: {output}" + (f" and {len(images)} figures in {png}" if images else ""))
