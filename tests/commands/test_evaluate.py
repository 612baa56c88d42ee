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

from elang.calibration import BatchCosts, Calibration, calibrate
from elang.cli import app
from elang.evaluation import run
from elang.evaluation.answered import AnsweredRows
from elang.evaluation.answers import answer_task
from elang.evaluation.evaluation import Evaluation, Timing
from elang.evaluation.rows import load_task
from elang.evaluation.run import load_model, measure, sweep
from elang.evaluation.tasks import get_task

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
    pair = [load_model(name, str(folder / name), get_task("sst2")) for name in ("swift", "super")]
    return answer_task(*pair, load_task("sst2", data_dir=folder), tmp_path / "by hand")


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


def test_the_joint_model_that_is_timed_decides_as_the_table_says(elang, answers, monkeypatch):
    threshold = float(np.median(answers.scores["margin"]))
    timed = []

    def time_task(swift, super_, score, thresholds, answers):
        (threshold,) = thresholds
        joint, texts = swift.joined(super_, score, threshold, answers.temperature), swift.encode(answers.rows)
        label = [super_._columns.index(i) for i in range(2)]  # of each of its outputs
        timed.append([label[joint(**texts.batch([row])).logits.argmax()] for row in range(len(texts))])
        return Timing(rows=1, batch_size=1, rounds=1, threads=1, swift=1, super=2, joint=(3,))

    monkeypatch.setattr(run, "time_task", time_task)
    done(elang("eval", "--threshold", f"{threshold:.9g}", "--score", "margin", "--time"))
    joined = answers.joined(answers.kept("margin", threshold))
    assert timed == [joined.tolist()]
    assert joined.tolist() not in (answers.swift.tolist(), answers.super.tolist())


def test_default_labels_are_joined_in_the_task_s_order(folder):
    swift, super_ = (load_model(name, str(folder / name), get_task("sst2")) for name in ("swift", "super"))
    swift.model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    swift = run.task_model("swift", swift.model, swift.tokenizer, swift.task)
    joint = swift.joined(super_, "energy", float("-inf"), 1.0)
    row = swift.encode(load_task("sst2", data_dir=folder)).batch([3])
    label = int(swift.model(**row).logits.argmax())
    assert super_._columns.index(int(joint(**row).logits.argmax())) == label


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


@pytest.mark.parametrize("half", [0, 1])
def test_temperatures_are_candidates(elang, answers, folder, tmp_path, half):
    file = tmp_path / "calibration.json"
    done(elang("calibrate", "--temperatures", ("1,3", "3,1")[half], "-o", file))
    made = Calibration.load(file)
    assert len(made.curves) == 2 * len(answers.scores)
    assert set(made.selection) == set(made.curves)
    assert {name.partition("@")[2] for name in made.curves} == {"", ("3", "1")[half]}
    # The unsuffixed names are those of the first temperature.
    at_three = Calibration.load(file).curves["energy@3" if half == 0 else "energy"]
    first = load_model("swift", str(folder / "swift"), get_task("sst2"))
    rows = load_task("sst2", data_dir=folder)
    scores = first.answer_scored(rows, first.encode(rows), (3.0,))["score.energy"]
    assert set(at_three.threshold[1:-1]) <= set(scores.tolist())


def test_the_temperature_chosen_is_evaluated(elang, answers, tmp_path):
    file = tmp_path / "calibration.json"
    done(elang("calibrate", "--temperatures", "2", "--score", "energy", "-o", file))
    assert Calibration.load(file).temperature == 2.0
    evaluated = json.loads(done(elang("eval", "--calibration", file, "--json")).stdout)
    assert evaluated["joint"][0]["swift_ratio"] == pytest.approx(100 * Calibration.load(file).target.share_kept)


def test_max_cost_in_flops_and_in_what_was_measured(elang, answers, tmp_path):
    swift, super_ = answers.swift_flops.mean(), answers.super_flops.mean()
    budget = swift + 0.5 * super_
    file = tmp_path / "calibration.json"
    done(elang("calibrate", "--max-cost", f"{budget:.17g}", "--costs", "flops", "--score", "margin", "-o", file))
    made = Calibration.load(file)
    assert made.costs == BatchCosts(unit="FLOPs", rows=1, swift=float(swift), super={1: float(super_)})
    assert made.target.share_kept >= 0.5
    by_api = calibrate(
        answers.scores,
        answers.swift == TARGETS,
        answers.super == TARGETS,
        score="margin",
        max_cost=budget,
        costs=made.costs,
    )
    assert made.threshold == by_api.threshold
    prices = BatchCosts(unit="EUR", rows=4, swift=0.4, super={1: 1.0, 4: 2.0})
    (tmp_path / "prices.json").write_text(prices.model_dump_json())
    done(elang("calibrate", "--max-cost", "0.5", "--costs", tmp_path / "prices.json", "-o", file))
    assert Calibration.load(file).costs == prices
    assert "prices.yaml" in one_line(elang("calibrate", "--max-cost", "1", "--costs", "prices.yaml"), 1)


