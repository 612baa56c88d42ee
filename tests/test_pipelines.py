"""The pipeline: which model answers each text, in which words, and that no text is lost on the way."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_seq2seq import encoder_decoder, late_by_hand
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, GenerationConfig, PreTrainedTokenizerFast

from elang.calibration import GateCosts, calibrate, calibrate_gates
from elang.energy_head import EnergyHead
from elang.fingerprint import fingerprint
from elang.late import LateRouter, late_scores
from elang.pipelines import TASKS, JointPipeline, pipeline
from elang.router import Router

pytestmark = pytest.mark.usefixtures("one_thread")

INF = math.inf
COMMON = [f"w{i}" for i in range(20)]
GENERATION = {"greedy": {}, "beam": {"num_beams": 3}}
TOKENS = ("input_ids", "attention_mask")
# Another family and another vocabulary than Swift's.
PAIRS = [("T5", "Bart"), ("Bart", "Marian"), ("Marian", "T5")]
SEEDS = {"T5": (4, 7), "Bart": (23, 24), "Marian": (3, 14)}  # of models that answer one text unlike another


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(COMMON, k=words))


TEXTS = [text(words, seed) for seed, words in enumerate((9, 3, 5, 1, 7, 2))]


class OneThreadAtATime(PreTrainedTokenizerFast):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.alone():
            return super().__call__(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        with self.alone():
            return super().batch_decode(*args, **kwargs)

    @contextmanager
    def alone(self) -> Iterator[None]:
        lock = self.__dict__.setdefault("lock", threading.Lock())
        assert lock.acquire(blocking=False), "two threads use one tokenizer"
        time.sleep(0.001)  # for the others to come
        try:
            yield
        finally:
            lock.release()


def tokenizer(
    own: str, seed: int, size: int = 40, end: bool = True, limit: int | None = None, kind: Any = PreTrainedTokenizerFast
) -> Any:
    """Words of its own beside the common ones, each at another place than elsewhere, and "</s>" behind each text.

    Its own words begin with a space, so that a text may too.
    """
    words = [*COMMON, *(f" {own}{i}" for i in range(size - 3 - len(COMMON)))]
    random.Random(seed).shuffle(words)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return kind(tokenizer_object=backend, model_max_length=limit, **special)


def classifier(*labels: str, seed: int = 0, **config: Any) -> Any:
    model = tiny_models.classifier("Bert", seed, num_labels=len(labels), **config)
    model.config.id2label, model.config.label2id = dict(enumerate(labels)), {y: i for i, y in enumerate(labels)}
    return model


SWIFT_TOKENIZER, SUPER_TOKENIZER, BERT_TOKENIZER = tokenizer("s", 0), tokenizer("S", 1), tokenizer("b", 2, size=64)
T5, T5_SUPER = encoder_decoder("T5", SEEDS["T5"][0]), encoder_decoder("T5", SEEDS["T5"][1], width=24, layers=2)
NO_END = tokenizer("s", 0, end=False)
BERT, BERT_SUPER = classifier("no", "yes", "maybe", seed=2), classifier("-", "+")


def head(outputs: int = 5) -> EnergyHead:
    torch.manual_seed(5)
    return EnergyHead(16, outputs)


def t5_before(super_: Any, threshold: float = 0.0, task: str = "translation", **options: Any) -> JointPipeline:
    gates = {"head": head(), "router": Router(threshold=threshold), "swift": (T5, SWIFT_TOKENIZER)}
    return pipeline(task, **{**gates, "super": super_, **options})


def upper(texts: list[str]) -> list[str]:
    return [t.upper() for t in texts]


def alone(model: Any, own: Any, texts: list[str], rows: list[int] | None = None, **options: Any) -> list[str]:
    """What a model writes, given these rows of a batch of texts."""
    batch = own(texts, padding=True, return_tensors="pt")
    part = {name: batch[name][list(range(len(texts))) if rows is None else rows] for name in TOKENS}
    return own.batch_decode(model.generate(**part, **options), skip_special_tokens=True)


def probabilities(model: Any, own: Any, texts: list[str], rows: list[int] | None = None, **options: Any) -> Any:
    """The geometric mean of the tokens' probabilities of what `alone` returns, by a teacher-forced pass."""
    batch = own(texts, padding=True, return_tensors="pt")
    part = {name: batch[name][list(range(len(texts))) if rows is None else rows] for name in TOKENS}
    each = []
    for i, sequence in enumerate(model.generate(**part, **options)):
        one = {name: values[i : i + 1] for name, values in part.items()}
        each.append(math.exp(late_by_hand(model, one, sequence)["mean_log_prob"]))
    return pytest.approx(each, rel=1e-3)


def energies(p: JointPipeline, texts: list[str] = TEXTS) -> list[float]:
    return [answer["energy"] for answer in p(texts)]


def route(p: JointPipeline, energy: list[float], routed: int) -> list[int]:
    """Moves the threshold so that so many texts of these energies are routed; their places."""
    edges = [-INF, *sorted(energy), INF]
    p.router.set_threshold(sum(edges[routed : routed + 2]) / 2)
    return sorted(sorted(range(len(energy)), key=energy.__getitem__)[:routed])


