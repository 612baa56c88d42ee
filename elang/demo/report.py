"""The demo's words: the table, what it means, and what to do next, all from the measured figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from elang.calibration import Calibration
from elang.demo.measure import BATCH_SIZES, NAIVE, SUPER, SWIFT, TIMED_ROWS, Row


def table(rows: Sequence[Row], title: str) -> Table:
    """One line per system, 80 columns wide; pairs of figures are for batch 1 and batch 32."""
    sizes = "/".join(f"b{size}" for size in BATCH_SIZES)
    rendered = Table(title=title, title_justify="left", caption=CAPTION, caption_justify="left")
    rendered.box, rendered.show_edge, rendered.padding = SIMPLE_HEAD, False, (0, 1, 0, 0)
    rendered.add_column("", no_wrap=True)
    for heading in (
        "acc.%\ncal.",
        "acc.%\ntest",
        "rand.\ntest",
        "Super\n%",
        "FLOPs\nx",
        f"clock x\n{sizes}",
        f"eta\n{sizes}",
        f"dispatch\n{sizes}",
    ):
        rendered.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        rendered.add_row(
            row.name,
            f"{100 * row.calibration_accuracy:.1f}",
            f"{100 * row.accuracy:.1f}",
            f"{100 * row.random_accuracy:.1f}",
            f"{100 * row.share_routed:.1f}",
            f"{row.flops_speed_up:.2f}",
            _pair(row, "speed_up"),
            _pair(row, "eta"),
            _pair(row, "efficiency"),
        )
    return rendered


CAPTION = (
    "elang 50%: threshold that keeps that share of the calibration rows with Swift; elang cal.: see below; naive: the "
    "hand-written cascade at the threshold of elang cal. rand.: expected test accuracy with as many rows routed. "
    "Super %: share of the test rows that Super answers. "
    "FLOPs x, clock x: speed-up over Super; FLOPs of every test row at its own length; clock on one thread, the first "
    f"{TIMED_ROWS} test rows, systems in alternation, batches padded to their longest row. eta: share of the FLOPs "
    "speed-up that reaches the clock. dispatch: efficiency, Swift alone plus Super alone on just the routed rows, over "
    "the joint model."
)


def meaning(rows: Sequence[Row], calibration: Calibration, n_test: int) -> str:
    """What the figures say, for someone who has not read the paper."""
    by_name = {row.name: row for row in rows}
    swift, super_, naive, ours = by_name[SWIFT], by_name[SUPER], by_name[NAIVE], rows[-1]
    error = (super_.accuracy * (1 - super_.accuracy) / n_test) ** 0.5
    return (
        f"Super is right on {super_.accuracy:.1%} of the test rows; Swift alone on {swift.accuracy:.1%}, at "
        f"{swift.flops_speed_up:.1f} times fewer FLOPs. At the calibrated point Swift answers "
        f"{1 - ours.share_routed:.1%} of the rows, those it is sure of, and Super the rest: "
        f"{_distance(super_.accuracy - ours.accuracy)} at {ours.flops_speed_up:.2f} times fewer FLOPs, and on the "
        f"clock {_clocks(ours)} as fast. Routing as many rows at random would be right on {ours.random_accuracy:.1%}; "
        f"the naive cascade decides alike and is {_clocks(naive)} as fast. Each accuracy is uncertain by about "
        f"{100 * error:.1f} points (one standard error, {n_test} rows). On the calibration rows, routing exactly "
        f"Swift's mistakes would reach {calibration.oracle_accuracy:.1%}: that is what a better score could win."
    )


def next_steps(swift: str, super_: str, calibration_file: Path) -> str:
    """How to use what was just calibrated, as code that runs."""
    out = calibration_file.parent
    return f"""\
from elang import JointClassifier
from transformers import AutoModelForSequenceClassification as Model

joint = JointClassifier(
    Model.from_pretrained({swift!r}).eval(),
    Model.from_pretrained({super_!r}).eval(),
    {str(calibration_file)!r},
)  # joint(**tokenizer(texts, padding=True, return_tensors="pt")).logits

Your own text: elang demo --csv FILE (columns text and label). Your own pair: elang demo --swift ... --super ...

The same from the command line, on the test rows, with a page to look at:
elang eval --csv {out / "test.csv"} --swift {swift} --super {super_} \
  --calibration {calibration_file} --out {out} && elang report {out}
"""


def _distance(gap: float) -> str:
    """How far from Super, never a win: a few rows of difference prove none."""
    return "no accuracy lost on these rows" if gap <= 0 else f"within {max(100 * gap, 0.1):.1f} points of Super"


def _clocks(row: Row) -> str:
    return " and ".join(f"{clock.speed_up:.2f} times (batch {size})" for size, clock in row.clocks.items())


def _pair(row: Row, field: str) -> str:
    values = [getattr(clock, field) for clock in row.clocks.values()]
    return "/".join("-" if value is None else f"{value:.2f}" for value in values)
