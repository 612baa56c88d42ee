from __future__ import annotations

import pytest
import tiny_models

from elang.evaluation.flops import row_flops


def bert_flops(config, length: int) -> int:
    """Two per multiply-add: projections and feed-forward per token, attention per pair of tokens, pooler, head."""
    h, inner = config.hidden_size, config.intermediate_size
    layer = 2 * length * (4 * h * h + 2 * h * inner) + 2 * 2 * length * length * h
    return config.num_hidden_layers * layer + 2 * h * h + 2 * h * config.num_labels


def test_each_row_is_counted_at_its_own_length():
    model = tiny_models.classifier("Bert", num_hidden_layers=3)
    lengths = [9, 1, 5, 9]
    assert row_flops(model, lengths).tolist() == [bert_flops(model.config, length) for length in lengths]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_is_counted(family):
    short, long = row_flops(tiny_models.classifier(family), [2, 8])
    assert 0 < short < long


def test_the_model_is_left_as_it_is():
    model = tiny_models.classifier("Bert")
    before = model.config._attn_implementation
    row_flops(model, [4])
    assert before != "eager"
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("lengths", [[0, 3], [[3]], 3])
def test_other_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths: got"):
        row_flops(tiny_models.classifier("Bert"), lengths)
