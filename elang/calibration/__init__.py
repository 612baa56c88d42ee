"""Choosing the threshold on held-out rows and saying what it means there: plain arrays, no models, no torch."""

from elang.calibration.artefact import Provenance
from elang.calibration.bounds import InfeasibleTarget
from elang.calibration.calibration import Calibration, Curve, Target, calibrate
from elang.calibration.cascade import CascadeCalibration, calibrate_cascade
from elang.calibration.cascade_search import CascadeCosts
from elang.calibration.costs import BatchCosts, GateCosts
from elang.calibration.gates import GateCalibration, calibrate_gates, gate_outcome
from elang.calibration.risk import RiskBound

__all__ = [
    "BatchCosts",
    "Calibration",
    "CascadeCalibration",
    "CascadeCosts",
    "Curve",
    "GateCalibration",
    "GateCosts",
    "InfeasibleTarget",
    "Provenance",
    "RiskBound",
    "Target",
    "calibrate",
    "calibrate_cascade",
    "calibrate_gates",
    "gate_outcome",
]
