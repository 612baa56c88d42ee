"""What rows cost: in seconds, FLOPs or money, from what batches were measured to cost."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import model_validator

from elang.calibration.artefact import Record

Floats = NDArray[np.float64]


class BatchCosts(Record):
    """Costs of whole batches, measured where the models will serve.

    FLOPs or prices by row are the case of one row: `BatchCosts(unit="FLOPs", rows=1, swift=1.2e9, super={1: 21.8e9})`.
    """

    unit: str
    rows: int  # of a batch that Swift sees
    swift: float  # of Swift on such a batch
    super: dict[int, float]  # of Super, by the rows of its batch; between the sizes measured a straight line
    buckets: bool = False  # Super's batches are filled up to the next size measured, as `bucket` dispatch does

    @model_validator(mode="after")
    def _is_complete(self) -> BatchCosts:
        if self.rows < 1 or self.swift < 0 or not self.super or min(self.super) < 1 or min(self.super.values()) < 0:
            raise ValueError(f"got {self!r}, wanted rows >= 1, no cost below 0 and a cost of Super for sizes >= 1")
        if max(self.super) < self.rows:
            raise ValueError(f"super: got sizes up to {max(self.super)}, wanted up to the {self.rows} rows of a batch")
        return self

    def of_share(self, share_routed: ArrayLike) -> Floats:
        """Expected cost of a row where each is routed with this probability, independently of the others; [P]."""
        share = np.atleast_1d(np.asarray(share_routed, dtype=np.float64))
        count = np.arange(self.rows + 1)
        log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, self.rows + 1)))))
        log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            log_p = np.where(count, count * np.log(share)[:, None], 0.0)
            log_q = np.where(count[::-1], count[::-1] * np.log1p(-share)[:, None], 0.0)
        probability = np.exp(log_choose + log_p + log_q)
        return np.asarray((self.swift + probability @ self._of_super(count)) / self.rows)

    def _of_super(self, count: NDArray[np.int64]) -> Floats:
        sizes = np.array(sorted(self.super))
        costs = np.array([self.super[size] for size in sizes.tolist()])
        if self.buckets:
            of_count = costs[np.minimum(np.searchsorted(sizes, count), len(sizes) - 1)]
        else:
            of_count = np.interp(count, sizes, costs)
        return np.where(count == 0, 0.0, of_count)
