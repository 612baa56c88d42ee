from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_models import LABELS, TEXTS, save_model, tokenizer
from evaluation.released import RELEASED, write
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel
from typer.testing import CliRunner

from elang.calibration import Calibration, calibrate
from elang.cli import app
from elang.commands import evaluate
from elang.evaluation import run
from elang.evaluation.evaluation import Evaluation, Timing
from elang.evaluation.rows import load_task
from elang.evaluation.run import answer_task, load_classifier, measure, sweep

TARGETS = [int(label == "good") for label in LABELS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, each with half of the rows in either class, and SST-2's file."""
    folder = tmp_path_factory.mktemp("pair")
    for name, labels, seed, layers in (
        ("swift", ("positive", "negative"), 0, 1),
        ("super", ("Negative", "Positive"), 1, 2),
    ):
        save_model(folder / name, labels=labels, seed=seed, layers=layers)
        model = AutoModelForSequenceClassification.from_pretrained(folder / name)
        with torch.no_grad():
            model.classifier.bias -= logits_of(model).median(dim=0).values
        model.save_pretrained(folder / name)
    lines = [f"{text}\t{target}\n" for text, target in zip(TEXTS, TARGETS, strict=True)]
    write(folder, {"SST-2/dev.tsv": "sentence\tlabel\n" + "".join(lines)})
    return folder


def logits_of(model):
    with torch.no_grad():
        return torch.cat([model(**tokenizer()(text, return_tensors="pt")).logits for text in TEXTS])


@pytest.fixture
def elang(folder, tmp_path):
    def invoke(command, *options, swift=folder / "swift", super_=folder / "super", task="sst2", data=folder):
        given = [command, "--task", task, "--swift", swift, "--super", super_, "--data-dir", data, *options]
        return CliRunner().invoke(app, [*map(str, given), "--out", str(tmp_path / "out")], env={"COLUMNS": "110"})

    return invoke


def done(result):
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def one_line(result, code):
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def answers(folder, tmp_path):
    pair = [load_classifier(name, str(folder / name)) for name in ("swift", "super")]
    (swift, of_swift), (super_, of_super) = pair
    rows = load_task("sst2", data_dir=folder)
    return answer_task(swift, super_, rows, (of_swift, of_super), tmp_path / "by hand", task="sst2")


# ---- eval


def test_the_authors_command_by_hand(elang, folder, tmp_path):
    swift, super_ = (
        logits_of(AutoModelForSequenceClassification.from_pretrained(folder / name)) for name in ("swift", "super")
    )
    score = swift.softmax(dim=1).logsumexp(dim=1)
    threshold = score.sort().values[39:41].mean().item()  # between two scores
    labels = torch.where(score >= threshold, 1 - swift.argmax(dim=1), super_.argmax(dim=1))
    result = done(elang("eval", "--score", "energy_probs", "--threshold", f"{threshold:.9g}"))
    evaluation = Evaluation.load(tmp_path / "out" / "evaluation.json")
    assert evaluation.joint[0].quality == {"accuracy": pytest.approx(100 * np.mean(labels.numpy() == TARGETS))}
    assert evaluation.joint[0].swift_ratio == pytest.approx(100 * (score >= threshold).float().mean().item())
    assert 10 < evaluation.joint[0].swift_ratio < 90
    assert f"t={np.float32(threshold)!s}" in result.stdout
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "evaluation.csv").read_text())))
    assert float(lines[2]["accuracy"]) == evaluation.joint[0].quality["accuracy"]
    assert "93.7" in result.stdout


def test_eval_agrees_with_the_api(elang, answers, tmp_path):
    result = done(elang("eval", "--threshold", "1.31044", "--score", "energy_probs", "--json"))
    by_api = measure(answers, "energy_probs", [1.31044])
    by_command = Evaluation.model_validate_json(result.stdout)
    assert by_command == Evaluation.load(tmp_path / "out" / "evaluation.json")
    assert by_command.joint == by_api.joint
    assert (by_command.swift, by_command.super) == (by_api.swift, by_api.super)
    assert by_command.provenance.data == "sst2, validation"
    assert by_command.provenance.swift_sha256 == answers.provenance.swift_sha256
    assert by_command.timing is None


