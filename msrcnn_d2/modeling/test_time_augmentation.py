"""Detectron2's test-time augmentation, with mask scores averaged like the masks."""

from typing import Any

import torch

from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import Instances

from .mask_iou_head import set_mask_scores

__all__ = ["MaskScoringRCNNWithTTA"]


class MaskScoringRCNNWithTTA(GeneralizedRCNNWithTTA):
    """
    :class:`GeneralizedRCNNWithTTA` for models with :class:`MaskScoringROIHeads`.

    The "pred_mask_ious" of the merged detections are means over the augmented images, like their
    masks. A calibrator sees the merged detections, with these means.
    """

    def _rescale_detected_boxes(
        self, augmented_inputs: Any, merged_instances: Instances, tfms: Any
    ) -> Any:
        # The next step needs the merged detections, which the base class gives only to this one
        self._merged_instances = merged_instances
        return super()._rescale_detected_boxes(augmented_inputs, merged_instances, tfms)

    def _reduce_pred_masks(self, outputs: list[Instances], tfms: Any) -> torch.Tensor:
        if all(x.has("pred_mask_ious") for x in outputs):  # not those of a plain Mask R-CNN
            mask_ious = torch.stack([x.pred_mask_ious for x in outputs]).mean(dim=0)
            set_mask_scores(self._merged_instances, mask_ious)
        masks = super()._reduce_pred_masks(outputs, tfms)
        calibrator = getattr(getattr(self.model, "roi_heads", None), "mask_calibrator", None)
        if calibrator is not None:
            self._merged_instances.pred_masks = masks
            calibrator([self._merged_instances])
        return masks
