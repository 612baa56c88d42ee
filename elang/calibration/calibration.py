"""`calibrate`: from scores and right/wrong answers on held-out rows to a threshold, and the JSON that keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import model_validator

from elang.calibration import bounds
from elang.calibration.artefact import Artefact, Float32, Provenance, Record
from elang.calibration.bounds import InfeasibleTarget
from elang.calibration.curve import Thresholds, area, every_threshold

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVE_POINTS = 201


class Curve(Record):
    """Accuracy of the joint model against the share of rows kept, for one score: columns of at most 201 points.

    Points run from "route all" (threshold `inf`) to "keep every finite row" (`-inf`). Each is the exact outcome of its
    threshold on the calibration rows, to six decimals; `lower` and `upper` are the two-sided Wilson interval of that
    one accuracy (pointwise: not a band for the whole curve).
    """

    area: float  # mean accuracy over all shares
    not_finite: int  # rows that this score can never keep
    share_kept: tuple[float, ...]
    accuracy: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    threshold: tuple[Float32, ...]


class Target(Record):
    """What was asked for, and what the chosen threshold does on the calibration rows."""

    kind: Literal["swift_share", "max_drop", "best_accuracy"]
    value: float | None  # the share or the drop asked for
    share_kept: float
    accuracy: float
    lower: float  # two-sided Wilson interval of `accuracy`
    upper: float
    random_accuracy: float  # expected from routing as many rows at random
    drop: float  # accuracy of Super minus `accuracy`
    drop_upper: float  # one-sided upper bound on the true drop, paired with Super row by row
    note: str  # what this does and does not prove


class Calibration(Artefact):
    """A threshold for `elang.Router` with the evidence for it. Saved as JSON that a person can read and compare."""

    version: Literal[1] = 1
    score: str
    temperature: float
    threshold: Float32
    score_selection: Literal["given", "largest_area"]
    confidence: float
    target: Target
    n: int
    swift_accuracy: float
    super_accuracy: float
    oracle_accuracy: float  # from routing exactly the rows that Swift has wrong: the ceiling of every score
    provenance: Provenance
    curves: dict[str, Curve]

    @model_validator(mode="after")
    def _has_its_curve(self) -> Calibration:
        if self.score not in self.curves:
            raise ValueError(f"score: got {self.score!r}, wanted one of the curves: {', '.join(self.curves)}")
        return self

    @property
    def curve(self) -> Curve:
        """The curve of the chosen score."""
        return self.curves[self.score]

    def random_accuracy(self, share_kept: float) -> float:
        """Expected accuracy when a random share of the rows is kept: exactly the straight line from Super to Swift."""
        return self.super_accuracy + share_kept * (self.swift_accuracy - self.super_accuracy)

    def summary(self) -> str:
        """What this threshold means, in one paragraph."""
        t = self.target
        wanted = f" ({t.value:.1%} wanted)" if t.kind == "swift_share" else ""
        level = f"{100 * self.confidence:.4g}%"
        unusable = f" {self.curve.not_finite} rows have a score that is not finite and always go to Super."
        return (
            f"A row stays with Swift if its {self.score} is finite and at least {np.float32(self.threshold)!s}. "
            f"On {self.n} rows this keeps {t.share_kept:.1%}{wanted} with Swift; accuracy {t.accuracy:.1%} "
            f"({level} interval {t.lower:.1%} to {t.upper:.1%}), against Super {self.super_accuracy:.1%}, Swift "
            f"{self.swift_accuracy:.1%} and {t.random_accuracy:.1%} expected from routing as many rows at random. "
            f"Row by row against Super that is {0 - 100 * t.drop:+.1f} points, at worst {0 - 100 * t.drop_upper:+.1f} "
            f"with {level} confidence. {t.note}{unusable if self.curve.not_finite else ''}"
        )

    def plot(self, path: str | Path | None = None) -> Figure:
        """Accuracy against share kept, written to `path` (its suffix is the format) if given. Needs `elang[report]`."""
        from elang.calibration.plot import plot_calibration

        figure = plot_calibration(self)
        if path is not None:
            figure.savefig(path)
        return figure


def calibrate(
    scores: Mapping[str, ArrayLike],  # each [N] float32
    swift_correct: ArrayLike,  # [N] bool
    super_correct: ArrayLike,  # [N] bool
    *,
    score: str | None = None,
    swift_share: float | None = None,
    max_drop: float | None = None,
    confidence: float = 0.95,
    temperature: float = 1.0,
    provenance: Provenance | Mapping[str, str | None] | None = None,
) -> Calibration:
    """Choose a threshold on held-out rows, under the router's own rule: keep iff the score is finite and >= threshold.

    Args:
        scores: by name, the scores of the same N rows, [N] float32, from the op, dtype and backend that will serve.
        swift_correct, super_correct: whether each model answers each row correctly, [N] bool (or 0/1).
        score: the score to route by. None takes the one with the largest area under its curve on these rows (scores
            that rank rows alike have equal areas: the first one named).
        swift_share: target: keep the share nearest to this, in [0, 1]. Rows with equal scores stay together.
        max_drop: target: keep as many rows as can be *proven* to lose at most this accuracy, in (0, 1), to Super.
            Exact at `confidence` for rows drawn like these (`bounds.proven`); with `score=None` the error probability
            is divided by the number of scores. A drop of 0 is beyond proof: routing all rows has it too.
        confidence: of every interval and bound, in (0, 1).
        temperature: that the scores were computed with; recorded.
        provenance: models, data, dtype, backend; recorded.

    With neither target the threshold is the one of best accuracy on these rows.

    Raises:
        InfeasibleTarget: no share of rows can be kept with `max_drop` proven; the message says how many rows might do.
        ValueError: an argument that is not as described, by its name.
    """
    swift, super_ = _correctness("swift_correct", swift_correct), _correctness("super_correct", super_correct)
    n = swift.size
    if super_.size != n:
        raise ValueError(f"super_correct: got {super_.size} rows, wanted {n} as in swift_correct")
    if not scores:
        raise ValueError("scores: got none, wanted at least one")
    columns = {name: _score_column(name, values, n) for name, values in scores.items()}
    if score is not None and score not in columns:
        raise ValueError(f"score: got {score!r}, wanted one of {', '.join(columns)}")
    if swift_share is not None and max_drop is not None:
        raise ValueError("swift_share, max_drop: got both, wanted at most one target")
    if swift_share is not None and not 0 <= swift_share <= 1:
        raise ValueError(f"swift_share: got {swift_share}, wanted a share in [0, 1]")
    if max_drop is not None and not 0 < max_drop < 1:
        raise ValueError(f"max_drop: got {max_drop}, wanted an accuracy in (0, 1); a drop of 0 cannot be proven")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, wanted a probability in (0, 1)")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, wanted a finite value > 0")
    source = provenance if isinstance(provenance, Provenance) else Provenance.model_validate(dict(provenance or {}))

    outcomes = {name: every_threshold(values, swift, super_) for name, values in columns.items()}
    super_right = int(super_.sum())
    curves = {name: _curve(outcome, super_right, n, confidence) for name, outcome in outcomes.items()}
    chosen = score if score is not None else max(curves, key=lambda name: curves[name].area)
    t = outcomes[chosen]

    critical = NormalDist().inv_cdf(confidence)
    if swift_share is not None:
        kind: Literal["swift_share", "max_drop", "best_accuracy"] = "swift_share"
        i = int(np.argmin(np.abs(t.kept / n - swift_share)))
        note = "The intervals are for this threshold alone" + (
            ", its score picked on these very rows." if score is None else "."
        )
    elif max_drop is not None:
        kind = "max_drop"
        candidates = 1 if score is not None else len(columns)
        critical = bounds.critical_value(n, max_drop, (1 - confidence) / candidates)
        i = bounds.proven(t.gained, t.lost, n, max_drop, critical) - 1
        if i < 1:
            raise InfeasibleTarget(bounds.explain_infeasible(t.kept, t.gained, t.lost, n, max_drop, critical))
        note = (
            f"Over the draw of these {n} rows, with probability of at least {confidence:.4g}, accuracy on rows drawn "
            f"independently from the same population is at most {max_drop:.4g} below Super's (exact paired test at "
            f"every distinct score in turn; the error probability is shared by {candidates} score(s))."
        )
    else:
        kind = "best_accuracy"
        best = t.gained - t.lost
        i = int(np.flatnonzero(best == best.max())[-1])
        note = f"Picked as the best of {len(best)} thresholds on these very rows: expect less on others."

    share = t.kept[i] / n
    right = super_right + int(t.gained[i] - t.lost[i])
    lower, upper = bounds.wilson_interval(right, n, confidence)
    swift_accuracy, super_accuracy = float(swift.mean()), super_right / n
    return Calibration(
        score=chosen,
        temperature=float(temperature),
        threshold=float(t.threshold[i]),
        score_selection="given" if score is not None else "largest_area",
        confidence=float(confidence),
        target=Target(
            kind=kind,
            value=swift_share if swift_share is not None else max_drop,
            share_kept=float(share),
            accuracy=right / n,
            lower=float(lower),
            upper=float(upper),
            random_accuracy=float(super_accuracy + share * (swift_accuracy - super_accuracy)),
            drop=int(t.lost[i] - t.gained[i]) / n,
            drop_upper=bounds.drop_bound(int(t.gained[i]), int(t.lost[i]), n, critical),
            note=note,
        ),
        n=n,
        swift_accuracy=swift_accuracy,
        super_accuracy=super_accuracy,
        oracle_accuracy=float((swift | super_).mean()),
        provenance=source,
        curves=curves,
    )


def _curve(outcome: Thresholds, super_right: int, n: int, confidence: float) -> Curve:
    share = outcome.kept / n
    right = super_right + outcome.gained - outcome.lost
    shown = np.unique(np.searchsorted(share, np.linspace(0, share[-1], CURVE_POINTS)))
    lower, upper = bounds.wilson_interval(right[shown], n, confidence)

    def column(values: NDArray[Any]) -> tuple[float, ...]:
        return tuple(values.astype(np.float64).round(6).tolist())

    return Curve(
        area=round(area(share, right / n), 6),
        not_finite=n - int(outcome.kept[-1]),
        share_kept=column(share[shown]),
        accuracy=column(right[shown] / n),
        lower=column(lower),
        upper=column(upper),
        threshold=tuple(outcome.threshold[shown].tolist()),
    )


def _correctness(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: got shape {list(array.shape)}, wanted [N] with N >= 1")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name}: got values other than true and false (or 0 and 1)")
    return array.astype(np.bool_)


def _score_column(name: str, values: ArrayLike, n: int) -> NDArray[np.float32]:
    array = np.asarray(values)
    if array.shape != (n,) or array.dtype.kind not in "fiu":
        raise ValueError(f"scores[{name!r}]: got {array.dtype} {list(array.shape)}, wanted float32 [{n}]")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).any():
        raise ValueError(f"scores[{name!r}]: got no finite value among {n} rows, wanted at least one")
    return array
