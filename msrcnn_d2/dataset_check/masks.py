"""
Check the masks and boxes of a dataset.

COCO has 860,000 annotations with 40 million coordinates, so what is done for each of them is done
on arrays, and a Python loop sees only those with something to say.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from ..coco_format import MAX_COORDINATE, is_rle
from ..utils.text import plural, shown
from .annotations import MAX_AREA, MISSING, Annotations, Images, indices_of, to_floats, where
from .findings import Findings

__all__ = ["check_masks", "compressed", "is_of_pairs"]

CHUNK = 20_000  # annotations; their coordinates take about 10 MB
MIN_AREA = 1e-3  # pixels; less is a line, up to rounding
# How far an edge of a box may be from its mask's: annotators draw boxes, and tools round them
TOLERANCE_PIXELS, TOLERANCE_SHARE = 2, 0.05
# How far an area may be from its mask's: tools round outlines, and count pixels in their own ways
AREA_PIXELS, AREA_SHARE = 20, 0.1
OVER_EDGE = 1  # pixels

Report = Callable[..., None]  # index of an annotation, kind, message, part=


def check_masks(annotations: Annotations, images: Images, findings: Findings) -> None:
    def report(k: int, kind: str, message: str, **part: Any) -> None:
        findings.add(kind, message, **where(k, annotations, images), **part)

    masks = annotations.column("segmentation")
    normalised = _said_normalised(masks, annotations.column("bbox"))
    if normalised:  # the rest is checked when they are pixels
        findings.add("normalised", normalised)
        return
    # Of the image of each annotation; the last row is for those of none, which have the index -1
    sizes = np.vstack([images.sizes, [np.nan, np.nan]])[annotations.images]
    polygons = [k for k, mask in enumerate(masks) if isinstance(mask, list) and mask]
    rles = [k for k, mask in enumerate(masks) if isinstance(mask, dict) and mask]
    _report_others(masks, report)
    extents = np.full((len(masks), 4), np.nan)
    areas = np.full(len(masks), np.nan)
    for first in range(0, len(polygons), CHUNK):
        _check_polygons(polygons[first : first + CHUNK], masks, sizes, extents, areas, report)
    for k in rles:
        _check_rle(k, masks[k], sizes[k], extents, areas, report)
    _check_areas(annotations, sizes, areas, report)
    _check_boxes(annotations, sizes, extents, report)
    _check_copies(annotations, extents, report)
    if not annotations.crowds[rles].all():
        findings.mask_format = "bitmask"
    if polygons or rles:
        message = f"{plural(len(polygons), 'mask')} of polygons, {len(rles):,} of RLE"
        findings.add("mask-formats", f"{message}: mask format '{findings.mask_format}'")


def _said_normalised(masks: list, boxes: list) -> str:
    """Whether all coordinates of polygons, or all of boxes, are at most 1; empty if not."""
    said = []
    for noun, shapes in (("polygons", masks), ("boxes", boxes)):
        lists = (x for x in shapes if isinstance(x, list) and x)
        # In pixels the first shapes end it
        if all(abs(x) <= 1 for shape in lists for x in numbers_in(shape)):
            count = sum(isinstance(x, list) and any(True for _ in numbers_in(x)) for x in shapes)
            said += [f"{count:,} {noun}"] if count else []
    return f"all coordinates of {' and '.join(said)} are at most 1" if said else ""


def numbers_in(shape: list) -> Iterator[float]:
    """All numbers in lists of lists."""
    for x in shape:
        if isinstance(x, list):
            yield from numbers_in(x)
        elif isinstance(x, (int, float)) and type(x) is not bool:
            yield x


def _report_others(masks: list, report: Report) -> None:
    for k, mask in enumerate(masks):
        if mask is MISSING or not mask:
            report(k, "mask-missing", "it has no mask")
        elif not isinstance(mask, (list, dict)):
            report(k, "mask-malformed", f"the segmentation is {shown(mask)}")


@dataclass
class Polygons:
    """
    P polygons of a number of masks.

    Attributes:
        owners: (P), index of the annotation of each.
        parts: (P), place of each in its mask.
        lengths: (P), of how many coordinates each consists.
        coordinates: of all, one after the other: x, y, x, y, ... in pixels.
    """

    owners: np.ndarray
    parts: np.ndarray
    lengths: np.ndarray
    coordinates: np.ndarray

    def without(self, wrong: np.ndarray) -> "Polygons":
        if not wrong.any():
            return self
        return Polygons(
            self.owners[~wrong],
            self.parts[~wrong],
            self.lengths[~wrong],
            self.coordinates[~wrong.repeat(self.lengths)],
        )

    def farthest(self) -> np.ndarray:
        """(P), the largest distance of a coordinate from 0; none may be without coordinates."""
        return np.maximum.reduceat(abs(self.coordinates), self.lengths.cumsum() - self.lengths)

    def extents(self) -> np.ndarray:
        """(P, 4), left, top, right, bottom; of whole points only."""
        starts = (self.lengths.cumsum() - self.lengths) // 2
        points = self.coordinates.reshape(-1, 2)
        edges = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
        return np.concatenate(edges, axis=1)

    def areas(self) -> tuple[np.ndarray, np.ndarray]:
        """
        (P) each, in pixels, by the triangles between the first point of a polygon and its sides:
        the area, in which parts that are run around the other way count as negative, and that of
        all triangles as positive, which is not 0 for what crosses itself, such as a bow tie.
        """
        lengths = self.lengths // 2
        starts = lengths.cumsum() - lengths
        points = self.coordinates.reshape(-1, 2)
        x, y = (points - points[starts].repeat(lengths, axis=0)).T
        # The side from the last point to the first has no triangle
        cross = np.zeros(len(x))
        cross[:-1] = x[:-1] * y[1:] - x[1:] * y[:-1]
        cross[starts[1:] - 1] = 0
        areas = abs(np.add.reduceat(cross, starts)), np.add.reduceat(abs(cross), starts)
        return areas[0] / 2, areas[1] / 2


def _check_polygons(
    indices: Sequence[int],
    masks: list,
    sizes: np.ndarray,
    extents: np.ndarray,
    areas: np.ndarray,
    report: Report,
) -> None:
    """
    Args:
        indices: of the annotations to check.
        masks: of all annotations; these ones have lists.
        sizes: (all annotations, 2), height and width of the image, NaN if it is not known.
        extents: (all annotations, 4), to write those of the masks that have nothing wrong: left,
            top, right, bottom.
        areas: (all annotations), to write likewise the sum of the areas of the polygons.
    """
    polygons = _read_polygons(indices, [masks[k] for k in indices], report)
    spoiled = set()

    def drop(wrong: np.ndarray, kind: str, message: Callable[[int], str]) -> Polygons:
        for p in indices_of(wrong):
            owner, part = int(polygons.owners[p]), int(polygons.parts[p])
            report(owner, kind, f"polygon {part + 1} {message(p)}", part=part)
            spoiled.add(owner)
        return polygons.without(wrong)

    lengths = polygons.lengths
    polygons = drop(
        (lengths < 6) | (lengths % 2 == 1), "polygon-points", lambda p: _said_length(lengths[p])
    )
    largest = polygons.farthest()
    polygons = drop(
        ~np.isfinite(largest), "polygon-numbers", lambda p: "has something that is no finite number"
    )
    farthest = polygons.farthest()
    polygons = drop(
        farthest > MAX_COORDINATE, "polygon-far", lambda p: f"has the coordinate {farthest[p]:.4g}"
    )
    signed_areas, covered_areas = polygons.areas()
    if len(polygons.owners):
        starts = np.flatnonzero(np.diff(polygons.owners, prepend=-1))  # of each mask
        areas[polygons.owners[starts]] = np.add.reduceat(signed_areas, starts)
    polygons = drop(covered_areas < MIN_AREA, "polygon-flat", lambda p: "has no area")
    edges = polygons.extents()
    beyond = _beyond(edges, sizes[polygons.owners])
    polygons = drop(
        (beyond >= edges[:, [2, 3, 2, 3]] - edges[:, [0, 1, 0, 1]]).any(axis=1),
        "polygon-outside",
        lambda p: "reaches from x {:.6g}, y {:.6g} to x {:.6g}, y {:.6g}".format(*edges[p]),
    )
    edges = polygons.extents()
    beyond = _beyond(edges, sizes[polygons.owners]).max(axis=1)
    for p in indices_of(beyond > OVER_EDGE):
        message = f"polygon {polygons.parts[p] + 1} is {beyond[p]:.6g} pixels over the edge"
        part = int(polygons.parts[p])
        report(int(polygons.owners[p]), "polygon-over-edge", message, part=part)
    _write_extents(extents, polygons.owners, edges)
    extents[list(spoiled)] = areas[list(spoiled)] = np.nan


def _said_length(length: int) -> str:
    if length % 2:
        return f"has an odd number of coordinates, {length}"
    return f"has {plural(length // 2, 'point')}"


def _beyond(edges: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """
    Args:
        edges: (N, 4), left, top, right, bottom.
        sizes: (N, 2), height and width of the image.

    Returns:
        (N, 4), by how much each edge is beyond that of the image, 0 if it is not known.
    """
    bounds = np.concatenate([np.zeros_like(sizes), sizes[:, ::-1]], axis=1)
    return np.nan_to_num((edges - bounds) * [-1, -1, 1, 1])


def _write_extents(extents: np.ndarray, owners: np.ndarray, edges: np.ndarray) -> None:
    """Those of whole masks, from those of their polygons."""
    if not len(owners):
        return
    starts = np.flatnonzero(np.diff(owners, prepend=-1))  # of each mask: they are in order
    extents[owners[starts], :2] = np.minimum.reduceat(edges[:, :2], starts)
    extents[owners[starts], 2:] = np.maximum.reduceat(edges[:, 2:], starts)


def _read_polygons(indices: Sequence[int], masks: Sequence[list], report: Report) -> Polygons:
    try:
        coordinates, lengths = _flatten(masks)
    except (TypeError, OverflowError):  # something in it is no number, or too large for one
        indices, masks = _numbers_only(indices, masks, report)
        coordinates, lengths = _flatten(masks)
    counts = np.array([len(mask) for mask in masks], dtype=int)
    # Points in place of polygons: a mask of at least three parts of two numbers each
    if len(lengths):
        longest = np.maximum.reduceat(lengths, counts.cumsum() - counts)
        of_points = (longest == 2) & (np.add.reduceat(lengths, counts.cumsum() - counts) >= 6)
        if of_points.any():
            for k, mask in compress(zip(indices, masks), of_points):
                report(k, "polygon-pairs", f"the segmentation is {shown(mask)}")
            kept = ~of_points
            return _read_polygons(
                list(compress(indices, kept)), list(compress(masks, kept)), report
            )
    owners = np.asarray(indices, dtype=int).repeat(counts)
    parts = np.arange(len(owners)) - (counts.cumsum() - counts).repeat(counts)
    return Polygons(owners, parts, lengths, coordinates)


def _flatten(masks: Sequence[list]) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns:
        the coordinates of all polygons one after the other, and how many each polygon has.

    Raises:
        TypeError, OverflowError: not all are lists of lists of numbers.
    """
    polygons = list(chain.from_iterable(masks))
    lengths = np.array([len(polygon) for polygon in polygons], dtype=int)
    return np.frombuffer(array("d", chain.from_iterable(polygons))), lengths


