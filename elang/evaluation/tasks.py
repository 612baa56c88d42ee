"""The tasks of the paper: GLUE, SuperGLUE and WMT. Each is one entry of `TASKS`; `elang.evaluation.rows` loads them.

A record has the fields that `datasets` gives it, whichever source it is from; texts are templates over its fields. What
a text-to-text model reads and writes is T5's form (Raffel et al. 2020, arXiv 1910.10683, appendix D): the fields in
alphabetical order, unless said otherwise. Of WiC the appendix has a part of speech too, which the release does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from elang.evaluation.loaders import Reader, Record, jsonl, parallel, tsv
from elang.evaluation.records import (
    STSB_CLASSES,
    flat_multirc,
    flat_record,
    flat_wsc,
    prepare_copa,
    prepare_multirc,
    prepare_record,
    prepare_wsc,
    stsb_score,
    wsc_label,
)

Kind = Literal["classification", "multiple_choice", "regression", "span", "generation"]
Files = tuple[tuple[str, ...], ...]  # alternatives: the files that are read together


@dataclass(frozen=True)
class Release:
    """Where the rows of a task are."""

    hub: tuple[str, str]  # repository and configuration of `datasets`
    splits: Mapping[str, tuple[str, Files]]  # what `datasets` calls each, and the original files
    read: Reader  # of the original files


@dataclass(frozen=True)
class Task:
    """What is asked, how it is put to a model and how the answers are judged."""

    name: str
    texts: tuple[str, ...]  # one or two, for an encoder
    source_text: str  # for a text-to-text model
    release: Release | None = None  # None: the rows are the user's own
    kind: Kind = "classification"
    metrics: tuple[str, ...] = ("accuracy",)  # the official ones: names in `elang.evaluation.metrics.METRICS[kind]`
    labels: tuple[str, ...] = ()  # in the official order
    written: tuple[Any, ...] = ()  # the labels as the original files have them, where that is not by name
    target_texts: tuple[str, ...] = ()  # the labels as a text-to-text model writes them, where that is not by name
    prepare: Callable[[Record], Record] | None = None  # derives fields that a template or a metric needs
    label_of: Callable[[str, tuple[str, ...]], int] | None = None  # from such a text, where the words alone do not tell

    def label(self, text: str, candidates: tuple[str, ...] = ()) -> int:
        """The label that a text-to-text model means by its answer, -1 if none."""
        if self.label_of is not None:
            return self.label_of(text, candidates)
        by_words = {words: i for names in (self.labels, self.target_texts) for i, words in enumerate(names)}
        return by_words.get(text.strip(), -1)


def get_task(name: str) -> Task:
    """Raises ValueError for an unknown name, with those there are."""
    if name not in TASKS:
        raise ValueError(f"task: got {name!r}, wanted one of {', '.join(TASKS)}")
    return TASKS[name]


def _fields(*names: str) -> str:
    return " ".join(f"{name}: {{{name}}}" for name in names)


def _glue(
    config: str,
    folder: str,
    columns: Mapping[str, str],
    labels: tuple[str, ...],
    *,
    label: str = "label",
    half: str = "",
    header: tuple[str, ...] = (),
    torn_lines: bool = False,
    written: tuple[str, ...] = (),
    kind: Kind = "classification",
    metrics: tuple[str, ...] = ("accuracy",),
) -> Task:
    """The texts are fields: `columns` has the column of each, `label` is that of the label; `half` is one of MNLI's."""
    return Task(
        config + half,
        texts=tuple(f"{{{field}}}" for field in columns),
        source_text=f"{config} {_fields(*sorted(columns))}",
        release=Release(
            ("nyu-mll/glue", config),
            {
                "train": ("train", ((f"{folder}/train.tsv",),)),
                "validation": (f"validation{half}", ((f"{folder}/dev{half}.tsv",),)),
            },
            tsv(**columns, label=label, header=header, torn_lines=torn_lines),
        ),
        labels=labels,
        written=written,
        kind=kind,
        metrics=metrics,
    )


def _superglue(config: str, folder: str, read: Reader | None = None) -> Release:
    splits = {
        "train": ("train", ((f"{folder}/train.jsonl",),)),
        "validation": ("validation", ((f"{folder}/val.jsonl",),)),
    }
    return Release(("aps/super_glue", config), splits, read or jsonl())


def _wmt(to: str, name: str, hub: tuple[str, str], validation: tuple[str, str], test: tuple[str, str]) -> Task:
    """Translation from English. Of each set the name as SGML, which has the pair in it, and as plain text."""

    def files(sgm: str, text: str) -> Files:
        return (f"{sgm}-src.en.sgm", f"{sgm}-ref.{to}.sgm"), (f"{text}.en", f"{text}.{to}")

    return Task(
        f"wmt_en_{to}",
        texts=("{translation[en]}",),
        source_text=f"translate English to {name}: {{translation[en]}}",
        release=Release(
            hub,
            {"validation": ("validation", files(*validation)), "test": ("test", files(*test))},
            parallel("en", to),
        ),
        kind="generation",
        metrics=("bleu", "bleu_intl"),
        prepare=lambda record: {**record, "references": (record["translation"][to],)},
    )


