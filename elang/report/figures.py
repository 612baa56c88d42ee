"""The figures of a report as plotly takes them: plain traces and layouts, which `images` draws too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from elang.calibration import Curve
from elang.calibration.costs import BatchCosts
from elang.evaluation.pair_bench import PairBench, Point
from elang.report.points import (
    CONFIDENCE,
    SHARES,
    Cost,
    Points,
    flops_cost,
    histogram,
    reliability,
    time_cost,
)
from elang.report.run import Run

# Each stands out on white and on near-black, and blue from orange for those who do not see red and green apart.
BLUE, ORANGE, GREY = "#3b82f6", "#d97706", "#7d8590"
OTHERS = ("#1a9c6b", "#d0479b", "#8b5cf6", "#0e93a8", "#a0714f", "#c2410c")
BAND = "rgba(59, 130, 246, 0.18)"
POINT = "operating point"

Trace = dict[str, Any]


class Move(NamedTuple):
    """What the slider changes of one trace: its x or its y at each of P positions."""

    trace: int
    axis: str
    values: list[list[float]]


class Chart(NamedTuple):
    name: str  # of its element and of its file
    title: str
    alt: str  # what it shows, in words
    traces: list[Trace]
    layout: dict[str, Any]
    moves: Sequence[Move] = ()


def charts(run: Run, points: Points) -> list[Chart]:
    """All that there is data for."""
    quality = quality_of(run)
    drawn = [
        _cost_chart(points, flops_cost(points), quality, "flops", "FLOPs"),
        _histogram_chart(points),
        _curves_chart(points, quality),
        _reliability_chart(points, quality),
    ]
    if (bench := run.bench) is not None:
        drawn.insert(1, _cost_chart(points, time_cost(points, bench.costs), quality, "time", "expected time"))
        drawn.append(_buckets_chart(bench.costs))
        if bench.points:
            drawn.append(_dispatch_chart(bench))
    return drawn


def quality_of(run: Run) -> str:
    return "accuracy" if run.rows.judged_by == "target" else "agreement with Super"


def sentence(text: str) -> str:
    """With a capital, and the others as they are."""
    return text[:1].upper() + text[1:]


def _cost_chart(points: Points, cost: Cost, quality: str, name: str, unit: str) -> Chart:
    lower, upper = points.interval
    alone = {"Swift": (cost.swift, points.swift_right.mean()), "Super": (1.0, points.super_right.mean())}
    alone["oracle"] = cost.oracle, (points.swift_right | points.super_right).mean()
    traces = [
        _band(cost.joint, lower, upper),
        _line(cost.random, points.at_random(SHARES), "at random", GREY, width=1.5, dash="dot"),
        _line(cost.joint, points.accuracy, points.rows.score, BLUE),
        *(
            _dots([x], [y], model, GREY, symbol)
            for (model, (x, y)), symbol in zip(alone.items(), ("square", "diamond", "triangle-up"), strict=True)
        ),
    ]
    layout = _layout(f"{unit}, relative to Super alone", quality, ".0%", ".1%")
    alt = f"{quality} of the joint model against its {unit}, with random routing, Swift, Super and the oracle"
    return _with_point(Chart(name, f"{sentence(quality)} against {unit}", alt, traces, layout), points, cost.joint)


def _curves_chart(points: Points, quality: str) -> Chart:
    colors = itertools.cycle(OTHERS)
    traces: list[Trace] = []
    for names in alike(points.curves):
        curve = points.curves[names[0]]
        if points.rows.score not in names:
            traces.append(_line(curve.share_kept, curve.accuracy, _together(names), next(colors), width=1.5))
            continue
        same = sorted(names, key=lambda name: name != points.rows.score)
        traces.insert(0, _band(curve.share_kept, curve.lower, curve.upper))
        traces.append(_line(curve.share_kept, curve.accuracy, _together(same), BLUE))
    random = _line(SHARES, points.at_random(SHARES), "at random", GREY, width=1.5, dash="dot")
    layout = _layout("share of rows kept by Swift", quality, ".0%", ".1%")
    alt = f"{quality} of the joint model against the share of rows that Swift keeps, for every score"
    layout["legend"] |= {"entrywidthmode": "pixels", "entrywidth": 0}  # as wide as the names are
    chart = Chart("curves", "Every score", alt, [*traces, random], layout)
    return _with_point(chart, points, points.share)


def _histogram_chart(points: Points) -> Chart:
    h = histogram(points)
    middle, width = (h.edges[1:] + h.edges[:-1]) / 2, np.diff(h.edges)
    stacks = {
        "kept, Swift wrong": (h.kept_wrong, ORANGE),
        "kept, Swift right": (h.kept_right, BLUE),
        "routed": (h.routed, GREY),
    }
    traces: list[Trace] = []
    moves: list[Move] = []
    for (name, (counts, color)), pattern in zip(stacks.items(), ("/", "", ""), strict=True):
        moves.append(Move(len(traces), "y", counts.tolist()))
        marker = {"color": color, "pattern": {"shape": pattern, "fillmode": "overlay", "fgcolor": "white"}}
        bar = {"type": "bar", "name": name, "x": middle.tolist(), "width": width.tolist(), "marker": marker}
        traces.append({**bar, "y": counts[points.initial].tolist(), "hovertemplate": "%{y} rows at about %{x:.4g}"})
    at = np.clip(points.threshold.astype(np.float64), h.edges[0], h.edges[-1])
    moves.append(Move(len(traces), "x", np.stack([at, at], axis=1).tolist()))
    top = int((h.kept_right + h.kept_wrong + h.routed)[0].max())
    traces.append(_line([at[points.initial]] * 2, [0, 1.05 * top], "threshold", ORANGE, width=2, dash="dash"))
    layout = {**_layout(points.rows.score, "rows", "", ""), "barmode": "stack", "bargap": 0}
    alt = f"histogram of {points.rows.score}: rows that Swift keeps and has right, keeps and has wrong, and routed rows"
    return Chart("histogram", "Kept, routed and wrong rows", alt, traces, layout, moves)


def _reliability_chart(points: Points, quality: str) -> Chart:
    r = reliability(points)
    swift = _dots(r.confidence, r.right, "Swift", BLUE, "circle", line=True)
    swift["error_y"] = {
        "type": "data",
        "symmetric": False,
        "array": (r.upper - r.right).tolist(),
        "arrayminus": (r.right - r.lower).tolist(),
    }
    swift["text"] = [f"{n} rows" for n in r.n.tolist()]
    swift["hovertemplate"] = "%{y:.1%} at %{x:.3g}, %{text}"
    ideal = _line([0, 1], [0, 1], "calibrated", GREY, width=1.5, dash="dot")
    traces = [swift] if r.ece is None else [ideal, swift]
    what = f"rows in order of {points.rows.score}" if r.ece is None else "max_prob of Swift"
    layout = _layout(what, f"{quality} of Swift", ".0%", ".0%")
    return Chart("reliability", "Reliability of Swift", f"{quality} of Swift against {what}", traces, layout)


def _buckets_chart(costs: BatchCosts) -> Chart:
    sizes = sorted(costs.super)
    traces = [
        _dots(sizes, [1e3 * costs.super[size] for size in sizes], "Super", ORANGE, "circle", line=True),
        _dots([costs.rows], [1e3 * costs.swift], "Swift", BLUE, "square"),
    ]
    layout = _layout("rows of a batch", "milliseconds of a batch", "", "")
    return Chart("buckets", "Costs of batches", "milliseconds of a batch against its rows", traces, layout)


def _dispatch_chart(bench: PairBench) -> Chart:
    """A colour for each mode, a dash for each batch size."""
    colors = dict(zip(sorted({p.mode for p in bench.points}), itertools.cycle((BLUE, ORANGE, *OTHERS))))
    dashes = dict(zip(sorted({p.batch_size for p in bench.points}), itertools.cycle(("solid", "dash", "dot"))))
    series: dict[tuple[str, int], list[Point]] = {}
    for point in sorted(bench.points, key=lambda p: (p.mode, p.batch_size, p.share_routed)):
        series.setdefault((point.mode, point.batch_size), []).append(point)
    traces: list[Trace] = []
    for (mode, size), points in series.items():
        x, y = [p.share_routed for p in points], [p.dispatch_efficiency for p in points]
        trace = _dots(x, y, f"{mode}, {size} rows", colors[mode], "circle", line=True)
        trace["line"]["dash"] = dashes[size]
        traces.append(trace)
    layout = _layout("share of rows routed", "dispatch efficiency", ".0%", "")
    alt = "dispatch efficiency against the share of rows routed, by mode and batch size"
    return Chart("dispatch", "Dispatch efficiency", alt, traces, layout)


def alike(curves: dict[str, Curve]) -> list[list[str]]:
    """Names of scores that rank the rows alike, together: their curves are one."""
    groups: dict[Any, list[str]] = {}
    for name, curve in curves.items():
        groups.setdefault((curve.share_kept, curve.accuracy), []).append(name)
    return list(groups.values())


def _together(names: list[str]) -> str:
    """Short enough for a legend: the first, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (+{len(names) - 1})"


