"""Turn Mask R-CNN configs of both kinds into Mask Scoring R-CNN configs."""

import copy
import inspect
import math
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import DictConfig, OmegaConf

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    LVISEvaluator,
)
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.solver import WarmupParamScheduler
from detectron2.utils.registry import locate

from .evaluation import (
    MaskScoringCityscapesEvaluator,
    MaskScoringCOCOEvaluator,
    MaskScoringLVISEvaluator,
    PanopticQualityEvaluator,
)
from .modeling import (
    LEARN_FROM,
    CascadeMaskScoringROIHeads,
    MaskCalibrator,
    MaskIoUHead,
    MaskScoring,
    MaskScoringPanopticFPN,
    MaskScoringROIHeads,
    Res5MaskScoringROIHeads,
    RetrofitPanopticFPN,
    RetrofitRCNN,
)

__all__ = [
    "add_mask_calibrator",
    "add_mask_scoring",
    "add_msrcnn_config",
    "has_mask_calibrator",
    "retrofit",
    "target_of",
]

# Detectron2's ROI heads, and ours with mask scoring
TWINS = {
    StandardROIHeads: MaskScoringROIHeads,
    CascadeROIHeads: CascadeMaskScoringROIHeads,
    Res5ROIHeads: Res5MaskScoringROIHeads,
}
# Detectron2's evaluators of instances, and ours, which rank masks by mask score
OUR_EVALUATORS = {
    COCOEvaluator: MaskScoringCOCOEvaluator,
    LVISEvaluator: MaskScoringLVISEvaluator,
    CityscapesInstanceEvaluator: MaskScoringCityscapesEvaluator,
    COCOPanopticEvaluator: PanopticQualityEvaluator,
}
# PointRend's own ROI heads differ from StandardROIHeads only in reading old weights, which our
# checkpointer does for all models. They are known by name, because few users have PointRend
TWINS_BY_NAME = {"PointRendROIHeads": MaskScoringROIHeads}
# Detectron2's models, and those in which only the MaskIoU head learns
RETROFITS = {
    GeneralizedRCNN: RetrofitRCNN,
    PanopticFPN: RetrofitPanopticFPN,
    MaskScoringPanopticFPN: RetrofitPanopticFPN,
}

# Images of a retrofit, 10,000 iterations of 16: a ninth of Detectron2's 1x schedule
RETROFIT_IMAGES = 160_000
RETROFIT_WARMUP = 0.05  # share of the iterations
# How to recognise URLs of backbone weights, from which the training of a Mask R-CNN starts
BACKBONE_WEIGHTS = re.compile(r"ImageNetPretrained/|/pretrain/|/pycls/")
# Cells along a side of a region for the MaskIoU head, as for Mask R-CNN's mask head
POOLER_RESOLUTION = 14
# Arguments of MaskIoUHead that do not follow from the model
HEAD_ARGS = [
    name
    for name in inspect.signature(MaskIoUHead).parameters
    if name not in ("input_shape", "num_classes")
]
# Why a calibrated model gets no new MaskIoU head
CALIBRATED = (
    "The model has a calibrator, which was fitted without the IoUs that a new MaskIoU head "
    "predicts: give the config that the model had before it was calibrated, and calibrate the new "
    "model."
)

Config = TypeVar("Config", DictConfig, CfgNode)


