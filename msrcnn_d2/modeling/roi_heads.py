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
from detectron2.structures import Instances

from .indexed_masks import with_indexed_masks
from .mask_iou_head import build_mask_iou_head
from .mask_iou_target import crop_gt_masks

__all__ = ["CascadeMaskScoringROIHeads", "MaskScoringROIHeads"]


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
        mask_features, mask_logits = self._run_mask_head(features, boxes)

        if self.training:
            return self._mask_losses(mask_features, mask_logits, instances)
        mask_rcnn_inference(mask_logits, instances)
        mask_probs = cat([x.pred_masks for x in instances])
        return self.mask_iou_head(mask_features, mask_probs, instances)

    def _run_mask_head(self, features, boxes):
        mask_features = self.mask_pooler([features[f] for f in self.mask_in_features], boxes)
        # Masks are pasted and compared at full precision, also where autocast computed them
        return mask_features, self.mask_head.layers(mask_features).float()

    def _mask_losses(self, mask_features, mask_logits, instances):
        instances = crop_gt_masks(instances, mask_logits.shape[-1])
        mask_loss = mask_rcnn_loss(mask_logits, instances, self.mask_head.vis_period)
        return {
            "loss_mask": mask_loss * self.mask_head.loss_weight,
            **self._mask_iou_losses(mask_features, mask_logits, instances),
        }

    def _mask_iou_losses(self, mask_features, mask_logits, instances):
        classes = cat([x.gt_classes for x in instances])
        mask_probs = _masks_of_classes(mask_logits, classes).sigmoid()
        return self.mask_iou_head(mask_features, mask_probs, instances)

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
            mask_features, mask_logits = self._run_mask_head(features, boxes)
        instances = crop_gt_masks(instances, mask_logits.shape[-1])
        return self._mask_iou_losses(mask_features, mask_logits, instances)


def _masks_of_classes(mask_logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The (N, 1, S, S) masks of `classes` (N,); a class-agnostic head has the same for each."""
    if mask_logits.shape[1] == 1:
        return mask_logits
    return mask_logits[torch.arange(len(classes), device=classes.device), classes][:, None]


@ROI_HEADS_REGISTRY.register()
class CascadeMaskScoringROIHeads(MaskScoringROIHeads, CascadeROIHeads):
    """:class:`CascadeROIHeads` whose masks are scored as in :class:`MaskScoringROIHeads`."""