@contextmanager
def shapes(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """Of the inputs that the model's encoder gets meanwhile."""
    seen: list[tuple[int, ...]] = []
    hook = model.get_encoder().register_forward_hook(
        lambda m, a, k, o: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    hook.remove()


# ---- generated text


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize(("family", "super_family"), PAIRS)
def test_each_text_is_answered_by_one_model_in_its_own_words(family, super_family, how):
    options = GENERATION[how]
    swift = encoder_decoder(family, SEEDS[family][0])
    super_ = encoder_decoder(super_family, SEEDS[super_family][1], width=24, layers=2)
    weights = fingerprint(swift), fingerprint(super_)
    gate = head()
    p = pipeline(
        "summarization",
        swift=(swift, SWIFT_TOKENIZER),
        super=(super_, SUPER_TOKENIZER),
        head=gate,
        router=Router(threshold=0.0),
        **options,
    )
    batch = SWIFT_TOKENIZER(TEXTS, padding=True, return_tensors="pt")
    batch = {name: batch[name] for name in TOKENS}
    with torch.no_grad():
        states, mask = swift.get_encoder()(**batch).last_hidden_state, batch["attention_mask"]
        energy = gate.output((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).logsumexp(-1)
    seen, measured = set(), energies(p)
    assert measured == pytest.approx(energy.tolist(), abs=1e-5)
    for routed in range(7):
        rows = route(p, measured, routed)
        kept = [i for i in range(6) if i not in rows]
        answers = p(TEXTS)
        seen |= {answer["summary_text"] for answer in answers}
        assert [answer["energy"] for answer in answers] == measured
        assert [i for i in range(6) if answers[i]["model"] == "super"] == rows
        assert {tuple(answer) for answer in answers} == {("summary_text", "model", "score", "energy")}
        if kept:
            want = alone(swift, SWIFT_TOKENIZER, TEXTS, kept, **options)
            assert [answers[i]["summary_text"] for i in kept] == want
            assert [answers[i]["score"] for i in kept] == probabilities(swift, SWIFT_TOKENIZER, TEXTS, kept, **options)
        if rows:
            want = alone(super_, SUPER_TOKENIZER, [TEXTS[i] for i in rows], **options)
            assert [answers[i]["summary_text"] for i in rows] == want
            routed_texts = [TEXTS[i] for i in rows]
            assert [answers[i]["score"] for i in rows] == probabilities(
                super_, SUPER_TOKENIZER, routed_texts, **options
            )
    assert len(seen) >= 8
    assert (fingerprint(swift), fingerprint(super_)) == weights


def test_super_sees_the_routed_texts_of_a_batch_in_one_call():
    p = t5_before((T5_SUPER, SUPER_TOKENIZER), batch_size=4)
    texts = TEXTS * 2
    rows = route(p, energies(p, TEXTS[:4]), 2)
    with shapes(T5) as swift_saw, shapes(T5_SUPER) as super_saw:
        answers = p(texts)
    batches = [range(begin, begin + 4) for begin in (0, 4, 8)]
    assert swift_saw == [(4, 1 + max(len(texts[i].split()) for i in batch)) for batch in batches]
    routed = [[i for i in batch if answers[i]["model"] == "super"] for batch in batches]
    assert routed[0] == rows
    want = [(len(part), 1 + max(len(texts[i].split()) for i in part)) for part in routed if part]
    assert super_saw == want


def test_each_model_generates_by_its_own_config_under_what_is_passed():
    swift, super_ = encoder_decoder("T5", 0), encoder_decoder("T5", 1)
    for model, new in ((swift, 2), (super_, 5)):
        model.generation_config.max_new_tokens = model.generation_config.min_new_tokens = new
    gates = {"head": head(), "swift": (swift, SWIFT_TOKENIZER), "super": (super_, SUPER_TOKENIZER)}
    for threshold, model, own, new in ((-INF, swift, SWIFT_TOKENIZER, 2), (INF, super_, SUPER_TOKENIZER, 5)):
        for options in ({}, {"max_new_tokens": 7, "min_new_tokens": 7}):
            p = pipeline("translation", router=Router(threshold=threshold), **gates, **options)
            with torch.no_grad():
                sequences = model.generate(own(TEXTS[0], return_tensors="pt")["input_ids"], **options)
            assert sequences.shape[1] == 1 + options.get("max_new_tokens", new)
            assert p(TEXTS[0])["translation_text"] == own.decode(sequences[0], skip_special_tokens=True)


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("both", [True, False])
def test_a_late_router_routes_what_was_written_without_conviction(both, how):
    options = GENERATION[how]
    batch = SWIFT_TOKENIZER(TEXTS, padding=True, return_tensors="pt")
    batch = {name: batch[name] for name in TOKENS}
    output = T5.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
    log_prob = late_scores(output, 1)["mean_log_prob"].tolist()
    first = t5_before(upper)
    early_energy = energies(first)
    early = route(first, early_energy, 2) if both else []
    left = sorted((i for i in range(6) if i not in early), key=log_prob.__getitem__)
    for more in range(len(left) + 1):
        edges = [-INF, *(log_prob[i] for i in left), INF]
        late = LateRouter(threshold=sum(edges[more : more + 2]) / 2)
        gates = {"head": head(), "router": first.router} if both else {"head": None, "router": None}
        p = t5_before(upper, late=late, **gates, **options)
        answers = p(TEXTS)
        kept = sorted(left[more:])
        assert [i for i in range(6) if answers[i]["model"] == "swift"] == kept
        assert [answers[i]["score"] for i in kept] == pytest.approx([math.exp(log_prob[i]) for i in kept], rel=1e-4)
        assert all(a["score"] is None and a["translation_text"].isupper() for a in answers if a["model"] == "super")
        want = SWIFT_TOKENIZER.batch_decode(output.sequences[kept], skip_special_tokens=True) if kept else []
        assert [answers[i]["translation_text"] for i in kept] == want
        energy = early_energy if both else log_prob
        assert [answer["energy"] for answer in answers] == pytest.approx(energy, rel=1e-4)
    other = LateRouter("sum_log_prob", threshold=-INF)
    answers = t5_before(upper, head=None, router=None, late=other, **options)(TEXTS)
    assert [answer["score"] for answer in answers] == pytest.approx([math.exp(p) for p in log_prob], rel=1e-4)
    assert answers[0]["energy"] == pytest.approx(late_scores(output, 1)["sum_log_prob"][0].item(), rel=1e-4)


def test_gates_are_what_calibrate_gates_chose(tmp_path):
    rng, costs = np.random.default_rng(0), GateCosts(rows=1, encode=1, decode={1: 1}, super={1: 9})
    score = rng.normal(size=(2, 500)).astype("f4")
    swift = rng.random(500) < 1 / (1 + np.exp(-2 * score.sum(axis=0)))
    early, late, target = {"head": score[0]}, {"min_log_prob": score[1]}, {"max_drop": 0.02}
    both = calibrate_gates(early, late, swift, np.ones(500), costs, **target)
    assert (both.early, both.late) == ("head", "min_log_prob")
    both.save(tmp_path / "gates.json")
    for source in (both, tmp_path / "gates.json", str(tmp_path / "gates.json")):
        for outputs, name in ((5, "energy"), (1, "logit")):
            p = t5_before(upper, router=None, head=head(outputs), gates=source)
            assert (p.router.score, p.router.threshold.item()) == (name, both.early_threshold)
            assert (p.late.score, p.late.threshold.item()) == ("min_log_prob", both.late_threshold)
    first = calibrate_gates(early, {}, swift, np.ones(500), costs, **target)
    assert t5_before(upper, router=None, gates=first).late is None
    second = calibrate_gates({}, late, swift, np.ones(500), costs, **target)
    assert t5_before(upper, router=None, head=None, gates=second).router is None
    with pytest.raises(ValueError, match="gates: got them beside a router"):
        t5_before(upper, gates=both)
    with pytest.raises(ValueError, match="head: got none for these gates, wanted the one they were chosen with"):
        t5_before(upper, router=None, head=None, gates=first)
    with pytest.raises(ValueError, match="head: got one for these gates, wanted none"):
        t5_before(upper, router=None, gates=second)


# ---- labels


@pytest.mark.parametrize("super_is", ["BERT", "T5"])
@pytest.mark.parametrize("swift_is", ["BERT", "T5"])
def test_classifiers_and_encoder_decoders_answer_for_one_another(swift_is, super_is):
    gates = {"router": Router(threshold=0.0), **({"head": head()} if swift_is == "T5" else {})}
    swift = (BERT, BERT_TOKENIZER) if swift_is == "BERT" else (T5, SWIFT_TOKENIZER)
    super_ = (BERT_SUPER, SWIFT_TOKENIZER) if super_is == "BERT" else (T5_SUPER, SUPER_TOKENIZER)
    options = {} if swift_is == super_is == "BERT" else {"max_new_tokens": 3}
    p = pipeline("text-classification", swift=swift, super=super_, **gates, **options)

    def answers_of(model: Any, own: Any, texts: list[str], rows: list[int]) -> list[tuple[str, Any]]:
        if hasattr(model, "generate"):
            written = alone(model, own, texts, rows, **options)
            each = probabilities(model, own, texts, rows, **options).expected
            return [(words.strip(), pytest.approx(p, rel=1e-3)) for words, p in zip(written, each, strict=True)]
        with torch.no_grad():
            logits = model(**own(texts, padding=True, return_tensors="pt")).logits[rows].double()
        return [
            (model.config.id2label[int(row.argmax())], pytest.approx(row.softmax(-1).max().item(), abs=1e-5))
            for row in logits
        ]

    measured = energies(p)
    for routed in range(7):
        rows = route(p, measured, routed)
        kept = [i for i in range(6) if i not in rows]
        answers = p(TEXTS)
        assert [i for i in range(6) if answers[i]["model"] == "super"] == rows
        got = [(answer["label"], answer["score"]) for answer in answers]
        if kept:
            assert [got[i] for i in kept] == answers_of(*swift, TEXTS, kept)
        if rows:
            routed_texts = [TEXTS[i] for i in rows]
            assert [got[i] for i in rows] == answers_of(*super_, routed_texts, list(range(routed)))
    if swift_is == "BERT":
        with torch.no_grad():
            want = BERT(**BERT_TOKENIZER(TEXTS, padding=True, return_tensors="pt")).logits.logsumexp(-1)
        assert [answer["energy"] for answer in answers] == pytest.approx(want.tolist(), abs=1e-5)


def test_a_label_is_what_was_written_without_the_space_around_it():
    written = [answer["translation_text"] for answer in t5_before(upper, -INF)(TEXTS)]
    assert any(words != words.strip() for words in written)
    labels = [answer["label"] for answer in t5_before(upper, -INF, "text-classification")(TEXTS)]
    assert labels == [words.strip() for words in written]


def test_a_head_that_cannot_be_taken_over_decides_by_its_logits():
    swift = classifier("no", "yes", "maybe")
    swift.classifier.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    p = pipeline("text-classification", swift=(swift, BERT_TOKENIZER), super=upper, router=Router(threshold=-INF))
    with torch.no_grad():
        want = swift(**BERT_TOKENIZER(TEXTS, padding=True, return_tensors="pt")).logits.logsumexp(-1)
    assert [answer["energy"] for answer in p(TEXTS)] == pytest.approx(want.tolist(), abs=1e-5)


# ---- a function as Super


def test_a_function_gets_the_routed_texts_and_no_others():
    asked: list[list[str]] = []

    def super_(texts: list[str]) -> list[str]:
        asked.append(texts)
        return upper(texts)

    p = t5_before(super_)
    measured = energies(p)
    for routed in range(7):
        rows = route(p, measured, routed)
        asked.clear()
        answers = p(TEXTS)
        assert asked == ([[TEXTS[i] for i in rows]] if rows else [])
        assert [answers[i]["translation_text"] for i in rows] == [TEXTS[i].upper() for i in rows]
        assert all(answers[i]["score"] is None and answers[i]["model"] == "super" for i in rows)


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        (["A"], ValueError, "super: got 1 answers of the function, wanted 6, one for each text"),
        (["A"] * 7, ValueError, "super: got 7 answers of the function, wanted 6"),
        ([*"ABCDE", 6], TypeError, r"super: got \['A', .*6\] of the function, wanted a list of str"),
        ("ABCDEF", TypeError, "super: got 'ABCDEF' of the function, wanted a list of str"),
        (None, TypeError, "super: got None of the function, wanted a list of str"),
    ],
)
def test_a_function_that_does_not_answer_each_text_is_refused(answers, error, message):
    p = t5_before(lambda texts: answers, INF)
    with pytest.raises(error, match=message):
        p(TEXTS)
    assert p.stats.rows == 0


# ---- what comes in, and in which order it goes out


def test_a_text_a_list_and_a_generator_give_a_dict_a_list_and_a_generator():
    p = t5_before((T5_SUPER, SUPER_TOKENIZER), batch_size=2)
    route(p, energies(p), 3)
    answers = p(TEXTS)
    assert isinstance(answers, list)
    assert p(tuple(TEXTS)) == p(np.array(TEXTS)) == answers
    assert p([]) == []
    assert list(p(iter([]))) == []
    assert p(TEXTS[0])["translation_text"] == answers[0]["translation_text"]
    drawn = 0

    def texts() -> Iterator[str]:
        nonlocal drawn
        for one in TEXTS:
            drawn += 1
            yield one

    lazily = p(texts())
    assert drawn == 0
    for i, want in enumerate(answers):
        assert next(lazily) == want
        assert drawn == 2 * (i // 2 + 1)
    with pytest.raises(StopIteration):
        next(lazily)
    endless = p(TEXTS[0] for _ in iter(int, 1))
    assert next(endless)["translation_text"] == answers[0]["translation_text"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", "b", 3], r"texts\[2\]: got int, wanted a str"),
        (["a", None], r"texts\[1\]: got NoneType, wanted a str"),
        ([["a"]], r"texts\[0\]: got list, wanted a str"),
        (b"a", r"texts\[0\]: got int, wanted a str"),
        ({"text": "a"}, "texts: got dict, wanted a str or an iterable of them"),
        (7, "texts: got int, wanted a str or an iterable of them"),
    ],
)
def test_what_is_no_text_is_refused_before_anything_is_answered(texts, message):
    p = t5_before(upper, batch_size=1)
    with pytest.raises(TypeError, match=message):
        p(texts)
    assert p.stats.rows == 0


def test_what_is_no_text_ends_a_generator_where_it_comes():
    answers = t5_before(upper, batch_size=2)(iter(["a", "b", "c", 4, "e"]))
    next(answers), next(answers)
    with pytest.raises(TypeError, match=r"texts\[3\]: got int, wanted a str"):
        next(answers)


def test_a_list_has_a_progress_bar(monkeypatch):
    reports: list[Any] = []

    @contextmanager
    def bar(title: str) -> Iterator[Any]:
        reports.append(title)
        yield lambda done, total: reports.append((done, total))

    monkeypatch.setattr(sys.modules[JointPipeline.__module__], "bar", bar)
    t5_before(upper)(TEXTS[:3])
    assert reports == ["translation", (1, 3), (2, 3), (3, 3)]


@settings(max_examples=20, deadline=None)
@given(
    texts=st.lists(st.integers(0, 4).map(lambda words: text(words, words)), max_size=7),
    threshold=st.sampled_from([-INF, 1.5, 2.0, 2.3, INF]),
    batch_size=st.integers(1, 4),
)
def test_every_text_has_one_answer_in_its_place(texts, threshold, batch_size):
    p = t5_before(upper, threshold, swift=(T5, NO_END), batch_size=batch_size)
    answers = p(texts)
    assert len(answers) == len(texts)
    for one, answer in zip(texts, answers, strict=True):
        assert math.isnan(answer["energy"]) == (one == "")
        routed = not answer["energy"] >= np.float32(threshold)
        assert answer["model"] == ("super" if routed else "swift")
        assert (answer["translation_text"] == one.upper()) == routed
    assert (p.stats.rows, p.stats.routed) == (len(texts), sum(answer["model"] == "super" for answer in answers))


# ---- empty and over-long texts


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("texts", [["", "", ""], ["", TEXTS[0], " ", TEXTS[1]], [""]])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_a_text_without_a_token_has_its_answer(family, end, texts, how):
    swift, super_ = encoder_decoder(family, 0), encoder_decoder(family, 1)
    own, super_own = tokenizer("s", 0, end=end), tokenizer("S", 1, end=end)
    for threshold in (-INF, INF):
        p = pipeline(
            "translation",
            swift=(swift, own),
            super=(super_, super_own),
            head=head(),
            router=Router(threshold=threshold),
            **GENERATION[how],
        )
        answers = p(texts)
        assert len(answers) == len(texts)
        for one, answer in zip(texts, answers, strict=True):
            empty = not end and not one.strip()
            assert math.isnan(answer["energy"]) == empty
            assert answer["model"] == ("super" if empty or threshold == INF else "swift")
            assert isinstance(answer["translation_text"], str)


def test_a_classifier_answers_a_text_without_a_token():
    own = tokenizer("b", 2, size=64, end=False)
    for threshold, model in ((-INF, "swift"), (INF, "super")):
        p = pipeline(
            "text-classification", swift=(BERT, own), super=(BERT_SUPER, own), router=Router(threshold=threshold)
        )
        for texts in (["", ""], ["", TEXTS[0]]):
            assert [answer["model"] for answer in p(texts)] == [model] * 2
            assert all(0 < answer["score"] <= 1 for answer in p(texts))


def test_an_over_long_text_is_cut_for_the_model_that_takes_no_more_and_said(caplog):
    long, longer = text(30, 1), text(50, 2)
    texts = [TEXTS[0], long, TEXTS[1], longer]
    own, super_own = tokenizer("s", 0, limit=40), tokenizer("S", 1, limit=12)
    p = t5_before((T5_SUPER, super_own), INF, swift=(T5, own), batch_size=2)
    with caplog.at_level(logging.WARNING):
        answers = list(p(iter(texts)))
    assert caplog.messages == [
        "super: text 1 has 31 tokens, cut to 12",
        "swift: text 3 has 51 tokens, cut to 40",
        "super: text 3 has 51 tokens, cut to 12",
    ]
    assert {record.name for record in caplog.records} == {"elang.readers"}
    cut = [" ".join(one.split()[:11]) for one in texts]  # and "</s>"
    want = [words for i in (0, 2) for words in alone(T5_SUPER, SUPER_TOKENIZER, cut[i : i + 2])]
    assert [answer["translation_text"] for answer in answers] == want
    shorter = [" ".join(one.split()[:39]) for one in texts]
    assert [answer["energy"] for answer in answers] == [answer["energy"] for answer in p(shorter)]


def test_a_text_as_long_as_a_model_takes_is_whole(caplog):
    own, exact = tokenizer("s", 0, limit=12), text(11, 1)
    p = t5_before(upper, -INF, swift=(T5, own))
    assert p([exact, TEXTS[0]])[0]["translation_text"] == alone(T5, SWIFT_TOKENIZER, [exact, TEXTS[0]])[0]
    assert caplog.messages == []


@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "token_type_ids", "attention_mask"]])
def test_a_tokenizer_may_give_less_and_more_than_an_encoder_decoder_takes(names):
    own, super_own = tokenizer("s", 0), tokenizer("S", 1)
    own.model_input_names = super_own.model_input_names = names
    for threshold in (-INF, INF):
        want = t5_before((T5_SUPER, SUPER_TOKENIZER), threshold)(TEXTS)
        assert t5_before((T5_SUPER, super_own), threshold, swift=(T5, own))(TEXTS) == want


