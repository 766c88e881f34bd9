"""How a Mask R-CNN config becomes a Mask Scoring R-CNN config, for both kinds of config."""

import copy
from collections.abc import Callable

from omegaconf import DictConfig

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.utils.registry import locate

from .evaluation import MaskScoringCOCOEvaluator
from .modeling import CascadeMaskScoringROIHeads, MaskIoUHead, MaskScoringROIHeads

__all__ = ["add_mask_scoring", "add_msrcnn_config", "target_of"]


def add_msrcnn_config(cfg: CfgNode) -> None:
    """
    Add the keys of Mask Scoring R-CNN to a yacs config, in place.

    They take effect with `MODEL.ROI_HEADS.NAME` "MaskScoringROIHeads" or
    "CascadeMaskScoringROIHeads"; the defaults are the paper's.
    """
    cfg.MODEL.ROI_MASK_IOU_HEAD = CfgNode()
    cfg.MODEL.ROI_MASK_IOU_HEAD.NAME = "MaskIoUHead"
    # Number and channels of the 3x3 convolutions; the last one has stride 2
    cfg.MODEL.ROI_MASK_IOU_HEAD.NUM_CONV = 4
    cfg.MODEL.ROI_MASK_IOU_HEAD.CONV_DIM = 256
    # Number and width of the hidden fully connected layers
    cfg.MODEL.ROI_MASK_IOU_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_MASK_IOU_HEAD.FC_DIM = 1024
    # Multiplier of loss_mask_iou, which is half a mean squared error
    cfg.MODEL.ROI_MASK_IOU_HEAD.LOSS_WEIGHT = 1.0


def add_mask_scoring(cfg: DictConfig, **head_args) -> DictConfig:
    """
    Turn the LazyConfig of a Mask R-CNN into that of its mask-scoring twin.

    The ROI heads get a MaskIoU head whose sizes follow the mask head's, and a COCO evaluator
    becomes the one that ranks masks by mask score. Nothing else changes.

    Args:
        cfg: a LazyConfig with a `model` whose `roi_heads` are Detectron2's StandardROIHeads or
            CascadeROIHeads with a mask branch: FPN, Cascade, LSJ, ViTDet, ... It is not modified.
        head_args: arguments of :class:`MaskIoUHead` that differ from the defaults.

    Returns:
        the new config.

    Raises:
        ValueError: `cfg` has no such `model`; the message says what was found instead.

    Example:
        >>> cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
        >>> model = instantiate(add_mask_scoring(cfg).model)
    """
    cfg = copy.deepcopy(cfg)
    roi_heads = cfg.get("model", {}).get("roi_heads")
    if roi_heads is None:
        raise ValueError("add_mask_scoring expects a LazyConfig with `model.roi_heads`.")
    roi_heads._target_ = _mask_scoring_roi_heads(roi_heads)
    roi_heads.mask_iou_head = L(MaskIoUHead)(
        input_shape="${..mask_head.input_shape}", num_classes="${..num_classes}", **head_args
    )
    evaluator = cfg.get("dataloader", {}).get("evaluator")
    if evaluator is not None and target_of(evaluator) is COCOEvaluator:
        evaluator._target_ = MaskScoringCOCOEvaluator
    return cfg


def _mask_scoring_roi_heads(roi_heads: DictConfig) -> type:
    twins = {
        StandardROIHeads: MaskScoringROIHeads,
        CascadeROIHeads: CascadeMaskScoringROIHeads,
    }
    found = target_of(roi_heads)
    if found not in twins:
        raise ValueError(
            f"add_mask_scoring expects `model.roi_heads` to be one of "
            f"{[c.__name__ for c in twins]}, not {getattr(found, '__name__', found)}. For ROI "
            "heads of your own, derive them from MaskScoringROIHeads and add a mask_iou_head."
        )
    if roi_heads.get("mask_head") is None:
        raise ValueError(
            "add_mask_scoring expects a mask branch, but `model.roi_heads` has no mask_head."
        )
    return twins[found]


def target_of(node: DictConfig) -> Callable:
    """What a LazyConfig node calls; configs that were saved and read again have its dotted name."""
    return locate(node._target_) if isinstance(node._target_, str) else node._target_
