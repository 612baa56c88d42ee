from __future__ import annotations

import io

from rich.console import Console

from elang import progress


def drawn(terminal: bool, shown: bool = True) -> str:
    out = io.StringIO()
    with progress.bar("work", shown, Console(file=out, force_terminal=terminal, width=80)) as report:
        for done in range(4):
            report(done + 1, 4)
    return out.getvalue()


def test_a_bar_is_for_a_terminal_and_for_what_takes_long(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    text = drawn(terminal=True)
    assert "work" in text
    assert "4/4" in text
    assert drawn(terminal=False) == drawn(terminal=True, shown=False) == ""
    monkeypatch.setattr(progress, "PATIENCE", 60.0)
    assert drawn(terminal=True) == ""
