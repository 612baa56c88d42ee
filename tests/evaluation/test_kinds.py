"""Every kind of model on every kind of task: what is answered, how sure Swift was, what it took."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from evaluation.released import RELEASED, write
from test_seq2seq import encoder_decoder, late_by_hand
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from elang.energy_head import EnergyHead
from elang.evaluation import generators
from elang.evaluation.answers import answer_task, right_of
from elang.evaluation.flops import generate_flops, row_flops
from elang.evaluation.metrics import evaluate
from elang.evaluation.predict import CLASSIFIER_SCORES
from elang.evaluation.records import stsb_score
from elang.evaluation.rows import load_task
from elang.evaluation.run import load_model, measure, sweep, task_model
from elang.evaluation.tasks import TASKS
from elang.late import LATE_SCORES
from elang.router import Router

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 64  # of encoder_decoder's models
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(autouse=True)
def short_translations(monkeypatch):
    monkeypatch.setattr(generators, "MAX_NEW_TOKENS", 6)


@pytest.fixture(params=list(RELEASED))
def released(request, tmp_path):
    """A task and its rows."""
    return TASKS[request.param], load_task(request.param, data_dir=write(tmp_path / "data", RELEASED[request.param][0]))


def tokenizer_for(task, rows, end=True, **options):
    """The task's labels, then words of its rows, as many as fit."""
    words = dict.fromkeys(
        [*task.labels, *(w for text in (*rows.target_texts, *rows.source_texts) for w in text.split())]
    )
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words][:VOCABULARY])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)


def t5_pair(task, rows, head=None):
    tokenizer = tokenizer_for(task, rows)
    swift, super_ = encoder_decoder("T5", 4), encoder_decoder("T5", 7, width=24, layers=2)
    return task_model("swift", swift, tokenizer, task, head), task_model("super", super_, tokenizer, task)


