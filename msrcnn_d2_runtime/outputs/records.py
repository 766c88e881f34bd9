"""The predictions of an image as a line of JSON, from which the other outputs are made."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..predictions import PredictedImage
from ..ranking import SCORE_FIELDS
from ..scores import MASK_IOU_PROBS, SCORES

__all__ = ["SCORE_KEYS", "line_of", "record_of"]

# The names of the scores in JSON and CSV files, in their order
SCORE_KEYS = tuple(score.key for score in SCORES.values())
RANKINGS = {field: key for key, field in SCORE_FIELDS.items()}


def record_of(
    image: PredictedImage, class_names: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Any]:
    """
    Args:
        class_names, category_ids: index of a class -> its name, and its id in COCO's files.

    Returns:
        "image", "source", "height", "width", "ranked_by", and "predictions", the best first. These
        have "category_id", "class", "bbox" (XYWH in pixels), the scores that the model predicts, by
        the keys of `SCORES`, "area" (pixels of the mask) and "segmentation" (compressed RLE).
    """
    import pycocotools.mask as mask_util

    predictions = image.predictions
    columns: dict[str, Sequence] = {
        score.key: _shortened(predictions.get(score.field))
        for score in SCORES.values()
        if predictions.has(score.field)
    }
    if predictions.has(MASK_IOU_PROBS):
        probs = predictions.get(MASK_IOU_PROBS).tolist()
        columns[MASK_IOU_PROBS] = [[round(p, 6) for p in row] for row in probs]
    columns["segmentation"] = rles = predictions.masks.rles()
    areas = mask_util.area(rles).tolist() if rles else []

    corners = predictions.pred_boxes.astype(np.float64)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    entries = []
    for k, (c, box) in enumerate(zip(predictions.pred_classes.tolist(), boxes.tolist())):
        entry = {"category_id": category_ids[c], "class": class_names[c]}
        entry["bbox"] = [round(x, 3) for x in box]
        entries.append(entry | {key: values[k] for key, values in columns.items()})
        entries[-1]["area"] = areas[k]
    height, width = map(int, predictions.image_size)
    return {
        "image": image.name,
        "source": image.source,
        "height": height,
        "width": width,
        "ranked_by": RANKINGS[predictions.ranking],
        "predictions": entries,
    }


def _shortened(values: np.ndarray) -> list[float]:
    """The same float32 numbers with as few digits as tell them apart."""
    return [float(str(x)) for x in values]


def line_of(record: dict[str, Any]) -> bytes:
    """One line of JSON in UTF-8. Names of files that are not UTF-8 have escapes."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"
