"""Energy-routed inference: a small Swift model answers the easy inputs, an unmodified large Super model the rest.

`__all__` is the versioned surface. Importing elang imports nothing else: torch, transformers and the compiled ops are
loaded by the first name that needs them, or all at once by `elang.warmup()`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elang.backbones import register_backbone
    from elang.backend import warmup
    from elang.calibration import (
        BatchCosts,
        Calibration,
        CascadeCalibration,
        CascadeCosts,
        GateCalibration,
        GateCosts,
        InfeasibleTarget,
        calibrate,
        calibrate_cascade,
        calibrate_gates,
    )
    from elang.cascade import Cascade
    from elang.energy_head import EnergyHead
    from elang.head_fitting import fit_energy_head
    from elang.joint import JointClassifier
    from elang.late import LateRouter, late_scores
    from elang.monitoring import BudgetController, Monitor
    from elang.ops import gather_rows, merge_rows, route, route_logits, vocab_energy
    from elang.pipelines import pipeline
    from elang.reference import Route, VocabEnergy
    from elang.router import Router
    from elang.seq2seq import JointSeq2Seq

__version__ = "0.1.0"

_HOME = {
    "BatchCosts": "calibration",
    "BudgetController": "monitoring",
    "Calibration": "calibration",
    "Cascade": "cascade",
    "CascadeCalibration": "calibration",
    "CascadeCosts": "calibration",
    "EnergyHead": "energy_head",
    "GateCalibration": "calibration",
    "GateCosts": "calibration",
    "InfeasibleTarget": "calibration",
    "JointClassifier": "joint",
    "JointSeq2Seq": "seq2seq",
    "LateRouter": "late",
    "Monitor": "monitoring",
    "Route": "reference",
    "Router": "router",
    "VocabEnergy": "reference",
    "calibrate": "calibration",
    "calibrate_cascade": "calibration",
    "calibrate_gates": "calibration",
    "fit_energy_head": "head_fitting",
    "gather_rows": "ops",
    "late_scores": "late",
    "merge_rows": "ops",
    "pipeline": "pipelines",
    "register_backbone": "backbones",
    "route": "ops",
    "route_logits": "ops",
    "vocab_energy": "ops",
    "warmup": "backend",
}

__all__ = [
    "BatchCosts",
    "BudgetController",
    "Calibration",
    "Cascade",
    "CascadeCalibration",
    "CascadeCosts",
    "EnergyHead",
    "GateCalibration",
    "GateCosts",
    "InfeasibleTarget",
    "JointClassifier",
    "JointSeq2Seq",
    "LateRouter",
    "Monitor",
    "Route",
    "Router",
    "VocabEnergy",
    "calibrate",
    "calibrate_cascade",
    "calibrate_gates",
    "fit_energy_head",
    "gather_rows",
    "late_scores",
    "merge_rows",
    "pipeline",
    "register_backbone",
    "route",
    "route_logits",
    "vocab_energy",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'elang' has no attribute {name!r}")
    value = getattr(import_module(f"elang.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
