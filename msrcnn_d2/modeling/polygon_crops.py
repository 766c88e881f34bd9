"""Polygons cropped to boxes and measured, all polygons of an image at once.

The results are those of Detectron2's :class:`PolygonMasks`, which takes the same steps for one
object after the other, in Python.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pycocotools.mask as mask_util
import torch

from detectron2.structures import PolygonMasks

__all__ = ["crop_polygons", "polygon_areas"]

# So many mask cells from the corner of its box no vertex is: in the smallest box, a tenth of a
# pixel, these are the 36,000 pixels of the largest images. pycocotools walks along polygons cell by
# cell, for hours if there is no end to them.
MAX_CELLS = 1e7


def crop_polygons(masks: PolygonMasks, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
    """
    What `masks.crop_and_resize(boxes, mask_size)` returns, in less time.

    Args:
        masks: N objects, of which those that augmentation removed have no polygon.
        boxes: Tensor of shape (N, 4), a box for each object, (x0, y0, x1, y1) in pixels.
        mask_size: S.

    Returns:
        bool Tensor of shape (N, S, S), the part of each object inside its box, on the device of
        the boxes.

    Raises:
        FloatingPointError: a polygon, or the box of an object that has polygons, is not finite or
            lies beyond any image.
    """
    if len(boxes) != len(masks):
        raise ValueError(f"{len(boxes)} boxes for {len(masks)} masks; each mask needs one box")
    crops = np.zeros((len(masks), mask_size, mask_size), dtype=bool)
    remaining = [len(polygons) > 0 for polygons in masks.polygons]
    if any(remaining):
        polygons = _polygons_in_cells(masks, boxes.cpu().numpy(), mask_size)
        rles = iter(mask_util.frPyObjects(polygons, mask_size, mask_size))
        objects = [_next_object(rles, len(polygons)) for polygons in masks.polygons if polygons]
        crops[remaining] = mask_util.decode(objects).transpose(2, 0, 1)
    return torch.from_numpy(crops).to(boxes.device)


def _polygons_in_cells(masks, boxes: np.ndarray, mask_size: int) -> list[np.ndarray]:
    """All polygons, in mask cells from the corner of the box of their object."""
    vertices, num_vertices, owners = _flatten(masks)
    sides = boxes[:, 2:] - boxes[:, :2]
    # The precision of this division depends on the version of NumPy and differs between scalars
    # and arrays. Detectron2 divides by scalars; a vertex may round to another cell otherwise.
    cells_per_pixel = [mask_size / max(side, 0.1) for side in sides.ravel()]
    scales = np.array(cells_per_pixel, dtype=np.float64).reshape(-1, 2)

    cells = vertices - boxes[:, :2][owners].repeat(num_vertices, axis=0)
    cells *= scales[owners].repeat(num_vertices, axis=0)
    if not (np.abs(cells) <= MAX_CELLS).all():  # NaN is not
        raise FloatingPointError(
            "A polygon of the ground truth or the box of a proposal is not finite, or far outside "
            "of any image: look for such numbers in the annotations, or training has diverged."
        )
    coordinates = cells.reshape(-1)  # np.split would do the rest, in more time
    stops = (2 * num_vertices.cumsum()).tolist()
    return [coordinates[start:stop] for start, stop in zip([0, *stops], stops)]


def _next_object(rles: Iterator[dict], num_polygons: int) -> dict:
    polygons = list(islice(rles, num_polygons))
    return polygons[0] if num_polygons == 1 else mask_util.merge(polygons)


def polygon_areas(masks: PolygonMasks) -> torch.Tensor:
    """
    What `masks.area()` returns, up to rounding, in less time.

    Args:
        masks: N objects, of which those that augmentation removed have no polygon.

    Returns:
        float64 Tensor of shape (N,), the sum of the areas of the polygons of each object in
        pixels; 0 without polygons.
    """
    if not any(masks.polygons):
        return torch.zeros(len(masks), dtype=torch.float64)
    vertices, num_vertices, owners = _flatten(masks)
    stops = num_vertices.cumsum()
    starts = stops - num_vertices
    previous = np.roll(vertices, 1, axis=0)
    previous[starts] = vertices[stops - 1]
    # The shoelace formula
    terms = vertices[:, 0] * previous[:, 1] - vertices[:, 1] * previous[:, 0]
    areas = np.abs(np.add.reduceat(terms, starts)) / 2
    return torch.from_numpy(np.bincount(owners, weights=areas, minlength=len(masks)))


def _flatten(masks: PolygonMasks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Returns:
        the vertices of all P polygons, one after the other, (V, 2) in pixels;
        the number of vertices of each polygon, (P,), at least 3;
        the index of the object of each polygon, (P,).
    """
    polygons = [p for polygons in masks.polygons for p in polygons]
    vertices = np.concatenate(polygons).reshape(-1, 2)
    num_vertices = np.array([len(p) // 2 for p in polygons])
    owners = np.arange(len(masks)).repeat([len(polygons) for polygons in masks.polygons])
    return vertices, num_vertices, owners