def _numbers_only(
    indices: Sequence[int], masks: Sequence[list], report: Report
) -> tuple[list[int], list[list]]:
    """The masks that are no flat lists, which are reported, with NaN for what is no number."""
    kept, cleaned = [], []
    for k, mask in zip(indices, masks):
        if all(isinstance(x, (int, float)) for x in mask):
            report(k, "mask-flat", f"the segmentation is {shown(mask)}")
        elif any(map(is_of_pairs, mask)):
            report(k, "polygon-pairs", f"the segmentation is {shown(mask)}")
        else:
            kept.append(k)
            cleaned.append([_clean(polygon) for polygon in mask])
    return kept, cleaned


def is_of_pairs(polygon: Any) -> bool:
    """Whether a polygon is a list of points, which are lists of two numbers."""
    return (
        isinstance(polygon, list)
        and bool(polygon)
        and all(
            isinstance(point, list)
            and len(point) == 2
            and all(isinstance(x, (int, float)) for x in point)
            for point in polygon
        )
    )


def _clean(polygon: Any) -> list[float]:
    return to_floats(polygon).tolist() if isinstance(polygon, list) else [np.nan] * 6


def _check_rle(
    k: int,
    mask: dict,
    size: np.ndarray,
    extents: np.ndarray,
    areas: np.ndarray,
    report: Report,
) -> None:
    """For the arguments see :func:`_check_polygons`."""
    said = mask.get("size")
    if not is_rle(mask):
        counts = shown(mask.get("counts"))
        report(k, "rle-counts", f"the size is {shown(said)}, the counts are {counts}")
    elif np.isfinite(size).all() and said != size.tolist():
        height, width = size.astype(int)
        report(k, "rle-size", f"the mask has the size {said}, its image has [{height}, {width}]")
    elif np.isfinite(size).all():  # else pycocotools might be asked for a size beyond its numbers
        rle = compressed(mask)
        areas[k] = mask_util.area(rle)
        if areas[k]:
            left, top, width, height = mask_util.toBbox(rle)
            extents[k] = left, top, left + width, top + height
        else:
            report(k, "rle-empty", "it has no pixels")
            areas[k] = np.nan


