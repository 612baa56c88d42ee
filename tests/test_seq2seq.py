"""Encoder-decoders: which rows each model decodes, that they are the same tokens, and that nothing runs twice."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.generation.utils import GenerateEncoderDecoderOutput

from elang import reference
from elang.energy_head import EnergyHead, pooled
from elang.late import LATE_SCORES, LateRouter, ends_of, late_scores
from elang.router import Router
from elang.seq2seq import JointSeq2Seq

pytestmark = pytest.mark.usefixtures("one_thread")

INF, VOCAB, LENGTH = float("inf"), 40, 9
SHARES = (0, 1, 4, 6)  # of six rows
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_BART = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_BART |= {"bos_token_id": 2, "forced_eos_token_id": 1, "max_position_embeddings": 32, **_TOKENS}
_CONFIGS: dict[str, dict[str, Any]] = {
    "T5": {"d_kv": 8, "d_ff": 24, "num_heads": 2, **_TOKENS},
    "Bart": _BART,
    "Marian": {**_BART, "decoder_vocab_size": VOCAB},
}
_CLASS = {"T5": "T5ForConditionalGeneration", "Bart": "BartForConditionalGeneration", "Marian": "MarianMTModel"}


def encoder_decoder(family: str, seed: int, width: int = 16, layers: int = 1) -> Any:
    count = {"num_layers": layers} if family == "T5" else {"encoder_layers": layers, "decoder_layers": layers}
    config = getattr(transformers, f"{family}Config")(**{**_CONFIGS[family], "d_model": width, **count})
    torch.manual_seed(seed)
    model = getattr(transformers, _CLASS[family])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config.max_new_tokens = 4
    return model


def inputs(lengths: tuple[int, ...] = (9, 3, 5, 1, 7, 2), seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(params=list(_CONFIGS))
def pair(request) -> tuple[Any, Any]:
    return encoder_decoder(request.param, 0), encoder_decoder(request.param, 1, width=24, layers=2)


def joint_of(swift: Any, super_: Any, threshold: float = 0.0, form: str = "pooled", outputs: int = 5) -> JointSeq2Seq:
    torch.manual_seed(5)
    head = EnergyHead(swift.config.hidden_size, outputs, form)
    return JointSeq2Seq(swift, super_, head, Router("logit" if outputs == 1 else "energy", threshold=threshold))


def route(joint: JointSeq2Seq, batch: dict[str, Tensor], routed: int) -> Tensor:
    """Moves the threshold so that so many rows are routed; their places."""
    with torch.no_grad():
        states = joint.swift.get_encoder()(**batch).last_hidden_state
    score = joint.head.decide(states, batch["attention_mask"], joint.router).score
    edges = torch.cat([torch.tensor([-INF]), score.sort().values, torch.tensor([INF])])
    joint.router.set_threshold(edges[routed : routed + 2].mean().item())
    return score.argsort()[:routed].sort().values


def padded(sequences: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(sequences, (0, length - sequences.shape[1]), value=0)


OPTIONS = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "several": {"num_beams": 3, "num_return_sequences": 2},
    "prefix": {"decoder_input_ids": torch.tensor([[0, 7], [0, 8], [0, 9], [0, 10], [0, 11], [0, 12]])},
}


@pytest.mark.parametrize("how", OPTIONS)
def test_each_row_is_decoded_by_one_model_token_for_token(pair, how):
    swift, super_ = pair
    joint, batch = joint_of(*pair), inputs()
    options = OPTIONS[how]
    each = options.get("num_return_sequences", 1)
    for routed in SHARES:
        rows = route(joint, batch, routed)
        output = joint.generate(**batch, **options, return_dict_in_generate=True)
        assert output.routing.order[:routed].tolist() == rows.tolist()
        assert int(output.routing.n_routed) == routed
        got = output.sequences.view(6, each, -1)
        kept = [i for i in range(6) if i not in rows]
        for model, mine in ((super_, rows.tolist()), (swift, kept)):
            if not mine:
                continue
            longest = int(batch["attention_mask"][mine].sum(1).max()) if model is super_ else LENGTH
            part = {name: value[mine][:, :longest] for name, value in batch.items()}
            split = {k: v[mine] if isinstance(v, Tensor) else v for k, v in options.items()}
            want = model.generate(**part, **split)
            assert torch.equal(got[mine].flatten(0, 1), padded(want, got.shape[2]))
    assert joint.stats.routed == sum(SHARES)


def test_swift_s_encoder_runs_once_and_its_decoder_only_on_what_it_keeps(pair):
    swift, super_ = pair
    joint, batch = joint_of(*pair), inputs()
    rows = route(joint, batch, 4)
    seen: dict[str, list[int]] = {"encoder": [], "decoder": [], "super": []}
    hooks = [
        swift.get_encoder().register_forward_hook(
            lambda m, a, k, o: seen["encoder"].append(len(o[0])), with_kwargs=True
        ),
        swift.get_decoder().register_forward_hook(
            lambda m, a, k, o: seen["decoder"].append(len(o[0])), with_kwargs=True
        ),
        super_.get_encoder().register_forward_hook(
            lambda m, a, k, o: seen["super"].append(tuple(o[0].shape[:2])), with_kwargs=True
        ),
    ]
    joint.generate(**batch)
    assert seen["encoder"] == [6]
    assert set(seen["decoder"]) == {2}
    assert seen["super"] == [(4, int(batch["attention_mask"][rows].sum(1).max()))]
    joint.router.set_threshold(INF)
    seen["decoder"].clear()
    joint.generate(**batch)
    assert seen["decoder"] == []
    joint.router.set_threshold(-INF)
    seen["super"].clear()
    joint.generate(**batch)
    assert seen["super"] == []
    for hook in hooks:
        hook.remove()


def test_teacher_forced_logits_and_loss(pair):
    swift, super_ = pair
    joint, batch = joint_of(*pair), inputs()
    labels = torch.randint(3, VOCAB, (6, LENGTH), generator=torch.Generator().manual_seed(3))  # as long as the inputs
    labels[2, 4:] = -100
    for routed in SHARES:
        rows = route(joint, batch, routed)
        output = joint(**batch, labels=labels)
        with torch.no_grad():
            want = swift(**batch, labels=labels).logits
            want[rows] = super_(**batch, labels=labels).logits[rows]
        torch.testing.assert_close(output.logits, want, rtol=1e-4, atol=1e-4)
        loss = torch.nn.functional.cross_entropy(want.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(output.loss, loss)
        torch.testing.assert_close(joint(**batch, labels=labels, return_dict=False)[1], output.logits)


@pytest.mark.parametrize(("form", "outputs"), [("pooled", 5), ("pooled", 1), ("token", VOCAB)])
def test_the_head_decides_on_the_encoder_s_real_tokens(pair, form, outputs):
    swift, super_ = pair
    joint, batch = joint_of(swift, super_, -INF, form, outputs), inputs()
    with torch.no_grad():
        states = swift.get_encoder()(**batch).last_hidden_state.double()
        mask, linear = batch["attention_mask"].double(), joint.head.output
        weight, bias = linear.weight.double(), linear.bias.double()
        if form == "pooled":
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            want = reference.score_logits(mean @ weight.t() + bias, joint.router.score)
        else:
            want = ((states @ weight.t() + bias).logsumexp(-1) * mask).sum(1) / mask.sum(1)
    got = joint.generate(**batch, return_dict_in_generate=True).routing.score
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


def test_a_row_without_a_token_goes_to_super(pair):
    joint = joint_of(*pair, -INF)
    output = joint.generate(**inputs((4, 0, 6)), return_dict_in_generate=True)
    assert output.routing.order[:1].tolist() == [1]
    assert int(output.routing.n_routed) == 1
    assert pooled(torch.randn(1, 3, 4), torch.zeros(1, 3)).isnan().all()


def test_without_a_mask_padding_is_what_the_padding_token_says(pair):
    joint, batch = joint_of(*pair), inputs()
    route(joint, batch, 3)
    assert torch.equal(joint.generate(input_ids=batch["input_ids"]), joint.generate(**batch))


def test_threads_give_the_answers_of_one(pair):
    joint = joint_of(*pair)
    batches = [inputs(tuple(range(1, n + 2)), seed=n) for n in range(6)]
    route(joint, batches[-1], 3)
    alone = [joint.generate(**b) for b in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: joint.generate(**batches[i % 6]), range(24)))
    assert all(torch.equal(together[i], alone[i % 6]) for i in range(24))


def test_sampling_is_of_each_row_s_model(pair):
    joint, batch = joint_of(*pair), inputs()
    route(joint, batch, 3)
    torch.manual_seed(0)
    first = joint.generate(**batch, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    assert torch.equal(joint.generate(**batch, do_sample=True, num_return_sequences=3), first)
    assert len(first) == 18


def test_generation_configs_are_each_model_s_own(pair):
    swift, super_ = (copy.deepcopy(model) for model in pair)
    swift.generation_config.max_new_tokens, super_.generation_config.max_new_tokens = 2, 5
    swift.generation_config.min_new_tokens, super_.generation_config.min_new_tokens = 2, 5
    joint, batch = joint_of(swift, super_), inputs()
    for threshold, new in ((-INF, 2), (INF, 5)):
        joint.router.set_threshold(threshold)
        assert joint.generate(**batch).shape[1] == new + 1
    swift.generation_config.num_return_sequences = swift.generation_config.num_beams = 2
    route(joint, batch, 2)
    with pytest.raises(ValueError, match="num_return_sequences: got 1 of Super and 2 of Swift"):
        joint.generate(**batch)


def test_what_does_not_go_together_is_refused(pair):
    swift, super_ = pair
    head = EnergyHead(16, 3)
    router = Router(threshold=0.0)
    with pytest.raises(ValueError, match="swift: got Linear, wanted an encoder-decoder"):
        JointSeq2Seq(torch.nn.Linear(2, 2), super_, head, router)
    other = copy.deepcopy(super_)
    other.config.vocab_size = 99
    with pytest.raises(ValueError, match="super_: got vocab_size 99, wanted Swift's 40"):
        JointSeq2Seq(swift, other, head, router)
    with pytest.raises(ValueError, match="head: got one for states of 7, wanted 16"):
        JointSeq2Seq(swift, super_, EnergyHead(7, 3), router)
    with pytest.raises(ValueError, match="form: got 'mean', wanted one of pooled, token"):
        EnergyHead(16, 3, "mean")
    with pytest.raises(ValueError, match="num_outputs: got 1, wanted at least 2"):
        EnergyHead(16, 1, "token")
    joint, batch = joint_of(swift, super_), inputs()
    with pytest.raises(ValueError, match="output_scores: of two models only sequences and logits merge"):
        joint.generate(**batch, output_scores=True)
    with pytest.raises(ValueError, match="input_ids: got NoneType, wanted a tensor"):
        joint.generate()
    with pytest.raises(ValueError, match="decoder_input_ids: got None, wanted them or labels"):
        joint(**batch)
    with pytest.raises(ValueError, match="router: got score 'margin', wanted 'energy'"):
        EnergyHead(16, 8, "token").decide(torch.zeros(1, 2, 16), None, Router("margin", threshold=0.0))
    super_.train()
    try:
        with pytest.raises(RuntimeError, match="super_: in training mode"):
            joint.generate(**batch)
    finally:
        super_.eval()


def late_by_hand(model: Any, encoded: dict[str, Tensor], sequence: Tensor) -> dict[str, float]:
    """The late scores of one sequence [L], which starts with the decoder's first token, from a teacher-forced pass."""
    tokens = sequence[1:].tolist()
    tokens = tokens[: tokens.index(1) + 1] if 1 in tokens else tokens
    decoder = sequence[: len(tokens)].unsqueeze(0)
    with torch.no_grad():
        logits = model(**encoded, decoder_input_ids=decoder).logits[0].double()
    log_p = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
    energy = logits.logsumexp(-1).mean().item()
    return {
        "mean_log_prob": log_p.mean().item(),
        "sum_log_prob": log_p.sum().item(),
        "min_log_prob": log_p.min().item(),
        "decoder_energy": energy,
    }


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "max_new_tokens": 9}])
def test_late_scores_are_those_of_a_teacher_forced_pass(pair, options):
    _, model = pair
    batch = inputs((9, 3, 5, 1, 7, 2))
    output = model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
    got = late_scores(output, model.generation_config.eos_token_id)
    assert tuple(got) == LATE_SCORES
    for i, sequence in enumerate(output.sequences):
        want = late_by_hand(model, {name: value[i : i + 1] for name, value in batch.items()}, sequence)
        for name, values in got.items():
            assert values[i].item() == pytest.approx(want[name], rel=1e-4, abs=1e-4), (i, name)


