from __future__ import annotations

import copy
import io
import json
import re
import shutil

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from conftest import assert_accurate
from demo_models import BAD, GOOD, NOUNS, tokenizer
from rich.console import Console
from safetensors.numpy import load_file
from scipy.stats import binom, binomtest
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from elang import distillation
from elang.calibration import Calibration
from elang.distillation import Distillation, distill
from elang.evaluation import flops
from elang.evaluation.flops import row_flops
from elang.evaluation.predict import CLASSIFIER_SCORES, Encoded
from elang.fingerprint import fingerprint
from elang.joint import JointClassifier
from elang.progress import silent
from elang.reference import score_logits
from elang.texts import split
from elang.training import Recipe, distillation_loss, fit

pytestmark = pytest.mark.usefixtures("one_thread", "quick")

DEPTH = 3
FAST = {"epochs": 1, "batch_size": 100}


def made_up(n=400):
    """Distinct texts, half of them with more good words than bad ones."""
    rng, texts = np.random.default_rng(0), {}
    while len(texts) < n:
        words = [str(rng.choice(kind)) for kind in (GOOD, BAD, NOUNS) for _ in range(rng.integers(0, 4))]
        good = sum(word in GOOD for word in words) - sum(word in BAD for word in words)
        if good:
            texts[" ".join(rng.permutation(words))] = int(good > 0)
    return list(texts), np.array(list(texts.values()))


TEXTS, LABELS = made_up()


def save(folder, family="Bert", dtype=torch.float32, **overrides):
    model = tiny_models.classifier(family, seed=1, **{"num_labels": 2, "num_hidden_layers": DEPTH, **overrides})
    if model.config.num_labels == 2:
        model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quick():
    """Few texts are timed; FLOPs are counted once for each kind of model, whatever its weights."""
    count, counted = flops._count, {}

    def once(model, shape):
        key = type(model), model.num_parameters(), shape
        if key not in counted:
            counted[key] = count(model, shape)
        return counted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "TIMED_ROWS", 3)
        patch.setattr(flops, "_count", once)
        yield


@pytest.fixture(scope="module")
def super_(tmp_path_factory):
    """A Super that knows good from bad; its last layer turns all around, so that those below alone say the opposite."""
    folder = save(tmp_path_factory.mktemp("models") / "super")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    targets = torch.from_numpy(LABELS)
    recipe = Recipe(DEPTH, 8, 32, 1e-2, 1e-2, attention_dropout=0.0)
    texts = Encoded(tokenizer(), TEXTS, None)
    fit(model, texts, lambda logits, rows: nn.functional.cross_entropy(logits, targets[rows]), recipe, silent)
    with torch.no_grad():
        norm = model.bert.encoder.layer[-1].output.LayerNorm
        for parameter in (norm.weight, norm.bias, model.bert.pooler.dense.weight):
            parameter.neg_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(super_, tmp_path_factory):
    """Where students of one and two layers are, and what was said of them."""
    out = tmp_path_factory.mktemp("students")
    options = {"epochs": 4, "learning_rate": 1e-2, "alpha": 0.12, "delta": 0.2}
    before = {file.name: file.read_bytes() for file in super_.iterdir()}
    random_state = torch.get_rng_state()
    said = distill(super_, TEXTS, [2, 1], out, data="made up", **options)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {file.name: file.read_bytes() for file in super_.iterdir()} == before
    return out, said, options


@pytest.fixture
def students(made, tmp_path):
    """The folder, for a test to do with as it likes."""
    return shutil.copytree(made[0], tmp_path / "students")


def held_out(n=400):
    return [TEXTS[i] for i in split([(text,) for text in TEXTS[:n]])[1]]


@torch.no_grad()
def logits_of(model, texts):
    return torch.cat([model(**tokenizer()(text, return_tensors="pt")).logits for text in texts])


def load(folder, **settings):
    return AutoModelForSequenceClassification.from_pretrained(folder, **settings).eval()


def names(folder):
    return sorted(file.name for file in folder.iterdir())


# ---- what a student is


def test_a_student_learns_what_super_answers(super_, made):
    out, said, _ = made
    answers = logits_of(load(super_), held_out()).argmax(dim=1)
    for student in said.students:
        untrained = logits_of(load(super_, num_hidden_layers=student.layers), held_out()).argmax(dim=1)
        learnt = logits_of(load(out / student.folder), held_out()).argmax(dim=1)
        assert (learnt == answers).float().mean() > 0.8
        assert (untrained == answers).float().mean() < 0.4


