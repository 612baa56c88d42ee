"""The pictures of a calibration: accuracy against the share of rows that Swift keeps, quality against time."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from elang.calibration.calibration import Calibration
    from elang.calibration.gates import GateCalibration

WIDE = 45  # characters of a label, of which two do not stand beside each other
CHOSEN, GREY = "#1f5fbf", "#6b7280"
OTHERS = ("#d97706", "#0f9d76", "#b83280", "#7c5cd6", "#8a6d3b", "#0891b2", "#c2410c", "#4d7c0f")


def plot_calibration(calibration: Calibration) -> Figure:
    """Every score's curve, the chosen one with its interval and point; random routing, Swift and Super to compare."""
    figure, axes = new_figure()
    from matplotlib.ticker import PercentFormatter

    c, target = calibration, calibration.target
    for name, accuracy, x in (("Super", c.super_accuracy, 1.0), ("Swift", c.swift_accuracy, 0.0)):
        axes.axhline(accuracy, color=GREY, linewidth=0.8, linestyle="--")
        # Each name stands at the end where the curves are far from its line.
        axes.annotate(
            f" {name} {accuracy:.1%} ",
            (x, accuracy),
            (0, 3),
            textcoords="offset points",
            horizontalalignment="right" if x else "left",
            color=GREY,
        )
    axes.plot(
        [0, 1], [c.super_accuracy, c.swift_accuracy], color=GREY, linestyle=":", label="random routing (expected)"
    )

    alike: dict[tuple[tuple[float, ...], ...], list[str]] = {}
    for name, curve in c.curves.items():
        alike.setdefault((curve.share_kept, curve.accuracy), []).append(name)
    colors = itertools.cycle(OTHERS)
    for (share_kept, accuracies), names in alike.items():
        if c.candidate not in names:
            axes.plot(share_kept, accuracies, color=next(colors), linewidth=1, label=_joined(names))

    chosen = c.curve
    same = [name for name in alike[chosen.share_kept, chosen.accuracy] if name != c.candidate]
    axes.fill_between(
        chosen.share_kept,
        chosen.lower,
        chosen.upper,
        color=CHOSEN,
        alpha=0.12,
        linewidth=0,
        label=f"{100 * c.confidence:.4g}% interval",
    )
    axes.plot(chosen.share_kept, chosen.accuracy, color=CHOSEN, linewidth=2.2, label=_joined([c.candidate, *same]))
    _mark(
        axes,
        (target.share_kept, target.accuracy),
        f"chosen: {target.share_kept:.1%} kept, accuracy {target.accuracy:.1%}",
    )
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of rows kept by Swift")
    axes.set_ylabel("accuracy of the joint model")
    finish(figure, axes, f"{c.provenance.data or 'calibration rows'} (n = {c.n})")
    return figure


def _joined(alike: list[str]) -> str:
    """Names of scores that rank the rows alike, as many as there is room for."""
    shown = alike[:5]
    return " = ".join(shown) + (f" and {len(alike) - len(shown)} more" if len(alike) > len(shown) else "")


def plot_gates(calibration: GateCalibration) -> Figure:
    """The best quality for the time of one gate and of two; Swift, Super and random routing between them."""
    figure, axes = new_figure()
    c = calibration
    ends = {"Swift": (c.costs.of_swift, c.swift_quality), "Super": (c.costs.of_super, c.super_quality)}
    milliseconds = [1e3 * seconds for seconds, _ in ends.values()]
    axes.plot(milliseconds, [quality for _, quality in ends.values()], "o:", color=GREY, label="random (expected)")
    for (name, (_, quality)), x in zip(ends.items(), milliseconds, strict=True):
        where = {"textcoords": "offset points", "horizontalalignment": "left" if name == "Swift" else "right"}
        axes.annotate(f" {name} {quality:.3g} ", (x, quality), (0, 6), color=GREY, **where)
    colors = itertools.cycle(OTHERS)
    for name, curve in c.curves.items():
        chosen = (curve.early, curve.late) == (c.early, c.late)
        style: dict[str, Any] = {"color": CHOSEN, "linewidth": 2.2} if chosen else {"color": next(colors)}
        times = [1e3 * seconds for seconds in curve.seconds]
        axes.step(times, curve.quality, where="post", label=f"{name} (mean {curve.area:.4f})", **style)
    _mark(axes, (1e3 * c.seconds, c.quality), f"chosen: {c.share_kept:.1%} kept, quality {c.quality:.4g}")
    axes.set_xlabel("milliseconds a row")
    axes.set_ylabel("mean quality of the joint model")
    finish(figure, axes, f"{c.provenance.data or 'calibration rows'} (n = {c.n})")
    return figure


def new_figure() -> tuple[Figure, Any]:
    """A figure of the size that all have, and its axes.

    Raises:
        ImportError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'elang[report]'") from error
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def _mark(axes: Any, point: tuple[float, float], label: str) -> None:
    style = {"markeredgecolor": "white", "markeredgewidth": 1.5, "markersize": 10, "zorder": 5, "clip_on": False}
    axes.plot(*point, "o", color=CHOSEN, label=label, **style)


def finish(figure: Figure, axes: Any, title: str) -> None:
    """Grid, title and legend, once everything is drawn."""
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) < WIDE else 1
    figure.legend(handles[::-1], labels[::-1], loc="outside lower left", ncols=columns, frameon=False, fontsize="small")
