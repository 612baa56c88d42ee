"""The words of the demo for encoder-decoders: its tables and plot, what they mean, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from elang.calibration import GateCalibration, GateCosts, gate_outcome
from elang.calibration.compare import area_gain, gate_gain
from elang.calibration.curve import auroc
from elang.calibration.gates import budget_area
from elang.demo.measure_words import SUPER, SWIFT, Row, Sources

COLORS = ("#1f5fbf", "#6b7280", "#d97706", "#0f9d76", "#b83280", "#7c5cd6", "#0891b2")


def scores(test: Sources, length: str) -> Table:
    """Every score as the only gate: what it tells, and what it gains, whatever the share routed."""
    table = _table("Scores, on the test words", SCORES)
    for heading in ("AUROC", "exact %\nmean", "gain over random\n(95 % interval)", "gain over length\n(95 % interval)"):
        table.add_column(heading, justify="right", no_wrap=True)
    at_random = (test.swift_exact.mean() + test.super_exact.mean()) / 2
    for name, score in (test.early | test.late).items():
        gain = area_gain(score, test.swift_exact, test.super_exact)
        over_length = area_gain(score, test.swift_exact, test.super_exact, test.early[length])
        table.add_row(
            name,
            f"{auroc(score, test.swift_exact):.3f}",
            f"{100 * (at_random + gain.value):.2f}",
            _points(gain),
            "" if name == length else _points(over_length),
        )
    return table


SCORES = (
    "AUROC: how well the score tells the words that Swift says right. Mean: exact match of the joint model, averaged "
    "over all shares of words kept; the gains are differences of that, in points. head: the energy head, before Swift "
    "decodes; word length: the control without a model; the others: of what Swift has decoded.\n"
)


def gating(gates: GateCalibration, test: Sources) -> Table:
    """One gate and two, in time: at the thresholds that the calibration words chose."""
    size = gates.costs.rows
    table = _table(f"Gates, exact match within a budget of time, batch {size}", GATING)
    for heading in ("cal.", "test", "gain of the pair, test\n(95 % interval)"):
        table.add_column(heading, justify="right", no_wrap=True)
    known = test.early | test.late
    quality = test.swift_exact, test.super_exact
    best = max((c for c in gates.curves.values() if c.early and c.late), key=lambda c: c.area)
    for name, curve in gates.curves.items():
        early, late = (None if score is None else known[score] for score in (curve.early, curve.late))
        outcome = gate_outcome(early, late, curve.early_threshold, curve.late_threshold, *quality, gates.costs)
        area = budget_area(outcome.seconds, outcome.quality, gates.costs)
        gain = "" if curve is best else _points(gate_gain(best, curve, known, *quality, gates.costs))
        table.add_row(name, f"{100 * curve.area:.2f}", f"{100 * area:.2f}", gain)
    return table


GATING = (
    "Mean exact match, in %, of the best that each way to gate reaches within a budget, over budgets from Swift's time "
    "for a word to Super's. The gain is that of the pair that was best on the calibration words."
)


def systems(rows: Sequence[Row], costs: Mapping[int, GateCosts]) -> Table:
    """One line per system; pairs of figures are for the batch sizes."""
    measured = "; ".join(
        f"batch {size}: encode {1e3 * c.encode / size:.2f}, decode {1e3 * c.decode[size] / size:.2f}, Super "
        f"{1e3 * c.of_super:.2f} ms a word"
        for size, c in costs.items()
    )
    table = _table("Systems, on the test words", f"{SYSTEMS} Costs: {measured}.")
    sizes = "/".join(f"b{size}" for size in costs)
    headings = (
        "exact\n%",
        "PER\n%",
        "deco-\nded %",
        "kept\n%",
        "FLOPs\nx",
        f"clock x\n{sizes}",
        f"eta\n{sizes}",
        f"dispatch\n{sizes}",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shares = f"{100 * row.share_decoded:.0f}", f"{100 * row.share_kept:.0f}"
        quality = f"{100 * row.exact:.1f}", f"{100 * row.errors:.1f}"
        clocks = [
            "/".join("-" if value is None else f"{value:.2f}" for value in values)
            for values in zip(*row.clocks.values(), strict=True)
        ]
        table.add_row(
            row.name.replace(" + ", " +\n"),
            *quality,
            *shares,
            f"{row.flops_speed_up:.2f}",
            *clocks,
        )
    return table


SYSTEMS = (
    "The quickest early gate, late gate and pair within two points of Super on the calibration words. PER: phoneme "
    "error rate; decoded, kept: by Swift. FLOPs x, clock x: speed-up over Super, on one thread, systems in "
    "alternation. eta: share of the FLOPs speed-up that reaches the clock. dispatch: efficiency, Swift's encoder plus "
    "its decoder on what gate 1 keeps plus Super on what is routed, over the joint model."
)


def plot(test: Sources, path: Path) -> None:
    """Exact match and phoneme error rate against the share routed, for every score and for random routing."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(11, 5.5), dpi=150, layout="constrained")
    n = len(test.swift_exact)
    share = np.arange(n + 1) / n
    panels = (("exact match", test.swift_exact, test.super_exact), ("PER", test.swift_errors, test.super_errors))
    for axes, (name, swift, super_) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.plot([0, 1], [swift.mean(), super_.mean()], ":", color="#6b7280", label="random (expected)")
        for (score, values), color in zip((test.early | test.late).items(), COLORS, strict=False):
            order = np.argsort(np.where(np.isfinite(values), values, -np.inf), kind="stable")
            difference = (super_.astype(float) - swift)[order]
            curve = swift.mean() + np.append(0, np.cumsum(difference)) / n
            axes.plot(share, curve, color=color, linewidth=1.4, label=score)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("share of words answered by Super")
        axes.set_title(f"{name}, {n} test words", loc="left")
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def meaning(rows: Sequence[Row], gates: GateCalibration, test: Sources) -> str:
    """What the figures say, for someone who has not read the paper."""
    by_name = {row.name: row for row in rows}
    swift, super_ = by_name[SWIFT], by_name[SUPER]
    error = (super_.exact * (1 - super_.exact) / len(test.swift_exact)) ** 0.5
    chosen = by_name.get(" + ".join(score for score in (gates.early, gates.late) if score))
    said = ""
    if chosen is not None:
        clocks = " and ".join(f"{clock.speed_up:.2f} times (batch {size})" for size, clock in chosen.clocks.items())
        said = (
            f"The gates chosen on the calibration words have Swift decode {chosen.share_decoded:.1%} of the words and "
            f"keep {chosen.share_kept:.1%}: {chosen.exact:.1%} right, at {chosen.flops_speed_up:.2f} times fewer "
            f"FLOPs, and on the clock {clocks} as fast as Super. "
        )
    return (
        f"Super says {super_.exact:.1%} of the test words right, Swift {swift.exact:.1%} at {swift.flops_speed_up:.1f} "
        f"times fewer FLOPs. {said}Each share is uncertain by about {100 * error:.1f} points (one standard error). "
        f"{gates.summary()}"
    )


def next_steps(swift: Path, super_: Path, out: Path, gates: GateCalibration) -> str:
    """How to use what was just calibrated, as code that runs."""
    head = f"    head={str(out / 'energy_head')!r},\n" if gates.early else ""
    return f"""\
import elang

say = elang.pipeline(
    "translation",
    swift={str(swift)!r},
    super={str(super_)!r},
{head}    gates={str(out / f"gates-batch-{gates.costs.rows}.json")!r},
    batch_size={gates.costs.rows},
)
print(say(["cat", "phlegm"]))
"""


def _points(gain: tuple[float, float, float]) -> str:
    value, lower, upper = (100 * part for part in gain)
    return f"{value:+.2f} ({lower:+.2f} to {upper:+.2f})"


def _table(title: str, caption: str) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.box, table.show_edge, table.padding = SIMPLE_HEAD, False, (0, 1, 0, 0)
    table.add_column("", no_wrap=True)
    return table
