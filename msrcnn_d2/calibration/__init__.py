"""Calibrated scores for a trained model: how likely each mask is good, at every IoU threshold."""

from .calibrate import Calibration, calibrate
from .fit import Samples, cross_validated_probs, fit_calibrator

__all__ = ["Calibration", "Samples", "calibrate", "cross_validated_probs", "fit_calibrator"]
