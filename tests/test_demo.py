from __future__ import annotations

import copy
import dataclasses
import io
import json
import re
import tarfile
import zipfile

import numpy as np
import pytest
import tiny_models
import torch
from conftest import assert_accurate
from demo_models import LABELS, TEXTS, save_csv, save_model, tokenizer
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from elang.calibration import Calibration, calibrate
from elang.cli import app
from elang.demo import data, measure, report, run, store, train
from elang.demo.data import Rows, movie_reviews, read_csv, split
from elang.demo.measure import Answered, Clock, Row
from elang.demo.store import Package, fetch
from elang.evaluation.evaluation import Evaluation
from elang.evaluation.flops import row_flops
from elang.evaluation.predict import Encoded


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- data


def rows(texts, labels=None):
    texts = list(texts)
    labels = [i % 2 for i in range(len(texts))] if labels is None else labels
    return Rows(texts, np.eye(2, dtype=np.float32)[labels])


def test_parts_share_no_text_and_together_are_all_of_it():
    dataset = split("made up", ("no", "yes"), rows(f"text {i}" for i in range(100)))
    parts = [set(part.texts) for part in (dataset.train, dataset.calibration, dataset.test)]
    assert [len(part) for part in parts] == [50, 25, 25]
    assert set.union(*parts) == {f"text {i}" for i in range(100)}
    for part in (dataset.train, dataset.calibration, dataset.test):
        assert [int(text.split()[1]) % 2 for text in part.texts] == part.labels.tolist()


def test_held_out_parts_stop_at_2000_rows():
    dataset = split("made up", ("no", "yes"), rows(f"text {i}" for i in range(9_000)))
    assert [len(p.texts) for p in (dataset.train, dataset.calibration, dataset.test)] == [5_000, 2_000, 2_000]


def test_texts_that_differ_in_case_and_punctuation_only_are_one():
    texts = [f"text {i}" for i in range(60)] + [f"TEXT,  {i}!" for i in range(60)] + [":-)", ":-("]
    dataset = split("made up", ("no", "yes"), rows(texts), unlabelled=["Text 7?", "text 60"])
    kept = [*dataset.train.texts, *dataset.calibration.texts, *dataset.test.texts]
    assert sorted(kept) == sorted([f"text {i}" for i in range(60)] + [":-)", ":-("])
    assert dataset.unlabelled == ["text 60"]


def test_a_split_is_the_same_every_time_and_its_sha256_tells_what_is_in_it():
    one, same = (split("made up", ("no", "yes"), rows(f"text {i}" for i in range(60))) for _ in range(2))
    assert one.sha256 == same.sha256
    for part in ("train", "calibration", "test"):
        changed = dataclasses.replace(one, **{part: Rows(getattr(one, part).texts, 1 - getattr(one, part).targets)})
        assert changed.sha256 != one.sha256
    assert dataclasses.replace(one, unlabelled=["more"]).sha256 != one.sha256


def test_a_csv_of_any_labels_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    lines = [f'"text {i}, or so",{("bon", "mauvais", "moyen")[i % 3]},ignored' for i in range(60)]
    path.write_text("text,label,more\n" + "\n".join(lines), "utf-8-sig")
    dataset = read_csv(path)
    assert dataset.label_names == ("bon", "mauvais", "moyen")
    assert [int(re.findall(r"\d+", t)[0]) % 3 for t in dataset.test.texts] == dataset.test.labels.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"columns \(none\), wanted text and label"),
        (b"sentence,label\na,b\n", "columns sentence, label, wanted text and label"),
        (b"text,label\na,x\n ,y\n", "line 3: got an empty text"),
        (b"text,label\na,x\nb\n", "line 3: got an empty label"),
        (b"text,label\na,x\nb,x\n", "got 1 different labels, wanted at least 2"),
        (b"text,label\na,x\nb,y\n", "got 2 distinct texts, wanted at least 40"),
        ("text,label\ncafé,x\n".encode("latin-1"), "wanted comma-separated values in UTF-8"),
        (b'text,label\n"' + b"a" * 200_000 + b'",x\n', "field larger than field limit"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_csv(path)


def test_a_label_that_training_never_sees_is_refused():
    texts = [f"text {i}" for i in range(60)]
    held_out = split("made up", ("no", "yes"), rows(texts)).test.texts[0]
    with pytest.raises(ValueError, match="made up: no training row has the label yes"):
        split("made up", ("no", "yes"), rows(texts, [int(text == held_out) for text in texts]))


def test_a_file_that_is_not_the_expected_one_is_refused(tmp_path):
    package = Package("made-up==1", "made_up-1.zip", "0" * 64)
    (tmp_path / package.file).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"made_up-1.zip: got sha256 [0-9a-f]{64}, wanted 0{64}"):
        fetch(package, tmp_path)


