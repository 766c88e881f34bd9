"""IoUs of detections with objects, and COCO's rule for which object a detection is matched with."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from msrcnn_d2_runtime.iou_thresholds import IOU_THRESHOLDS

from .boundaries import boundaries_of

__all__ = ["Matches", "Overlaps", "Place", "right_detections", "true_mask_ious"]


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
            task: "segm" for the IoUs of masks, "bbox" for those of boxes. "boundary" for what
                Boundary AP uses: the IoU of masks or that of their boundaries, whichever is smaller
                (Cheng et al., CVPR 2021). Crowds have the same IoUs as for "segm".
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
                if task == "boundary":
                    # Boundaries lie inside the masks, so that others have nothing in common either
                    touches = (place.ious > 0) & ~place.is_crowd
                    rows, columns = (touches.any(axis=k).nonzero()[0] for k in (1, 0))
                    if len(rows):
                        part = np.ix_(rows, columns)
                        outlines = (
                            boundaries_of([masks[k] for k in chosen])
                            for masks, chosen in zip(shapes, (rows, columns))
                        )
                        ious = mask_util.iou(*outlines, [False] * len(columns))
                        place.ious[part] = np.minimum(place.ious[part], ious)

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
        enough. A crowd can be matched any number of times. At a threshold of 0 a detection has to
        share a pixel with its match.

        Args:
            scores: N numbers that decide which detection chooses first.
            thresholds: T smallest IoUs of a match.
            max_dets: how many detections of each image and class choose.
        """
        num_results = len(self.results)
        shape = len(thresholds), num_results
        matches = Matches(
            np.full(shape, np.nan),
            np.full(shape, np.nan),
            np.zeros(shape, dtype=bool),
            np.zeros(num_results, dtype=bool),
        )
        turns = np.empty(num_results, dtype=int)
        order = np.argsort(-np.asarray(scores, dtype=float), kind="stable")
        turns[order] = np.arange(num_results)
        for place in self.places.values():
            if len(place.detections) > max_dets:
                ranked = np.argsort(turns[place.detections])
                matches.beyond[np.array(place.detections)[ranked[max_dets:]]] = True

        # Objects belong to one place each, so that the detections of all places can take turns
        pairs = self._pairs[~matches.beyond[self._pairs["detection"]]]
        pairs = pairs[np.argsort(turns[pairs["detection"]], kind="stable")]
        for t, threshold in enumerate(thresholds):
            # As in COCO, an IoU of 1 passes at any threshold
            good = pairs[pairs["iou"] >= min(threshold, 1 - 1e-10)]
            has_match = bytearray(num_results)
            is_taken = bytearray(sum(len(place.objects) for place in self.places.values()))
            chosen = []
            names = ("detection", "object", "is_crowd")
            for k, (d, o, is_crowd) in enumerate(zip(*(good[name].tolist() for name in names))):
                if not has_match[d] and not is_taken[o]:
                    has_match[d] = True
                    is_taken[o] = not is_crowd
                    chosen.append(k)
            found = good[chosen]
            matches.ignored[t, found["detection"]] = found["is_crowd"]
            found = found[~found["is_crowd"]]
            matches.ious[t, found["detection"]] = found["iou"]
            matches.areas[t, found["detection"]] = found["area"]
        return matches

    @cached_property
    def _pairs(self) -> np.ndarray:
        """
        The detections and objects that overlap. Those that COCO lets a detection choose first come
        first: the largest IoU, of equal ones the later object, and crowds after all objects.
        """
        kinds = {"detection": int, "object": int, "iou": float, "area": float, "is_crowd": bool}
        parts, num_objects = [np.empty(0, list(kinds.items()))], 0
        for place in self.places.values():
            rows, columns = place.ious.nonzero()
            if len(rows):
                part = np.empty(len(rows), parts[0].dtype)
                part["detection"] = np.array(place.detections)[rows]
                part["object"] = num_objects + columns
                part["iou"] = place.ious[rows, columns]
                part["area"] = np.array([a["area"] for a in place.objects])[columns]
                part["is_crowd"] = place.is_crowd[columns]
                parts.append(part)
            num_objects += len(place.objects)
        pairs = np.concatenate(parts)
        return pairs[np.lexsort((-pairs["object"], -pairs["iou"], pairs["is_crowd"]))]


def right_detections(
    overlaps: Overlaps,
    scores: Sequence[float] | np.ndarray,
    max_dets: int = 100,
    thresholds: Sequence[float] | np.ndarray = IOU_THRESHOLDS,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Which detections are right at each IoU threshold, and which of them count.

    A detection is right if COCO's matching gives it an object, where detections choose in the order
    of `scores`: see :meth:`Overlaps.match`. Duplicates are wrong. Detections that are matched with
    a crowd, or that are beyond the limit, do not count.

    Args:
        scores: N, those that a threshold is applied to; or :attr:`Overlaps.largest`, so that no
            score decides which of two duplicates is right.
        max_dets: how many detections of each image and class count.
        thresholds: T smallest IoUs; by default COCO's, from 0.50 to 0.95.

    Returns:
        two bool arrays T x N, "right" and "counted".
    """
    matches = overlaps.match(scores, thresholds, max_dets)
    return ~np.isnan(matches.ious), ~matches.ignored & ~matches.beyond


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
