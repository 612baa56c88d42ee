"""What came of a pair of models on a task: the rows of the paper's table, measured and published."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Literal

import numpy as np

from elang.calibration import Provenance
from elang.calibration.artefact import Artefact, Float32, Record
from elang.evaluation.published import SOURCE, Published

if TYPE_CHECKING:
    from rich.table import Table


class System(Record):
    """Swift, Super, or the two joined. Quality and shares are in percent, speed-ups are over Super alone."""

    threshold: Float32 | None  # of the joint model
    quality: dict[str, float]  # by the task's official metrics
    random_accuracy: float | None  # expected from routing as many rows at random, where the first metric is accuracy
    swift_ratio: float  # rows kept by Swift
    flops_speedup: float  # each row at its own length
    time_speedup: float | None


class Timing(Record):
    """Seconds over the timed rows: the sum over batches of the median round, all systems in alternation."""

    rows: int
    batch_size: int
    rounds: int
    threads: int
    swift: float
    super: float
    joint: tuple[float, ...]  # by threshold


class Evaluation(Artefact):
    """A pair on a task at one or several thresholds, beside what the paper prints. Saved as JSON."""

    version: Literal[1] = 1
    task: str
    n: int
    score: str
    temperature: float
    swift: System
    super: System
    joint: tuple[System, ...]
    timing: Timing | None
    published: Published | None  # of the paper's own models
    provenance: Provenance

    def csv(self) -> str:
        """One line per system, measured and published.

        The paper does not say which metric it prints where a task has two: its figures have a column of their own.
        """
        names = ("threshold", "random_accuracy", "swift_ratio", "flops_speedup", "time_speedup")
        text = io.StringIO()
        writer = csv.DictWriter(text, ["system", "source", *self.swift.quality, "published_quality", *names])
        writer.writeheader()
        for name, system in self._measured():
            figures = {field: getattr(system, field) for field in names}
            writer.writerow({"system": name, "source": "measured", **system.quality, **figures})
        for name, quality, figures in self._printed():
            writer.writerow({"system": name, "source": "published", "published_quality": quality, **figures})
        return text.getvalue()

    def table(self) -> Table:
        """One line per system, the published ones last."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        title = f"{self.provenance.data}: n = {self.n}, {self.score} at temperature {self.temperature:g}"
        table = Table(title=title, title_justify="left", caption=self._caption(), caption_justify="left")
        table.box, table.show_edge, table.padding = SIMPLE_HEAD, False, (0, 1, 0, 0)
        table.add_column("", no_wrap=True)
        metrics = " / ".join(self.swift.quality).replace("_", " ")
        for heading in (metrics, "random\nrouting", "Swift %", "FLOPs x", "time x"):
            table.add_column(heading, justify="right")
        table.add_column("", no_wrap=True)
        for name, system in self._measured():
            label = name if system.threshold is None else f"{name} t={np.float32(system.threshold)!s}"
            quality = " / ".join(f"{value:.1f}" for value in system.quality.values())
            shares = _cells(1, system.random_accuracy, system.swift_ratio)
            table.add_row(
                label, quality, *shares, *_cells(2, system.flops_speedup, system.time_speedup), "measured here"
            )
        for name, printed, others in self._printed():
            figures = map(others.get, ("swift_ratio", "flops_speedup", "time_speedup"))
            table.add_row(name, f"{printed:.1f}", "", *_cells(1, *figures), "published")
        return table

    def _measured(self) -> list[tuple[str, System]]:
        return [("Swift", self.swift), ("Super", self.super), *(("joint", system) for system in self.joint)]

    def _printed(self) -> list[tuple[str, float, dict[str, float]]]:
        """Name, quality and the other figures of what the paper prints."""
        if (p := self.published) is None:
            return []
        others = {name: getattr(p, name) for name in ("swift_ratio", "flops_speedup", "time_speedup")}
        return [("Swift", p.swift, {}), ("Super", p.super, {}), ("joint", p.joint, others)]

    def _caption(self) -> str:
        caption = "Swift %: share of the rows that Swift answers. FLOPs x, time x: speed-up over Super alone."
        if self.timing is not None:
            t = self.timing
            caption += f" Time: {t.rows} rows in batches of {t.batch_size}, medians of {t.rounds}, {t.threads} threads."
        if self.published is not None:
            caption += f" Published: TinyBERT-4L-312 and BERT-base, batch 1, in {SOURCE}."
            if len(self.swift.quality) > 1:
                caption += " It does not say which of the metrics it prints."
        return caption


def _cells(digits: int, *values: float | None) -> list[str]:
    return ["" if value is None else f"{value:.{digits}f}" for value in values]
