from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import typer
from report.made_up import answered, save_run
from typer.testing import CliRunner

from elang.commands.report import report

app = typer.Typer()
app.command()(report)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "110"})


def done(result):
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def one_line(result):
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def folder(tmp_path):
    return save_run(tmp_path / "run", answered(), calibration=True, bench=True)


def test_the_page_is_written(folder, tmp_path):
    path = tmp_path / "page.html"
    assert done(invoke(folder, "-o", path)) == f"Written: {path}\n"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["page.html", "run"]


def test_images_and_json(folder, tmp_path):
    path, images = tmp_path / "page.html", tmp_path / "figures"
    said = json.loads(done(invoke(folder, "-o", path, "--png", images, "--json")))
    names = ("flops", "time", "histogram", "curves", "reliability", "buckets", "dispatch")
    assert said.pop("images") == [str(images / f"{name}.png") for name in names]
    assert all((images / f"{name}.png").stat().st_size for name in names)
    assert said.pop("report") == str(path)
    rows = answered()
    kept = rows.score_values("energy") >= np.float32(rows.thresholds[0])
    right = np.where(kept, rows.swift_right, rows.super_right)
    assert said["threshold"] == rows.thresholds[0]
    assert (said["kept"], said["routed"], said["wrong"]) == (kept.sum(), (~kept).sum(), (~right).sum())
    assert said["accuracy"] == pytest.approx(right.mean())
    assert said["lower"] < said["accuracy"] < said["upper"]
    flops = sum(rows.swift_flops) + np.array(rows.super_flops)[~kept].sum()
    assert said["flops_speedup"] == pytest.approx(sum(rows.super_flops) / flops)


def test_an_infinite_threshold_in_json(tmp_path):
    folder = save_run(tmp_path, answered(thresholds=(np.inf,)), evaluation=False)
    said = json.loads(done(invoke(folder, "-o", tmp_path / "page.html", "--json")))
    assert (said["threshold"], said["kept"], "time_speedup" in said) == ("inf", 0, False)


def test_what_is_wrong_is_said_on_one_line(folder, tmp_path):
    out = tmp_path / "page.html"
    assert "got no rows.json" in one_line(invoke(tmp_path, "-o", out))
    assert "got no rows.json" in one_line(invoke(tmp_path / "nowhere", "-o", out))
    for option, given in (("-o", ()), ("--png", ("-o", out))):
        said = one_line(invoke(folder, *given, option, tmp_path / "nowhere" / "x"))
        assert f"{option}: got {tmp_path / 'nowhere' / 'x'}, wanted one in a folder that is there" in said
    (folder / "bench.json").write_text("{")
    assert "bench.json: the file: Invalid JSON" in one_line(invoke(folder, "-o", out, "--png", tmp_path / "figures"))
    assert sorted(child.name for child in tmp_path.iterdir()) == ["run"]


def test_without_plotly_the_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    said = one_line(invoke(folder, "-o", tmp_path / "page.html"))
    assert said == "elang report: reports need plotly: pip install 'elang[report]'\n"


def test_help_has_an_example():
    assert "elang report eval_output -o report.html" in done(invoke("--help"))


def test_wrong_usage():
    assert invoke().exit_code == 2
