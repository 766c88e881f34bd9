"""Detectron2's test-time augmentation, with mask scores averaged like the masks."""

import torch
from torch import nn

from detectron2.modeling import GeneralizedRCNNWithTTA

from .mask_iou_head import set_mask_scores

__all__ = ["MaskScoringRCNNWithTTA"]


class MaskScoringRCNNWithTTA(GeneralizedRCNNWithTTA):
    """
    :class:`GeneralizedRCNNWithTTA` for models with :class:`MaskScoringROIHeads`.

    The merged detections get as "pred_mask_ious" the mean over the augmented images, as they get
    the mean of the masks. The exponent of the mask scores is that of the model's MaskIoU head.
    """

    def _rescale_detected_boxes(self, augmented_inputs, merged_instances, tfms):
        # The base class hands the merged detections to this step and the outputs to the next
        # one only, which needs both.
        self._merged_instances = merged_instances
        return super()._rescale_detected_boxes(augmented_inputs, merged_instances, tfms)

    def _reduce_pred_masks(self, outputs, tfms):
        if all(x.has("pred_mask_ious") for x in outputs):  # not those of a plain Mask R-CNN
            mask_ious = torch.stack([x.pred_mask_ious for x in outputs]).mean(dim=0)
            set_mask_scores(self._merged_instances, mask_ious, _score_exponent(self.model))
        return super()._reduce_pred_masks(outputs, tfms)


def _score_exponent(model: nn.Module) -> float:
    """That of the model's MaskIoU head; heads of the user's own may have none."""
    head = getattr(getattr(model, "roi_heads", None), "mask_iou_head", None)
    return getattr(head, "score_exponent", 1.0)