def test_a_student_is_a_model_like_super(super_, made):
    out, said, _ = made
    assert [student.layers for student in said.students] == [1, 2]
    for student in said.students:
        swift = load(out / student.folder)
        assert swift.config.num_hidden_layers == student.layers
        assert swift.config.id2label == {0: "bad", 1: "good"}
        assert "model.safetensors" in names(out / student.folder)
        assert AutoTokenizer.from_pretrained(out / student.folder).get_vocab() == tokenizer().get_vocab()


def test_a_student_and_super_are_joined_by_their_calibration(super_, made):
    out, said, _ = made
    swift, big = load(out / "swift-1"), load(super_)
    joint = JointClassifier(swift, big, out / "calibration-1.json")
    kept = 0
    for text in held_out():
        inputs = tokenizer()(text, return_tensors="pt")
        answer = joint(**inputs)
        kept += 1 - int(answer.routing.n_routed)
        model = big if answer.routing.n_routed else swift
        assert answer.logits.argmax() == logits_of(model, [text]).argmax()
    assert kept / len(held_out()) == pytest.approx(said.students[0].share_kept, abs=0.03)


def test_layers_of_different_types(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 64}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.ModernBertConfig(
        num_hidden_layers=3, layer_types=types, pad_token_id=0, cls_token_id=1, sep_token_id=1, **sizes
    )
    transformers.ModernBertForSequenceClassification(config).save_pretrained(tmp_path / "super")
    tokenizer().save_pretrained(tmp_path / "super")
    made = distill(tmp_path / "super", TEXTS[:60], [2], tmp_path / "out", **FAST)
    assert load(tmp_path / "out" / "swift-2").config.layer_types == types[:2]
    assert made.students[0].flops_speedup > 1


@pytest.mark.parametrize("family", ["DistilBert", "GPT2", "DebertaV2"])
def test_other_families_from_end_to_end(family, tmp_path):
    made = distill(save(tmp_path / "super", family, num_hidden_layers=2), TEXTS[:90], [1], tmp_path / "out", **FAST)
    swift, big = load(tmp_path / "out" / "swift-1"), load(tmp_path / "super")
    asked = held_out(90)
    agree = logits_of(swift, asked).argmax(dim=1) == logits_of(big, asked).argmax(dim=1)
    assert made.students[0].agreement == pytest.approx(agree.float().mean().item())
    assert (made.layers, made.students[0].parameters) == (2, sum(p.numel() for p in swift.parameters()))


def test_a_student_has_super_s_dtype(tmp_path):
    distill(save(tmp_path / "super", dtype=torch.bfloat16), TEXTS[:60], [1], tmp_path / "out", **FAST)
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "swift-1", dtype="auto")
    assert stored.dtype == torch.bfloat16
    assert not any(torch.isnan(p).any() for p in stored.parameters())


def test_pairs_of_texts(super_, tmp_path):
    pairs = [(text, TEXTS[i - 1]) for i, text in enumerate(TEXTS[:90])]
    made = distill(super_, pairs, [1], tmp_path, **FAST)
    assert (made.n, made.n_lessons) == (9, 81)
    (file,) = tmp_path.glob("super-*.safetensors")
    answers, asked = load_file(file)["held_out"], [pairs[i] for i in split(pairs)[1]]
    model = load(super_)
    with torch.no_grad():
        alone = torch.cat([model(**tokenizer()(*pair, return_tensors="pt")).logits for pair in asked])
        truth = copy.deepcopy(model).double()
        truth = torch.cat([truth(**tokenizer()(*pair, return_tensors="pt")).logits for pair in asked])
    assert_accurate(torch.from_numpy(answers), alone, truth)


def test_the_temperature_reaches_the_loss(super_, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        distillation,
        "distillation_loss",
        lambda teacher, t: seen.append((len(teacher), t)) or distillation_loss(teacher, t),
    )
    distill(super_, TEXTS[:60], [1], tmp_path, temperature=7.0, **FAST)
    assert seen == [(54, 7.0)]


def test_a_seed_makes_the_same_student_again(super_, tmp_path):
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distill(super_, TEXTS[:60], [1], tmp_path / name, seed=seed, **FAST)
        made[name] = fingerprint(load(tmp_path / name / "swift-1"))
    assert made["a"] == made["b"] != made["c"]


def test_no_student_learns_from_what_is_held_out(super_, tmp_path, monkeypatch):
    seen = []

    def watched(model, texts, loss, recipe, report):
        seen.extend(texts.ids)

    monkeypatch.setattr(distillation, "fit", watched)
    distill(super_, [*TEXTS, *(f"{text}!" for text in TEXTS)], [1], tmp_path, **FAST)
    ids = {tuple(tokenizer()(text)["input_ids"]) for text in held_out()}
    assert len(seen) == len(TEXTS) - len(ids) == 360
    assert not ids & {tuple(row) for row in seen}


