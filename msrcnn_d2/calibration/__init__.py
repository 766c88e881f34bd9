"""Calibrated scores for a trained model: how likely each mask is good, at every IoU threshold."""

from .calibrate import (
    Calibration,
    CheckedFit,
    add_scores,
    calibrate,
    calibrate_on,
    fit_if_better,
)
from .collect import CollectedDetections, collect_detections
from .fit import Samples, cross_validated_probs, fit_calibrator

__all__ = [
    "Calibration",
    "CheckedFit",
    "CollectedDetections",
    "Samples",
    "add_scores",
    "calibrate",
    "calibrate_on",
    "collect_detections",
    "cross_validated_probs",
    "fit_calibrator",
    "fit_if_better",
]