def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(store.sys, "executable", "false")
    package = Package("made-up==1", "made_up-1.zip", "0" * 64)
    with pytest.raises(RuntimeError, match=r"pip could not fetch made-up==1.*made_up-1.zip"):
        fetch(package, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ratings_become_labels(tmp_path, monkeypatch):
    ratings = np.linspace(-4, 4, 81)
    files = {
        "movieReviewSnippets_GroundTruth.txt": "".join(f"{i}\t{r}\tfilm {i}\r\n" for i, r in enumerate(ratings)),
        "amazonReviewSnippets_GroundTruth.txt": "1\t0.5\tkettle\r\n2\t1\tfilm 3\r\n",
    }
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    path = tmp_path / "ratings.zip"
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", tar.getvalue())
    monkeypatch.setattr(data, "fetch", lambda package, cache: path)

    dataset = movie_reviews(tmp_path)
    assert dataset.unlabelled == ["kettle"]
    for part in (dataset.train, dataset.calibration, dataset.test):
        expected = ratings[[int(text.split()[1]) for text in part.texts]]
        assert (part.labels == (expected > 0)).all()
        np.testing.assert_allclose(part.targets[:, 1], 1 / (1 + np.exp(-data.SHARPNESS * expected)), rtol=1e-6)


# ---- training


def test_a_model_learns_its_rows():
    dataset = split("made up", ("bad", "good"), rows(TEXTS, [int(label == "good") for label in LABELS]))
    model = tiny_models.classifier("Bert", num_labels=2)
    texts = Encoded(tokenizer(), dataset.train.texts, 16)
    targets = torch.from_numpy(dataset.train.targets)
    seen, losses = [], []

    def loss(logits, batch):
        losses.append(torch.nn.functional.cross_entropy(logits, targets[batch]))
        return losses[-1]

    recipe = train.Recipe(
        layers=2, epochs=30, batch_size=20, learning_rate=1e-2, embedding_rate=1e-2, attention_dropout=0.0
    )
    train.fit(model, texts, loss, recipe, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 60) for i in range(1, 61)]
    assert losses[-1] < losses[0] / 4


