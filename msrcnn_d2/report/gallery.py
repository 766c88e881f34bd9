"""The detections whose rank changes most when masks are ranked by mask score."""

import logging
import os
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detectron2.utils.file_io import PathManager

from ..evaluation.mask_quality import MaskQuality
from ..image_reading import ImageSettings, open_image, to_rgb

__all__ = ["Move", "draw_move", "largest_moves"]

logger = logging.getLogger(__name__)

MARGIN = 0.35  # around mask and object, as a share of their longer side
MIN_SIDE = 24  # of what is shown, in pixels
MASK_COLOR = (0.0, 0.45, 0.70)
GRAY = 110  # where there is no image


@dataclass
class Move:
    """
    A detection and its rank among those of its class, the best being 1.

    Attributes:
        index: of the detection among the results.
        before, after: its rank by class score and by mask score.
        num_ranked: number of detections of its class.
        num_objects: number of objects of its class.
    """

    index: int
    before: int
    after: int
    num_ranked: int
    num_objects: int

    @property
    def up(self) -> float:
        """By how many of its class's objects it rose; negative if it fell."""
        return (self.before - self.after) / self.num_objects


def largest_moves(quality: MaskQuality, count: int) -> tuple[list[Move], list[Move]]:
    """
    The detections that moved up most and those that moved down most, the largest moves first.

    Looked at are those that one of the two rankings has among the first n of their class, n being
    the number of its objects: behind those, precision has little left to lose, and ranks that lie
    close together change places by thousands. Of each image there is one at most.

    Args:
        count: how many of each; there may be fewer.
    """
    moves = sorted(_moves(quality), key=lambda m: -m.up)
    image_of = [result["image_id"] for result in quality.results]
    up = _one_of_each_image((m for m in moves if m.up > 0), image_of)
    down = _one_of_each_image((m for m in reversed(moves) if m.up < 0), image_of)
    return up[:count], down[:count]


def _moves(quality: MaskQuality) -> list[Move]:
    moves = []
    for k, num_objects in enumerate(quality.num_objects):
        indices = np.flatnonzero(quality.counted & (quality.class_indices == k))
        before, after = (
            _ranks(quality.scores[name][indices]) for name in ("class_score", "mask_score")
        )
        first = np.minimum(before, after) <= num_objects
        moves += [
            Move(index, old, new, len(indices), num_objects)
            for index, old, new in zip(*(x[first].tolist() for x in (indices, before, after)))
        ]
    return moves


def _ranks(scores: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(scores), dtype=int)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks


def _one_of_each_image(moves, image_of: list) -> list[Move]:
    first: dict = {}
    for move in moves:
        first.setdefault(image_of[move.index], move)
    return list(first.values())


def draw_move(
    quality: MaskQuality,
    move: Move,
    image_root: str | None,
    settings: ImageSettings | None = None,
) -> Figure:
    """
    A detection's mask in its image, cut out, with the outline of the object that it overlaps most.

    Args:
        image_root: the folder of the images, None if there are none to show.
        settings: how images are read.
    """
    mask = mask_util.decode(quality.results[move.index]["segmentation"]).astype(bool)
    truth = object_mask(quality, move.index)
    image = _image(quality, move.index, image_root, settings or ImageSettings(), mask.shape)
    window = _window(mask if truth is None else mask | truth)
    # Cut out first: to draw the whole of a large image takes minutes and gigabytes
    mask, image = _cut(mask, window), _cut(image, window)
    figure = Figure(figsize=(2.6, 2.6), facecolor="0.85")  # beyond the image
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image, interpolation="bilinear")
    axes.imshow(np.dstack([np.full((*mask.shape, 3), MASK_COLOR), 0.45 * mask]))
    _outline(axes, mask, MASK_COLOR, "solid", 1.6)
    if truth is not None:
        truth = _cut(truth, window)
        _outline(axes, truth, "white", "solid", 2.2)
        _outline(axes, truth, "black", "dashed", 1.4)
    _show_only(axes, window)
    axes.set_axis_off()
    return figure


def object_mask(quality: MaskQuality, index: int) -> np.ndarray | None:
    """The H x W mask of the object of its class that a detection overlaps most, None without."""
    result, coco_gt = quality.results[index], quality.coco_gt
    ids = coco_gt.getAnnIds([result["image_id"]], [result["category_id"]], iscrowd=False)
    objects = coco_gt.loadAnns(ids)
    if not objects:
        return None
    rles = [coco_gt.annToRLE(a) for a in objects]
    ious = mask_util.iou([result["segmentation"]], rles, [0] * len(rles))[0]
    if not ious.max() > 0:
        return None
    return mask_util.decode(rles[int(ious.argmax())]).astype(bool)


def _image(
    quality: MaskQuality, index: int, image_root: str | None, settings: ImageSettings, shape
) -> np.ndarray:
    """H x W x 3, uint8; gray where there is no image that fits."""
    blank = np.broadcast_to(np.uint8(GRAY), (*shape, 3))
    name = quality.coco_gt.imgs[quality.results[index]["image_id"]].get("file_name")
    if image_root is None or name is None:
        return blank
    path = os.path.join(image_root, name)
    try:
        with PathManager.open(path, "rb") as f, open_image(f, settings) as opened:
            image = np.asarray(to_rgb(opened, settings))
    except (OSError, ValueError, SyntaxError) as error:
        logger.warning("The report shows a mask without its image '%s': %s", path, error)
        return blank
    if image.shape[:2] != shape:
        size, expected = (" x ".join(map(str, s[:2])) for s in (image.shape, shape))
        logger.warning(
            "The report shows a mask without its image: '%s' has %s pixels, its annotation says %s",
            *(path, size, expected),
        )
        return blank
    return image


def _window(shown: np.ndarray) -> tuple[float, float, float]:
    """Centre (x, y) and half of the side of a square around the pixels that are to be shown."""
    rows, columns = np.nonzero(shown)
    if not len(rows):
        return shown.shape[1] / 2, shown.shape[0] / 2, max(shown.shape) / 2
    side = max(int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1, MIN_SIDE)
    center = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
    return *center, side * (0.5 + MARGIN)


def _cut(pixels: np.ndarray, window: tuple[float, float, float]) -> np.ndarray:
    """The part of an image or a mask that the window has, and a pixel more on each side."""
    top, left = _origin(window)
    x, y, half = window
    return pixels[top : int(y + half) + 3, left : int(x + half) + 3]


def _origin(window: tuple[float, float, float]) -> tuple[int, int]:
    """Row and column of the first pixel that is cut out."""
    x, y, half = window
    return max(int(y - half) - 1, 0), max(int(x - half) - 1, 0)


def _show_only(axes: Axes, window: tuple[float, float, float]) -> None:
    (top, left), (x, y, half) = _origin(window), window
    axes.set_xlim(x - half - left, x + half - left)
    axes.set_ylim(y + half - top, y - half - top)


def _outline(axes: Axes, mask: np.ndarray, color, style: str, width: float) -> None:
    if not mask.any():
        return
    padded = np.pad(mask, 1)  # closes outlines at the border of the image
    x, y = np.arange(padded.shape[1]) - 1, np.arange(padded.shape[0]) - 1
    axes.contour(x, y, padded, levels=[0.5], colors=[color], linewidths=width, linestyles=style)
