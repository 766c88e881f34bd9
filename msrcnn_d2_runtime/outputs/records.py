"""The predictions of an image as a line of JSON, from which the other outputs are made."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..mask_encoding import decode_crop
from ..predictions import KEYPOINTS, TRACK_IDS, CroppedMasks, PredictedImage, Predictions
from ..ranking import SCORE_FIELDS
from ..scores import MASK_IOU_PROBS, SCORES

__all__ = ["SCORE_KEYS", "TRACK_ID", "line_of", "predictions_of", "record_of"]

TRACK_ID = "track_id"
CENTRE = np.array([0.5, 0.5, 0], dtype=np.float32)

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
        the keys of `SCORES`, "track_id" in tracked videos, "keypoints" (x, y, score of each, as in
        Detectron2's results) of models that predict them, "area" (pixels of the mask) and
        "segmentation" (compressed RLE).
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
    if predictions.has(TRACK_IDS):
        columns[TRACK_ID] = predictions.get(TRACK_IDS).tolist()
    if predictions.has(KEYPOINTS):
        # COCO has indices of pixels, whose centres lie half a pixel further
        points = predictions.get(KEYPOINTS).astype(np.float64) - CENTRE
        columns["keypoints"] = [[round(x, 3) for x in row.ravel().tolist()] for row in points]
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


def predictions_of(record: dict[str, Any], category_ids: Sequence[int]) -> Predictions:
    """
    Args:
        record: from :func:`record_of`.
        category_ids: as it was given there.

    Returns:
        the predictions; their boxes and probabilities are rounded.
    """
    entries = record["predictions"]
    keys = {score.field: score.key for score in SCORES.values()}
    keys |= {MASK_IOU_PROBS: MASK_IOU_PROBS, TRACK_IDS: TRACK_ID}
    ranking = SCORE_FIELDS[record["ranked_by"]]
    fields = {
        name: np.array([x[key] for x in entries], np.int64 if name == TRACK_IDS else np.float32)
        for name, key in keys.items()
        if (key in entries[0] if entries else name in ("scores", ranking))
    }
    if entries and "keypoints" in entries[0]:
        points = np.array([x["keypoints"] for x in entries], np.float32)
        fields[KEYPOINTS] = points.reshape(len(entries), -1, 3) + CENTRE
    boxes = np.array([x["bbox"] for x in entries], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    crops = [decode_crop(x["segmentation"]) for x in entries]
    index = {category: k for k, category in enumerate(category_ids)}
    return Predictions(
        pred_boxes=boxes,
        pred_classes=np.array([index[x["category_id"]] for x in entries], np.int64),
        masks=CroppedMasks(crops, (record["height"], record["width"])),
        scores=fields,
        ranking=ranking,
    )


def _shortened(values: np.ndarray) -> list[float]:
    """The same float32 numbers with as few digits as tell them apart."""
    return [float(str(x)) for x in values]


def line_of(record: dict[str, Any]) -> bytes:
    """One line of JSON in UTF-8. Names of files that are not UTF-8 have escapes."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"
