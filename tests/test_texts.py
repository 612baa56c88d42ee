from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elang.texts import read_texts, split


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", 'one\r\n\n  \ntwo\u2028, "three"', [("one",), ('two\u2028, "three"',)]),
        ("a.csv", 'id,text\n1,"one, two"\n\n2,"a\nb"\n', [("one, two",), ("a\nb",)]),
        ("a.csv", "text2,text\nsecond,first\n", [("first", "second")]),
        ("a.jsonl", '{"text": "one", "id": 1}\n\n{"text": "two"}\n', [("one",), ("two",)]),
        ("a.jsonl", '{"text2": "second", "text": "first"}', [("first", "second")]),
    ],
)
def test_texts_are_read(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_texts(tmp_path / name) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"text\none\n", r"a.tsv: got a file named so, wanted one that ends in .txt, .csv, .jsonl"),
        ("a.txt", b" \n\n", "a.txt: got 0 texts, wanted at least 1"),
        ("a.csv", b"text\n", "a.csv: got 0 texts"),
        ("a.jsonl", b"", "a.jsonl: got 0 texts"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "a.txt: got .*, wanted .txt in UTF-8"),
        ("a.csv", "text\ncaf\u00e9\n".encode("latin-1"), "a.csv: got .*, wanted .csv in UTF-8"),
        ("a.csv", b'text\n"' + b"a" * 200_000 + b'"\n', "a.csv: got field larger than field limit"),
        ("a.csv", b"sentence,label\none,1\n", "a.csv, line 2: got the fields sentence, label, wanted text"),
        ("a.csv", b"text\none\ntwo, three\n", "a.csv, line 3: got more than 1 values: a text with a comma"),
        ("a.csv", b"text,text2\na,b\nc\n", "a.csv, line 3: got None as text2, wanted a text"),
        ("a.csv", b"id,text\n1,one\n2, \n", "a.csv, line 3: got ' ' as text, wanted a text"),
        ("a.jsonl", b'{"text": "one"}\nhello\n', "a.jsonl, line 2: got .*, wanted a JSON object"),
        ("a.jsonl", b'{"text": "one"}\n{"text": 7}\n', "a.jsonl, line 2: got 7 as text, wanted a text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a", "text2": "b"}\n', "line 2: got text and text2, wanted text as in"),
        ("a.jsonl", b'{"text": "a", "text2": "b"}\n{"text": "a"}\n', "line 2: got text, wanted text and text2 as in"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)


def test_the_fewest_texts_are_what_the_caller_wants(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n", "utf-8")
    assert len(read_texts(file, fewest=2)) == 2
    with pytest.raises(ValueError, match=r"a.txt: got 2 texts, wanted at least 3"):
        read_texts(file, fewest=3)


@given(
    st.lists(st.sampled_from(["a", "A", "a!", "b a", "b  A", ".", "!"]), min_size=50, max_size=120), st.integers(0, 5)
)
def test_a_split_holds_every_distinct_text_once(words, seed):
    texts = [(str(i % 50), word) for i, word in enumerate(words)]
    lessons, held_out = split(texts, seed=seed)
    both = [*lessons.tolist(), *held_out.tolist()]
    alike = {}
    for place, (number, word) in enumerate(texts):
        alike.setdefault(
            (number, " ".join("".join(c if c.isalnum() else " " for c in word.lower()).split()) or word), place
        )
    assert sorted(both) == sorted(alike.values())
    assert len(held_out) == len(alike) // 10
    assert [part.tolist() for part in split(texts, seed=seed)] == [lessons.tolist(), held_out.tolist()]


def test_a_split_is_drawn_by_its_seed_and_holds_out_2000_at_most():
    texts = [(str(i),) for i in range(25_000)]
    parts = [split(texts, seed=seed)[1] for seed in (0, 1)]
    assert [len(part) for part in parts] == [2_000, 2_000]
    assert len(np.intersect1d(*parts)) < 400  # 160 expected
