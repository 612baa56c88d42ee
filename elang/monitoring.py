"""Watching a joint model at work: its scores, a shadow sample of Super, and a share of Super to hold."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elang.calibration import Calibration
from elang.calibration.bounds import Counts, Floats
from elang.drift import Bins, DriftReport, Totals, compare, kept_at_edges

if TYPE_CHECKING:
    from elang.dispatch import Routing
    from elang.reference import Route
    from elang.router import Router

_log = logging.getLogger(__name__)


class _OnDevice(NamedTuple):
    edges: Tensor  # [P] float32
    counters: Tensor  # [P + 4] int64: the histogram, routed, shadow rows, shadow disagreements
    generator: torch.Generator


class Monitor:
    """Counts the scores of the rows that a joint model answers, and compares them with its calibration when asked.

    Counters lie where the scores do. Nothing that counts waits for a device, but the first call on each, which makes
    the counters there. Threads may share a monitor; two calls on several CUDA streams are for the caller to order.
    For eager code: outside of what is compiled or captured.

    Args:
        calibration: of the router that decides. Its scores have to come from the models, dtype and backend that serve.
        psi_limit: a population stability index above this is drift, if chance alone would not make it as large. 0.2 is
            a rule of thumb, no test; by chance the index is about (1/rows + 1/calibration rows) times a chi-square
            variable with (bins - 1) degrees of freedom (Yurdakul 2018).
        significance: a KS p-value below this is drift; in (0, 0.5]. It is that of one read: many reads, of a window
            that grows or of many, have more false alarms.
        seed: of the shadow sample.

    Raises:
        TypeError, ValueError: an argument that is not as described, by its name.
    """

    def __init__(
        self, calibration: Calibration, *, psi_limit: float = 0.2, significance: float = 0.01, seed: int = 0
    ) -> None:
        if not isinstance(calibration, Calibration):
            raise TypeError(f"calibration: got {type(calibration).__name__}, wanted Calibration")
        if not 0 < psi_limit < math.inf:
            raise ValueError(f"psi_limit: got {psi_limit}, wanted a finite number > 0")
        if not 0 < significance <= 0.5:
            raise ValueError(f"significance: got {significance}, wanted a probability in (0, 0.5]")
        self.calibration = calibration
        self.bins = Bins.of(calibration)
        self.psi_limit = psi_limit
        self.significance = significance
        self.seed = seed
        self._devices: dict[torch.device, _OnDevice] = {}
        self._lock = threading.Lock()
        self._window_lock = threading.Lock()
        self._window_start = self._sums()
        self._crossed: frozenset[str] = frozenset()

    def update(self, routing: Routing | Route) -> None:
        """Count the rows of a batch, by the `.routing` of the answer to it or by what a router returned."""
        self.add(routing.score, routing.n_routed)

    @torch.no_grad()
    def add(self, score: Tensor | Sequence[float], n_routed: Tensor | int) -> None:
        """Count rows by their scores [N] of any float dtype and the number that was routed, [1] or an int.

        Of a pipeline's answers: `[a["energy"] for a in answers]` and how many have "super" for their `model`.
        Synchronizes: no.
        """
        if not isinstance(score, Tensor):
            score = torch.tensor(score, dtype=torch.float32, device="cpu")
        if score.dim() != 1 or not score.dtype.is_floating_point:
            raise ValueError(f"score: got {score.dtype} {list(score.shape)}, wanted floats [N]")
        if isinstance(n_routed, Tensor):
            if n_routed.numel() != 1 or n_routed.dtype.is_floating_point or n_routed.device != score.device:
                got = f"{n_routed.dtype} {list(n_routed.shape)} on {n_routed.device}"
                raise ValueError(f"n_routed: got {got}, wanted an integer [1] on {score.device} like score")
        elif not (isinstance(n_routed, Integral) and 0 <= n_routed <= len(score)):
            raise ValueError(f"n_routed: got {n_routed!r}, wanted a whole number from 0 to N = {len(score)}")
        on = self._on(score.device)
        # NaN is past every edge, as in numpy: no look at what is finite.
        bins = torch.bucketize(score.float().contiguous(), on.edges, right=True)
        ones = torch.ones_like(bins)
        with self._lock:
            on.counters.index_add_(0, bins, ones)
            on.counters[-3:-2].add_(n_routed)

    @torch.no_grad()
    def shadow_rows(self, routing: Routing | Route, share: float) -> Tensor:
        """[N] bool: each row that Swift keeps with probability `share`, in (0, 1], to be sent to Super as well.

        The same calls in the same order pick the same rows. Synchronizes: no.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share: got {share}, wanted a share in (0, 1]")
        order = routing.order
        on = self._on(order.device)
        with self._lock:
            draw = torch.rand(order.shape, generator=on.generator, device=order.device)
        kept = torch.arange(len(order), device=order.device) >= routing.n_routed
        return torch.zeros_like(kept).scatter(0, order, kept & (draw < share))

    @torch.no_grad()
    def add_shadow(self, disagree: Tensor | Sequence[bool]) -> None:
        """Count rows that `shadow_rows` picked by whether Super answers otherwise than Swift, [K] bool.

        Synchronizes: no.
        """
        if not isinstance(disagree, Tensor):
            disagree = torch.tensor(disagree, dtype=torch.bool, device="cpu")
        if disagree.dim() != 1 or disagree.dtype != torch.bool:
            raise ValueError(f"disagree: got {disagree.dtype} {list(disagree.shape)}, wanted bool [K]")
        on = self._on(disagree.device)
        disagreements = disagree.sum()
        with self._lock:
            on.counters[-2:-1].add_(len(disagree))
            on.counters[-1:].add_(disagreements)

    def totals(self) -> Totals:
        """Synchronizes: yes, with every device that counts."""
        return _totals(self._sums())

    def read(self, *, restart: bool = False) -> DriftReport:
        """Compare the window with the calibration. Logs a warning when a measure passes its limit since the last read.

        Args:
            restart: begin the next window, behind the rows that this read has seen. Old rows dilute drift: restart
                after as many rows as it takes to judge, some thousand say. The shadow sample begins anew too;
                `totals` has all of it.

        Synchronizes: yes, with every device that counts.
        """
        with self._window_lock:
            sums = self._sums()
            report = compare(
                self.calibration, self.bins, _totals(sums - self._window_start), self.psi_limit, self.significance
            )
            if restart:
                self._window_start = sums
            crossed = frozenset(report.crossed)
            if crossed - self._crossed:
                _log.warning(report.summary())
            self._crossed = crossed
        return report

    def _on(self, device: torch.device) -> _OnDevice:
        on = self._devices.get(device)
        if on is None:
            with self._lock, torch.inference_mode(False):  # it is written to later, in whatever mode
                edges = torch.from_numpy(self.bins.edges).to(device)
                counters = torch.zeros(len(edges) + 4, dtype=torch.int64, device=device)
                generator = torch.Generator(device).manual_seed(self.seed)
                on = self._devices.setdefault(device, _OnDevice(edges, counters, generator))
        return on

    def _sums(self) -> Counts:
        with self._lock:
            counters = [on.counters.clone() for on in self._devices.values()]
        zeros = np.zeros(len(self.bins.edges) + 4, dtype=np.int64)
        return sum((each.cpu().numpy() for each in counters), zeros)


