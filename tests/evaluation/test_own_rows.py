from __future__ import annotations

import pytest

from elang.evaluation.own_rows import read_rows

DEFAULT = ("LABEL_0", "LABEL_1")


def file(folder, text):
    path = folder / "mine.csv"
    path.write_bytes(text.encode())
    return path


def test_labels_are_the_models_in_their_order(tmp_path):
    path = file(tmp_path, '\ufefftext,label,more\r\n"a, b",Good,1\r\n c ,BAD,2\r\n')
    task, rows = read_rows(path, ["good", "so-so", "bad"])
    assert (task.name, task.labels, task.metrics) == ("mine.csv", ("good", "so-so", "bad"), ("accuracy",))
    assert rows.texts == (("a, b",), ("c",))
    assert rows.targets.tolist() == [0, 2]
    assert rows.ids == ("line 2", "line 3")


def test_default_labels_stand_for_those_of_the_file_sorted(tmp_path):
    task, rows = read_rows(file(tmp_path, "label,text,text2\nyes,a,b\nno,c,d\n"), DEFAULT)
    assert (task.labels, rows.targets.tolist()) == (("no", "yes"), [1, 0])
    assert rows.texts == (("a", "b"), ("c", "d"))


def test_rows_without_labels(tmp_path):
    task, rows = read_rows(file(tmp_path, "text\na\nb\n"), ["x", "y"])
    assert (task.labels, rows.targets.tolist()) == (("x", "y"), [-1, -1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"mine.csv: got the columns \(none\), wanted text and label"),
        ("sentence,label\na,x\n", "mine.csv: got the columns sentence, label, wanted text and label"),
        ("text,label\n", "mine.csv: got no rows"),
        ("text,label\na,x\n,y\n", "mine.csv, line 3: got no text"),
        ("text,label\na,\n", "mine.csv, line 2: got no label"),
        ("text,label\na,z\n", "mine.csv, line 2: got the label 'z', wanted one of x, y"),
        ('text,label\n"a,x\n', "wanted comma-separated values in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_by_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(file(tmp_path, text), ["x", "y"])


def test_another_encoding_is_refused(tmp_path):
    (tmp_path / "mine.csv").write_bytes("text,label\né,x\n".encode("latin-1"))
    with pytest.raises(ValueError, match="wanted comma-separated values in UTF-8"):
        read_rows(tmp_path / "mine.csv", ["x", "y"])
