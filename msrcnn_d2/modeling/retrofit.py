"""A trained Mask R-CNN in which only the MaskIoU head learns."""

from typing import Any

import torch

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Instances

from .roi_heads import MaskScoringROIHeads

__all__ = ["RetrofitRCNN"]


@META_ARCH_REGISTRY.register()
class RetrofitRCNN(GeneralizedRCNN):
    """
    :class:`GeneralizedRCNN` that trains only its MaskIoU head.

    All other parameters are frozen, and all other parts are always in evaluation mode: batch norm
    keeps its statistics. Training runs them without autograd, skips the box head (even if
    `train_on_pred_boxes` is set) and all other losses, and returns only "loss_mask_iou". Inference
    and the names in the state dict are those of :class:`GeneralizedRCNN`, so weights can be
    exchanged between the two.
    """

    @configurable
    def __init__(self, **kwargs: Any):
        """
        Args:
            kwargs: the arguments of :class:`GeneralizedRCNN`; `roi_heads` are
                :class:`MaskScoringROIHeads`, :class:`CascadeMaskScoringROIHeads` or derived ones.
        """
        super().__init__(**kwargs)
        if getattr(self.roi_heads, "mask_iou_head", None) is None:
            raise ValueError(
                f"{type(self).__name__} trains the mask_iou_head of its ROI heads, but "
                f"{type(self.roi_heads).__name__} has none: use msrcnn_d2.retrofit(cfg), or set "
                f"MODEL.ROI_HEADS.NAME to {MaskScoringROIHeads.__name__} or its Cascade twin."
            )
        trained = set(self.roi_heads.mask_iou_head.parameters())
        for parameter in self.parameters():
            if parameter not in trained:
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "RetrofitRCNN":
        super().train(False)
        self.training = mode
        self.roi_heads.mask_iou_head.train(mode)
        return self

    def forward(self, batched_inputs: list[dict]) -> Any:
        """
        Args:
            batched_inputs: as in :class:`GeneralizedRCNN`.

        Returns:
            in training {"loss_mask_iou": a scalar}, in inference what :class:`GeneralizedRCNN`
            returns.
        """
        if not self.training:
            return self.inference(batched_inputs)
        features, proposals = self._features_and_proposals(batched_inputs)
        return self.roi_heads.mask_iou_losses(features, proposals)

    @torch.no_grad()
    def _features_and_proposals(
        self, batched_inputs: list[dict]
    ) -> tuple[dict[str, torch.Tensor], list[Instances]]:
        """Feature maps, and the proposals of each image as they are sampled in training."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if self.proposal_generator is not None:
            proposals, _ = self.proposal_generator(images, features, None)
        else:
            proposals = [x["proposals"].to(self.device) for x in batched_inputs]
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        return features, self.roi_heads.label_and_sample_proposals(proposals, targets)
