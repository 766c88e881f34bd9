"""Detectron2's test-time augmentation, with mask scores averaged like the masks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    DatasetMapperTTA,
    GeneralizedRCNNWithTTA,
    PanopticFPN,
    detector_postprocess,
)

from ..utils.errors import UserError
from .mask_iou_head import set_mask_scores
from .postprocessing import rescale_unpasted

__all__ = ["MaskScoringRCNNWithTTA", "ScaledTTAMapper"]


class MaskScoringRCNNWithTTA(GeneralizedRCNNWithTTA):
    """
    :class:`GeneralizedRCNNWithTTA` for models with :class:`MaskScoringROIHeads`.

    The "pred_mask_ious" of the merged detections are means over the augmented images, like their
    masks. A calibrator sees the merged detections, with these means.
    """

    def __init__(
        self,
        cfg: CfgNode | None,
        model: nn.Module,
        tta_mapper: Callable | None = None,
        batch_size: int = 3,
        paste_masks: bool = True,
    ):
        """
        Args:
            cfg: the yacs config of the model; None for a model of a LazyConfig, whose thresholds
                are those of its own parts, and whose augmentations are :class:`ScaledTTAMapper`.
            model, tta_mapper, batch_size: as in Detectron2.
            paste_masks: False leaves "pred_masks" as :class:`ROIMasks`, which take less memory.

        Raises:
            UserError: the model is a Panoptic FPN.
        """
        if isinstance(model, PanopticFPN):
            raise UserError(
                "Test-time augmentation merges instances only, and the model is a Panoptic FPN: "
                "predict without it."
            )
        if cfg is None:
            cfg = _config_of(model)
            tta_mapper = tta_mapper or ScaledTTAMapper()
        super().__init__(cfg, model, tta_mapper, batch_size)
        self.paste_masks = paste_masks

    def _inference_one_image(self, input: dict[str, Any]) -> dict[str, Any]:
        size = input["height"], input["width"]
        augmented, transforms = self._get_augmented_inputs(input)
        with self._turn_off_roi_heads(["mask_on", "keypoint_on"]):
            boxes = self._get_augmented_boxes(augmented, transforms)
        merged = self._merge_detections(*boxes, size)
        if not self.cfg.MODEL.MASK_ON:
            return {"instances": merged}
        given = self._rescale_detected_boxes(augmented, merged, transforms)
        outputs = self._batch_inference(augmented, given)
        if all(x.has("pred_mask_ious") for x in outputs):  # not those of a plain Mask R-CNN
            mask_ious = torch.stack([x.pred_mask_ious for x in outputs]).mean(dim=0)
            set_mask_scores(merged, mask_ious)
        merged.pred_masks = self._reduce_pred_masks(outputs, transforms)
        calibrator = getattr(getattr(self.model, "roi_heads", None), "mask_calibrator", None)
        if calibrator is not None:
            calibrator([merged])
        finish = detector_postprocess if self.paste_masks else rescale_unpasted
        return {"instances": finish(merged, *size)}


class ScaledTTAMapper(DatasetMapperTTA):
    """
    Augmentations of a model whose config has none: the image at several scales, and flipped.

    The scales are relative to the size at which the model usually sees the image. For a short edge
    of 800 pixels they are Detectron2's: 400, 500, ..., 1200.
    """

    SCALES = tuple(k / 8 for k in range(4, 13))
    LONGEST = 5.0  # Detectron2's largest size, 4000, as a multiple of the short edge

    def __init__(self) -> None:
        super().__init__(min_sizes=[], max_size=0, flip=True)

    def __call__(self, dataset_dict: dict[str, Any]) -> list[dict[str, Any]]:
        edge = min(dataset_dict["image"].shape[1:])
        sizes = [max(round(edge * scale), 1) for scale in self.SCALES]
        scaled = DatasetMapperTTA(sizes, round(edge * self.LONGEST), self.flip)
        return scaled(dataset_dict)


def _config_of(model: nn.Module) -> CfgNode:
    """The keys that Detectron2's test-time augmentation reads, with the values of a model."""
    heads: Any = model.roi_heads
    predictor = heads.box_predictor
    if isinstance(predictor, nn.ModuleList):  # Cascade: the last stage's
        predictor = predictor[-1]
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = heads.mask_on
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = heads.num_classes
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = predictor.test_nms_thresh
    cfg.TEST.DETECTIONS_PER_IMAGE = predictor.test_topk_per_image
    return cfg
