from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from released import COPA, MNLI_HEADER, MULTIRC_PARAGRAPH, RECORD_PASSAGE, RELEASED, WSC, write

from elang.evaluation.records import STSB_CLASSES, stsb_class, stsb_score
from elang.evaluation.rows import Rows, load_task
from elang.evaluation.tasks import TASKS, get_task


def as_tuples(rows: Rows) -> list[tuple]:
    return list(zip(rows.ids, rows.texts, rows.source_texts, list(rows.targets), rows.target_texts, strict=True))


@pytest.fixture
def without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)


def test_every_task_has_its_files_here():
    assert set(RELEASED) == set(TASKS)


@pytest.mark.filterwarnings("ignore:.*left out 2 lines")
@pytest.mark.usefixtures("without_datasets")
@pytest.mark.parametrize("flat", [False, True], ids=["benchmark", "task"])
@pytest.mark.parametrize("name", RELEASED)
def test_the_released_files_are_read_as_they_are(name, flat, tmp_path):
    files, expected = RELEASED[name]
    rows = load_task(name, data_dir=write(tmp_path, files, flat))
    assert as_tuples(rows) == expected
    assert len(rows) == len(expected)
    if TASKS[name].labels:
        assert rows.targets.dtype == (np.float64 if name == "stsb" else np.int64)


def test_lines_of_qqp_that_are_torn_are_left_out_with_a_warning(tmp_path):
    folder = write(tmp_path, RELEASED["qqp"][0])
    with pytest.warns(
        UserWarning, match=r"dev.tsv: left out 2 lines without 6 fields, the first being line 3"
    ) as caught:
        load_task("qqp", data_dir=folder)
    assert caught[0].filename == __file__


def test_rows_that_are_judged_together_and_candidates(tmp_path):
    def load(name: str) -> Rows:
        return load_task(name, data_dir=write(tmp_path, RELEASED[name][0]))

    assert load("multirc").groups == ("3.8", "3.8", "3.9")
    assert load("copa").candidates == (("It broke.", "It sang."), ("It sang.", "I let go."))
    assert load("record").candidates == (("Ada", "Bo", "Łódź"),) * 2
    assert load("wsc").candidates == (("Bob",), ("Pam",), ("Pam",))
    assert (load("rte").groups, load("rte").candidates) == (("",), ((),))


def test_training_rows(tmp_path):
    write(
        tmp_path,
        {"SST-2/train.tsv": "sentence\tlabel\nGood.\t1\n", "CB/train.jsonl": RELEASED["cb"][0]["CB/val.jsonl"]},
    )
    # As released, the training rows of MNLI have one judgement each.
    header = MNLI_HEADER.replace("label1\tlabel2\tlabel3\tlabel4\tlabel5", "label1")
    row = "0\t1\t1n\tletters\t(a)\t(b)\t(a)\t(b)\tIt rains.\tIt is wet.\tneutral\tneutral\n"
    write(tmp_path, {"MNLI/train.tsv": header + row})
    assert load_task("sst2", "train", tmp_path).texts == (("Good.",),)
    assert load_task("cb", "train", tmp_path).target_texts == ("neutral",)
    for name in ("mnli_matched", "mnli_mismatched"):
        assert load_task(name, "train", tmp_path).texts == (("It rains.", "It is wet."),)


@pytest.mark.parametrize(
    ("name", "split", "release"),
    [
        ("wmt_en_de", "test", "wmt14/full"),
        ("wmt_en_fr", "test", "wmt14/full"),
        ("wmt_en_ro", "test", "wmt16"),
        ("wmt_en_ro", "validation", "wmt16/dev"),
    ],
)
def test_files_of_wmt_have_the_names_that_sacrebleu_knows(name, split, release, tmp_path):
    from sacrebleu.dataset import DATASETS

    pair = name.removeprefix("wmt_").replace("_", "-")
    source, target = DATASETS[release].langpairs[pair]
    write(tmp_path, {source: '<doc docid="d"><seg id="7">Tea.</seg></doc>', target: '<seg id="7">T</seg>'})
    assert as_tuples(load_task(name, split, tmp_path))[0][:2] == ("d:7", ("Tea.",))