def test_texts_are_cut(super_, tmp_path, monkeypatch):
    lengths = []
    monkeypatch.setattr(distillation, "fit", lambda model, texts, *_: lengths.append(texts.lengths.max()))
    for name, most in (("a", 3), ("b", None)):
        assert distill(super_, TEXTS[:60], [1], tmp_path / name, max_length=most, **FAST).max_length == (most or 512)
    assert lengths[0] == 3 < lengths[1]


# ---- what is said of it


def test_every_figure_by_hand(super_, tmp_path, monkeypatch):
    big, lengths = load(super_), [len(tokenizer()(text)["input_ids"]) for text in held_out()]
    answers = logits_of(big, held_out())
    logits = answers + answers.std() * torch.randn(answers.shape, generator=torch.Generator().manual_seed(4))

    def predict_scored(model, texts, report):
        return logits.numpy(), {name: score_logits(logits, name, 1.0).numpy() for name in CLASSIFIER_SCORES}

    monkeypatch.setattr(distillation, "predict_scored", predict_scored)
    alpha, delta = 0.2, 0.2
    said = distill(super_, TEXTS, [2], tmp_path, alpha=alpha, delta=delta, **FAST)
    assert (said.n, said.n_lessons, said.layers) == (40, 360, DEPTH)
    assert said.parameters == sum(p.numel() for p in big.parameters())
    assert said.most_frequent == pytest.approx(max((answers.argmax(dim=1) == label).float().mean() for label in (0, 1)))

    (student,), swift = said.students, load(tmp_path / "swift-2")
    differ = (logits.argmax(dim=1) != answers.argmax(dim=1)).numpy()
    interval = binomtest(int((~differ).sum()), 40).proportion_ci(0.95, "wilson")
    ours, theirs = row_flops(swift, lengths), row_flops(big, lengths)
    assert student.parameters == sum(p.numel() for p in swift.parameters())
    assert student.agreement == pytest.approx(1 - differ.mean())
    assert (student.lower, student.upper) == pytest.approx(interval)
    assert student.flops_speedup == pytest.approx(theirs.sum() / ours.sum())

    chosen = Calibration.load(tmp_path / student.calibration)
    order = np.argsort(-score_logits(logits, chosen.score, 1.0).numpy(), kind="stable")
    passes = binom.cdf(np.cumsum(differ[order]), 40, alpha) <= delta / len(CLASSIFIER_SCORES)
    kept = order[: int(np.argmin(np.append(passes, False)))]
    routed = np.setdiff1d(np.arange(40), kept)
    assert 0 < len(kept) < 40
    assert (chosen.target.value, chosen.target.delta) == (alpha, delta)
    places = split([(text,) for text in TEXTS])[1]
    assert list(chosen.hardest.id) == [places[row] for row in kept if differ[row]] != []
    assert student.share_kept == pytest.approx(len(kept) / 40)
    assert student.joint_flops_speedup == pytest.approx(theirs.sum() / (ours.sum() + theirs[routed].sum()))


def test_the_clock(super_, tmp_path, monkeypatch):
    seen = []

    def alternate(runs, rounds):
        swift, big = runs.values()
        sizes = {len(run.keywords["input_ids"]) for run in (swift, big)}
        assert (swift.func.config.num_hidden_layers, big.func.config.num_hidden_layers) == (2, DEPTH)
        seen.append((*sizes, rounds))
        return {"Swift": [9.0, 2.0, 1.0], "Super": [5.0, 6.0 + 2 * len(seen), 99.0]}

    monkeypatch.setattr(distillation, "alternate", alternate)
    monkeypatch.setattr(distillation, "TIMED_ROWS", 35)
    made = distill(super_, TEXTS, [2], tmp_path, **FAST)
    assert seen == [(1, 3)] * 35 + [(32, 3), (3, 3)]
    times = {1: np.mean([6 + 2 * i for i in range(1, 36)]) / 2, 32: (6 + 72 + 6 + 74) / 4}
    assert made.students[0].time_speedup == pytest.approx(times)
    assert (made.timed_rows, made.threads) == (35, 1)


def test_it_is_saved_as_it_is_returned(super_, made):
    out, said, _ = made
    assert Distillation.load(out / "distillation.json") == said
    source = said.provenance
    assert (source.super, source.super_sha256, source.data) == (str(super_), fingerprint(load(super_)), "made up")
    for student in said.students:
        calibration = Calibration.load(out / student.calibration)
        assert calibration.target.share_kept == student.share_kept
        assert calibration.provenance.swift_sha256 == fingerprint(load(out / student.folder))
        assert {TEXTS[i] for i in calibration.hardest.id} <= set(held_out())


