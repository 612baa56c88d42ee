"""`calibrate`: from scores and right/wrong answers on held-out rows to a threshold, and the JSON that keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import model_validator

from elang.calibration import bounds, targets
from elang.calibration.artefact import Artefact, Float32, Provenance, Record
from elang.calibration.compare import area_gain
from elang.calibration.costs import BatchCosts
from elang.calibration.curve import Thresholds, area, every_threshold

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from elang.monitoring import Monitor

CURVE_POINTS = 201
HARDEST = 20


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

    kind: Literal["swift_share", "max_drop", "max_cost", "agree", "selective_error", "best_accuracy"]
    value: float | None  # the share, drop, cost or alpha asked for
    share_kept: float
    accuracy: float
    lower: float  # two-sided Wilson interval of `accuracy`
    upper: float
    random_accuracy: float  # expected from routing as many rows at random
    drop: float  # accuracy of Super minus `accuracy`
    drop_upper: float  # one-sided upper bound on the true drop, paired with Super row by row
    note: str  # what this does and does not prove
    delta: float | None = None  # of a risk bound: the probability that it does not hold; None: it is an expectation
    observed_risk: float | None = None  # of a risk bound, on these rows
    p_value: float | None = None  # of a risk bound that was tested


class Candidate(Record):
    """A score that was considered, on the rows that chose among them."""

    area: float  # as of a curve
    gain_over_random: float  # of the area
    lower: float  # bootstrap interval of the gain
    upper: float


class Hardest(Record):
    """Rows that Swift keeps and has wrong, the surest first: columns."""

    id: tuple[str | int, ...]
    score: tuple[float, ...]


class Calibration(Artefact):
    """A threshold for `elang.Router` with the evidence for it. Saved as JSON that a person can read and compare."""

    version: Literal[1] = 1
    score: str
    temperature: float
    threshold: Float32
    candidate: str  # the name of the score's curve: with the temperature, where several were considered
    score_selection: Literal["given", "largest_area", "largest_area_on_other_rows"]
    selection: dict[str, Candidate]  # all that were considered, on the other rows
    judged_by: Literal["labels", "super"]  # by Super: there were no labels, accuracy is agreement with it
    hardest: Hardest
    confidence: float
    target: Target
    n: int
    swift_accuracy: float
    super_accuracy: float
    oracle_accuracy: float  # from routing exactly the rows that Swift has wrong: the ceiling of every score
    costs: BatchCosts | None = None  # that `max_cost` was asked by
    provenance: Provenance
    curves: dict[str, Curve]

    @model_validator(mode="after")
    def _has_its_curve(self) -> Calibration:
        if self.candidate not in self.curves:
            raise ValueError(f"candidate: got {self.candidate!r}, wanted one of the curves: {', '.join(self.curves)}")
        if self.score != (name := self.candidate.partition("@")[0]):
            raise ValueError(f"score: got {self.score!r}, wanted {name!r}, as in candidate")
        return self

    @property
    def curve(self) -> Curve:
        """The curve of the chosen score."""
        return self.curves[self.candidate]

    def random_accuracy(self, share_kept: float) -> float:
        """Expected accuracy when a random share of the rows is kept: exactly the straight line from Super to Swift."""
        return self.super_accuracy + share_kept * (self.swift_accuracy - self.super_accuracy)

    def summary(self) -> str:
        """What this threshold means, in one paragraph."""
        t = self.target
        wanted = f" ({t.value:.1%} wanted)" if t.kind == "swift_share" else ""
        level = f"{100 * self.confidence:.4g}%"
        quality = "accuracy" if self.judged_by == "labels" else "agreement with Super"
        unusable = f" {self.curve.not_finite} rows have a score that is not finite and always go to Super."
        return (
            f"A row stays with Swift if its {self.score} is finite and at least {np.float32(self.threshold)!s}. "
            f"On {self.n} rows this keeps {t.share_kept:.1%}{wanted} with Swift; {quality} {t.accuracy:.1%} "
            f"({level} interval {t.lower:.1%} to {t.upper:.1%}), against Super {self.super_accuracy:.1%}, Swift "
            f"{self.swift_accuracy:.1%} and {t.random_accuracy:.1%} expected from routing as many rows at random. "
            f"Row by row against Super that is {0 - 100 * t.drop:+.1f} points, at worst {0 - 100 * t.drop_upper:+.1f} "
            f"with {level} confidence. {t.note}{unusable if self.curve.not_finite else ''}"
        )

    def monitor(self, **options: Any) -> Monitor:
        """Watch a joint model against this calibration: `elang.monitoring.Monitor`, whose options these are."""
        from elang.monitoring import Monitor

        return Monitor(self, **options)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Accuracy against share kept, written to `path` (its suffix is the format) if given. Needs `elang[report]`."""
        from elang.calibration.plot import plot_calibration

        figure = plot_calibration(self)
        if path is not None:
            figure.savefig(path)
        return figure


