"""What a file says about its model; the format is described in :mod:`msrcnn_d2.export`."""

import dataclasses
import json
import sys
from typing import Any

import torch
from PIL import Image

import detectron2.data.transforms as T

from msrcnn_d2_runtime.exported import FORMAT_VERSION
from msrcnn_d2_runtime.ranking import SCORE_FIELDS

from ..prediction.predictor import MaskScoringPredictor
from ..utils.errors import UserError
from .resizing import ResizeRule

__all__ = ["box_predictor_of", "metadata_of", "resize_rule_of"]

MASKS = ("unpasted", "pasted")


def metadata_of(predict: MaskScoringPredictor, masks: str, precision: str) -> dict[str, str]:
    """
    Args:
        masks: "unpasted" or "pasted".
        precision: "float32" or "int8".

    Raises:
        ValueError: `masks` is something else.
    """
    if masks not in MASKS:
        raise ValueError(f"masks is one of {', '.join(MASKS)}, not '{masks}'.")
    model: Any = predict.model
    rule = resize_rule_of(predict)
    in_rgb = slice(None) if predict.input_format == "RGB" else slice(None, None, -1)
    predictor = box_predictor_of(model)
    values = {
        "class_names": list(predict.class_names),
        "resize": None if rule is None else rule._asdict(),
        "pixel_mean": model.pixel_mean.flatten().tolist()[in_rgb],
        "pixel_std": model.pixel_std.flatten().tolist()[in_rgb],
        "image_settings": dataclasses.asdict(predict.image_settings),
        "score_threshold": predictor.test_score_thresh,
        "nms_threshold": predictor.test_nms_thresh,
        "max_detections": predictor.test_topk_per_image,
    }
    calibrator = getattr(model.roi_heads, "mask_calibrator", None)
    if calibrator is not None:
        values["accept_thresholds"] = calibrator.accept_thresholds.tolist()
    return {
        "format": "msrcnn_d2",
        "format_version": str(FORMAT_VERSION),
        # Not an import, which would be a circle
        "msrcnn_d2_version": sys.modules["msrcnn_d2"].__version__,
        "channel_order": "RGB",
        "ranking": SCORE_FIELDS[predict.rank_by],
        "masks": masks,
        "precision": precision,
        **{name: json.dumps(value) for name, value in values.items()},
    }


def box_predictor_of(model: Any) -> Any:
    """The box predictor whose detections inference returns: that of a Cascade's last stage."""
    predictor = model.roi_heads.box_predictor
    return predictor[-1] if isinstance(predictor, torch.nn.ModuleList) else predictor


def resize_rule_of(predict: MaskScoringPredictor) -> ResizeRule | None:
    """
    Raises:
        UserError: the config changes images by something else than one `ResizeShortestEdge`.
    """
    augmentations = list(predict.augmentations.augs)
    if not augmentations:
        return None
    first = augmentations[0]
    if len(augmentations) == 1 and isinstance(first, T.ResizeShortestEdge):
        lengths = {*first.short_edge_length}
        if lengths == {0}:
            return None
        if len(lengths) == 1 and first.interp == Image.Resampling.BILINEAR:
            return ResizeRule(int(lengths.pop()), int(first.max_size))
    raise UserError(
        "An exported model can resize images by one ResizeShortestEdge of one length, with "
        f"bilinear interpolation, but the config has {augmentations}: change "
        "dataloader.test.mapper.augmentations (yaml: INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST)."
    )