def test_a_sweep_of_answers_that_are_there_calls_no_model(elang, answers, monkeypatch):
    done(elang("eval", "--threshold", "0"))
    monkeypatch.setattr(BertForSequenceClassification, "forward", None)
    monkeypatch.setattr(BertModel, "forward", None)
    swept = json.loads(done(elang("eval", "--sweep", "--json")).stdout)
    assert swept["score"] == "energy"
    assert [point["swift_ratio"] for point in swept["joint"]] == pytest.approx(list(range(0, 101, 5)))
    assert (
        swept["joint"]
        == json.loads(measure(answers, "energy", sweep(answers.scores["energy"])).model_dump_json())["joint"]
    )
    done(elang("eval", "--threshold", "0", "--score", "margin"))


def test_temperature_and_limit_and_batch_size_are_used(elang, monkeypatch):
    first = json.loads(done(elang("eval", "--threshold", "0", "--temperature", "2.5", "--limit", "7", "--json")).stdout)
    assert (first["temperature"], first["n"]) == (2.5, 7)
    assert first["provenance"]["data"] == "sst2, validation, first 7 rows"
    seen, forward = [], BertModel.forward

    def watched(self, input_ids=None, **inputs):
        seen.append(len(input_ids))
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(BertModel, "forward", watched)
    done(elang("eval", "--threshold", "0", "--limit", "7", "--batch-size", "3"))
    assert [n for n in seen if n > 1] == [3, 3, 3, 3]


def test_time(elang):
    result = done(elang("eval", "--threshold", "inf", "--limit", "2", "--time"))
    assert f"Time: 2 rows in batches of 1, medians of 3, {torch.get_num_threads()} threads" in " ".join(
        result.stdout.split()
    )


def test_the_joint_models_that_are_timed_decide_as_the_table_says(elang, answers, monkeypatch):
    threshold = float(np.median(answers.scores["margin"]))
    timed = []

    def time_task(swift, super_, joints, answers, tokenizers):
        texts = run.encode("swift", swift, tokenizers[0], answers.rows)
        label = [run.columns_for("super", super_, answers.task).index(i) for i in range(2)]  # of each of its outputs
        timed.append([label[joints[0](**texts.batch([row])).logits.argmax()] for row in range(len(texts))])
        return Timing(rows=1, batch_size=1, rounds=1, threads=1, swift=1, super=2, joint=(3,))

    monkeypatch.setattr(run, "time_task", time_task)
    done(elang("eval", "--threshold", f"{threshold:.9g}", "--score", "margin", "--time"))
    joined = answers.joined(answers.kept("margin", threshold))
    assert timed == [joined.tolist()]
    assert joined.tolist() not in (answers.swift.tolist(), answers.super.tolist())


def test_default_labels_are_joined_in_the_task_s_order(folder, answers):
    (swift, of_swift), (super_, of_super) = (load_classifier(n, str(folder / n)) for n in ("swift", "super"))
    swift.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    pair = evaluate._Pair(swift, super_, (of_swift, of_super))
    task = answers.task
    joint = evaluate._joined(pair, answers, "energy", float("-inf"))
    row = run.encode("swift", swift, of_swift, answers.rows).batch([3])
    labels = run.columns_for("swift", swift, task).index(int(swift(**row).logits.argmax()))
    assert run.columns_for("super", super_, task).index(int(joint(**row).logits.argmax())) == labels