def written(of, rows, row):
    inputs = of.tokenizer(of.source_texts(rows)[row], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return of.model.generate(**inputs, **of.options(rows), return_dict_in_generate=True, output_logits=True)


def head_of(outputs, form="pooled"):
    torch.manual_seed(5)
    return EnergyHead(16, outputs, form)


# ---- encoder-decoders


def by_size(model, read, written):
    """In place of `generate_flops`, which is tested by itself and runs a model for every length."""
    return model.num_parameters() * (np.asarray(read) + 100 * np.asarray(written))


def test_t5_answers_every_task(released, tmp_path, monkeypatch):
    monkeypatch.setattr(generators, "generate_flops", by_size)
    task, rows = released
    swift, super_ = t5_pair(task, rows)
    answers = answer_task(swift, super_, rows, tmp_path / "out", batch_size=2)
    assert tuple(answers.scores) == LATE_SCORES
    measured = measure(answers, "mean_log_prob", [-np.inf, np.inf])
    for of, system in ((swift, measured.swift), (super_, measured.super)):
        outputs = [written(of, rows, row) for row in range(len(rows))]
        texts = [of.tokenizer.decode(o.sequences[0], skip_special_tokens=True) for o in outputs]
        assert system.quality == evaluate(task, texts, rows)
        read = [len(of.tokenizer(text)["input_ids"]) for text in of.source_texts(rows)]
        tokens = [o.sequences[0, 1:].tolist() for o in outputs]
        wrote = [t.index(1) + 1 if 1 in t else len(t) for t in tokens]
        flops = answers.swift_flops if of is swift else answers.super_flops
        assert flops.tolist() == by_size(of.model, read, wrote).tolist()
    assert (measured.joint[0].quality, measured.joint[1].quality) == (measured.swift.quality, measured.super.quality)
    assert measured.joint[1].flops_speedup == pytest.approx(
        answers.super_flops.sum() / (answers.swift_flops + answers.super_flops).sum()
    )
    check_record(answers, tmp_path / "rows.json")


def check_record(answers, file):
    """The rows of a report say what was answered, on disk too."""
    task, rows = answers.task, answers.rows
    record = answers.record(["elang", "eval"], "mean_log_prob", sweep(answers.scores["mean_log_prob"]))
    record.save(file)
    assert type(record).load(file) == record
    assert record.judged_by == ("super" if task.kind in ("regression", "generation") else "target")
    right = ~answers.disagree if record.judged_by == "super" else answers.swift_right
    assert record.swift_right == tuple(right.tolist())
    np.testing.assert_array_equal(record.score_values("mean_log_prob"), answers.scores["mean_log_prob"])
    if task.kind == "classification":
        assert record.target == tuple(task.labels[i] for i in rows.targets)


def test_late_scores_are_those_of_each_row_alone(tmp_path):
    task, rows = TASKS["wmt_en_de"], load_task("wmt_en_de", data_dir=write(tmp_path, RELEASED["wmt_en_de"][0]))
    swift, super_ = t5_pair(task, rows)
    answers = answer_task(swift, super_, rows, tmp_path / "out", batch_size=3)
    for row in range(len(rows)):
        inputs = swift.tokenizer(swift.source_texts(rows)[row], return_tensors="pt", return_token_type_ids=False)
        by_hand = late_by_hand(swift.model, inputs, written(swift, rows, row).sequences[0])
        for name, value in by_hand.items():
            assert answers.scores[name][row] == pytest.approx(value, rel=1e-4, abs=1e-5)
    read = [len(swift.tokenizer(text)["input_ids"]) for text in swift.source_texts(rows)]
    wrote = [written(swift, rows, row).sequences.shape[1] - 1 for row in range(len(rows))]
    assert answers.swift_flops.tolist() == generate_flops(swift.model, read, wrote).tolist()


@pytest.mark.parametrize(("outputs", "form"), [(1, "pooled"), (3, "pooled"), (VOCABULARY, "token")])
def test_an_energy_head_scores_before_anything_is_decoded(outputs, form, tmp_path):
    data = write(tmp_path, RELEASED["qqp"][0])
    task, rows = TASKS["qqp"], load_task("qqp", data_dir=data)
    swift, super_ = t5_pair(task, rows, head_of(outputs, form))
    temperatures = (1.0,) if outputs == 1 else (2.0, 1.0)
    answers = answer_task(swift, super_, rows, tmp_path / "out", temperatures=temperatures)
    early = {1: ("logit",), 3: CLASSIFIER_SCORES, VOCABULARY: ("energy",)}[outputs]
    at_one = [name if outputs == 1 else f"{name}@1" for name in early]
    assert set(answers.scores) == {*early, *at_one, *LATE_SCORES}
    texts = swift.source_texts(rows)
    inputs = [swift.tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in texts]
    for name, plain in ((at_one[0], 1.0), (early[0], temperatures[0])):
        for row, batch in enumerate(inputs):
            states = swift.model.get_encoder()(**batch).last_hidden_state
            router = Router(early[0], threshold=0.0, temperature=plain)
            score = swift.head.decide(states, batch["attention_mask"], router).score
            assert answers.scores[name][row] == pytest.approx(score.item(), rel=1e-4)
    lengths = [batch["input_ids"].shape[1] for batch in inputs]
    of_head = np.array([2 * 16 * outputs * (length if form == "token" else 1) for length in lengths])
    gate = row_flops(swift.model.get_encoder(), lengths) + of_head
    assert answers.gate_flops[early[0]].tolist() == gate.tolist()
    assert answers.gate_flops["mean_log_prob"].tolist() == answers.swift_flops.tolist()
    assert answers.flops(early[0], np.array([True, False])) == (
        answers.swift_flops[0] + gate[1] + answers.super_flops[1]
    )


@pytest.mark.parametrize("score", ["logit", "sum_log_prob"])
def test_the_joint_model_that_is_timed_answers_as_the_table_says(score, tmp_path):
    task, rows = TASKS["wmt_en_de"], load_task("wmt_en_de", data_dir=write(tmp_path, RELEASED["wmt_en_de"][0]))
    swift, super_ = t5_pair(task, rows, head_of(1))
    answers = answer_task(swift, super_, rows, tmp_path / "out")
    threshold = float(np.sort(answers.scores[score])[1])
    joint = swift.joined(super_, score, threshold, 1.0)
    texts = swift.encode(rows)
    for row, text in enumerate(answers.joined(answers.kept(score, threshold))):
        sequences = swift.run(joint, rows, texts.batch([row]))()
        assert swift.tokenizer.decode(sequences[0], skip_special_tokens=True) == text
    assert 0 < answers.kept(score, threshold).sum() < len(rows)
    assert (answers.swift != answers.super).any()


def test_other_encoder_decoders_translate_the_source_as_it_is(tmp_path):
    task, rows = TASKS["wmt_en_de"], load_task("wmt_en_de", data_dir=write(tmp_path, RELEASED["wmt_en_de"][0]))
    tokenizer = tokenizer_for(task, rows)
    marian = task_model("swift", encoder_decoder("Marian", 3), tokenizer, task)
    assert marian.source_texts(rows) == ["One.", "", "Three\u2028."]
    with pytest.raises(ValueError, match="super: got an encoder-decoder of the type marian for rte, wanted one of T5"):
        task_model("super", encoder_decoder("Marian", 3), tokenizer, TASKS["rte"])


def test_answers_are_no_longer_than_the_longest_there_is(tmp_path):
    rows = load_task("wsc", data_dir=write(tmp_path, RELEASED["wsc"][0]))
    swift, _ = t5_pair(TASKS["wsc"], rows)
    longest = max(len(swift.tokenizer(word)["input_ids"]) for word in ("False", "True", "Bob", "Pam", "{span1_text}"))
    assert swift.options(rows)["max_new_tokens"] == longest


def test_a_temperature_that_no_score_has_is_refused(tmp_path):
    task, rows = TASKS["qqp"], load_task("qqp", data_dir=write(tmp_path, RELEASED["qqp"][0]))
    for head in (None, head_of(1)):
        pair = t5_pair(task, rows, head)
        with pytest.raises(ValueError, match=r"temperature: got 2, wanted 1: none of .*mean_log_prob"):
            answer_task(*pair, rows, tmp_path / "out", temperatures=(1.0, 2.0))


# ---- models for multiple choice


def chooser(role, task, rows, seed):
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=VOCABULARY, **SIZES)
    model = transformers.BertForMultipleChoice(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return task_model(role, model, tokenizer_for(task, rows), task)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("copa", [["It broke.", "It sang."], ["It sang.", "I let go."]]),
        ("record", [[f"{e} met Bo." for e in ("Ada", "Bo", "Łódź")], [f"Ada saw {e}." for e in ("Ada", "Bo", "Łódź")]]),
    ],
)
def test_a_model_for_multiple_choice_answers_by_the_likeliest(name, choices, tmp_path):
    task, rows = TASKS[name], load_task(name, data_dir=write(tmp_path, RELEASED[name][0]))
    swift, super_ = (chooser(role, task, rows, seed) for seed, role in enumerate(("swift", "super")))
    answers = answer_task(swift, super_, rows, tmp_path / "out", batch_size=2)
    for of, values in ((swift, answers.swift), (super_, answers.super)):
        for row, of_row in enumerate(choices):
            first = [rows.texts[row][0]] * len(of_row)
            inputs = of.tokenizer(first, of_row, padding=True, return_tensors="pt")
            with torch.no_grad():
                logits = of.model(**{n: v.unsqueeze(0) for n, v in inputs.items()}).logits[0]
            best = int(logits.argmax())
            assert values[row] == (best if name == "copa" else rows.candidates[row][best])
            if of is swift:
                assert answers.scores["energy"][row] == pytest.approx(logits.logsumexp(0).item(), rel=1e-4)
    eager = row_flops(swift.model, [9], choices=True)
    assert answers.swift_flops[0] > eager[0]
    assert measure(answers, "energy", [np.inf]).joint[0].quality == evaluate(task, list(answers.super), rows)
    with pytest.raises(ValueError, match="time: got models for multiple choice"):
        swift.joined(super_, "energy", 0.0, 1.0)


