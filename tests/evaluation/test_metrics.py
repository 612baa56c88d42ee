from __future__ import annotations

import math
import sys
import warnings
from dataclasses import astuple

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from released import RELEASED, write

from elang.evaluation.metrics import METRICS, bleu, evaluate, normalised, token_f1
from elang.evaluation.published import PUBLISHED, PUBLISHED_AVERAGE
from elang.evaluation.rows import Rows, load_task
from elang.evaluation.tasks import TASKS

# What is undefined is so by definition, not with a library's warning.
pytestmark = pytest.mark.filterwarnings("error")


def rows_of(targets, groups=(), candidates=()) -> Rows:
    """As many rows as targets, without texts: metrics read none."""
    n = len(targets)
    nothing = ("",) * n
    return Rows(nothing, ((),) * n, nothing, targets, nothing, groups or nothing, candidates or ((),) * n)


def counts(targets, predictions) -> tuple[int, int, int, int]:
    pairs = list(zip(targets, predictions, strict=True))
    return tuple(pairs.count(pair) for pair in ((1, 1), (0, 1), (1, 0), (0, 0)))


binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30)


@settings(deadline=None)  # the first call imports scikit-learn
@given(binary)
def test_metrics_of_two_labels_are_their_formulas(pairs):
    targets, predictions = zip(*pairs, strict=True)
    tp, fp, fn, tn = counts(targets, predictions)
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0
    margin = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    matthews = (tp * tn - fp * fn) / math.sqrt(margin) if margin else 0
    rows = rows_of(np.array(targets))
    accuracy = 100 * (tp + tn) / len(pairs)
    assert evaluate("mrpc", predictions, rows) == pytest.approx({"f1": 100 * f1, "accuracy": accuracy})
    assert evaluate("qqp", np.array(predictions), rows) == pytest.approx({"f1": 100 * f1, "accuracy": accuracy})
    assert evaluate("cola", predictions, rows) == pytest.approx({"matthews_correlation": 100 * matthews}, abs=1e-9)
    assert evaluate("sst2", predictions, rows) == pytest.approx({"accuracy": accuracy})


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_over_the_labels_that_occur(pairs):
    targets, predictions = zip(*pairs, strict=True)
    occurring = sorted({*targets, *predictions})
    each = []
    for label in occurring:
        tp, fp, fn, _ = counts([int(t == label) for t in targets], [int(p == label) for p in predictions])
        each.append(2 * tp / (2 * tp + fp + fn))
    result = evaluate("cb", predictions, rows_of(np.array(targets)))
    assert list(result) == ["f1_macro", "accuracy"]
    assert result["f1_macro"] == pytest.approx(100 * sum(each) / len(each))


def test_by_hand():
    rows = rows_of(np.array([1, 1, 1, 0, 0]))
    assert evaluate("mrpc", [1, 1, 0, 1, 0], rows) == pytest.approx({"f1": 200 / 3, "accuracy": 60})
    assert evaluate("cola", [1, 1, 0, 1, 0], rows) == pytest.approx({"matthews_correlation": 100 / 6})
    assert evaluate("cola", np.array([0, 0, 0, 1, 1], dtype=np.int8), rows) == pytest.approx(
        {"matthews_correlation": -100}
    )


def test_one_label_only_has_no_correlation():
    for targets, predictions in (([0, 1, 1], [1, 1, 1]), ([1, 1, 1], [0, 1, 1]), ([0, 0], [0, 0])):
        assert evaluate("cola", predictions, rows_of(np.array(targets))) == {"matthews_correlation": 0}
    assert evaluate("mrpc", [0, 0], rows_of(np.array([0, 0]))) == {"f1": 0, "accuracy": 100}


@pytest.mark.parametrize(
    ("targets", "scores", "pearson", "spearman"),
    [
        ([1, 2, 3], [1, 3, 2], 1 / 2, 1 / 2),
        ([1, 2, 3], [1, 10, 100], 99 / math.sqrt(2 * 5994), 1),
        ([1, 2, 3, 4], [2, 2, 5, 5], 2 / math.sqrt(5), 2 / math.sqrt(5)),  # ties share a rank
        ([1, 2, 3], [0.3, 0.2, 0.1], -1, -1),
        ([1, 2, 3], [4, 4, 4], 0, 0),
        ([2, 2, 2], [1, 2, 3], 0, 0),
        ([2], [1], 0, 0),
    ],
)
def test_correlations(targets, scores, pearson, spearman):
    rows = rows_of(np.array(targets, dtype=np.float64))
    expected = pytest.approx({"pearson": 100 * pearson, "spearman": 100 * spearman})
    assert evaluate("stsb", scores, rows) == expected
    assert evaluate("stsb", np.array(scores, dtype=np.float32), rows) == expected