# ---- calibrate, and eval with what it made


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ((), {"score": "auto"}),
        (("--swift-share", "0.4", "--score", "margin"), {"swift_share": 0.4, "score": "margin"}),
        (("--max-drop", "0.7", "--score", "energy"), {"max_drop": 0.7, "score": "energy"}),
        (("--agree", "0.4,0.1"), {"agree": (0.4, 0.1), "score": "auto"}),
        (("--selective-error", "0.8,0.1"), {"selective_error": (0.8, 0.1), "score": "auto"}),
    ],
)
def test_calibrate_agrees_with_the_api(elang, answers, tmp_path, options, target):
    file = tmp_path / "new" / "calibration.json"
    result = done(elang("calibrate", *options, "-o", file, "--json"))
    by_api = calibrate(
        answers.scores,
        answers.swift == TARGETS,
        answers.super == TARGETS,
        disagree=answers.swift != answers.super,
        ids=[str(i) for i in range(len(TARGETS))],
        provenance=Calibration.load(file).provenance,
        **target,
    )
    assert Calibration.load(file) == by_api
    assert Calibration.model_validate_json(result.stdout) == by_api
    made = by_api.provenance.model_dump(exclude={"data", "swift", "super", "date"})
    assert made == answers.provenance.model_dump(exclude={"data", "swift", "super", "date"})


def test_a_calibration_is_what_eval_decides_by(elang, tmp_path):
    file, plot = tmp_path / "calibration.json", tmp_path / "figures" / "curve.png"
    result = done(elang("calibrate", "--swift-share", "0.6", "--score", "margin", "-o", file, "--plot", plot))
    made = Calibration.load(file)
    assert result.stdout.strip() == made.summary()
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = done(elang("eval", "--calibration", file, "--json"))
    evaluation = Evaluation.model_validate_json(result.stdout)
    assert (evaluation.score, evaluation.joint[0].threshold) == ("margin", made.threshold)
    assert evaluation.joint[0].swift_ratio == pytest.approx(100 * made.target.share_kept)
    assert evaluation.joint[0].quality["accuracy"] == pytest.approx(100 * made.target.accuracy)
    assert evaluation.joint[0].random_accuracy == pytest.approx(100 * made.target.random_accuracy)
    assert "made on these very rows" in result.stderr
    assert "very rows" not in done(elang("eval", "--calibration", file, "--limit", "9")).stderr


def test_the_temperature_of_a_calibration_is_taken(elang, tmp_path):
    file = tmp_path / "calibration.json"
    done(elang("calibrate", "--score", "energy", "-o", file))
    Calibration.load(file).model_copy(update={"temperature": 3.0}).save(file)
    assert json.loads(done(elang("eval", "--calibration", file, "--json")).stdout)["temperature"] == 3.0


def test_a_calibration_of_other_weights_is_refused(elang, folder, tmp_path):
    file = tmp_path / "calibration.json"
    done(elang("calibrate", "-o", file))
    message = one_line(elang("eval", "--calibration", file, swift=folder / "super"), 1)
    assert message.startswith("elang eval: swift: got other weights than the calibration was made with")


def test_a_target_that_cannot_be_met_has_an_exit_code_of_its_own(elang, tmp_path):
    message = one_line(elang("calibrate", "--max-drop", "0.0001", "-o", tmp_path / "calibration.json"), 3)
    assert message.startswith("elang calibrate: ")
    assert not (tmp_path / "calibration.json").exists()


