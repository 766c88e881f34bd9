"""Mask heads that compute their own losses and masks, such as PointRend's."""

import sys
from typing import Any

import torch
from torch import nn

from detectron2.structures import Boxes

__all__ = ["gives_mask_logits", "is_point_rend", "own_mask_logits"]


def gives_mask_logits(mask_head: nn.Module) -> bool:
    """Whether :func:`own_mask_logits` works for a head."""
    return hasattr(mask_head, "mask_logits") or is_point_rend(mask_head)


def own_mask_logits(mask_head: Any, inputs: Any, boxes: list[Boxes]) -> torch.Tensor:
    """
    The masks that are scored: what the head's `mask_logits(inputs, boxes)` returns. For the heads
    of PointRend, which have no such method, these are the logits of the point head on a regular
    grid of 28 x 28 points. From such a grid their inference starts to refine masks. Coarse masks
    of 7 x 7 cells are no better to score (docs/your_model.md), and Implicit PointRend has none.

    Args:
        mask_head: a head for which :func:`gives_mask_logits`.
        inputs: what the head's forward gets: features of regions, or feature maps by their name.
        boxes: of each image.

    Returns:
        float Tensor of shape (N, K, S, S), the mask logits of all boxes for each class; K is 1 if
        masks are class-agnostic.
    """
    if hasattr(mask_head, "mask_logits"):
        return mask_head.mask_logits(inputs, boxes)
    # From where the head comes: PointRend can be a package of its own, or a part of Detectron2
    point_rend: Any = sys.modules[_point_rend_class(mask_head).__module__]
    num_boxes = sum(x.tensor.shape[0] for x in boxes)
    # As in Mask R-CNN, masks have twice the resolution of the features
    side = 2 * mask_head.roi_pooler_size
    points = point_rend.generate_regular_grid_point_coords(num_boxes, side, boxes[0].device)
    is_implicit = hasattr(mask_head, "parameter_head")
    region_head = mask_head.parameter_head if is_implicit else mask_head.coarse_head
    regions = region_head(mask_head._roi_pooler(inputs, boxes))
    point_features = mask_head._point_pooler(inputs, boxes, points)
    logits = mask_head._get_point_logits(point_features, points, regions)
    return logits.unflatten(2, (side, side))


def is_point_rend(mask_head: Any) -> bool:
    """Whether a head, or its class, is PointRend's."""
    return _point_rend_class(mask_head) is not None


def _point_rend_class(mask_head: Any) -> Any:
    """The class of PointRend among the bases, by name: to import it needs OpenCV."""
    of_head = mask_head if isinstance(mask_head, type) else type(mask_head)
    return next((x for x in of_head.__mro__ if x.__name__ == "PointRendMaskHead"), None)