def test_late_scores_end_with_the_sequence():
    """Greedy rows of two beams' length: what comes behind the first end of sequence counts for nothing."""
    logits = torch.randn(4, 2, 8).unbind()
    output = GenerateEncoderDecoderOutput(sequences=torch.tensor([[0, 5, 1, 0, 0], [0, 1, 7, 7, 7]]), logits=logits)
    long = late_scores(output, 1)
    short = GenerateEncoderDecoderOutput(sequences=torch.tensor([[0, 5, 1], [0, 1, 7]]), logits=logits[:2])
    for name, values in late_scores(short, [1, 6]).items():
        torch.testing.assert_close(long[name], values)
    assert late_scores(output, None)["sum_log_prob"][1] < long["sum_log_prob"][1]


def test_what_ends_a_sequence_is_what_generate_is_told(pair):
    swift, _ = pair
    config = transformers.GenerationConfig(eos_token_id=[7, 8])
    for options, want in (({}, 1), ({"eos_token_id": 5}, 5), ({"generation_config": config}, [7, 8])):
        assert ends_of(swift, options) == want
    assert ends_of(swift, {"generation_config": config, "eos_token_id": None}) is None


GATES = {"both": True, "late alone": False}


@pytest.mark.parametrize("how", ["greedy", "beam", "several"])
@pytest.mark.parametrize("first", GATES)
def test_the_second_gate_sends_what_was_decoded_without_conviction(pair, how, first):
    swift, super_ = pair
    batch, options = inputs(), OPTIONS[how]
    each = options.get("num_return_sequences", 1)
    alone = swift.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
    late_score = late_scores(alone, 1)["mean_log_prob"].view(6, each)[:, 0]
    early = joint_of(swift, super_)
    gone = route(early, batch, 2).tolist() if GATES[first] else []
    left = [i for i in range(6) if i not in gone]
    by_need = sorted(left, key=lambda i: late_score[i].item())
    for more in range(len(left) + 1):
        edges = [-INF, *(late_score[i].item() for i in by_need), INF]
        late = LateRouter(threshold=sum(edges[more : more + 2]) / 2)
        gate_1 = (early.head, early.router) if GATES[first] else (None, None)
        joint = JointSeq2Seq(swift, super_, *gate_1, late=late)
        output = joint.generate(**batch, **options, return_dict_in_generate=True)
        rows = sorted(gone + by_need[:more])
        kept = [i for i in range(6) if i not in rows]
        assert output.routing.order.tolist() == rows + kept
        assert (joint.stats.rows, joint.stats.routed) == (6, len(rows))
        assert output.routing.late_score.isnan().nonzero().flatten().tolist() == gone
        torch.testing.assert_close(output.routing.late_score[left], late_score[left], rtol=1e-4, atol=1e-4)
        of_gate_1 = early.generate(**batch, return_dict_in_generate=True).routing.score
        torch.testing.assert_close(
            output.routing.score, of_gate_1 if GATES[first] else output.routing.late_score, equal_nan=True
        )
        got = output.sequences.view(6, each, -1)
        if kept:
            want = padded(alone.sequences, got.shape[2]).view(6, each, -1)[:, :, : got.shape[2]]
            assert torch.equal(got[kept], want[kept])
        if rows:
            longest = int(batch["attention_mask"][rows].sum(1).max())
            want = super_.generate(**{name: value[rows][:, :longest] for name, value in batch.items()}, **options)
            assert torch.equal(got[rows].flatten(0, 1), padded(want, got.shape[2]))