# ---- wrong usage, and what cannot be done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "got none, wanted exactly one of --threshold, --calibration, --sweep"),
        (("--threshold", "1", "--sweep"), "got --threshold, --sweep, wanted exactly one of"),
        (("--threshold", "nan"), "got 'nan', wanted a number"),
        (("--threshold", "high"), "got 'high', wanted a number"),
        (("--sweep", "--temperature", "0"), "got 0, wanted a finite number > 0"),
        (("--sweep", "--score", "logit"), "--score: got 'logit', wanted one of energy, energy_probs"),
        (("--sweep", "--split", "test"), "--split: got 'test', wanted one of train, validation"),
        (("--sweep", "--task", "sst3"), "--task: got 'sst3', wanted one of mnli_matched"),
        (("--sweep", "--limit", "0"), "--limit"),
        (("--sweep", "--data-dir", "not/there"), "not/there"),
        (("--calibration", __file__, "--score", "energy"), "got one beside --calibration, which has both"),
    ],
)
def test_wrong_usage_of_eval(elang, options, message):
    result = elang("eval", *options)
    assert result.exit_code == 2, result.output
    assert message in plain(result.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-drop", "0.1", "--swift-share", "0.5"), "--swift-share, --max-drop: got 2 targets, wanted at most one"),
        (("--swift-share", "1.5"), "got 1.5, wanted a share in [0, 1]"),
        (("--max-drop", "0"), "got 0, wanted a number in (0, 1)"),
        (("--agree", "0.1"), "got '0.1', wanted ALPHA,DELTA"),
        (("--selective-error", "0.1,2"), "got 2, wanted a number in (0, 1)"),
        (("--score", "logit"), "--score: got 'logit'"),
    ],
)
def test_wrong_usage_of_calibrate(elang, tmp_path, options, message):
    result = elang("calibrate", *options, "-o", tmp_path / "calibration.json")
    assert result.exit_code == 2, result.output
    assert message in plain(result.stderr)


def plain(panel):
    """What typer's frame says, in one line."""
    return " ".join(panel.replace("│", " ").split())


def test_what_cannot_be_done_is_one_line(elang, folder, tmp_path):
    assert "wanted SST-2/dev.tsv in it" in one_line(elang("eval", "--sweep", data=tmp_path), 1)
    data = write(tmp_path / "bad", {"SST-2/dev.tsv": "sentence\nfine\n"})
    assert "wanted also label" in one_line(elang("eval", "--sweep", data=data), 1)
    data = write(tmp_path / "empty", {"SST-2/dev.tsv": ""})
    assert "got no rows" in one_line(elang("eval", "--sweep", data=data), 1)
    data = write(tmp_path / "stsb", RELEASED["stsb"][0])
    assert "task: got stsb, which is regression" in one_line(elang("eval", "--sweep", task="stsb", data=data), 1)
    data = write(tmp_path / "boolq", RELEASED["boolq"][0])
    message = one_line(elang("eval", "--sweep", task="boolq", data=data), 1)
    assert "swift: got a model with the labels positive, negative, wanted false, true as in boolq" in message
    (tmp_path / "no model").mkdir()
    for path in (tmp_path / "no model", tmp_path / "nothing"):
        message = one_line(elang("eval", "--sweep", super_=path), 1)
        assert message.startswith(f"elang eval: super: got {path}, wanted the folder or hub id")
    (tmp_path / "torn.json").write_text("{")
    assert "Invalid JSON" in one_line(elang("eval", "--calibration", tmp_path / "torn.json"), 1)


def test_a_model_whose_head_was_never_trained_is_refused(elang, folder, tmp_path):
    without = shutil.copytree(folder / "swift", tmp_path / "without")
    BertModel.from_pretrained(without).save_pretrained(without)
    message = one_line(elang("eval", "--sweep", swift=without), 1)
    assert "swift: got no weights for classifier.bias, classifier.weight" in message


def test_a_task_of_pairs(elang, folder, tmp_path):
    data = write(tmp_path / "rte", RELEASED["rte"][0])
    swift, super_ = (Path(save_model(tmp_path / n, labels=("LABEL_0", "LABEL_1"), seed=i)) for i, n in enumerate("ab"))
    result = done(elang("eval", "--sweep", "--json", task="rte", data=data, swift=swift, super_=super_))
    evaluation = Evaluation.model_validate_json(result.stdout)
    assert (evaluation.n, evaluation.published.joint) == (1, 73.3)
    assert [point.swift_ratio for point in evaluation.joint] == [0, 100]


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_help_has_an_example_that_names_real_options(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0
    example = next(line for line in result.output.splitlines() if f"elang {command} --task sst2" in line)
    assert all(option in result.output.replace(example, "") for option in example.split() if option.startswith("--"))
