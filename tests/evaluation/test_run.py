from __future__ import annotations

import copy
import csv
import dataclasses
import io

import numpy as np
import pytest
import tiny_models
import torch
from conftest import assert_accurate
from demo_models import LABELS, TEXTS, tokenizer
from rich.console import Console
from tokenizers import processors
from torch.utils.flop_counter import FlopCounterMode

from elang import backend, fingerprint, reference
from elang.calibration import Provenance
from elang.evaluation import answers as answers_module
from elang.evaluation import classifiers, run
from elang.evaluation.answers import Answers
from elang.evaluation.evaluation import Evaluation, Timing
from elang.evaluation.predict import CLASSIFIER_SCORES
from elang.evaluation.published import PUBLISHED
from elang.evaluation.rows import Rows
from elang.evaluation.run import measure, sweep, task_model, time_task
from elang.evaluation.tasks import get_task

N = 24


def rows_of(texts, targets):
    n, none = len(texts), ("",) * len(texts)
    ids = tuple(str(i) for i in range(n))
    return Rows(ids, tuple(texts), none, np.array(targets, dtype=np.int64), none, none, ((),) * n)


ROWS = rows_of([(text,) for text in TEXTS[:N]], [int(label == "good") for label in LABELS[:N]])


def model(*labels, seed=0, **config):
    made = tiny_models.classifier("Bert", seed=seed, num_labels=len(labels), **config)
    made.config.id2label = dict(enumerate(labels))
    return made


def balanced(made):
    """Of two classes, each has half of the rows."""
    with torch.no_grad():
        made.classifier.bias -= one_by_one(made, ROWS.texts, tokenizer()).median(dim=0).values
    return made


@pytest.fixture(scope="module")
def swift():
    return balanced(model("positive", "negative", num_hidden_layers=1))  # in the other order


@pytest.fixture(scope="module")
def super_():
    return balanced(model("NEGATIVE", "POSITIVE", seed=1))


@pytest.fixture
def both():
    return tokenizer(), tokenizer()


def one_by_one(of, texts, made):
    with torch.no_grad():
        return torch.cat([of(**made(*row, return_tensors="pt")).logits for row in texts])


def pair_on(task, swift, super_, tokenizers):
    models = zip(("swift", "super"), (swift, super_), tokenizers, strict=True)
    return [task_model(role, made, reads, get_task(task)) for role, made, reads in models]


def answer_task(swift, super_, rows, tokenizers, out, *, task, **options):
    return answers_module.answer_task(*pair_on(task, swift, super_, tokenizers), rows, out, **options)


def refuse(monkeypatch, *models):
    def fail(**_):
        raise OSError("called")

    for each in models:
        monkeypatch.setattr(each, "forward", fail)


# ---- answers


def test_answers_are_each_models_own_in_the_order_of_the_tasks_labels(swift, super_, both, tmp_path):
    answers = answer_task(swift, super_, ROWS, both, tmp_path, task="sst2", temperatures=[1.5], batch_size=5)
    logits = one_by_one(swift, ROWS.texts, both[0])
    assert answers.swift.tolist() == (1 - logits.argmax(dim=1)).tolist()
    assert answers.super.tolist() == one_by_one(super_, ROWS.texts, both[0]).argmax(dim=1).tolist()
    assert 0 < answers.swift.mean() < 1
    truth = torch.cat([tiny_models.float64_logits(swift, **both[0](*row, return_tensors="pt")) for row in ROWS.texts])
    assert tuple(answers.scores) == CLASSIFIER_SCORES
    for name, score in answers.scores.items():
        eager, exact = (reference.score_logits(z, name, 1.5) for z in (logits, truth))
        assert_accurate(torch.from_numpy(score), eager, exact)


def test_flops_are_of_each_row_alone(swift, super_, both, tmp_path):
    answers = answer_task(swift, super_, ROWS, both, tmp_path, task="sst2")
    for flops, of in ((answers.swift_flops, swift), (answers.super_flops, super_)):
        of = copy.deepcopy(of)
        of.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            of(**both[0](*ROWS.texts[3], return_tensors="pt"))
        assert flops[3] == counter.get_total_flops()


def test_pairs_of_texts_are_read_as_pairs(tmp_path):
    backend = tokenizer()
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A [UNK] $B:1 [UNK]:1", "$A [UNK] $B:1 [UNK]:1", [("[UNK]", 1)]
    )
    backend.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    pairs = [(first, second) for first, second in zip(TEXTS[:9], TEXTS[20:29], strict=True)]
    rows = rows_of(pairs, [0] * 9)
    first, second = (model("entailment", "not_entailment", seed=seed) for seed in (2, 3))
    answers = answer_task(first, second, rows, (backend, backend), tmp_path, task="qnli", batch_size=4)
    logits = one_by_one(first, pairs, backend)
    assert answers.swift.tolist() == logits.argmax(dim=1).tolist()
    np.testing.assert_allclose(answers.scores["energy"], logits.logsumexp(dim=1), rtol=1e-5)
    swapped = one_by_one(first, [pair[::-1] for pair in pairs], backend)
    assert not np.allclose(answers.scores["energy"], swapped.logsumexp(dim=1), rtol=1e-3)


