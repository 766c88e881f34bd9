"""IoUs of detections with objects, and COCO's rule for which object a detection is matched with."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

__all__ = ["IOU_THRESHOLDS", "Matches", "Overlaps", "Place", "true_mask_ious"]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # as in COCO, 0.05 apart


@dataclass
class Place:
    """
    The detections and the objects of one class in one image.

    Attributes:
        detections: the indices of D detections among all results, ascending.
        objects: G annotations in the order of their file.
        ious: D x G; with a crowd, the share of the detection that lies inside the crowd.
    """

    detections: list[int] = field(default_factory=list)
    objects: list[dict] = field(default_factory=list)
    ious: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    @cached_property
    def is_crowd(self) -> np.ndarray:
        """G, whether an object is a crowd."""
        return np.array([bool(a.get("iscrowd", 0)) for a in self.objects], dtype=bool)


@dataclass
class Matches:
    """
    What N detections were matched with at T IoU thresholds; see :meth:`Overlaps.match`.

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


class Overlaps:
    """
    The IoUs of detections with the objects of their class in their image.

    They are computed once, here. Average precision under every ranking, true IoUs and matches all
    use them.

    Attributes:
        coco_gt, results, task: what was passed in.
        places: {(image id, category id): place}, where there is a detection or an object.
    """

    def __init__(self, coco_gt: COCO, results: Sequence[dict], task: str = "segm"):
        """
        Args:
            coco_gt: the ground truth.
            results: N detections in COCO's result format, with "segmentation" as RLE or "bbox".
            task: "segm" for the IoUs of masks, "bbox" for those of boxes.
        """
        self.coco_gt, self.results, self.task = coco_gt, results, task
        places: dict[tuple, Place] = defaultdict(Place)
        for index, result in enumerate(results):
            places[result["image_id"], result["category_id"]].detections.append(index)
        for annotation in coco_gt.dataset["annotations"]:
            places[annotation["image_id"], annotation["category_id"]].objects.append(annotation)
        self.places = dict(places)
        for place in places.values():
            place.ious = np.zeros((len(place.detections), len(place.objects)))
            if place.ious.size:
                found = [results[k] for k in place.detections]
                if task == "bbox":
                    shapes = [r["bbox"] for r in found], [a["bbox"] for a in place.objects]
                else:
                    rles = [coco_gt.annToRLE(a) for a in place.objects]
                    shapes = [r["segmentation"] for r in found], rles
                place.ious = mask_util.iou(*shapes, place.is_crowd.tolist())

    @cached_property
    def areas(self) -> np.ndarray:
        """N, the areas of the detections' masks, or of their boxes, in pixels."""
        if self.task == "bbox":
            return np.array([r["bbox"][2] * r["bbox"][3] for r in self.results], dtype=float)
        rles = [r["segmentation"] for r in self.results]
        # In groups: pycocotools 2.0.11 fails at more than 255 at once if NumPy is 2
        groups = [mask_util.area(rles[k : k + 100]) for k in range(0, len(rles), 100)]
        return np.concatenate([np.zeros(0), *groups])

    @cached_property
    def largest(self) -> np.ndarray:
        """
        The largest IoU of each detection with an object of its class in its image, N values in
        [0, 1]. It is 0 if there is no such object. Crowds do not count, since they have no IoU.
        """
        largest = np.zeros(len(self.results))
        for place in self.places.values():
            ious = place.ious[:, ~place.is_crowd]
            if ious.size:
                largest[place.detections] = ious.max(axis=1)
        return largest

    def nearest_object(self, index: int) -> dict | None:
        """The annotation with which a detection has its largest IoU; None if that is 0."""
        result = self.results[index]
        place = self.places[result["image_id"], result["category_id"]]
        if not self.largest[index] > 0:
            return None
        ious = np.where(place.is_crowd, -1, place.ious[place.detections.index(index)])
        return place.objects[int(ious.argmax())]

    def match(
        self,
        scores: Sequence[float] | np.ndarray,
        thresholds: Sequence[float] | np.ndarray = IOU_THRESHOLDS,
        max_dets: int = 100,
    ) -> Matches:
        """
        Match detections with objects as `COCOeval.evaluateImg` does, over objects of all sizes.

        Within each image and class the detections choose in the order of their scores, the best
        first; equal scores keep the order of the results. Each detection takes the free object
        with the largest IoU, if that is at least the threshold; of two objects with the same IoU
        it takes the later one. Without such an object it is matched with a crowd that it overlaps
        enough. A crowd can be matched any number of times.

        Args:
            scores: N numbers that decide which detection chooses first.
            thresholds: T smallest IoUs of a match.
            max_dets: how many detections of each image and class choose.
        """
        scores = np.asarray(scores, dtype=float)
        shape = len(thresholds), len(self.results)
        matches = Matches(
            np.full(shape, np.nan),
            np.full(shape, np.nan),
            np.zeros(shape, dtype=bool),
            np.zeros(shape[1], dtype=bool),
        )
        # As in COCO, an IoU of 1 passes at any threshold
        limits = np.minimum(np.asarray(thresholds, dtype=float), 1 - 1e-10)
        for place in self.places.values():
            indices = np.array(place.detections, dtype=int)
            ranked = np.argsort(-scores[indices], kind="stable")
            matches.beyond[indices[ranked[max_dets:]]] = True
            if place.ious.size:
                _match_place(place, ranked[:max_dets], limits, matches)
        return matches


def true_mask_ious(coco_gt: COCO, results: Sequence[dict]) -> list[float]:
    """
    What the MaskIoU head tries to predict, computed from the ground truth.

    Args:
        coco_gt: the ground truth.
        results: detections in COCO's result format, with "segmentation" as RLE.

    Returns:
        for each result :attr:`Overlaps.largest`.
    """
    return Overlaps(coco_gt, results).largest.tolist()


def _match_place(place: Place, ranked: np.ndarray, limits: np.ndarray, matches: Matches) -> None:
    """Write to `matches` what the detections of a place choose, in the order of `ranked`."""
    # Crowds come last, so that they are considered only where no object is free
    columns = np.argsort(place.is_crowd, kind="stable")
    all_ious, is_crowd = place.ious[:, columns], place.is_crowd[columns].tolist()
    areas = [place.objects[k]["area"] for k in columns]
    taken = [[False] * len(columns) for _ in limits]
    for row in ranked[all_ious[ranked].max(axis=1) >= limits.min()]:
        candidates = np.flatnonzero(all_ious[row] >= limits.min()).tolist()
        ious = all_ious[row].tolist()
        for t, limit in enumerate(limits.tolist()):
            chosen = _choose(candidates, ious, limit, taken[t], is_crowd)
            if chosen is None:
                continue
            where = t, place.detections[row]
            if is_crowd[chosen]:
                matches.ignored[where] = True
            else:
                taken[t][chosen] = True
                matches.ious[where], matches.areas[where] = ious[chosen], areas[chosen]


def _choose(
    candidates: list[int], ious: list[float], limit: float, taken: list[bool], is_crowd: list[bool]
) -> int | None:
    """The object that a detection takes, None if there is none. Crowds are the last candidates."""
    chosen = None
    for k in candidates:
        if taken[k]:
            continue
        if chosen is not None and is_crowd[k] and not is_crowd[chosen]:
            break
        if ious[k] >= limit:
            chosen, limit = k, ious[k]
    return chosen
