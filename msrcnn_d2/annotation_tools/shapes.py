"""Shapes that people draw, as polygons and RLE."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pycocotools.mask as mask_util

from msrcnn_d2_runtime.mask_encoding import encode_crops

from ..coco_format import MAX_COORDINATE
from ..dataset_check.masks import box_of

__all__ = [
    "Part",
    "Pixels",
    "Point",
    "Size",
    "box_and_area",
    "ellipse",
    "flat",
    "joined",
    "objects_in",
    "rectangle",
    "rle_in_place",
    "rle_of",
    "with_holes",
]

Point = Sequence[float]  # x and y in pixels
Size = tuple[int, int]  # height and width in pixels
# A polygon [x, y, x, y, ...] in pixels, or compressed RLE of the image's size
Part = list[float] | dict
Pixels = tuple[np.ndarray, np.ndarray]  # their rows and columns


def flat(points: Sequence[Point]) -> list[float]:
    """
    Raises:
        ValueError: it is no outline, or so large that pycocotools would take hours.
    """
    numbers = [float(value) for x, y in points for value in (x, y)]
    if len(numbers) < 6:
        raise ValueError(f"an outline has {len(points)} points")
    wrong = [x for x in numbers if not abs(x) <= MAX_COORDINATE]  # NaN, too
    if wrong:
        raise ValueError(f"a coordinate is {wrong[0]}")
    return numbers


def rectangle(
    left: float, top: float, width: float, height: float, degrees: float = 0
) -> list[float]:
    """The outline of a rectangle that is turned clockwise about its upper left corner."""
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    return flat((corners @ _turn(degrees) + [left, top]).tolist())


def ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0) -> list[float]:
    """A polygon with the area of an ellipse that is turned clockwise about its centre (x, y)."""
    count = max(24, math.ceil(min(2 * max(rx, ry), 1000)))
    angles = np.arange(count) * 2 * math.pi / count
    # A polygon inside the ellipse would be too small
    scale = math.sqrt(2 * math.pi / count / math.sin(2 * math.pi / count))
    points = np.stack([rx * np.cos(angles), ry * np.sin(angles)], axis=1) * scale
    return flat((points @ _turn(degrees) + [x, y]).round(2).tolist())


def _turn(degrees: float) -> np.ndarray:
    """(2, 2), to multiply points with; clockwise, as y points down."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, sin], [-sin, cos]])


def rle_in_place(mask: np.ndarray, left: int, top: int, size: Size) -> dict:
    """
    Args:
        mask: (h, w) bool, a part of the image; what is outside the image is cut off.
        left, top: where it begins.
    """
    inside = mask[max(-top, 0) : max(size[0] - top, 0), max(-left, 0) : max(size[1] - left, 0)]
    return encode_crops([(max(top, 0), max(left, 0), inside)], size)[0]


def objects_in(ids: np.ndarray) -> Iterator[tuple[int, Pixels]]:
    """Each number but 0, ascending, and its pixels; one pass, as there may be thousands."""
    rows, columns = np.nonzero(ids)
    numbers = ids[rows, columns]
    order = np.argsort(numbers, kind="stable")
    found, starts = np.unique(numbers[order], return_index=True)
    for number, places in zip(found.tolist(), np.split(order, starts[1:])):
        yield number, (rows[places], columns[places])


def rle_of(pixels: Pixels, size: Size) -> dict:
    """Compressed RLE of at least one pixel in an image of this size."""
    rows, columns = pixels
    top, left = int(rows.min()), int(columns.min())
    inside = np.zeros((rows.max() + 1 - top, columns.max() + 1 - left), dtype=bool)
    inside[rows - top, columns - left] = True
    return rle_in_place(inside, left, top, size)


def with_holes(outline: list[float], holes: list[list[float]], size: Size) -> Part:
    """A polygon without what is in its holes, which COCO's polygons cannot say."""
    if not holes:
        return outline
    mask = mask_util.decode(joined([outline], size, as_rle=True))
    hole = mask_util.decode(joined(holes, size, as_rle=True))
    return rle_in_place(mask > hole, 0, 0, size)


def joined(parts: Sequence[Part], size: Size, as_rle: bool = False) -> list | dict:
    """The "segmentation" of an object: polygons, or RLE if one of its parts is."""
    if not as_rle and not any(isinstance(part, dict) for part in parts):
        return list(parts)
    rles = [
        part if isinstance(part, dict) else mask_util.frPyObjects([part], *size)[0]
        for part in parts
    ]
    merged = mask_util.merge(rles)
    return {"size": list(size), "counts": merged["counts"].decode()}


def box_and_area(segmentation: list | dict, size: Size) -> tuple[list[float], int]:
    """ "bbox" and "area", which is in pixels, of a "segmentation"."""
    if isinstance(segmentation, dict):
        box = mask_util.toBbox(segmentation).tolist()
        return box, int(mask_util.area(segmentation))
    area = mask_util.area(joined(segmentation, size, as_rle=True))
    return box_of(segmentation), int(area)
