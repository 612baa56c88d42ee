"""The official metrics of the tasks, all in percent, by scikit-learn, scipy and sacrebleu (extra `eval`)."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from elang.evaluation.loaders import eval_library
from elang.evaluation.rows import Rows
from elang.evaluation.tasks import Kind, Task, get_task

Predictions = Sequence[Any] | NDArray[Any]
# Predictions as metrics read them: labels [N] int64 (-1: none), similarities [N] float64, or texts [N] (objects).
Values = NDArray[Any]
Metric = Callable[[Any, Rows], float]  # of values


def evaluate(task: str | Task, predictions: Predictions, rows: Rows) -> dict[str, float]:
    """The task's official metrics by name, in percent: correlations from -100 to 100, all others from 0 to 100.

    - `accuracy`, `matthews_correlation`, `pearson`, `spearman`
    - `f1`: of label 1; of ReCoRD the F1 of words, with the right answer that is closest
    - `f1_macro`: the mean over those labels that occur (CB)
    - `f1_a`: the F1 over all answers (MultiRC)
    - `exact_match`: the share of ReCoRD's queries answered rightly; of MultiRC's questions with every answer right
    - `bleu`, as sacrebleu has it by default, and `bleu_intl`, tokenised as in T5's paper

    What is undefined is 0: F1 of a label that neither targets nor predictions have, Matthews correlation where either
    has one label only, Pearson and Spearman where either is constant.

    Args:
        task: its name, or the task.
        predictions: for each row of `rows`, in their order, a label [N] as an integer or a similarity [N] (STS-B), or
            what a text-to-text model wrote, as ReCoRD and WMT have to have it. As in T5's evaluation a text that names
            no label is wrong, which with two labels means the other one; one that is no number is -1 (STS-B).

    Raises:
        ValueError: no rows; another number of predictions; a label that the task does not have; no finite number.
        TypeError: predictions of another kind.
        ImportError: the extra `eval` is not installed.
    """
    task = get_task(task) if isinstance(task, str) else task
    return judge(task, read_predictions(task, predictions, rows), rows)


def read_predictions(task: Task, predictions: Predictions, rows: Rows) -> Values:
    """What `evaluate` takes, as its metrics read it; refuses what `evaluate` does."""
    if not len(rows):
        raise ValueError("rows: got none, wanted at least one")
    if len(predictions) != len(rows):
        raise ValueError(f"predictions: got {len(predictions)}, wanted {len(rows)}, one for each row")
    return METRICS[task.kind][0](task, predictions, rows)


def judge(task: Task, values: Values, rows: Rows) -> dict[str, float]:
    """`evaluate`, of predictions that are read."""
    return {name: METRICS[task.kind][1][name](values, rows) for name in task.metrics}


def right(task: Task, values: Values, rows: Rows) -> NDArray[np.bool_] | None:
    """Whether each answer is right, [N]; None where the task judges no row by itself: translations, similarities."""
    if task.kind == "span":
        pairs = zip(values, _references(rows), strict=True)
        return np.array([normalised(text) in map(normalised, answers) for text, answers in pairs])
    return None if task.kind in ("regression", "generation") else values == np.asarray(rows.targets)


class Bleu(NamedTuple):
    score: float  # percent
    signature: str  # what sacrebleu computed, for a report


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: str = "13a") -> Bleu:
    """Corpus BLEU by sacrebleu.

    Args:
        predictions: N translations.
        references: of each row its translations, as many for every row.
        tokenize: "13a", the default of sacrebleu and WMT, or "intl", T5's.
    """
    metric = eval_library("sacrebleu.metrics", "bleu").BLEU(tokenize=tokenize)
    score = metric.corpus_score(list(predictions), [list(column) for column in zip(*references, strict=True)])
    return Bleu(float(score.score), str(metric.get_signature()))


def normalised(answer: str) -> str:
    """The answer without case, punctuation, articles and extra spaces, as SQuAD and ReCoRD compare answers."""
    plain = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def token_f1(prediction: str, reference: str) -> float:
    """F1, in [0, 1], of the words of two normalised answers, each counted as often as it occurs."""
    got, wanted = (Counter(normalised(answer).split()) for answer in (prediction, reference))
    return 2 * (got & wanted).total() / ((got + wanted).total() or 1)


def _are_texts(predictions: Predictions) -> bool:
    return all(isinstance(prediction, str) for prediction in predictions)


def _labels(task: Task, predictions: Predictions, rows: Rows) -> NDArray[np.int64]:
    if _are_texts(predictions):
        labels = np.array([task.label(*row) for row in zip(predictions, rows.candidates, strict=True)])
        return np.where(labels < 0, 1 - np.asarray(rows.targets), labels) if len(task.labels) == 2 else labels
    labels = np.asarray(predictions)
    if labels.dtype.kind not in "biu" or labels.ndim != 1:
        raise TypeError(f"predictions: got {labels.dtype} {list(labels.shape)}, wanted labels [N], or texts")
    unknown = labels[(labels < 0) | (labels >= len(task.labels))]
    if unknown.size:
        raise ValueError(f"predictions: got the label {unknown[0]}, wanted 0 to {len(task.labels) - 1}")
    return labels.astype(np.int64)


def _scores(task: Task, predictions: Predictions, rows: Rows) -> NDArray[np.float64]:
    if _are_texts(predictions):
        return np.array([_number(text) for text in predictions])
    scores = np.asarray(predictions)
    if scores.dtype.kind not in "fiu" or scores.ndim != 1:
        raise TypeError(f"predictions: got {scores.dtype} {list(scores.shape)}, wanted numbers [N], or texts")
    if not np.isfinite(scores).all():
        raise ValueError(f"predictions: got {scores[~np.isfinite(scores)][0]}, wanted finite numbers")
    return scores.astype(np.float64)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def _texts(task: Task, predictions: Predictions, rows: Rows) -> Values:
    if not _are_texts(predictions):
        raise TypeError(f"predictions: got {predictions[0]!r}, wanted texts")
    return np.array(predictions, dtype=object)


def _sklearn(name: str, **options: Any) -> Metric:
    def metric(labels: NDArray[np.int64], rows: Rows) -> float:
        return 100 * float(getattr(eval_library("sklearn.metrics", "evaluate"), name)(rows.targets, labels, **options))

    return metric


def _f1_macro(labels: NDArray[np.int64], rows: Rows) -> float:
    """-1, an answer that is no label, is none to average over."""
    occurring = np.union1d(np.asarray(rows.targets), labels[labels >= 0])
    return _sklearn("f1_score", labels=occurring, average="macro", zero_division=0)(labels, rows)


def _matthews(labels: NDArray[np.int64], rows: Rows) -> float:
    constant = np.ptp(labels) == 0 or np.ptp(np.asarray(rows.targets)) == 0
    return 0.0 if constant else _sklearn("matthews_corrcoef")(labels, rows)


def _whole_groups(labels: NDArray[np.int64], rows: Rows) -> float:
    _, group = np.unique(rows.groups, return_inverse=True)
    return 100 * float(np.mean(np.bincount(group, labels != rows.targets) == 0))


def _correlation(name: str) -> Metric:
    def metric(scores: NDArray[np.float64], rows: Rows) -> float:
        if np.ptp(scores) == 0 or np.ptp(np.asarray(rows.targets)) == 0:
            return 0.0
        return 100 * float(getattr(eval_library("scipy.stats", "evaluate"), name)(rows.targets, scores).statistic)

    return metric


def _best(compare: Callable[[str, str], float]) -> Metric:
    """The mean over rows of the comparison with whichever right answer is closest."""

    def metric(texts: Values, rows: Rows) -> float:
        pairs = zip(texts, _references(rows), strict=True)
        return 100 * float(np.mean([max(compare(text, answer) for answer in answers) for text, answers in pairs]))

    return metric


def _bleu(tokenize: str) -> Metric:
    return lambda texts, rows: bleu(texts, _references(rows), tokenize).score


def _references(rows: Rows) -> tuple[tuple[str, ...], ...]:
    return cast("tuple[tuple[str, ...], ...]", rows.targets)


_LABEL_METRICS = {
    "accuracy": _sklearn("accuracy_score"),
    "f1": _sklearn("f1_score", zero_division=0),
    "f1_macro": _f1_macro,
    "matthews_correlation": _matthews,
    "f1_a": _sklearn("f1_score", zero_division=0),
    "exact_match": _whole_groups,
}

# For each kind of task: how predictions are read, and every metric by name.
METRICS: Mapping[Kind, tuple[Callable[[Task, Predictions, Rows], Values], Mapping[str, Metric]]] = {
    "classification": (_labels, _LABEL_METRICS),
    "multiple_choice": (_labels, _LABEL_METRICS),
    "regression": (_scores, {"pearson": _correlation("pearsonr"), "spearman": _correlation("spearmanr")}),
    "span": (_texts, {"f1": _best(token_f1), "exact_match": _best(lambda a, b: normalised(a) == normalised(b))}),
    "generation": (_texts, {"bleu": _bleu("13a"), "bleu_intl": _bleu("intl")}),
}
