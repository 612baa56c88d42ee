"""`elang demo seq2seq`: how words are said, by two encoder-decoders and the gates between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

import elang
from elang import backend
from elang.calibration import GateCalibration, Provenance, calibrate_gates
from elang.demo import measure_words, report_words
from elang.demo.measure_words import Sources
from elang.demo.store import cache_folder
from elang.demo.train_words import MAX_NEW_TOKENS, WordPair, load, train_word_pair
from elang.demo.words import Dictionary, Words, pronunciations
from elang.demo.workers import prepared
from elang.energy_head import EnergyHead
from elang.evaluation.predict import Encoded
from elang.fingerprint import fingerprint
from elang.gated import GatedSwift
from elang.head_fitting import fit_energy_head
from elang.progress import Report
from elang.router import Router

MAX_DROP = 0.02
HEAD, LENGTH = "head", "word length"


def run(out: Path, words: Dictionary | None = None, console: Console | None = None) -> GateCalibration:
    """The whole demo; prints its tables and writes the calibration, the head and the plots into `out`.

    Sets torch to one thread, which every time is measured on.

    Args:
        words: in place of the CMU Pronouncing Dictionary's.

    Raises:
        RuntimeError, ValueError: the dictionary could not be fetched, or is not the one expected.
    """
    console = console or Console()
    with prepared(console) as progress:
        task = progress.add_task("data", total=None)
        words = words or pronunciations(cache_folder())
        progress.update(task, total=1, completed=1)
        pair = train_word_pair(words, cache_folder(), progress)
        swift, tokenizer = load(pair.swift)
        super_, _ = load(pair.super_)
        head = _head(swift, tokenizer, pair, words)
        parts = {
            name: _sources(pair, swift, tokenizer, head, getattr(words, name), name) for name in ("calibration", "test")
        }
        texts = Encoded(tokenizer, words.test.spelt, None)
        costs = {
            size: measure_words.costs(
                swift, super_, head, texts, size, _reporter(progress, f"time of each part, batch {size}")
            )
            for size in measure_words.TIMED_ROWS
        }
        provenance = Provenance(
            swift=str(pair.swift),
            super=str(pair.super_),
            swift_sha256=fingerprint(swift),
            super_sha256=fingerprint(super_),
            data="CMU Pronouncing Dictionary, calibration words",
            data_sha256=words.sha256,
            dtype=str(swift.dtype).removeprefix("torch."),
            backend=backend.served("route", "cpu").backend,
            library=elang.__version__,
        )
        held = parts["calibration"]
        by_size = {
            size: calibrate_gates(
                {HEAD: held.early[HEAD]},
                held.late,
                held.swift_exact,
                held.super_exact,
                of_size,
                max_drop=MAX_DROP,
                provenance=provenance,
            )
            for size, of_size in costs.items()
        }
        gates = by_size[max(by_size)]
        reporter = _reporter(progress, "wall-clock: all systems in alternation")
        ways = measure_words.systems(gates)
        rows = measure_words.figures(ways, swift, super_, head, texts, parts["test"], reporter)

    out.mkdir(parents=True, exist_ok=True)
    head.save(out / "energy_head")
    for size, chosen in by_size.items():
        chosen.save(out / f"gates-batch-{size}.json")
        chosen.plot(out / f"gates-batch-{size}.png")
    report_words.plot(parts["test"], out / "words.png")
    for rendered in (
        report_words.scores(parts["test"], LENGTH),
        *(report_words.gating(chosen, parts["test"]) for chosen in by_size.values()),
        report_words.systems(rows, costs),
    ):
        console.print(rendered, "")
    console.print(report_words.meaning(rows, gates, parts["test"]))
    written = ", ".join(sorted(path.name for path in out.iterdir()))
    console.print(f"\n[bold]What next?[/bold]\nIn {out.resolve()}: {written}\n")
    console.print(
        report_words.next_steps(pair.swift, pair.super_, out.resolve(), gates),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return gates


def _head(swift: Any, tokenizer: Any, pair: WordPair, words: Dictionary) -> EnergyHead:
    """Tells where Swift says what Super says, from words that neither has learnt: there they agree more often."""
    ours, theirs = pair.swift_answers["head"].texts, pair.super_answers["head"].texts
    agree = [a == b for a, b in zip(ours, theirs, strict=True)]
    cache = cache_folder() / "features"
    return fit_energy_head(swift, tokenizer, words.head.spelt, agree, cache=cache, batch_size=128, progress=False)


@torch.no_grad()
def _sources(pair: WordPair, swift: Any, tokenizer: Any, head: EnergyHead, words: Words, part: str) -> Sources:
    router, texts = Router("logit", threshold=-np.inf), Encoded(tokenizer, words.spelt, None)
    early: NDArray[np.float32] = np.empty(len(words), dtype=np.float32)
    gated = GatedSwift(swift, head, router)
    for rows in texts.by_length(128):
        batch = measure_words.inputs(texts, rows)
        early[rows] = head.decide(gated.encode(batch), batch["attention_mask"], router).score.numpy()
    ours, theirs = pair.swift_answers[part], pair.super_answers[part]
    return Sources(
        early={HEAD: early, LENGTH: -np.array([len(word) for word in words.spelt], dtype=np.float32)},
        late=ours.late,
        swift_exact=words.exact(ours.texts),
        super_exact=words.exact(theirs.texts),
        swift_errors=words.errors(ours.texts),
        super_errors=words.errors(theirs.texts),
        swift_tokens=_tokens(ours.texts),
        super_tokens=_tokens(theirs.texts),
    )


def _tokens(answers: list[str]) -> NDArray[np.int64]:
    """Of each answer, with the end of sequence that fits."""
    return np.minimum([len(answer.split()) + 1 for answer in answers], MAX_NEW_TOKENS)


def _reporter(progress: Progress, title: str) -> Report:
    task = progress.add_task(title, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)