def _with_point(chart: Chart, points: Points, x: NDArray[np.float64]) -> Chart:
    """The marker of the slider's position, last and on top."""
    i, trace = points.initial, len(chart.traces)
    point = _dots([x[i]], [points.accuracy[i]], POINT, BLUE, "circle", size=15)
    moves = [
        Move(trace, axis, np.asarray(values)[:, None].tolist()) for axis, values in (("x", x), ("y", points.accuracy))
    ]
    return chart._replace(traces=[*chart.traces, point], moves=moves)


def _line(x: Any, y: Any, name: str, color: str, width: float = 2.5, dash: str = "solid") -> Trace:
    line = {"color": color, "width": width, "dash": dash}
    return {"type": "scatter", "mode": "lines", "name": name, "x": _list(x), "y": _list(y), "line": line}


def _dots(x: Any, y: Any, name: str, color: str, symbol: str, size: int = 9, line: bool = False) -> Trace:
    mode = "lines+markers" if line else "markers"
    marker = {"color": color, "symbol": symbol, "size": size, "line": {"color": "white", "width": 1}}
    dots = {"type": "scatter", "mode": mode, "name": name, "x": _list(x), "y": _list(y), "marker": marker}
    return {**dots, "line": {"color": color, "width": 2}} if line else dots


def _band(x: Any, lower: Any, upper: Any) -> Trace:
    x, lower, upper = _list(x), _list(lower), _list(upper)
    outline = _line([*x, *x[::-1]], [*upper, *lower[::-1]], f"{CONFIDENCE:.0%} interval", BLUE, width=0)
    return {**outline, "fill": "toself", "fillcolor": BAND, "hoverinfo": "skip"}


def _layout(x: str, y: str, x_format: str, y_format: str) -> dict[str, Any]:
    axis = {"automargin": True, "zeroline": False, "fixedrange": True}
    return {
        "xaxis": {**axis, "title": {"text": x, "standoff": 8}, "tickformat": x_format},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}, "tickformat": y_format},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "legend": {
            "orientation": "h",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
            "entrywidthmode": "fraction",
            "entrywidth": 0.48,
        },
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "dragmode": False,
    }


def _list(values: Any) -> list[float]:
    listed: list[float] = np.asarray(values).tolist()
    return listed