def test_candidates_may_differ_in_number(tmp_path):
    task, rows = TASKS["record"], load_task("record", data_dir=write(tmp_path, RELEASED["record"][0]))
    fewer = type(rows)(**{**vars(rows), "candidates": (rows.candidates[0], rows.candidates[1][:2])})
    of = chooser("swift", task, rows, 0)
    whole, cut = (of.answer_scored(each, of.encode(each)) for each in (rows, fewer))
    assert cut["logits"][1, 2] == -np.inf
    np.testing.assert_allclose(cut["logits"][1, :2], whole["logits"][1, :2], rtol=1e-5)
    assert np.isfinite(cut["score.energy"]).all()
    assert cut["flops"][1] == pytest.approx(whole["flops"][1] * 2 / 3, rel=0.2)


# ---- similarities


def similarity(role, seed, labels):
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_labels=labels, **SIZES)
    model = transformers.BertForSequenceClassification(config).eval()
    return model


def test_similarities_are_swift_s_classes_and_super_s_one_output(tmp_path):
    task, rows = TASKS["stsb"], load_task("stsb", data_dir=write(tmp_path, RELEASED["stsb"][0]))
    reads = tokenizer_for(task, rows)
    swift = task_model("swift", similarity("swift", 1, 26), reads, task)
    super_ = task_model("super", similarity("super", 2, 1), reads, task)
    answers = answer_task(swift, super_, rows, tmp_path / "out")
    for row, texts in enumerate(rows.texts):
        inputs = reads(*texts, return_tensors="pt")
        with torch.no_grad():
            classes, one = (of.model(**inputs).logits[0] for of in (swift, super_))
        assert answers.swift[row] == stsb_score(int(classes.argmax()))
        assert answers.super[row] == pytest.approx(one.item(), rel=1e-4)
        assert answers.scores["energy"][row] == pytest.approx(classes.logsumexp(0).item(), rel=1e-5)
    assert measure(answers, "energy", [-np.inf]).joint[0].quality == evaluate(task, answers.swift, rows)
    assert answers.swift_right is None
    assert answers.record(["elang"], "energy", [0.0]).judged_by == "super"
    with pytest.raises(ValueError, match="swift: got one output for stsb, wanted 26 classes or an encoder-decoder"):
        task_model("swift", super_.model, reads, task)
    with pytest.raises(ValueError, match="time: got a classifier before another kind"):
        swift.joined(super_, "energy", 0.0, 1.0)