def test_sgml_is_preferred_to_plain_text(tmp_path):
    plain = {"newstest2014.en": "plain\n", "newstest2014.de": "einfach\n"}
    sgml = {"newstest2014-deen-src.en.sgm": '<seg id="1">A</seg>', "newstest2014-deen-ref.de.sgm": "<seg>B</seg>"}
    write(tmp_path, plain)
    assert load_task("wmt_en_de", "test", tmp_path).targets == (("einfach",),)
    write(tmp_path, sgml)
    assert load_task("wmt_en_de", "test", tmp_path).targets == (("B",),)


SST2 = "sentence\tlabel\n"
UNASKED = {"premise": "a", "choice1": "b", "choice2": "c", "question": "why", "label": 0, "idx": 0}
UNANSWERED = {
    "passage": {"text": "a", "entities": []},
    "qas": [{"query": "@placeholder", "answers": [], "idx": 0}],
    "idx": 0,
}
STSB = "\t".join(["sentence1", "sentence2", "score"]) + "\n"


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("sst2", {}, r"^data_dir: got .*, wanted SST-2/dev.tsv in it, with or without the subfolder$"),
        ("wmt_en_de", {"dev/newstest2013.en": "a"}, "ref.de.sgm or dev/newstest2013.en and dev/newstest2013.de in it"),
        ("sst2", {"dev.tsv": ""}, r"dev.tsv: got no rows, wanted at least one$"),
        ("sst2", {"dev.tsv": SST2 + "\n\n"}, r"dev.tsv: got no rows, wanted at least one$"),
        ("cb", {"val.jsonl": "\n"}, r"val.jsonl: got no rows, wanted at least one$"),
        ("wmt_en_fr", {"newstest2013.en": "", "newstest2013.fr": ""}, r"newstest2013.en: got no rows"),
        ("sst2", {"dev.tsv": "text\tscore\nGood.\t1\n"}, r"the columns text, score, wanted also sentence, label$"),
        ("sst2", {"dev.tsv": SST2 + 'So "\tgood".\t1\n'}, r"dev.tsv, line 2: got 3 fields, wanted 2$"),
        ("sst2", {"dev.tsv": SST2 + "\nSo good.\n"}, r"dev.tsv, line 3: got 1 fields, wanted 2$"),
        ("cola", {"dev.tsv": "Sentence without the rest.\n"}, r"dev.tsv, line 1: got 1 fields, wanted 4$"),
        ("sst2", {"dev.tsv": SST2 + "Good.\tpositive\n"}, r"line 2: label: got 'positive', wanted one of '0', '1'$"),
        ("rte", {"RTE/val.jsonl": "{}"}, "wanted RTE/dev.tsv"),
        ("boolq", {"val.jsonl": "{\n"}, r"val.jsonl, line 1: got Expecting .*, wanted a JSON object$"),
        ("boolq", {"val.jsonl": "\n[1]\n"}, r"val.jsonl, line 2: got \[1\], wanted a JSON object$"),
        ("boolq", {"val.jsonl": '{"question": "a", "idx": 0, "label": true}'}, r"line 1: got no field 'passage'"),
        ("boolq", {"val.jsonl": '{"question": "a", "passage": "b", "idx": 0}'}, r"line 1: got no field 'label'"),
        ("multirc", {"val.jsonl": '{"idx": 0, "passage": {"text": "a"}}'}, r"line 1: got no field 'questions'"),
        ("copa", {"val.jsonl": json.dumps(UNASKED)}, r"line 1: question: got 'why', wanted 'cause' or 'effect'$"),
        ("record", {"val.jsonl": json.dumps(UNANSWERED)}, r"line 1: answers: got none, wanted at least one$"),
        ("stsb", {"dev.tsv": STSB + "a\tb\thigh\n"}, r"line 2: score: got 'high', wanted a number from 0 to 5$"),
        ("stsb", {"dev.tsv": STSB + "a\tb\t5.2\n"}, r"line 2: score: got 5.2, wanted 0 to 5$"),
        ("stsb", {"dev.tsv": STSB + "a\tb\tnan\n"}, r"line 2: score: got nan, wanted 0 to 5$"),
        ("wmt_en_de", {"newstest2013.en": "a\n\n", "newstest2013.de": "b\n"}, r"got 1 segments, wanted 2, as many as"),
    ],
)
@pytest.mark.usefixtures("without_datasets")
def test_what_is_wrong_with_the_files_is_said_in_one_line(name, files, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_task(name, data_dir=write(tmp_path, files))
    assert "\n" not in str(caught.value)


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "dev.tsv").write_bytes("sentence\tlabel\nna\u00efve\t1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"dev.tsv: got .*, wanted UTF-8$"):
        load_task("sst2", data_dir=tmp_path)


def test_unknown_tasks_and_splits_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"^task: got 'sst-2', wanted one of mnli_matched, .*, sst2, .*wmt_en_ro$"):
        load_task("sst-2")
    with pytest.raises(ValueError, match=r"^split: got 'test', wanted one of train, validation for sst2$"):
        load_task("sst2", "test")


