"""Ground-truth masks of proposals. Many proposals share an object; no mask is copied for them."""

from typing import Any

import numpy as np
import torch

from detectron2.layers import ROIAlign, cat
from detectron2.structures import BitMasks, Instances, PolygonMasks

from .polygon_crops import crop_polygons, polygon_areas

__all__ = ["BITMASKS_AT_A_TIME", "IndexedMasks", "count_pixels", "with_indexed_masks"]

# Number of bitmasks that are cropped at a time. Each is copied to 4 bytes per pixel of the image,
# and an image can have hundreds of objects. On a CPU the number is small, because glibc keeps only
# up to 32 MB for the next copy: images of 1024 x 1024 pixels take 1.6 times as long with twice as
# many.
BITMASKS_AT_A_TIME = 4
BITMASKS_AT_A_TIME_ON_GPU = 64


class IndexedMasks:
    """
    N masks as indices into the M masks of an image.

    It replaces :class:`PolygonMasks` or :class:`BitMasks` as the ``gt_masks`` of proposals.
    Detectron2 indexes these twice, to sample proposals and to select the foreground. With bitmasks,
    it copies a mask of the size of the image for each of 512 proposals, then for up to 128.

    Code that needs more of the masks than crops and areas, such as ``tensor`` or ``polygons``,
    calls `materialize()`, which makes these copies.

    Attributes:
        masks: the M masks of the image.
        indices: int64 Tensor of shape (N,), the index in `masks` of each mask, on their device.
    """

    def __init__(self, masks: BitMasks | PolygonMasks, indices: torch.Tensor | None = None):
        """
        Args:
            masks: the M masks.
            indices: N indices in [0, M); by default each mask once.
        """
        self.masks = masks
        self.indices = torch.arange(len(masks), device=masks.device) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: Any) -> "IndexedMasks":
        """Select as Detectron2's masks do: an int selects a slice of length one."""
        if isinstance(item, torch.Tensor):  # perhaps on a GPU, where polygons never are
            item = item.to(self.indices.device)
        return IndexedMasks(self.masks, self.indices[item].reshape(-1))

    def to(self, *args: Any, **kwargs: Any) -> "IndexedMasks":
        masks = self.masks.to(*args, **kwargs)
        return IndexedMasks(masks, self.indices.to(masks.device))

    def materialize(self) -> BitMasks | PolygonMasks:
        """The N masks, of the type of `masks`, with a copy of a bitmask for each index."""
        return self.masks[self.indices]

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """
        Like `self.materialize().crop_and_resize(boxes, mask_size)`, but without copies of masks.

        Args:
            boxes: Tensor of shape (N, 4), the box of each mask, (x0, y0, x1, y1) in pixels.
            mask_size: S.

        Returns:
            bool Tensor of shape (N, S, S), the part of each object inside its box.
        """
        if len(boxes) != len(self):
            raise ValueError(f"{len(boxes)} boxes for {len(self)} masks; each mask needs one box")
        if isinstance(self.masks, PolygonMasks):
            return crop_polygons(self.masks[self.indices], boxes, mask_size)
        return _crop_bitmasks(self.masks.tensor, self.indices, boxes, mask_size)

    def area(self, image_size: tuple[int, int]) -> torch.Tensor:
        """
        Args:
            image_size: height and width of the image in pixels.

        Returns:
            Tensor of shape (N,), the area in pixels of each whole object inside the image, see
            :func:`polygon_areas`; 0 for an object that augmentation removed.
        """
        if isinstance(self.masks, PolygonMasks):
            # Each object that has proposals is measured once
            distinct, positions = self.indices.unique(return_inverse=True)
            return polygon_areas(self.masks[distinct], image_size)[positions]
        return count_pixels(self.masks.tensor)[self.indices]


def _crop_bitmasks(
    masks: torch.Tensor, indices: torch.Tensor, boxes: torch.Tensor, mask_size: int
) -> torch.Tensor:
    """Like `BitMasks.crop_and_resize`, but several boxes can crop the same mask."""
    boxes = boxes.to(masks.device)
    if masks.is_cuda:
        return _crop_all_boxes(masks, indices, boxes, mask_size)
    crops = torch.empty(len(boxes), mask_size, mask_size, dtype=torch.bool)
    distinct, positions = indices.unique(return_inverse=True)
    for start, group in enumerate(distinct.split(BITMASKS_AT_A_TIME)):
        (members,) = torch.where(positions // BITMASKS_AT_A_TIME == start)
        rows = positions[members] % BITMASKS_AT_A_TIME  # for each box its mask in the group
        crops[members] = _roi_align(masks[group], rows, boxes[members], mask_size)
    return crops


def _crop_all_boxes(
    masks: torch.Tensor, indices: torch.Tensor, boxes: torch.Tensor, mask_size: int
) -> torch.Tensor:
    """
    The same without a synchronisation with the GPU. Selecting the boxes of a group of masks would
    need one. So each group crops all boxes, and only the crops of its own masks are kept. Few
    images have more than one group.
    """
    crops = torch.zeros(len(boxes), mask_size, mask_size, dtype=torch.bool, device=masks.device)
    for start in range(0, len(masks), BITMASKS_AT_A_TIME_ON_GPU):
        group = masks[start : start + BITMASKS_AT_A_TIME_ON_GPU]
        rows = indices - start
        found = _roi_align(group, rows.clamp(0, len(group) - 1), boxes, mask_size)
        crops |= found & ((rows >= 0) & (rows < len(group)))[:, None, None]
    return crops


def _roi_align(
    masks: torch.Tensor, rows: torch.Tensor, boxes: torch.Tensor, mask_size: int
) -> torch.Tensor:
    roi_align = ROIAlign((mask_size, mask_size), 1.0, 0, aligned=True)
    rois = torch.cat([rows[:, None].to(boxes.dtype), boxes], dim=1)
    return roi_align(masks[:, None].float(), rois).squeeze(1) >= 0.5


def count_pixels(masks: torch.Tensor) -> torch.Tensor:
    """The number of pixels (M,) of the bitmasks (M, H, W)."""
    if masks.device.type == "cpu":  # NumPy counts many times faster there, without a copy
        return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()])
    parts = masks.split(BITMASKS_AT_A_TIME_ON_GPU)
    return cat([part.bool().sum(dim=(1, 2), dtype=torch.int32) for part in parts])


def with_indexed_masks(instances: Instances) -> Instances:
    """
    Args:
        instances: the ground truth of an image. Images without objects may have no "gt_masks".

    Returns:
        a copy in which "gt_masks" are :class:`IndexedMasks`; the instances themselves if they
        have no masks, or masks of another type, which may crop in its own way.
    """
    fields = instances.get_fields()
    if type(fields.get("gt_masks")) not in (BitMasks, PolygonMasks):
        return instances
    masks = IndexedMasks(fields["gt_masks"])
    return Instances(instances.image_size, **{**fields, "gt_masks": masks})