def add_msrcnn_config(cfg: CfgNode) -> None:
    """
    Add the keys of Mask Scoring R-CNN and of `msrcnn-d2 train` to a yacs config, in place.

    The keys of the head take effect if `MODEL.ROI_HEADS.NAME` is "MaskScoringROIHeads",
    "CascadeMaskScoringROIHeads" or "Res5MaskScoringROIHeads". Their defaults are the paper's.
    """
    if "ROI_MASK_IOU_HEAD" not in cfg.MODEL:
        # Configs that version 0.1 saved have it. yacs warns that it is ignored
        cfg.register_deprecated_key("MODEL.ROI_MASK_IOU_HEAD.SCORE_EXPONENT")
    cfg.MODEL.ROI_MASK_IOU_HEAD = CfgNode()
    # Without a name there is no head, which only a model with a calibrator may lack
    cfg.MODEL.ROI_MASK_IOU_HEAD.NAME = "MaskIoUHead"
    # Number and channels of the 3x3 convolutions; the last one has stride 2
    cfg.MODEL.ROI_MASK_IOU_HEAD.NUM_CONV = 4
    cfg.MODEL.ROI_MASK_IOU_HEAD.CONV_DIM = 256
    # Number and width of the hidden fully connected layers
    cfg.MODEL.ROI_MASK_IOU_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_MASK_IOU_HEAD.FC_DIM = 1024
    # Multiplier of loss_mask_iou, which is half a mean squared error
    cfg.MODEL.ROI_MASK_IOU_HEAD.LOSS_WEIGHT = 1.0
    # "MaskCalibrator" for a model with calibrated scores, "" for none; see `add_mask_calibrator`
    cfg.MODEL.ROI_MASK_CALIBRATOR = CfgNode()
    cfg.MODEL.ROI_MASK_CALIBRATOR.NAME = ""
    # Width of the two hidden layers, and number of networks that are averaged
    cfg.MODEL.ROI_MASK_CALIBRATOR.HIDDEN_DIM = 64
    cfg.MODEL.ROI_MASK_CALIBRATOR.NUM_MEMBERS = 3
    # The score that decides which of two overlapping instances a "MaskScoringPanopticFPN" puts on
    # top: "score" (the class score), "mask_score" or "quality_score"
    cfg.MODEL.PANOPTIC_FPN.COMBINE.RANK_BY = "mask_score"
    # What a retrofit learns from: foreground "proposals", as in the paper, or "detections", which
    # include mistakes
    cfg.MODEL.RETROFIT = CfgNode({"LEARN_FROM": "proposals"})
    # The backbone of `MODEL.BACKBONE.NAME: build_timm_fpn_backbone`: the name of a model of timm,
    # whether its batch norm keeps its weights and statistics, and other arguments of
    # `timm.create_model`
    cfg.MODEL.TIMM = CfgNode({"NAME": "", "FREEZE_BATCH_NORM": False})
    cfg.MODEL.TIMM.ARGS = CfgNode(new_allowed=True)
    # Images per batch and process in evaluation
    cfg.DATALOADER.TEST_BATCH_SIZE = 1
    # Number of unreadable images that training may leave out; 0 stops at the first
    cfg.DATALOADER.MAX_BAD_IMAGES = 10
    # Whether to look for images that are missing, truncated or of the wrong size before training
    cfg.DATALOADER.CHECK_IMAGES = True
    # For images with more than 8 bits per pixel: the two values that become 0 and 255, such as
    # (0, 4095), or the percentiles of each image that do, such as (0.1, 99.9). Without one of them,
    # such images are refused
    cfg.INPUT.INTENSITY_RANGE = ()
    cfg.INPUT.INTENSITY_PERCENTILES = ()
    # Whether to apply the orientation in the EXIF data of images
    cfg.INPUT.APPLY_EXIF = True
    # Names of the keypoints, and pairs of them that change places when an image is flipped. None
    # stands for the names in the annotations, and for names that differ in "left" and "right"
    cfg.INPUT.KEYPOINT_NAMES = None
    cfg.INPUT.KEYPOINT_FLIP_MAP = None
    # Number of pixels of the largest image that is read; 0 for Pillow's limit
    cfg.INPUT.MAX_IMAGE_PIXELS = 0
    # What computes AP: "faster-coco-eval" or "pycocotools"; "" for the former if it is installed
    cfg.TEST.COCO_ENGINE = ""
    # Number of detections of each image and class that count in evaluation; 0 for 100 or
    # TEST.DETECTIONS_PER_IMAGE, whichever is more
    cfg.TEST.MAX_DETS_PER_IMAGE = 0
    # Whether to compute Boundary AP, too
    cfg.TEST.BOUNDARY_AP = False
    # Whether evaluation on a GPU uses mixed precision; SOLVER.AMP is for training
    cfg.TEST.AMP = CfgNode({"ENABLED": False})
    # Consecutive steps that the gradient scaler of mixed precision may skip before training stops
    cfg.SOLVER.AMP.MAX_SKIPPED_STEPS = 50
    # Whether to compile backbone and heads with torch.compile, for training and evaluation
    cfg.SOLVER.COMPILE = False
    # The result of the evaluations, such as "segm/AP" or "validation/total_loss", whose best one
    # "model_best.pth" has; "" for no such file. "max" if more is better, "min" if less is
    cfg.SOLVER.BEST_CHECKPOINTER = CfgNode({"VAL_METRIC": "segm/AP", "MODE": "max"})
    # Number of evaluations after which training ends if this result has not become better, by more
    # than MIN_DELTA; 0 for no limit
    cfg.SOLVER.EARLY_STOPPING = CfgNode({"PATIENCE": 0, "MIN_DELTA": 0.0})
    # Whether each evaluation during training computes the training's losses on a dataset; ""
    # for the test sets. Number of its images; 0 for all
    cfg.TEST.VALIDATION_LOSS = CfgNode({"ENABLED": False, "DATASET": "", "NUM_IMAGES": 0})
    # Number of steps that training may leave out because a loss or gradient is not finite; 0 stops
    # at the first
    cfg.SOLVER.MAX_NONFINITE_STEPS = 0
    # Images per iteration that learning rate and schedule are for; 0 for those of the config file.
    # `msrcnn-d2 train --scale-lr` scales them to other batches
    cfg.SOLVER.REFERENCE_BATCH_SIZE = 0
    # Number of parts of a batch whose gradients are computed one after the other, to save memory
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # What to freeze: regular expressions for the beginning of parameters' names, such as "backbone"
    cfg.SOLVER.FREEZE = ()
    # Moving averages of the weights; the keys are those of d2go. They are evaluated and saved; ""
    # keeps them on the device of the model. The last key is for `msrcnn-d2 evaluate`
    cfg.MODEL_EMA = CfgNode({"ENABLED": False, "DECAY": 0.999, "DEVICE": ""})
    cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY = True
    # Hooks and writers of your own, for all processes and for the main process: dotted names such
    # as "my_module.MyHook", or mappings with the name as _target_ and arguments
    cfg.SOLVER.HOOKS = ()
    cfg.SOLVER.WRITERS = ()
    # Whether PyTorch looks for the operation that gives the first NaN; training is slower then
    cfg.SOLVER.DETECT_ANOMALY = False