def test_a_model_says_how_much_it_takes_where_its_tokenizer_does_not(caplog):
    swift = encoder_decoder("Bart", 0)  # of 32 positions
    p = t5_before(upper, -INF, swift=(swift, SWIFT_TOKENIZER))
    with caplog.at_level(logging.WARNING):
        answer = p(text(50, 1))
    assert caplog.messages == ["swift: text 0 has 51 tokens, cut to 32"]
    assert answer["translation_text"] == alone(swift, SWIFT_TOKENIZER, [" ".join(text(50, 1).split()[:31])])[0]


def test_a_tokenizer_in_python_and_a_larger_vocabulary(caplog):
    own, super_ = ByT5Tokenizer(model_max_length=20), encoder_decoder("T5", 7)
    super_.resize_token_embeddings(len(own), mean_resizing=False)
    torch.nn.init.normal_(super_.get_input_embeddings().weight)
    p = t5_before((super_, own), INF)
    answers = p([*TEXTS, ""])
    cut = [one[:19] for one in [*TEXTS, ""]]  # a token is a byte; and "</s>"
    assert [answer["translation_text"] for answer in answers] == alone(super_, own, cut)
    lengths = {i: len(one) + 1 for i, one in enumerate(TEXTS) if len(one) > 19}
    assert caplog.messages == [f"super: text {i} has {length} tokens, cut to 20" for i, length in lengths.items()]
    assert 0 < len(lengths) < 6


