"""Choosing the threshold on held-out rows and saying what it means there: plain arrays, no models, no torch."""

from elang.calibration.artefact import Provenance
from elang.calibration.bounds import InfeasibleTarget
from elang.calibration.calibration import Calibration, Curve, Target, calibrate
from elang.calibration.gates import Costs, GateCalibration, calibrate_gates, gate_outcome

__all__ = [
    "Calibration",
    "Costs",
    "Curve",
    "GateCalibration",
    "InfeasibleTarget",
    "Provenance",
    "Target",
    "calibrate",
    "calibrate_gates",
    "gate_outcome",
]
