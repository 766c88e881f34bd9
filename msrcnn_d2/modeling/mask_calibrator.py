"""
The calibrator: from what a model says about a detection to the probability that its mask is good.

It is a small network, fitted after training on the detections of a trained model; see
:mod:`msrcnn_d2.calibration`. Nothing of the model changes.
"""

import itertools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from detectron2.utils.registry import Registry

from msrcnn_d2_runtime.iou_thresholds import IOU_THRESHOLDS
from msrcnn_d2_runtime.ranking import NUM_PERCENTS, UNREACHED

from .mask_cues import CUES, Detections, mask_cues

__all__ = [
    "ROI_MASK_CALIBRATOR_REGISTRY",
    "MaskCalibrator",
    "build_mask_calibrator",
    "expected_ious",
]

ROI_MASK_CALIBRATOR_REGISTRY = Registry("ROI_MASK_CALIBRATOR")
ROI_MASK_CALIBRATOR_REGISTRY.__doc__ = """
Registry for calibrators, which tell how likely the mask of a detection is good.

The registered object will be called with `obj(cfg)`.
"""

DROPOUT = 0.1  # after each hidden layer, while the network is fitted
MAX_DEVIATIONS = 5.0  # cues are clamped to that many standard deviations


class _SideBySide(nn.Module):
    """A linear layer of each of several networks: (M, N, C) to (M, N, D)."""

    def __init__(self, num_members: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_members, in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(num_members, 1, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias.float(), x, self.weight.float())


@ROI_MASK_CALIBRATOR_REGISTRY.register()
class MaskCalibrator(nn.Module):
    """
    The probability that a detection is a true positive at each of COCO's IoU thresholds.

    For each threshold the log-odds are a line in the log-odds of the mask score (Platt scaling;
    of the class score if the model predicts no IoU), plus what a small network adds. The network
    sees the cues of :mod:`msrcnn_d2.modeling.mask_cues`. The probabilities of several such networks
    are averaged.

    Attributes:
        cue_mean, cue_std: (C,), by which the cues are standardised.
        slope, offset: (10,), the line for each threshold.
        accept_thresholds: (10, 99), for each IoU threshold and for a precision of 1 % to 99 % the
            probability from which on detections have this precision; 2 where it is not reached.
    """

    cue_mean: torch.Tensor
    cue_std: torch.Tensor
    accept_thresholds: torch.Tensor

    @configurable
    def __init__(self, *, hidden_dim: int = 64, num_members: int = 3):
        """
        Args:
            hidden_dim: width of the two hidden layers.
            num_members: number of networks whose probabilities are averaged.
        """
        super().__init__()
        self.register_buffer("cue_mean", torch.zeros(len(CUES)))
        self.register_buffer("cue_std", torch.ones(len(CUES)))
        num_thresholds = len(IOU_THRESHOLDS)
        self.slope = nn.Parameter(torch.ones(num_thresholds))
        self.offset = nn.Parameter(torch.zeros(num_thresholds))
        self.num_members = num_members
        sizes = (len(CUES), hidden_dim, hidden_dim, num_thresholds)
        self.layers = nn.ModuleList(_SideBySide(num_members, *x) for x in zip(sizes, sizes[1:]))
        unreached = torch.full((num_thresholds, NUM_PERCENTS), UNREACHED)
        self.register_buffer("accept_thresholds", unreached)
        # Neither training nor its processes know the calibrator
        self.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        calibrator = cfg.MODEL.ROI_MASK_CALIBRATOR
        return {"hidden_dim": calibrator.HIDDEN_DIM, "num_members": calibrator.NUM_MEMBERS}

    def standardised(self, cues: torch.Tensor) -> torch.Tensor:
        """
        Args:
            cues: Tensor of shape (N, C), from :func:`mask_cues`.
        """
        cues = (cues - self.cue_mean) / self.cue_std
        return cues.clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)

    def log_odds(
        self, cues: torch.Tensor, score_log_odds: torch.Tensor, with_dropout: bool = False
    ) -> torch.Tensor:
        """
        Args:
            cues: Tensor of shape (M, N, C), standardised, for each of M networks.
            score_log_odds: Tensor of shape (M, N), the log-odds of the mask scores.
            with_dropout: for the fit only. It does not depend on the mode of the module, because
                a calibrator takes no part in training.

        Returns:
            Tensor of shape (M, N, 10), the log-odds of a true positive at each IoU threshold.
        """
        for layer in self.layers[:-1]:
            cues = F.dropout(layer(cues).relu(), DROPOUT, training=with_dropout)
        line = self.slope.float() * score_log_odds[..., None] + self.offset.float()
        return line + self.layers[-1](cues)

    def probs(self, cues: torch.Tensor, score_log_odds: torch.Tensor) -> torch.Tensor:
        """
        Args:
            cues: Tensor of shape (N, C), from :func:`mask_cues`.
            score_log_odds: Tensor of shape (N,), the log-odds of the mask scores.

        Returns:
            float32 Tensor of shape (N, 10), P(true positive) at the IoU thresholds 0.50 to 0.95. It
            never increases with the threshold.
        """
        cues, score_log_odds = (
            x.expand(self.num_members, *x.shape) for x in (self.standardised(cues), score_log_odds)
        )
        probs = self.log_odds(cues, score_log_odds).sigmoid().mean(dim=0)
        # Of each column the minimum so far. `Tensor.cummin` cannot be exported to ONNX
        return torch.stack([*itertools.accumulate(probs.unbind(1), torch.minimum)], dim=1)

    def forward(self, instances: list[Instances]) -> list[Instances]:
        """
        Args:
            instances: one Instances per image as :meth:`Detections.of` takes them, in pixels of the
                image that the model sees.

        Returns:
            the same instances. Where they have "scores", they get "mask_iou_probs" (N, 10); their
            mean, "quality_scores" (N,): the expected precision of the detection over COCO's
            thresholds; and "expected_mask_ious" (N,), see :func:`expected_ious`. Boxes that the
            user gives have no scores.
        """
        if not all(x.has("scores") for x in instances):
            return instances
        detections = Detections.of(instances)
        # In mixed precision the probabilities would be rounded
        with torch.autocast(detections.scores.device.type, enabled=False):
            probs = self.probs(mask_cues(detections), detections.score_log_odds)
        # Unlike len(), a shape is not a constant in a traced model
        counts = [x.scores.shape[0] for x in instances]
        for x, probs_per_image in zip(instances, probs.split(counts)):
            x.mask_iou_probs = probs_per_image
            x.quality_scores = probs_per_image.mean(dim=1)
            x.expected_mask_ious = expected_ious(probs_per_image)
        return instances


def expected_ious(probs: torch.Tensor) -> torch.Tensor:
    """
    The IoU to expect of masks with their objects. A false positive has the IoU 0.

    An IoU between two of COCO's thresholds is taken to be in the middle, and one below 0.5 to be 0.
    A line fitted to true IoUs brought little, and with few images it was far off: on ten models of
    projects/seeds its LaECE_0 was 0.022 instead of 0.025 (fitted to training images) or 0.024
    instead of 0.030 (held-out ones), but its LaACE_0 was higher on shapes.

    Args:
        probs: Tensor of shape (N, 10), from :meth:`MaskCalibrator.probs`.

    Returns:
        Tensor of shape (N,), in [0, 0.975].
    """
    return 0.525 * probs[:, 0] + 0.05 * probs[:, 1:].sum(dim=1)


def build_mask_calibrator(cfg: CfgNode) -> nn.Module | None:
    """The calibrator that `cfg.MODEL.ROI_MASK_CALIBRATOR.NAME` names; None if that is empty."""
    name = cfg.MODEL.ROI_MASK_CALIBRATOR.NAME
    return ROI_MASK_CALIBRATOR_REGISTRY.get(name)(cfg) if name else None
