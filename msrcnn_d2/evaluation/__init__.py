"""COCO evaluation of boxes by class score and masks by mask score, and the quality of masks."""

from .coco_evaluator import MaskScoringCOCOEvaluator
from .mask_quality import MaskQuality, mask_ap, measure_mask_quality
from .matching import true_mask_ious

__all__ = [
    "MaskQuality",
    "MaskScoringCOCOEvaluator",
    "mask_ap",
    "measure_mask_quality",
    "true_mask_ious",
]