def test_multirc_counts_answers_and_whole_questions():
    targets = np.array([1, 0, 1, 0, 1, 1])
    rows = rows_of(targets, groups=("0.1", "0.0", "0.1", "0.0", "0.2", "0.1"))
    assert evaluate("multirc", targets, rows) == {"f1_a": 100, "exact_match": 100}
    # One answer to question 0.1 is missed, one to 0.0 taken: of three questions 0.2 is whole.
    assert evaluate("multirc", [1, 0, 0, 1, 1, 1], rows) == pytest.approx({"f1_a": 75, "exact_match": 100 / 3})


def test_record_takes_the_answer_that_is_closest():
    answers = (("New York", "the city of New York"), ("Ada",), ("U.S.",), ("Bo", "Ada"))
    got = ["New York City!", "Bo", " the us ", "ada"]
    # Words in common, of three with two and with four: 4 / 5 and 6 / 7 (the article is no word).
    f1 = [6 / 7, 0, 1, 1]
    assert evaluate("record", got, rows_of(answers)) == pytest.approx({"f1": 25 * sum(f1), "exact_match": 50})


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The  Cat's\tpyjamas, an end.", "cats pyjamas end"),
        ("Anna's theatre", "annas theatre"),
        ("«Łódź»: a city", "«łódź» city"),
        ("the", ""),
    ],
)
def test_normalised_answers(answer, plain):
    assert normalised(answer) == plain


words = st.lists(st.sampled_from(["one", "two", "three", "four"]), max_size=6)


@given(words, words)
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(a, b):
    left = list(b)
    common = 0
    for word in a:
        if word in left:
            left.remove(word)
            common += 1
    f1 = 2 / (len(a) / common + len(b) / common) if common else 0
    assert token_f1(" ".join(a), " ".join(b)) == pytest.approx(f1)


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples, and the same length.
    result = evaluate("wmt_en_de", ["the cat sat on the mat"], rows_of((("the cat sat on a mat",),)))
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert result == pytest.approx({"bleu": expected, "bleu_intl": expected})


def test_bleu_is_that_of_the_corpus():
    got, references = ["a b c d e", "f g h i"], ["a b c d e", "f g x i"]
    rows = rows_of(tuple((reference,) for reference in references))
    expected = 100 * (8 / 9 * 5 / 7 * 3 / 5 * 2 / 3) ** 0.25
    assert evaluate("wmt_en_ro", got, rows)["bleu"] == pytest.approx(expected)
    assert evaluate("wmt_en_ro", references, rows)["bleu"] == pytest.approx(100)


