from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
from made_up import NASTY, answered, benched, evaluated, save_run

from elang.calibration.compare import area_gain
from elang.evaluation.published import PUBLISHED
from elang.report import Run, charts, load_run, operating_points, outcomes, page


class Page(HTMLParser):
    """The elements with their attributes, the scripts, and the cells of every table by its label."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.scripts, self.tables, self.text, self.open = [], [], {}, {}, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "img"):
            self.open.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if dict(attrs).get("class") == "table":
            self.rows = self.tables.setdefault(dict(attrs)["aria-label"], [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if tags[-1:] == ["script"]:
            self.scripts[-1] += data
            return
        if {"td", "th"} & set(tags):
            self.rows[-1][-1] += data
        for _, attrs in self.open:
            if "data-text" in attrs:
                self.text.setdefault(attrs["data-text"], []).append(data)

    def of(self, wanted):
        return [attrs for tag, attrs in self.elements if tag == wanted]


def made(run):
    points = operating_points(run.rows)
    drawn = charts(run, points)
    html = page(run, points, drawn)
    return html, Page(html), drawn


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = save_run(tmp_path_factory.mktemp("run"), answered(3), calibration=True, bench=True)
    run = load_run(folder)
    return run, *made(run)


def test_all_text_is_escaped(everything):
    run, html, parsed, _ = everything
    assert NASTY in run.rows.text
    assert "&lt;/script&gt;&lt;script&gt;document.title" in html
    assert parsed.of("img") == []
    assert "swift/&lt;small&gt;" in html
    labels = ("</script><b>", "neutral", "contradiction")
    _, parsed, _ = made(Run(answered(labels=labels, target=labels * 100 + labels[:1] * 100)))
    assert parsed.of("b") == [{}] * len(parsed.of("b"))
    assert [row[0] for row in parsed.tables["By label"][1:]] == list(labels)
    json.loads(parsed.scripts[0])


def test_nothing_is_loaded_from_elsewhere(everything):
    _, html, parsed, _ = everything
    assert [attrs["href"] for _, attrs in parsed.elements if "href" in attrs] == ["data:,"]
    assert not any("src" in attrs for _, attrs in parsed.elements)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert len(parsed.scripts) == 3
    policy = next(attrs["content"] for attrs in parsed.of("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none';")


def test_the_page_begins_at_the_threshold_asked_for(everything):
    run, _, parsed, _ = everything
    points = operating_points(run.rows)
    figures = {name: column[points.initial] for name, column in outcomes(points, run.bench.costs).items()}
    for name in ("share_kept", "accuracy", "lower", "upper", "random_accuracy"):
        assert set(parsed.text[name]) == {f"{figures[name]:.1%}"}
    for name in ("flops_speedup", "time_speedup"):
        assert parsed.text[name] == [f"{figures[name]:.2f}x"]
    for name in ("kept", "kept_wrong", "routed", "wrong", "routed_in_vain"):
        assert set(parsed.text[name]) == {str(figures[name])}
    assert parsed.text["threshold"] == [str(np.float32(run.rows.thresholds[0]))]
    (slider,) = parsed.of("input")
    assert (slider["type"], slider["value"], slider["max"]) == ("range", str(points.initial), "200")
    assert {"for": "position"} in parsed.of("label")
    assert {"for": "position"} in parsed.of("output")
    shown = {(e["data-shown"], int(e["data-kept-from"]), "hidden" in e) for e in parsed.of("li")}
    assert shown
    for list_, kept_from, hidden in shown:
        assert hidden == ((points.initial >= kept_from) != (list_ == "kept"))


def test_measured_and_published_stand_side_by_side(everything):
    run, _, parsed, _ = everything
    p = PUBLISHED["sst2"]
    shares = [f"{p.swift_ratio:.1f}", f"{p.flops_speedup:.2f}", f"{p.time_speedup:.2f}"]
    head, *rows = parsed.tables["Evaluation"]
    assert head == ["system", "quality", "random", "kept", "FLOPs x", "time x"]
    threshold = np.float32(run.rows.thresholds[0])
    assert rows == [
        ["Swift measured here", "79.6", "", "100.0", "8.77", "5.40"],
        ["Super measured here", "90.5", "", "0.0", "1.00", "1.00"],
        [f"joint at {threshold!s} measured here", "88.2", "84.1", "66.5", "2.35", "1.70"],
        ["Swift published", str(p.swift), "", "", "", ""],
        ["Super published", str(p.super), "", "", "", ""],
        ["joint published", str(p.joint), "", *shares],
    ]


def test_two_metrics_and_no_published_figures():
    rows = answered()
    quality = {"accuracy": 80.04, "f1": 70.06}
    of_swift = evaluated(rows).swift
    one = of_swift.model_copy(update={"quality": quality})
    evaluation = evaluated(rows, swift=one, super=one, joint=(), timing=None, published=None)
    html, parsed, _ = made(Run(rows, evaluation))
    assert [row[1] for row in parsed.tables["Evaluation"]] == ["quality", "80.0 / 70.1", "80.0 / 70.1"]
    assert "The paper prints no figures for this task." in html


def test_every_score_with_its_area_and_gain(everything):
    run, _, parsed, _ = everything
    rows, points = run.rows, operating_points(run.rows)
    lines = {line[0]: line[1:] for line in parsed.tables["Every score"][1:]}
    assert set(lines) == set(rows.scores)
    for name, (area, gain, interval, not_finite) in lines.items():
        expected = area_gain(rows.score_values(name), rows.swift_right, rows.super_right)
        assert area == f"{points.curves[name].area:.2%}"
        assert gain == f"{100 * expected.value:+.2f}"
        assert interval == f"{100 * expected.lower:+.2f} to {100 * expected.upper:+.2f}"
        assert not_finite == "1"


def test_scores_that_rank_alike_share_a_line():
    _, parsed, drawn = made(Run(answered(2)))
    assert {line[0] for line in parsed.tables["Every score"][1:]} == {"energy", "max_prob = neg_entropy = margin"}
    curves = next(chart for chart in drawn if chart.name == "curves")
    names = [trace["name"] for trace in curves.traces]
    assert names[1:] == ["energy", "max_prob (+2)", "at random", "operating point"]


def test_a_score_that_is_never_finite_is_named_and_left_out():
    rows = answered()
    html, parsed, _ = made(Run(rows.model_copy(update={"scores": rows.scores | {"max_prob": (None,) * 400}})))
    assert "Finite for no row, and left out: max_prob." in html
    assert {line[0] for line in parsed.tables["Every score"][1:]} == {"energy", "neg_entropy = margin"}
    assert "energy is no probability" in html


def test_what_is_not_there_is_left_out():
    html, parsed, drawn = made(Run(answered(labels=(), not_finite=())))
    assert [chart.name for chart in drawn] == ["flops", "histogram", "curves", "reliability"]
    assert set(parsed.tables) == {"Every score", "Reliability of Swift"}
    for words in ("time speed-up", "Calibration</h2>", "Beside the paper", "whose score is not finite"):
        assert words not in html
    _, parsed, drawn = made(Run(answered(), bench=benched(answered(), points=False)))
    assert {"time", "buckets"} <= {chart.name for chart in drawn}
    assert "dispatch" not in {chart.name for chart in drawn}
    assert {"Costs"} == {name for name in parsed.tables if name in ("Costs", "Dispatch")}


def test_agreement_with_super_is_not_called_accuracy():
    rows = answered(super_right=(True,) * 400, judged_by="super")
    html, _, drawn = made(Run(rows))
    assert "Super is right by definition" in html
    assert "<dt>Agreement with Super</dt>" in html
    assert all("ccuracy" not in chart.layout["yaxis"]["title"]["text"] for chart in drawn)


def test_command_versions_and_fingerprints_are_stated(everything):
    run, html, _, _ = everything
    assert "elang eval --task sst2 --swift &#39;a folder&#39;" in html
    for wanted in ("5" * 64, "a" * 64, "d" * 64, run.rows.provenance.library, "2025-01-02T03:04:05+00:00"):
        assert wanted in html
    assert "Calibration</h2>" in html
    assert "These are the very rows of this report" in html


def test_figures_are_what_plotly_knows(everything):
    *_, drawn = everything
    assert [c.name for c in drawn] == ["flops", "time", "histogram", "curves", "reliability", "buckets", "dispatch"]
    for chart in drawn:
        go.Figure({"data": chart.traces, "layout": chart.layout})
        for move in chart.moves:
            assert len(move.values) == 201
            trace = chart.traces[move.trace]
            initial = operating_points(everything[0].rows).initial
            assert trace[move.axis] == pytest.approx(move.values[initial])


def test_the_data_of_the_page_is_that_of_the_figures(everything):
    _, _, parsed, drawn = everything
    data = json.loads(parsed.scripts[0])
    assert [plot["name"] for plot in data["plots"]] == [chart.name for chart in drawn]
    for plot, chart in zip(data["plots"], drawn, strict=True):
        assert plot["traces"] == chart.traces
        assert plot["moves"] == [move._asdict() for move in chart.moves]


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_in_light_and_dark(everything):
    """WCAG 2.1, AA: 4.5 for text, 3 for the lines of a graph."""
    from elang.report import figures

    _, html, _, _ = everything
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", scheme)) for scheme in re.findall(r":root \{(.*?)\}", html)]
    assert len(schemes) == 2
    for scheme in schemes:
        colors = {name: "#" + "".join(2 * c for c in v[1:]) if len(v) == 4 else v for name, v in scheme.items()}
        for paper in (colors["paper"], colors["panel"]):
            assert min(contrast(colors[text], paper) for text in ("ink", "muted", "accent")) >= 4.5
        for line in (figures.BLUE, figures.ORANGE, figures.GREY, *figures.OTHERS):
            assert contrast(line, colors["paper"]) >= 3


def test_without_plotly_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=r"pip install 'elang\[report\]'"):
        made(Run(answered()))
