"""What rows cost: in seconds, FLOPs or money, from what batches were measured to cost."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import model_validator

from elang.calibration.artefact import Record

Floats = NDArray[np.float64]
BySize = dict[int, float]  # cost of a batch by its rows


class BatchCosts(Record):
    """Costs of whole batches, measured where the models will serve.

    FLOPs or prices by row are the case of one row: `BatchCosts(unit="FLOPs", rows=1, swift=1.2e9, super={1: 21.8e9})`.
    """

    unit: str
    rows: int  # of a batch that Swift sees
    swift: float  # of Swift on such a batch
    super: BySize  # of Super; between the sizes measured a straight line
    buckets: bool = False  # Super's batches are filled up to the next size measured, as `bucket` dispatch does

    @model_validator(mode="after")
    def _is_complete(self) -> BatchCosts:
        check(self.rows, {"super": self.super}, {"swift": self.swift})
        return self

    def of_share(self, share_routed: ArrayLike) -> Floats:
        """Expected cost of a row where each is routed with this probability, independently of the others; [P]."""
        share = np.atleast_1d(np.asarray(share_routed, dtype=np.float64))
        return (self.swift + expected(self.super, share, self.rows, self.buckets)) / self.rows


class GateCosts(Record):
    """Seconds of whole batches of an encoder-decoder pair, measured where the models will serve."""

    rows: int  # of a batch
    encode: float  # Swift's encoder and the energy head, on such a batch
    decode: BySize  # Swift's decoder and the late score; between the sizes measured a straight line
    super: BySize

    @model_validator(mode="after")
    def _is_complete(self) -> GateCosts:
        check(self.rows, {"decode": self.decode, "super": self.super}, {"encode": self.encode})
        return self

    @property
    def of_swift(self) -> float:
        """Seconds of a row if Swift answers all."""
        return (self.encode + self.decode[self.rows]) / self.rows

    @property
    def of_super(self) -> float:
        """Seconds of a row if Super answers all, with no Swift before it."""
        return self.super[self.rows] / self.rows

    def of_shares(self, decoded: ArrayLike, kept: ArrayLike) -> Floats:
        """Expected seconds of a row where each is decoded, and is kept, with these probabilities; [P]."""
        decoding = np.interp(np.asarray(decoded), SHARES, _at_shares(tuple(self.decode.items()), self.rows))
        answering = np.interp(1 - np.asarray(kept), SHARES, _at_shares(tuple(self.super.items()), self.rows))
        return np.asarray((self.encode + decoding + answering) / self.rows)


def check(rows: int, by_size: dict[str, BySize], others: dict[str, float]) -> None:
    """Raises ValueError, by name, for costs below 0 and sizes that do not reach from 1 row or more to all `rows`."""
    for name, cost in others.items():
        if cost < 0:
            raise ValueError(f"{name}: got {cost}, wanted no cost below 0")
    for name, costs in by_size.items():
        if not costs or min(costs) < 1 or min(costs.values()) < 0:
            raise ValueError(f"{name}: got {costs}, wanted costs >= 0 of batches of 1 row and more")
        if rows not in costs:
            raise ValueError(
                f"{name}: got the sizes {', '.join(map(str, costs))}, wanted the {rows} rows of a batch too"
            )


def expected(costs: BySize, share: Floats, rows: int, buckets: bool = False) -> Floats:
    """Expected cost of the part of a batch that each of its `rows` is in with probability `share` [P]; [P].

    An empty part costs nothing; one smaller than the smallest size measured costs as that does.
    """
    count = np.arange(rows + 1)
    sizes = np.array(sorted(costs))
    values = np.array([costs[size] for size in sizes.tolist()])
    if buckets:
        of_count = values[np.minimum(np.searchsorted(sizes, count), len(sizes) - 1)]
    else:
        of_count = np.interp(count, sizes, values)
    of_count = np.where(count == 0, 0.0, of_count)
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, rows + 1)))))
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 * log 0 is 0
        log_p = np.where(count, count * np.log(share)[..., None], 0.0)
        log_q = np.where(count[::-1], count[::-1] * np.log1p(-share)[..., None], 0.0)
    return np.asarray(np.exp(log_choose + log_p + log_q) @ of_count)


SHARES = np.linspace(0, 1, 4097)


@cache
def _at_shares(costs: tuple[tuple[int, float], ...], rows: int) -> Floats:
    """`expected` at `SHARES`, as a table: gates are compared at millions of shares."""
    return expected(dict(costs), SHARES, rows)
