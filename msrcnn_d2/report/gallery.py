"""The detections whose rank changes most between two rankings of masks."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from matplotlib.figure import Figure

from detectron2.utils.file_io import PathManager

from msrcnn_d2_runtime.image_reading import ImageSettings, open_image, to_rgb

from ..evaluation.mask_quality import MaskQuality

__all__ = ["Move", "draw_detection", "largest_moves"]

logger = logging.getLogger(__name__)

MARGIN = 0.35  # around mask and object, as a share of their longer side
MIN_SIDE = 24  # smallest side of what is shown, in pixels
MASK_COLOR = (0.0, 0.45, 0.70)
GRAY = 110  # where there is no image


@dataclass
class Move:
    """
    A detection and its rank among the detections of its class. The best rank is 1.

    Attributes:
        index: index of the detection among the results.
        before, after: its rank by class score and by another score.
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
        """How many ranks it rose, as a share of the objects of its class; negative if it fell."""
        return (self.before - self.after) / self.num_objects


def largest_moves(quality: MaskQuality, ranking: str, count: int) -> tuple[list[Move], list[Move]]:
    """
    Find the detections that a ranking moves up most, compared with that by class score, and those
    that it moves down most, the largest moves first.

    Only detections that are among the first n of their class in one of the two rankings are
    considered, where n is the number of objects of the class. Further down, precision is low
    anyway, and close scores change places by thousands of ranks. Each image appears at most once
    in each of the two lists.

    Args:
        ranking: the other score, such as "mask_score".
        count: largest number of each; there may be fewer.
    """
    moves = []
    for k, num_objects in enumerate(quality.num_objects):
        indices = np.flatnonzero(quality.counted & (quality.class_indices == k))
        ranks = np.empty((2, len(indices)), dtype=int)
        for ranks_by_score, name in zip(ranks, ("class_score", ranking)):
            order = np.argsort(-quality.scores[name][indices], kind="stable")
            ranks_by_score[order] = np.arange(1, len(indices) + 1)
        for index, (before, after) in zip(indices.tolist(), ranks.T.tolist()):
            if min(before, after) <= num_objects:
                moves.append(Move(index, before, after, len(indices), num_objects))
    moves.sort(key=lambda move: -move.up)

    def first_of_each_image(moves: Iterable[Move]) -> list[Move]:
        first: dict = {}
        for move in moves:
            first.setdefault(quality.results[move.index]["image_id"], move)
        return list(first.values())[:count]

    return (
        first_of_each_image(m for m in moves if m.up > 0),
        first_of_each_image(m for m in reversed(moves) if m.up < 0),
    )


def draw_detection(
    quality: MaskQuality,
    index: int,
    annotation: dict | None,
    image_root: str | None,
    settings: ImageSettings | None = None,
) -> Figure:
    """
    Draw the mask of a detection in its image, cut out, with the outline of an object.

    Args:
        index: index of the detection among the results.
        annotation: the object, None for no outline.
        image_root: the folder of the images, None if there are none to show.
        settings: how images are read.
    """
    mask = mask_util.decode(quality.results[index]["segmentation"]).astype(bool)
    truth = None
    if annotation is not None:
        truth = quality.coco_gt.annToMask(annotation).astype(bool)
    image = _image(quality, index, image_root, settings or ImageSettings(), mask.shape)

    # A square around mask and object, or the whole image if the mask is empty
    rows, columns = np.nonzero(mask if truth is None else mask | truth)
    height, width = mask.shape
    x, y, half = width / 2, height / 2, max(height, width) / 2
    if len(rows):
        side = max(int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1, MIN_SIDE)
        x, y = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
        half = side * (0.5 + MARGIN)
    # Cut out with a pixel to spare: drawing the whole of a large image takes minutes and gigabytes
    top, left = max(int(y - half) - 1, 0), max(int(x - half) - 1, 0)
    part = slice(top, int(y + half) + 3), slice(left, int(x + half) + 3)
    mask, image = mask[part], image[part]

    figure = Figure(figsize=(2.6, 2.6), facecolor="0.85")  # beyond the image
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(image, interpolation="bilinear")
    axes.imshow(np.dstack([np.full((*mask.shape, 3), MASK_COLOR), 0.45 * mask]))
    outlines: list[tuple[np.ndarray, Any, str, float]] = [(mask, MASK_COLOR, "solid", 1.6)]
    if truth is not None:
        outlines += [(truth[part], "white", "solid", 2.2), (truth[part], "black", "dashed", 1.4)]
    for shape, color, style, line in outlines:
        if shape.any():
            padded = np.pad(shape, 1)  # closes outlines at the border of the image
            xs, ys = np.arange(padded.shape[1]) - 1, np.arange(padded.shape[0]) - 1
            axes.contour(xs, ys, padded, [0.5], colors=[color], linewidths=line, linestyles=style)
    axes.set_xlim(x - half - left, x + half - left)
    axes.set_ylim(y + half - top, y - half - top)
    axes.set_axis_off()
    return figure


def _image(
    quality: MaskQuality,
    index: int,
    image_root: str | None,
    settings: ImageSettings,
    shape: tuple[int, ...],
) -> np.ndarray:
    """The image of a detection, H x W x 3, uint8; gray if there is none of the right size."""
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
