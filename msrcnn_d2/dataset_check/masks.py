"""
Check the masks, areas and boxes of a dataset.

COCO has 860,000 annotations with 40 million coordinates, so all of them are processed in arrays,
and a Python loop sees only those with a problem.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from msrcnn_d2_runtime.text import plural

from ..coco_format import (
    MAX_AREA,
    MAX_COORDINATE,
    Entries,
    Polygons,
    Report,
    check_masks,
    compressed,
    indices_of,
    said,
    to_floats,
)
from .annotations import find_copies, rotation_of, turned_rectangle

__all__ = ["box_of", "check_shapes", "mask_format_of"]

MIN_AREA = 1e-3  # pixels; less is a line, up to rounding
# How far an edge of a box may be from its mask's: annotators draw boxes, and tools round them
TOLERANCE_PIXELS, TOLERANCE_SHARE = 2, 0.05
# How far an area may be from its mask's: tools round outlines, and count pixels in their own ways
AREA_PIXELS, AREA_SHARE = 20, 0.1
OVER_EDGE = 1  # pixels
# Called with the index of an annotation in `Entries`, kind, message, part=
AnnotationReport = Callable[..., None]


def check_shapes(entries: Entries, report: Report) -> None:
    """Check masks, areas, boxes and copies."""

    def report_annotation(k: int, kind: str, message: str, **part: Any) -> None:
        annotation = entries.annotations[k]
        if kind == "mask-missing" and annotation.get("bbox"):
            message += ", only a box"
        if kind in ("mask-missing", "box-differs", "box-elsewhere") and rotation_of(annotation):
            message += f" (CVAT has turned it by {rotation_of(annotation):g} degrees)"
        report("annotations", int(entries.places[k]), kind, message, **part)

    masks = [annotation.get("segmentation") for annotation in entries.annotations]
    normalised = _said_normalised(masks, [x.get("bbox") for x in entries.annotations])
    if normalised:  # the rest can be checked only in pixels
        report("", -1, "normalised", normalised)
        return
    extents, areas = _measure(masks, entries.sizes[entries.image_of], report_annotation)
    _check_areas(entries, areas, report_annotation)
    _check_boxes(entries, extents, report_annotation)
    find_copies(entries, extents, report)
    num_polygons = sum(isinstance(mask, list) and bool(mask) for mask in masks)
    num_rles = sum(isinstance(mask, dict) and bool(mask) for mask in masks)
    if num_polygons or num_rles:
        message = f"{plural(num_polygons, 'mask')} of polygons, {num_rles:,} of RLE"
        report("", -1, "mask-formats", f"{message}: mask format '{mask_format_of(entries)}'")


def mask_format_of(entries: Entries) -> str:
    """The mask format that Detectron2 needs for training, "polygon" or "bitmask"."""
    masks = (x.get("segmentation") for x in entries.annotations)
    rles = np.array([isinstance(mask, dict) and bool(mask) for mask in masks], dtype=bool)
    return "bitmask" if (rles & ~entries.crowds).any() else "polygon"


def box_of(polygons: list) -> list[float]:
    """The "bbox" around polygons [x, y, x, y, ...] in pixels: left, top, width and height."""
    points = np.array([*chain.from_iterable(polygons)], dtype=float).reshape(-1, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]


def _said_normalised(masks: list, boxes: list) -> str:
    """A text that says which coordinates are all at most 1; empty if none are."""

    def numbers_in(shape: list) -> Iterator[float]:
        for x in shape:
            if isinstance(x, list):
                yield from numbers_in(x)
            elif isinstance(x, (int, float)) and type(x) is not bool:
                yield x

    found = []
    for noun, shapes in (("polygon", masks), ("box", boxes)):
        lists = [x for x in shapes if isinstance(x, list) and x]
        # If they are in pixels, the first shapes end the search
        if all(abs(x) <= 1 for shape in lists for x in numbers_in(shape)):
            count = sum(any(True for _ in numbers_in(shape)) for shape in lists)
            found += [plural(count, noun, "boxes" if noun == "box" else None)] if count else []
    return f"all coordinates of {' and '.join(found)} are at most 1" if found else ""


def _measure(
    masks: list, sizes: np.ndarray, report: AnnotationReport
) -> tuple[np.ndarray, np.ndarray]:
    """
    Check masks and measure those that have nothing wrong.

    Args:
        masks: (A), the values of "segmentation".
        sizes: (A, 2), height and width of their images, NaN if not known.

    Returns:
        extents: (A, 4), left, top, right and bottom of the masks.
        areas: (A), of RLE in pixels, of polygons the sum of their areas.
        Both are NaN for masks with something wrong, and for RLE of an image of unknown size.
    """
    extents, areas = np.full((len(masks), 4), np.nan), np.full(len(masks), np.nan)
    spoiled = set()

    def report_wrong(_: str, k: int, kind: str, message: str, **part: Any) -> None:
        spoiled.add(k)
        report(k, kind, message, **part)

    for polygons in check_masks(masks, sizes, report_wrong):
        _measure_polygons(polygons, sizes, extents, areas, report, report_wrong)
    is_known = np.isfinite(sizes).all(axis=1)  # otherwise RLE may be too large for pycocotools
    for k, mask in enumerate(masks):
        if isinstance(mask, dict) and k not in spoiled and is_known[k]:
            rle = compressed(mask)
            areas[k] = mask_util.area(rle)
            if areas[k]:
                left, top, width, height = mask_util.toBbox(rle)
                extents[k] = left, top, left + width, top + height
            else:
                report_wrong("", k, "rle-empty", "it has no pixels")
    extents[list(spoiled)] = areas[list(spoiled)] = np.nan
    return extents, areas


def _measure_polygons(
    polygons: Polygons,
    sizes: np.ndarray,
    extents: np.ndarray,
    areas: np.ndarray,
    report: AnnotationReport,
    report_wrong: Report,
) -> None:
    """Check polygons, and write the extents and areas of their masks; see :func:`_measure`."""
    if not len(polygons.owners):
        return
    signed_areas, covered_areas = _areas(polygons)
    starts = np.flatnonzero(np.diff(polygons.owners, prepend=-1))  # of each mask: they are in order
    areas[polygons.owners[starts]] = np.add.reduceat(signed_areas, starts)
    edges = _extents(polygons)
    beyond = _beyond(edges, sizes[polygons.owners])
    is_flat = covered_areas < MIN_AREA
    is_outside = ~is_flat & (beyond >= edges[:, [2, 3, 2, 3]] - edges[:, [0, 1, 0, 1]]).any(axis=1)
    is_over = ~is_flat & ~is_outside & (beyond.max(axis=1) > OVER_EDGE)
    for p in indices_of(is_flat | is_outside | is_over):
        owner, part = int(polygons.owners[p]), int(polygons.parts[p])
        noun = f"polygon {part + 1}"
        if is_flat[p]:
            report_wrong("", owner, "polygon-flat", f"{noun} has no area", part=part)
        elif is_outside[p]:
            place = "from x {:.6g}, y {:.6g} to x {:.6g}, y {:.6g}".format(*edges[p])
            report_wrong("", owner, "polygon-outside", f"{noun} extends {place}", part=part)
        else:
            message = f"{noun} extends {beyond[p].max():.6g} pixels beyond the image"
            report(owner, "polygon-over-edge", message, part=part)
    extents[polygons.owners[starts], :2] = np.minimum.reduceat(edges[:, :2], starts)
    extents[polygons.owners[starts], 2:] = np.maximum.reduceat(edges[:, 2:], starts)


def _extents(polygons: Polygons) -> np.ndarray:
    """(P, 4), left, top, right, bottom."""
    starts = (polygons.lengths.cumsum() - polygons.lengths) // 2
    points = polygons.coordinates.reshape(-1, 2)
    edges = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    return np.concatenate(edges, axis=1)


def _areas(polygons: Polygons) -> tuple[np.ndarray, np.ndarray]:
    """
    Two areas of each polygon, (P) in pixels, by the triangles between its first point and its
    sides. In the first, triangles that run the other way count as negative. In the second, all
    count as positive, so that it is not 0 for a polygon that crosses itself, such as a bow tie.
    """
    lengths = polygons.lengths // 2
    starts = lengths.cumsum() - lengths
    points = polygons.coordinates.reshape(-1, 2)
    x, y = (points - points[starts].repeat(lengths, axis=0)).T
    cross = np.zeros(len(x))
    cross[:-1] = x[:-1] * y[1:] - x[1:] * y[:-1]
    cross[starts[1:] - 1] = 0  # the side from the last point to the first has no triangle
    areas = abs(np.add.reduceat(cross, starts)), np.add.reduceat(abs(cross), starts)
    return areas[0] / 2, areas[1] / 2


def _beyond(edges: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """
    Args:
        edges: (N, 4), left, top, right, bottom.
        sizes: (N, 2), height and width of the image.

    Returns:
        (N, 4), how far each edge is beyond the image's, 0 if that is not known.
    """
    bounds = np.concatenate([np.zeros_like(sizes), sizes[:, ::-1]], axis=1)
    return np.nan_to_num((edges - bounds) * [-1, -1, 1, 1])


def _check_areas(entries: Entries, areas: np.ndarray, report: AnnotationReport) -> None:
    """
    Compare areas with those of the masks.

    COCO's areas are the sums of the polygons' areas, in which parts that overlap count twice; other
    tools count pixels. Only an area that matches neither is wrong.
    """

    def differ(given: np.ndarray, expected: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return abs(given - expected) > np.maximum(AREA_PIXELS, AREA_SHARE * expected)

    given = to_floats([annotation.get("area") for annotation in entries.annotations])
    sizes = entries.sizes[entries.image_of]
    with np.errstate(invalid="ignore"):
        compared = (given >= 0) & (given <= MAX_AREA) & np.isfinite(sizes).all(axis=1)
    compared &= ~entries.crowds  # they have no size in the evaluation, and COCO's own are off
    for k in indices_of(compared & differ(given, areas)):
        mask, pixels = entries.annotations[k]["segmentation"], areas[k]
        if isinstance(mask, list):
            rles = mask_util.frPyObjects(mask, *sizes[k].astype(int).tolist())
            pixels = np.float64(mask_util.area(mask_util.merge(rles)))
        if differ(given[k], pixels):
            message = f"the area is {given[k]:.6g}, the area of the mask {pixels:.0f}"
            report(k, "area-differs", message)


def _check_boxes(entries: Entries, extents: np.ndarray, report: AnnotationReport) -> None:
    """Compare boxes with those of the masks, see :func:`_measure`."""
    boxes = _read_boxes([annotation.get("bbox") for annotation in entries.annotations])
    empty = boxes[:, 2:].min(axis=1) <= 0
    for k in indices_of(np.isnan(boxes).any(axis=1) | empty):
        message = f"the box is {said(entries.annotations[k], 'bbox')}"
        report(k, "box-empty" if empty[k] else "box", message)
    is_measured = np.isfinite(extents).all(axis=1) & np.isfinite(boxes).all(axis=1) & ~empty
    for k, annotation in enumerate(entries.annotations):
        if "attributes" in annotation and is_measured[k] and turned_rectangle(annotation):
            message = f"it is turned by {rotation_of(annotation):g} degrees"
            report(k, "box-rotated", message)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    corners[empty] = np.nan
    # What is outside the image does not count: Detectron2 cuts it off
    sizes = entries.sizes[entries.image_of]
    limits = np.concatenate([sizes[:, ::-1], sizes[:, ::-1]], axis=1)
    corners, extents = (
        np.where(np.isnan(limits), x, np.clip(x, 0, limits)) for x in (corners, extents)
    )
    sides = extents[:, 2:] - extents[:, :2]
    allowed = np.maximum(TOLERANCE_PIXELS, TOLERANCE_SHARE * np.concatenate([sides, sides], axis=1))
    for k in indices_of((abs(corners - extents) > allowed).any(axis=1)):
        kind = "box-elsewhere" if _iou(corners[k], extents[k]) < 0.5 else "box-differs"
        left, top, right, bottom = extents[k]
        message = (
            f"the box is {said(entries.annotations[k], 'bbox')}, the box of the mask "
            f"[{left:.6g}, {top:.6g}, {right - left:.6g}, {bottom - top:.6g}]"
        )
        report(k, kind, message)


def _read_boxes(boxes: list) -> np.ndarray:
    """(N, 4), left, top, width, height; NaN where these are not numbers of pixels."""
    nothing = [np.nan] * 4
    rows = [box if isinstance(box, list) and len(box) == 4 else nothing for box in boxes]
    values = to_floats(chain.from_iterable(rows)).reshape(-1, 4).copy()
    values[~(abs(values) <= MAX_COORDINATE).all(axis=1)] = np.nan
    return values


def _iou(box: np.ndarray, other: np.ndarray) -> float:
    """IoU of two boxes. The second one has an area."""
    common = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    intersection = np.prod(np.maximum(common, 0))
    areas = np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2])
    return intersection / (areas - intersection)