def test_texts_are_cut_at_what_each_model_takes(super_, both, tmp_path):
    short = model("negative", "positive", max_position_embeddings=4)
    answers = answer_task(short, super_, ROWS, both, tmp_path, task="sst2")
    cut = [(" ".join(text.split()[:4]),) for (text,) in ROWS.texts]
    assert answers.swift.tolist() == one_by_one(short, cut, both[0]).argmax(dim=1).tolist()
    assert answers.super.tolist() == one_by_one(super_, ROWS.texts, both[0]).argmax(dim=1).tolist()


def test_answers_say_where_they_come_from(swift, super_, both, tmp_path):
    source = answer_task(swift, super_, ROWS, both, tmp_path, task="sst2", data="some rows").provenance
    assert source.swift_sha256 == fingerprint.fingerprint(swift)
    assert source.super_sha256 == fingerprint.fingerprint(super_)
    assert (source.data, source.dtype) == ("some rows", "float32")
    relabelled = dataclasses.replace(ROWS, targets=1 - ROWS.targets)
    other = answer_task(swift, super_, relabelled, both, tmp_path, task="sst2").provenance
    assert other.data_sha256 != source.data_sha256


# ---- answers that are kept


def test_a_second_run_computes_nothing(swift, super_, both, tmp_path, monkeypatch):
    before = answer_task(swift, super_, ROWS, both, tmp_path, task="sst2")
    refuse(monkeypatch, swift, super_)
    monkeypatch.setattr(classifiers, "predict_scored", None)
    monkeypatch.setattr(classifiers, "row_flops", None)
    after = answer_task(swift, super_, ROWS, both, tmp_path, task="sst2")
    for name in ("swift", "super", "swift_flops", "super_flops"):
        assert getattr(after, name).tolist() == getattr(before, name).tolist()
    assert {name: s.tolist() for name, s in after.scores.items()} == {n: s.tolist() for n, s in before.scores.items()}


def test_an_interrupted_run_goes_on_with_the_model_it_was_at(swift, super_, both, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        refuse(patched, super_)
        with pytest.raises(OSError, match="called"):
            answer_task(swift, super_, ROWS, both, tmp_path, task="sst2")
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(classifiers, "predict_scored", None)
    answer_task(swift, super_, ROWS, both, tmp_path, task="sst2")
    assert len(list(tmp_path.glob("answers-*.safetensors"))) == 2


def test_a_file_gets_its_name_when_it_is_complete(swift, super_, both, tmp_path, monkeypatch):
    def tear(columns, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(answers_module, "save_file", tear)
        with pytest.raises(OSError, match="disk full"):
            answer_task(swift, super_, ROWS, both, tmp_path, task="sst2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "files"),
    [("weights", 1), ("config", 1), ("rows", 2), ("dtype", 1), ("temperatures", 1), ("batch_size", 2), ("backend", 1)],
)
def test_answers_of_something_else_are_not_taken(swift, super_, both, tmp_path, monkeypatch, change, files):
    """`files`: 1 for Swift's alone, 2 for both models'."""
    answer_task(swift, super_, ROWS, both, tmp_path, task="sst2")
    other, rows, options = swift, ROWS, {}
    if change == "weights":
        other = model("positive", "negative", num_hidden_layers=1, seed=5)
    elif change == "config":
        other = copy.deepcopy(swift)
        other.config.layer_norm_eps = 1e-3
    elif change == "dtype":
        other = copy.deepcopy(swift).bfloat16()
    elif change == "rows":
        rows = run.first_rows(ROWS, 5)
    elif change == "backend":
        real = backend.served
        monkeypatch.setattr(backend, "served", lambda *of: real(*of)._replace(backend="another"))
    else:
        options = {change: [7.0] if change == "temperatures" else 7}
    answer_task(other, super_, rows, both, tmp_path, task="sst2", **options)
    assert len(list(tmp_path.iterdir())) == 2 + files


# ---- refused


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ("stsb", "26 classes|0.0, 0.2"),
        ("copa", "one that chooses or an encoder-decoder"),
        ("record", "one that chooses or an encoder-decoder"),
        ("wmt_en_de", "wanted an encoder-decoder"),
    ],
)
def test_a_classifier_is_refused_on_tasks_of_another_kind(swift, super_, both, tmp_path, task, wanted):
    with pytest.raises(ValueError, match=f"swift: got .*({wanted})"):
        answer_task(swift, super_, ROWS, both, tmp_path, task=task)


