"""Heads and models. Importing this package registers them with Detectron2."""

from .mask_iou_head import (
    ROI_MASK_IOU_HEAD_REGISTRY,
    MaskIoUHead,
    build_mask_iou_head,
    mask_iou_inference,
    mask_iou_loss,
)
from .mask_iou_target import mask_iou_targets
from .postprocessing import UnpastedMasks
from .retrofit import RetrofitRCNN
from .roi_heads import CascadeMaskScoringROIHeads, MaskScoringROIHeads
from .test_time_augmentation import MaskScoringRCNNWithTTA

__all__ = [
    "ROI_MASK_IOU_HEAD_REGISTRY",
    "CascadeMaskScoringROIHeads",
    "MaskIoUHead",
    "MaskScoringRCNNWithTTA",
    "MaskScoringROIHeads",
    "RetrofitRCNN",
    "UnpastedMasks",
    "build_mask_iou_head",
    "mask_iou_inference",
    "mask_iou_loss",
    "mask_iou_targets",
]
