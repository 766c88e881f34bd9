"""Calibrated scores for a trained model: how likely each mask is good, at every IoU threshold."""

from .calibrate import Calibration, calibrate, calibrate_on
from .collect import CollectedDetections, collect_detections
from .fit import Samples, cross_validated_probs, fit_calibrator

__all__ = [
    "Calibration",
    "CollectedDetections",
    "Samples",
    "calibrate",
    "calibrate_on",
    "collect_detections",
    "cross_validated_probs",
    "fit_calibrator",
]