def add_mask_scoring(cfg: DictConfig, **head_args: Any) -> DictConfig:
    """
    Turn the LazyConfig of a Mask R-CNN into that of a Mask Scoring R-CNN.

    The ROI heads get a MaskIoU head whose sizes follow the mask head's, and Detectron2's evaluators
    (COCO, LVIS, Cityscapes) are replaced by ours, which rank masks by mask score. A Panoptic FPN
    becomes a :class:`MaskScoringPanopticFPN`. Nothing else changes.

    Args:
        cfg: a LazyConfig with a `model` whose `roi_heads` are Detectron2's StandardROIHeads,
            CascadeROIHeads or Res5ROIHeads with a mask branch: FPN, Cascade, C4, LSJ, ViTDet, ...
            It is not modified.
        head_args: arguments of :class:`MaskIoUHead` that differ from the defaults.

    Returns:
        the new config.

    Raises:
        ValueError: `cfg` has no such `model`; the message says what was found instead.

    Example:
        >>> cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
        >>> model = instantiate(add_mask_scoring(cfg).model)
    """
    _check_head_args(head_args)
    cfg = copy.deepcopy(cfg)
    roi_heads = cfg.get("model", {}).get("roi_heads")
    if roi_heads is None:
        model = cfg.get("model", {})
        name = getattr(target_of(model), "__name__", "") if "_target_" in model else ""
        raise ValueError(
            "add_mask_scoring expects a LazyConfig with `model.roi_heads`"
            f"{f', which {name} does not have' if name else ''}."
        )
    if has_mask_calibrator(cfg) and roi_heads.get("mask_iou_head") is None:
        raise ValueError(CALIBRATED)
    found = target_of(roi_heads)
    twin = _twin_of(found)
    if twin is None:
        raise ValueError(
            f"add_mask_scoring expects `model.roi_heads` to be one of "
            f"{[c.__name__ for c in TWINS]}, not {getattr(found, '__name__', found)}. Derive ROI "
            "heads of your own from MaskScoringROIHeads and add a mask_iou_head."
        )
    if roi_heads.get("mask_head") is None:
        raise ValueError(
            "add_mask_scoring expects a mask branch, but `model.roi_heads` has no mask_head."
        )
    roi_heads._target_ = twin
    input_shape: Any = "${..mask_head.input_shape}"
    if twin is not Res5MaskScoringROIHeads and roi_heads.get("mask_pooler") is None:
        # The mask head samples the feature maps itself, as PointRend's does
        roi_heads.mask_iou_pooler = copy.deepcopy(roi_heads.box_pooler)
        roi_heads.mask_iou_pooler.output_size = POOLER_RESOLUTION
        box_head = "box_heads[0]" if twin is CascadeMaskScoringROIHeads else "box_head"
        input_shape = L(shape_of_regions)(
            shape=f"${{...{box_head}.input_shape}}", side="${...mask_iou_pooler.output_size}"
        )
    elif twin is Res5MaskScoringROIHeads:
        # Detectron2 gives the mask head the shape before the res5 block
        input_shape = L(shape_after)(
            shape="${...mask_head.input_shape}", stride_per_block="${...res5.stride_per_block}"
        )
    roi_heads.mask_iou_head = L(MaskIoUHead)(
        input_shape=input_shape, num_classes="${..num_classes}", **head_args
    )
    if _is_panoptic_fpn(cfg.model):
        cfg.model._target_ = MaskScoringPanopticFPN
    _use_our_evaluators(cfg)
    return cfg


