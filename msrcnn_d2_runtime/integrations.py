"""Predictions for other libraries. Each is imported when it is needed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UserError
from .predictions import SCORE_NAMES, CroppedMasks, Masks, Predictions
from .ranking import SCORE_FIELDS

if TYPE_CHECKING:
    import supervision

__all__ = ["to_supervision"]


def to_supervision(
    predictions: Any,
    class_names: Sequence[str] | None = None,
    *,
    confidence: str = "score",
    compact_masks: bool = False,
) -> "supervision.Detections":
    """
    Predictions of an image as Detections of `supervision <https://supervision.roboflow.com>`_,
    which draws, tracks, counts and filters them.

    Args:
        predictions: :class:`Predictions`, or Detectron2's `Instances` as a predictor returns them,
            on any device. Masks may be missing.
        class_names: index of a class -> its name, such as `predictor.class_names`.
        confidence: the score that becomes the confidence: "score" for the class score,
            "mask_score", or "quality_score" for the calibrated score.
        compact_masks: keep only the part of each mask that is not empty, as supervision's
            `CompactMask` (from its version 0.30 on). Bitmaps take N x height x width bytes.

    Returns:
        Detections in the order of the predictions. Their `data` have all scores that the model
        predicts, under the names of the predictions' fields, such as "mask_scores" (N,) or
        "mask_iou_probs" (N, 10); and "class_name" (N,), if there are names.

    Raises:
        UserError: the predictions lack the score that is asked for, or a class has no name.
        ValueError: `confidence` names no score.
        ModuleNotFoundError: supervision is not installed.

    Example:
        >>> (predictions,) = predictor.predictions([image])
        >>> detections = to_supervision(
        ...     predictions, predictor.class_names, confidence="mask_score"
        ... )
        >>> detections = detections[detections.data["pred_mask_ious"] > 0.7]
        >>> picture = supervision.MaskAnnotator().annotate(image.copy(), detections)
    """
    try:
        import supervision
    except ModuleNotFoundError as error:
        if error.name != "supervision":
            raise
        raise ModuleNotFoundError(
            "to_supervision needs supervision: run `pip install supervision`.", name=error.name
        ) from error

    # The scores
    if confidence not in SCORE_FIELDS:
        raise ValueError(f"confidence is one of {', '.join(SCORE_FIELDS)}, not '{confidence}'.")
    field = SCORE_FIELDS[confidence]
    if not predictions.has(field):
        raise UserError(
            f"These predictions have no {field}: the model does not predict them. Take another "
            'score as confidence, such as "score".'
        )
    data = {x: _to_numpy(predictions.get(x)) for x in SCORE_NAMES if predictions.has(x)}

    # The classes
    classes = _to_numpy(predictions.pred_classes).astype(int)
    if class_names is not None:
        if len(classes) and classes.max() >= len(class_names):
            raise UserError(
                f"There is a prediction of class {classes.max()}, counted from 0, but there are "
                f"{len(class_names)} class names: give those of the model."
            )
        # With a type also where there are none
        data["class_name"] = np.array([str(class_names[k]) for k in classes], dtype=np.str_)

    return supervision.Detections(
        xyxy=_to_numpy(getattr(predictions.pred_boxes, "tensor", predictions.pred_boxes)),
        mask=_masks_of(predictions, compact_masks),
        confidence=data[field],
        class_id=classes,
        data=data,
    )


def _masks_of(predictions: Any, compact: bool) -> Any:
    """What supervision takes as masks."""
    if not predictions.has("pred_masks"):
        return None
    if not compact:
        return _to_numpy(predictions.pred_masks).astype(bool, copy=False)
    from supervision.detection.compact_mask import CompactMask

    masks: Masks
    if isinstance(predictions, Predictions):
        masks = predictions.masks
    else:
        masks = CroppedMasks.of(_to_numpy(predictions.pred_masks))
    # The first and the last column and row of each; supervision keeps what is inside
    corners = np.zeros((len(masks), 4))
    for k in range(len(masks)):
        top, left, inside = masks.crop(k)
        height, width = inside.shape
        corners[k] = left, top, left + width - 1, top + height - 1
    return CompactMask.from_coco_rle(masks.rles(), corners, masks.image_size)


def _to_numpy(values: Any) -> np.ndarray:
    """Of a tensor on any device, or an array."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