_DIGITS = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_FALSE_TRUE = ("False", "True")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = {"sentence1": "sentence1", "sentence2": "sentence2"}
_PREMISE = {"premise": "sentence1", "hypothesis": "sentence2"}
_SENTENCE = {"sentence": "sentence"}
_STSB = tuple(f"{stsb_score(label):.1f}" for label in range(STSB_CLASSES))

_TASKS = (
    _glue("mnli", "MNLI", _PREMISE, _NLI, label="gold_label", half="_matched"),
    _glue("mnli", "MNLI", _PREMISE, _NLI, label="gold_label", half="_mismatched"),
    _glue("qnli", "QNLI", {"question": "question", "sentence": "sentence"}, _ENTAILMENT),
    _glue("sst2", "SST-2", _SENTENCE, ("negative", "positive"), written=_DIGITS),
    _glue("rte", "RTE", _PAIR, _ENTAILMENT),
    _glue(
        "mrpc",
        "MRPC",
        {"sentence1": "#1 String", "sentence2": "#2 String"},
        ("not_equivalent", "equivalent"),
        label="Quality",
        written=_DIGITS,
        metrics=("f1", "accuracy"),
    ),
    _glue(
        "cola",
        "CoLA",
        _SENTENCE,
        ("unacceptable", "acceptable"),
        header=("source", "label", "author's label", "sentence"),
        written=_DIGITS,
        metrics=("matthews_correlation",),
    ),
    _glue(
        "qqp",
        "QQP",
        {"question1": "question1", "question2": "question2"},
        ("not_duplicate", "duplicate"),
        label="is_duplicate",
        torn_lines=True,
        written=_DIGITS,
        metrics=("f1", "accuracy"),
    ),
    _glue("stsb", "STS-B", _PAIR, _STSB, label="score", kind="regression", metrics=("pearson", "spearman")),
    Task(
        "boolq",
        texts=("{question}", "{passage}"),
        source_text=f"boolq {_fields('passage', 'question')}",
        release=_superglue("boolq", "BoolQ"),
        labels=_FALSE_TRUE,
        written=(False, True),
    ),
    Task(
        "cb",
        texts=("{premise}", "{hypothesis}"),
        source_text=f"cb {_fields('hypothesis', 'premise')}",
        release=_superglue("cb", "CB"),
        labels=("entailment", "contradiction", "neutral"),
        metrics=("f1_macro", "accuracy"),
    ),
    Task(
        "copa",
        texts=("{premise} {asked}",),
        source_text=f"copa {_fields('choice1', 'choice2', 'premise', 'question')}",
        release=_superglue("copa", "COPA"),
        kind="multiple_choice",
        labels=("choice1", "choice2"),
        written=(0, 1),
        target_texts=_FALSE_TRUE,  # in the appendix; later preprocessing of T5's has the labels by name
        prepare=prepare_copa,
    ),
    Task(
        "multirc",
        texts=("{paragraph}", "{question} {answer}"),
        source_text=f"multirc {_fields('question', 'answer', 'paragraph')}",
        release=_superglue("multirc", "MultiRC", jsonl(flat_multirc)),
        labels=_FALSE_TRUE,
        written=(0, 1),
        metrics=("f1_a", "exact_match"),
        prepare=prepare_multirc,
    ),
    Task(
        "record",
        texts=("{passage}", "{query}"),
        source_text=f"record {_fields('query', 'entities', 'passage')}",
        release=_superglue("record", "ReCoRD", jsonl(flat_record)),
        kind="span",
        metrics=("f1", "exact_match"),
        prepare=prepare_record,
    ),
    Task(
        "superglue_rte",
        texts=("{premise}", "{hypothesis}"),
        source_text=f"rte {_fields('hypothesis', 'premise')}",
        release=_superglue("rte", "RTE"),
        labels=_ENTAILMENT,
    ),
    Task(
        "wic",
        texts=("{word}: {sentence1}", "{sentence2}"),
        source_text=f"wic {_fields('sentence1', 'sentence2', 'word')}",
        release=_superglue("wic", "WiC"),
        labels=_FALSE_TRUE,
        written=(False, True),
    ),
    Task(
        "wsc",
        texts=("{text}", "{span1_text}"),
        source_text="wsc: {text}",
        release=_superglue("wsc.fixed", "WSC", jsonl(flat_wsc)),
        labels=_FALSE_TRUE,
        written=(False, True),
        target_texts=("", "{span1_text}"),
        prepare=prepare_wsc,
        label_of=wsc_label,
    ),
    _wmt(
        "de",
        "German",
        ("wmt/wmt14", "de-en"),
        validation=("dev/newstest2013", "dev/newstest2013"),
        test=("test-full/newstest2014-deen", "test-full/newstest2014"),
    ),
    _wmt(
        "fr",
        "French",
        ("wmt/wmt14", "fr-en"),
        validation=("dev/newstest2013", "dev/newstest2013"),
        test=("test-full/newstest2014-fren", "test-full/newstest2014"),
    ),
    _wmt(
        "ro",
        "Romanian",
        ("wmt/wmt16", "ro-en"),
        validation=("dev/newsdev2016-enro", "dev/newsdev2016"),
        test=("test/newstest2016-enro", "test/newstest2016"),
    ),
)
TASKS = {task.name: task for task in _TASKS}
