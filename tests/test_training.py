from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from demo_models import TEXTS, tokenizer
from torch import nn
from transformers import AutoModelForSequenceClassification

from elang.training import Recipe, distillation_loss, first_layers

pytestmark = pytest.mark.usefixtures("one_thread")

DEPTH = 3


def save(folder, family):
    tiny_models.classifier(family, seed=1, num_hidden_layers=DEPTH).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@torch.no_grad()
def logits_of(model):
    return torch.cat([model(**tokenizer()(text, return_tensors="pt")).logits for text in TEXTS[:5]])


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "DebertaV2", "DistilBert", "GPT2", "XLNet"])
def test_the_first_layers_of_any_family(family, tmp_path):
    folder = save(tmp_path, family)
    model, _ = first_layers(folder, Recipe(2, 1, 1, 1.0, 1.0, attention_dropout=None))
    cut = load(folder)
    (stack,) = (m for m in cut.modules() if isinstance(m, nn.ModuleList) and len(m) == DEPTH)
    del stack[2:]
    torch.testing.assert_close(logits_of(model.eval()), logits_of(cut))
    assert not torch.allclose(logits_of(model), logits_of(load(folder)), atol=0.01)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("Bert", "attention_probs_dropout_prob"),
        ("DebertaV2", "attention_probs_dropout_prob"),
        ("DistilBert", "attention_dropout"),
        ("GPT2", "attn_pdrop"),
    ],
)
def test_the_dropout_of_attention(family, name, tmp_path):
    folder = save(tmp_path, family)
    own = getattr(load(folder).config, name)
    for dropout, wanted in ((None, own), (0.25, 0.25)):
        model, _ = first_layers(folder, Recipe(1, 1, 1, 1.0, 1.0, attention_dropout=dropout))
        assert getattr(model.config, name) == wanted


def test_a_dropout_that_there_is_not_is_refused(tmp_path):
    folder = save(tmp_path, "XLNet")
    with pytest.raises(ValueError, match=r"attention_dropout: got 0.1 for .*, whose config has none, wanted None"):
        first_layers(folder, Recipe(1, 1, 1, 1.0, 1.0, attention_dropout=0.1))


def test_the_loss_is_that_of_its_formula():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 7, 3)).astype(np.float32)
    rows = np.array([4, 0, 6])
    p, q = (np.exp(z / 3.0) / np.exp(z / 3.0).sum(axis=1, keepdims=True) for z in (teacher, student))
    wanted = 9.0 * (p[rows] * np.log(p[rows] / q[rows])).sum(axis=1).mean()
    assert distillation_loss(teacher, 3.0)(torch.from_numpy(student[rows]), rows).item() == pytest.approx(wanted, 1e-5)
