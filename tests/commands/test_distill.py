from __future__ import annotations

import json

import pytest
import typer
from demo_models import TEXTS, save_model
from typer.testing import CliRunner

from elang import distillation
from elang.commands.distill import distill
from elang.distillation import Distillation

pytestmark = pytest.mark.usefixtures("one_thread")

app = typer.Typer()
app.command()(distill)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    save_model(folder / "super", layers=2)
    (folder / "texts.txt").write_text("\n".join(TEXTS), "utf-8")
    return folder


@pytest.fixture
def elang(folder, tmp_path):
    def invoke(*options, super_=folder / "super", data=folder / "texts.txt", layers="1", out=tmp_path / "out"):
        given = ["--super", super_, "--data", data, "--layers", layers, "-o", out, *options]
        return CliRunner().invoke(app, list(map(str, given)), env={"COLUMNS": "120"})

    return invoke


def plain(panel):
    """What typer's frame says, in one line."""
    return " ".join(panel.replace("│", " ").split())


def one_line(result):
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_command_agrees_with_the_api(elang, folder, tmp_path):
    result = elang("--epochs", "1", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    by_command = Distillation.model_validate_json(result.stdout)
    assert by_command == Distillation.load(tmp_path / "out" / "distillation.json")
    by_api = distillation.distill(
        str(folder / "super"), TEXTS, [1], tmp_path / "by hand", epochs=1, data="texts.txt"
    ).model_dump(exclude={"provenance": {"date"}, "students": {"__all__": {"time_speedup"}}})
    assert by_command.model_dump(exclude={"provenance": {"date"}, "students": {"__all__": {"time_speedup"}}}) == by_api


def test_the_table_and_what_is_written(elang, tmp_path):
    result = elang("--epochs", "1", "--alpha", "0.6", "--delta", "0.9")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "texts.txt: 8 held-out texts, 72 to learn from" in result.stdout
    assert "swift-1: its threshold in calibration-1.json" in result.stdout
    assert "swift-1: no threshold" in elang("--epochs", "1").stdout
    written = {"swift-1", "distillation.json"}
    assert written <= {path.name for path in (tmp_path / "out").iterdir()}


def test_every_option_arrives(elang, folder, tmp_path, monkeypatch):
    seen = {}

    def watched(*given, **options):
        seen.update(options, given=given)
        raise ValueError("enough")

    monkeypatch.setattr(distillation, "distill", watched)
    options = {
        "epochs": 7,
        "batch_size": 8,
        "learning_rate": 0.25,
        "temperature": 4.5,
        "max_length": 9,
        "alpha": 0.125,
        "delta": 0.375,
        "seed": 11,
    }
    text = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert one_line(elang(*text, layers="2, 1,3")) == "elang distill: enough\n"
    given = (str(folder / "super"), [(text,) for text in TEXTS], (2, 1, 3), tmp_path / "out")
    assert seen == {**options, "data": "texts.txt", "given": given}


def test_the_defaults_are_those_of_the_api(elang, monkeypatch):
    seen = {}

    def watched(*given, **options):
        seen.update(options)
        raise ValueError("enough")

    defaults = distillation.distill.__kwdefaults__
    monkeypatch.setattr(distillation, "distill", watched)
    one_line(elang())
    assert seen == {**defaults, "data": "texts.txt"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "1;2"}, "got '1;2', wanted K[,K...] such as 1,2,4"),
        ({"layers": "-1"}, "got '-1', wanted K[,K...]"),
        ({"layers": ""}, "got '', wanted K[,K...]"),
        ({"data": "not/there.txt"}, "not/there.txt"),
        ({"more": ("--epochs", "0")}, "--epochs"),
        ({"more": ("--batch-size", "0")}, "--batch-size"),
        ({"more": ("--learning-rate", "0")}, "got 0, wanted a finite number > 0"),
        ({"more": ("--temperature", "-1")}, "got -1, wanted a finite number > 0"),
        ({"more": ("--alpha", "1")}, "got 1, wanted a number in (0, 1)"),
        ({"more": ("--delta", "0")}, "got 0, wanted a number in (0, 1)"),
    ],
)
def test_wrong_usage(elang, options, message):
    result = elang(*options.pop("more", ()), **options)
    assert result.exit_code == 2, result.output
    assert message in plain(result.stderr)


def test_what_cannot_be_done_is_one_line(elang, folder, tmp_path):
    assert "elang distill: layers: got [2], wanted numbers from 1 to 1: Super has 2" in one_line(elang(layers="2"))
    (tmp_path / "alike.csv").write_text("text\n" + "\n".join(TEXTS[:9] * 5))
    assert "texts: got 9 distinct ones, wanted at least 40" in one_line(elang(data=tmp_path / "alike.csv"))
    (tmp_path / "few.txt").write_text("\n".join(TEXTS[:9]))
    assert "few.txt: got 9 texts, wanted at least 40" in one_line(elang(data=tmp_path / "few.txt"))
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt: got 0 texts, wanted at least 40" in one_line(elang(data=tmp_path / "empty.txt"))
    (tmp_path / "torn.jsonl").write_text('{"text": "one"}\n{')
    assert "torn.jsonl, line 2: got" in one_line(elang(data=tmp_path / "torn.jsonl"))
    assert "elang distill: super: got" in one_line(elang(super_=tmp_path / "nothing"))
    assert not (tmp_path / "out").exists()


def test_help_has_an_example_that_names_real_options():
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0
    example = next(line for line in result.output.splitlines() if "elang distill --super" in line)
    options = [option for option in example.split() if option.startswith("-")]
    assert len(options) == 4
    assert all(option in result.output.replace(example, "") for option in options)


def test_json_is_json_alone(elang):
    assert json.loads(elang("--epochs", "1", "--json").stdout)["version"] == 1