def test_a_calibration_goes_into_the_run_s_folder_where_nothing_else_is_said(elang, tmp_path):
    done(elang("calibrate"))
    assert Calibration.load(tmp_path / "out" / "calibration.json").n == len(TARGETS) // 2


def test_eval_leaves_all_that_a_report_shows(elang, answers, tmp_path):
    done(elang("eval", "--threshold", "0.5", "--score", "margin"))
    left = AnsweredRows.load(tmp_path / "out" / "rows.json")
    assert left == answers.record(left.command, "margin", [0.5]).model_copy(update={"provenance": left.provenance})
    assert left.command[:2] == ("elang", "eval") or left.command[1] == "eval"
    assert left.command[left.command.index("--score") + 1] == "margin"
    assert "--sweep" not in left.command


# ---- the user's own rows


@pytest.fixture
def own(folder, tmp_path):
    """`elang` on a file: the same rows, and without their labels."""
    labelled, bare = tmp_path / "mine.csv", tmp_path / "bare.csv"
    names = ["negative", "positive"]
    lines = [f"{text},{names[target]}\n" for text, target in zip(TEXTS, TARGETS, strict=True)]
    labelled.write_text("text,label\n" + "".join(lines))
    bare.write_text("text\n" + "".join(f"{text}\n" for text in TEXTS))

    def invoke(command, *options, csv=labelled, swift=folder / "swift"):
        given = [command, "--csv", csv, "--swift", swift, "--super", folder / "super", *options]
        return CliRunner().invoke(app, [*map(str, given), "--out", str(tmp_path / "out")], env={"COLUMNS": "110"})

    invoke.bare = bare
    return invoke


def test_own_rows_are_calibrated_on_and_evaluated_like_a_task_s(own, elang, tmp_path):
    of_task = json.loads(done(elang("eval", "--sweep", "--json")).stdout)
    of_file = json.loads(done(own("eval", "--sweep", "--json")).stdout)
    for system in ("swift", "super", "joint"):
        assert of_file[system] == of_task[system]
    assert of_file["published"] is None
    assert of_file["provenance"]["data"] == "mine.csv"
    file = tmp_path / "calibration.json"
    done(own("calibrate", "--swift-share", "0.5", "--score", "margin", "-o", file))
    assert Calibration.load(file).target.share_kept == pytest.approx(0.5, abs=0.05)
    assert "very rows" in done(own("eval", "--calibration", file)).stderr


def test_own_rows_without_labels_are_judged_by_super(own, answers, tmp_path):
    file = tmp_path / "calibration.json"
    done(own("calibrate", "--agree", "0.4,0.1", "--score", "margin", "-o", file, csv=own.bare))
    made = Calibration.load(file)
    by_api = calibrate(answers.scores, disagree=answers.swift != answers.super, score="margin", agree=(0.4, 0.1))
    assert (made.threshold, made.judged_by) == (by_api.threshold, "super")
    assert "got no column label, wanted one" in one_line(own("eval", "--sweep", csv=own.bare), 1)
    message = one_line(own("calibrate", "--selective-error", "0.4,0.1", csv=own.bare), 1)
    assert "selective_error: got rows that nothing judges one by one" in message


def test_a_task_s_options_are_not_a_file_s(own):
    for options, message in (
        (("--task", "sst2"), "got both, wanted one of --task, --csv"),
        (("--split", "train"), "--data-dir, --split: got one beside --csv"),
    ):
        result = own("eval", "--sweep", *options)
        assert (result.exit_code, message in plain(result.stderr)) == (2, True), result.stderr


# ---- wrong usage, and what cannot be done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "got none, wanted exactly one of --threshold, --calibration, --sweep"),
        (("--threshold", "1", "--sweep"), "got --threshold, --sweep, wanted exactly one of"),
        (("--threshold", "nan"), "got 'nan', wanted a number"),
        (("--threshold", "high"), "got 'high', wanted a number"),
        (("--sweep", "--temperature", "0"), "got 0, wanted a finite number > 0"),
        (("--sweep", "--score", "sureness"), "--score: got 'sureness', wanted one of energy, energy_probs"),
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
        (("--score", "loudness"), "--score: got 'loudness'"),
        (("--max-cost", "1"), "--max-cost, --costs: got one of them"),
        (("--costs", "flops"), "--max-cost, --costs: got one of them"),
        (("--temperatures", "1,0"), "got 0, wanted a finite number > 0"),
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
    data = write(tmp_path / "wmt", RELEASED["wmt_en_de"][0])
    message = one_line(elang("eval", "--sweep", task="wmt_en_de", data=data), 1)
    assert "swift: got a sequence classifier for wmt_en_de, wanted an encoder-decoder" in message
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