def test_threads_give_the_answers_of_one():
    own = tokenizer("s", 0, limit=10, kind=OneThreadAtATime)
    p = t5_before((T5_SUPER, own), swift=(T5, own))
    batches = [[text(1 + (7 * i + n) % 20, i) for i in range(1 + n)] for n in range(6)]
    route(p, energies(p, batches[-1]), 3)
    one = [p(batch) for batch in batches]
    rows = p.stats.rows
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(lambda i: p(batches[i % 6]), range(48)))
    assert all(many[i] == one[i % 6] for i in range(48))
    assert p.stats.rows - rows == 8 * sum(map(len, batches))


# ---- by name


def saved(folder: Path, model: Any, own: Any) -> str:
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return str(folder)


def test_models_heads_and_calibrations_are_loaded_by_name(tmp_path):
    swift, super_ = (
        saved(tmp_path / "swift", T5, SWIFT_TOKENIZER),
        saved(tmp_path / "super", BERT_SUPER, BERT_TOKENIZER),
    )
    gate = head()
    gate.save(tmp_path / "head")
    energy = [a["energy"] for a in t5_before(upper, router=Router("margin", threshold=0.0, temperature=2.0))(TEXTS)]
    right = np.arange(6) % 2 == 0
    c = calibrate({"margin": np.float32(energy)}, right, ~right, swift_share=0.5, temperature=2.0)
    c.save(tmp_path / "calibration.json")
    task, options = "text-classification", {"max_new_tokens": 3}
    want = t5_before(
        (BERT_SUPER, BERT_TOKENIZER),
        router=Router("margin", threshold=c.threshold, temperature=2.0),
        task=task,
        **options,
    )(TEXTS)
    assert sorted(answer["model"] for answer in want) == ["super"] * 3 + ["swift"] * 3
    for source in (str, Path):
        for router in (c, source(tmp_path / "calibration.json")):
            p = pipeline(
                task,
                swift=source(swift),
                super=source(super_),
                head=source(tmp_path / "head"),
                router=router,
                device="cpu",
                **options,
            )
            assert p(TEXTS) == want
    assert not any(model.training for model in (p.swift.reader.model, p.super_.model))