# Rows of `datasets`, under the repository, configuration and split that they have there.
HUB = {
    "mnli_mismatched": (
        ("nyu-mll/glue", "mnli", "validation_mismatched"),
        ["entailment", "neutral", "contradiction"],
        [{"premise": "It snows.", "hypothesis": "It may.", "label": 0, "idx": 0}],
    ),
    "cola": (
        ("nyu-mll/glue", "cola", "validation"),
        ["unacceptable", "acceptable"],
        [
            {"sentence": "The bread rose.", "label": 1, "idx": 0},
            {"sentence": "Rose bread the.", "label": 0, "idx": 1},
        ],
    ),
    "stsb": (
        ("nyu-mll/glue", "stsb", "validation"),
        None,
        [
            {"sentence1": "A boat.", "sentence2": "A ship.", "label": 3.667, "idx": 0},
            {"sentence1": "A boat.", "sentence2": "An egg.", "label": 0.0, "idx": 1},
        ],
    ),
    "cb": (
        ("aps/super_glue", "cb", "validation"),
        ["entailment", "contradiction", "neutral"],
        [{"premise": "A: I think so.", "hypothesis": "so", "idx": 0, "label": 2}],
    ),
    "copa": (
        ("aps/super_glue", "copa", "validation"),
        ["choice1", "choice2"],
        [json.loads(line) for line in COPA.splitlines()],
    ),
    "multirc": (
        ("aps/super_glue", "multirc", "validation"),
        ["False", "True"],
        [
            {
                "paragraph": MULTIRC_PARAGRAPH,
                "question": question,
                "answer": answer,
                "idx": {"paragraph": 3, "question": q, "answer": a},
                "label": label,
            }
            for question, q, answer, a, label in (
                ("Who stayed?", 8, "Mia", 40, 1),
                ("Who stayed?", 8, "the {rain}", 41, 0),
                ("What fell?", 9, "Rain", 42, 1),
            )
        ],
    ),
    "record": (
        ("aps/super_glue", "record", "validation"),
        None,
        [
            {
                "passage": RECORD_PASSAGE,
                "query": query,
                "entities": ["Ada", "Bo", "Łódź"],
                "entity_spans": {"text": ["Ada"], "start": [0], "end": [3]},
                "answers": answers,
                "idx": {"passage": 2, "query": idx},
            }
            for query, answers, idx in (
                ("@placeholder met Bo.", ["Ada"], 6),
                ("Ada saw @placeholder.", ["Bo", "Łódź"], 7),
            )
        ],
    ),
    "wsc": (
        ("aps/super_glue", "wsc.fixed", "validation"),
        ["False", "True"],
        [{**row["target"], "text": row["text"], "idx": row["idx"], "label": int(row["label"])} for row in WSC],
    ),
    "wmt_en_de": (
        ("wmt/wmt14", "de-en", "validation"),
        None,
        [
            {"translation": {"de": "Eins.", "en": "One."}},
            {"translation": {"de": "", "en": ""}},
            {"translation": {"de": "Drei.", "en": "Three\u2028."}},
        ],
    ),
}


@pytest.fixture
def hub(monkeypatch):
    """Puts rows where `datasets` looks for them."""
    import datasets

    def put(place: tuple[str, str, str], names: list[str] | None, rows: list[dict]) -> None:
        stored = datasets.Dataset.from_list(rows)
        if names is not None:
            stored = stored.cast_column("label", datasets.ClassLabel(names=names))

        def load_dataset(path: str, name: str, *, split: str) -> datasets.Dataset:
            assert (path, name, split) == place
            return stored

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return put


