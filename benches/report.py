"""The results files: written by the benches, printed with the bars by `python benches/report.py [FILE]`."""

from __future__ import annotations

import io
import json
import math
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import elang

RESULTS = Path(__file__).parent / "results"
ROUTE_BARS = (4.0, 2.5, 1.0)  # float32, over eager: geometric mean over C <= 3, over all cells, and the least
EFFICIENCY_BAR = 0.97
NAIVE_BARS = {4: 1.12, 16: 1.05, 64: 1.0}  # batch -> the least speed-up over the naive cascade on ragged batches


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _git_sha() -> str:
    if sha := os.environ.get("ELANG_GIT_SHA"):
        return sha
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def save(cells: dict[str, list[dict[str, Any]]]) -> Path:
    """Replace the measured benches in the device's file and leave the others as they were."""
    path = RESULTS / "cpu.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    about = {
        "command": " ".join(["python -m pytest", *sys.argv[1:]]),
        "device": _cpu(),
        "threads": 1,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "elang": elang.__version__,
        "git_sha": _git_sha(),
        "date": date.today().isoformat(),
    }
    measured = {bench: {**about, "cells": rows} for bench, rows in cells.items()}
    path.write_text(json.dumps(kept | measured, indent=1) + "\n")
    return path


def _mark(value: float, bar: float) -> str:
    return f"{value:.2f} (bar {bar:g}: {'met' if value >= bar else 'MISSED'})"


def _route(console: Console, measured: list[dict[str, Any]]) -> None:
    table = Table(
        *("dtype", "rows", "H", "C", "eager us", "torch.compile us", "elang us", "p99 us", "allocations"),
        *("x eager", "x compile"),
    )
    for column in table.columns[1:]:
        column.justify = "right"
    ratios = {}
    for c in measured:
        us = {name: t["p50"] for name, t in c["microseconds"].items()}
        ratio = us["eager"] / us["elang"]
        ratios[c["dtype"], c["rows"], c["H"], c["C"]] = ratio
        cells = [c["dtype"], *(str(c[axis]) for axis in ("rows", "H", "C"))]
        cells += [f"{us[name]:.1f}" for name in ("eager", "torch.compile", "elang")]
        cells += [f"{c['microseconds']['elang']['p99']:.1f}", str(c["allocations"]["elang"])]
        table.add_row(*cells, f"{ratio:.2f}", f"{us['torch.compile'] / us['elang']:.2f}")
    console.print(table)
    for dtype in dict.fromkeys(key[0] for key in ratios):
        every = [r for key, r in ratios.items() if key[0] == dtype]
        small = [r for key, r in ratios.items() if key[0] == dtype and key[3] <= 3]
        figures = [geometric_mean(small), geometric_mean(every), min(every)]
        shown = map(_mark, figures, ROUTE_BARS) if dtype == "float32" else (f"{figure:.2f}" for figure in figures)
        console.print("{}, against eager: geometric mean C <= 3 {}; all {}; least {}".format(dtype, *shown))


def _joint(console: Console, cells: list[dict[str, Any]]) -> None:
    table = Table(
        "batch",
        "lengths",
        "share routed",
        "dispatch efficiency",
        "x naive cascade",
        "x Super alone",
        "eta",
        "eta ceiling",
    )
    for column in table.columns:
        column.justify = "right"
    for c in cells:
        bar = NAIVE_BARS.get(c["batch"], -math.inf) if c["lengths"] == "ragged" else -math.inf
        naive = f"{c['speedup_naive']:.2f}" if bar == -math.inf else _mark(c["speedup_naive"], bar)
        table.add_row(
            str(c["batch"]), c["lengths"], f"{c['share_routed']:.2f}", _mark(c["dispatch_efficiency"], EFFICIENCY_BAR),
            naive, f"{c['speedup_super']:.2f}", f"{c['eta']:.2f}", f"{c['eta_ceiling']:.2f}",
        )  # fmt: skip
    console.print(table)


def render(path: Path) -> str:
    """The file as tables."""
    console = Console(width=150, file=io.StringIO(), record=True)
    for bench, show in {"route": _route, "joint": _joint}.items():
        if section := json.loads(path.read_text()).get(bench):
            about = ", ".join(f"{key} {value}" for key, value in section.items() if key != "cells")
            console.print(f"\n[bold]{bench}[/bold]: {about}", highlight=False)
            show(console, section["cells"])
    return console.export_text()


if __name__ == "__main__":
    print(render(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "cpu.json"))
