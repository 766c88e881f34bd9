"""
The MaskIoU head: predicts how well each mask fits its object.

Masks are ranked by class score x predicted IoU.
"""

import math
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
from torch import nn
from torch.nn import functional as F

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, cat
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry

from .mask_iou_target import mask_iou_targets

__all__ = [
    "ROI_MASK_IOU_HEAD_REGISTRY",
    "MaskIoUHead",
    "build_mask_iou_head",
    "mask_iou_inference",
    "mask_iou_loss",
    "set_mask_scores",
]

ROI_MASK_IOU_HEAD_REGISTRY = Registry("ROI_MASK_IOU_HEAD")
ROI_MASK_IOU_HEAD_REGISTRY.__doc__ = """
Registry for MaskIoU heads, which predict the IoU of each predicted mask with its object.

The registered object will be called with `obj(cfg, input_shape)`, where `input_shape` is the
:class:`ShapeSpec` of the mask head's region features.
"""

# Larger errors occur if training starts from features that explode, such as those of a frozen batch
# norm without pre-trained weights. Mask R-CNN's own losses survive that because they are linear. A
# square does not: with ResNet-50 it is not finite in the second iteration.
MAX_QUADRATIC_ERROR = 10.0


def mask_iou_loss(
    pred_mask_ious: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Half the mean squared error over the masks that are counted.

    Beyond `MAX_QUADRATIC_ERROR`, far outside the range of an IoU, it grows linearly.

    Args:
        pred_mask_ious: Tensor of shape (N,), the IoU predicted for the ground-truth class of
            each foreground proposal or the predicted class of each detection, unbounded.
        targets: Tensor of shape (N,), the true IoU in [0, 1].
        counted: bool Tensor of shape (N,); by default the masks that overlap their object (their
            IoU is above 0), as in the paper.

    Returns:
        a scalar. Without such masks it is a zero that still depends on `pred_mask_ious`, because
        distributed training needs a gradient for each parameter in each step.
    """
    weights = (targets > 0 if counted is None else counted).to(targets.dtype)
    losses = F.huber_loss(pred_mask_ious, targets, reduction="none", delta=MAX_QUADRATIC_ERROR)
    return (losses * weights).sum() / weights.sum().clamp(min=1)


def mask_iou_inference(pred_mask_ious: torch.Tensor, pred_instances: list[Instances]) -> None:
    """
    Rank the masks: add "pred_mask_ious" and "mask_scores" to the predicted instances.

    Args:
        pred_mask_ious: Tensor of shape (N, K), the IoU predicted for each class, unbounded;
            N counts the masks of all images, K the foreground classes.
        pred_instances: one Instances per image, with "pred_classes"; each gets the IoU of its
            class. "mask_scores" are added if there are "scores": boxes given by the user have none.
    """
    classes = cat([x.pred_classes for x in pred_instances])
    ious = pred_mask_ious.gather(1, classes[:, None])[:, 0]
    # Unlike len(), a shape is not a constant in a traced model
    counts = [x.pred_classes.shape[0] for x in pred_instances]
    for instances, ious_per_image in zip(pred_instances, ious.split(counts)):
        set_mask_scores(instances, ious_per_image)


def set_mask_scores(instances: Instances, mask_ious: torch.Tensor) -> None:
    """
    The rescoring step: mask score = class score x mask IoU (Sec. 3.1). It does not change "scores".

    Args:
        instances: predicted instances of one image, gets "pred_mask_ious" and, if it has "scores",
            "mask_scores".
        mask_ious: Tensor of shape (N,), the predicted IoU of each mask. It is clamped to [0, 1],
            because a regression can leave that interval.
    """
    ious = instances.pred_mask_ious = mask_ious.clamp(min=0, max=1)
    if instances.has("scores"):
        instances.mask_scores = instances.scores * ious


@ROI_MASK_IOU_HEAD_REGISTRY.register()
class MaskIoUHead(nn.Module):
    """
    The head of Mask Scoring R-CNN (Huang et al., CVPR 2019, Fig. 3): 3x3 convolutions, the last
    with stride 2, and fully connected layers over the mask head's region features and its mask.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dim: int = 256,
        num_conv: int = 4,
        fc_dim: int = 1024,
        num_fc: int = 2,
        loss_weight: float = 1.0,
    ):
        """
        Args:
            input_shape: channels, height and width of the mask head's region features. The mask
                is one more channel.
            num_classes: number of foreground classes; the head predicts one IoU for each, even
                with a class-agnostic mask head.
            conv_dim: channels of each convolution.
            num_conv: number of convolutions, at least 1.
            fc_dim: width of each fully connected layer.
            num_fc: number of fully connected layers before the predictor.
            loss_weight: multiplier of the loss.
        """
        super().__init__()
        if num_conv < 1:
            raise ValueError(f"num_conv is {num_conv}; the MaskIoU head has at least 1 convolution")
        self.loss_weight = loss_weight

        channels = input_shape.channels + 1
        self.convs = nn.Sequential()
        for k in range(1, num_conv + 1):
            stride = 2 if k == num_conv else 1
            conv = Conv2d(channels, conv_dim, 3, stride=stride, padding=1, activation=nn.ReLU())
            weight_init.c2_msra_fill(conv)
            self.convs.add_module(f"conv{k}", conv)
            channels = conv_dim

        # 3x3 with padding 1 and stride 2 halves a side, rounded up
        features = channels * -(-input_shape.height // 2) * -(-input_shape.width // 2)
        self.fcs = nn.Sequential(nn.Flatten())
        for k in range(1, num_fc + 1):
            fc = nn.Linear(features, fc_dim)
            weight_init.c2_xavier_fill(fc)
            self.fcs.add_module(f"fc{k}", fc)
            self.fcs.add_module(f"relu{k}", nn.ReLU())
            features = fc_dim

        self.predictor = nn.Linear(features, num_classes)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.constant_(self.predictor.bias, 0)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        head = cfg.MODEL.ROI_MASK_IOU_HEAD
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dim": head.CONV_DIM,
            "num_conv": head.NUM_CONV,
            "fc_dim": head.FC_DIM,
            "num_fc": head.NUM_FC,
            "loss_weight": head.LOSS_WEIGHT,
        }

    def layers(self, mask_features: torch.Tensor, mask_probs: torch.Tensor) -> torch.Tensor:
        """
        Args:
            mask_features: Tensor of shape (N, C, H, W), the mask head's region features.
            mask_probs: Tensor of shape (N, 1, S, S), the probabilities of the mask of one class
                per region; S is a multiple of H.

        Returns:
            float Tensor of shape (N, K), the IoU predicted for each class, unbounded.
        """
        scale = mask_probs.shape[-1] // mask_features.shape[-1]
        pooled = F.max_pool2d(mask_probs, kernel_size=scale, stride=scale)
        x = torch.cat([mask_features, pooled.to(mask_features.dtype)], dim=1)
        return self.predictor(self.fcs(self.convs(x))).float()

    def forward(
        self, mask_features: torch.Tensor, mask_probs: torch.Tensor, instances: list[Instances]
    ) -> Any:
        """
        Args:
            mask_features, mask_probs: as in :meth:`layers`; N counts the instances of all images.
                The mask is that of the ground-truth class in training, and of the predicted class
                in inference.
            instances: one Instances per image. In training the foreground proposals, with
                "proposal_boxes", "gt_classes" and "gt_masks" from :func:`crop_gt_masks`; or
                detections with "has_object" besides, see
                :meth:`MaskScoring.label_detections`. All detections count in the loss, with
                the target 0 if they have no object. Of the proposals, those with an IoU above 0 do.
                In inference the predictions, with "pred_classes".

        Returns:
            In training a dict of losses, in inference the instances with "pred_mask_ious" and
            "mask_scores".
        """
        side, cells = mask_probs.shape[-1], mask_features.shape[-1]
        if self.training and side % cells:  # in a traced inference, numbers cannot be compared
            raise ValueError(
                f"The scored masks have {side} x {side} cells, which is no multiple of the {cells} "
                "of the features: change the mask head's `mask_logits()` or the output_size of "
                "mask_iou_pooler."
            )
        pred_mask_ious = self.layers(mask_features, mask_probs)
        if self.training:
            return {"loss_mask_iou": self._loss(pred_mask_ious, mask_probs, instances)}
        mask_iou_inference(pred_mask_ious, instances)
        return instances

    def _loss(
        self, pred_mask_ious: torch.Tensor, mask_probs: torch.Tensor, instances: list[Instances]
    ) -> torch.Tensor:
        instances = [x for x in instances if len(x)]
        if not instances:
            return pred_mask_ious.sum() * 0
        targets = mask_iou_targets(
            mask_probs[:, 0] > 0.5,
            cat([x.gt_masks.crops for x in instances]),
            cat([x.gt_masks.areas for x in instances]),
            cat([x.proposal_boxes.tensor for x in instances]),
        )
        counted = targets > 0
        if instances[0].has("has_object"):
            targets = targets * cat([x.has_object for x in instances])
            counted = torch.ones_like(counted)
        classes = cat([x.gt_classes for x in instances])
        pred_mask_ious = pred_mask_ious.gather(1, classes[:, None])[:, 0]
        _log_mask_ious(pred_mask_ious.detach(), targets, counted)
        return mask_iou_loss(pred_mask_ious, targets, counted) * self.loss_weight


