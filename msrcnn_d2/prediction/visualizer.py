"""Draw predictions, with labels that show class score, mask IoU and mask score."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.colors as mplc
import numpy as np
import torch
from matplotlib.text import Text

from detectron2.data import Metadata
from detectron2.structures import BitMasks, Instances
from detectron2.utils.colormap import random_color

from msrcnn_d2_runtime.fonts import drawable, left_to_right

try:
    from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer
except ModuleNotFoundError as error:
    if error.name != "cv2":
        raise
    raise ModuleNotFoundError(
        "Drawing needs OpenCV, which is not installed: run `pip install opencv-python-headless`.",
        name="cv2",
    ) from None

__all__ = ["MaskScoringVisualizer", "mask_score_labels", "place_labels"]

# All in pixels of the output
MIN_SIDE = 400  # smaller images (square root of the area) are enlarged by default
MIN_WIDTH = 320  # narrower images too: a label of about 45 characters needs this room
MAX_SIDE = 8192  # no image is enlarged beyond this; Matplotlib's limit is 65536
FONT_SIZE = 11.0  # minimum for a few labels
CROWDED_FONT_SIZE = 9.0  # minimum for many labels, unless one is too wide for the picture

PADDING = 0.15  # around a text, in font sizes; Detectron2's dark box takes half of it
FONT_SHARE = 1 / 50  # font size / square root of the output's area
MAX_COVER = 0.25  # share of the output that labels cover before they become smaller
MAX_SHIFT = 8  # how far a label moves up or down to where there is room, in heights of a label


class MaskScoringVisualizer(Visualizer):
    """
    :class:`Visualizer` with labels such as "person 0.93 x IoU 0.81 = 0.75": class score x
    predicted IoU = mask score. If the mask scores are not these products, as those of a MaskIoU
    head of your own may be, labels are like "person 0.93, IoU 0.81 → 0.40". The last number is the
    calibrated score if the model has a calibrator; without a predicted IoU, labels are then like
    "person 0.93 → 0.62".

    Labels are legible on small and large images and stay inside the picture. They do not cover each
    other where there is room; those of the best masks are placed first and lie on top. Predictions
    of a plain Mask R-CNN are labelled as Detectron2 does.

    The arguments are those of :class:`Visualizer`. By default, `scale` enlarges images that are
    too small for labels.
    """

    def __init__(
        self,
        img_rgb: np.ndarray,
        metadata: Metadata | None = None,
        scale: float | None = None,
        instance_mode: ColorMode = ColorMode.IMAGE,
    ):
        if scale is None:
            scale = _legible_scale(*np.asarray(img_rgb).shape[:2])
        super().__init__(img_rgb, metadata, scale, instance_mode)
        # In pixels of the output: the unit of Matplotlib's font sizes; width and height
        self._point = self.output.dpi / 72
        self._output_size = np.array([self.output.width, self.output.height]) * self.output.scale
        self._mask_labels: tuple[list[str], Sequence[float]] | None = None

    def draw_instance_predictions(
        self, predictions: Instances, *args: Any, **kwargs: Any
    ) -> VisImage:
        """
        Args:
            predictions: Instances of one image on any device, which are not modified. Besides the
                fields that :class:`Visualizer` draws, it uses "pred_mask_ious", "mask_scores" and
                "quality_scores".
        """
        predictions = predictions.to("cpu")
        rankings = ("quality_scores", "mask_scores", "pred_mask_ious")
        ranking = next(filter(predictions.has, rankings), None)
        if ranking is not None:
            labels = mask_score_labels(predictions, self.metadata.get("thing_classes"))
            # The base class calls overlay_instances with labels of its own; these replace them
            self._mask_labels = labels, predictions.get(ranking).tolist()
        try:
            return super().draw_instance_predictions(predictions, *args, **kwargs)
        finally:
            self._mask_labels = None

    def overlay_instances(
        self,
        *,
        boxes: Any = None,
        labels: list[str] | None = None,
        masks: Any = None,
        assigned_colors: Any = None,
        **kwargs: Any,
    ) -> VisImage:
        """Like the base class, but labels are drawn over all boxes and masks."""
        labels, scores = self._mask_labels or (labels, range(len(labels or ()), 0, -1))
        boxes = self._convert_boxes(boxes) if boxes is not None else None
        masks = self._convert_masks(masks) if masks is not None else None
        if labels and assigned_colors is None:
            assigned_colors = [random_color(rgb=True, maximum=1) for _ in labels]
        shapes = {"boxes": boxes, "masks": masks, "assigned_colors": assigned_colors, **kwargs}
        extents = _extents(boxes, masks)
        if not labels or extents is None:
            return super().overlay_instances(labels=labels, **shapes)
        super().overlay_instances(**shapes)
        order = np.argsort([-score for score in scores], kind="stable")
        order = order[(extents[order, 2:] > extents[order, :2]).all(axis=1)]  # no empty masks
        if len(order):
            self._draw_labels(
                [labels[k] for k in order], extents[order], [assigned_colors[k] for k in order]
            )
        return self.output

    def _draw_labels(self, labels: list[str], boxes: np.ndarray, colors: list) -> None:
        """
        Args:
            labels: N labels, the most important one first.
            boxes: ndarray of shape (N, 4), the boxes of their objects, XYXY in pixels of the image.
            colors: N colors of Matplotlib.
        """
        scale = self.output.scale
        # Halfway to white: texts of the full colour may be too dark to read on their dark boxes
        colors = [(1 + np.array(mplc.to_rgb(color))) / 2 for color in colors]
        labels, families = drawable(labels)
        for label, box, color in reversed(list(zip(labels, boxes, colors))):  # the last is on top
            self.draw_text(label, box[:2], font_size=10 / scale, color=color)
        texts = self.output.ax.texts[: -len(labels) - 1 : -1]
        for text in texts:
            text.set_fontfamily(families)
        self._set_font_size(texts)
        places = place_labels(boxes * scale, self._sizes(texts), self._output_size) / scale
        for text, box, place in zip(texts, boxes, places):
            padding = PADDING * text.get_fontsize() * self._point / scale
            text.set(position=place[:2] + padding, horizontalalignment="left")
            # A thin line from the label to its box, if they do not touch
            start = ((box[:2] + box[2:]) / 2).clip(place[:2], place[2:])
            end = start.clip(box[:2], box[2:])
            if (start != end).any():
                self.draw_line(*np.stack([start, end], axis=1), color=text.get_color())
                self.output.ax.lines[-1].set_linewidth(text.get_fontsize() / 10)

    def _set_font_size(self, texts: list[Text]) -> None:
        """Set a size that suits the picture, or less if labels would cover much or be too wide."""
        picture = self._output_size
        suitable = max(FONT_SIZE, FONT_SHARE * math.sqrt(picture.prod())) / self._point
        for text in texts:
            text.set_fontsize(suitable)
        sizes = self._sizes(texts)
        uncovering = suitable * min(1, math.sqrt(MAX_COVER * picture.prod() / sizes.prod(1).sum()))
        # 0.95: the size of a text is not quite proportional to that of its font
        widest = suitable * 0.95 * (picture / sizes.max(axis=0)).min()
        for text in texts:
            text.set_fontsize(min(max(uncovering, CROWDED_FONT_SIZE / self._point), widest))

    def _sizes(self, texts: list[Text]) -> np.ndarray:
        """Width and height of each Text with its padding, in pixels of the output: (N, 2)."""
        padding = 2 * PADDING * self._point * np.array([[t.get_fontsize()] for t in texts])
        return np.array([t.get_window_extent().size for t in texts]) + padding


def mask_score_labels(
    predictions: Instances, class_names: Sequence[str] | None = None
) -> list[str]:
    """
    Args:
        predictions: N predictions of one image with "pred_classes", with "pred_mask_ious" if the
            model has a MaskIoU head and, if the boxes were predicted, with "scores", "mask_scores"
            (if there are IoUs) and "quality_scores" (if the model has a calibrator).
        class_names: name of each class; by default its index.

    Returns:
        N labels like "person 0.93 x IoU 0.81 = 0.75"; "person 0.93, IoU 0.81 → 0.40" if the mask
        scores are not these products, or with the calibrated score at the end; "person 0.93 → 0.62"
        if there is only the latter; "person IoU 0.81" without "scores".
    """
    classes = predictions.pred_classes.tolist()
    names = [left_to_right(class_names[k]) if class_names else str(k) for k in classes]
    if not predictions.has("scores"):
        ious = predictions.pred_mask_ious.tolist()
        return [f"{name} IoU {iou:.2f}" for name, iou in zip(names, ious)]
    scores = predictions.scores.tolist()
    is_calibrated = predictions.has("quality_scores")
    totals = predictions.get("quality_scores" if is_calibrated else "mask_scores").tolist()
    if not predictions.has("pred_mask_ious"):
        return [f"{name} {s:.2f} → {total:.2f}" for name, s, total in zip(names, scores, totals)]
    rows = list(zip(names, scores, predictions.pred_mask_ious.tolist(), totals))
    # Equations for all or none, so that the labels of a picture read alike. They hold up to the
    # rounding to two digits
    if not is_calibrated and all(abs(s * iou - total) <= 0.005 for _, s, iou, total in rows):
        return [f"{name} {s:.2f} x IoU {iou:.2f} = {total:.2f}" for name, s, iou, total in rows]
    return [f"{name} {s:.2f}, IoU {iou:.2f} → {total:.2f}" for name, s, iou, total in rows]


def _legible_scale(height: int, width: int) -> int:
    """The factor by which an image is enlarged so that its labels fit and are legible."""
    wanted = max(MIN_SIDE / math.sqrt(height * width), MIN_WIDTH / width)
    # A whole number enlarges all pixels to the same size
    return max(1, min(math.ceil(wanted), MAX_SIDE // max(height, width)))


def _extents(boxes: np.ndarray | None, masks: list | None) -> np.ndarray | None:
    """Boxes of shape (N, 4), XYXY, of what is drawn; None if labels cannot be placed by them."""
    if boxes is not None:
        return boxes if boxes.shape[-1] == 4 else None  # labels of rotated boxes are rotated too
    if not masks:
        return None
    bitmasks = BitMasks(torch.from_numpy(np.stack([m.mask for m in masks])))
    return bitmasks.get_bounding_boxes().tensor.numpy()


def place_labels(boxes: np.ndarray, sizes: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """
    Give each label a place near its object, if possible one where it covers no earlier label.

    Args:
        boxes: ndarray of shape (N, 4), XYXY of the objects.
        sizes: ndarray of shape (N, 2), width and height of their labels.
        picture: ndarray of shape (2,), width and height of the picture, in the same unit.

    Returns:
        ndarray of shape (N, 4), XYXY of the labels.
    """
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    labels = np.zeros((0, 4))
    for box, size in zip(boxes, sizes):
        height = size[1]
        home = box[:2] - (0, height)  # above the upper left corner, where it hides no object
        shifts = np.mgrid[-1:1.25:0.25, -MAX_SHIFT : MAX_SHIFT + 1].reshape(2, -1).T
        corners = (home + shifts * size).clip(0, picture - size)
        places = np.hstack([corners, corners + size])
        shift = np.abs(corners - home).sum(axis=1) / height
        gap = np.maximum(places[:, :2] - box[2:], box[:2] - places[:, 2:]).max(axis=1).clip(0)
        hidden_label = _overlaps(places, labels).sum(axis=1) / size.prod()
        hidden_objects = (_overlaps(places, boxes) / areas).sum(axis=1)
        # Most important is that no label is hidden; the other weights are a matter of taste
        cost = 2 * (hidden_label > 0.01) + 2 * hidden_label  # 0.01: rounding
        cost += 0.3 * hidden_objects + 0.1 * gap / height + 0.01 * shift
        labels = np.vstack([labels, places[cost.argmin()]])
    return labels


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Areas in which boxes of shape (K, 4) and (N, 4), XYXY, overlap: shape (K, N)."""
    lower = np.maximum(a[:, None, :2], b[:, :2])
    upper = np.minimum(a[:, None, 2:], b[:, 2:])
    return (upper - lower).clip(0).prod(axis=2)
