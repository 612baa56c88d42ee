from __future__ import annotations

import json

import numpy as np
import pytest
from demo_models import LABELS, TEXTS, save_model
from evaluation.released import write
from evaluation.test_kinds import tokenizer_for
from test_seq2seq import encoder_decoder
from typer.testing import CliRunner

from elang.cli import app
from elang.energy_head import EnergyHead
from elang.evaluation.answers import right_of
from elang.evaluation.rows import load_task
from elang.evaluation.run import load_model
from elang.evaluation.tasks import get_task

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 pair on SST-2's form, and its files."""
    folder = tmp_path_factory.mktemp("t5")
    lines = "".join(f"{text}\t{int(label == 'good')}\n" for text, label in zip(TEXTS, LABELS, strict=True))
    write(folder, {f"SST-2/{split}.tsv": "sentence\tlabel\n" + lines for split in ("train", "dev")})
    task, rows = get_task("sst2"), load_task("sst2", data_dir=folder)
    for name, seed, layers in (("swift", 4, 1), ("super", 7, 2)):
        encoder_decoder("T5", seed, layers=layers).save_pretrained(folder / name)
        tokenizer_for(task, rows).save_pretrained(folder / name)
    return folder


def invoke(folder, *options, swift="swift"):
    given = ["fit-head", "--task", "sst2", "--swift", folder / swift, "--data-dir", folder, "--epochs", "3", *options]
    return CliRunner().invoke(app, [*map(str, given)], env={"COLUMNS": "110"})


@pytest.mark.parametrize(("targets", "score"), [("class", "energy"), ("tokens", "energy"), ("right", "logit")])
def test_a_head_is_fitted_and_decides_in_eval(folder, tmp_path, targets, score):
    out = tmp_path / "out"
    result = invoke(folder, "--targets", targets, "-o", tmp_path / "head", "--out", out, "--json")
    if targets == "right":
        model = load_model("swift", str(folder / "swift"), get_task("sst2"))
        right = right_of(model, load_task("sst2", "train", folder), tmp_path / "by hand")
        if len(np.unique(right)) < 2:
            assert "targets: got nothing but" in result.stderr
            return
    assert result.exit_code == 0, (result.output, result.exception)
    head = EnergyHead.load(tmp_path / "head")
    assert json.loads(result.stdout) == json.loads(head.fitted.model_dump_json())
    assert head.fitted.score == score
    given = ["eval", "--task", "sst2", "--swift", folder / "swift", "--super", folder / "super", "--data-dir", folder]
    given += ["--head", tmp_path / "head", "--sweep", "--out", out, "--json"]
    result = CliRunner().invoke(app, [*map(str, given)])
    assert result.exit_code == 0, (result.output, result.exception)
    evaluation = json.loads(result.stdout)
    assert evaluation["score"] == score
    assert evaluation["provenance"]["head_sha256"] is not None
    assert len(evaluation["joint"]) > 2


def test_what_cannot_be_fitted_is_one_line(folder, tmp_path):
    save_model(tmp_path / "bert", labels=("negative", "positive"))
    for swift, options, message in (
        (tmp_path / "bert", (), "swift: got BertForSequenceClassification, wanted an encoder-decoder"),
        ("swift", ("--split", "test"), "split: got 'test', wanted one of train, validation"),
    ):
        result = invoke(folder, *options, "-o", tmp_path / "head", "--out", tmp_path / "out", swift=swift)
        assert result.exit_code == 1
        assert result.stderr.startswith("elang fit-head: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "head").exists()
    result = invoke(folder, "--targets", "luck", "-o", tmp_path / "head")
    assert result.exit_code == 2
    assert "--targets: got 'luck'" in result.stderr
