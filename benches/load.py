"""`python benches/load.py`: latency against rate of a batcher's service, of Super alone and of the naive cascade.

Each service is a process of its own, with one thread of torch, on one core; from another core come requests of one text
each, at times that do not depend on the answers. The services take turns at every rate, with the same arrivals. Rates
are in times of what Super alone answers at most. A service's knee is the last rate up to which its p99 stays within the
limit. Every answer is compared with the one computed offline. Exits 1 if one differs, or a request fails.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import report
from arrivals import GRACE, NONE, Traffic, closed_loop, open_loop
from offline import Offline
from rich.console import Console
from services import SERVICES, Models
from wire import Server, served, super_batches

from elang.demo.data import movie_reviews, read_csv
from elang.demo.store import cache_folder
from elang.demo.train import Pair, train_pair
from elang.demo.workers import prepared
from elang.progress import Report, bar

RATES = tuple(sorted((0.25, *report.SERVE_RATES, 0.7, 1.0, 1.1, 1.6, 2.0, 2.5, 3.2, 4.0)))
SECONDS, ROUNDS, LIMIT_MS = 20.0, 2, 100.0
SATURATED = 0.9  # where a service answers a smaller share of the rate, higher ones are not asked, but for the three
IDLE = 60.0  # seconds that a service has to work off what it was asked
COLORS = {"elang": "#1f5fbf", "super": "#6b7280", "naive": "#d97706"}


def sweep(
    servers: Mapping[str, Server],
    texts: Sequence[str],
    offline: Offline,
    seconds: float,
    rounds: int,
    limit_ms: float,
    shown: Report,
) -> list[dict[str, Any]]:
    """A cell of the results for each service and rate."""
    most = asyncio.run(closed_loop(servers["super"].port, texts, min(seconds, 5.0), clients=8))
    cells, full = [], set[str]()
    for step, relative in enumerate(RATES):
        asked = [name for name in servers if name not in full or relative in report.SERVE_RATES]
        runs: dict[str, list[Traffic]] = {name: [] for name in asked}
        batches = {name: Counter[int]() for name in asked}
        for i in range(rounds):
            for name in asked[:: -1 if i % 2 else 1]:
                before = _super_batches(name, servers[name])
                arrivals = open_loop(servers[name].port, texts, relative * most, seconds, seed=rounds * step + i)
                runs[name].append(asyncio.run(arrivals))
                _until_idle(servers[name])
                batches[name] += _super_batches(name, servers[name]) - before
        for name in asked:
            about = {"service": name, "relative_rate": relative, "rate": relative * most, "limit_ms": limit_ms}
            cells.append({**about, **summary(name, runs[name], offline), "super_batches": dict(batches[name])})
            if cells[-1]["throughput"] < SATURATED * relative * most:
                full.add(name)
        shown(step + 1, len(RATES))
    return cells


def summary(service: str, runs: Sequence[Traffic], offline: Offline) -> dict[str, Any]:
    """Of all rounds together. Without an answer in time, a latency is the least that it would have been."""
    rows, late, latency, status = (
        np.concatenate([getattr(run, name) for run in runs]) for name in ("rows", "late", "latency", "status")
    )
    answered, refused, none = status == 200, status == 503, status == NONE
    labels = [label for run in runs for label in run.labels if label]
    correct = [
        offline.names.index(label) == due for label, due in zip(labels, offline.labels[rows[answered]], strict=True)
    ]
    return {
        "threads": 1,
        "sent": len(rows),
        "answered": int(answered.sum()),
        "refused": int(refused.sum()),
        "unanswered": int(none.sum()),
        "failed": int((~(answered | refused | none)).sum()),
        "throughput": float(answered.sum() / sum(run.seconds for run in runs)),
        "latency_ms": _percentiles(latency[~refused]),
        "sent_late_ms": _percentiles(late[answered]),
        "accuracy": float(np.mean(correct)),
        "offline_accuracy": offline.accuracy(service),
        "share_routed": 1.0 if service == "super" else offline.share_routed,
        "differ": int(offline.differ(service, rows[answered], labels).sum()),
        "unsettled": int(offline.unsettled[service].sum()),
    }


def _percentiles(seconds: Any) -> dict[str, float]:
    return {f"p{q}": round(1e3 * float(np.percentile(seconds, q)), 3) for q in (50, 90, 99)}


def _super_batches(name: str, server: Server) -> Counter[int]:
    """Only the batcher's service counts them; the others' are of one row."""
    return Counter(super_batches(server.get("/metrics"))) if name == "elang" else Counter()


def _until_idle(server: Server) -> None:
    """Nothing is left of what was asked, and not waited for."""
    end, before = time.monotonic() + IDLE, -1
    while before != (now := _ticks(server.pid)):
        if time.monotonic() > end:
            raise RuntimeError(f"the service is at work {IDLE:g} s after its last request")
        before = now
        time.sleep(0.3)


def _ticks(pid: int) -> int:
    """Hundredths of a second of processor time."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


