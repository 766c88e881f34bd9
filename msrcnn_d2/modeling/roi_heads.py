"""Detectron2's ROI heads, with a mask branch that scores its masks."""

from typing import Any

import torch
from torch import nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    Res5ROIHeads,
    ROIHeads,
    StandardROIHeads,
    select_foreground_proposals,
)
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference, mask_rcnn_loss
from detectron2.structures import BitMasks, Boxes, Instances, pairwise_iou

from .indexed_masks import IndexedMasks, with_indexed_masks
from .mask_calibrator import build_mask_calibrator
from .mask_iou_head import build_mask_iou_head
from .mask_iou_target import crop_gt_masks
from .own_mask_heads import gives_mask_logits, own_mask_logits

__all__ = [
    "CascadeMaskScoringROIHeads",
    "DetectedBoxes",
    "MaskScoring",
    "MaskScoringROIHeads",
    "Res5MaskScoringROIHeads",
]


class DetectedBoxes(Boxes):
    """
    Boxes whose `nonempty()` returns an int64 Tensor of indices instead of a bool Tensor. Both
    select the same boxes.

    Detectron2's `detector_postprocess` uses it to select boxes. With a bool Tensor, each field
    waits for the GPU to count what is selected, and our models add up to five fields; with indices,
    all fields wait once. This is a type of boxes because postprocessing gets nothing but fields
    from the ROI heads, and calls methods of the boxes only. Indexing, `to` and `clone` return plain
    :class:`Boxes`, so users only see this type in results that are not postprocessed.
    """

    def nonempty(self, threshold: float = 0.0) -> torch.Tensor:
        return super().nonempty(threshold).nonzero()[:, 0]


