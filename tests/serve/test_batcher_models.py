"""A batcher over real models says what the joint model and the pipeline say of the same texts."""

from __future__ import annotations

import logging
import threading
from itertools import pairwise

import demo_models
import pytest
import tiny_models
import torch
from demo_models import TEXTS

import elang
from elang.joint import JointClassifier
from elang.router import Router
from elang.serve import Batcher, EncodedRows, TextRows, text_batcher

pytestmark = pytest.mark.usefixtures("one_thread")
LIMIT = 60.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Swift and a Super that has the labels in the other order."""
    folder = tmp_path_factory.mktemp("pair")
    return {
        "swift": demo_models.save_model(folder / "swift", seed=3, layers=1),
        "super": demo_models.save_model(folder / "super", seed=4, labels=("good", "bad")),
    }


@pytest.fixture(scope="module")
def pipeline(folders):
    """Routes half of the texts, by a threshold that is far from every score."""
    pipeline = elang.pipeline("text-classification", **folders, router=Router("margin", threshold=0.0))
    energies = sorted(answer["energy"] for answer in pipeline(TEXTS))
    gaps = [(b - a, (a + b) / 2) for a, b in pairwise(energies[30:51])]
    width, threshold = max(gaps)
    assert width > 1e-4
    pipeline.router.set_threshold(threshold)
    return pipeline


@pytest.fixture
def batcher(folders, pipeline):
    router = Router("margin", threshold=pipeline.router.threshold.item())
    with text_batcher(**folders, router=router, max_batch=16, super_batch=8) as batcher:
        yield batcher


def assert_as_pipeline(answers, said, labels):
    assert [(a.label, a.model) for a in answers] == [(s["label"], s["model"]) for s in said]
    assert [a.score for a in answers] == pytest.approx([s["energy"] for s in said], abs=1e-5)
    assert [max(a.probabilities) for a in answers] == pytest.approx([s["score"] for s in said], abs=1e-5)
    assert all(labels[a.probabilities.index(max(a.probabilities))] == a.label and not a.degraded for a in answers)


def test_the_pipelines_answers(pipeline, batcher):
    said = pipeline(TEXTS)
    assert {answer["model"] for answer in said} == {"swift", "super"}
    assert batcher.labels == ("good", "bad")
    assert_as_pipeline(batcher.submit(TEXTS).result(LIMIT), said, batcher.labels)


def test_the_pipelines_answers_to_many_threads(pipeline, batcher):
    said = dict(zip(TEXTS, pipeline(TEXTS), strict=True))
    answers = {}

    def client(first: int) -> None:
        for text in TEXTS[first::4]:
            (answers[text],) = batcher.submit([text]).result(LIMIT)

    threads = [threading.Thread(target=client, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_as_pipeline([answers[text] for text in TEXTS], said.values(), batcher.labels)


def test_the_joint_models_answers_to_encoded_rows(folders, pipeline):
    joint = pipeline_joint(pipeline)
    tokenizer = demo_models.tokenizer()
    padded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    answer = joint(**padded)
    columns = tokenizer(TEXTS)
    encoded = [{name: values[i] for name, values in columns.items()} for i in range(len(TEXTS))]
    with Batcher(joint, EncodedRows(tokenizer, joint.swift)) as batcher:
        answers = batcher.submit(encoded).result(LIMIT)
    probabilities = torch.tensor([a.probabilities for a in answers])
    torch.testing.assert_close(probabilities, answer.logits.softmax(-1), atol=1e-5, rtol=0)
    routed = answer.routing.order[: int(answer.routing.n_routed)].tolist()
    assert [i for i, a in enumerate(answers) if a.model == "super"] == routed
    assert 0 < len(routed) < len(TEXTS)


def pipeline_joint(pipeline) -> JointClassifier:
    router = Router("margin", threshold=pipeline.router.threshold.item())
    return JointClassifier(pipeline.swift.reader.model, pipeline.super_.model, router)


def test_a_batch_is_padded_to_its_longest_row(pipeline):
    joint, lengths = pipeline_joint(pipeline), []
    rows = TextRows(pipeline.super_)

    class Spy(TextRows):
        def __call__(self, texts):
            inputs = rows(texts)
            lengths.append(inputs["input_ids"].shape[1])
            return inputs

    with Batcher(joint, Spy(pipeline.super_), rows) as batcher:
        for text in ("a dull plot", "dull"):
            batcher.submit([text, "a"]).result(LIMIT)
    assert lengths == [3, 1]


def test_a_long_text_is_cut_and_an_empty_one_answered(pipeline, batcher, caplog):
    texts = ["bright story " * 300, ""]
    with caplog.at_level(logging.WARNING):
        answers = batcher.submit(texts).result(LIMIT)
    assert "swift: text 0 has 600 tokens, cut to 512" in caplog.text
    assert_as_pipeline(answers, pipeline(texts), batcher.labels)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (7, TypeError, r"rows\[1\]: got int, wanted a str"),
        (None, TypeError, r"rows\[1\]: got NoneType, wanted a str"),
        ("a \ud800", ValueError, r"rows\[1\]: got half of a surrogate pair at 2, wanted text that is Unicode"),
    ],
)
def test_a_bad_text_is_refused_and_touches_no_other_request(pipeline, batcher, bad, error, message):
    before = batcher.submit(TEXTS[:5])
    with pytest.raises(error, match=message):
        batcher.submit([TEXTS[0], bad])
    after = batcher.submit(TEXTS[5:9])
    assert_as_pipeline(before.result(LIMIT) + after.result(LIMIT), pipeline(TEXTS[:9]), batcher.labels)
    assert batcher.stats.rows == 9


GOOD = {"input_ids": [1, 2], "attention_mask": [1, 1]}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("text", TypeError, r"rows\[1\]: got str, wanted a mapping of"),
        ({"input_ids": [1]}, TypeError, r"rows\[1\]: got \['input_ids'\], wanted a mapping of"),
        (GOOD | {"attention_mask": [1]}, ValueError, "'attention_mask': 1}, wanted one length up to 512"),
        ({name: [] for name in GOOD}, ValueError, "wanted one length"),
        ({name: [0] * 513 for name in GOOD}, ValueError, "513"),
        (GOOD | {"input_ids": [1, 21]}, ValueError, r"got tokens from 1 to 21, wanted them in \[0, 21\)"),
        (GOOD | {"input_ids": [-1, 2]}, ValueError, "got tokens from -1 to 2"),
    ],
)
def test_bad_encoded_rows_are_refused(pipeline, bad, error, message):
    rows = EncodedRows(demo_models.tokenizer(), pipeline.swift.reader.model)
    rows.check([GOOD])
    with pytest.raises(error, match=message):
        rows.check([GOOD, bad])


@pytest.mark.parametrize("name", ["swift", "super_"])
def test_training_mode_fails_a_request_until_it_is_left(pipeline, name):
    joint = pipeline_joint(pipeline)
    model = getattr(joint, name)
    with Batcher(joint, EncodedRows(demo_models.tokenizer(), joint.swift)) as batcher:
        model.train()
        try:
            with pytest.raises(RuntimeError, match=f"{name}: in training mode"):
                batcher.submit([GOOD]).result(LIMIT)
        finally:
            model.eval()
        assert len(batcher.submit([GOOD]).result(LIMIT)) == 1


def test_the_policy_for_errors_is_the_joint_models(folders):
    router = Router(threshold=float("inf"))
    with text_batcher(**folders, router=router, on_super_error="swift", super_timeout=30.0) as batcher:
        assert (batcher.joint.plan.super_.on_error, batcher.joint.plan.super_.timeout) == ("swift", 30.0)
        batcher.joint.super_.forward = lambda **_: 1 / 0
        (answer,) = batcher.submit(["dull"]).result(LIMIT)
        assert (answer.model, answer.degraded) == ("swift", True)


def test_an_encoder_decoder_is_refused(folders):
    import transformers

    sizes = {"vocab_size": 21, "d_model": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4, "d_ff": 8}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    with pytest.raises(ValueError, match="super: got T5ForConditionalGeneration, wanted a sequence classifier"):
        text_batcher(swift=folders["swift"], super=(t5, demo_models.tokenizer()), router=Router(threshold=0.0))


def test_a_gradient_is_never_kept():
    swift, super_ = tiny_models.classifier("DistilBert"), tiny_models.classifier("Bert", seed=1)
    grads = []

    class Inputs:
        def check(self, rows):
            pass

        def __call__(self, rows):
            grads.append(torch.is_grad_enabled())
            return tiny_models.inputs(tuple(rows))

    with Batcher(JointClassifier(swift, super_, Router(threshold=float("inf"))), Inputs()) as batcher:
        batcher.submit([3, 4]).result(LIMIT)
    assert grads == [False, False]