def test_what_the_first_gate_routes_swift_never_decodes(pair):
    swift, super_ = pair
    early, batch = joint_of(swift, super_), inputs()
    route(early, batch, 2)
    joint = JointSeq2Seq(swift, super_, early.head, early.router, late=LateRouter(threshold=INF))
    seen: dict[str, list[int]] = {"swift": [], "super": []}
    hooks = [
        model.get_decoder().register_forward_hook(
            lambda m, a, k, o, name=name: seen[name].append(len(o[0])), with_kwargs=True
        )
        for name, model in (("swift", swift), ("super", super_))
    ]
    joint.generate(**batch)
    for hook in hooks:
        hook.remove()
    assert set(seen["swift"]) == {4}
    assert set(seen["super"]) == {6}  # both gates' rows in one batch


def test_a_late_router_says_what_it_cannot_do(pair):
    swift, super_ = pair
    with pytest.raises(ValueError, match="score: got 'energy', wanted one of mean_log_prob"):
        LateRouter("energy", threshold=0.0)
    with pytest.raises(ValueError, match="head, late: got neither"):
        JointSeq2Seq(swift, super_)
    with pytest.raises(ValueError, match="head, router: got one of them"):
        JointSeq2Seq(swift, super_, EnergyHead(16, 3), late=LateRouter(threshold=0.0))
    joint = JointSeq2Seq(swift, super_, late=LateRouter(threshold=0.0))
    with pytest.raises(ValueError, match="late: scores what generate"):
        joint(**inputs(), labels=inputs()["input_ids"])
    joint = copy.deepcopy(joint).half()
    assert joint.late.threshold.dtype == torch.float32
