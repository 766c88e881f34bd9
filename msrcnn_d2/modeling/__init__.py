"""Heads and models. Importing this package registers them with Detectron2."""

from .mask_calibrator import (
    ROI_MASK_CALIBRATOR_REGISTRY,
    MaskCalibrator,
    build_mask_calibrator,
    expected_ious,
)
from .mask_cues import CUES, Cue, Detections, mask_cues
from .mask_iou_head import (
    ROI_MASK_IOU_HEAD_REGISTRY,
    MaskIoUHead,
    build_mask_iou_head,
    mask_iou_inference,
    mask_iou_loss,
)
from .mask_iou_target import mask_iou_targets
from .own_mask_heads import is_point_rend
from .panoptic_fpn import MaskScoringPanopticFPN
from .postprocessing import UnpastedMasks
from .retrofit import LEARN_FROM, RetrofitPanopticFPN, RetrofitRCNN
from .roi_heads import (
    CascadeMaskScoringROIHeads,
    MaskScoring,
    MaskScoringROIHeads,
    Res5MaskScoringROIHeads,
)
from .test_time_augmentation import MaskScoringRCNNWithTTA, ScaledTTAMapper
from .timm_backbone import TimmBackbone, build_timm_fpn_backbone

__all__ = [
    "CUES",
    "LEARN_FROM",
    "ROI_MASK_CALIBRATOR_REGISTRY",
    "ROI_MASK_IOU_HEAD_REGISTRY",
    "CascadeMaskScoringROIHeads",
    "Cue",
    "Detections",
    "MaskCalibrator",
    "MaskIoUHead",
    "MaskScoring",
    "MaskScoringPanopticFPN",
    "MaskScoringRCNNWithTTA",
    "MaskScoringROIHeads",
    "Res5MaskScoringROIHeads",
    "RetrofitPanopticFPN",
    "RetrofitRCNN",
    "ScaledTTAMapper",
    "TimmBackbone",
    "UnpastedMasks",
    "build_mask_calibrator",
    "build_mask_iou_head",
    "build_timm_fpn_backbone",
    "expected_ious",
    "is_point_rend",
    "mask_cues",
    "mask_iou_inference",
    "mask_iou_loss",
    "mask_iou_targets",
]
