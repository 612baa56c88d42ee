"""Calibrations of made-up scores, and routings to monitor."""

from __future__ import annotations

import numpy as np
import torch

from elang.calibration import calibrate
from elang.reference import Route, partition


def calibrated(scores, share=0.6, **options):
    right = np.random.default_rng(0).random(len(scores)) < 0.8
    return calibrate({"energy": np.float32(scores)}, right, ~right, score="energy", swift_share=share, **options)


def normal(rows, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, rows).astype(np.float32)


def routed(scores, threshold):
    """What a router returns, as far as a monitor looks."""
    score = torch.as_tensor(scores)
    return Route(torch.empty(0), score, *partition(score.isfinite() & (score >= threshold)))


def read(calibration, scores, **options):
    monitor = calibration.monitor(**options)
    monitor.update(routed(scores, calibration.threshold))
    return monitor.read()