def shown(said):
    console = Console(width=120, file=io.StringIO())
    console.print(said.table())
    return console.file.getvalue()


def test_the_table_shows_every_figure(made):
    _, said, _ = made
    student = said.students[0].model_copy(
        update={"agreement": 0.912, "lower": 0.85, "upper": 0.957, "time_speedup": {1: 2.5, 32: 2.75}}
    )
    said = said.model_copy(update={"students": (student,)})
    lines = shown(said).splitlines()
    (line,) = (line.split() for line in lines if line.split()[:1] == ["1"])
    kept, joint = f"{100 * student.share_kept:.1f}", f"{student.joint_flops_speedup:.2f}"
    assert line[2:] == ["91.2", "(85.0", "to", "95.7)", f"{student.flops_speedup:.2f}", "2.50", "2.75", kept, joint]
    (line,) = (line.split() for line in lines if "Super 3" in line)
    assert line[3:] == ["100.0", "1.00", "1.00", "1.00"]
    assert lines[0].startswith("made up: 40 held-out texts, 360 to learn from")


def test_no_threshold_is_an_answer(super_, students, made):
    out, options = students, made[2]
    again = distill(super_, TEXTS, [1], out, **{**options, "alpha": 0.001})
    (student,) = again.students
    assert (student.share_kept, student.joint_flops_speedup, student.calibration) == (None, None, None)
    assert not (out / "calibration-1.json").exists()  # of another alpha
    assert "which no threshold meets with n = 40" in student.infeasible
    text = " ".join(shown(again).split())
    assert "none" in text
    assert f"1 layers: {student.infeasible}" in text
    assert distill(super_, TEXTS, [1], out, **options).students[0].calibration == "calibration-1.json"


# ---- what is there is not made again


def never(*_, **__):
    pytest.fail("computes again")


def stop_computing(monkeypatch, *which):
    for name in which or ("fit", "predict", "predict_scored", "row_flops", "alternate"):
        monkeypatch.setattr(distillation, name, never)


def content(said):
    return said.model_dump(exclude={"provenance": {"date"}})


def test_a_second_run_computes_nothing(super_, students, made, monkeypatch):
    out, (_, said, options) = students, made
    before = names(out)
    stop_computing(monkeypatch)
    assert content(distill(super_, TEXTS, [1, 2], out, data="made up", **options)) == content(said)
    (two,) = distill(super_, TEXTS, [2], out, data="made up", **options).students
    assert two == said.students[1]
    assert names(out) == before


def test_another_setting_is_another_student(super_, tmp_path, monkeypatch):
    taught = []

    def watched(model, texts, loss, recipe, report):
        taught.append((recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.embedding_rate, recipe.seed))

    monkeypatch.setattr(distillation, "fit", watched)
    first = {"epochs": 4, "batch_size": 5, "learning_rate": 6.0}
    changes = ({}, {"epochs": 3}, {"batch_size": 7}, {"learning_rate": 8.0}, {"temperature": 3.0}, {"seed": 1})
    for change in (*changes, changes[-1]):
        distill(super_, TEXTS[:60], [1], tmp_path, **{**first, **change})
    as_first = (4, 5, 6.0, 6.0, 0)
    assert taught == [
        as_first,
        (3, 5, 6.0, 6.0, 0),
        (4, 7, 6.0, 6.0, 0),
        (4, 5, 8.0, 8.0, 0),
        as_first,
        (4, 5, 6, 6, 1),
    ]


def test_other_texts_and_another_super_are_other_students(super_, tmp_path, monkeypatch):
    distill(super_, TEXTS[:60], [1], tmp_path / "out", **FAST)
    stop_computing(monkeypatch, "predict")
    save(tmp_path / "other")
    one_held_out = TEXTS.index(held_out(60)[0])
    asked_another = [*TEXTS[:one_held_out], "another", *TEXTS[one_held_out + 1 : 60]]
    for model, texts in ((super_, TEXTS[:61]), (super_, asked_another), (tmp_path / "other", TEXTS[:60])):
        with pytest.raises(pytest.fail.Exception, match="computes again"):
            distill(model, texts, [1], tmp_path / "out", **FAST)
    distill(super_, TEXTS[:60], [1], tmp_path / "out", alpha=0.5, delta=0.5, data="renamed", **FAST)