def test_a_pair_is_trained_once_and_then_comes_from_the_cache(tmp_path, monkeypatch):
    save_model(tmp_path / "encoder", layers=6)
    monkeypatch.setattr(train, "unpack_encoder", lambda cache: tmp_path / "encoder")
    dataset = read_csv(save_csv(tmp_path / "rows.csv"))
    pair = train.train_pair(dataset, tmp_path, Progress(disable=True))

    swift = train.AutoModelForSequenceClassification.from_pretrained(pair.swift)
    super_ = train.AutoModelForSequenceClassification.from_pretrained(pair.super_).eval()
    assert (swift.config.num_hidden_layers, super_.config.num_hidden_layers) == (1, 6)
    assert super_.config.id2label == {0: "bad", 1: "good"}
    texts = Encoded(train.AutoTokenizer.from_pretrained(pair.super_), dataset.test.texts, train.MAX_LENGTH)
    eager, truth = (
        torch.cat([model(**texts.batch([i])).logits for i in range(len(texts))]).detach()
        for model in (super_, copy.deepcopy(super_).double())
    )
    assert_accurate(torch.from_numpy(pair.test_logits), eager, truth)
    assert len(pair.calibration_logits) == len(dataset.calibration.texts)
    assert (
        sorted(p.suffix for p in tmp_path.glob("*/*") if "token" not in p.name) == [".json"] * 3 + [".safetensors"] * 4
    )

    monkeypatch.setattr(train, "Workers", lambda progress: pytest.fail("trains again"))
    again = train.train_pair(dataset, tmp_path, Progress(disable=True))
    assert (again.swift, again.super_) == (pair.swift, pair.super_)
    np.testing.assert_array_equal(again.test_logits, pair.test_logits)

    other = dataclasses.replace(dataset, unlabelled=["a new text"])
    with pytest.raises(pytest.fail.Exception, match="trains again"):
        train.train_pair(other, tmp_path, Progress(disable=True))


# ---- figures and words


def test_answered():
    part = Answered(
        np.array([True, True, False, False]),
        np.array([True, False, True, True]),
        {"energy": np.array([3, 1, 2, np.inf], dtype=np.float32)},
    )
    routed = part.routed("energy", 2.0)
    assert routed.tolist() == [False, True, False, True]  # a score that is not finite is never kept
    assert part.accuracy(routed) == 0.5
    assert part.random_accuracy(0.5) == (0.5 + 0.75) / 2


def test_every_figure_of_a_row(monkeypatch):
    swift, super_ = (tiny_models.classifier(seed=i, num_hidden_layers=1 + 2 * i) for i in range(2))
    texts, n = Encoded(tokenizer(), TEXTS[:40], 16), 40
    seconds = {swift: 1, super_: 6}  # per row; 8 for any joint

    def alternate(runs, rounds, warm_up):
        return {name: [len(r.keywords["input_ids"]) * seconds.get(r.func, 8)] * rounds for name, r in runs.items()}

    monkeypatch.setattr(measure, "alternate", alternate)
    right = np.arange(n) % 4 > 0
    part = Answered(right, np.ones(n, dtype=bool), {"energy": np.arange(n, dtype=np.float32)})
    points = [measure.Point("a quarter routed", "energy", 10.0), measure.Point("all routed", "energy", np.inf)]
    measured = measure.figures(swift, super_, texts, part, part, points, lambda done, total: None)
    rows = {row.name: row for row in measured}

    flops = [row_flops(model, texts.lengths) for model in (swift, super_)]
    quarter = rows["a quarter routed"]
    assert (quarter.share_routed, quarter.accuracy, quarter.random_accuracy) == (0.25, 33 / 40, 0.8125)
    assert quarter.flops_speed_up == flops[1].sum() / (flops[0].sum() + flops[1][:10].sum())
    for size in (1, 32):
        assert rows["Swift"].clocks[size] == Clock(6, None, None)
        assert quarter.clocks[size].speed_up == 6 / 8
        assert quarter.clocks[size].eta == pytest.approx(0.75 / quarter.flops_speed_up)
        assert quarter.clocks[size].efficiency == (40 * 1 + 10 * 6) / (40 * 8)
        for name in ("naive", "all routed"):
            assert rows[name].clocks[size].efficiency == (1 + 6) / 8
    assert rows["Super"].flops_speed_up == 1
    assert rows["all routed"].flops_speed_up == flops[1].sum() / (flops[0].sum() + flops[1].sum())


