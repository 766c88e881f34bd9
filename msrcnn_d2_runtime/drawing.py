"""Draw predictions into a picture."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .class_colors import class_colors
from .fonts import left_to_right
from .labels import (
    MAX_COVER,
    Color,
    Spot,
    all_scores,
    cut_to,
    label_image,
    label_size,
    place_labels,
)
from .predictions import TRACK_IDS, Masks, Predictions

try:
    import cv2
except ModuleNotFoundError as error:
    if error.name != "cv2":
        raise
    raise ModuleNotFoundError(
        "Drawing needs OpenCV, which is not installed: run `pip install opencv-python-headless`.",
        name="cv2",
    ) from None

__all__ = ["LabelStyle", "draw_objects", "draw_predictions", "enlarged", "label_texts"]

LabelStyle = Literal["short", "full", "none"]

# All in pixels of the picture that is drawn
MIN_SIDE = 400  # smaller images (square root of the area) are enlarged by default
MIN_WIDTH = 320  # narrower images too: labels with all scores need this room
MAX_SIDE = 8192  # no image is enlarged beyond this
MIN_FONT_SIZE = 13
MAX_NAME_WIDTH = 0.4  # of a class, in widths of the picture; longer ones are cut

FONT_SHARE = 1 / 55  # font size / square root of the picture's area
CROWDED_FONT_SHARE = 1 / 90  # if there are many labels
LINE_SHARE = 1 / 300  # the widest outlines / square root of the picture's area
LINE_SHARE_OF_OBJECT = 1 / 20  # outlines / side of the median object
MAX_LEGEND_WIDTH = 4  # in widths of the picture
FILL = 0.4  # opacity of masks
DARK = 0.3  # brightness of the edges of an outline: they show it on light pictures
NUM_POINTS = 50  # on an outline, and about as many inside, for the place of its label
MIN_LINE_TO_LABEL = 0.3  # shorter lines from objects to labels are left out; in heights of a label


def draw_predictions(
    image_rgb: np.ndarray,
    predictions: Predictions,
    class_names: Sequence[str] | None = None,
    *,
    labels: LabelStyle = "short",
    legend: bool = False,
    colors: Sequence[Color] | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """
    Draw masks with outlines in the colours of their classes, and labels.

    Labels do not cover each other. Where there is no room for all of them, those of objects with a
    low score or of objects that are smaller than their labels are left out.

    Args:
        image_rgb: uint8 (H, W, 3), which is not modified.
        predictions: of this image.
        class_names: the name of each class; by default its index.
        labels: "short" for labels like "person 0.45", with the score that the predictions are
            sorted by; "full" for labels like "person 0.71 x IoU 0.63 = 0.45", with all scores; or
            "none".
        legend: objects have their numbers as labels, beginning with 1, and the full labels are
            beside the picture, on the right, as far as they have room in four times its width. The
            width of the result depends on the predictions.
        colors: the colour of each class; by default those of
            :func:`~msrcnn_d2_runtime.class_colors.class_colors`.
        scale: the factor by which the picture is enlarged. By default pictures that are too small
            for labels are enlarged by a whole number, and others stay as they are.

    Returns:
        uint8 (scale * H, scale * W, 3), RGB; with a legend it is wider.

    Raises:
        ValueError: an argument has the wrong type or size.
    """
    if labels not in (styles := LabelStyle.__args__):  # type: ignore[attr-defined]
        raise ValueError(f"labels is one of {', '.join(styles)}, not '{labels}'.")
    if image_rgb.dtype != np.uint8 or image_rgb.ndim != 3 or image_rgb.shape[2] != 3:
        raise ValueError(
            "The image is a uint8 array of shape (height, width, 3), not "
            f"{image_rgb.dtype} of shape {image_rgb.shape}."
        )
    if image_rgb.shape[:2] != tuple(predictions.image_size):
        raise ValueError(
            f"The predictions are of an image of {tuple(predictions.image_size)} pixels (height, "
            f"width), and this image has {image_rgb.shape[:2]}."
        )
    num_classes = int(predictions.pred_classes.max(initial=-1)) + 1
    for given in (class_names, colors):
        if given is not None and len(given) < num_classes:
            raise ValueError(
                f"There are {len(given)} names or colours of classes, and a prediction has class "
                f"{num_classes - 1}."
            )
    height, width = image_rgb.shape[:2]
    scale = scale or legible_scale(height, width)
    canvas = enlarged(image_rgb, int(height * scale), int(width * scale))
    palette = class_colors(num_classes) if colors is None else np.array(colors, np.uint8)
    color_of = [tuple(palette[k].tolist()) for k in predictions.pred_classes]
    shape = canvas.shape[:2]
    numbers = [str(k + 1) for k in range(len(predictions))]
    texts = label_texts(predictions, predictions.ranking, class_names, labels, shape)
    draw_objects(
        canvas,
        predictions.masks,
        predictions.pred_boxes,
        color_of,
        labels=numbers if legend and labels != "none" else texts,
        importance=predictions.rank_scores,
    )
    if legend:
        rows = label_texts(predictions, predictions.ranking, class_names, "full", shape)
        canvas = _with_legend(canvas, numbers, rows, color_of)
    return canvas


def label_texts(
    predictions: Any,
    ranking: str,
    class_names: Sequence[str] | None,
    style: LabelStyle,
    picture_size: tuple[int, int],
) -> list[str]:
    """
    Args:
        predictions: N Predictions or Instances of one image, with "pred_classes".
        ranking: the score in short labels.
        class_names: name of each class; by default its index.
        style: as in :func:`draw_predictions`.
        picture_size: height and width of the picture in pixels. Names that are too long for it are
            cut.

    Returns:
        N labels, or none.
    """
    if style == "none":
        return []
    scores = (
        all_scores(predictions)
        if style == "full"
        else [f"{score:.2f}" for score in predictions.get(ranking).tolist()]
    )
    font_size, width = _font_size(*picture_size), MAX_NAME_WIDTH * picture_size[1]
    classes = predictions.pred_classes.tolist()
    names = {
        k: left_to_right(cut_to(class_names[k], width, font_size)) if class_names else str(k)
        for k in set(classes)
    }
    texts = [f"{names[k]} {score}" for k, score in zip(classes, scores)]
    if predictions.has(TRACK_IDS):
        ids = predictions.get(TRACK_IDS).tolist()
        texts = [f"#{x} {text}" if x >= 0 else text for x, text in zip(ids, texts)]
    return texts


def draw_objects(
    canvas: np.ndarray,
    masks: Masks,
    boxes: np.ndarray,
    colors: Sequence[Color],
    *,
    labels: Sequence[str] = (),
    importance: np.ndarray | None = None,
    fill: float = FILL,
) -> None:
    """
    Draw objects into a picture, the small ones upon the large ones, and labels upon them all. Of
    two objects of nearly the same size, the more important one is on top.

    Args:
        canvas: uint8 (H, W, 3), RGB, which is modified.
        masks: N masks of the image that the canvas shows, maybe enlarged. An object with an empty
            mask has the outline of its box.
        boxes: (N, 4), XYXY in pixels of the image.
        colors: N colours.
        labels: N texts, or none.
        importance: (N,), from 0 to 1: which labels to leave out last where there is no room. By
            default it falls from the first to the last.
        fill: the opacity of masks, from 0 to 1.
    """
    spots = _draw_masks(canvas, masks, boxes, colors, importance, fill)
    if not labels or not spots:
        return
    height, width = canvas.shape[:2]
    font_size = _font_size(height, width)
    sizes = np.array([label_size(text, font_size) for text in labels], dtype=float)
    # Less if the labels would cover much, or if one is wider than the picture
    crowded = max(MIN_FONT_SIZE, CROWDED_FONT_SHARE * math.sqrt(height * width))
    uncovering = font_size * math.sqrt(MAX_COVER * height * width / sizes.prod(axis=1).sum())
    # 0.95: the width of a text is not quite proportional to the size of its font
    widest = 0.95 * font_size * width / sizes[:, 0].max()
    fitting = max(1, int(min(font_size, max(uncovering, crowded), widest)))
    if fitting < font_size:
        font_size = fitting
        sizes = np.array([label_size(text, font_size) for text in labels], dtype=float)
    # An object that is smaller than its label loses importance
    if importance is None:
        importance = np.arange(len(labels), 0, -1)
    weights = {
        k: importance[k] * min(1, (spot.box[2:] - spot.box[:2]).prod() / sizes[k].prod())
        for k, spot in spots.items()
    }
    order = sorted(weights, key=lambda k: (-weights[k], k))
    picture = np.array([width, height])
    places, gaps = place_labels([spots[k] for k in order], sizes[order], picture)
    placed = [(k, place, gap) for k, place, gap in zip(order, places, gaps) if not np.isnan(gap)]
    # Lines from objects to their labels, all of them below all labels
    line = max(1, round(font_size / 12))
    for k, place, gap in placed:
        if gap > MIN_LINE_TO_LABEL * sizes[k, 1]:
            points = spots[k].points
            away = np.maximum(place[:2] - points, points - place[2:]).clip(0)
            end = points[np.hypot(*away.T).argmin()]
            ends = [end, end.clip(place[:2], place[2:] - 1)]
            _draw_lines(canvas, [np.array(ends, np.int32)], colors[k], line, closed=False)
    for k, place, _ in placed:
        image = label_image(labels[k], font_size, colors[k])
        x, y = np.minimum(place[:2].round().astype(int), picture - image.shape[1::-1])
        canvas[y : y + image.shape[0], x : x + image.shape[1]] = image


def _draw_masks(
    canvas: np.ndarray,
    masks: Masks,
    boxes: np.ndarray,
    colors: Sequence[Color],
    importance: np.ndarray | None,
    fill: float,
) -> dict[int, Spot]:
    """
    Draw masks and their outlines.

    Returns:
        {index of an object: where it is}, without those that have neither a mask nor a box.
    """
    height, width = canvas.shape[:2]
    scale = np.array([width / masks.image_size[1], height / masks.image_size[0]] * 2)
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4) * scale
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    # The smallest comes first, of nearly the same the most important
    demotion = 1 if importance is None else 2 - np.clip(importance, 0, 1)
    order = np.argsort(areas * demotion, kind="stable").tolist()
    free = np.ones((height, width), np.uint8)  # pixels without a mask so far
    contours: dict[int, list[np.ndarray]] = {}
    spots: dict[int, Spot] = {}
    for k in order:
        top, left, inside = masks.crop(k)
        bottom, right = top + inside.shape[0], left + inside.shape[1]
        x0, y0, x1, y1 = np.rint(np.array([left, top, right, bottom]) * scale).astype(int).tolist()
        pixels: np.ndarray = inside.astype(np.uint8)
        if x0 == x1 or y0 == y1:
            pixels = np.zeros((0, 0), np.uint8)
        elif pixels.shape != (y1 - y0, x1 - x0):
            pixels = cv2.resize(pixels, (x1 - x0, y1 - y0), interpolation=cv2.INTER_NEAREST)
        found, _ = cv2.findContours(
            pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(x0, y0)
        )
        contours[k] = list(found)
        if contours[k]:
            part = np.s_[y0:y1, x0:x1]
            mixed = np.arange(256)[:, None] * (1 - fill) + fill * np.array(colors[k])
            filled = cv2.LUT(canvas[part], np.rint(mixed).astype(np.uint8)[None])
            canvas[part] = cv2.copyTo(filled, cv2.bitwise_and(pixels, free[part]), canvas[part])
            free[part] &= 1 - pixels
        elif areas[k] > 0:
            x0, y0, x1, y1 = np.rint(boxes[k]).astype(int).clip(0, [width, height] * 2).tolist()
            corners = [[x0, y0], [x1 - 1, y0], [x1 - 1, y1 - 1], [x0, y1 - 1]]
            contours[k] = [np.array(corners, np.int32)[:, None]]
        if contours[k]:
            spots[k] = _spot(contours[k], pixels, np.array([x0, y0]))
    # Outlines that suit the picture, but thin ones if most objects are small
    median = math.sqrt(np.median(areas)) if len(areas) else 0
    line = min(LINE_SHARE * math.sqrt(height * width), LINE_SHARE_OF_OBJECT * median)
    line = max(1, round(line))
    for k in reversed(order):
        # Fewer points, where the line is wide, are faster to draw and look the same
        smooth = [cv2.approxPolyDP(x, 0.3 * line, True) for x in contours[k]]
        _draw_lines(canvas, smooth, colors[k], line, closed=True)
    return spots


def _spot(contours: Sequence[np.ndarray], pixels: np.ndarray, corner: np.ndarray) -> Spot:
    """
    Args:
        contours: as OpenCV finds them.
        pixels: the mask, from the corner (x, y) on.
    """
    corners = np.concatenate(contours)[:, 0]
    # Contours have points at their corners only. At equal steps along the longest:
    longest = max(contours, key=len)[:, 0]
    closed = np.concatenate([longest, longest[:1]])
    lengths = np.concatenate([[0], np.hypot(*np.diff(closed, axis=0).T).cumsum()])
    steps = np.linspace(0, lengths[-1], NUM_POINTS)
    outline = np.stack([np.interp(steps, lengths, side) for side in closed.T], axis=1)
    step = max(1, math.ceil(math.sqrt(pixels.size / NUM_POINTS)))
    inside = np.argwhere(pixels[step // 2 :: step, step // 2 :: step])[:, ::-1] * step + corner
    lowest, highest = corners.min(axis=0), corners.max(axis=0)
    top = corners[corners[:, 1] == lowest[1], 0]
    return Spot(
        box=np.concatenate([lowest, highest + 1]),
        top=(top.min() + top.max()) / 2,
        points=np.concatenate([outline, inside + step // 2]),
    )


def _draw_lines(
    canvas: np.ndarray, lines: list[np.ndarray], color: Color, width: int, closed: bool
) -> None:
    """Draw lines with dark edges."""
    dark = tuple(DARK * c for c in color)
    cv2.polylines(canvas, lines, closed, dark, width + max(1, width // 2), cv2.LINE_AA)
    cv2.polylines(canvas, lines, closed, color, width, cv2.LINE_AA)


def _with_legend(
    canvas: np.ndarray, numbers: Sequence[str], texts: Sequence[str], colors: Sequence[Color]
) -> np.ndarray:
    """The picture and, on the right of it, a row with number and text for each object."""
    if not texts:
        return canvas
    height, width = canvas.shape[:2]
    font_size = _font_size(height, width)
    white = (255, 255, 255)
    space = font_size // 2
    row_height = label_size(texts[0], font_size)[1] + space // 2
    tag_width, line_width = (max(label_size(x, font_size)[0] for x in y) for y in (numbers, texts))
    column_width = space + tag_width + line_width
    rows = max(1, (height - space) // row_height)
    columns = min(-(-len(texts) // rows), max(1, MAX_LEGEND_WIDTH * width // column_width))
    if len(texts) > rows * columns:  # the last row says how many are left out
        num = rows * columns - 1
        numbers, texts = [*numbers[:num], ""], [*texts[:num], f"and {len(texts) - num:,} more"]
        colors = [*colors[:num], white]
    tags = [label_image(number, font_size, color) for number, color in zip(numbers, colors)]
    lines = [label_image(text, font_size, white) for text in texts]
    shape = max(height, row_height + space), width + columns * column_width + space, 3
    result = np.full(shape, 255, np.uint8)
    result[:height, :width] = canvas
    for k, (tag, line) in enumerate(zip(tags, lines)):
        column, row = divmod(k, rows)
        y, x = space + row * row_height, width + space + column * column_width
        start = x + tag_width - tag.shape[1]  # numbers are flush right
        result[y : y + tag.shape[0], start : x + tag_width] = tag
        result[y : y + line.shape[0], x + tag_width : x + tag_width + line.shape[1]] = line
    return result


def legible_scale(height: int, width: int) -> int:
    """The factor by which an image is enlarged so that its labels fit and are legible."""
    wanted = max(MIN_SIDE / math.sqrt(height * width), MIN_WIDTH / width)
    # A whole number enlarges all pixels to the same size
    return max(1, min(math.ceil(wanted), MAX_SIDE // max(height, width)))


def enlarged(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A copy of an image, enlarged to this size."""
    if image.shape[:2] == (height, width):
        return np.array(image, order="C")
    size = max(1, width), max(1, height)
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_NEAREST)


def _font_size(height: int, width: int) -> int:
    return max(MIN_FONT_SIZE, round(FONT_SHARE * math.sqrt(height * width)))