def test_bleu_by_both_tokenisations():
    result = evaluate("wmt_en_de", ["„Ja“, sagte er laut"], rows_of((("Ja, sagte er laut",),)))
    # Only T5's takes German quotation marks for words of their own.
    assert result["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert result["bleu_intl"] == pytest.approx(100 * (5 / 7 * 3 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_bleu_has_its_signature():
    several = (("a b c d", "e f g h"), ("i j k l", "m n o p"))
    score, signature = bleu(["e f g h", "i j k l"], several)
    assert score == pytest.approx(100)
    assert signature == f"nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert "tok:intl" in bleu(["a"], [["a"]], "intl").signature


def test_written_labels_count_as_their_labels():
    rows = rows_of(np.array([0, 1, 1]))
    assert evaluate("sst2", ["negative", "positive", "negative"], rows) == evaluate("sst2", [0, 1, 0], rows)
    assert evaluate("sst2", np.array(["negative", "positive", "negative"]), rows) == evaluate("sst2", [0, 1, 0], rows)
    assert evaluate("copa", ["False", "True", "choice2"], rows) == {"accuracy": 100}
    rows = rows_of(np.array([1, 0]), candidates=(("The cook",), ("the waiter",)))
    assert evaluate("wsc", ["cook", "Pam"], rows) == {"accuracy": 100}


def test_what_names_no_label_is_wrong():
    rows = rows_of(np.array([1, 0, 1, 0]), groups=("a", "a", "b", "b"))
    got = ["True", "perhaps", "", "False"]
    assert evaluate("multirc", got, rows) == evaluate("multirc", [1, 1, 0, 0], rows)
    # Of three labels: an answer that is none is in no label's count, but missing from one's.
    cb = evaluate("cb", ["neutral", "?", "entailment"], rows_of(np.array([2, 2, 0])))
    assert cb == pytest.approx({"f1_macro": 100 * (2 / 3 + 1) / 2, "accuracy": 200 / 3})


def test_written_similarities():
    rows = rows_of(np.array([1.0, 2.0, 3.0, 5.0]))
    got = ["2.0", " 3.14 ", "nan", "much"]
    assert evaluate("stsb", got, rows) == evaluate("stsb", [2.0, 3.14, -1, -1], rows)


@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_is_always_right(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torn lines
        rows = load_task(name, data_dir=write(tmp_path, RELEASED[name][0]))
    result = evaluate(name, rows.target_texts, rows)
    assert tuple(result) == TASKS[name].metrics
    if TASKS[name].kind != "generation":
        assert list(result.values()) == pytest.approx([100] * len(result))


@pytest.mark.parametrize(
    ("name", "predictions", "error", "message"),
    [
        ("sst2", [1], ValueError, r"predictions: got 1, wanted 2, one for each row$"),
        ("sst2", [1, 2], ValueError, r"predictions: got the label 2, wanted 0 to 1$"),
        ("sst2", [-1, 0], ValueError, r"predictions: got the label -1, wanted 0 to 1$"),
        ("sst2", [0.3, 0.7], TypeError, r"predictions: got float64 \[2\], wanted labels \[N\], or texts$"),
        ("sst2", [[0, 1], [1, 0]], TypeError, r"predictions: got int64 \[2, 2\], wanted labels \[N\], or texts$"),
        ("sst2", ["positive", 1], TypeError, r"predictions: got <U\d+ \[2\], wanted labels"),
        ("stsb", [1.0, math.nan], ValueError, r"predictions: got nan, wanted finite numbers$"),
        ("stsb", [[1.0], [2.0]], TypeError, r"predictions: got float64 \[2, 1\], wanted numbers \[N\], or texts$"),
        ("record", [0, 1], TypeError, r"predictions: got 0, wanted texts$"),
        ("wmt_en_de", ["a", 1], TypeError, r"predictions: got .*, wanted texts$"),
        ("sst3", [0, 1], ValueError, r"task: got 'sst3', wanted one of"),
    ],
)
def test_other_predictions_are_refused(name, predictions, error, message):
    targets = (("a",), ("b",)) if name in ("record", "wmt_en_de") else np.array([0, 1])
    with pytest.raises(error, match=message):
        evaluate(name, predictions, rows_of(targets))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows: got none, wanted at least one"):
        evaluate("sst2", [], rows_of(np.array([])))


@pytest.mark.parametrize("module", ["sklearn.metrics", "scipy.stats", "sacrebleu.metrics"])
def test_without_the_libraries_the_extra_is_named(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    name, targets = {
        "sklearn.metrics": ("sst2", np.array([0, 1])),
        "scipy.stats": ("stsb", np.array([1.0, 2.0])),
        "sacrebleu.metrics": ("wmt_en_de", (("a",), ("b",))),
    }[module]
    predictions = ["a", "b"] if name == "wmt_en_de" else [0, 1]
    with pytest.raises(ImportError, match=rf"needs {module.split('.')[0]}: pip install 'elang\[eval\]'$"):
        evaluate(name, predictions, rows_of(targets))


def test_every_official_metric_is_there():
    for task in TASKS.values():
        assert set(task.metrics) <= set(METRICS[task.kind][1])


def test_published_figures_fit_their_averages():
    assert set(PUBLISHED) == {name for name, task in TASKS.items() if task.release.hub[0] == "nyu-mll/glue"} - {"stsb"}
    rows = np.array([astuple(figures) for figures in PUBLISHED.values()])
    # Both halves of MNLI count in the mean of qualities, once in that of shares and speed-ups.
    means = [*rows[:, :3].mean(axis=0), *rows[1:, 3:].mean(axis=0)]
    printed = [79.7, *astuple(PUBLISHED_AVERAGE)[1:]]
    np.testing.assert_array_less(np.abs(np.subtract(means, printed)), [0.06, 0.06, 0.06, 0.5, 0.06, 0.06])
