"""What was measured of a pair or of the op, to look at: tables, and a pair's speed-up against the share routed."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from elang.evaluation.pair_bench import PairBench
from elang.evaluation.route_bench import RouteBench

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


def tables(found: PairBench | RouteBench) -> list[Table]:
    """Of a pair one line per batch size, share and mode, and the costs of batches; of the op one line per head."""
    return _pair_tables(found) if isinstance(found, PairBench) else [_route_table(found)]


def plot_pair(found: PairBench) -> Figure:
    """Speed-up over Super against the share routed: each mode, and what a dispatch that takes nothing would reach."""
    from elang.calibration import plot

    figure, axes = plot.new_figure()
    from matplotlib.ticker import NullFormatter, PercentFormatter, StrMethodFormatter

    modes = dict.fromkeys(p.mode for p in found.points)
    colors, markers = itertools.cycle((plot.CHOSEN, *plot.OTHERS)), dict(zip(modes, "osD", strict=False))
    for size in dict.fromkeys(p.batch_size for p in found.points):
        of_size = sorted((p for p in found.points if p.batch_size == size), key=lambda p: p.share_routed)
        color, first = next(colors), [p for p in of_size if p.mode == of_size[0].mode]
        ideal = [p.super_seconds / (p.swift_seconds + p.routed_seconds) for p in first]
        shares = [p.share_routed for p in first]
        axes.plot(shares, ideal, "--", color=color, linewidth=1, label=f"batch {size}: ideal")
        for mode, marker in markers.items():
            points = [p for p in of_size if p.mode == mode]
            x, y = [p.share_routed for p in points], [p.over_super for p in points]
            axes.plot(x, y, marker, color=color, label=f"batch {size}: {mode}", linestyle="-", linewidth=1)
    axes.axhline(1, color=plot.GREY, linewidth=0.8)
    axes.set_xlim(0, 1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of rows routed to Super")
    axes.set_ylabel("speed-up over Super alone")
    plot.finish(figure, axes, f"{found.rows} rows of up to {found.length} tokens ({found.data}); {_where(found)}")
    return figure


def _pair_tables(found: PairBench) -> list[Table]:
    points = _table(
        f"{found.rows} rows of up to {found.length} tokens ({found.data})",
        ("batch", "routed %", "dispatch", "ms a row", "efficiency", "x Super", "x naive"),
        "routed %: share of the rows that Super answers. dispatch: the mode; of capacity the rows that Super always "
        "sees. ms a row: of the joint model. efficiency: Swift alone plus Super alone on just the routed rows, over "
        "the joint model; at 1 dispatch takes nothing. x Super, x naive: how many times as fast as Super on "
        "everything, and as the cascade written by hand: Swift, a mask, one call of Super. Medians of "
        f"{found.rounds} rounds in alternation, models eager; {_where(found)}.",
    )
    for p in found.points:
        points.add_row(
            str(p.batch_size),
            f"{100 * p.share_routed:.1f}",
            p.mode if p.capacity is None else f"{p.mode} {p.capacity}",
            f"{1e3 * p.joint_seconds / (found.rows // p.batch_size * p.batch_size):.3f}",
            *(f"{ratio:.2f}" for ratio in (p.dispatch_efficiency, p.over_super, p.over_naive)),
        )
    costs = _table(
        "Costs of batches",
        ("rows", "Super ms", "Super ms a row", "Swift ms", "Swift ms a row"),
        "rows: sizes of Super's batch where Swift's has the last of them. `elang calibrate` takes these costs.",
    )
    for size, seconds in found.costs.super.items():
        of_swift = (found.costs.swift,) if size == found.costs.rows else ()
        costs.add_row(
            str(size), *(f"{1e3 * cost:.3f}" for each in (seconds, *of_swift) for cost in (each, each / size))
        )
    return [points, costs]


def _route_table(found: RouteBench) -> Table:
    rows = sorted({p.rows for p in found.points})
    table = _table(
        "The fused op over its eager chain",
        ("head H x C", *(f"N = {n}" for n in rows)),
        "Time of a call of `elang.route` on N rows, and how many times as fast it is as linear, logsumexp, lt and "
        f"nonzero. Medians of {found.rounds} rounds in alternation; {_where(found)}, served by {found.backend}.",
    )
    for (width, classes), points in itertools.groupby(found.points, lambda p: (p.hidden, p.classes)):
        cells = {p.rows: f"{1e6 * p.route_seconds:.1f} us, {p.speedup:.2f}x" for p in points}
        table.add_row(f"{width} x {classes}", *(cells[n] for n in rows))
    return table


def _where(found: PairBench | RouteBench) -> str:
    threads = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    return f"{found.device}, {threads}, {found.dtype}, torch {found.torch}"


def _table(title: str, headings: tuple[str, ...], caption: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.box, table.show_edge, table.padding = SIMPLE_HEAD, False, (0, 1, 0, 0)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
