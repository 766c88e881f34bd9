"""COCO evaluation: boxes by class score, masks by mask score, and how good masks are."""

from .coco_evaluator import MaskScoringCOCOEvaluator
from .mask_quality import mask_ap, true_mask_ious

__all__ = ["MaskScoringCOCOEvaluator", "mask_ap", "true_mask_ious"]
