"""
What the MaskIoU head learns: the IoU of each predicted mask with its whole object.

Only this file and the two that it calls, `indexed_masks.py` and `polygon_crops.py`, read
ground-truth masks.
"""

from typing import Any

import torch

from detectron2.structures import Instances, PolygonMasks

from .indexed_masks import IndexedMasks, count_pixels, with_indexed_masks
from .polygon_crops import polygon_areas

__all__ = ["CroppedMasks", "crop_gt_masks", "mask_iou_targets"]

# In pixels. Detectron2 rasterises polygons as if no side of a box were shorter
# (`rasterize_polygons_within_box`), so mask cells have to be measured in the same way.
MIN_BOX_SIDE = 0.1


class CroppedMasks:
    """
    Ground-truth masks that have been cropped to their boxes.

    It replaces :class:`PolygonMasks` or :class:`BitMasks` as the ``gt_masks`` of proposals, so that
    Detectron2's `mask_rcnn_loss` and our targets share one rasterisation.

    Attributes:
        crops: bool Tensor of shape (N, S, S), the part of each object inside its box,
            S x S cells to a box.
        areas: float Tensor of shape (N,), the area in pixels of each whole object inside the
            image, including the part outside of its box.
    """

    def __init__(self, crops: torch.Tensor, areas: torch.Tensor):
        self.crops = crops
        self.areas = areas

    def __len__(self) -> int:
        return len(self.crops)

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """
        Args:
            boxes: the (N, 4) boxes that the masks were cropped to.
            mask_size: S.

        Returns:
            bool Tensor of shape (N, S, S), as `BitMasks.crop_and_resize` returns.
        """
        expected = (len(boxes), mask_size, mask_size)
        if self.crops.shape != expected:
            raise ValueError(f"masks were cropped to {tuple(self.crops.shape)}, not {expected}")
        return self.crops


def crop_gt_masks(instances: list[Instances], mask_size: int) -> list[Instances]:
    """
    Crop the ground-truth masks of foreground proposals to their boxes, once for all losses.

    Args:
        instances: one Instances per image, with "proposal_boxes" and, unless it is empty,
            "gt_masks" (IndexedMasks, PolygonMasks or BitMasks).
        mask_size: S, the side of the mask head's output in cells.

    Returns:
        copies of the instances in which "gt_masks" are :class:`CroppedMasks`.
    """
    return [_crop_gt_masks_per_image(x, mask_size) if len(x) else x for x in instances]


def _crop_gt_masks_per_image(instances: Instances, mask_size: int) -> Instances:
    fields = with_indexed_masks(instances).get_fields()
    masks, boxes = fields["gt_masks"], instances.proposal_boxes.tensor
    # Polygons are cropped on the CPU; crops and areas then go to the GPU in one copy
    on_cpu = isinstance(masks, IndexedMasks) and isinstance(masks.masks, PolygonMasks)
    crops = masks.crop_and_resize(boxes.cpu() if on_cpu else boxes, mask_size) > 0.5
    areas = _areas(masks, instances.image_size).float()
    if crops.device != boxes.device and areas.device == crops.device:
        crops, areas = _in_one_copy(crops, areas, boxes.device)
    gt_masks = CroppedMasks(crops.to(boxes.device), areas.to(boxes.device))
    return Instances(instances.image_size, **{**fields, "gt_masks": gt_masks})


def _in_one_copy(
    crops: torch.Tensor, areas: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bool `crops` and the float32 `areas` on another device, with one synchronisation."""
    parts = torch.cat([areas.view(torch.uint8), crops.reshape(-1).view(torch.uint8)]).to(device)
    areas_, crops_ = parts.split([4 * len(areas), crops.numel()])
    return crops_.view(torch.bool).reshape(crops.shape), areas_.view(torch.float32)


def _areas(masks: Any, image_size: tuple[int, int]) -> torch.Tensor:
    """The area of each mask in pixels; 0 for an object that augmentation removed."""
    if isinstance(masks, IndexedMasks):
        return masks.area(image_size)
    if isinstance(masks, PolygonMasks):
        own = type(masks).area is not PolygonMasks.area
        return masks.area() if own else polygon_areas(masks, image_size)
    return count_pixels(masks.tensor)


@torch.no_grad()
def mask_iou_targets(
    pred_masks: torch.Tensor, gt_crops: torch.Tensor, gt_areas: torch.Tensor, boxes: torch.Tensor
) -> torch.Tensor:
    """
    IoU of predicted masks with their whole objects (Mask Scoring R-CNN, Sec. 3.2), in mask cells.

    A predicted mask ends at its box, but its object may not. So the union counts the area of the
    whole object: its pixels divided by the pixels per mask cell. Both numbers are known already, so
    nothing is rasterised a second time.

    Args:
        pred_masks: bool Tensor of shape (N, S, S), the binarised mask predicted in each box.
        gt_crops: bool Tensor of shape (N, S, S), the part of the matched object in each box.
        gt_areas: Tensor of shape (N,), the area in pixels of the whole matched object inside the
            image.
        boxes: Tensor of shape (N, 4), the boxes, (x0, y0, x1, y1) in pixels.

    Returns:
        float32 Tensor of shape (N,), the IoU in [0, 1]; 0 if one of the two masks is empty, NaN
        for a box that is not finite.
    """
    cells_per_mask = pred_masks.shape[-1] * pred_masks.shape[-2]
    sides = (boxes[:, 2:] - boxes[:, :2]).float().clamp(min=MIN_BOX_SIDE)
    pixels_per_cell = sides.prod(dim=1) / cells_per_mask

    intersection = (pred_masks & gt_crops).sum(dim=(1, 2)).float()
    pred_cells = pred_masks.sum(dim=(1, 2))
    # Thin objects can cover more cells than pixels, but the whole is never less than its part.
    gt_cells = torch.maximum(gt_areas / pixels_per_cell, gt_crops.sum(dim=(1, 2)))
    union = pred_cells + gt_cells - intersection
    # The union is less than one cell only if nothing is predicted; then the intersection is 0.
    ious = intersection / union.clamp(min=1)
    # Otherwise an infinite box would look like one without its object. NaN costs no synchronisation
    return ious + (boxes.float() * 0).sum(dim=1)
