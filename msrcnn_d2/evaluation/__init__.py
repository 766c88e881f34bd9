"""
Evaluation of boxes by class score and masks by mask score, on COCO, LVIS and Cityscapes, and the
quality of masks.
"""

from .cityscapes_evaluator import MaskScoringCityscapesEvaluator
from .coco_evaluator import MaskScoringCOCOEvaluator
from .federated import in_terms_of_coco
from .lvis_evaluator import MaskScoringLVISEvaluator
from .mask_quality import MaskQuality, mask_ap, measure_mask_quality
from .matching import true_mask_ious
from .panoptic_evaluator import PanopticQualityEvaluator

__all__ = [
    "MaskQuality",
    "MaskScoringCOCOEvaluator",
    "MaskScoringCityscapesEvaluator",
    "MaskScoringLVISEvaluator",
    "PanopticQualityEvaluator",
    "in_terms_of_coco",
    "mask_ap",
    "measure_mask_quality",
    "true_mask_ious",
]
