"""The pipeline: which model answers each text, and in which words."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from test_seq2seq import encoder_decoder
from tiny_pipelines import (
    BERT,
    BERT_SUPER,
    BERT_TOKENIZER,
    GENERATION,
    INF,
    PAIRS,
    SEEDS,
    SUPER_TOKENIZER,
    SWIFT_TOKENIZER,
    T5,
    T5_SUPER,
    TEXTS,
    TOKENS,
    alone,
    classifier,
    energies,
    head,
    probabilities,
    route,
    shapes,
    t5_before,
    tokenizer,
    upper,
)

from elang.calibration import GateCosts, calibrate, calibrate_gates
from elang.fingerprint import fingerprint
from elang.late import LateRouter, late_scores
from elang.pipelines import TASKS, pipeline
from elang.router import Router

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_each_task_has_its_key():
    for task, key in TASKS.items():
        assert next(iter(t5_before(upper, task=task)(TEXTS[0]))) == key


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


# ---- a pipeline as Super


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
