from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from conftest import assert_accurate
from torch import Tensor, nn
from torch.nn import functional as F

from elang import backbones

HEADS = {
    "Bert": "classifier",
    "DistilBert": "classifier",
    "Roberta": "classifier.out_proj",
    "XLMRoberta": "classifier.out_proj",
    "Electra": "classifier.out_proj",
    "Albert": "classifier",
    "DebertaV2": "classifier",
    "XLNet": "logits_proj",
    "GPT2": "score",
}


class Convolution(nn.Module):
    """A made-up architecture, with two heads and no Hugging Face in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tiny_models.VOCAB, 6)
        self.convolution = nn.Conv1d(6, 5, kernel_size=3, padding=1)
        self.heads = nn.ModuleDict({"sentiment": nn.Linear(5, 3), "topic": nn.Linear(5, 3)})
        self.task = "sentiment"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.convolution(self.embedding(input_ids).transpose(1, 2))
        return self.heads[self.task]((hidden * attention_mask.unsqueeze(1)).amax(dim=2))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(backbones, "_registered", {})


def _tree(swift: nn.Module) -> dict[str, Any]:
    """Every module with its attributes, submodules, hooks and tensors, by identity."""

    def attributes(module: nn.Module) -> dict[str, Any]:
        return {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}

    return {name: (module, attributes(module)) for name, module in swift.named_modules()}


@torch.no_grad()
def head_of_view(backbone: backbones.Backbone, **inputs: Tensor) -> Tensor:
    hidden = backbones.logits_of(backbone.run(**inputs))
    return F.linear(hidden, backbone.head.weight, backbone.head.bias)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("left", [False, True])
def test_the_head_and_its_input_are_found_by_structure(family, left):
    swift, inputs = tiny_models.classifier(family), tiny_models.inputs(left=left)
    backbone = backbones.find(swift)
    assert backbone.head is swift.get_submodule(HEADS[family])
    with torch.no_grad():
        eager = swift(**inputs).logits
    assert_accurate(head_of_view(backbone, **inputs), eager, tiny_models.float64_logits(swift, **inputs))


@pytest.mark.parametrize("family", ["DistilBert", "XLMRoberta"])
def test_the_head_among_layers_of_the_same_width(family):
    swift = tiny_models.classifier(family, num_labels=16)
    assert backbones.find(swift).head is swift.get_submodule(HEADS[family])


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_swift_is_not_changed_and_nothing_is_copied(family):
    swift = tiny_models.classifier(family).train()
    before = _tree(swift)
    weights = copy.deepcopy(swift.state_dict())
    view = backbones.find(swift).run
    assert _tree(swift) == before
    assert all(module.training for module in swift.modules())
    assert all(torch.equal(weights[name], value) for name, value in swift.state_dict().items())
    own = {id(tensor) for tensor in (*swift.parameters(), *swift.buffers())}
    assert {id(tensor) for tensor in (*view.parameters(), *view.buffers())} < own


@pytest.mark.parametrize("family", ["Bert", "Roberta", "GPT2"])
def test_new_weights_are_seen(family):
    swift, other = tiny_models.classifier(family), tiny_models.classifier(family, seed=1)
    backbone, inputs = backbones.find(swift), tiny_models.inputs()
    swift.load_state_dict(other.state_dict())
    assert torch.equal(head_of_view(backbone, **inputs), head_of_view(backbones.find(other), **inputs))
    before = head_of_view(backbone, **inputs)
    backbone.head.weight = nn.Parameter(2 * backbone.head.weight)
    assert not torch.equal(head_of_view(backbone, **inputs), before)


def test_the_view_is_in_eval_mode_however_swift_was_when_it_was_made():
    swift = tiny_models.classifier("DistilBert").train()
    view = backbones.find(swift).run
    swift.eval()
    assert not any(module.training for module in view.modules())


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_the_view_compiles_in_one_graph(family):
    swift, inputs = tiny_models.classifier(family), tiny_models.inputs()
    view = backbones.find(swift).run
    compiled = torch.compile(lambda **inputs: view(**inputs).logits, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**inputs), view(**inputs).logits)


class ScaledLinear(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 3 * super().forward(hidden)


class LowRank(nn.Module):
    """An adapter round a linear layer, laid out as PEFT lays them out."""

    def __init__(self, base_layer: nn.Linear, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, out_features, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) + self.lora_B(self.lora_A(hidden))


def _subclassed(swift: Any) -> None:
    swift.classifier = ScaledLinear(16, 3)


def _low_rank(swift: Any) -> None:
    swift.classifier = LowRank(swift.classifier, 16, 3)


def _something_after(swift: Any) -> None:
    swift.classifier = nn.Sequential(swift.classifier, nn.Tanh())


def _parametrized(swift: Any) -> None:
    nn.utils.parametrizations.weight_norm(swift.classifier)


def _quantised(swift: Any) -> None:
    torch.ao.quantization.quantize_dynamic(swift, {"classifier"}, inplace=True)


def _hook_on_head(swift: Any) -> None:
    swift.classifier.register_forward_hook(lambda module, args, logits: 3 * logits)


def _hook_on_swift(swift: Any) -> None:
    def triple(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = 3 * output.logits
        return output

    swift.register_forward_hook(triple)


def _forward_replaced(swift: Any) -> None:
    forward = swift.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 3 * output.logits
        return output

    swift.forward = scaled


def _compiled_in_place(swift: Any) -> None:
    swift.compile(backend="eager")


@pytest.mark.parametrize(
    "change",
    [
        _subclassed,
        _low_rank,
        _something_after,
        _parametrized,
        pytest.param(_quantised, marks=pytest.mark.filterwarnings("ignore")),
        _hook_on_head,
        _hook_on_swift,
        _forward_replaced,
        _compiled_in_place,
    ],
)
def test_a_swift_whose_head_is_more_than_a_linear_layer_stays_whole(change):
    swift = tiny_models.classifier("Bert")
    change(swift)
    assert backbones.find(swift) == backbones.Backbone(swift, None)


def test_a_forward_of_the_users_own_keeps_swift_whole_until_registered(monkeypatch):
    class ScaledBertForSequenceClassification(transformers.BertForSequenceClassification):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits / 3
            return output

    swift = ScaledBertForSequenceClassification(tiny_models.classifier("Bert").config)
    assert backbones.find(swift).head is None
    monkeypatch.setattr(backbones, "_registered", {ScaledBertForSequenceClassification: "classifier"})
    assert backbones.find(swift).head is swift.classifier


def test_a_layer_after_the_head_keeps_swift_whole():
    tiny = {"emb_dim": 8, "n_layers": 1, "n_heads": 2, "n_words": tiny_models.VOCAB, "pad_index": tiny_models.PAD}
    plain, tanh = (
        transformers.XLMForSequenceClassification(
            transformers.XLMConfig(**tiny, num_labels=3, summary_activation=activation)
        )
        for activation in (None, "tanh")
    )
    assert backbones.find(plain).head is plain.sequence_summary.summary
    assert backbones.find(tanh).head is None


def test_a_black_box_stays_whole():
    swift = tiny_models.classifier("Bert")
    for model in (lambda **inputs: inputs, torch.compile(swift, backend="eager"), nn.Sequential(nn.Linear(4, 3))):
        assert backbones.find(model) == backbones.Backbone(model, None)


@pytest.mark.parametrize("key", [Convolution, "Convolution"])
@pytest.mark.parametrize("head", ["heads.sentiment", lambda model: model.heads[model.task]])
def test_register_a_made_up_architecture(key, head):
    swift, inputs = Convolution(), tiny_models.inputs()
    assert backbones.find(swift).head is None
    backbones.register_backbone(key, head=head)
    backbone = backbones.find(swift)
    assert backbone.head is swift.heads["sentiment"]
    assert torch.equal(head_of_view(backbone, **inputs), swift(**inputs))


def test_registration_covers_subclasses_and_goes_before_structure():
    class TopicConvolution(Convolution):
        pass

    backbones.register_backbone(Convolution, head="heads.topic")
    swift = TopicConvolution()
    assert backbones.find(swift).head is swift.heads["topic"]
    bert = tiny_models.classifier("Bert", num_labels=16)
    backbones.register_backbone(type(bert), head="bert.pooler.dense")
    assert backbones.find(bert).head is bert.bert.pooler.dense


@pytest.mark.parametrize("head", ["heads.tone", "", lambda model: nn.Linear(5, 3)])
def test_a_registered_head_that_is_not_there(head):
    backbones.register_backbone(Convolution, head=head)
    with pytest.raises(ValueError, match=r"is no submodule of Convolution, .*: heads.sentiment, heads.topic"):
        backbones.find(Convolution())


def test_bad_registrations():
    with pytest.raises(TypeError, match="swift: got Convolution, wanted a class or the name of one"):
        backbones.register_backbone(Convolution(), head="heads.topic")
    with pytest.raises(TypeError, match="head: got int, wanted a dotted path or a function"):
        backbones.register_backbone(Convolution, head=3)


def test_logits_of_every_form_of_output():
    logits = torch.zeros(2, 3)
    holder = type("Output", (), {"logits": logits})()
    for output in (logits, holder, (logits, "more")):
        assert backbones.logits_of(output) is logits
    with pytest.raises(TypeError, match="output of a model: got dict, wanted"):
        backbones.logits_of({"logits": logits})