def test_default_labels_are_taken_in_the_tasks_order(super_, both, tmp_path):
    default, named = (
        answer_task(model(*labels, seed=3), super_, ROWS, both, tmp_path, task="sst2").swift
        for labels in (("LABEL_0", "LABEL_1"), ("Positive", "NEGATIVE"))
    )
    assert default.tolist() == (1 - named).tolist()


@pytest.mark.parametrize("labels", [("bad", "good"), ("LABEL_0", "LABEL_1", "LABEL_2"), ("negative", "negative")])
def test_labels_that_do_not_match_are_refused(super_, swift, both, tmp_path, labels):
    with pytest.raises(
        ValueError, match=r"super: got a model with the labels .*, wanted negative, positive as in sst2"
    ):
        answer_task(swift, model(*labels), ROWS, both, tmp_path, task="sst2")


def test_a_regression_head_and_training_mode_and_a_tokenizer_without_padding_are_refused(swift, super_, both, tmp_path):
    with pytest.raises(ValueError, match="swift: a regression head"):
        answer_task(model("LABEL_0"), super_, ROWS, both, tmp_path, task="sst2")
    with pytest.raises(RuntimeError, match="super: in training mode"):
        answer_task(swift, model("negative", "positive").train(), ROWS, both, tmp_path, task="sst2")
    both[1].pad_token = None
    with pytest.raises(ValueError, match="super: got a tokenizer without a padding token"):
        answer_task(swift, super_, ROWS, both, tmp_path, task="sst2")


# ---- figures


def answered(task="sst2", **columns):
    made = {
        "swift": [1, 0, 1, 1, 0],
        "super": [1, 1, 1, 0, 0],
        "scores": {"energy": np.array([0.5, 0.9, np.inf, 0.7, 0.7], dtype=np.float32)},
        "temperature": 1.0,
        "swift_flops": [1, 2, 3, 4, 5],
        "super_flops": [10, 20, 30, 40, 50],
        "provenance": Provenance(data="five rows"),
    }
    made |= columns
    arrays = {name: np.array(values) if isinstance(values, list) else values for name, values in made.items()}
    arrays.setdefault("gate_flops", dict.fromkeys(arrays["scores"], arrays["swift_flops"]))
    targets = [1, 1, 1, 1, 0]
    return Answers(task=get_task(task), rows=rows_of([("a",)] * 5, targets), **arrays)


def test_figures_by_hand():
    # Kept at 0.7: rows 1, 3 and 4; the one that is not finite never is.
    evaluation = measure(answered(), "energy", [0.7, -np.inf, np.inf])
    at, keep, route = evaluation.joint
    assert (at.quality, at.swift_ratio) == ({"accuracy": 80.0}, pytest.approx(60))
    assert at.flops_speedup == pytest.approx(150 / (15 + 10 + 30))
    assert at.random_accuracy == pytest.approx(0.6 * 80 + 0.4 * 80)
    assert (keep.swift_ratio, keep.flops_speedup) == (pytest.approx(80), pytest.approx(150 / 45))
    assert (route.quality, route.swift_ratio, route.flops_speedup) == ({"accuracy": 80.0}, 0, 150 / 165)
    assert (evaluation.swift.flops_speedup, evaluation.super.flops_speedup) == (10, 1)
    assert (evaluation.swift.swift_ratio, evaluation.super.swift_ratio) == (100, 0)
    assert evaluation.published == PUBLISHED["sst2"]
    assert at.time_speedup is None


def test_the_joint_model_has_the_answers_of_whoever_answers():
    answers = answered(swift=[1, 1, 0, 0, 1], super=[0, 0, 1, 1, 0])
    labels = answers.joined(answers.kept("energy", 0.7))
    assert labels.tolist() == [0, 1, 1, 0, 1]
    assert measure(answers, "energy", [0.7]).joint[0].quality == {"accuracy": 40.0}
    assert measure(answers, "energy", [0.7]).joint[0].random_accuracy == pytest.approx(0.6 * 40 + 0.4 * 60)


def test_a_threshold_is_compared_in_float32():
    answers = answered(scores={"energy": np.full(5, 1.31044, dtype=np.float32)})
    assert answers.kept("energy", 1.31044).all()
    assert not answers.kept("energy", 1.31045).any()


def test_every_official_metric_and_no_random_control_of_an_f1():
    evaluation = measure(answered("mrpc"), "energy", [np.inf])
    # Super: three of the four positives found, and none too many.
    assert evaluation.super.quality == {"f1": pytest.approx(100 * 6 / 7), "accuracy": 80.0}
    assert evaluation.joint[0].random_accuracy is None