ROWS = [
    Row("Swift", 0.791, 0.788, 0.788, 0.0, 6.0, {1: Clock(5.1, None, None), 32: Clock(5.7, None, None)}),
    Row("Super", 0.845, 0.852, 0.852, 1.0, 1.0, {1: Clock(1.0, None, None), 32: Clock(1.0, None, None)}),
    Row("naive", 0.84, 0.846, 0.82, 0.45, 1.6, {1: Clock(1.4, 0.88, 0.91), 32: Clock(1.3, 0.81, 0.9)}),
    Row("elang cal.", 0.84, 0.846, 0.82, 0.45, 1.6, {1: Clock(1.5, 0.94, 0.98), 32: Clock(1.6, 1.0, 0.99)}),
]


def rendered(value) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(value)
    return console.file.getvalue()


def test_the_table_shows_every_figure():
    text = rendered(report.table(ROWS, "made up: 20 calibration and 20 test rows"))
    line = next(line for line in text.splitlines() if "elang cal." in line)
    figures = ["84.0", "84.6", "82.0", "45.0", "1.60", "1.50/1.60", "0.94/1.00", "0.98/0.99"]
    assert line.split()[2:] == figures
    assert "-/-" in next(line for line in text.splitlines() if "Super" in line and "100.0" in line)
    assert "made up: 20 calibration" in text
    assert "one thread" in text


def test_the_meaning_never_claims_to_beat_super():
    right = np.arange(100) < 80
    calibration = calibrate({"energy": np.arange(100, dtype=np.float32)}, right, ~right | (np.arange(100) < 70))
    text = report.meaning(ROWS, calibration, 2_000)
    assert "within 0.6 points of Super at 1.60 times fewer FLOPs" in text
    assert "about 0.8 points (one standard error, 2000 rows)" in text
    better = [*ROWS[:3], dataclasses.replace(ROWS[3], accuracy=0.853)]
    assert "no accuracy lost on these rows at 1.60 times" in report.meaning(better, calibration, 2_000)


# ---- end to end


@pytest.fixture
def pair(tmp_path):
    return {
        "swift": save_model(tmp_path / "swift", seed=0, layers=1),
        "super_": save_model(tmp_path / "super", seed=1, layers=3),
    }


def test_end_to_end_on_a_csv_and_a_given_pair(tmp_path, pair):
    console = Console(width=160, file=io.StringIO())
    rows = run(tmp_path / "out", csv=save_csv(tmp_path / "rows.csv"), **pair, console=console)
    text = console.file.getvalue()
    assert [row.name for row in rows] == [
        "Swift",
        "Super",
        "naive",
        "elang 50%",
        "elang 70%",
        "elang 80%",
        "elang cal.",
    ]
    assert [rows[0].share_routed, rows[1].share_routed] == [0, 1]
    assert rows[1].flops_speed_up == rows[1].clocks[1].speed_up == 1
    assert rows[0].flops_speed_up > 2
    assert rows[2].accuracy == rows[-1].accuracy
    assert all(clock.efficiency > 0 and clock.eta > 0 for row in rows[2:] for clock in row.clocks.values())
    calibration = Calibration.load(tmp_path / "out" / "calibration.json")
    assert calibration.provenance.data_sha256 == read_csv(tmp_path / "rows.csv").sha256
    assert calibration.n == 20
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "What does this mean?" in text
    assert "calibrated: best accuracy, since" in text

    printed = text[text.index("from elang import") : text.index("Your own text:")]
    names: dict[str, object] = {}
    exec(printed, names)
    assert names["joint"].router.threshold.item() == calibration.threshold

    # The same again from the command line, as printed, on the rows that the demo left.
    printed = text[text.index("elang eval --csv") :].replace("\\\n", "").strip()
    for command in printed.split(" && "):
        words = command.split()
        page = ["-o", str(tmp_path / "report.html")] if words[1] == "report" else []
        result = CliRunner().invoke(app, [*words[1:], *page])
        assert result.exit_code == 0, (result.output, result.exception)
    evaluation = Evaluation.load(tmp_path / "out" / "evaluation.json")
    assert evaluation.joint[0].threshold == calibration.threshold
    for ours, theirs in ((evaluation.joint[0], rows[-1]), (evaluation.super, rows[1]), (evaluation.swift, rows[0])):
        assert ours.quality["accuracy"] == pytest.approx(100 * theirs.accuracy)
        assert ours.swift_ratio == pytest.approx(100 * (1 - theirs.share_routed))
        assert ours.flops_speedup == pytest.approx(theirs.flops_speed_up)
    assert f"{evaluation.joint[0].quality['accuracy']:.1f}" in (tmp_path / "report.html").read_text()


