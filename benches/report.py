"""The results files: written by the benches, printed with the bars by `python benches/report.py [FILE]`."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

import torch

import elang

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# rich is imported by what prints: the benches of a GPU machine that has no more than torch and pytest only save.

RESULTS = Path(__file__).parent / "results"
ROUTE_BARS = (4.0, 2.5, 1.0)  # float32, over eager: geometric mean over C <= 3, over all cells, and the least
EFFICIENCY_BAR = 0.97
OVERHEAD_BAR = 1.02  # time over Swift alone where nothing is routed
SEQ2SEQ_EFFICIENCY_BAR = 0.95
# On a GPU, bfloat16, H = 768: times of a bare kernel of the same grid, and over the chains; shares of copy bandwidth.
SKELETON_BAR, STATIC_BAR, EAGER_BAR = 1.3, 4.0, 10.0
ROUTE_BANDWIDTH_BAR, GATHER_BAR = 0.80, 0.85
# vocab_energy on two threads of a CPU, float32: time over the bare product that makes the logits, speed-up over the
# product with its logsumexp by rows, and memory over that of the logits.
VOCAB_LINEAR_BAR, VOCAB_BARS, VOCAB_MEMORY_BAR = 1.15, {64: 1.15, 512: 1.3}, 0.02
# On a GPU, bfloat16: speed-up over the fastest peer, share of the measured matrix rate at 4096 rows, share of copy
# bandwidth up to 16 rows.
PEER_BAR, MATRIX_BAR, HEAD_BANDWIDTH_BAR = 1.0, 0.75, 0.80
# On a GPU: dispatch efficiency, speed-up over the naive cascade up to 16 rows, microseconds past a graphed Swift and an
# empty branch where nothing is routed.
GRAPH_EFFICIENCY_BARS, GRAPH_NAIVE_BAR, GRAPH_OVERHEAD_BAR = {"graph": 0.95, "exact": 0.85}, 1.5, 5.0
# Services: their names, and the rates of the table, in times of what Super alone answers at most.
SERVE_NAMES = {"elang": "elang serve", "super": "Super alone", "naive": "naive cascade"}
SERVE_RATES = (0.5, 0.9, 1.3)
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


def _device(path: Path) -> dict[str, Any]:
    if path.stem in ("cpu", *SERVICE_BENCHES):
        return {"device": _cpu(), "threads": 1, "isa": torch.backends.cpu.get_cpu_capability()}
    driver = []
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return {
        "device": torch.cuda.get_device_name(0),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(0)),
        "driver": driver[0] if driver else "unknown",
        "cuda": torch.version.cuda,
    }


CPU_BENCHES = ("route", "vocab", "joint", "modes", "nothing_routed", "seq2seq")
SERVICE_BENCHES = ("soak", "serve", "ray")


def results_file(bench: str = "") -> Path:
    """Where a bench's results go: results/cpu.json, a file named for the GPU, or one of the bench's own."""
    if bench in SERVICE_BENCHES:
        return RESULTS / f"{bench}.json"
    if bench in CPU_BENCHES or not torch.cuda.is_available():
        return RESULTS / "cpu.json"
    return RESULTS / f"{torch.cuda.get_device_name(0).lower().replace(' ', '-')}.json"


def save(cells: dict[str, Any], path: Path, command: str = "") -> Path:
    """Replace the measured benches in the file and leave the others as they were."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    about = {
        "command": command or " ".join(["python -m pytest", *sys.argv[1:]]),
        **_device(path),
        "torch": torch.__version__,
        "elang": elang.__version__,
        "git_sha": _git_sha(),
        "date": date.today().isoformat(),
    }
    # A bench that runs on other threads than most says so in its cells.
    threads = {bench: {"threads": rows[0]["threads"]} if "threads" in rows[0] else {} for bench, rows in cells.items()}
    measured = {bench: {**about, **threads[bench], "cells": rows} for bench, rows in cells.items()}
    path.write_text(json.dumps(kept | measured, indent=1) + "\n")
    return path


def _mark(value: float, bar: float) -> str:
    return f"{value:.2f} (bar {bar:g}: {'met' if value >= bar else 'MISSED'})"


def _mark_most(value: float, bar: float, digits: int = 2) -> str:
    return f"{value:.{digits}f} (at most {bar:g}: {'met' if value <= bar else 'MISSED'})"


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _route(console: Console, measured: list[dict[str, Any]]) -> None:
    table = _table(
        *("dtype", "rows", "H", "C", "eager us", "torch.compile us", "elang us", "p99 us", "allocations"),
        *("x eager", "x compile"),
    )
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


