"""Which object each predicted mask belongs to, by COCO's rule, and their true IoU."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

__all__ = ["IOU_THRESHOLDS", "Matches", "MaskOverlaps", "true_mask_ious"]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # as in COCO, from one to the next 0.05


class _Place(NamedTuple):
    """
    The detections and the objects of one class in one image.

    Attributes:
        indices: of the D detections among all results.
        objects: the G annotations, those of crowds last.
        ious: D x G; with a crowd, the share of the detection that lies in it.
    """

    indices: np.ndarray
    objects: list[dict]
    ious: np.ndarray


@dataclass
class Matches:
    """
    What N detections were matched with at T IoU thresholds; see :meth:`MaskOverlaps.match`.

    Attributes:
        ious: T x N, the IoU with the matched object, NaN for unmatched detections.
        areas: T x N, the area of the matched object in pixels, NaN for unmatched detections.
        ignored: T x N, whether the detection was matched with a crowd, which COCO does not count.
        beyond: N, whether the detection is not among the best of its class and image that count.
    """

    ious: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray
    beyond: np.ndarray


class MaskOverlaps:
    """The IoUs of predicted masks with the objects of their class in their image."""

    def __init__(self, coco_gt: COCO, results: Sequence[dict]):
        """
        Args:
            coco_gt: the ground truth.
            results: N detections in COCO's result format, with "segmentation" as RLE.
        """
        self._num_results = len(results)
        self._places = list(_places(coco_gt, results))

    @cached_property
    def largest(self) -> np.ndarray:
        """
        The largest IoU of each mask with an object of its class in its image, N values in [0, 1].
        It is 0 if there is no such object. Crowds do not count, because they have no IoU.
        """
        largest = np.zeros(self._num_results)
        for place in self._places:
            num_objects = sum(not _is_crowd(a) for a in place.objects)  # crowds come last
            if num_objects:
                largest[place.indices] = place.ious[:, :num_objects].max(axis=1)
        return largest

    def match(
        self,
        scores: Sequence[float] | np.ndarray,
        thresholds: Sequence[float] | np.ndarray = IOU_THRESHOLDS,
        max_dets: int = 100,
    ) -> Matches:
        """
        Match detections with objects as `COCOeval.evaluateImg` does, over objects of all sizes.

        Within each image and class the detections choose in the order of their scores, the best
        first; equal ones keep their order. Each takes the object with which its IoU is largest
        among those that no other has taken, if it is at least the threshold; the later one of
        two with the same IoU. Only where there is none it may be given to a crowd, which can be
        taken any number of times.

        Args:
            scores: N numbers that decide who chooses first.
            thresholds: T smallest IoUs of a match.
            max_dets: how many detections of each image and class choose.
        """
        shape = len(thresholds), self._num_results
        matches = Matches(
            np.full(shape, np.nan),
            np.full(shape, np.nan),
            np.zeros(shape, dtype=bool),
            np.zeros(shape[1], dtype=bool),
        )
        # As in COCO, an IoU of 1 passes at any threshold
        limits = np.minimum(np.asarray(thresholds, dtype=float), 1 - 1e-10)
        keys = -np.asarray(scores, dtype=float)
        for place in self._places:
            order = np.argsort(keys[place.indices], kind="stable")
            matches.beyond[place.indices[order[max_dets:]]] = True
            if place.objects:
                _match_place(place, order[:max_dets], limits, matches)
        return matches


def true_mask_ious(coco_gt: COCO, results: Sequence[dict]) -> list[float]:
    """
    The score that the MaskIoU head tries to predict, from ground truth.

    Args:
        coco_gt: the ground truth.
        results: detections in COCO's result format, with "segmentation" as RLE.

    Returns:
        for each result :attr:`MaskOverlaps.largest`.
    """
    return MaskOverlaps(coco_gt, results).largest.tolist()


def _places(coco_gt: COCO, results: Sequence[dict]) -> Iterator[_Place]:
    indices = defaultdict(list)
    for index, result in enumerate(results):
        indices[result["image_id"], result["category_id"]].append(index)
    objects = defaultdict(list)
    for annotation in coco_gt.dataset["annotations"]:
        objects[annotation["image_id"], annotation["category_id"]].append(annotation)
    for place, members in indices.items():
        yield _place(coco_gt, results, members, objects.get(place, []))


def _place(coco_gt: COCO, results, indices: list[int], objects: list[dict]) -> _Place:
    objects = sorted(objects, key=_is_crowd)
    ious = np.zeros((len(indices), 0))
    if objects:
        ious = mask_util.iou(
            [results[i]["segmentation"] for i in indices],
            [coco_gt.annToRLE(a) for a in objects],
            [_is_crowd(a) for a in objects],
        )
    return _Place(np.array(indices), objects, ious)


def _is_crowd(annotation: dict) -> int:
    return annotation.get("iscrowd", 0)


def _match_place(place: _Place, order: np.ndarray, limits: np.ndarray, matches: Matches) -> None:
    """Enter into `matches` the detections of a place, which choose in this order."""
    crowd = [bool(_is_crowd(a)) for a in place.objects]
    taken = [[False] * len(crowd) for _ in limits]
    for detection in order[place.ious[order].max(axis=1) >= limits.min()]:
        candidates = np.flatnonzero(place.ious[detection] >= limits.min()).tolist()
        ious = place.ious[detection].tolist()
        for t, limit in enumerate(limits.tolist()):
            chosen = _choose(candidates, ious, limit, taken[t], crowd)
            if chosen is None:
                continue
            where = t, place.indices[detection]
            if crowd[chosen]:
                matches.ignored[where] = True
            else:
                taken[t][chosen] = True
                matches.ious[where] = ious[chosen]
                matches.areas[where] = place.objects[chosen]["area"]


def _choose(
    candidates: list[int], ious: list[float], limit: float, taken: list[bool], crowd: list[bool]
) -> int | None:
    """Which of the objects a detection takes; crowds are the last candidates."""
    chosen = None
    for k in candidates:
        if taken[k]:
            continue
        if chosen is not None and crowd[k] and not crowd[chosen]:
            break
        if ious[k] >= limit:
            chosen, limit = k, ious[k]
    return chosen