def test_labels_are_matched_by_name(tmp_path, pair):
    # The same two models with Swift's outputs renamed the other way round answer the opposite.
    rows = run(tmp_path / "out", csv=save_csv(tmp_path / "rows.csv"), **pair)
    config = tmp_path / "swift" / "config.json"
    settings = json.loads(config.read_text())
    settings |= {"id2label": {"0": "GOOD", "1": "BAD"}, "label2id": {"GOOD": 0, "BAD": 1}}
    config.write_text(json.dumps(settings))
    renamed = run(tmp_path / "out", csv=tmp_path / "rows.csv", **pair)
    assert renamed[0].accuracy == pytest.approx(1 - rows[0].accuracy)
    assert renamed[1].accuracy == rows[1].accuracy


def test_a_pair_that_does_not_fit_is_refused(tmp_path, pair):
    csv = save_csv(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="got one of them, wanted both or neither"):
        run(tmp_path / "out", csv=csv, swift=pair["swift"])
    other = save_model(tmp_path / "other", labels=("bad", "good", "ugly"))
    with pytest.raises(ValueError, match="labels bad, good, ugly, wanted bad, good as in the data"):
        run(tmp_path / "out", csv=csv, swift=pair["swift"], super_=other)
    words = tmp_path / "super" / "tokenizer.json"
    words.write_text(words.read_text().replace('"witty"', '"silly"'))
    with pytest.raises(ValueError, match="their tokenizers differ"):
        run(tmp_path / "out", csv=csv, **pair)
    assert not (tmp_path / "out").exists()


# ---- command line


def test_help_names_every_option():
    result = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0
    for option in ("--csv", "--swift", "--super", "--out"):
        assert option in result.output
    assert "SST-2" in result.output


def test_an_error_is_one_line_and_exit_code_1(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\nhello\n")
    result = CliRunner().invoke(app, ["demo", "--csv", str(path)])
    assert result.exit_code == 1
    assert "got the columns text, wanted text and label" in result.output
    assert "Traceback" not in result.output


def test_json_is_all_there_is_on_stdout(tmp_path, pair):
    result = CliRunner().invoke(
        app,
        [
            *("demo", "--csv", str(save_csv(tmp_path / "rows.csv")), "--out", str(tmp_path / "out"), "--json"),
            *("--swift", pair["swift"], "--super", pair["super_"]),
        ],
    )
    assert result.exit_code == 0, (result.output, result.exception)
    rows = json.loads(result.stdout)
    assert [row["name"] for row in rows][:2] == ["Swift", "Super"]
    assert rows[1]["flops_speed_up"] == 1
    assert "What does this mean?" in result.stderr
    assert json.loads(CliRunner().invoke(app, ["info", "--json"]).stdout)["elang"]
    result = CliRunner().invoke(app, ["demo", "--json", "seq2seq"], env={"COLUMNS": "200"})
    assert (result.exit_code, "are for `elang demo` alone" in result.output) == (2, True)


COMMANDS = ("eval", "calibrate", "fit-head", "distill", "report", "bench", "serve")


@pytest.mark.parametrize("command", [["demo"], ["demo", "seq2seq"], ["info"], *([name] for name in COMMANDS)])
def test_every_command_has_an_example(command):
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0
    (example,) = (line for line in result.output.splitlines() if f"elang {' '.join(command)} " in line)
    given = [word for word in example.split() if word.startswith("-")]
    assert all(option in result.output.replace(example, "") for option in given)


def test_info():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    assert "op route" in result.output