class MaskScoring(ROIHeads):
    """
    ROI heads whose mask branch also scores its masks, on top of those of Detectron2: derive from
    this class first, and then from Detectron2's.

    A MaskIoU head predicts each mask's IoU with its object. It adds the loss "loss_mask_iou" in
    training, and the fields "pred_mask_ious" and "mask_scores" in inference. A calibrator adds
    "mask_iou_probs", "quality_scores" and "expected_mask_ious" in inference. Boxes, classes, masks
    and "scores" are those of Mask R-CNN.
    """

    @configurable
    def __init__(
        self,
        *,
        mask_iou_head: nn.Module | None = None,
        mask_calibrator: nn.Module | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            mask_iou_head: predicts the IoU of masks, such as :class:`MaskIoUHead`.
            mask_calibrator: computes calibrated scores, such as :class:`MaskCalibrator`. It is
                fitted after training, so it takes no part in it. At least one of the two is needed.
            kwargs: the arguments of Detectron2's ROI heads, with a mask head that has `layers()`,
                as Mask R-CNN's, or one that computes its own losses and masks and has
                `mask_logits()`, see :func:`own_mask_logits`. PointRend's heads need no such method.
        """
        super().__init__(**kwargs)
        without_scores = next(
            x.__name__ for x in type(self).__mro__ if not issubclass(x, MaskScoring)
        )
        if not self.mask_on:
            raise ValueError(
                f"{type(self).__name__} scores masks, but its mask branch is off. Set "
                "MODEL.MASK_ON to True (LazyConfig: give mask_in_features, mask_pooler and "
                f"mask_head, in C4 models only mask_head), or use {without_scores}."
            )
        self._head_has_layers = hasattr(self.mask_head, "layers")
        if not self._head_has_layers and not gives_mask_logits(self.mask_head):
            raise ValueError(
                f"{type(self).__name__} needs a mask head with `layers()`, such as "
                "MaskRCNNConvUpsampleHead, or with `mask_logits()`, which docs/your_model.md "
                f"describes; the mask head is {type(self.mask_head).__name__}."
            )
        if mask_iou_head is None and mask_calibrator is None:
            raise ValueError(
                f"{type(self).__name__} scores masks with a mask_iou_head, a mask_calibrator or "
                f"both, but has neither: give one of them, or use {without_scores}."
            )
        self.mask_iou_head = mask_iou_head
        self.mask_calibrator = mask_calibrator

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ret = super().from_config(cfg, input_shape)
        ret["mask_calibrator"] = build_mask_calibrator(cfg)
        if cfg.MODEL.ROI_MASK_IOU_HEAD.NAME:
            shape = cls._mask_feature_shape(cfg, input_shape)
            ret["mask_iou_head"] = build_mask_iou_head(cfg, shape)
        return ret

    @classmethod
    def _mask_feature_shape(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> ShapeSpec:
        """Channels, height and width of what :meth:`_mask_features` returns."""
        raise NotImplementedError

    def _mask_features(
        self, features: dict[str, torch.Tensor], boxes: list[Boxes]
    ) -> torch.Tensor | None:
        """
        Args:
            features: feature maps by their name.
            boxes: of each image.

        Returns:
            float Tensor of shape (N, C, H, W), the features of all boxes for mask head and MaskIoU
            head; None if there is no MaskIoU head and the mask head needs none.
        """
        raise NotImplementedError

    def _mask_inputs(
        self, features: dict[str, torch.Tensor], mask_features: torch.Tensor | None
    ) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """
        Args:
            features: feature maps by their name.
            mask_features: from :meth:`_mask_features`.

        Returns:
            what the mask head gets.
        """
        return mask_features

    def forward(
        self, images: Any, features: Any, proposals: Any, targets: Any = None
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """
        Args and returns as in the base class, except that the boxes of predictions are
        :class:`DetectedBoxes`.
        """
        results, losses = super().forward(images, features, proposals, targets)
        if not self.training:
            for x in results:
                x.pred_boxes = DetectedBoxes(x.pred_boxes.tensor)
        return results, losses

    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        Args and returns as in the base class, except that "gt_masks" of the proposals are
        :class:`IndexedMasks`, which refer to the masks of the targets instead of copying them.
        """
        targets = [with_indexed_masks(x) for x in targets]
        return super().label_and_sample_proposals(proposals, targets)

    def label_detections(
        self, detections: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        What the MaskIoU head can learn from detections: for each the object of the predicted class
        whose box it overlaps most. Duplicates share an object.

        Args:
            detections: one Instances per image, with "pred_boxes" and "pred_classes".
            targets: the ground truth of these images, with "gt_boxes", "gt_classes" and, unless it
                is empty, "gt_masks".

        Returns:
            one Instances per image, like foreground proposals: "proposal_boxes" and "gt_classes"
            are those of the detections, "gt_masks" are :class:`IndexedMasks` of their objects. The
            bool "has_object" is False if the image has no object of the class; the mask is then
            that of another object, or empty.
        """
        labeled = []
        for found, truth in zip(detections, targets):
            if not len(truth):
                # One object that covers no pixel
                nothing = found.pred_boxes.tensor.new_zeros(1, *truth.image_size, dtype=torch.bool)
                truth = Instances(
                    truth.image_size,
                    gt_boxes=Boxes(found.pred_boxes.tensor.new_zeros(1, 4)),
                    gt_classes=found.pred_classes.new_full((1,), -1),
                    gt_masks=BitMasks(nothing),
                )
            overlaps = pairwise_iou(found.pred_boxes, truth.gt_boxes)
            same_class = found.pred_classes[:, None] == truth.gt_classes
            overlaps, nearest = torch.where(same_class, overlaps, -1.0).max(dim=1)
            labeled.append(
                Instances(
                    found.image_size,
                    proposal_boxes=found.pred_boxes,
                    gt_classes=found.pred_classes,
                    gt_masks=with_indexed_masks(truth).gt_masks[nearest],
                    has_object=overlaps >= 0,
                )
            )
        return labeled

    def _forward_mask(self, features: dict[str, torch.Tensor], instances: list[Instances]) -> Any:
        """
        Args and returns as in the base class. In inference, a MaskIoU head adds "pred_mask_ious"
        to the instances and, where they have "scores", "mask_scores"; a calibrator adds
        "mask_iou_probs", "quality_scores" and "expected_mask_ious".
        """
        if not self.mask_on:  # test-time augmentation switches masks off to find boxes
            return {} if self.training else instances

        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
        return self._predict_masks(
            features, self._mask_features(features, _boxes_of(instances)), instances
        )

    def _predict_masks(
        self,
        features: dict[str, torch.Tensor],
        mask_features: torch.Tensor | None,
        instances: list[Instances],
    ) -> Any:
        """
        Args:
            features: feature maps by their name.
            mask_features: from :meth:`_mask_features`.
            instances: the foreground proposals, or the predictions.

        Returns:
            in training the losses of masks and scores, in inference the instances with both.
        """
        inputs = self._mask_inputs(features, mask_features)
        if self.training:
            return self._mask_losses(inputs, mask_features, instances)
        if self._head_has_layers:
            mask_rcnn_inference(self._mask_logits(inputs, instances), instances)
        else:
            instances = self.mask_head(inputs, instances)
        if self.mask_iou_head is not None:
            if self._head_has_layers:
                mask_probs = cat([x.pred_masks for x in instances])
            else:
                mask_probs = self._mask_logits(inputs, instances).sigmoid()
            instances = self.mask_iou_head(mask_features, mask_probs, instances)
        if self.mask_calibrator is not None:
            instances = self.mask_calibrator(instances)
        return instances

    def _mask_losses(
        self, inputs: Any, mask_features: torch.Tensor | None, proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        if self._head_has_layers:
            mask_logits = self._mask_logits(inputs, proposals)
            proposals = crop_gt_masks(proposals, mask_logits.shape[-1])
            mask_loss = mask_rcnn_loss(mask_logits, proposals, self.mask_head.vis_period)
            losses = {"loss_mask": mask_loss * self.mask_head.loss_weight}
        else:
            losses = self.mask_head(inputs, [_with_detectron2_masks(x) for x in proposals])
        if self.mask_iou_head is None:
            return losses
        if not self._head_has_layers:
            # The head learns what it would learn without scores
            with torch.no_grad():
                mask_logits = self._mask_logits(inputs, proposals)
            proposals = crop_gt_masks(proposals, mask_logits.shape[-1])
        return losses | self.mask_iou_head(mask_features, mask_logits.sigmoid(), proposals)

    def _mask_logits(self, inputs: Any, instances: list[Instances]) -> torch.Tensor:
        """
        Args:
            inputs: from :meth:`_mask_inputs`.
            instances: the foreground proposals, or the predictions.

        Returns:
            float32 Tensor of shape (N, 1, S, S), the logits of each instance's mask of its class,
            "pred_classes" or else "gt_classes". To Detectron2's loss and inference, they look
            class-agnostic.
        """
        if self._head_has_layers:
            mask_logits = self.mask_head.layers(inputs)
        else:
            mask_logits = own_mask_logits(self.mask_head, inputs, _boxes_of(instances))
        if mask_logits.shape[1] > 1:
            classes = cat(
                [x.pred_classes if x.has("pred_classes") else x.gt_classes for x in instances]
            )
            rows = torch.arange(classes.shape[0], device=classes.device)
            mask_logits = mask_logits[rows, classes][:, None]
        # Masks are pasted and compared at full precision, even if autocast computed them. Only
        # those of one class are converted, because conversion makes a copy
        return mask_logits.float()

    def mask_iou_losses(
        self, features: dict[str, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """
        The loss of the MaskIoU head alone; masks are predicted without a gradient.

        Args:
            features: feature maps by their name, as in the base class.
            proposals: one Instances per image: proposals, sampled and labeled, as
                `label_and_sample_proposals` returns them, or detections from
                `label_detections`.

        Returns:
            {"loss_mask_iou": a scalar}. The MaskIoU head has to be in training mode; the other
            parts may be in any mode.
        """
        assert self.mask_iou_head is not None, "without a MaskIoU head there is no such loss"
        instances, _ = select_foreground_proposals(proposals, self.num_classes)
        with torch.no_grad():
            mask_features = self._mask_features(features, _boxes_of(instances))
            inputs = self._mask_inputs(features, mask_features)
            mask_logits = self._mask_logits(inputs, instances)
        instances = crop_gt_masks(instances, mask_logits.shape[-1])
        return self.mask_iou_head(mask_features, mask_logits.sigmoid(), instances)


@ROI_HEADS_REGISTRY.register()
class MaskScoringROIHeads(MaskScoring, StandardROIHeads):
    """:class:`StandardROIHeads` whose masks are scored, see :class:`MaskScoring`."""

    @configurable
    def __init__(self, *, mask_iou_pooler: nn.Module | None = None, **kwargs: Any):
        """
        Args:
            mask_iou_pooler: pools the features of regions for the MaskIoU head, if the mask head
                has no pooler because it samples the feature maps itself, as PointRend's does.
            kwargs: the arguments of :class:`MaskScoring` and :class:`StandardROIHeads`.
        """
        super().__init__(**kwargs)
        self.mask_iou_pooler = mask_iou_pooler
        if self.mask_pooler is None and self._head_has_layers:
            raise ValueError(
                f"{type(self).__name__} needs a mask_pooler, because its mask head has `layers()`."
            )
        if self.mask_iou_head is not None and self.mask_pooler is None and mask_iou_pooler is None:
            raise ValueError(
                f"{type(self).__name__} needs a mask_iou_pooler, such as the box_pooler with an "
                "output_size of 14, because it has no mask_pooler."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        ret = super().from_config(cfg, input_shape)
        if "mask_head" in ret and ret["mask_pooler"] is None:
            # Like the box head's, but with the resolution of masks
            shape = cls._mask_feature_shape(cfg, input_shape)
            ret["mask_iou_pooler"] = ROIPooler(
                output_size=shape.height,
                scales=[1.0 / input_shape[f].stride for f in cfg.MODEL.ROI_HEADS.IN_FEATURES],
                sampling_ratio=cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO,
                pooler_type=cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE,
            )
        return ret

    @classmethod
    def _mask_feature_shape(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> ShapeSpec:
        resolution = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        return ShapeSpec(channels=channels, height=resolution, width=resolution)

    def _mask_features(
        self, features: dict[str, torch.Tensor], boxes: list[Boxes]
    ) -> torch.Tensor | None:
        pooler = self.mask_iou_pooler if self.mask_pooler is None else self.mask_pooler
        if pooler is None:
            return None
        return pooler([features[f] for f in self.mask_in_features], boxes)

    def _mask_inputs(
        self, features: dict[str, torch.Tensor], mask_features: torch.Tensor | None
    ) -> torch.Tensor | dict[str, torch.Tensor] | None:
        if self.mask_pooler is None:
            return {f: features[f] for f in self.mask_in_features}
        return mask_features


@ROI_HEADS_REGISTRY.register()
class CascadeMaskScoringROIHeads(MaskScoringROIHeads, CascadeROIHeads):
    """:class:`CascadeROIHeads` whose masks are scored as in :class:`MaskScoringROIHeads`."""

    def _run_stage(
        self, features: list[torch.Tensor], proposals: list[Instances], stage: int
    ) -> Any:
        """Args and returns as in the base class."""
        if self.training:
            return super()._run_stage(features, proposals, stage)
        # Detectron2 0.6 scales a gradient here, by a Python function. A traced model with one
        # cannot be saved
        box_features = self.box_pooler(features, [x.proposal_boxes for x in proposals])
        return self.box_predictor[stage](self.box_head[stage](box_features))


@ROI_HEADS_REGISTRY.register()
class Res5MaskScoringROIHeads(MaskScoring, Res5ROIHeads):
    """
    :class:`Res5ROIHeads`, of C4 models, whose masks are scored, see :class:`MaskScoring`. The
    MaskIoU head shares the features of the res5 block with the other heads.
    """

    @classmethod
    def _mask_feature_shape(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> ShapeSpec:
        channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8
        resolution = -(-cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION // 2)  # the block has stride 2
        return ShapeSpec(channels=channels, height=resolution, width=resolution)

    def forward(
        self, images: Any, features: Any, proposals: Any, targets: Any = None
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Args and returns as in :class:`MaskScoring`."""
        if not self.training:
            return super().forward(images, features, proposals)
        proposals = self.label_and_sample_proposals(proposals, targets)
        box_features = self._mask_features(features, [x.proposal_boxes for x in proposals])
        predictions = self.box_predictor(box_features.mean(dim=[2, 3]))
        losses = self.box_predictor.losses(predictions, proposals)
        proposals, selected = select_foreground_proposals(proposals, self.num_classes)
        # The features of a region are computed once, for its box and its mask
        return [], losses | self._predict_masks(features, box_features[cat(selected)], proposals)

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Args and returns as in the base class."""
        return self._forward_mask(features, instances)

    def _forward_box(
        self, features: dict[str, torch.Tensor], proposals: list[Instances]
    ) -> list[Instances]:
        """Boxes and classes in inference, as :class:`StandardROIHeads` finds them."""
        box_features = self._mask_features(features, [x.proposal_boxes for x in proposals])
        predictions = self.box_predictor(box_features.mean(dim=[2, 3]))
        return self.box_predictor.inference(predictions, proposals)[0]

    def _mask_features(self, features: dict[str, torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        return self._shared_roi_transform([features[f] for f in self.in_features], boxes)


def _boxes_of(instances: list[Instances]) -> list[Boxes]:
    """Those of predictions, or else those of proposals."""
    return [x.pred_boxes if x.has("pred_boxes") else x.proposal_boxes for x in instances]


def _with_detectron2_masks(proposals: Instances) -> Instances:
    """A copy whose "gt_masks" have a type of Detectron2, which its mask heads may ask for."""
    fields = proposals.get_fields()
    masks = fields.get("gt_masks")
    if isinstance(masks, IndexedMasks):
        fields = {**fields, "gt_masks": masks.materialize()}
    return Instances(proposals.image_size, **fields)
