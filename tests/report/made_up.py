"""Runs as `elang eval` leaves them, from made-up answers."""

from __future__ import annotations

import numpy as np

from elang.calibration import BatchCosts, Provenance, calibrate
from elang.evaluation.answered import AnsweredRows
from elang.evaluation.evaluation import Evaluation, System, Timing
from elang.evaluation.pair_bench import PairBench, Point
from elang.evaluation.published import PUBLISHED

LABELS = {2: ("negative", "positive"), 3: ("entailment", "neutral", "contradiction")}
NASTY = "</script><script>document.title = 'taken over'</script><img src=x onerror=alert(1)> & \"quoted\" 'text'"
PROVENANCE = Provenance(
    swift="swift/<small>",
    super="super/large",
    swift_sha256="5" * 64,
    super_sha256="a" * 64,
    data="sst2, validation",
    data_sha256="d" * 64,
    dtype="float32",
    backend="cpu",
    date="2025-01-02T03:04:05+00:00",
)
COSTS = BatchCosts(unit="seconds", rows=8, swift=0.004, super={1: 0.005, 2: 0.008, 4: 0.013, 8: 0.024})


def answered(classes=2, n=400, seed=0, not_finite=(7,), **changes):
    """Swift is the surer the more often it is right, Super right nine times of ten; some scores are not finite."""
    rng = np.random.default_rng(seed)
    target, swift_logits = rng.integers(classes, size=n), rng.normal(size=(n, classes))
    swift_logits[np.arange(n), target] += rng.gamma(1.5, size=n)
    logits = swift_logits - swift_logits.max(axis=1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ordered = np.sort(p, axis=1)
    scores = {
        "energy": np.log(np.exp(swift_logits).sum(axis=1)),
        "max_prob": ordered[:, -1],
        "neg_entropy": (p * np.log(p)).sum(axis=1),
        "margin": ordered[:, -1] - ordered[:, -2],
    }
    swift = swift_logits.argmax(axis=1)
    super_ = np.where(rng.random(n) < 0.9, target, (target + 1) % classes)
    lengths = rng.integers(5, 60, size=n)
    swift_flops, super_flops = 1_000 * lengths + lengths**2, 9_000 * lengths + 4 * lengths**2
    names = LABELS[classes]

    def column(values):
        values = values.astype(np.float32)
        return tuple(None if i in not_finite else float(value) for i, value in enumerate(values))

    surest_wrong = np.argmax(np.where(swift != target, scores["energy"], -np.inf))
    kept = np.sort(scores["energy"].astype(np.float32))[n // 3]
    return AnsweredRows(
        **{
            "command": ("elang", "eval", "--task", "sst2", "--swift", "a folder"),
            "task": "sst2",
            "kind": "classification",
            "labels": names,
            "score": "energy",
            "temperature": 1.0,
            "thresholds": (float(kept),),
            "id": tuple(f"dev-{i}" for i in range(n)),
            "text": tuple(NASTY if i == surest_wrong else f"sentence <{i}>" for i in range(n)),
            "target": tuple(names[i] for i in target),
            "swift": tuple(names[i] for i in swift),
            "super": tuple(names[i] for i in super_),
            "swift_right": tuple((swift == target).tolist()),
            "super_right": tuple((super_ == target).tolist()),
            "judged_by": "target",
            "scores": {name: column(values) for name, values in scores.items()},
            "swift_flops": tuple(swift_flops.tolist()),
            "gate_flops": {name: tuple(swift_flops.tolist()) for name in scores},
            "super_flops": tuple(super_flops.tolist()),
            "provenance": PROVENANCE,
            **changes,
        }
    )


def evaluated(rows, **changes):
    def system(threshold, accuracy, random, ratio, flops, time):
        return System(
            threshold=threshold,
            quality={"accuracy": accuracy},
            random_accuracy=random,
            swift_ratio=ratio,
            flops_speedup=flops,
            time_speedup=time,
        )

    return Evaluation(
        **{
            "task": rows.task,
            "n": len(rows.id),
            "score": rows.score,
            "temperature": rows.temperature,
            "swift": system(None, 79.64, None, 100.0, 8.765, 5.4),
            "super": system(None, 90.5, None, 0.0, 1.0, 1.0),
            "joint": tuple(system(t, 88.25, 84.125, 66.5, 2.345, 1.7) for t in rows.thresholds),
            "timing": Timing(rows=256, batch_size=1, rounds=3, threads=2, swift=1, super=5.4, joint=(3.2,)),
            "published": PUBLISHED[rows.task],
            "provenance": rows.provenance,
            **changes,
        }
    )


def benched(rows, points=True, **changes):
    return PairBench(
        **{
            "swift": rows.provenance.swift,
            "super": rows.provenance.super,
            "device": "a CPU",
            "threads": 2,
            "dtype": "float32",
            "torch": "2.13.0",
            "library": "0.1",
            "date": "2025-01-02",
            "data": "random tokens",
            "rows": 64,
            "length": 32,
            "rounds": 5,
            "costs": COSTS,
            "points": tuple(
                Point(
                    mode=mode,
                    batch_size=size,
                    share_routed=share,
                    swift_seconds=0.004,
                    routed_seconds=0.02 * share,
                    super_seconds=0.024,
                    naive_seconds=0.03,
                    joint_seconds=0.02,
                    dispatch_efficiency=0.99 - share / 50,
                    over_super=1.5 - share / 2,
                    over_naive=1.1,
                )
                for size in (1, 8)
                for mode in ("exact", "bucket")
                for share in (0.5, 0.1, 0.32)
            )
            if points
            else (),
            **changes,
        }
    )


def save_run(folder, rows, calibration=False, bench=False, evaluation=True):
    folder.mkdir(parents=True, exist_ok=True)
    rows.save(folder / "rows.json")
    if evaluation:
        evaluated(rows).save(folder / "evaluation.json")
    if bench:
        benched(rows).save(folder / "bench.json")
    if calibration:
        scores = {name: rows.score_values(name) for name in rows.scores}
        chosen = calibrate(
            scores, rows.swift_right, rows.super_right, swift_share=0.6, provenance=rows.provenance, score=rows.score
        )
        chosen.save(folder / "calibration.json")
    return folder
