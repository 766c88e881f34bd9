"""A model as one function of tensors: from the pixels of an image to ranked detections."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.structures import Boxes, Instances

from msrcnn_d2_runtime.ranking import SCORE_FIELDS

from ..modeling import UnpastedMasks
from ..prediction.predictor import MaskScoringPredictor
from ..utils.errors import UserError
from .metadata import box_predictor_of, resize_rule_of
from .resizing import resized, resized_size

__all__ = ["InferenceGraph", "Operators", "OUTPUTS", "moved_apart"]

# Where Detectron2 looks batched_nms up
NMS_USERS = (
    "detectron2.modeling.proposal_generator.proposal_utils",
    "detectron2.modeling.roi_heads.fast_rcnn",
)
SCALE_GRADIENT = "detectron2.modeling.roi_heads.cascade_rcnn._ScaleGradient"
# Up to this many boxes, torchvision's batched_nms on a CPU moves the classes apart and runs once;
# that rounds the boxes, so that the choice among near-duplicates can be another one
MAX_BOXES_MOVED_APART = 1000

# Fields of instances and what they are called in an exported model, in this order
OUTPUTS = {
    "pred_boxes": "boxes",
    "pred_classes": "classes",
    "scores": "scores",
    "pred_mask_ious": "pred_mask_ious",
    "mask_scores": "mask_scores",
    "quality_scores": "quality_scores",
    "expected_mask_ious": "expected_mask_ious",
    "mask_iou_probs": "mask_iou_probs",
    "pred_masks": "masks",
}


class Operators(NamedTuple):
    """
    What the formats have different operators for.

    Attributes:
        nms: replaces Detectron2's `batched_nms`. Boxes (N, 4), scores (N,), the class or level of
            each (N,) and an IoU -> the indices of the boxes to keep, the best first.
        best_first: scores (N,) -> indices of the scores from the highest to the lowest; of equal
            ones, the first comes first.
    """

    nms: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
    best_first: Callable[[torch.Tensor], torch.Tensor]


class _Unscaled:
    @staticmethod
    def apply(features: torch.Tensor, scale: float) -> torch.Tensor:
        return features


class InferenceGraph(nn.Module):
    """
    Resizes an image, finds the objects in it, and ranks them.

    It is a copy of the model on the CPU, in float32 and in evaluation mode, so that the model
    itself stays as it is.
    """

    def __init__(self, predict: MaskScoringPredictor, paste_masks: bool, ops: Operators):
        """
        Args:
            predict: has the model, says how its images are resized, and by what it ranks.
            paste_masks: whether masks are pasted into the image.
            ops: those of the format that it is exported to.

        Raises:
            UserError: such a model cannot be exported.
        """
        super().__init__()
        model: Any = predict.model
        if not (UnpastedMasks.supports(model) and model.roi_heads.mask_on):
            raise UserError(
                "Only a Mask R-CNN whose outputs are those of Detectron2's GeneralizedRCNN can be "
                f"exported, with or without mask scoring, but this is a "
                f"{type(model).__name__}."
            )
        if predict.input_format not in ("RGB", "BGR"):
            raise UserError(
                "Only models for RGB or BGR images can be exported, but the config says "
                f"{predict.input_format}."
            )
        self.resize = resize_rule_of(predict)
        self.flip_channels = predict.input_format == "BGR"
        self.ranking = SCORE_FIELDS[predict.rank_by]
        self.paste_masks = paste_masks
        self.ops = ops
        self.model = copy.deepcopy(model).cpu().float()
        self.model.to(memory_format=torch.contiguous_format)
        # TorchScript would record operations for a gradient, unless its user says no_grad
        self.model.requires_grad_(False)
        self.eval()

    def forward(
        self, image: torch.Tensor, output_size: torch.Tensor, score_threshold: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            image: uint8 Tensor of shape (H, W, 3), RGB.
            output_size: int64 Tensor of shape (2,), the height and width in pixels that boxes and
                masks are for; (0, 0) for those of `image`.
            score_threshold: float32 scalar; detections with a class score up to it are left out.

        Returns:
            detections, the best first, by the names in `OUTPUTS`.
        """
        own_size = torch._shape_as_tensor(image)[:2]
        size = torch.where(output_size > 0, output_size, own_size)
        if self.resize is None:
            pixels = image.permute(2, 0, 1).float()
        else:
            pixels = resized(image, resized_size(own_size, self.resize))
        if self.flip_channels:
            pixels = pixels.flip(0)
        with self._traceable(score_threshold):
            (found,) = self.model.inference([{"image": pixels}], do_postprocess=False)
        return self._outputs(found, pixels, size)

    @contextmanager
    def _traceable(self, score_threshold: torch.Tensor) -> Iterator[None]:
        """Detectron2's code without what tracing takes for a constant."""
        predictor = box_predictor_of(self.model)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # of compiled parts
            stack.enter_context(patch_builtin_len())
            for user in NMS_USERS:
                stack.enter_context(mock.patch(f"{user}.batched_nms", self.ops.nms))
            # A Python function, which a Cascade of Detectron2 0.6 calls for its gradient only
            stack.enter_context(mock.patch(SCALE_GRADIENT, _Unscaled))
            patch = mock.patch.object(predictor, "test_score_thresh", score_threshold)
            stack.enter_context(patch)
            yield

    def _outputs(
        self, found: Instances, pixels: torch.Tensor, size: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            found: what the model finds in `pixels` (3, h, w).
            size: (2,), height and width for boxes and masks.
        """
        scale = size.float() / torch._shape_as_tensor(pixels)[1:].float()
        boxes = Boxes(found.pred_boxes.tensor * scale.flip(0).repeat(2))
        boxes.clip((size[0], size[1]))
        found = Instances(found.image_size, **{**found.get_fields(), "pred_boxes": boxes})
        found = found[boxes.nonempty().nonzero()[:, 0]]
        # Of equal scores, the first stays first
        found = found[self.ops.best_first(found.get(self.ranking))]

        outputs = {}
        for field, name in OUTPUTS.items():
            if not found.has(field):
                continue
            value = found.get(field)
            if field == "pred_boxes":
                value = value.tensor
            elif field == "pred_masks":
                value = value[:, 0]
                if self.paste_masks:
                    value = pasted(value, found.pred_boxes.tensor, size)
            outputs[name] = value
        return outputs


def pasted(masks: torch.Tensor, boxes: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """
    What Detectron2's `paste_masks_in_image` does, for all masks at once: bilinear interpolation, as
    a product of matrices. This takes less memory and time than a grid of all pixels of all masks.

    Args:
        masks: (N, S, S), probabilities in the cells of each box.
        boxes: (N, 4), XYXY in pixels.
        size: (2,), height and width of the image.

    Returns:
        bool Tensor of shape (N, H, W).
    """
    cells = masks.shape[-1]
    weights = []
    for axis in (1, 0):  # y, x
        length: Any = size[1 - axis]
        pixel = torch.arange(length, dtype=torch.float32) + 0.5
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        # In the same order as `paste_masks_in_image` and grid_sample, for the same rounding
        position = ((pixel - low) / (high - low) * 2 - 1 + 1) * (cells / 2) - 0.5
        distance = position[:, :, None] - torch.arange(cells, dtype=torch.float32)
        weights.append((1 - distance.abs()).clamp(min=0))
    return weights[0] @ masks @ weights[1].transpose(1, 2) >= 0.5


def moved_apart(boxes: torch.Tensor, idxs: torch.Tensor) -> torch.Tensor:
    """
    The boxes whose overlaps torchvision's `batched_nms` computes on a CPU: those of different
    classes do not overlap if there are few boxes, while many boxes stay where they are.
    """
    few = (torch._shape_as_tensor(boxes)[0] <= MAX_BOXES_MOVED_APART).to(boxes.dtype)
    # A zero, so that there is a largest number even without boxes
    largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
    return boxes + (few * idxs.to(boxes.dtype) * (largest + 1))[:, None]
