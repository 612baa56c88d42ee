"""The pipeline: models by name, where they go, and what does not go together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_seq2seq import encoder_decoder
from tiny_pipelines import (
    BERT,
    BERT_SUPER,
    BERT_TOKENIZER,
    INF,
    SUPER_TOKENIZER,
    SWIFT_TOKENIZER,
    T5,
    T5_SUPER,
    TEXTS,
    TOKENS,
    classifier,
    energies,
    head,
    route,
    t5_before,
    upper,
)
from transformers import GenerationConfig, PreTrainedTokenizerFast

from elang.calibration import calibrate
from elang.energy_head import EnergyHead
from elang.late import LateRouter
from elang.pipelines import pipeline
from elang.router import Router

pytestmark = pytest.mark.usefixtures("one_thread")


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
