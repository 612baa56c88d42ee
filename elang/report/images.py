"""The figures of a report as PNGs, for papers: the same traces, drawn by matplotlib at the first threshold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elang.report.figures import BLUE, Chart, Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = {"solid": "-", "dot": ":", "dash": "--"}
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^"}
POINTS_PER_PIXEL = 0.75


def save_images(charts: Iterable[Chart], folder: str | Path) -> list[Path]:
    """One PNG of each figure. Needs `elang[report]`.

    Raises:
        ImportError: no matplotlib.
        OSError: the folder is not there, or not to be written to.
    """
    paths = []
    for chart in charts:
        paths.append(Path(folder) / f"{chart.name}.png")
        draw(chart).savefig(paths[-1])
    return paths


def draw(chart: Chart) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("PNGs need matplotlib: pip install 'elang[report]'") from error
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(6.4, 4.8), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    below: Any = 0.0  # of stacked bars
    for order, trace in enumerate(chart.traces, start=2):
        if trace["type"] == "bar":
            y = np.array(trace["y"])
            style = {"color": trace["marker"]["color"], "hatch": trace["marker"]["pattern"]["shape"] * 3}
            axes.bar(trace["x"], y, trace["width"], bottom=below, label=trace["name"], edgecolor="white", lw=0, **style)
            below = below + y
        elif "fill" in trace:
            axes.fill(trace["x"], trace["y"], color=BLUE, alpha=0.15, linewidth=0, label=trace["name"])
        else:
            _draw_scatter(axes, trace, order)
    for axis, of in ((axes.xaxis, chart.layout["xaxis"]), (axes.yaxis, chart.layout["yaxis"])):
        axis.set_label_text(of["title"]["text"])
        if of["tickformat"].endswith("%"):
            axis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize="small")
    return figure


def _draw_scatter(axes: Any, trace: Trace, order: int) -> None:
    style: dict[str, Any] = {"linestyle": "none", "label": trace["name"], "zorder": order}
    if "lines" in trace["mode"]:
        line = trace["line"]
        style |= {"color": line["color"], "linestyle": DASHES[line.get("dash", "solid")]}
        style["linewidth"] = POINTS_PER_PIXEL * line["width"]
    if "markers" in trace["mode"]:
        marker = trace["marker"]
        style |= {"color": marker["color"], "marker": MARKERS[marker["symbol"]], "markeredgecolor": "white"}
        style["markersize"] = POINTS_PER_PIXEL * marker["size"]
    if (error := trace.get("error_y")) is None:
        axes.plot(trace["x"], trace["y"], **style)
    else:
        axes.errorbar(trace["x"], trace["y"], [error["arrayminus"], error["array"]], capsize=2, **style)