@pytest.mark.parametrize("family", ["Bart", "T5"])
def test_an_encoder_decoder_with_a_classifier_s_head_is_a_classifier(tmp_path, family):
    """Its config says is_encoder_decoder all the same."""
    config = encoder_decoder(family, 0).config
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    name = saved(tmp_path / family, model, SWIFT_TOKENIZER)
    p = pipeline("text-classification", swift=name, super=(model, SWIFT_TOKENIZER), router=Router(threshold=0.0))
    with torch.no_grad():
        batch = SWIFT_TOKENIZER(TEXTS, padding=True, return_tensors="pt")
        logits = model(**{name: batch[name] for name in TOKENS}).logits
    for threshold in (-INF, INF):
        p.router.set_threshold(threshold)
        assert [answer["label"] for answer in p(TEXTS)] == [f"LABEL_{i}" for i in logits.argmax(-1).tolist()]


def test_pickled_weights_are_not_read(tmp_path):
    name = saved(tmp_path, BERT, BERT_TOKENIZER)
    weights = tmp_path / "model.safetensors"
    torch.save(BERT.state_dict(), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        pipeline("text-classification", swift=name, super=upper, router=Router(threshold=0.0))


def test_what_is_loaded_by_name_goes_where_it_is_asked_to(tmp_path):
    bert, t5 = saved(tmp_path / "bert", BERT, BERT_TOKENIZER), saved(tmp_path / "t5", T5, SWIFT_TOKENIZER)
    gates = {"head": head(), "router": Router(threshold=0.0), "late": LateRouter(threshold=0.0)}
    p = pipeline("text-classification", swift=t5, super=bert, device="meta", **gates)
    assert p.swift.reader.model.device.type == p.super_.model.device.type == "meta"
    inputs = [*p.swift.reader.inputs({0: "a"}).values(), *p.super_.inputs({0: "a"}).values()]
    tensors = (gates["head"].output.weight, p.router.threshold, p.late.threshold, *inputs)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    gate = Router(threshold=0.0)
    p = pipeline("text-classification", swift=bert, super=t5, device="cpu", super_device="meta", router=gate)
    assert (p.swift.reader.model.device.type, p.super_.model.device.type) == ("cpu", "meta")
    p = pipeline("text-classification", swift=bert, super=(T5, SWIFT_TOKENIZER), device="meta", router=gate)
    assert (p.swift.reader.model.device.type, p.super_.model.device.type) == ("meta", "cpu")
    assert gate.threshold.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("on_gpu", ["swift", "super"])
def test_either_model_may_be_on_a_gpu(on_gpu):
    where = {"swift": "cpu", "super": "cpu", on_gpu: "cuda"}
    swift, super_ = copy.deepcopy(T5).to(where["swift"]), copy.deepcopy(T5_SUPER).to(where["super"])
    want, p = (
        t5_before((T5_SUPER, SUPER_TOKENIZER)),
        t5_before((super_, SUPER_TOKENIZER), swift=(swift, SWIFT_TOKENIZER)),
    )
    assert energies(p) == pytest.approx(energies(want), abs=1e-4)
    for routed in range(7):
        rows = route(want, energies(want), routed)
        p.router.set_threshold(want.router.threshold.item())
        answers = p(TEXTS)
        assert [i for i in range(6) if answers[i]["model"] == "super"] == rows
        assert [answer["translation_text"] for answer in answers] == [a["translation_text"] for a in want(TEXTS)]


def test_the_head_takes_swift_s_dtype():
    swift = encoder_decoder("T5", 0).bfloat16()
    gate = head()
    answers = t5_before(upper, head=gate, router=Router(threshold=-INF), swift=(swift, SWIFT_TOKENIZER))(TEXTS)
    assert gate.output.weight.dtype == torch.bfloat16
    assert {answer["model"] for answer in answers} == {"swift"}


# ---- what does not go together

GATE = Router(threshold=0.0)
SWIFT, BERTS = (T5, SWIFT_TOKENIZER), (BERT, BERT_TOKENIZER)
NO_PADDING = PreTrainedTokenizerFast(tokenizer_object=SWIFT_TOKENIZER.backend_tokenizer)


@pytest.mark.parametrize(
    ("task", "change", "error", "message"),
    [
        ("translate", {}, ValueError, "task: got 'translate', wanted one of translation, summarization, text2text-gen"),
        ("translation", {"batch_size": 0}, ValueError, "batch_size: got 0, wanted a whole number >= 1"),
        ("translation", {"batch_size": 2.0}, ValueError, "batch_size: got 2.0, wanted a whole number"),
        ("translation", {"head": None}, ValueError, "head, router: got one of them, wanted both"),
        ("translation", {"head": None, "router": None}, ValueError, "head, late: got neither, wanted a head"),
        ("translation", {"router": None}, ValueError, "head, router: got one of them"),
        ("translation", {"head": EnergyHead(7, 3)}, ValueError, "head: got one for states of 7, wanted 16"),
        ("translation", {"head": torch.nn.Linear(2, 2)}, TypeError, "head: got Linear, wanted EnergyHead"),
        ("translation", {"router": 0.5}, TypeError, "router: got float, wanted a Router, a Calibration"),
        ("translation", {"late": GATE}, TypeError, "late: got Router, wanted LateRouter"),
        ("translation", {"swift": BERTS}, ValueError, "swift: got BertForSequ.*, wanted an encoder-decoder$"),
        ("summarization", {"super": BERTS}, ValueError, "super: got BertForSequ.*, wanted an encoder-decoder$"),
        ("translation", {"swift": T5}, TypeError, "swift: got T5For.*, wanted a folder or hub id, a pair"),
        ("translation", {"super": T5}, TypeError, "super: got T5For.*, wanted a folder .* or, as super, a function"),
        ("translation", {"swift": SWIFT[::-1]}, TypeError, "swift: got Tokeni.*, T5For.*, wanted a folder or hub id"),
        ("translation", {"swift": (*SWIFT, T5)}, TypeError, "swift: got T5For.*, Tokeni.*, T5For.*, wanted a folder"),
        ("translation", {"swift": upper}, TypeError, "swift: got function, wanted a folder or hub id"),
        ("translation", {"super": 3}, TypeError, "super: got int, wanted a folder"),
        ("translation", {"swift": (T5, NO_PADDING)}, ValueError, "swift: got a tokenizer without a padding token"),
        ("translation", {"super": (T5, NO_PADDING)}, ValueError, "super: got a tokenizer without a padding token"),
        ("translation", {"device": "cpu"}, ValueError, "device: got cpu for a model that is not loaded by name"),
        ("translation", {"super_device": "cpu"}, ValueError, "super_device: got cpu for a model that is not loaded"),
        ("translation", {"num_return_sequences": 2}, ValueError, "num_return_sequences: got 2 for swift, wanted 1"),
        (
            "translation",
            {"generation_config": GenerationConfig(num_return_sequences=2, num_beams=2)},
            ValueError,
            "num_return_sequences: got 2 for swift, wanted 1",
        ),
        ("translation", {"output_scores": True}, ValueError, "output_scores: got for swift, wanted none: only text"),
        ("translation", {"return_dict_in_generate": True}, ValueError, "return_dict_in_generate: got for swift"),
        ("text-classification", {"swift": BERTS}, ValueError, "got head, router, wanted the router alone"),
        (
            "text-classification",
            {"swift": BERTS, "head": None, "late": LateRouter(threshold=0.0)},
            ValueError,
            "head, router, late: got router, late, wanted the router alone for a sequence classifier",
        ),
        ("text-classification", {"swift": BERTS, "head": None, "router": None}, ValueError, "late: got none, wanted"),
        (
            "text-classification",
            {"swift": BERTS, "super": BERTS, "head": None, "max_new_tokens": 3},
            ValueError,
            "max_new_tokens: got for models that do not generate, wanted none",
        ),
        (
            "text-classification",
            {"super": (classifier("score"), BERT_TOKENIZER)},
            ValueError,
            "super: a regression head, wanted a classifier",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(task, change, error, message):
    arguments = {"swift": SWIFT, "super": upper, "head": head(), "router": GATE, **change}
    with pytest.raises(error, match=message):
        pipeline(task, **arguments)


def test_what_a_model_s_own_config_asks_for_is_refused_too():
    super_ = encoder_decoder("T5", 1)
    super_.generation_config.num_return_sequences = super_.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="num_return_sequences: got 2 for super, wanted 1"):
        t5_before((super_, SUPER_TOKENIZER))
    t5_before((super_, SUPER_TOKENIZER), num_return_sequences=1)(TEXTS)


def test_a_decoder_is_no_encoder_decoder(tmp_path):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    decoder = transformers.GPT2LMHeadModel(config).eval()
    for task, wanted in (("translation", "encoder-decoder$"), ("text-classification", "or a sequence classifier$")):
        with pytest.raises(ValueError, match=f"super: got GPT2LMHeadModel, wanted an .*{wanted}"):
            t5_before((decoder, SUPER_TOKENIZER), task=task)
    name = saved(tmp_path, decoder, SUPER_TOKENIZER)
    with pytest.raises(ValueError, match=f"super: got {name}, of the type gpt2, wanted an encoder-decoder$"):
        t5_before(name)


def test_models_in_training_mode_are_refused():
    swift, super_ = encoder_decoder("T5", 0), encoder_decoder("T5", 1)
    p = t5_before((super_, SUPER_TOKENIZER), INF, swift=(swift, SWIFT_TOKENIZER))
    for model, role in ((swift, "swift"), (super_, "super")):
        model.train()
        with pytest.raises(RuntimeError, match=f"{role}: in training mode"):
            p(TEXTS)
        model.eval()


def test_each_task_has_its_key():
    for task, key in TASKS.items():
        assert next(iter(t5_before(upper, task=task)(TEXTS[0]))) == key


def test_a_pipeline_as_super_makes_a_cascade_each_model_behind_its_own_tokenizer():
    last, own = classifier("x", "y", seed=5), tokenizer("l", 9, size=64)
    rest = pipeline(
        "text-classification",
        swift=(BERT_SUPER, SWIFT_TOKENIZER),
        super=(last, own),
        router=Router(threshold=0.0),
        batch_size=2,
    )
    p = pipeline("text-classification", swift=(BERT, BERT_TOKENIZER), super=rest, router=Router(threshold=0.0))
    first, second = energies(p), energies(rest)
    for routed, on in itertools.product((0, 3, 6), (0, 2, 6)):
        route(p, first, routed)
        route(rest, second, on)
        before = p.stats, rest.stats
        want = ["swift" if a >= p.router.threshold else "super.swift" if b >= rest.router.threshold else "super.super"
                for a, b in zip(first, second, strict=True)]  # fmt: skip
        answers = p(TEXTS)
        assert [answer["model"] for answer in answers] == want
        assert [answer["energy"] for answer in answers] == first
        pairs = {
            "swift": (BERT, BERT_TOKENIZER),
            "super.swift": (BERT_SUPER, SWIFT_TOKENIZER),
            "super.super": (last, own),
        }
        for text, answer in zip(TEXTS, answers, strict=True):
            model, its_own = pairs[answer["model"]]
            with torch.no_grad():
                probability = model(**its_own([text], return_tensors="pt")).logits[0].softmax(-1)
            assert answer["label"] == model.config.id2label[int(probability.argmax())]
            assert answer["score"] == pytest.approx(probability.max().item(), abs=1e-5)
        seen = [now.rows - then.rows for now, then in zip((p.stats, rest.stats), before, strict=True)]
        assert seen == [6, routed]
    with pytest.raises(ValueError, match="super: got a pipeline for text-classification, wanted one for translation"):
        t5_before(rest)


def test_gates_before_a_pipeline_are_of_the_last_model():
    score = np.arange(100, dtype=np.float32)
    known = {"swift_sha256": fingerprint(BERT), "super_sha256": fingerprint(BERT_SUPER)}
    c = calibrate({"energy": score}, score > 50, score > 20, swift_share=0.3, provenance=known)
    last = (BERT_SUPER, SWIFT_TOKENIZER)
    middle = (classifier("no", "yes", "maybe", seed=7), BERT_TOKENIZER)
    rest = pipeline("text-classification", swift=middle, super=last, router=Router(threshold=0.0))
    p = pipeline("text-classification", swift=(BERT, BERT_TOKENIZER), super=rest, router=c)
    assert p.router.threshold.item() == c.threshold
    other = pipeline("text-classification", swift=middle, super=middle, router=Router(threshold=0.0))
    with pytest.raises(ValueError, match="super_: got other weights"):
        pipeline("text-classification", swift=(BERT, BERT_TOKENIZER), super=other, router=c)