def _is_panoptic_fpn(model: DictConfig) -> bool:
    """Whether it is Detectron2's own; a config may also have parts of a model only."""
    return "_target_" in model and target_of(model) is PanopticFPN


def shape_after(shape: ShapeSpec, stride_per_block: list[int]) -> ShapeSpec:
    """
    Args:
        shape: channels that blocks have put out, and height and width before them.
        stride_per_block: stride of each of these blocks.

    Returns:
        channels, height and width after them.
    """
    stride = math.prod(stride_per_block)
    height, width = (-(-side // stride) for side in (shape.height, shape.width))
    return ShapeSpec(channels=shape.channels, height=height, width=width)


def shape_of_regions(shape: ShapeSpec, side: int) -> ShapeSpec:
    """
    Args:
        shape: of regions that another pooler takes from the same feature maps.
        side: cells along a side.

    Returns:
        channels, height and width of regions with this number of cells.
    """
    return ShapeSpec(channels=shape.channels, height=side, width=side)


def _use_our_evaluators(cfg: DictConfig) -> None:
    """Replace Detectron2's evaluators by ours, in place."""
    evaluators = cfg.get("dataloader", {}).get("evaluator") or []
    for evaluator in [evaluators] if isinstance(evaluators, DictConfig) else evaluators:
        found = target_of(evaluator)
        if found in OUR_EVALUATORS:
            evaluator._target_ = OUR_EVALUATORS[found]


def add_mask_calibrator(cfg: Config) -> Config:
    """
    Turn the config of a Mask R-CNN, with or without mask scoring, into that of the same model with
    a calibrator; see :class:`MaskCalibrator`.

    :func:`msrcnn_d2.calibration.calibrate` writes weights for it, together with such a config. A
    Panoptic FPN becomes a :class:`MaskScoringPanopticFPN` that merges its instances as before.

    Args:
        cfg: a LazyConfig whose `model.roi_heads` are Detectron2's StandardROIHeads,
            CascadeROIHeads or Res5ROIHeads, or our twins of them; or a yacs config. It is not
            modified.

    Returns:
        the new config, of the same kind. A calibrator that `cfg` has already stays as it is.

    Raises:
        ValueError: `cfg` has no such model, or no mask branch.
    """
    if isinstance(cfg, CfgNode):
        cfg = cfg.clone()
        cfg.defrost()
        if "ROI_MASK_CALIBRATOR" not in cfg.MODEL:
            add_msrcnn_config(cfg)
        found = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)
        has_masks = cfg.MODEL.MASK_ON
    else:
        cfg = copy.deepcopy(cfg)
        roi_heads = cfg.get("model", {}).get("roi_heads")
        if roi_heads is None:
            raise ValueError("A calibrator needs a LazyConfig with `model.roi_heads`.")
        found, has_masks = target_of(roi_heads), roi_heads.get("mask_head") is not None
    twin = _twin_of(found)
    if twin is None and not _scores_masks(found):
        raise ValueError(
            f"A calibrator needs ROI heads of {[c.__name__ for c in TWINS]}, or ones that are "
            f"derived from MaskScoring, not {getattr(found, '__name__', found)}."
        )
    if not has_masks:
        raise ValueError("A calibrator needs a mask branch, but the model has none.")
    if isinstance(cfg, CfgNode):
        cfg.MODEL.ROI_MASK_CALIBRATOR.NAME = MaskCalibrator.__name__
        if twin is not None:
            cfg.MODEL.ROI_HEADS.NAME = twin.__name__
            cfg.MODEL.ROI_MASK_IOU_HEAD.NAME = ""
        if cfg.MODEL.META_ARCHITECTURE == PanopticFPN.__name__:
            cfg.MODEL.META_ARCHITECTURE = MaskScoringPanopticFPN.__name__
            cfg.MODEL.PANOPTIC_FPN.COMBINE.RANK_BY = "score"
        return cfg
    if _is_panoptic_fpn(cfg.model):
        cfg.model._target_ = MaskScoringPanopticFPN
        cfg.model.combine_rank_by = "score"
    if twin is not None:
        roi_heads._target_ = twin
    if roi_heads.get("mask_calibrator") is None:
        roi_heads.mask_calibrator = L(MaskCalibrator)()
    _use_our_evaluators(cfg)
    return cfg


def has_mask_calibrator(cfg: DictConfig | CfgNode) -> bool:
    """Whether the model of a config has a calibrator."""
    if isinstance(cfg, CfgNode):
        return bool(cfg.MODEL.get("ROI_MASK_CALIBRATOR", CfgNode({"NAME": ""})).NAME)
    return OmegaConf.select(cfg, "model.roi_heads.mask_calibrator") is not None


def _check_head_args(head_args: dict[str, Any]) -> None:
    for name in head_args:
        if name not in HEAD_ARGS:
            raise ValueError(f"The MaskIoU head has no '{name}', only {', '.join(HEAD_ARGS)}.")


def retrofit(cfg: Config, learn_from: str | None = None, **head_args: Any) -> Config:
    """
    Turn the config of a trained Mask R-CNN into one that trains a MaskIoU head for it and changes
    none of its other weights and outputs; see :class:`RetrofitRCNN`.

    Besides the model, three settings change. The schedule becomes a cosine over 160,000 images
    (10,000 iterations of 16), or over the length of `cfg`'s schedule if that is shorter. The output
    folder becomes "retrofit" within `cfg`'s, which may hold the trained model. Initial weights of a
    backbone are removed: set those of the trained Mask R-CNN in their place.

    Args:
        cfg: a LazyConfig or yacs config of a Mask R-CNN, with or without mask scoring. It is not
            modified.
        learn_from: "proposals" of objects, as in the paper, or "detections", which include
            mistakes; see :class:`RetrofitRCNN`. By default as in `cfg`, where it is "proposals" if
            nothing else is said.
        head_args: arguments of :class:`MaskIoUHead` that differ from the defaults.

    Returns:
        the new config, of the same kind. If `cfg` is a retrofit already, only `learn_from` and
        `head_args` change.

    Raises:
        ValueError: `cfg` has no such model; the message says what was found instead.

    Example:
        >>> cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
        >>> cfg = retrofit(cfg)
        >>> cfg.MODEL.WEIGHTS = "mask_rcnn.pth"
    """
    _check_head_args(head_args)
    if learn_from is not None and learn_from not in LEARN_FROM:
        raise ValueError(f"learn_from is {learn_from!r}, not {' or '.join(LEARN_FROM)}.")
    if has_mask_calibrator(cfg):
        raise ValueError(CALIBRATED)
    is_yaml = isinstance(cfg, CfgNode)
    cfg = _retrofit_yacs(cfg, head_args) if is_yaml else _retrofit_lazy(cfg, head_args)
    if learn_from is not None:
        if is_yaml:
            cfg.MODEL.RETROFIT.LEARN_FROM = learn_from
        else:
            cfg.model.learn_from = learn_from
    return cfg


def _retrofit_lazy(cfg: DictConfig, head_args: dict[str, Any]) -> DictConfig:
    # The model
    roi_heads = OmegaConf.select(cfg, "model.roi_heads")
    architecture = target_of(cfg.model) if roi_heads is not None else GeneralizedRCNN
    _check_architecture(architecture)
    if roi_heads is not None and _scores_masks(target_of(roi_heads)):
        cfg = copy.deepcopy(cfg)
        cfg.model.roi_heads.mask_iou_head.update(head_args)
    else:
        cfg = add_mask_scoring(cfg, **head_args)
    if architecture not in RETROFITS:  # it is a retrofit already
        return cfg
    cfg.model._target_ = RETROFITS[architecture]
    if architecture is PanopticFPN:
        cfg.model.combine_rank_by = "score"
    if "train" not in cfg:
        return cfg

    # Its training
    train = cfg.train
    batch = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    train.max_iter = _retrofit_length(train.max_iter, batch)
    cfg.lr_multiplier = L(WarmupParamScheduler)(
        scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
        warmup_length=RETROFIT_WARMUP,
        warmup_method="linear",
        warmup_factor=0.001,
    )
    train.output_dir = os.path.join(train.output_dir, "retrofit")
    if BACKBONE_WEIGHTS.search(train.init_checkpoint):
        train.init_checkpoint = ""
    return cfg


def _retrofit_yacs(cfg: CfgNode, head_args: dict[str, Any]) -> CfgNode:
    # The model
    cfg = cfg.clone()
    cfg.defrost()
    if "ROI_MASK_IOU_HEAD" not in cfg.MODEL:
        add_msrcnn_config(cfg)
    for key, value in head_args.items():
        cfg.MODEL.ROI_MASK_IOU_HEAD[key.upper()] = value
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    _check_architecture(architecture)
    if architecture not in RETROFITS:  # it is a retrofit already
        return cfg
    cfg.MODEL.META_ARCHITECTURE = RETROFITS[architecture].__name__
    if architecture is PanopticFPN:
        cfg.MODEL.PANOPTIC_FPN.COMBINE.RANK_BY = "score"
    name = cfg.MODEL.ROI_HEADS.NAME
    roi_heads = ROI_HEADS_REGISTRY.get(name)
    if not _scores_masks(roi_heads):
        twin = _twin_of(roi_heads)
        if twin is None:
            raise ValueError(
                "retrofit expects MODEL.ROI_HEADS.NAME to be one of "
                f"{[c.__name__ for c in TWINS]}, not {name}. Derive ROI heads of your own from "
                "MaskScoringROIHeads."
            )
        cfg.MODEL.ROI_HEADS.NAME = twin.__name__
    if not cfg.MODEL.MASK_ON:
        raise ValueError("retrofit expects a mask branch, but MODEL.MASK_ON is False.")

    # Its training
    solver = cfg.SOLVER
    solver.MAX_ITER = _retrofit_length(solver.MAX_ITER, solver.IMS_PER_BATCH)
    solver.LR_SCHEDULER_NAME = "WarmupCosineLR"
    solver.STEPS = ()
    solver.WARMUP_ITERS = round(RETROFIT_WARMUP * solver.MAX_ITER)
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "retrofit")
    if BACKBONE_WEIGHTS.search(cfg.MODEL.WEIGHTS):
        cfg.MODEL.WEIGHTS = ""
    return cfg


def _retrofit_length(max_iter: int, batch: int | None) -> int:
    """Iterations: no more images than a retrofit needs, and no more than the model had."""
    return min(max_iter, math.ceil(RETROFIT_IMAGES / (batch or 16)))


def _check_architecture(found: Callable) -> None:
    if found not in (*RETROFITS, *RETROFITS.values()):
        raise ValueError(
            f"retrofit expects a model of {[c.__name__ for c in RETROFITS]}, not a "
            f"{getattr(found, '__name__', found)}."
        )


def _twin_of(roi_heads: Any) -> type[MaskScoring] | None:
    """Ours with mask scoring for ROI heads of Detectron2; None for others."""
    return TWINS.get(roi_heads) or TWINS_BY_NAME.get(getattr(roi_heads, "__name__", ""))


def _scores_masks(roi_heads: Callable) -> bool:
    return isinstance(roi_heads, type) and issubclass(roi_heads, MaskScoring)


def target_of(node: DictConfig) -> Callable:
    """What a LazyConfig node calls. A config that was saved and read again has its dotted name."""
    return locate(node._target_) if isinstance(node._target_, str) else node._target_
