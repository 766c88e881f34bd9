"""Labels of the objects in a picture: their texts, their images and their places."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from .fonts import is_right_to_left, runs

__all__ = ["Color", "Spot", "all_scores", "cut_to", "label_image", "label_size", "place_labels"]

Color = tuple[int, int, int]  # RGB, from 0 to 255

ELLIPSIS = "…"
# Sizes in an image of a label, in font sizes
PADDING = 0.3  # on both sides of the text
ASCENT, DESCENT = 1.1, 0.35  # above and below the baseline
BRIGHT = 110  # the luma from which on texts are black

# The places that are tried for a label. The first one is above its object, in the middle of its
# uppermost part.
STEPS_ASIDE = np.arange(-4, 5) / 4  # from there, in widths of the label
STEPS_DOWN = np.arange(-4, 6) / 2  # in heights of the label
CLEARANCE = 0.2  # between object and label, in heights of the label
# A label is left out if no place is better than this
MAX_GAP = 0.8  # between object and label, in heights of the label
MAX_HIDDEN = 0.5  # objects that the label hides: the sum of the hidden shares of their boxes
MAX_DENSITY = 0.3  # share of the surroundings of the label that other labels cover
MAX_COVER = 0.2  # share of the picture that all labels cover


def all_scores(predictions: Any) -> list[str]:
    """
    Args:
        predictions: N predictions of one image: Predictions, or Detectron2's Instances with at
            least one score.

    Returns:
        N texts like "0.93 x IoU 0.81 = 0.75": class score x predicted IoU = mask score; "0.93, IoU
        0.81 → 0.40" if the mask scores are not these products, or with the calibrated score at the
        end; "0.93 → 0.62" if there is only the latter; "IoU 0.81" without a class score; "0.93"
        without any other.
    """
    if not predictions.has("scores"):
        return [f"IoU {iou:.2f}" for iou in predictions.pred_mask_ious.tolist()]
    scores = predictions.scores.tolist()
    is_calibrated = predictions.has("quality_scores")
    if not is_calibrated and not predictions.has("mask_scores"):
        return [f"{score:.2f}" for score in scores]
    totals = predictions.get("quality_scores" if is_calibrated else "mask_scores").tolist()
    if not predictions.has("pred_mask_ious"):
        return [f"{score:.2f} → {total:.2f}" for score, total in zip(scores, totals)]
    rows = list(zip(scores, predictions.pred_mask_ious.tolist(), totals))
    # Equations for all or none, so that the labels of a picture read alike. They hold up to the
    # rounding to two digits
    if not is_calibrated and all(abs(s * iou - total) <= 0.005 for s, iou, total in rows):
        return [f"{s:.2f} x IoU {iou:.2f} = {total:.2f}" for s, iou, total in rows]
    return [f"{s:.2f}, IoU {iou:.2f} → {total:.2f}" for s, iou, total in rows]


def cut_to(name: str, width: float, font_size: int) -> str:
    """The name, or as much of its beginning as fits with an ellipsis into so many pixels."""
    text = name
    longest = int(5 * width / font_size)  # even of the narrowest letters no more have room
    for kept in range(max(1, min(len(name) - 1, longest)), 0, -1):
        if sum(font.getlength(part) for part, font in _fonts_of(text, font_size)) <= width:
            break
        text = name[:kept].rstrip() + ELLIPSIS
    return text


@functools.lru_cache(maxsize=4096)
def label_size(text: str, font_size: int) -> tuple[int, int]:
    """Width and height of the image of a label, in pixels."""
    width = math.ceil(sum(font.getlength(part) for part, font in _fonts_of(text, font_size)))
    height = round(ASCENT * font_size) + round(DESCENT * font_size)
    return width + 2 * round(PADDING * font_size), height


def label_image(text: str, font_size: int, color: Color) -> np.ndarray:
    """
    Args:
        text: in any script.
        font_size: in pixels.
        color: of the background; the text is black or white.

    Returns:
        uint8 (h, w, 3), RGB.
    """
    image = Image.new("RGB", label_size(text, font_size), color)
    draw = ImageDraw.Draw(image)
    ink = "black" if np.dot(color, (0.299, 0.587, 0.114)) > BRIGHT else "white"
    x: float = round(PADDING * font_size)
    baseline = round(ASCENT * font_size)
    for part, font in _fonts_of(text, font_size):
        draw.text((x, baseline), part, fill=ink, font=font, anchor="ls")
        x += font.getlength(part)
    return np.asarray(image)


def _fonts_of(text: str, size: int) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """The parts of a text from left to right, and the font to draw each with."""
    one_line = " ".join(text.split())
    parts = [(part, _font(file, size)) for part, file in runs(one_line)]
    if is_right_to_left(text) and not features.check("raqm"):
        # Without this library Pillow draws letters from left to right, in the order they have
        parts = [(part[::-1] if is_right_to_left(part) else part, font) for part, font in parts]
    return parts


@functools.lru_cache(maxsize=64)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@dataclass
class Spot:
    """
    Where an object is, in pixels of the picture.

    Attributes:
        box: (4,), XYXY.
        top: x of the middle of its uppermost part.
        points: (P, 2), x and y of some of its points, on the outline and inside.
    """

    box: np.ndarray
    top: float
    points: np.ndarray


def place_labels(
    spots: Sequence[Spot], sizes: np.ndarray, picture: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Give each label a place at its object where it covers no earlier label and hides no object.

    Args:
        spots: of N objects, those first whose labels are most important.
        sizes: (N, 2), width and height of the labels in pixels.
        picture: (2,), width and height of the picture in pixels.

    Returns:
        (N, 4), XYXY of the labels, NaN for those without a place.
        (N,), how far each is away from its object.
    """
    boxes = np.array([spot.box for spot in spots], dtype=float).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    placed = np.zeros((0, 4))
    places, gaps = np.full((len(boxes), 4), np.nan), np.full(len(boxes), np.nan)
    room = MAX_COVER * picture.prod()
    for k, (spot, size) in enumerate(zip(spots, sizes)):
        if size.prod() > room or (size > picture).any():
            continue
        (width, height), (x0, y0, x1, y1) = size, spot.box
        clearance = CLEARANCE * height
        home = np.array([spot.top - width / 2, y0 - clearance - height])
        # Above and inside, then beside, below and in the middle
        x = [*(home[0] + width * STEPS_ASIDE), x0 - clearance - width, x1 + clearance]
        y = [*(home[1] + height * STEPS_DOWN), y1 + clearance, (y0 + y1 - height) / 2]
        corners = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).clip(0, picture - size)
        tried = np.hstack([corners, corners + size])
        # Twice as wide as the label and four times as high
        around = tried + np.concatenate([-size, size]) * (0.5, 1.5, 0.5, 1.5)
        density = _overlaps(around, placed).sum(axis=1) / (8 * size.prod())
        x, y = spot.points.T
        aside = np.maximum(tried[:, 0, None] - x, x - tried[:, 2, None])
        above = np.maximum(tried[:, 1, None] - y, y - tried[:, 3, None])
        gap = np.hypot(np.maximum(aside, 0), np.maximum(above, 0)).min(axis=1)
        lowest, highest = tried[:, :2].min(axis=0), tried[:, 2:].max(axis=0)
        near = ((boxes[:, :2] < highest) & (boxes[:, 2:] > lowest)).all(axis=1)
        hidden = (_overlaps(tried, boxes[near]) / areas[near]).sum(axis=1)
        shift = np.abs((corners - home) / (2 * height, height)).sum(axis=1)
        cost = 0.5 * hidden + 0.2 * gap / height + 0.05 * shift  # weights are a matter of taste
        bad = (gap > MAX_GAP * height) | (hidden > MAX_HIDDEN) | (density > MAX_DENSITY)
        cost[bad | (_overlaps(tried, placed).sum(axis=1) > 0)] = np.inf
        best = cost.argmin()
        if np.isfinite(cost[best]):
            room -= size.prod()
            places[k], gaps[k] = tried[best], gap[best]
            placed = np.vstack([placed, tried[best]])
    return places, gaps


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Areas in which boxes of shape (K, 4) and (N, 4), XYXY, overlap: shape (K, N)."""
    width = np.minimum(a[:, 2, None], b[:, 2]) - np.maximum(a[:, 0, None], b[:, 0])
    height = np.minimum(a[:, 3, None], b[:, 3]) - np.maximum(a[:, 1, None], b[:, 1])
    return np.maximum(width, 0) * np.maximum(height, 0)
