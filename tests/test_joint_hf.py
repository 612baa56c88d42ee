"""The pair as a Hugging Face model: label names, saving and loading, pipelines and the Trainer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from conftest import assert_accurate
from torch import Tensor
from torch.nn import functional as F

from elang.joint import JointClassifier
from elang.router import Router

INF = float("inf")


# ---- labels


def named(model: str, *labels: str, seed: int = 0) -> Any:
    return tiny_models.classifier(
        model,
        seed,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        num_labels=len(labels),
    )


@pytest.mark.parametrize(
    ("swift_labels", "super_labels", "label_map", "columns"),
    [
        (("neg", "neutral", "pos"), ("NEG", "Neutral", "POS"), None, [0, 1, 2]),
        (("pos", "neg", "neutral"), ("NEG", "Neutral", "POS"), None, [1, 2, 0]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("LABEL_0", "LABEL_1", "LABEL_2"), None, [0, 1, 2]),
        (("bad", "ok", "good"), ("pos", "neu", "neg"), {"Good": "pos", "ok": "NEU", "bad": "neg"}, [2, 1, 0]),
        (("bad", "ok", "good"), ("LABEL_0", "LABEL_1", "LABEL_2"), {0: 1, "ok": 2, 2: "LABEL_0"}, [2, 0, 1]),
        (("pos", "neg"), ("pos", "neg"), {"pos": "neg", "neg": "pos"}, [1, 0]),
    ],
)
def test_answers_are_in_super_s_label_order(swift_labels, super_labels, label_map, columns, inputs):
    swift, super_ = named("DistilBert", *swift_labels), named("Bert", *super_labels)
    joint = JointClassifier(swift, super_, Router(threshold=-INF), label_map=label_map)
    truth = tiny_models.float64_logits(swift, **inputs)
    with torch.no_grad():
        eager = swift(**inputs).logits
    assert_accurate(joint(**inputs).logits, eager[:, columns], truth[:, columns])
    joint.router.set_threshold(INF)
    assert torch.equal(joint(**inputs).logits, tiny_models.super_alone(super_, inputs, torch.arange(6)))


@pytest.mark.parametrize(
    ("swift_labels", "super_labels", "label_map", "message"),
    [
        (("bad", "good"), ("neg", "pos"), None, r"label_map: got None, wanted one, as Swift's .*bad.*Super's .*pos"),
        (("LABEL_0", "LABEL_1"), ("neg", "pos"), None, "label_map: got None"),
        (("LABEL_0", "LABEL_1"), ("LABEL_0", "LABEL_1", "LABEL_2"), None, "label_map: got None"),
        (
            ("bad", "good"),
            ("neg", "pos"),
            {"bad": "neg", "best": "pos"},
            "label_map: got 'best', wanted a class number",
        ),
        (("bad", "good"), ("neg", "pos"), {"bad": "neg"}, "wanted each of Swift's labels"),
        (("bad", "good"), ("neg", "pos"), {"bad": "neg", "good": "neg"}, "wanted each of Swift's labels"),
        (("bad", "good"), ("neg", "pos"), {0: 0, 2: 1}, "wanted each of Swift's labels"),
        (("bad", "good"), ("neg", "pos", "neu"), {0: 0, 1: 1}, "wanted each of Swift's labels"),
        (("bad", "ok", "good"), ("neg", "pos"), {0: 0, 1: 1}, "wanted each of Swift's labels"),
    ],
)
def test_labels_that_do_not_match(swift_labels, super_labels, label_map, message):
    with pytest.raises(ValueError, match=message):
        JointClassifier(
            named("DistilBert", *swift_labels), named("Bert", *super_labels), Router(threshold=0.0), label_map=label_map
        )


def test_a_callable_has_no_label_names(swift):
    with pytest.raises(ValueError, match=r"label_map: got None, wanted one, .* Super's are None"):
        JointClassifier(swift, lambda **inputs: None, Router(threshold=0.0))


def test_the_config_of_a_super_without_one_names_the_labels_of_the_answers():
    swift = named("DistilBert", "pos", "neg")
    joint = JointClassifier(swift, lambda **inputs: None, Router(threshold=0.0), label_map={"pos": 1, "neg": 0})
    assert joint.config.id2label == {0: "neg", 1: "pos"}
    assert joint.config.label2id == {"neg": 0, "pos": 1}
    assert swift.config.id2label == {0: "pos", 1: "neg"}


# ---- saving and loading


@pytest.mark.parametrize("threshold", [0.1, 1.31044, INF, -INF])
def test_a_saved_pair_comes_back_the_same(tmp_path, inputs, threshold):
    swift, super_ = named("DistilBert", "bad", "good"), named("Bert", "pos", "neg")
    label_map = {"bad": 1, "good": "pos"}
    router = Router("margin", threshold=threshold, temperature=0.3)
    joint = JointClassifier(swift, super_, router, label_map=label_map, trim=False)
    joint.save_pretrained(tmp_path)
    back = JointClassifier.from_pretrained(tmp_path)
    assert torch.equal(back.router.threshold, router.threshold)
    assert (back.router.score, back.router.temperature) == ("margin", 0.3)
    assert (back.dispatch, back.plan.trim, back.label_map) == ("exact", False, label_map)
    for value in (-INF, INF):
        joint.router.set_threshold(value)
        back.router.set_threshold(value)
        assert torch.equal(back(**inputs).logits, joint(**inputs).logits)
    assert {path.name for path in tmp_path.rglob("*.*")} == {"config.json", "elang.json", "model.safetensors"}
    json.loads((tmp_path / "elang.json").read_text(), parse_constant=pytest.fail)


def test_loading_never_unpickles(tmp_path, swift, super_):
    JointClassifier(swift, super_, Router(threshold=0.0)).save_pretrained(tmp_path)
    (tmp_path / "super" / "model.safetensors").unlink()
    torch.save(super_.state_dict(), tmp_path / "super" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        JointClassifier.from_pretrained(tmp_path)


def test_saving_a_pair_with_super_inputs(tmp_path, swift, super_, inputs):
    def super_inputs(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        return {name: value[rows] for name, value in inputs.items()}

    JointClassifier(swift, super_, Router(threshold=INF), super_inputs=super_inputs).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="super_inputs: got None"):
        JointClassifier.from_pretrained(tmp_path)
    back = JointClassifier.from_pretrained(tmp_path, super_inputs=super_inputs, super_device="cpu")
    assert back.plan.super_inputs is super_inputs
    assert back.plan.super_.device == torch.device("cpu")


def test_a_model_that_cannot_be_saved_leaves_nothing_behind(tmp_path, swift):
    joint = JointClassifier(swift, lambda **i: None, Router(threshold=0.0), label_map={0: 0, 1: 1, 2: 2})
    with pytest.raises(TypeError, match="super_: got function, wanted a model with save_pretrained"):
        joint.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- drop-in use


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


TEXTS = ["a film that is good", "bad and dull", "very very warm", "cold", "a great film and a warm film", "dull film"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_text_classification_pipeline(tokenizer, batch_size):
    swift, super_ = named("Bert", "neg", "pos"), named("Bert", "pos", "neg", seed=1)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    joint = tiny_models.half_way(swift, super_, encoded)
    logits = joint(**encoded).logits
    classify = transformers.pipeline("text-classification", model=joint, tokenizer=tokenizer, device="cpu")
    answers = classify(TEXTS, batch_size=batch_size)
    assert [answer["label"] for answer in answers] == [super_.config.id2label[i] for i in logits.argmax(dim=1).tolist()]
    scores = torch.tensor([answer["score"] for answer in answers])
    torch.testing.assert_close(scores, logits.softmax(dim=1).amax(dim=1))


def test_trainer_predict(tokenizer, tmp_path):
    swift, super_ = named("Bert", "neg", "pos"), named("Bert", "pos", "neg", seed=1)
    joint = tiny_models.half_way(swift, super_, tokenizer(TEXTS, padding=True, return_tensors="pt"))
    labels = [0, 1, 1, 0, 1, 0]
    rows = [{**tokenizer(text), "labels": label} for text, label in zip(TEXTS, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = transformers.Trainer(
        model=joint, args=arguments, data_collator=transformers.DataCollatorWithPadding(tokenizer)
    )
    predicted = trainer.predict(rows)
    batches = [tokenizer(TEXTS[i : i + 4], padding=True, return_tensors="pt") for i in (0, 4)]
    want = torch.cat([joint(**batch).logits for batch in batches])
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), want)
    assert predicted.label_ids.tolist() == labels
    assert predicted.metrics["test_loss"] == pytest.approx(F.cross_entropy(want, torch.tensor(labels)).item(), rel=1e-4)
