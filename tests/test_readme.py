"""The README is true: its code runs as printed, its map names every room, its table every op."""

from __future__ import annotations

import re
from pathlib import Path

import elang

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def table(heading: str) -> list[list[str]]:
    """Cells of the first table after `heading`."""
    lines = README[README.index(heading) :].split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def test_code_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["answer"].logits.shape == (8, 2)
    assert (tmp_path / "calibration.json").exists()
    assert capsys.readouterr().out.rstrip().endswith("exact")


def test_nothing_is_left_to_fill_in():
    assert re.findall(r"@[A-Z]+@", README) == []


def test_files_named_exist():
    named = {path for path in re.findall(r"`((?:csrc|elang|tests|benches|triton_kernels)/[\w./]*)`", README)}
    assert len(named) > 20
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_map_names_every_room():
    rooms = " ".join(row[0] for row in table("## Map"))
    modules = [path.name for path in (ROOT / "elang").glob("*.py") if path.name != "__init__.py"]
    packages = [path.parent.name for path in (ROOT / "elang").glob("*/__init__.py")]
    assert [name for name in modules + packages if name not in rooms] == []


def test_every_op_has_a_row():
    ops = " ".join(row[0] for row in table("One op, one row"))
    public = [name for name in elang.__all__ if getattr(elang, name).__module__ == "elang.ops" and name != "warmup"]
    assert len(public) >= 4
    assert [name for name in public if f"`{name}`" not in ops] == []
