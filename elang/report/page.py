"""The page: what was run, what came of it, and a slider that moves the threshold. One file, no network."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import numpy as np

from elang import __version__
from elang.calibration.compare import area_gain
from elang.evaluation.evaluation import Evaluation
from elang.evaluation.published import SOURCE
from elang.report.figures import Chart, alike, quality_of, sentence
from elang.report.points import CONFIDENCE, Example, Points, by_label, hardest, outcomes, reliability
from elang.report.run import Run

FORMATS = {
    "threshold": "{!s}",
    **dict.fromkeys(("share_kept", "accuracy", "lower", "upper", "random_accuracy"), "{:.1%}"),
    **dict.fromkeys(("flops_speedup", "time_speedup"), "{:.2f}x"),
    **dict.fromkeys(("kept", "kept_wrong", "routed", "routed_in_vain", "wrong"), "{:,}"),
}


def page(run: Run, points: Points, charts: Sequence[Chart]) -> str:
    """The report as HTML, with plotly.js inside. Needs `elang[report]`.

    Raises:
        ImportError: no plotly.
    """
    try:
        from plotly import __version__ as plotly_version
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("reports need plotly: pip install 'elang[report]'") from error
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = run.rows.provenance
    labels, (wrong, in_vain), reliable = by_label(points), hardest(points), reliability(points)
    figures = outcomes(points, None if run.bench is None else run.bench.costs)
    texts = {name: list(map(FORMATS[name].format, column)) for name, column in figures.items()}
    for i, label in enumerate(labels):
        texts[f"joint of {i}"] = [f"{share:.1%}" for share in label.joint]
        texts[f"kept of {i}"] = [f"{share:.1%}" for share in label.share_kept]
    plots = [{**chart._asdict(), "moves": [move._asdict() for move in chart.moves]} for chart in charts]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    template = resources.files("elang.report").joinpath("page.html").read_text("utf-8")
    return environment.from_string(template).render(
        rows=run.rows,
        evaluation=run.evaluation,
        calibration=run.calibration,
        bench=run.bench,
        points=points,
        quality=quality_of(run),
        Quality=sentence(quality_of(run)),
        texts=texts,
        labels=labels,
        charts={chart.name: chart for chart in charts},
        data={"texts": texts, "plots": plots},
        scores=list(_scores(points)),
        unusable=[name for name in run.rows.scores if name not in points.curves],
        reliability=reliable,
        bins=list(zip(*reliable[:5], strict=True)),
        left_out=points.n - len(points.descending),
        systems=[] if run.evaluation is None else list(_systems(run.evaluation)),
        wrong=[_example(points, example) for example in wrong],
        in_vain=[_example(points, example) for example in in_vain],
        confidence=f"{CONFIDENCE:.0%}",
        command=shlex.join(run.rows.command),
        fingerprints=[
            ("Swift", source.swift_sha256),
            ("Super", source.super_sha256),
            ("Energy head", source.head_sha256),
            ("Rows", source.data_sha256),
        ],
        source=SOURCE,
        version=__version__,
        plotly_version=plotly_version,
        plotly_js=Markup(get_plotlyjs()),
    )


def _scores(points: Points) -> Iterator[dict[str, Any]]:
    """One row for all scores that rank alike, the largest area first."""
    for names in sorted(alike(points.curves), key=lambda names: -points.curves[names[0]].area):
        curve = points.curves[names[0]]
        gain = area_gain(
            points.rows.score_values(names[0]), points.swift_right, points.super_right, confidence=CONFIDENCE
        )
        yield {
            "names": " = ".join(names),
            "area": f"{curve.area:.2%}",
            "gain": f"{100 * gain.value:+.2f}",
            "interval": f"{100 * gain.lower:+.2f} to {100 * gain.upper:+.2f}",
            "not_finite": curve.not_finite,
        }


def _systems(evaluation: Evaluation) -> Iterator[dict[str, str]]:
    """The lines of its CSV: the systems measured, then the published ones."""
    for line in csv.DictReader(io.StringIO(evaluation.csv())):
        measured = line["source"] == "measured"
        quality = evaluation.swift.quality if measured else ("published_quality",)
        yield {
            "name": line["system"],
            "threshold": line["threshold"] and str(np.float32(float(line["threshold"]))),
            "source": "measured here" if measured else "published",
            "quality": " / ".join(_rounded(line[metric], 1) for metric in quality),
            "random": _rounded(line["random_accuracy"], 1),
            "kept": _rounded(line["swift_ratio"], 1),
            "flops": _rounded(line["flops_speedup"], 2),
            "time": _rounded(line["time_speedup"], 2),
        }


def _rounded(text: str, digits: int) -> str:
    return text and f"{float(text):.{digits}f}"


def _example(points: Points, example: Example) -> dict[str, Any]:
    rows, row, score = points.rows, example.row, points.score[example.row]
    return {
        "id": rows.id[row],
        "text": rows.text[row],
        "target": rows.target[row],
        "swift": rows.swift[row],
        "super": rows.super[row],
        "score": f"{score:.6g}" if np.isfinite(score) else "not finite",
        "kept_from": example.kept_from,
    }