def test_an_interrupted_run_goes_on_where_it_was(super_, tmp_path, monkeypatch):
    trained, learn = [], fit

    def interrupted(model, texts, loss, recipe, report):
        trained.append(recipe.layers)
        if len(trained) == 2:
            raise KeyboardInterrupt
        learn(model, texts, loss, recipe, report)

    monkeypatch.setattr(distillation, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(super_, TEXTS[:60], [1, 2], tmp_path, **FAST)
    left = [re.sub("[0-9a-f]{16}", "KEY", name) for name in names(tmp_path)]
    assert left == ["super-KEY.safetensors", "swift-1", "swift-1-KEY.safetensors"]
    monkeypatch.setattr(distillation, "predict", never)
    distill(super_, TEXTS[:60], [1, 2], tmp_path, **FAST)
    assert trained == [1, 2, 2]


def test_a_torn_write_leaves_what_was_there(super_, students, made, monkeypatch):
    out, options = students, made[2]
    before = names(out), names(out / "swift-1"), fingerprint(load(out / "swift-1"))

    def torn(self, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(type(load(super_)), "save_pretrained", torn)
    with pytest.raises(KeyboardInterrupt):
        distill(super_, TEXTS, [1], out, **{**options, **FAST})
    assert (names(out), names(out / "swift-1"), fingerprint(load(out / "swift-1"))) == before


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0]}, r"layers: got \[0\], wanted numbers from 1 to 2: Super has 3"),
        ({"layers": [1, 3]}, r"layers: got \[1, 3\], wanted numbers from 1 to 2"),
        ({"layers": []}, r"layers: got \[\], wanted"),
        ({"texts": TEXTS[:39]}, "texts: got 39 distinct ones, wanted at least 40"),
        ({"texts": [*TEXTS[:39], *(f"{text.upper()}!" for text in TEXTS[:39])]}, "texts: got 39 distinct ones"),
        ({"texts": []}, "texts: got 0 distinct ones"),
        ({"texts": [*TEXTS[:50], ("a", "b")]}, r"texts\[50\]: got 2 of them, wanted one everywhere or two"),
        ({"texts": [("a", "b", "c")] * 50}, r"texts\[0\]: got 3 of them"),
        ({"epochs": 0}, "epochs: got 0, wanted at least 1"),
        ({"batch_size": 0}, "batch_size: got 0, wanted at least 1"),
        ({"learning_rate": float("inf")}, "learning_rate: got inf, wanted a finite number > 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"alpha": 0.0}, r"alpha: got 0.0, wanted a number in \(0, 1\)"),
        ({"delta": 1.0}, "delta: got 1.0"),
        ({"max_length": 513}, "max_length: got 513, wanted 1 to 512 tokens"),
        ({"max_length": 0}, "max_length: got 0"),
    ],
)
def test_bad_arguments(super_, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        distill(super_, **{"texts": TEXTS, "layers": [1], "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_texts_of_no_kind(super_, tmp_path):
    with pytest.raises(TypeError, match=r"texts\[1\]: got \(3,\), wanted a str, or a pair of them"):
        distill(super_, ["a", [3]], [1], tmp_path)


def without_padding(folder):
    save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def never_fine_tuned(folder):
    save(folder)
    transformers.BertModel.from_pretrained(folder).save_pretrained(folder)


def encoder_decoder(folder):
    sizes = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
    transformers.BartForSequenceClassification(transformers.BartConfig(**sizes, **heads)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: save(folder, num_labels=1), "super: a regression head"),
        (lambda folder: save(folder, problem_type="multi_label_classification"), "super: a multi-label head"),
        (without_padding, "super: got a tokenizer without a padding token"),
        (never_fine_tuned, "super: got no weights for classifier.bias, classifier.weight"),
        (encoder_decoder, "super: got a BartForSequenceClassification, wanted one stack of layers"),
        (lambda folder: folder.mkdir(), "super: got .*, wanted the folder or hub id of a model"),
    ],
)
def test_a_super_that_cannot_teach_is_refused(tmp_path, make, message):
    make(tmp_path / "super")
    with pytest.raises(ValueError, match=message):
        distill(tmp_path / "super", TEXTS, [1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_student_is_left_alone(super_, tmp_path):
    save(tmp_path / "swift-1")
    before = fingerprint(load(tmp_path / "swift-1"))
    with pytest.raises(ValueError, match=r"out: got .*swift-1, which is no student of an earlier run"):
        distill(super_, TEXTS, [1], tmp_path)
    assert names(tmp_path) == ["swift-1"]
    assert fingerprint(load(tmp_path / "swift-1")) == before
