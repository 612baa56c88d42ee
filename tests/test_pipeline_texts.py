"""The pipeline: no text is lost on the way, whatever comes, and each answer is in its place."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_seq2seq import encoder_decoder
from tiny_pipelines import (
    BERT,
    BERT_SUPER,
    GENERATION,
    INF,
    NO_END,
    SUPER_TOKENIZER,
    SWIFT_TOKENIZER,
    T5,
    T5_SUPER,
    TEXTS,
    alone,
    energies,
    head,
    route,
    t5_before,
    text,
    tokenizer,
    upper,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from elang.pipelines import JointPipeline, pipeline
from elang.router import Router

pytestmark = pytest.mark.usefixtures("one_thread")


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
