"""Confident masks that disagree with the annotations, which are probably wrong there."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from ..evaluation.mask_quality import MaskQuality

__all__ = ["Disagreement", "worst_annotations", "write_csv"]

RIGHT_IOU = 0.5
# Below this IoU a detection is in the background (Bolya et al., TIDE, ECCV 2020)
BACKGROUND_IOU = 0.1
MAX_DISAGREEMENTS = 1000
COLUMNS = "image annotation_id class predicted_class score iou kind x y width height".split()


@dataclass
class Disagreement:
    """
    A confident mask that disagrees with the annotations.

    Attributes:
        index: index of the detection among the results.
        kind: "class" where an object of another class is annotated with an IoU of at least 0.5,
            "shape" where an object of its class is annotated with an IoU from 0.1 to 0.5,
            "missing" where there is neither.
        annotation: that object, None if it is missing.
        iou: the IoU with it, 0 if it is missing.
    """

    index: int
    kind: str
    annotation: dict | None
    iou: float


def worst_annotations(quality: MaskQuality, count: int = MAX_DISAGREEMENTS) -> list[Disagreement]:
    """
    Find detections that have a true IoU below 0.5 in spite of a high score, the highest first. The
    score is the last one in :attr:`MaskQuality.rankings`.

    A detection is left out if its mask is empty, or if another one explains it: if the object that
    it overlaps has been found by a detection of the object's class with an IoU of at least 0.5 and
    a higher score; or if it repeats a disagreement, with an IoU of at least 0.5. Crowds are no
    objects here.

    Args:
        count: largest number of disagreements.
    """
    return list(islice(_disagreements(quality), count))


def _disagreements(quality: MaskQuality) -> Iterator[Disagreement]:
    overlaps, scores = quality.average_precision.overlaps, quality.scores[quality.rankings[-1]]
    found_with = _scores_of_objects(quality, scores)
    objects: dict[Any, list[dict]] = {}  # of each image
    for place in overlaps.places.values():
        for annotation, is_crowd in zip(place.objects, place.is_crowd.tolist()):
            if not is_crowd:
                objects.setdefault(annotation["image_id"], []).append(annotation)
    rles: dict[Any, list[dict]] = {}  # of these, in the images that are looked at
    listed: dict[Any, list[dict]] = {}  # masks of the disagreements in each image
    is_wrong = quality.counted & (quality.true_ious < RIGHT_IOU) & (overlaps.areas > 0)
    wrong = np.flatnonzero(is_wrong)
    for index in wrong[np.argsort(-scores[wrong], kind="stable")].tolist():
        result = quality.results[index]
        mask, image = result["segmentation"], result["image_id"]
        in_image = objects.get(image, [])
        if image not in rles:
            rles[image] = [quality.coco_gt.annToRLE(annotation) for annotation in in_image]
        is_other = np.array([a["category_id"] != result["category_id"] for a in in_image], bool)
        ious = _ious(mask, rles[image]) * is_other
        found = Disagreement(index, "missing", None, 0.0)
        if ious.max(initial=0) >= RIGHT_IOU:
            k = int(ious.argmax())
            found = Disagreement(index, "class", in_image[k], float(ious[k]))
        elif (iou := float(quality.true_ious[index])) >= BACKGROUND_IOU:
            found = Disagreement(index, "shape", overlaps.nearest_object(index), iou)
        if found_with.get(id(found.annotation), -np.inf) > scores[index]:
            continue
        repeated = listed.setdefault(image, [])
        if _ious(mask, repeated).max(initial=0) < RIGHT_IOU:
            repeated.append(mask)
            yield found


def _scores_of_objects(quality: MaskQuality, scores: np.ndarray) -> dict[int, float]:
    """
    {id() of an annotation: highest score of a detection of its class with an IoU of at least 0.5}.
    An annotation's own "id" need not be unique.
    """
    found_with: dict[int, float] = {}
    for place in quality.average_precision.overlaps.places.values():
        is_right = (place.ious >= RIGHT_IOU) & quality.counted[place.detections][:, None]
        highest = np.where(is_right, scores[place.detections][:, None], -np.inf)
        for annotation, score in zip(place.objects, highest.max(axis=0, initial=-np.inf).tolist()):
            found_with[id(annotation)] = score
    return found_with


def _ious(mask: dict, others: list[dict]) -> np.ndarray:
    """The IoUs of a mask with others, all as RLE."""
    if not others:
        return np.zeros(0)
    return mask_util.iou([mask], others, [False] * len(others))[0]


def write_csv(quality: MaskQuality, disagreements: list[Disagreement], path: Path) -> None:
    """
    Write a row for each disagreement: the image's file; the annotation's id and class, empty if it
    is missing; the predicted class, the score that it is ranked by, the IoU and the kind; and the
    box of the predicted mask in pixels.
    """
    names = dict(zip(quality.average_precision.category_ids, quality.classes))
    scores = quality.scores[quality.rankings[-1]]
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(COLUMNS)
        for found in disagreements:
            result, annotation = quality.results[found.index], found.annotation or {}
            image = quality.coco_gt.imgs[result["image_id"]]
            writer.writerow(
                [
                    image.get("file_name", image["id"]),
                    annotation.get("id", ""),
                    names.get(annotation.get("category_id"), ""),
                    names[result["category_id"]],
                    f"{scores[found.index]:.4f}",
                    f"{found.iou:.4f}",
                    found.kind,
                    *(f"{x:g}" for x in mask_util.toBbox(result["segmentation"])),
                ]
            )
