"""ROI heads that score their masks: Detectron2's, with the mask branch extended."""

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    StandardROIHeads,
    select_foreground_proposals,
)
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference, mask_rcnn_loss
from detectron2.structures import Boxes, Instances

from .indexed_masks import with_indexed_masks
from .mask_iou_head import build_mask_iou_head
from .mask_iou_target import crop_gt_masks

__all__ = ["CascadeMaskScoringROIHeads", "DetectedBoxes", "MaskScoringROIHeads"]


class DetectedBoxes(Boxes):
    """
    Boxes whose `nonempty()` is an int64 Tensor of indices in place of a bool Tensor; both select
    the same boxes.

    Detectron2's `detector_postprocess` selects by it. With a bool Tensor each field waits for a
    GPU to count what is selected, and our models have two fields more; with indices all of them
    wait once. This is a type of boxes because postprocessing takes nothing else from the ROI heads
    but fields, and asks only the boxes. Indexing, `to` and `clone` give plain :class:`Boxes`, so
    users meet it only where they asked for results that are not postprocessed.
    """

    def nonempty(self, threshold: float = 0.0) -> torch.Tensor:
        return super().nonempty(threshold).nonzero()[:, 0]


@ROI_HEADS_REGISTRY.register()
class MaskScoringROIHeads(StandardROIHeads):
    """
    :class:`StandardROIHeads` whose mask branch also predicts each mask's IoU with its object.

    In training it adds the loss "loss_mask_iou"; in inference the fields "pred_mask_ious" and
    "mask_scores". Boxes, classes, masks and "scores" are those of Mask R-CNN.
    """

    @configurable
    def __init__(self, *, mask_iou_head: nn.Module, **kwargs):
        """
        Args:
            mask_iou_head: predicts the IoU of masks, such as :class:`MaskIoUHead`.
            kwargs: the arguments of :class:`StandardROIHeads`, with a mask pooler and a mask
                head that has `layers()`, as all of Detectron2's own have.
        """
        super().__init__(**kwargs)
        if not self.mask_on:
            raise ValueError(
                f"{type(self).__name__} scores masks, but its mask branch is off. Set "
                "MODEL.MASK_ON to True (LazyConfig: give mask_in_features, mask_pooler and "
                f"mask_head), or use {StandardROIHeads.__name__}."
            )
        if self.mask_pooler is None or not hasattr(self.mask_head, "layers"):
            raise ValueError(
                f"{type(self).__name__} needs a mask pooler and a mask head with `layers()`, such "
                f"as MaskRCNNConvUpsampleHead; the mask head is {type(self.mask_head).__name__} "
                f"and the mask pooler {self.mask_pooler}."
            )
        self.mask_iou_head = mask_iou_head

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["mask_iou_head"] = cls._init_mask_iou_head(cfg, input_shape)
        return ret

    @classmethod
    def _init_mask_iou_head(cls, cfg, input_shape):
        resolution = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        shape = ShapeSpec(channels=channels, height=resolution, width=resolution)
        return build_mask_iou_head(cfg, shape)

    def forward(self, images, features, proposals, targets=None):
        """
        Args and returns as in the base class, except that the boxes of predictions are
        :class:`DetectedBoxes`.
        """
        results, losses = super().forward(images, features, proposals, targets)
        if not self.training:
            for x in results:
                x.pred_boxes = DetectedBoxes(x.pred_boxes.tensor)
        return results, losses

    def label_and_sample_proposals(self, proposals, targets):
        """
        Args and returns as in the base class, except that "gt_masks" of the proposals are
        :class:`IndexedMasks`, which refer to those of the targets instead of copying them.
        """
        targets = [with_indexed_masks(x) for x in targets]
        return super().label_and_sample_proposals(proposals, targets)

    def _forward_mask(self, features, instances):
        """
        Args and returns as in the base class. In inference the instances also get
        "pred_mask_ious" and, where they have "scores", "mask_scores".
        """
        if not self.mask_on:  # test-time augmentation switches masks off to find boxes
            return {} if self.training else instances

        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
        boxes = [x.proposal_boxes if self.training else x.pred_boxes for x in instances]
        classes = cat([x.gt_classes if self.training else x.pred_classes for x in instances])
        mask_features, mask_logits = self._run_mask_head(features, boxes, classes)

        if self.training:
            return self._mask_losses(mask_features, mask_logits, instances)
        mask_rcnn_inference(mask_logits, instances)
        mask_probs = cat([x.pred_masks for x in instances])
        return self.mask_iou_head(mask_features, mask_probs, instances)

    def _run_mask_head(self, features, boxes, classes):
        """
        Returns:
            the region features (N, C, H, W), and float32 logits (N, 1, S, S) of the masks of
            `classes` (N,). Detectron2's loss and inference take them as class-agnostic ones.
        """
        mask_features = self.mask_pooler([features[f] for f in self.mask_in_features], boxes)
        mask_logits = self.mask_head.layers(mask_features)
        if mask_logits.shape[1] > 1:
            rows = torch.arange(len(classes), device=classes.device)
            mask_logits = mask_logits[rows, classes][:, None]
        # Masks are pasted and compared at full precision, also where autocast computed them. To
        # convert those of all classes would take a copy of them
        return mask_features, mask_logits.float()

    def _mask_losses(self, mask_features, mask_logits, instances):
        instances = crop_gt_masks(instances, mask_logits.shape[-1])
        mask_loss = mask_rcnn_loss(mask_logits, instances, self.mask_head.vis_period)
        return {
            "loss_mask": mask_loss * self.mask_head.loss_weight,
            **self.mask_iou_head(mask_features, mask_logits.sigmoid(), instances),
        }

    def mask_iou_losses(
        self, features: dict[str, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """
        What the MaskIoU head alone has to learn; masks are predicted without a gradient.

        Args:
            features: feature maps by their name, as in the base class.
            proposals: sampled and labeled, one Instances per image, as
                `label_and_sample_proposals` returns them.

        Returns:
            {"loss_mask_iou": a scalar}. The MaskIoU head has to be in training mode; the mode of
            the other parts is up to the caller.
        """
        instances, _ = select_foreground_proposals(proposals, self.num_classes)
        with torch.no_grad():
            boxes = [x.proposal_boxes for x in instances]
            classes = cat([x.gt_classes for x in instances])
            mask_features, mask_logits = self._run_mask_head(features, boxes, classes)
        instances = crop_gt_masks(instances, mask_logits.shape[-1])
        return self.mask_iou_head(mask_features, mask_logits.sigmoid(), instances)


@ROI_HEADS_REGISTRY.register()
class CascadeMaskScoringROIHeads(MaskScoringROIHeads, CascadeROIHeads):
    """:class:`CascadeROIHeads` whose masks are scored as in :class:`MaskScoringROIHeads`."""
