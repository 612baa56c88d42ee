"""Fitting an energy head: what it learns, that states are computed once, and that it belongs to one encoder."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from demo_models import TEXTS, tokenizer
from sklearn.metrics import roc_auc_score
from test_seq2seq import encoder_decoder

from elang.energy_head import EnergyHead
from elang.evaluation.features import encoder_features
from elang.evaluation.predict import Encoded, longest_input
from elang.fingerprint import fingerprint
from elang.gated import GatedSwift
from elang.head_fitting import fit_energy_head
from elang.reference import score_logits, vocab_energy
from elang.router import Router

pytestmark = pytest.mark.usefixtures("one_thread")

MANY = [f"{text} {other}" for text in TEXTS for other in TEXTS[::20]]


@pytest.fixture(scope="module", params=["T5", "Bart", "Marian"])
def any_swift(request) -> Any:
    return encoder_decoder(request.param, 0)


@pytest.fixture(scope="module")
def swift() -> Any:
    return encoder_decoder("T5", 0)


def right_by(swift: Any) -> np.ndarray:
    """What a linear head can tell: on which side of the middle the mean state lies."""
    features = encoder_features(swift, Encoded(tokenizer(), MANY, None), "pooled")
    side = features @ np.random.default_rng(1).standard_normal(features.shape[1])
    return side > np.median(side)


@pytest.fixture(scope="module")
def right(swift) -> np.ndarray:
    return right_by(swift)


@torch.no_grad()
def scores_of(head: EnergyHead, swift: Any, texts: list[str]) -> np.ndarray:
    batch = Encoded(tokenizer(), texts, None).batch(range(len(texts)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = swift.get_encoder()(**inputs).last_hidden_state
    router = Router(head.fitted.score, threshold=-float("inf"))
    return head.decide(states, inputs["attention_mask"], router).score.numpy()


def test_one_output_learns_where_swift_is_right(any_swift):
    swift, right = any_swift, right_by(any_swift)
    head = fit_energy_head(swift, tokenizer(), MANY, right, epochs=12)
    assert (head.form, head.output.out_features, head.fitted.score) == ("pooled", 1, "logit")
    assert head.fitted.auroc > 0.9
    score = scores_of(head, swift, MANY)
    assert roc_auc_score(right, score) > 0.9
    assert head.fitted.share_right[0] > head.fitted.share_right[-1]
    assert (head.fitted.n, head.fitted.n_validation) == (round(0.8 * len(MANY)), round(0.2 * len(MANY)))
    assert f"{head.fitted.auroc:.3f}" in head.fitted.summary()


def test_classes_and_next_tokens(swift, right):
    classes = np.array([len(text.split()) % 3 for text in MANY])
    head = fit_energy_head(swift, tokenizer(), MANY, classes, right=right, epochs=3)
    assert (head.output.out_features, head.fitted.targets, head.fitted.score) == (3, "class", "energy")
    held_out = np.sort(np.random.default_rng(0).permutation(len(MANY))[: head.fitted.n_validation])
    assert head.fitted.auroc == pytest.approx(roc_auc_score(right[held_out], scores_of(head, swift, MANY)[held_out]))
    assert fit_energy_head(swift, tokenizer(), MANY, classes, epochs=1).fitted.auroc is None

    head = fit_energy_head(swift, tokenizer(), MANY, form="token", right=right, epochs=4)
    assert (head.form, head.output.out_features) == ("token", swift.config.vocab_size)
    assert head.fitted.auroc == pytest.approx(roc_auc_score(right[held_out], scores_of(head, swift, MANY)[held_out]))
    assert head.fitted.validation_loss[-1] < 0.9 * head.fitted.validation_loss[0]


def test_the_loss_is_of_the_weights_that_are_kept(swift, right):
    head = fit_energy_head(swift, tokenizer(), MANY, right, epochs=40, learning_rate=0.5)
    held_out = np.sort(np.random.default_rng(0).permutation(len(MANY))[: head.fitted.n_validation])
    logit = torch.from_numpy(scores_of(head, swift, MANY)[held_out]).double()
    want = torch.nn.functional.binary_cross_entropy_with_logits(logit, torch.from_numpy(right[held_out]).double())
    assert min(head.fitted.validation_loss) == pytest.approx(want.item(), rel=1e-3)
    assert len(head.fitted.validation_loss) == len(head.fitted.train_loss) == 40


def test_a_seed_is_a_head(swift, right):
    weights = [
        fit_energy_head(swift, tokenizer(), MANY, right, epochs=2, seed=seed).output.weight for seed in (3, 3, 4)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("form", ["pooled", "token"])
def test_features_are_each_text_s_own(any_swift, form):
    swift = any_swift
    texts = Encoded(tokenizer(), TEXTS[:20], None)
    features = encoder_features(swift, texts, form, batch_size=3)
    rows = []
    for i in range(len(texts)):
        with torch.no_grad():
            states = swift.get_encoder()(input_ids=torch.tensor([texts.ids[i]])).last_hidden_state[0]
        rows.append(states.mean(0, keepdim=True) if form == "pooled" else states)
    torch.testing.assert_close(torch.from_numpy(features), torch.cat(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["pooled", "token"])
def test_an_interrupted_run_goes_on_where_it_was(swift, form, tmp_path, monkeypatch):
    monkeypatch.setattr("elang.evaluation.features.SAVE_EVERY", 2)
    texts = Encoded(tokenizer(), TEXTS, None)
    want = encoder_features(swift, texts, form, batch_size=8)
    seen = []

    def interrupt(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoder_features(swift, texts, form, cache=tmp_path, batch_size=8, report=interrupt)
    more = []
    got = encoder_features(
        swift, texts, form, cache=tmp_path, batch_size=8, report=lambda done, total: more.append(done)
    )
    assert seen == [8, 16, 24, 32, 40]
    assert more == [40, 48, 56, 64, 72, 80]  # two batches at a time are safe
    assert np.array_equal(got, want)
    assert isinstance(got, np.memmap)
    again = []
    same = encoder_features(swift, texts, form, cache=tmp_path, batch_size=8, report=lambda *done: again.append(done))
    assert np.array_equal(same, want)
    assert again == []
    other = encoder_decoder("T5", 7)
    assert not np.array_equal(encoder_features(other, texts, form, cache=tmp_path, batch_size=8), want)


def test_a_head_is_saved_with_its_record_and_serves_one_encoder(swift, right, tmp_path):
    head = fit_energy_head(swift, tokenizer(), MANY, right, epochs=2)
    head.save(tmp_path / "head")
    loaded = EnergyHead.load(tmp_path / "head")
    assert loaded.fitted == head.fitted
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), head.parameters(), strict=True))
    assert json.loads((tmp_path / "head" / "energy_head.json").read_text())["fitted"]["encoder"] == fingerprint(
        swift.get_encoder()
    )
    router = Router("logit", threshold=0.0)
    GatedSwift(swift, loaded, router)
    with pytest.raises(ValueError, match="head: got one that was fitted on another encoder"):
        GatedSwift(encoder_decoder("T5", 11), loaded, router)
    (tmp_path / "head" / "energy_head.json").write_text('{"form": "pooled"}')
    with pytest.raises(ValueError, match="hidden_size"):
        EnergyHead.load(tmp_path / "head")


def test_a_fingerprint_is_of_the_weights():
    swift = encoder_decoder("T5", 3)
    one = fingerprint(swift)
    assert fingerprint(swift.bfloat16()) == one
    with torch.no_grad():
        next(swift.parameters()).view(-1)[0] += 1
    assert fingerprint(swift) != one


def test_texts_without_a_token_are_left_out(swift, right):
    want = fit_energy_head(swift, tokenizer(), MANY, right, epochs=2)
    got = fit_energy_head(swift, tokenizer(), [*MANY[:7], "", *MANY[7:]], np.insert(right, 7, True), epochs=2)
    torch.testing.assert_close(got.output.weight, want.output.weight, rtol=1e-3, atol=1e-3)


def test_how_long_an_input_may_be():
    words = tokenizer()
    assert longest_input(words, encoder_decoder("T5", 0).config) is None
    assert longest_input(words, encoder_decoder("Bart", 0).config) == 32
    words.model_max_length = 9
    assert longest_input(words, encoder_decoder("Bart", 0).config) == 9


def test_bad_arguments_are_named(right):
    swift, words = encoder_decoder("T5", 0), tokenizer()
    for match, arguments, options in [
        ("targets: got none for the form 'pooled'", (TEXTS,), {}),
        ("targets: got some for the form 'token'", (MANY, right), {"form": "token"}),
        ("form: got 'mean', wanted one of pooled, token", (MANY, right), {"form": "mean"}),
        (r"targets: got float64 \[320\], wanted bool or int \[320\]", (MANY, right * 0.5), {}),
        (r"targets: got bool \[3\], wanted bool or int \[320\]", (MANY, right[:3]), {}),
        ("targets: got nothing but True", (MANY, np.ones(len(MANY), bool)), {}),
        ("targets: got -1, wanted classes from 0 on", (MANY, right * -1), {}),
        (r"right: got int64 \[320\], wanted bool", (MANY, right), {"right": right * 1}),
        ("validation: got 1, wanted a share", (MANY, right), {"validation": 1}),
        ("texts: got 2 with a token, too few", (["a", "", "a"], [True, False, True]), {"validation": 0.01}),
    ]:
        with pytest.raises(ValueError, match=match):
            fit_energy_head(swift, words, *arguments, **options)
    swift.train()  # of this test alone
    with pytest.raises(RuntimeError, match="swift: in training mode"):
        fit_energy_head(swift, words, MANY, right)


def test_rows_to_validate_of_one_kind_are_found_before_anything_is_computed(swift, right, monkeypatch):
    monkeypatch.setattr("elang.head_fitting.encoder_features", lambda *_, **__: pytest.fail("computes states"))
    held_out = np.random.default_rng(0).permutation(len(MANY))[: round(0.2 * len(MANY))]
    alike = np.zeros(len(MANY), bool)
    alike[np.setdiff1d(np.arange(len(MANY)), held_out)[::2]] = True
    message = "got nothing but False in the 64 rows that validate, wanted some of both"
    for name, arguments, options in [
        ("targets", (alike,), {}),
        ("right", (right,), {"right": alike}),
        ("right", (), {"right": alike, "form": "token"}),
    ]:
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            fit_energy_head(swift, tokenizer(), MANY, *arguments, **options)


def test_scores_while_fitting_are_those_of_serving(swift, right):
    """`logit` and token-wise energy by plain PyTorch, from weights that saw scaled features while they were fitted."""
    for arguments, form in (((right,), "pooled"), ((), "token")):
        head = fit_energy_head(swift, tokenizer(), MANY, *arguments, form=form, right=right, epochs=1)
        got = scores_of(head, swift, MANY[:5])
        for i, text in enumerate(MANY[:5]):
            ids = torch.tensor(Encoded(tokenizer(), [text], None).ids)
            with torch.no_grad():
                states = swift.get_encoder()(input_ids=ids).last_hidden_state
            if form == "pooled":
                want = score_logits(head.output(states.mean(1)), "logit")
            else:
                want = vocab_energy(states, head.output.weight, head.output.bias).score
            assert got[i] == pytest.approx(want.item(), rel=1e-4, abs=1e-4)