def _log_mask_ious(
    pred_mask_ious: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor
) -> None:
    """
    Log the mean true IoU and the mean absolute error over the masks that count in the loss.

    Raises:
        FloatingPointError: a target is NaN. To find it here costs no synchronisation of its own.
    """
    weights = counted.to(targets.dtype)
    errors = (pred_mask_ious - targets).abs()
    sums = torch.stack([weights.sum(), targets.sum(), (errors * weights).sum()])
    num_counted, sum_targets, sum_errors = sums.tolist()  # one synchronisation for all of them
    if math.isnan(sum_targets):
        raise FloatingPointError(
            "The box of a proposal is not finite, so its mask has no IoU: look for such numbers in "
            "the annotations, or training has diverged."
        )
    if num_counted:
        storage = get_event_storage()
        storage.put_scalar("mask_iou/mean_target", sum_targets / num_counted)
        storage.put_scalar("mask_iou/mean_abs_error", sum_errors / num_counted)


def build_mask_iou_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the MaskIoU head named by `cfg.MODEL.ROI_MASK_IOU_HEAD.NAME`."""
    name = cfg.MODEL.ROI_MASK_IOU_HEAD.NAME
    return ROI_MASK_IOU_HEAD_REGISTRY.get(name)(cfg, input_shape)