def test_speedups_in_time():
    timing = Timing(rows=5, batch_size=1, rounds=3, threads=1, swift=1.0, super=6.0, joint=(4.0, 3.0))
    evaluation = measure(answered(), "energy", [0.9, 0.7], timing)
    assert [s.time_speedup for s in (evaluation.swift, evaluation.super, *evaluation.joint)] == [6, 1, 1.5, 2]
    with pytest.raises(ValueError, match="timing: got 2 thresholds, wanted 1"):
        measure(answered(), "energy", [0.9], timing)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="score: got 'logit', wanted one of energy"):
        measure(answered(), "logit", [0.0])
    with pytest.raises(ValueError, match="threshold"):
        measure(answered(), "energy", [np.nan])


def test_a_sweep_keeps_every_twentieth_and_equal_scores_together():
    score = np.random.default_rng(0).permutation(100).astype(np.float32)
    assert [int((score >= t).sum()) for t in sweep(score)] == list(range(0, 101, 5))
    tied = np.array([3, 3, 3, 1, np.inf], dtype=np.float32)
    kept = [int((np.isfinite(tied) & (tied >= t)).sum()) for t in sweep(tied)]
    assert kept == [0, 3, 4]


def test_saved_json_and_csv_have_every_figure(tmp_path):
    timing = Timing(rows=5, batch_size=1, rounds=3, threads=1, swift=1.0, super=6.0, joint=(4.0, 3.0))
    evaluation = measure(answered("mrpc"), "energy", [0.7, np.inf], timing)
    evaluation.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == evaluation
    lines = list(csv.DictReader(io.StringIO(evaluation.csv())))
    names = [(line["system"], line["source"]) for line in lines]
    assert names == [
        *((system, "measured") for system in ("Swift", "Super", "joint", "joint")),
        *((system, "published") for system in ("Swift", "Super", "joint")),
    ]
    at, joint = lines[2], evaluation.joint[0]
    assert float(at["f1"]) == joint.quality["f1"]
    assert np.float32(at["threshold"]) == np.float32(0.7)
    for name in ("swift_ratio", "flops_speedup", "time_speedup"):
        assert float(at[name]) == getattr(joint, name)
    assert (lines[6]["published_quality"], lines[6]["time_speedup"], lines[6]["f1"]) == ("87.3", "1.5", "")


def test_the_table_tells_measured_from_published():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(measure(answered(), "energy", [0.7]).table())
    lines = console.export_text().splitlines()
    (joint,) = (line.split() for line in lines if line.startswith("joint t=0.7"))
    assert joint == ["joint", "t=0.7", "80.0", "80.0", "60.0", "2.73", "measured", "here"]
    (published,) = (line.split() for line in lines if line.startswith("joint") and "published" in line)
    assert published == ["joint", "93.7", "77.0", "3.5", "1.8", "published"]
    console.print(measure(answered("multirc"), "energy", [0.7]).table())
    assert "published" not in console.export_text()


# ---- time


def test_the_systems_timed_are_the_two_models_and_the_joint_one(swift, super_, both, tmp_path, monkeypatch):
    answers = answer_task(swift, super_, ROWS, both, tmp_path, task="sst2")
    threshold = float(np.median(answers.scores["energy"]))
    labels, batches = [], []

    def clock(runs, rounds):
        logits = {name: system().logits for name, system in runs.items()}
        labels.append({name: z.argmax(dim=1).tolist() for name, z in logits.items()})
        batches.append((len(logits["Super"]), rounds))
        return {name: [9.0, float(place), 0.0] for place, name in enumerate(runs, 1)}

    monkeypatch.setattr(run, "alternate", clock)
    pair = pair_on("sst2", swift, super_, both)
    timing = time_task(*pair, "energy", [np.inf, threshold], answers)
    assert batches == [(1, 3)] * N
    assert (timing.swift, timing.super, timing.joint) == (N * 1, N * 2, (N * 3, N * 4))
    assert (timing.rows, timing.batch_size, timing.threads) == (N, 1, torch.get_num_threads())
    joined = answers.joined(answers.kept("energy", threshold))
    assert [label["joint 1"] for label in labels] == [[label] for label in joined]
    assert [label["joint 0"] for label in labels] == [[label] for label in answers.super]
    assert joined.tolist() != answers.super.tolist()

    labels.clear()
    timing = time_task(*pair, "energy", [np.inf], answers, rows=3, batch_size=2)
    assert (timing.rows, timing.batch_size, timing.super) == (3, 2, 4)
    assert [label for batch in labels for label in batch["Super"]] == answers.super[[0, 12, 23]].tolist()


def test_models_that_read_different_tokens_are_not_timed(swift, super_, both, tmp_path):
    answers = answer_task(swift, super_, ROWS, both, tmp_path, task="sst2")
    both[1].model_max_length = 4
    with pytest.raises(ValueError, match="time: got models that read different tokens"):
        time_task(*pair_on("sst2", swift, super_, both), "energy", [], answers)
