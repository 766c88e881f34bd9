"""A trained Mask R-CNN in which only the MaskIoU head learns."""

from typing import Any

import torch

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Instances

from .panoptic_fpn import MaskScoringPanopticFPN
from .roi_heads import MaskScoringROIHeads

__all__ = ["LEARN_FROM", "RetrofitPanopticFPN", "RetrofitRCNN"]

LEARN_FROM = ("proposals", "detections")


@META_ARCH_REGISTRY.register()
class RetrofitRCNN(GeneralizedRCNN):
    """
    :class:`GeneralizedRCNN` that trains only its MaskIoU head.

    All other parameters are frozen, and all other parts are always in evaluation mode: batch norm
    keeps its statistics. Training runs them without autograd, skips all other losses, and returns
    only "loss_mask_iou". Inference and the names in the state dict are those of
    :class:`GeneralizedRCNN`, so weights can be exchanged between the two.

    By default the head learns from foreground proposals, as in the paper, and the box head does not
    run, even if `train_on_pred_boxes` is set. Such a head never sees a mistake. With
    `learn_from="detections"` it learns from what inference finds, after non-maximum suppression:
    from duplicates and from detections without an object (IoU 0), too. projects/retrofit/README.md
    compares the two.
    """

    @configurable
    def __init__(self, *, learn_from: str = "proposals", **kwargs: Any):
        """
        Args:
            learn_from: "proposals" or "detections".
            kwargs: the arguments of :class:`GeneralizedRCNN`; `roi_heads` are those of
                :class:`MaskScoringROIHeads`, its twins for Cascade and C4, or derived ones.
        """
        super().__init__(**kwargs)
        if learn_from not in LEARN_FROM:
            raise ValueError(f"learn_from is {learn_from!r}, not {' or '.join(LEARN_FROM)}.")
        self.learn_from = learn_from
        if getattr(self.roi_heads, "mask_iou_head", None) is None:
            raise ValueError(
                f"{type(self).__name__} trains the mask_iou_head of its ROI heads, but "
                f"{type(self.roi_heads).__name__} has none: use msrcnn_d2.retrofit(cfg), or set "
                f"MODEL.ROI_HEADS.NAME to {MaskScoringROIHeads.__name__} or a twin of it."
            )
        trained = set(self.roi_heads.mask_iou_head.parameters())
        for parameter in self.parameters():
            if parameter not in trained:
                parameter.requires_grad_(False)
        self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "learn_from": cfg.MODEL.RETROFIT.LEARN_FROM}

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
        features, instances = self._features_and_instances(batched_inputs)
        return self.roi_heads.mask_iou_losses(features, instances)

    @torch.no_grad()
    def _features_and_instances(
        self, batched_inputs: list[dict]
    ) -> tuple[dict[str, torch.Tensor], list[Instances]]:
        """Feature maps, and what the head learns from in each image, with its objects."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if self.proposal_generator is not None:
            proposals, _ = self.proposal_generator(images, features, None)
        else:
            proposals = [x["proposals"].to(self.device) for x in batched_inputs]
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        if self.learn_from == "proposals":
            return features, self.roi_heads.label_and_sample_proposals(proposals, targets)
        detections = self.roi_heads._forward_box(features, proposals)
        return features, self.roi_heads.label_detections(detections, targets)


@META_ARCH_REGISTRY.register()
class RetrofitPanopticFPN(RetrofitRCNN, MaskScoringPanopticFPN):
    """
    :class:`MaskScoringPanopticFPN` that trains only its MaskIoU head, as :class:`RetrofitRCNN`
    does. Semantic segmentation takes no part in training.
    """
