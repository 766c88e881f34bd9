"""
Mask Scoring R-CNN for Detectron2.

Importing this package registers its ROI heads and its MaskIoU head with Detectron2.

Data flow, top to bottom (``=`` Detectron2 unchanged, ``+`` ours; training | inference)::

    features, proposals
      = _forward_box                       -> boxes, classes, scores
      = mask_pooler, mask_head.layers      -> mask features, mask logits
      + crop_gt_masks |                    -> ground truth, cropped once for both mask losses and
                                              not copied for each proposal (IndexedMasks)
      = mask_rcnn_loss | mask_rcnn_inference  -> loss_mask | pred_masks (probabilities)
      + mask_iou_targets |                 -> true IoU of each foreground proposal's mask
      + MaskIoUHead.layers                 -> predicted IoU for each class
      + mask_iou_loss | mask_iou_inference -> loss_mask_iou | pred_mask_ious,
                                              mask_scores = scores x pred_mask_ious
      + MaskCalibrator (if there is one)   -> mask_iou_probs: P(IoU >= 0.50, 0.55, ... 0.95),
                                              quality_scores = their mean, expected_mask_ious
      + MaskScoringCOCOEvaluator           -> box AP by scores, mask AP by mask_scores,
                                              MaskQuality: what the scores say about the masks
      + write_report                       -> a page that shows it
"""

import importlib
import warnings
from typing import TYPE_CHECKING

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ModuleNotFoundError(
        "msrcnn_d2 needs Detectron2, which is not installed: run `pip install "
        "./packaging/detectron2` in the repository of msrcnn_d2 (no compiler needed), or follow "
        "Detectron2's own INSTALL.md.",
        name="detectron2",
    ) from None

with warnings.catch_warnings():
    # A warning about fvcore and Detectron2 that users can do nothing about
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    from . import modeling  # registers the heads
    from .modeling import (
        CascadeMaskScoringROIHeads,
        MaskIoUHead,
        MaskScoringROIHeads,
        Res5MaskScoringROIHeads,
    )

if TYPE_CHECKING:
    from msrcnn_d2_runtime.drawing import draw_predictions
    from msrcnn_d2_runtime.integrations import to_sahi, to_supervision

    from . import model_zoo
    from .calibration.calibrate import calibrate
    from .checkpoint import MaskScoringCheckpointer
    from .config import add_mask_calibrator, add_mask_scoring, add_msrcnn_config, retrofit
    from .evaluation import MaskScoringCOCOEvaluator
    from .prediction.loading import load_predictor
    from .prediction.predictor import MaskScoringPredictor
    from .prediction.visualizer import MaskScoringVisualizer

__version__ = "0.1.0"

__all__ = [
    "CascadeMaskScoringROIHeads",
    "MaskIoUHead",
    "MaskScoringCOCOEvaluator",
    "MaskScoringCheckpointer",
    "MaskScoringPredictor",
    "MaskScoringROIHeads",
    "MaskScoringVisualizer",
    "Res5MaskScoringROIHeads",
    "add_mask_calibrator",
    "add_mask_scoring",
    "add_msrcnn_config",
    "calibrate",
    "draw_predictions",
    "load_predictor",
    "model_zoo",
    "modeling",
    "retrofit",
    "to_sahi",
    "to_supervision",
]

# These are imported when they are first used, and then from these modules: training needs no
# predictor, and prediction needs no evaluator.
_LAZY = {
    "MaskScoringCOCOEvaluator": ".evaluation",
    "MaskScoringCheckpointer": ".checkpoint",
    "MaskScoringPredictor": ".prediction.predictor",
    "MaskScoringVisualizer": ".prediction.visualizer",
    "add_mask_calibrator": ".config",
    "add_mask_scoring": ".config",
    "add_msrcnn_config": ".config",
    "calibrate": ".calibration",
    "draw_predictions": "msrcnn_d2_runtime.drawing",
    "load_predictor": ".prediction.loading",
    "retrofit": ".config",
    "to_sahi": "msrcnn_d2_runtime.integrations",
    "to_supervision": "msrcnn_d2_runtime.integrations",
}

if not TYPE_CHECKING:  # type checkers know the names from above, and report others

    def __getattr__(name: str) -> object:
        if name == "model_zoo":
            return importlib.import_module(f"{__name__}.model_zoo")
        if name not in _LAZY:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        return getattr(importlib.import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