def test_similarities_differ_by_their_class(tmp_path):
    task, rows = TASKS["stsb"], load_task("stsb", data_dir=write(tmp_path, RELEASED["stsb"][0]))
    answers = answer_task(*t5_pair(task, rows), rows, tmp_path / "out")
    close = type(answers)(**{**vars(answers), "swift": np.array([3.55, -7.0]), "super": np.array([3.61, 0.3])})
    assert close.disagree.tolist() == [False, True]


# ---- which answers are right, and what is loaded


def test_right_is_what_each_task_says(tmp_path):
    data = write(tmp_path, RELEASED["record"][0])
    task, rows = TASKS["record"], load_task("record", data_dir=data)
    answers = answer_task(*t5_pair(task, rows), rows, tmp_path / "out")
    said = type(answers)(**{**vars(answers), "swift": np.array(["the ada", "Łódź!"], dtype=object)})
    assert said.swift_right.tolist() == [True, True]
    said = type(answers)(**{**vars(answers), "swift": np.array(["Bo", "Ada"], dtype=object)})
    assert said.swift_right.tolist() == [False, False]
    wmt = TASKS["wmt_en_de"], load_task("wmt_en_de", data_dir=write(tmp_path, RELEASED["wmt_en_de"][0]))
    assert right_of(t5_pair(*wmt)[0], wmt[1], tmp_path / "out") is None


def test_models_are_loaded_as_what_they_are(tmp_path):
    task, rows = TASKS["copa"], load_task("copa", data_dir=write(tmp_path, RELEASED["copa"][0]))
    made = {"T5": t5_pair(task, rows, head_of(1))[0], "choice": chooser("swift", task, rows, 0)}
    for name, of in made.items():
        of.model.save_pretrained(tmp_path / name)
        of.tokenizer.save_pretrained(tmp_path / name)
        assert type(load_model("swift", str(tmp_path / name), task)) is type(of)
    made["T5"].head.save(tmp_path / "head")
    loaded = load_model("swift", str(tmp_path / "T5"), task, tmp_path / "head")
    assert loaded.head_sha256 == made["T5"].head_sha256
    with pytest.raises(ValueError, match="head: got one for BertForMultipleChoice, wanted none"):
        load_model("swift", str(tmp_path / "choice"), task, tmp_path / "head")
    bare = transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **SIZES)).eval()
    with pytest.raises(ValueError, match="swift: got BertModel, wanted a sequence classifier"):
        task_model("swift", bare, made["choice"].tokenizer, task)