def _totals(sums: Counts) -> Totals:
    return Totals(sums[:-3], *sums[-3:].tolist())


class BudgetController:
    """Moves a router's threshold so that, of the traffic as it is now, a given share goes to Super.

    The histogram of all scores tells how many rows any threshold would route, whatever the threshold is: nothing feeds
    back, so nothing can oscillate. It is that of the monitor, where a row counts half after `half_life` others, and
    begins as the calibration's. The threshold taken is the highest bin edge within the limits that routes at most the
    share, else the lowest one. It is left where it routes more than the share by up to `tolerance`, or where another
    would add no more than that.
    What the calibration has proven holds for its own threshold. With limits up to that one, the controller only ever
    gives up quality, and only to keep within the share. The share is of the router's decisions: a late gate adds to it.

    Args:
        router: whose threshold moves, at once and with each `step`; nobody else is to move it.
        monitor: that counts what this router decides.
        max_super_share: the share of rows, in [0, 1].
        limits: lowest and highest threshold.
        half_life: in rows, > 0.
        tolerance: in shares, >= 0.

    Raises:
        ValueError: an argument that is not as described, by its name; limits without a bin edge between them; a router
            with another score or temperature than the calibration's.
    """

    def __init__(
        self,
        router: Router,
        monitor: Monitor,
        max_super_share: float,
        *,
        limits: tuple[float, float],
        half_life: float = 2000.0,
        tolerance: float = 0.01,
    ) -> None:
        c, bins = monitor.calibration, monitor.bins
        if (router.score, router.temperature) != (c.score, c.temperature):
            got = f"{router.score} at temperature {router.temperature:g}"
            raise ValueError(f"router: got {got}, wanted {c.score} at {c.temperature:g}, as in the calibration")
        if not 0 <= max_super_share <= 1:
            raise ValueError(f"max_super_share: got {max_super_share}, wanted a share in [0, 1]")
        if not 0 < half_life < math.inf:
            raise ValueError(f"half_life: got {half_life}, wanted a finite number of rows > 0")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance: got {tolerance}, wanted a share in [0, 1)")
        self._within = np.flatnonzero((bins.edges >= limits[0]) & (bins.edges <= limits[1]))
        if not self._within.size:
            raise ValueError(f"limits: got {limits}, wanted low <= high with a bin edge of the monitor between them")
        self.router = router
        self.monitor = monitor
        self.max_super_share = max_super_share
        self.limits = limits
        self.half_life = half_life
        self.tolerance = tolerance
        self._lock = threading.Lock()
        self._seen = monitor.totals()
        of_calibration = -np.diff(np.concatenate(([c.n], bins.kept, [0])))
        # As much as there is in the long run, when of each row half is left after half_life others.
        self._traffic: Floats = of_calibration / c.n * half_life / math.log(2)
        self._place: int | None = None  # of the threshold among the edges
        self.threshold = router.threshold.item()
        self._move()

    def step(self) -> float:
        """Take in the rows since the last step and move the threshold if need be; the threshold from here on.

        Synchronizes: yes, with every device that counts. Call it now and then, not with every batch.
        """
        with self._lock:
            totals = self.monitor.totals()
            new = totals.histogram - self._seen.histogram
            self._traffic = self._traffic * 0.5 ** (new.sum() / self.half_life) + new
            self._seen = totals
            return self._move()

    def _move(self) -> float:
        share = 1 - kept_at_edges(self._traffic) / self._traffic.sum()
        affordable = np.searchsorted(share[self._within], self.max_super_share + 1e-9, side="right")
        best = int(self._within[max(int(affordable) - 1, 0)])
        if self._place is not None:
            now = share[self._place]
            if now <= self.max_super_share + self.tolerance and share[best] - now <= self.tolerance:
                return self.threshold
        threshold = float(self.monitor.bins.edges[best])
        self.router.set_threshold(threshold)
        _log.info(
            "threshold %.7g -> %.7g, which routes %.1f%% of the traffic as it is now (%.1f%% wanted)",
            self.threshold,
            threshold,
            100 * share[best],
            100 * self.max_super_share,
        )
        self._place, self.threshold = best, threshold
        return threshold