@pytest.mark.parametrize("name", HUB)
def test_rows_of_datasets_are_those_of_the_files(name, hub, tmp_path):
    hub(*HUB[name])
    rows = load_task(name)
    assert as_tuples(rows) == as_tuples(load_task(name, data_dir=write(tmp_path, RELEASED[name][0])))
    assert len(rows.groups) == len(rows.candidates) == len(rows)


def test_labels_of_datasets_are_taken_by_name(hub):
    place = ("nyu-mll/glue", "sst2", "train")
    hub(place, ["positive", "negative"], [{"sentence": "Good.", "label": 0, "idx": 0}])
    assert load_task("sst2", "train").targets.tolist() == [1]
    hub(place, ["negative", "positive"], [{"sentence": "Good.", "label": -1, "idx": 0}])
    with pytest.raises(
        ValueError, match=r"^nyu-mll/glue sst2 train, row 0: label: got None, wanted one of 'negative', 'positive'$"
    ):
        load_task("sst2", "train")


def test_rows_that_datasets_cannot_reach(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"^aps/super_glue cb: no route; without a network, pass data_dir="):
        load_task("cb")


@pytest.mark.usefixtures("without_datasets")
def test_without_datasets_the_extra_is_named():
    with pytest.raises(ImportError, match=r"^load_task without data_dir needs datasets: pip install 'elang\[eval\]'$"):
        load_task("cb")


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (2.8, "2.8"),
        (1.66, "1.6"),  # both of T5's own tests
        (0.0, "0.0"),
        (5.0, "5.0"),
        (4.95, "5.0"),
        (0.1, "0.0"),
        (0.5, "0.4"),  # halves: 0.5 and 2.5 steps of 0.2 go down, 3.5 go up
        (0.7, "0.8"),
    ],
)
def test_classes_of_stsb(score, text):
    assert get_task("stsb").labels[stsb_class(score)] == text


def test_every_class_of_stsb_is_its_own_nearest():
    assert [stsb_class(stsb_score(label)) for label in range(STSB_CLASSES)] == list(range(26))
    assert [stsb_score(label) for label in (0, 13, 25)] == [0.0, 2.6, 5.0]


@given(st.floats(0, 5))
def test_a_class_of_stsb_is_at_most_a_tenth_away(score):
    assert abs(stsb_score(stsb_class(score)) - score) <= 0.1 + 1e-6


def test_what_is_no_class_of_stsb_is_refused():
    with pytest.raises(ValueError, match=r"score: got -0\.1, wanted 0 to 5"):
        stsb_class(-0.1)
    for label in (-1, 26):
        with pytest.raises(ValueError, match=f"label: got {label}, wanted 0 to 25"):
            stsb_score(label)


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [
        ("sst2", " positive\n", 1),
        ("sst2", "Positive", -1),
        ("mnli_matched", "contradiction", 2),
        ("cb", "contradiction", 1),
        ("copa", "True", 1),
        ("copa", "choice1", 0),
        ("stsb", "0.4", 2),
        ("rte", "", -1),
    ],
)
def test_labels_of_written_answers(name, text, label):
    assert get_task(name).label(text) == label


@pytest.mark.parametrize(
    ("answer", "noun", "label"),
    [
        ("the cook", "The cook", 1),
        ("cook", "the tired cook", 1),
        ("a very tired cook", "the cook", 1),
        ("the waiter", "the cook", 0),
        ("THE COOK", "the cook", 1),
        ("hat", "Ann's hat", 0),
        ("Ann's", "Ann's hat", 1),
        ("", "the cook", 0),
        ("the", "the cook", 0),
        ("cookie", "cook", 0),
    ],
)
def test_the_noun_that_a_pronoun_stands_for(answer, noun, label):
    assert get_task("wsc").label(answer, (noun,)) == label


def test_the_words_that_a_model_has_to_write_are_read_as_their_label(tmp_path):
    for name, (files, _) in RELEASED.items():
        if TASKS[name].kind in ("classification", "multiple_choice") and name not in ("qqp", "wsc"):
            rows = load_task(name, data_dir=write(tmp_path / name, files))
            assert [TASKS[name].label(text) for text in rows.target_texts] == rows.targets.tolist()