def calibrate(
    scores: Mapping[str, ArrayLike],  # each [N] float32
    swift_correct: ArrayLike | None = None,  # [N] bool
    super_correct: ArrayLike | None = None,  # [N] bool
    *,
    score: str | None = None,
    swift_share: float | None = None,
    max_drop: float | None = None,
    max_cost: float | None = None,
    agree: tuple[float, float | None] | None = None,
    selective_error: tuple[float, float] | None = None,
    costs: BatchCosts | None = None,
    disagree: ArrayLike | None = None,  # [N] bool
    ids: Sequence[str | int] | None = None,  # N
    confidence: float = 0.95,
    temperature: float = 1.0,
    seed: int = 0,
    provenance: Provenance | Mapping[str, str | None] | None = None,
) -> Calibration:
    """Choose a threshold on held-out rows, under the router's own rule: keep iff the score is finite and >= threshold.

    With no target the threshold is the one of best accuracy on these rows. The others, of which one may be given:

    - `swift_share`: keeps the share nearest to this, in [0, 1]. Rows with equal scores stay together.
    - `max_drop`: keeps as many rows as can be *proven* to lose at most this accuracy, in (0, 1), to Super. Exact at
      `confidence` (`bounds.proven`). A drop of 0 is beyond proof: routing all rows has it too.
    - `max_cost`: the best accuracy on these rows at a mean cost of at most this for a row, by `costs`.
    - `agree`, (alpha, delta): keeps as many rows as it can while at most a share alpha of all rows is kept and answered
      otherwise than by Super, with probability 1 - delta; (alpha, None): in expectation (`risk.agree`).
    - `selective_error`, (alpha, delta): keeps as many as it can while at most a share alpha of the kept rows is wrong,
      with probability 1 - delta (`risk.selective_error`).

    What is proven holds for rows drawn independently from one population, as these were.

    Args:
        scores: by name, the scores of the same N rows, [N] float32, from the op, dtype and backend that will serve. A
            score at another temperature than `temperature` is named "energy@2.0".
        swift_correct, super_correct: whether each model answers each row correctly, [N] bool (or 0/1). Without them
            Super is what Swift is judged by, and accuracy is agreement with it.
        score: the score to route by. None takes the one with the largest area under its curve on these rows (scores
            that rank rows alike have equal areas: the first one named) and divides the error probability of a proof by
            the number of scores. "auto" takes it on one half of the rows and does everything else on the other.
        costs: of batches, for `max_cost`.
        disagree: whether the models' answers differ, [N] bool, for `agree` and where there are no labels.
        ids: names of the rows, for those that Swift keeps and has wrong.
        confidence: of every interval and of `max_drop`, in (0, 1).
        temperature: that the scores were computed with; recorded.
        seed: of the halves, with "auto".
        provenance: models, data, dtype, backend; recorded.

    Raises:
        InfeasibleTarget: no threshold that keeps any row meets the target; the message says what might do.
        ValueError: an argument that is not as described, by its name.
    """
    differ = None if disagree is None else _correctness("disagree", disagree)
    if swift_correct is None and super_correct is None:
        if differ is None:
            raise ValueError("swift_correct, super_correct: got neither, nor disagree, wanted both or disagree")
        swift, super_ = ~differ, np.ones(differ.size, dtype=np.bool_)
    elif swift_correct is None or super_correct is None:
        raise ValueError("swift_correct, super_correct: got one of them, wanted both or neither")
    else:
        swift, super_ = _correctness("swift_correct", swift_correct), _correctness("super_correct", super_correct)
    n = swift.size
    for name, size in (("super_correct", super_.size), ("disagree", n if differ is None else differ.size)):
        if size != n:
            raise ValueError(f"{name}: got {size} rows, wanted {n} as in swift_correct")
    if ids is not None and len(ids) != n:
        raise ValueError(f"ids: got {len(ids)}, wanted {n} as in swift_correct")
    if not scores:
        raise ValueError("scores: got none, wanted at least one")
    columns = {name: _score_column(name, values, n) for name, values in scores.items()}
    if score not in (None, "auto") and score not in columns:
        raise ValueError(f"score: got {score!r}, wanted one of {', '.join(columns)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, wanted a probability in (0, 1)")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, wanted a finite value > 0")
    asked = {
        "swift_share": swift_share,
        "max_drop": max_drop,
        "max_cost": max_cost,
        "agree": agree,
        "selective_error": selective_error,
    }
    kind, value, delta, choose = _target(asked, costs, differ)
    source = provenance if isinstance(provenance, Provenance) else Provenance.model_validate(dict(provenance or {}))

    here, selection = np.arange(n), {}
    if score == "auto":
        if n < 2:
            raise ValueError(f"score: got 'auto' for {n} row, wanted at least 2")
        other, here = np.split(np.random.default_rng(seed).permutation(n), [n // 2])
        selection = {name: _candidate(c[other], swift[other], super_[other], confidence) for name, c in columns.items()}
        score = max(selection, key=lambda name: selection[name].area)
        here = np.sort(here)
        columns = {name: _score_column(name, c[here], len(here)) for name, c in columns.items()}
        swift, super_, n = swift[here], super_[here], len(here)
    outcomes = {name: every_threshold(values, swift, super_) for name, values in columns.items()}
    super_right = int(super_.sum())
    curves = {name: _curve(outcome, super_right, n, confidence) for name, outcome in outcomes.items()}
    chosen = score if score is not None else max(curves, key=lambda name: curves[name].area)
    t, values = outcomes[chosen], columns[chosen]
    candidates = 1 if score is not None else len(columns)
    choice = choose(targets.Rows(values, t, swift, super_, candidates, here), confidence)

    i = choice.at
    share = t.kept[i] / n
    right = super_right + int(t.gained[i] - t.lost[i])
    lower, upper = bounds.wilson_interval(right, n, confidence)
    swift_accuracy, super_accuracy = float(swift.mean()), super_right / n
    wrong = np.flatnonzero(np.isfinite(values) & (values >= t.threshold[i]) & ~swift)
    hardest = wrong[np.argsort(-values[wrong], kind="stable")][:HARDEST]
    name, _, own_temperature = chosen.partition("@")
    return Calibration(
        score=name,
        temperature=float(own_temperature or temperature),
        threshold=float(t.threshold[i]),
        candidate=chosen,
        score_selection="largest_area_on_other_rows" if selection else "given" if score is not None else "largest_area",
        selection=selection,
        judged_by="labels" if swift_correct is not None else "super",
        hardest=Hardest(
            id=tuple(int(row) if ids is None else ids[row] for row in here[hardest]),
            score=tuple(values[hardest].tolist()),
        ),
        confidence=float(confidence),
        target=Target(
            kind=kind,
            value=value,
            share_kept=float(share),
            accuracy=right / n,
            lower=float(lower),
            upper=float(upper),
            random_accuracy=float(super_accuracy + share * (swift_accuracy - super_accuracy)),
            drop=int(t.lost[i] - t.gained[i]) / n,
            drop_upper=bounds.drop_bound(int(t.gained[i]), int(t.lost[i]), n, choice.critical),
            note=choice.note,
            delta=delta,
            observed_risk=None if choice.bound is None else choice.bound.observed,
            p_value=None if choice.bound is None else choice.bound.p_value,
        ),
        n=n,
        swift_accuracy=swift_accuracy,
        super_accuracy=super_accuracy,
        oracle_accuracy=float((swift | super_).mean()),
        costs=costs,
        provenance=source,
        curves=curves,
    )


Kind = Literal["swift_share", "max_drop", "max_cost", "agree", "selective_error", "best_accuracy"]


def _target(
    asked: Mapping[str, Any], costs: BatchCosts | None, differ: NDArray[np.bool_] | None
) -> tuple[Kind, float | None, float | None, targets.Target]:
    """The one target asked for: its kind, its value and delta, and how to choose."""
    named = {name: value for name, value in asked.items() if value is not None}
    if len(named) > 1:
        raise ValueError(f"{', '.join(named)}: got {len(named)} targets, wanted at most one")
    if (costs is not None) != ("max_cost" in named):
        raise ValueError("max_cost, costs: got one of them, wanted both or neither")
    for name, value in named.items():
        if name == "swift_share":
            if not 0 <= value <= 1:
                raise ValueError(f"swift_share: got {value}, wanted a share in [0, 1]")
            return "swift_share", float(value), None, targets.nearest_share(value)
        if name == "max_drop":
            if not 0 < value < 1:
                raise ValueError(f"max_drop: got {value}, wanted an accuracy in (0, 1); a drop of 0 cannot be proven")
            return "max_drop", float(value), None, targets.within_drop(value)
        if name == "max_cost":
            assert costs is not None, "checked above"
            return "max_cost", float(value), None, targets.within_cost(value, costs)
        if not (isinstance(value, Sequence) and len(value) == 2):
            raise ValueError(f"{name}: got {value!r}, wanted a pair (alpha, delta)")
        alpha, delta = value
        if name == "selective_error":
            return "selective_error", float(alpha), float(delta), targets.error_of_kept(alpha, delta)
        if differ is None:
            raise ValueError("agree: got no disagree, wanted it: whether the models' answers differ")
        return "agree", float(alpha), delta, targets.agreement(differ, alpha, delta)
    return "best_accuracy", None, None, targets.best_accuracy


def _candidate(
    values: NDArray[np.float32], swift: NDArray[np.bool_], super_: NDArray[np.bool_], confidence: float
) -> Candidate:
    outcome, n = every_threshold(values, swift, super_), len(values)
    under = area(outcome.kept / n, (int(super_.sum()) + outcome.gained - outcome.lost) / n)
    gain = area_gain(values, swift, super_, confidence=confidence)
    return Candidate(area=under, gain_over_random=gain.value, lower=gain.lower, upper=gain.upper)


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
