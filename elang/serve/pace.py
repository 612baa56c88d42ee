"""How fast routed rows come and how long Super takes: what a batcher plans by."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW = 9  # calls of Super, whose median is taken: four that were held up do not move it
MEMORY = 10.0  # seconds that a call tells something: a Super thought too slow to be asked is asked again after them
LULL = 0.1  # seconds in which the memory of arrivals fades to 1 / e; some dozens of usual waits


class Pace:
    """Estimates that follow Super and the traffic. All times are of the caller's clock; nothing here reads one."""

    def __init__(self) -> None:
        self._calls: dict[int, deque[tuple[float, int, float]]] = {}  # by power of two: when, rows, seconds
        self._known: list[tuple[int, float, float]] = []  # power of two, and the medians of rows and seconds; ascending
        self._last_call = -math.inf
        self._arrivals = 0.0  # faded count
        self._last_arrival = -math.inf

    def arrived(self, now: float, rows: int) -> None:
        """So many rows were routed just now."""
        self._arrivals = self._faded(now) + rows
        self._last_arrival = now

    def gap(self, now: float) -> float:
        """Seconds until the next routed row, as they have come of late; infinite after a long silence."""
        arrivals = self._faded(now)
        return LULL / arrivals if arrivals else math.inf

    def took(self, now: float, rows: int, seconds: float) -> None:
        """A call of Super on so many rows came back just now."""
        self._calls.setdefault(_power(rows), deque(maxlen=WINDOW)).append((now, rows, seconds))
        self._last_call = now
        self._known = []
        for power, calls in sorted(self._calls.items()):
            while calls and calls[0][0] < now - MEMORY:
                calls.popleft()
            if calls:
                _, sizes, times = zip(*calls, strict=True)
                self._known.append((power, median(sizes), median(times)))

    def seconds(self, rows: int, now: float) -> float:
        """How long Super will take for so many rows.

        The median of its last calls of about that size, up to the next power of two; else of the next larger ones; else
        that of the largest, in proportion. 0 where nothing is known: it is tried.
        """
        if now - self._last_call > MEMORY:
            return 0.0
        power = _power(rows)
        for known, _, seconds in self._known:
            if power <= known:
                return seconds
        _, size, seconds = self._known[-1]
        return seconds * rows / size

    def call_cost(self, now: float) -> float:
        """Seconds that a call of Super costs whatever its rows: the line through its smallest and largest calls, at 0
        rows. 0 where only one size is known.
        """
        if now - self._last_call > MEMORY or len(self._known) < 2:
            return 0.0
        (_, few, short), (_, many, long) = self._known[0], self._known[-1]
        return max(0.0, short - few * max(0.0, long - short) / (many - few))

    def waiting_pays(self, rows: int, now: float) -> bool:
        """Whether so many routed rows, with Super idle, should wait for one more.

        It would come in `gap` seconds, by which each of the rows is delayed; it would save a call, and with it the time
        that a call costs whatever its rows. So: iff rows * gap < call_cost. Where traffic is thin, or Super's time goes
        with its rows as on a CPU, nobody waits; where Super is busy rows gather without anyone's waiting.
        """
        return rows * self.gap(now) < self.call_cost(now)

    def _faded(self, now: float) -> float:
        return self._arrivals * math.exp((self._last_arrival - now) / LULL) if self._arrivals else 0.0


def _power(rows: int) -> int:
    """The exponent of the next power of two: 0 for 1, 1 for 2, 2 for 3 and 4, 3 for 5 to 8."""
    return (rows - 1).bit_length()