def _check_areas(
    annotations: Annotations, sizes: np.ndarray, areas: np.ndarray, report: Report
) -> None:
    """
    COCO's areas are those of the polygons, parts that overlap counted twice; other tools count
    pixels. Only what is neither is wrong. For the arguments see :func:`_check_polygons`.
    """
    said = to_floats(annotations.column("area"))
    with np.errstate(invalid="ignore"):
        known = (said >= 0) & (said <= MAX_AREA) & np.isfinite(sizes).all(axis=1)
    known &= ~annotations.crowds  # they have no size in the evaluation, and COCO's own are off
    for k in indices_of(known & _differ(said, areas)):
        height, width = sizes[k].astype(int).tolist()
        mask = annotations.entries[k]["segmentation"]
        if isinstance(mask, list):
            pixels = int(
                mask_util.area(mask_util.merge(mask_util.frPyObjects(mask, height, width)))
            )
        else:
            pixels = int(areas[k])
        if _differ(said[k], np.array(pixels)):
            report(k, "area-differs", f"the area is {said[k]:.6g}, that of the mask {pixels}")


def _differ(said: np.ndarray, areas: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return abs(said - areas) > np.maximum(AREA_PIXELS, AREA_SHARE * areas)


def compressed(rle: dict) -> dict:
    """As pycocotools takes it."""
    counts = rle["counts"]
    return rle if isinstance(counts, str) else mask_util.frPyObjects(rle, *rle["size"])


def _check_boxes(
    annotations: Annotations, sizes: np.ndarray, extents: np.ndarray, report: Report
) -> None:
    """For the arguments see :func:`_check_polygons`."""
    values = annotations.column("bbox")
    boxes = _read_boxes(values)
    for k in indices_of(np.isnan(boxes).any(axis=1)):
        said = "missing" if values[k] is MISSING else shown(values[k])
        report(k, "box", f"the box is {said}")
    empty = boxes[:, 2:].min(axis=1) <= 0
    for k in indices_of(empty):
        report(k, "box-empty", f"the box is {shown(values[k])}")
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    corners[empty] = np.nan
    # What is outside of the image does not count: Detectron2 cuts it off
    corners, extents = (_cut_off(x, sizes) for x in (corners, extents))
    off = abs(corners - extents)
    sides = extents[:, 2:] - extents[:, :2]
    allowed = np.maximum(TOLERANCE_PIXELS, TOLERANCE_SHARE * np.concatenate([sides, sides], axis=1))
    for k in indices_of((off > allowed).any(axis=1)):
        kind = "box-elsewhere" if _iou(corners[k], extents[k]) < 0.5 else "box-differs"
        left, top, right, bottom = extents[k]
        mask_box = f"[{left:.6g}, {top:.6g}, {right - left:.6g}, {bottom - top:.6g}]"
        report(k, kind, f"the box is {shown(values[k])}, that of the mask {mask_box}")


def _read_boxes(values: list) -> np.ndarray:
    """(N, 4), left, top, width, height; NaN where these are not numbers of pixels."""
    if all(isinstance(box, list) and len(box) == 4 for box in values):
        rows = values
    else:
        rows = [box if isinstance(box, list) and len(box) == 4 else [np.nan] * 4 for box in values]
    boxes = to_floats(chain.from_iterable(rows)).reshape(-1, 4).copy()
    boxes[~(abs(boxes) <= MAX_COORDINATE).all(axis=1)] = np.nan
    return boxes


def _cut_off(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) with corners within images of these sizes (N, 2), where they are known."""
    limits = np.concatenate([sizes[:, ::-1], sizes[:, ::-1]], axis=1)
    return np.where(np.isnan(limits), corners, np.clip(corners, 0, limits))


def _iou(box: np.ndarray, other: np.ndarray) -> float:
    """Of two boxes, the second of which has an area."""
    common = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    intersection = np.prod(np.maximum(common, 0))
    areas = np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2])
    return intersection / (areas - intersection)


def _check_copies(annotations: Annotations, extents: np.ndarray, report: Report) -> None:
    """Only those of a known image and with a mask that is right so far are compared."""
    keys = [annotations.images, extents[:, 0], extents[:, 1]]
    order = np.lexsort(keys)
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for key in keys:
        same &= key[order[1:]] == key[order[:-1]]
    # Of all that have these keys in common, in the order of the file
    alike = np.unique(np.concatenate([order[:-1][same], order[1:][same]]))
    first: dict[str, int] = {}
    for k in alike[annotations.images[alike] >= 0].tolist():
        entry = annotations.entries[k]
        place = int(annotations.images[k]), int(annotations.categories[k])
        content = place, bool(annotations.crowds[k]), entry["segmentation"]
        earlier = first.setdefault(repr(content), k)
        if earlier != k:
            id_ = shown(annotations.entries[earlier].get("id"))
            report(k, "annotation-copy", f"it is as annotation {id_}")
