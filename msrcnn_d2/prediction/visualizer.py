"""Draw predictions with Detectron2's Visualizer, in the look of this package."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.colors as mplc
import numpy as np

# Before Detectron2's visualizer, because it says what to install if OpenCV is missing
import msrcnn_d2_runtime.drawing  # noqa: F401  # isort: skip

from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer

from msrcnn_d2_runtime.class_colors import class_color, class_colors
from msrcnn_d2_runtime.drawing import (
    FILL,
    LabelStyle,
    draw_objects,
    enlarged,
    label_texts,
    legible_scale,
)
from msrcnn_d2_runtime.labels import Color
from msrcnn_d2_runtime.predictions import CroppedMasks
from msrcnn_d2_runtime.ranking import SCORE_FIELDS

__all__ = ["MaskScoringVisualizer"]


@dataclass
class _Look:
    """
    How N objects look, as far as the base class does not tell :meth:`overlay_instances`.

    Attributes:
        colors: N colours.
        labels: N texts, or none; None for those of the base class.
        importance: (N,), of the labels; by default it falls.
        fill: the opacity of masks; None for that of the base class.
    """

    colors: list[Color]
    labels: list[str] | None = None
    importance: np.ndarray | None = None
    fill: float | None = None


class MaskScoringVisualizer(Visualizer):
    """
    :class:`Visualizer` that draws instances as :func:`msrcnn_d2_runtime.drawing.draw_predictions`
    does: masks with outlines in the colours of their classes, and labels like "person 0.45" that do
    not cover each other. Boxes are drawn where there are no masks.

    The colour of a class is the same in each picture; with `ColorMode.SEGMENTATION` it is that of
    the metadata. Annotations that :meth:`draw_dataset_dict` draws have it too.
    """

    def __init__(
        self,
        img_rgb: np.ndarray,
        metadata: Metadata | None = None,
        scale: float | None = None,
        instance_mode: ColorMode = ColorMode.IMAGE,
        labels: LabelStyle = "short",
    ):
        """
        Args:
            img_rgb, metadata, instance_mode: as for :class:`Visualizer`.
            scale: the factor by which the picture is enlarged. By default pictures that are too
                small for labels are enlarged by a whole number, and others stay as they are.
            labels: of predictions: "short" for labels like "person 0.45", with the score that
                predictions of the model are sorted by; "full" for labels like "person 0.71 x IoU
                0.63 = 0.45", with all scores; or "none".
        """
        if scale is None:
            scale = legible_scale(*np.asarray(img_rgb).shape[:2])
        super().__init__(img_rgb, metadata, scale, instance_mode)
        self._label_style = labels
        self._look: _Look | None = None

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
        if predictions.has("pred_classes"):
            look = self._look = _Look(self._class_colors(predictions.pred_classes.tolist()))
            if self._instance_mode == ColorMode.IMAGE:
                look.fill = FILL
            rankings = (*reversed(SCORE_FIELDS.values()), "pred_mask_ious")
            ranking = next(filter(predictions.has, rankings), None)
            if ranking is not None:
                width, height = self.output.canvas.get_width_height()
                names, style = self.metadata.get("thing_classes"), self._label_style
                look.labels = label_texts(predictions, ranking, names, style, (height, width))
                look.importance = predictions.get(ranking).numpy()
        try:
            return super().draw_instance_predictions(predictions, *args, **kwargs)
        finally:
            self._look = None

    def draw_dataset_dict(self, dic: dict) -> VisImage:
        """Like the base class, with annotations in the colours of their classes."""
        self._look = _Look(
            self._class_colors([x["category_id"] for x in dic.get("annotations") or ()])
        )
        try:
            return super().draw_dataset_dict(dic)
        finally:
            self._look = None

    def _class_colors(self, classes: Sequence[int]) -> list[Color]:
        """The colours of objects with these classes."""
        if self._instance_mode == ColorMode.SEGMENTATION and self.metadata.get("thing_colors"):
            return [tuple(self.metadata.thing_colors[k]) for k in classes]
        return [class_color(k) for k in classes]

    def overlay_instances(
        self,
        *,
        boxes: Any = None,
        labels: Sequence[str] | None = None,
        masks: Any = None,
        keypoints: Any = None,
        assigned_colors: Any = None,
        alpha: float = FILL,
    ) -> VisImage:
        """Like the base class, which still draws rotated boxes and keypoints."""
        boxes = self._convert_boxes(boxes) if boxes is not None else None
        if (boxes is not None and boxes.shape[-1] == 5) or (boxes is None and masks is None):
            return super().overlay_instances(
                boxes=boxes,
                labels=labels,
                keypoints=keypoints,
                assigned_colors=assigned_colors,
                alpha=alpha,
            )
        if masks is None:
            crops = [(0, 0, np.zeros((0, 0), bool))] * len(boxes)
        else:
            masks = self._convert_masks(masks)
            crops = [CroppedMasks.of(mask.mask[None]).crop(0) for mask in masks]
        if boxes is None:
            extents = [(x, y, x + m.shape[1], y + m.shape[0]) for y, x, m in crops]
            boxes = np.array(extents, dtype=float).reshape(-1, 4)
        if not crops:
            return self.output
        if self._look is not None:
            look = self._look
        elif assigned_colors is not None:
            rgb = np.array([mplc.to_rgb(color) for color in assigned_colors])
            look = _Look([tuple(color) for color in np.rint(255 * rgb).astype(int).tolist()])
        else:
            look = _Look([tuple(color) for color in class_colors(len(crops)).tolist()])
        # On a picture of what has been drawn so far, which the new one replaces
        axes = self.output.ax
        drawn = [*axes.lines, *axes.patches, *axes.collections, *axes.texts]
        width, height = self.output.canvas.get_width_height()
        so_far = self.output.get_image() if drawn else np.asarray(axes.images[-1].get_array())
        canvas = enlarged(so_far, height, width)
        draw_objects(
            canvas,
            CroppedMasks(crops, (self.output.height, self.output.width)),
            boxes,
            look.colors,
            labels=(labels or ()) if look.labels is None else look.labels,
            importance=look.importance,
            fill=alpha if look.fill is None else look.fill,
        )
        for artist in (*drawn, *axes.images[:-1]):
            artist.remove()
        axes.images[-1].set_data(canvas)
        if keypoints is not None:
            super().overlay_instances(keypoints=keypoints, assigned_colors=assigned_colors)
        return self.output
