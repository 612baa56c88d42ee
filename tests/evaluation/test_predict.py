from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from conftest import assert_accurate
from demo_models import TEXTS, tokenizer

from elang import reference
from elang.evaluation.predict import CLASSIFIER_SCORES, Encoded, predict, predict_scored


@pytest.fixture
def texts():
    return Encoded(tokenizer(), TEXTS[:11], max_length=8)


def test_encoded_rows_are_cut_and_padded_to_the_longest_of_the_batch(texts):
    assert texts.lengths.max() == 8
    rows = [0, 3, 1]
    batch = texts.batch(rows)
    assert batch["attention_mask"].sum(dim=1).tolist() == texts.lengths[rows].tolist()
    assert batch["input_ids"].shape == (3, texts.lengths[rows].max())


def test_batches_by_length_hold_every_row_once(texts):
    batches = list(texts.by_length(4))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert sorted(np.concatenate(batches)) == list(range(11))
    assert (np.diff(texts.lengths[np.concatenate(batches)]) >= 0).all()


def test_noise_changes_the_batches(texts):
    noise = np.linspace(100, 0, 11)
    assert np.concatenate(list(texts.by_length(4, noise))).tolist() == list(range(10, -1, -1))


def test_predictions_come_in_the_order_of_the_texts(texts):
    model = tiny_models.classifier()
    seen = []
    logits = predict(model, texts, batch_size=4, report=lambda done, total: seen.append((done, total)))
    with torch.no_grad():
        alone = torch.cat([model(**texts.batch([i])).logits for i in range(11)])
        truth = torch.cat([tiny_models.float64_logits(model, **texts.batch([i])) for i in range(11)])
    assert logits.dtype == np.float32
    assert_accurate(torch.from_numpy(logits), alone, truth)
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_scores_are_those_of_the_op(texts):
    model = tiny_models.classifier()
    logits, scores = predict_scored(model, texts, temperatures=[1.5], batch_size=4)
    with torch.no_grad():
        eager = torch.cat([model(**texts.batch([i])).logits for i in range(11)])
        truth = torch.cat([tiny_models.float64_logits(model, **texts.batch([i])) for i in range(11)])
    assert_accurate(torch.from_numpy(logits), eager, truth)
    assert tuple(scores) == CLASSIFIER_SCORES
    for name, values in scores.items():
        score = reference.score_logits
        assert_accurate(torch.from_numpy(values), score(eager, name, 1.5), score(truth, name, 1.5))


def test_a_swift_that_hides_its_head_is_scored_by_its_logits(texts):
    model = tiny_models.classifier()
    expected = predict_scored(model, texts)
    logits, scores = predict_scored(lambda **batch: model(**batch), texts)
    np.testing.assert_allclose(logits, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores["energy"], expected[1]["energy"], rtol=1e-5, atol=1e-5)
