from __future__ import annotations

import sys

import numpy as np
import pytest
from made_up import answered, benched
from matplotlib.colors import to_hex

from elang.report import Run, charts, operating_points, save_images
from elang.report.images import draw


@pytest.fixture(scope="module")
def drawn():
    rows = answered(3)
    return {chart.name: chart for chart in charts(Run(rows, bench=benched(rows)), operating_points(rows))}


def test_one_png_of_each_figure(drawn, tmp_path):
    paths = save_images([drawn["flops"], drawn["histogram"]], tmp_path)
    assert paths == [tmp_path / "flops.png", tmp_path / "histogram.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize("name", ["flops", "time", "curves", "reliability", "buckets", "dispatch"])
def test_lines_and_points_are_those_of_the_page(drawn, name):
    chart = drawn[name]
    axes = draw(chart).axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) and line.get_marker() not in ("_", "|")]
    wanted = [trace for trace in chart.traces if "fill" not in trace]
    assert len(lines) == len(wanted)
    for line, trace in zip(lines, wanted, strict=True):
        assert line.get_xdata() == pytest.approx(trace["x"])
        assert line.get_ydata() == pytest.approx(trace["y"])
        assert to_hex(line.get_color()) == trace.get("marker", trace.get("line"))["color"]
        assert (line.get_marker() != "None") == ("markers" in trace["mode"])
        assert (line.get_linestyle() != "None") == ("lines" in trace["mode"])
    for polygon, trace in zip(axes.patches, [t for t in chart.traces if "fill" in t], strict=True):
        assert polygon.get_xy()[:-1] == pytest.approx(np.stack([trace["x"], trace["y"]], axis=1))
    assert axes.get_xlabel() == chart.layout["xaxis"]["title"]["text"]
    assert axes.get_ylabel() == chart.layout["yaxis"]["title"]["text"]


def test_intervals_are_drawn(drawn):
    error = drawn["reliability"].traces[1]["error_y"]
    r = drawn["reliability"].traces[1]["y"]
    (bars,) = (c for c in draw(drawn["reliability"]).axes[0].collections)
    for segment, y, up, down in zip(bars.get_segments(), r, error["array"], error["arrayminus"], strict=True):
        assert segment[:, 1] == pytest.approx([y - down, y + up])


def test_bars_are_stacked(drawn):
    chart = drawn["histogram"]
    bars = [container.patches for container in draw(chart).axes[0].containers]
    below = np.zeros(40)
    for patches, trace in zip(bars, chart.traces[:3], strict=True):
        assert [patch.get_height() for patch in patches] == trace["y"]
        assert [patch.get_y() for patch in patches] == pytest.approx(below)
        below += trace["y"]


def test_without_matplotlib_the_extra_is_named(drawn, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'elang\[report\]'"):
        save_images(drawn.values(), tmp_path)
