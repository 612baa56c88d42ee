"""What became of every row of a soak: who asked for what, and everything in the answers that is not as it is due."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import numpy as np
from telling import BETWEEN, FAULT_EVERY, UNSURE, Seen, Told, third

SIZES = (1, 2, 4, 8, 16)  # rows of a request
CANCELLED, HURRIED = 0.03, 0.1  # shares of the requests
DEADLINES = (2e-4, 5e-3)  # seconds, of hurried ones


@dataclass(frozen=True)
class Part:
    """A stretch of a soak, and what happens in it."""

    name: str
    rows: range
    moves: bool = False  # the threshold
    fails: bool = False  # Super, now and then


def parts_of(rows: int) -> list[Part]:
    """Most rows are of the first."""
    first, second = 1 + round(0.7 * rows), 1 + round(0.85 * rows)
    return [
        Part("steady", range(1, first)),
        Part("threshold moves", range(first, second), moves=True),
        Part("Super fails", range(second, rows + 1), fails=True),
    ]


class Asked(NamedTuple):
    """A request."""

    part: Part
    rows: range
    deadline: float | None  # seconds
    cancelled: bool  # by its client, if it is not too late


def requests(part: Part, client: int, clients: int) -> Iterator[Asked]:
    """Those of one of so many clients, who between them ask for each row of the part once."""
    chance, size = random.Random(client), len(part.rows)
    start, stop = (part.rows.start + size * i // clients for i in (client, client + 1))
    while start < stop:
        end = min(start + chance.choice(SIZES), stop)
        deadline = chance.uniform(*DEADLINES) if chance.random() < HURRIED else None
        yield Asked(part, range(start, end), deadline, chance.random() < CANCELLED)
        start = end


def problem(row: int, told: Told, asked: Asked) -> str | None:
    """What is wrong with an answer to this row."""
    part, unsure = asked.part, third(row) == UNSURE
    may_be_routed = unsure or (part.moves and third(row) == BETWEEN)
    broken = part.fails and row % FAULT_EVERY == 0
    if told.row != row:
        return "swapped"
    if told.model == "super":
        due = may_be_routed and not broken and not told.degraded
    elif told.degraded:
        due = may_be_routed and (part.fails or asked.deadline is not None)
    else:
        due = not unsure
    return None if due and told.by == told.model else "not by the model that is due"


class Ledger:
    """Of the rows 1 to N. Threads share it."""

    def __init__(self, rows: int) -> None:
        # Filled, not zeroed by the system when they are first written: the memory of a soak is to be flat.
        self._asked, self._outcomes = (np.full(rows + 1, 0, dtype=np.uint8) for _ in range(2))
        self.counts = Counter[str]()
        self.problems = Counter[str]()
        self.ended = 0  # rows
        self.broken = False  # a request has gone unanswered: nobody is to wait for more
        self._lock = Lock()

    def asks(self, asked: Asked) -> None:
        with self._lock:
            self._asked[_slice(asked.rows)] += 1
            self.counts["requests"] += 1
            self.counts["rows"] += len(asked.rows)

    def answered(self, asked: Asked, answers: Sequence[Told]) -> None:
        problems = [problem(*pair, asked) for pair in zip(asked.rows, answers, strict=False)]
        with self._lock:
            if len(answers) != len(asked.rows):
                self.problems["too many or too few answers"] += 1
            for told in answers:
                self.counts["degraded" if told.degraded else told.model] += 1
            self.problems.update(filter(None, problems))
            self._end(asked)

    def ends(self, asked: Asked, how: str, *, due: bool = True) -> None:
        """By no answer: cancelled, say."""
        with self._lock:
            self.counts[how] += len(asked.rows)
            if not due:
                self.problems[f"{how}, and was not to be"] += len(asked.rows)
            self._end(asked)

    def refused(self, asked: Asked) -> None:
        """For want of room; it will be asked for again."""
        with self._lock:
            self.counts["refused"] += len(asked.rows)

    def gone(self) -> None:
        """No answer came in the time that a client waits."""
        self.broken = True

    def close(self, seen: Seen) -> None:
        """Once no request is under way: what was lost, and what was done twice."""
        self.problems["not asked"] += int((self._asked[1:] == 0).sum())
        self.problems["lost"] += int(((self._asked > 0) & (self._outcomes == 0)).sum())
        twice = (self._asked > 1) | (self._outcomes > 1) | (seen["swift"][: len(self._asked)] > 1)
        self.problems["doubled"] += int((twice | (seen["super"][: len(self._asked)] > 1))[1:].sum())
        self.problems += Counter()  # those that there are none of

    def _end(self, asked: Asked) -> None:
        self._outcomes[_slice(asked.rows)] += 1
        self.ended += len(asked.rows)


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)


def slope(samples: Sequence[tuple[int, float]], warm_up: float = 0.2) -> float:
    """The least-squares slope of (rows, MiB) pairs for 100 000 rows; the first rows, as a share, are left out."""
    rows, memory = np.array(samples, dtype=np.float64).T
    late = rows >= warm_up * rows[-1]
    return float(np.polyfit(rows[late], memory[late], 1)[0] * 1e5)
