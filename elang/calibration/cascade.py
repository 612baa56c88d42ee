"""`calibrate_cascade`: from scores and right/wrong answers on held-out rows to the thresholds of a whole cascade."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import model_validator

from elang.calibration import bounds
from elang.calibration.artefact import Artefact, Float32, Provenance, Record
from elang.calibration.bounds import InfeasibleTarget
from elang.calibration.cascade_search import (
    Bools,
    CascadeCosts,
    Goal,
    Ints,
    Rows,
    Totals,
    cheapest_differing,
    cheapest_with_statistic,
    most_accurate,
    search,
)
from elang.calibration.risk import binomial_cdf

if TYPE_CHECKING:
    from elang.router import Router

LEVELS = 17  # of the path that is tested step by step


class RouterSettings(Record):
    """All that a `Router` is."""

    score: str
    temperature: float
    threshold: Float32

    def router(self) -> Router:
        from elang.router import Router

        return Router(self.score, threshold=self.threshold, temperature=self.temperature)


class CascadeModel(Record):
    """A model of a cascade, on the rows that its target is reported on."""

    name: str | None
    sha256: str | None  # of its weights: `elang.fingerprint`
    accuracy: float  # alone, on all rows
    share_seen: float  # of the rows, that get to it
    share_answered: float


class CascadeTarget(Record):
    """What was asked for, and what the chosen thresholds do."""

    kind: Literal["max_cost", "max_drop", "agree", "best_accuracy"]
    value: float | None  # the cost, drop or alpha asked for
    cost: float  # of a row
    accuracy: float
    lower: float  # two-sided Wilson interval of `accuracy`
    upper: float
    drop: float  # accuracy of the last model minus `accuracy`
    drop_upper: float  # one-sided upper bound on the true drop, paired with the last model row by row
    disagreement: float | None  # share of the rows answered otherwise than the last model would; None: not known
    note: str  # what this does and does not prove
    delta: float | None = None  # of `agree`: the probability that it does not hold
    p_value: float | None = None  # of `agree`


class CascadeCalibration(Artefact):
    """The thresholds of a cascade with the evidence for them. Saved as JSON that a person can read and compare."""

    version: Literal[1] = 1
    settings: tuple[RouterSettings, ...]  # of every model but the last
    models: tuple[CascadeModel, ...]
    judged_by: Literal["labels", "last"]  # by the last model: there were no labels, accuracy is agreement with it
    target: CascadeTarget
    confidence: float
    n: int  # rows that the target is reported on
    n_search: int  # rows that the thresholds were picked on: these, or others where something is proven
    costs: CascadeCosts
    provenance: Provenance

    @model_validator(mode="after")
    def _is_of_one_cascade(self) -> CascadeCalibration:
        for name, size in (("settings", len(self.settings)), ("costs.later", len(self.costs.later))):
            if size != len(self.models) - 1:
                raise ValueError(f"{name}: got {size}, wanted {len(self.models) - 1}, one less than models")
        return self

    def routers(self) -> list[Router]:
        """Of every model but the last, in order."""
        return [settings.router() for settings in self.settings]

    def summary(self) -> str:
        """What these thresholds mean, in one paragraph."""
        t, unit, level = self.target, self.costs.unit, f"{100 * self.confidence:.4g}%"
        parts = []
        for i, model in enumerate(self.models):
            part = f"{model.name or f'model {i}'} ({model.accuracy:.1%} alone) sees {model.share_seen:.1%}"
            if i < len(self.settings):
                threshold = np.float32(self.settings[i].threshold)
                part += f", answers where its {self.settings[i].score} is at least {threshold!s}"
            parts.append(f"{part}: {model.share_answered:.1%}")
        quality = "Accuracy" if self.judged_by == "labels" else "Agreement with the last model"
        return (
            f"Of {self.n} rows {'; '.join(parts)}. {quality} is {t.accuracy:.1%} ({level} interval {t.lower:.1%} to "
            f"{t.upper:.1%}) at {t.cost:.4g} {unit} a row; the last model alone has {self.models[-1].accuracy:.1%} at "
            f"{self.costs.of_last:.4g}. Row by row against it that is {0 - 100 * t.drop:+.1f} points, at worst "
            f"{0 - 100 * t.drop_upper:+.1f} with {level} confidence. {t.note}"
        )


def calibrate_cascade(
    scores: Sequence[ArrayLike],  # n - 1 of [N] float32
    correct: Sequence[ArrayLike] | None = None,  # n of [N] bool
    *,
    costs: CascadeCosts,
    max_cost: float | None = None,
    max_drop: float | None = None,
    agree: tuple[float, float] | None = None,
    disagree: Sequence[ArrayLike] | None = None,  # n - 1 of [N] bool
    score: str | Sequence[str] = "energy",
    temperature: float | Sequence[float] = 1.0,
    confidence: float = 0.95,
    seed: int = 0,
    models: Sequence[str | None] | None = None,
    fingerprints: Sequence[str | None] | None = None,
    provenance: Provenance | Mapping[str, str | None] | None = None,
) -> CascadeCalibration:
    """Choose the thresholds of a cascade of n models on held-out rows, all of them together.

    With no target they are those of best accuracy on these rows, and of these the cheapest. The others, of which one
    may be given:

    - `max_cost`: the best accuracy on these rows at a mean cost of at most this for a row.
    - `max_drop`: the least cost at which the whole cascade is *proven* to lose at most this accuracy, in (0, 1), to its
      last model, with probability `confidence`.
    - `agree`, (alpha, delta): the least cost at which at most a share alpha of all rows is proven to be answered
      otherwise than by the last model, with probability 1 - delta.

    A proof takes halves. On one a path of vectors is searched, from the safest to the cheapest: each is the least cost
    found at a margin of its own. On the other they are tested one after the other, each at the whole level, up to the
    first failure (Learn then Test with fixed-sequence testing, Angelopoulos et al. 2021). That half has no say in what
    the path is, so its first vector that misses the target passes with probability at most the level: neither the
    number of vectors nor the search needs a correction. It holds for rows drawn independently from one population, as
    these were. That no other thresholds are cheaper is not proven.

    Args:
        scores: of each model but the last, [N] float32, of all N rows, from the op, dtype and backend that will serve.
        correct: whether each model answers each row correctly, [N] bool (or 0/1). Without them the last model is what
            the others are judged by, and accuracy is agreement with it.
        costs: of batches of each model.
        disagree: whether the answer of each model but the last differs from the last one's, [N] bool, for `agree` and
            where there are no labels.
        score, temperature: of the scores, one for all or one each; recorded, for the routers.
        confidence: of every interval and of `max_drop`, in (0, 1).
        seed: of the halves.
        models, fingerprints: the n models' names, and their `elang.fingerprint`; recorded.
        provenance: data, dtype, backend; recorded.

    Raises:
        InfeasibleTarget: a cost out of reach; a drop or a share that these rows do not prove where any row stops early.
        ValueError: an argument that is not as described, by its name.
    """
    count = len(scores) + 1
    if count < 2:
        raise ValueError("scores: got none, wanted those of at least one model")
    apart = None if disagree is None else _bools("disagree", disagree, count - 1)
    if correct is not None:
        right = _bools("correct", correct, count)
    elif apart is not None:
        right = np.vstack([~apart, np.ones_like(apart[:1])])
    else:
        raise ValueError("correct, disagree: got neither, wanted at least one")
    n = right.shape[1]
    if apart is not None and apart.shape[1] != n:
        raise ValueError(f"disagree: got {apart.shape[1]} rows, wanted {n} as in correct")
    differ = np.zeros_like(right) if apart is None else np.vstack([apart, np.zeros_like(apart[:1])])
    values = np.stack([_score(f"scores[{i}]", column, n) for i, column in enumerate(scores)])
    if len(costs.later) != count - 1:
        raise ValueError(f"costs: got those of {1 + len(costs.later)} models, wanted {count}, one more than scores")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, wanted a probability in (0, 1)")
    names, temperatures = _each("score", score, count - 1), _each("temperature", temperature, count - 1)
    if not all(0 < t < math.inf for t in temperatures):
        raise ValueError(f"temperature: got {temperature}, wanted finite values > 0")
    asked = {"max_cost": max_cost, "max_drop": max_drop, "agree": agree}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)}: got {len(given)} targets, wanted at most one")
    if max_drop is not None and not 0 < max_drop < 1:
        raise ValueError(f"max_drop: got {max_drop}, wanted an accuracy in (0, 1); a drop of 0 is beyond proof")
    if agree is not None:
        pair = isinstance(agree, Sequence) and len(agree) == 2 and None not in agree
        if not (pair and all(0 < part < 1 for part in agree)):
            raise ValueError(f"agree: got {agree!r}, wanted a pair (alpha, delta), both in (0, 1)")
        if apart is None:
            raise ValueError("agree: got no disagree, wanted it: whether the models' answers differ")
    proves = max_drop is not None or agree is not None
    if proves and n < 2:
        raise ValueError(f"scores: got {n} row, wanted at least 2, for two halves")
    recorded = [_each(name, v, count) for name, v in (("models", models), ("fingerprints", fingerprints))]
    source = provenance if isinstance(provenance, Provenance) else Provenance.model_validate(dict(provenance or {}))

    def rows_of(which: Ints) -> Rows:
        return Rows(values[:, which], right[:, which], differ[:, which], costs)

    if proves:
        picked, tested = map(rows_of, np.split(np.random.default_rng(seed).permutation(n), [n // 2]))
    else:
        picked = tested = rows_of(np.arange(n))
    if max_drop is not None:
        choice = _within_drop(picked, tested, max_drop, confidence)
    elif agree is not None:
        choice = _agreeing(picked, tested, *agree, confidence)
    else:
        choice = _most_accurate(picked, max_cost, confidence)

    at = tested.at(choice.thresholds)
    totals, who = tested.totals(at), tested.answered_by(at)
    gained, lost, right_last = int(totals.gained[0]), int(totals.lost[0]), int(tested.correct[-1].sum())
    lower, upper = bounds.wilson_interval(right_last + gained - lost, tested.n, confidence)
    seen = [tested.n, *totals.seen[:, 0].tolist()]
    answered = np.bincount(who, minlength=count)
    return CascadeCalibration(
        settings=tuple(
            RouterSettings(score=name, temperature=t, threshold=float(threshold))
            for name, t, threshold in zip(names, temperatures, choice.thresholds, strict=True)
        ),
        models=tuple(
            CascadeModel(
                name=recorded[0][k],
                sha256=recorded[1][k],
                accuracy=float(tested.correct[k].mean()),
                share_seen=seen[k] / tested.n,
                share_answered=float(answered[k] / tested.n),
            )
            for k in range(count)
        ),
        judged_by="last" if correct is None else "labels",
        target=CascadeTarget(
            kind=given[0] if given else "best_accuracy",  # type: ignore[arg-type]
            value=max_cost if max_cost is not None else max_drop if agree is None else agree[0],
            cost=float(tested.cost(totals)[0]),
            accuracy=(right_last + gained - lost) / tested.n,
            lower=float(lower),
            upper=float(upper),
            drop=(lost - gained) / tested.n,
            drop_upper=bounds.drop_bound(gained, lost, tested.n, choice.critical),
            disagreement=None if apart is None else int(totals.differ[0]) / tested.n,
            note=choice.note,
            delta=None if agree is None else agree[1],
            p_value=choice.p_value,
        ),
        confidence=float(confidence),
        n=tested.n,
        n_search=picked.n,
        costs=costs,
        provenance=source,
    )


class _Choice(NamedTuple):
    thresholds: list[float]
    note: str  # what this does and does not prove
    critical: float  # that the bound on the drop is for
    p_value: float | None = None


def _most_accurate(rows: Rows, max_cost: float | None, confidence: float) -> _Choice:
    at, missed = search(rows, most_accurate(math.inf if max_cost is None else max_cost))
    if max_cost is not None and missed > 0:
        raise InfeasibleTarget(
            f"max_cost: got {max_cost:g} {rows.batches.unit} a row, the least found is {max_cost + missed:g}"
        )
    note = "Picked as the best found on these very rows: expect less on others."
    return _Choice(rows.thresholds_of(at), note, NormalDist().inv_cdf(confidence))


def _within_drop(picked: Rows, tested: Rows, most: float, confidence: float) -> _Choice:
    n = tested.n
    critical = bounds.critical_value(n, most, 1 - confidence)
    safest = float(bounds.drop_statistic(0, 0, picked.n, most))  # of "route all"
    path = [cheapest_with_statistic(least, picked.n, most) for least in np.linspace(safest, 0, LEVELS)]
    tests = _in_turn(picked, tested, path, lambda t: bool(bounds.drop_statistic(t.gained, t.lost, n, most) > critical))
    if tests.last is None:
        best = min(bounds.drop_bound(int(t.gained[0]), int(t.lost[0]), n, critical) for t in tests.totals)
        raise InfeasibleTarget(
            f"max_drop: got {100 * most:.4g} points, which {n} rows cannot prove for any thresholds that "
            f"{picked.n} others picked and that stop a row (the best bound is {100 * best:.2g} points)"
        )
    held = f"accuracy is at most {most:.4g} below the last model's"
    return _Choice(tests.last, _proven(held, confidence, "exact paired test", picked, tested), critical)


def _agreeing(picked: Rows, tested: Rows, alpha: float, delta: float, confidence: float) -> _Choice:
    n = tested.n

    def p_value(totals: Totals) -> float:
        return float(binomial_cdf(totals.differ, n, alpha)[0])

    path = [cheapest_differing(most) for most in np.linspace(0, alpha * picked.n, LEVELS)]
    tests = _in_turn(picked, tested, path, lambda totals: p_value(totals) <= delta)
    if tests.last is None:
        least = min(int(totals.differ[0]) for totals in tests.totals)
        raise InfeasibleTarget(
            f"agree: got alpha = {alpha:.6g} with delta = {delta:.6g}, which {n} rows cannot prove for any thresholds "
            f"that {picked.n} others picked and that stop a row ({least} rows disagree at the least)"
        )
    held = f"at most {alpha:.4g} of all rows are answered otherwise than by the last model"
    note = _proven(held, 1 - delta, "exact binomial test", picked, tested)
    p = p_value(tested.totals(tested.at(tests.last)))
    return _Choice(tests.last, note, NormalDist().inv_cdf(confidence), p)


class _Tests(NamedTuple):
    last: list[float] | None  # the cheapest thresholds that passed and stop a row; None: none
    totals: list[Totals]  # of all that were tested


def _in_turn(picked: Rows, tested: Rows, path: list[Goal], passes: Callable[[Totals], bool]) -> _Tests:
    """Test the vectors that `picked` holds for best at each goal, on rows it has not seen, up to the first failure."""
    found, totals, starts = list[tuple[float, list[float]]](), list[Totals](), list[Ints]()
    for goal in path:
        at, _ = search(picked, goal, starts)
        starts = [at]
        thresholds = picked.thresholds_of(at)
        totals.append(tested.totals(tested.at(thresholds)))
        if not passes(totals[-1]):
            break
        if totals[-1].seen[-1, 0] < tested.n:
            found.append((float(picked.cost(picked.totals(at))[0]), thresholds))
    return _Tests(min(found)[1] if found else None, totals)


def _proven(held: str, level: float, test: str, picked: Rows, tested: Rows) -> str:
    return (
        f"Over the draw of these {tested.n} rows, with probability of at least {level:.6g}, {held} on rows drawn "
        f"independently from the same population ({test}, in turn of thresholds that {picked.n} other rows picked)."
    )


def _bools(name: str, columns: Sequence[ArrayLike], count: int) -> Bools:
    arrays = [np.asarray(column) for column in columns]
    shapes = {array.shape for array in arrays}
    if len(arrays) != count or len(shapes) != 1 or arrays[0].ndim != 1 or arrays[0].size == 0:
        got = ", ".join(str(list(array.shape)) for array in arrays)
        raise ValueError(f"{name}: got {got or 'none'}, wanted {count} of [N] with N >= 1")
    stacked = np.stack(arrays)
    if not np.isin(stacked, (0, 1)).all():
        raise ValueError(f"{name}: got values other than true and false (or 0 and 1)")
    return stacked.astype(np.bool_)


def _score(name: str, values: ArrayLike, n: int) -> NDArray[np.float32]:
    array = np.asarray(values)
    if array.shape != (n,) or array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: got {array.dtype} {list(array.shape)}, wanted float32 [{n}]")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).any():
        raise ValueError(f"{name}: got no finite value among {n} rows, wanted at least one")
    return array


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One for each, of one for all or of as many."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name}: got {len(values)}, wanted {count}, one each")
    return values
