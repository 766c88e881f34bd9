"""Predictions for other libraries. Each is imported when it is needed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UserError
from .predictions import SCORE_NAMES, CroppedMasks, Masks, Predictions
from .predictor import Predictor
from .ranking import SCORE_FIELDS

if TYPE_CHECKING:
    import sahi.models.base
    import supervision

__all__ = ["to_sahi", "to_supervision"]


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


def to_sahi(
    predictor: Predictor, confidence_threshold: float = 0.3
) -> "sahi.models.base.DetectionModel":
    """
    A predictor as detection model of `sahi <https://github.com/obss/sahi>`_, which predicts on
    slices of an image and merges what it finds there.

    Args:
        predictor: any of ours. Scores in sahi are those that it ranks by.
        confidence_threshold: as in sahi, predictions with a lower score are left out. Below 0.1,
            sahi suppresses predictions that overlap instead of merging them.

    Raises:
        ModuleNotFoundError: sahi is not installed.

    Example:
        >>> model = to_sahi(predictor, confidence_threshold=0.5)
        >>> result = get_sliced_prediction("image.jpg", model, slice_height=512, slice_width=512)
    """
    try:
        from sahi.models.base import DetectionModel
        from sahi.prediction import ObjectPrediction
        from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list
        from sahi.utils.cv import get_coco_segmentation_from_bool_mask
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "sahi":
            raise
        raise ModuleNotFoundError(
            "to_sahi needs sahi: run `pip install sahi`.", name=error.name
        ) from error

    class PredictorModel(DetectionModel):
        def set_model(self, model: Predictor, **_: Any) -> None:
            self.model = model

        def perform_inference(self, image: np.ndarray) -> None:
            self.perform_batch_inference([image])

        def perform_batch_inference(self, images: Sequence[np.ndarray]) -> None:
            # sahi's images are RGB
            self._original_predictions = self.model.predictions([x[:, :, ::-1] for x in images])

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list: list | None = None, full_shape_list: list | None = None
        ) -> None:
            places = zip(
                self._original_predictions,
                fix_shift_amount_list(shift_amount_list),
                fix_full_shape_list(full_shape_list),
            )
            self._object_prediction_list_per_image = [self._objects(*x) for x in places]

        def _objects(self, found: Predictions, shift: list[int], full_shape: list[int]) -> list:
            objects = []
            for k in np.flatnonzero(found.rank_scores >= self.confidence_threshold).tolist():
                # Outlines in the mask's own part of the image: pasted, all masks of a large image
                # would take gigabytes
                top, left, inside = found.masks.crop(k)
                outlines = get_coco_segmentation_from_bool_mask(np.pad(inside, 1))
                if not outlines:  # the mask is empty, or a line
                    continue
                class_, corner = int(found.pred_classes[k]), (left - 1, top - 1)
                objects.append(
                    ObjectPrediction(
                        category_id=class_,
                        category_name=self.model.class_names[class_],
                        segmentation=[
                            (np.reshape(x, (-1, 2)) + corner).ravel().tolist() for x in outlines
                        ],
                        score=float(found.rank_scores[k]),
                        shift_amount=shift,
                        full_shape=full_shape,
                    )
                )
            return objects

    return PredictorModel(model=predictor, confidence_threshold=confidence_threshold)


def _to_numpy(values: Any) -> np.ndarray:
    """Of a tensor on any device, or an array."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
