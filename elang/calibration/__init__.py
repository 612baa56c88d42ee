"""Choosing the threshold on held-out rows and saying what it means there: plain arrays, no models, no torch."""

from elang.calibration.bounds import InfeasibleTarget
from elang.calibration.calibration import Calibration, Curve, Provenance, Target, calibrate

__all__ = ["Calibration", "Curve", "InfeasibleTarget", "Provenance", "Target", "calibrate"]
