from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from elang.demo import train
from elang.demo.data import ENCODER
from elang.store import kept, key_of, published

MOVIE_REVIEWS = "208ae2e72a926f3825cd0f0800326be270a142f161473090c44b8c94335a7890"  # `Dataset.sha256`


@pytest.mark.parametrize("before", [False, True])
def test_an_interrupted_save_leaves_what_was_there(tmp_path, before):
    if before:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "old.json").write_text("{}")
        (tmp_path / "file").write_text("old")
    was = sorted(tmp_path.rglob("*"))

    def interrupted(name, write):
        with published(tmp_path / name) as unfinished:
            write(unfinished)
            raise KeyboardInterrupt

    def folder(unfinished):
        unfinished.mkdir()
        (unfinished / "config.json").write_text("{}")

    for name, write in (("model", folder), ("file", lambda unfinished: unfinished.write_text("new"))):
        with pytest.raises(KeyboardInterrupt):
            interrupted(name, write)
    assert sorted(tmp_path.rglob("*")) == was
    assert not before or (tmp_path / "file").read_text() == "old"


def test_what_is_complete_takes_the_place_of_what_was_there(tmp_path):
    for name in ("old", "new"):
        with published(tmp_path / "model") as folder:
            folder.mkdir()
            (folder / name).write_text("{}")
        with published(tmp_path / "file") as file:
            file.write_text(name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "model", "new"]
    assert (tmp_path / "file").read_text() == "new"


def test_what_is_kept_is_computed_once(tmp_path):
    computed = []

    def compute():
        computed.append(len(computed))
        return {"logits": np.eye(2, dtype=np.float32)}

    first, again = (kept(tmp_path / "answers.safetensors", compute) for _ in range(2))
    assert computed == [0]
    np.testing.assert_array_equal(first["logits"], np.eye(2))
    np.testing.assert_array_equal(again["logits"], first["logits"])


def test_the_demo_still_finds_what_it_trained():
    super_key = key_of(MOVIE_REVIEWS, ENCODER.sha256, train.MAX_LENGTH, asdict(train.SUPER))
    swift_key = key_of(super_key, train.TEACHER_TEMPERATURE, asdict(train.SWIFT))
    assert (super_key, swift_key) == ("8c82ffd69d2fd92b", "4eb3750a5c3793f9")