def _vocab(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table("dtype", "rows", "elang ms", "time over linear", "x linear, logsumexp", "memory over the logits'")
    for c in cells:
        us = {name: t["p50"] for name, t in c["microseconds"].items()}
        figures = us["elang"] / us["linear"], us["linear, logsumexp"] / us["elang"]
        memory = c["peak_bytes"]["elang"] / c["logits_bytes"]
        barred = c["dtype"] == "float32" and c["rows"] in VOCAB_BARS
        table.add_row(
            c["dtype"], str(c["rows"]), f"{us['elang'] / 1e3:.2f}",
            _mark_most(figures[0], VOCAB_LINEAR_BAR) if barred else f"{figures[0]:.2f}",
            _mark(figures[1], VOCAB_BARS[c["rows"]]) if barred else f"{figures[1]:.2f}",
            _mark_most(memory, VOCAB_MEMORY_BAR, 4) if barred else f"{memory:.4f}",
        )  # fmt: skip
    console.print(table)


def _vocab_cuda(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table(
        *("rows", "H", "C", "elang us", "fastest peer", "x fastest peer", "share of matrix rate", "share of a copy's"),
        *("error", "fastest peer's"),
    )
    for c in cells:
        us = {name: spread["p50"] for name, spread in c["microseconds"].items()}
        peer = min((name for name in us if name != "elang"), key=us.__getitem__)
        matrix, copy = f"{c['share_of_matrix_rate']:.2f}", f"{c['share_of_copy']:.2f}"
        table.add_row(
            *(str(c[axis]) for axis in ("rows", "H", "C")), f"{us['elang']:.1f}", peer,
            _mark(us[peer] / us["elang"], PEER_BAR),
            _mark(c["share_of_matrix_rate"], MATRIX_BAR) if c["rows"] == 4096 else matrix,
            _mark(c["share_of_copy"], HEAD_BANDWIDTH_BAR) if c["rows"] <= 16 else copy,
            f"{c['error']['elang']:.2g} ({'met' if c['error']['elang'] <= c['error'][peer] else 'MISSED'})",
            f"{c['error'][peer]:.2g}",
        )  # fmt: skip
    console.print(table)
    for peer, why in dict(pair for c in cells for pair in c["missing"].items()).items():
        console.print(f"without {peer}: {why}")


def _joint(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table(
        *(
            "batch",
            "lengths",
            "share routed",
            "dispatch efficiency",
            "x naive cascade",
            "x Super alone",
            "eta",
            "eta ceiling",
        )
    )
    for c in cells:
        bar = NAIVE_BARS.get(c["batch"], -math.inf) if c["lengths"] == "ragged" else -math.inf
        naive = f"{c['speedup_naive']:.2f}" if bar == -math.inf else _mark(c["speedup_naive"], bar)
        table.add_row(
            str(c["batch"]), c["lengths"], f"{c['share_routed']:.2f}", _mark(c["dispatch_efficiency"], EFFICIENCY_BAR),
            naive, f"{c['speedup_super']:.2f}", f"{c['eta']:.2f}", f"{c['eta_ceiling']:.2f}",
        )  # fmt: skip
    console.print(table)


def _modes(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table(
        *("run", "batch", "share routed", "mode", "efficiency", "over Swift", "x naive"),
        *("x per sample", "x Super", "eta", "ceiling", "p50 ms", "p99 ms", "padding"),
    )
    for c in cells:
        table.add_row(
            c["run"], str(c["batch"]), f"{c['share_routed']:.2f}", c["mode"],
            f"{c['dispatch_efficiency']:.2f}", f"{c['seconds']['joint'] / c['seconds']['swift']:.3f}",
            f"{c['speedup_naive']:.2f}", f"{c['speedup_per_sample']:.2f}" if "speedup_per_sample" in c else "",
            *(f"{c[name]:.2f}" for name in ("speedup_super", "eta", "eta_ceiling")),
            *(f"{c['latency'][q] * 1e3:.1f}" for q in ("p50", "p99")), str(c["padding"]),
        )  # fmt: skip
    console.print(table)
    for mode in ("exact", "bucket"):
        of_mode = [c for c in cells if c["mode"] == mode]
        least = _mark(min(c["dispatch_efficiency"] for c in of_mode), EFFICIENCY_BAR)
        unpadded = min(c["efficiency_past_padding"] for c in of_mode)
        past = f", past its padding {unpadded:.2f}" if mode == "bucket" else ""
        console.print(f"{mode}: least dispatch efficiency {least}{past}")


def _nothing_routed(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table("run", "batch", "Swift ms", "exact over Swift", "bucket over Swift", "exact, us more for a batch")
    for c in cells:
        seconds, batches = c["seconds"], c["rows"] / c["batch"]
        ratios = (_mark_most(seconds[mode] / seconds["swift"], OVERHEAD_BAR, 3) for mode in ("exact", "bucket"))
        more = (seconds["exact"] - seconds["swift"]) / batches * 1e6
        table.add_row(c["run"], str(c["batch"]), f"{seconds['swift'] / batches * 1e3:.2f}", *ratios, f"{more:.0f}")
    console.print(table)


def _seq2seq(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table(
        *("batch", "share routed", "tokens", "joint s", "tokens/s", "dispatch efficiency", "x naive cascade"),
        *("x Super alone", "Swift over Super"),
    )
    for c in cells:
        seconds, tokens = c["seconds"], c["rows"] * c["new_tokens"]
        table.add_row(
            str(c["batch"]), f"{c['share_routed']:.3f}", str(tokens), f"{seconds['joint']:.2f}",
            f"{tokens / seconds['joint']:.1f}", _mark(c["dispatch_efficiency"], SEQ2SEQ_EFFICIENCY_BAR),
            f"{c['speedup_naive']:.2f}", f"{c['speedup_super']:.2f}", f"{seconds['super'] / seconds['swift']:.2f}",
        )  # fmt: skip
    console.print(table)


def _route_latency(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table(
        *("rows", "C", "in graph us", "x skeleton", "x static chain", "x torch.compile", "x triton twin"),
        *("eager us", "x eager chain"),
    )
    for c in cells:
        us = {name: spread["p50"] for name, spread in c["in_graph"].items()}
        skeleton = us["elang"] / us["skeleton"] if "skeleton" in us else math.nan
        small = c["C"] <= 32
        table.add_row(
            str(c["rows"]), str(c["C"]), f"{us['elang']:.2f}",
            _mark_most(skeleton, SKELETON_BAR) if small else f"{skeleton:.2f}",
            _mark(us["static chain"] / us["elang"], STATIC_BAR) if small else f"{us['static chain'] / us['elang']:.2f}",
            *(f"{us[name] / us['elang']:.2f}" for name in ("torch.compile", "triton")),
            f"{c['eager']['elang']['p50']:.1f}",
            _mark(c["eager"]["chain"]["p50"] / us["elang"], EAGER_BAR) if small else "",
        )  # fmt: skip
    console.print(table)


def _route_bandwidth(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table("rows", "C", "share routed", "us", "GB/s", "share of a copy's")
    for c in cells:
        share = c["share_of_copy"]
        at_bar = (c["rows"], c["C"]) == (65_536, 3)
        table.add_row(
            str(c["rows"]), str(c["C"]), f"{c['share_routed']:.2f}", f"{c['microseconds']['p50']:.1f}",
            f"{c['bytes_per_second'] / 1e9:.0f}", _mark(share, ROUTE_BANDWIDTH_BAR) if at_bar else f"{share:.2f}",
        )  # fmt: skip
    console.print(table)


def _rows(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table(
        "rows", "row bytes", "share routed", "gather us", "share of a copy's", "x index_select", "merge's share"
    )
    for c in cells:
        us = {name: spread["p50"] for name, spread in c["microseconds"].items()}
        share, large = c["share_of_copy"], c["row_bytes"] * c["rows"] * c["share_routed"] >= 1 << 28
        table.add_row(
            str(c["rows"]), str(c["row_bytes"]), f"{c['share_routed']:.2f}", f"{us['gather']:.1f}",
            _mark(share["gather"], GATHER_BAR) if large else f"{share['gather']:.2f}",
            f"{us['index_select'] / us['gather']:.2f}", f"{share['merge']:.2f}",
        )  # fmt: skip
    console.print(table)


def _microseconds(console: Console, cells: list[dict[str, Any]]) -> None:
    names = list(cells[0]["microseconds"])
    table = _table("rows", *(f"{name} us" for name in names))
    for c in cells:
        table.add_row(str(c["rows"]), *(f"{c['microseconds'][name]['p50']:.1f}" for name in names))
    console.print(table)


def _joint_cuda(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table(
        *("batch", "share routed", "graph us", "exact us", "naive us", "efficiency of graph", "of exact", "x naive"),
        "overhead us",
    )
    for c in cells:
        us, ideal = ({name: spread["p50"] for name, spread in c[key].items()} for key in ("microseconds", "ideal"))
        naive = us["naive"] / us["graph"]
        overhead = us["graph"] - ideal["graph"] - c["branch_microseconds"]
        table.add_row(
            str(c["batch"]), f"{c['share_routed']:.2f}", *(f"{us[name]:.1f}" for name in ("graph", "exact", "naive")),
            *(_mark(ideal[m] / us[m], bar) if m in us else "" for m, bar in GRAPH_EFFICIENCY_BARS.items()),
            _mark(naive, GRAPH_NAIVE_BAR) if c["batch"] <= 16 else f"{naive:.2f}",
            "" if c["share_routed"] else _mark_most(overhead, GRAPH_OVERHEAD_BAR),
        )  # fmt: skip
    console.print(table)


def _checks(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table("stage", "result", "seconds", "what it said")
    for c in cells:
        table.add_row(c["stage"], c["result"], f"{c['seconds']:.0f}", c["said"])
    console.print(table)


def _soak(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table(
        *("through", "clients", "rows", "requests", "rows/s", "by Swift", "by Super", "degraded", "cancelled"),
        *("failed", "refused", "rows of Super's batches", "MiB for 1e5 rows", "wrong"),
    )
    for c in cells:
        counts = (c["counts"].get(name, 0) for name in ("swift", "super", "degraded", "cancelled", "failed", "refused"))
        table.add_row(
            c["way"], str(c["clients"]), str(c["counts"]["rows"]), str(c["counts"]["requests"]),
            f"{c['counts']['rows'] / c['seconds']:.0f}", *map(str, counts), f"{_mean_rows(c['super_batches']):.1f}",
            _mark_most(c["memory"]["slope"], c["memory"]["bar"]), str(sum(c["problems"].values())),
        )  # fmt: skip
    console.print(table)


def _serve(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table(
        *("requests/s", "of Super's most", "service", "answered/s", "p50 ms", "p90 ms", "p99 ms"),
        *("sent, refused, unanswered", "rows of Super's batches", "accuracy %", "offline %", "differ"),
    )
    for c in (c for c in cells if c["relative_rate"] in SERVE_RATES):
        sizes = f"{_mean_rows(c['super_batches']):.2f}" if c["service"] == "elang" else "1"
        table.add_row(
            f"{c['rate']:.1f}", f"{c['relative_rate']:g}", SERVE_NAMES[c["service"]], f"{c['throughput']:.1f}",
            *(f"{c['latency_ms'][q]:.1f}" for q in ("p50", "p90", "p99")),
            ", ".join(str(c[name]) for name in ("sent", "refused", "unanswered")), sizes,
            f"{100 * c['accuracy']:.2f}", f"{100 * c['offline_accuracy']:.2f}", str(c["differ"]),
        )  # fmt: skip
    console.print(table)
    for name, title in SERVE_NAMES.items():
        mine = sorted((c for c in cells if c["service"] == name), key=lambda c: c["rate"])
        kept = list(itertools.takewhile(_within_limit, mine))
        limit = f"p99 within {mine[0]['limit_ms']:g} ms"
        if not kept:
            console.print(f"{title}: {limit} at none of the rates")
            continue
        knee = kept[-1]
        shown = ", ".join(f"{q} {knee['latency_ms'][q]:.1f} ms" for q in ("p50", "p99"))
        sizes = f", Super's batches {_mean_rows(knee['super_batches']):.2f} rows" if name == "elang" else ""
        more = "" if len(kept) < len(mine) else ", the highest rate asked"
        console.print(f"{title}: {limit} up to {knee['rate']:.1f} requests/s{more}: {shown}{sizes}")


def _ray(console: Console, cells: list[dict[str, Any]]) -> None:
    table = _table("Super", "a call over a row of Super, p50", "p99", "apart over together, p50", "p99", "requests/s")
    for cell in cells:
        figures = (*cell["hop_over_super"].values(), *cell["apart_over_together"].values())
        table.add_row(cell["super"], *(f"{figure:.2f}" for figure in figures))
    console.print(table)


def _within_limit(cell: dict[str, Any]) -> bool:
    return cell["latency_ms"]["p99"] <= cell["limit_ms"] and not cell["refused"] and not cell["unanswered"]


def _mean_rows(batches: dict[Any, int]) -> float:
    """Of batches by their rows, which JSON has made strings."""
    rows = sum(int(size) * count for size, count in batches.items())
    return rows / sum(batches.values()) if batches else math.nan


SECTIONS = {
    "soak": _soak,
    "serve": _serve,
    "ray": _ray,
    "check": _checks,
    "route": _route,
    "vocab": _vocab,
    "joint": _joint,
    "modes": _modes,
    "nothing_routed": _nothing_routed,
    "seq2seq": _seq2seq,
    "vocab_cuda": _vocab_cuda,
    "route_latency": _route_latency,
    "route_bandwidth": _route_bandwidth,
    "rows": _rows,
    "joint_cuda": _joint_cuda,
    "batch": _microseconds,
    "host_read": _microseconds,
    "branch": _microseconds,
}


def render(path: Path) -> str:
    """The file as tables."""
    from rich.console import Console

    console = Console(width=150, file=io.StringIO(), record=True)
    for bench, show in SECTIONS.items():
        if section := json.loads(path.read_text()).get(bench):
            about = ", ".join(f"{key} {value}" for key, value in section.items() if key != "cells")
            console.print(f"\n[bold]{bench}[/bold]: {about}", highlight=False)
            show(console, section["cells"])
    return console.export_text()


if __name__ == "__main__":
    print(render(Path(sys.argv[1]) if len(sys.argv) > 1 else results_file()))