def plot(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Latency against rate: p50 drawn through, p99 dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, title in report.SERVE_NAMES.items():
        mine = [c for c in cells if c["service"] == name]
        for q, style in (("p50", "o-"), ("p99", "o--")):
            values = [c["latency_ms"][q] for c in mine]
            label = f"{title}, {q}"
            axes.plot([c["rate"] for c in mine], values, style, color=COLORS[name], markersize=4, label=label)
    axes.axhline(cells[0]["limit_ms"], color="#9ca3af", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"the limit of a knee, {cells[0]['limit_ms']:g} ms",
        (0.01, cells[0]["limit_ms"]),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color="#6b7280",
        fontsize="small",
    )
    axes.set_yscale("log")
    axes.set_xlabel("requests per second, as they come (Poisson)")
    axes.set_ylabel("milliseconds from the time a request is due")
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swift", help="folder or hub id, with --super; without, the pair of `elang demo`")
    parser.add_argument("--super", dest="super_")
    parser.add_argument("--csv", type=Path, help="text,label rows in place of the demo's movie reviews")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of a service at a rate, a round ({SECONDS:g})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of all services at a rate ({ROUNDS})")
    parser.add_argument("--limit-ms", type=float, default=LIMIT_MS, help=f"of p99, up to the knee ({LIMIT_MS:g})")
    parser.add_argument("--save", action="store_true", help="keep benches/results/serve.json and serve.png")
    given = parser.parse_args()
    if (given.swift is None) != (given.super_ is None):
        parser.error("--swift, --super: got one of them, wanted both or neither")
    if given.seconds <= 0 or given.rounds < 1:
        parser.error("wanted --seconds > 0 and --rounds >= 1")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("wanted two cores, one for the services and one for the requests")
    console = Console(width=150)
    with prepared(console) as progress:
        dataset = movie_reviews(cache_folder()) if given.csv is None else read_csv(given.csv)
        pair = train_pair(dataset, cache_folder(), progress) if given.swift is None else Pair(given.swift, given.super_)
        task = progress.add_task("answers offline", total=None)
        offline = Offline(dataset, pair.swift, pair.super_)
        progress.update(task, total=1, completed=1)
    minutes = len(RATES) * len(SERVICES) * given.rounds * (given.seconds + GRACE) / 60
    console.print(f"{offline.calibration.summary()}\nat most {minutes:.0f} minutes follow")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        models = Models(pair.swift, pair.super_, str(Path(folder, "calibration.json")))
        offline.calibration.save(models.calibration)
        servers = {
            name: stack.enter_context(served(service, models, core=cores[0])) for name, service in SERVICES.items()
        }
        os.sched_setaffinity(0, {cores[1]})
        shown = stack.enter_context(bar("rates"))
        cells = sweep(servers, dataset.test.texts, offline, given.seconds, given.rounds, given.limit_ms, shown)
    if given.save:
        file = report.save({"serve": cells}, report.results_file("serve"), " ".join(["python", *sys.argv]))
        plot(cells, file.with_suffix(".png"))
    report.SECTIONS["serve"](console, cells)
    wrong = sum(c["differ"] + c["failed"] for c in cells)
    console.print(f"{wrong} answers are not the ones computed offline" if wrong else "every answer is as offline")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
