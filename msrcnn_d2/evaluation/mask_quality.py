"""What a mask score is worth: how well scores tell good masks from bad ones, and AP under each."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from tabulate import tabulate

from .average_precision import Evaluation, areas_of, build_engine, mean_of_defined
from .matching import IOU_THRESHOLDS, MaskOverlaps
from .score_statistics import Bin, expected_calibration_error, mean, pearson, reliability, spearman

__all__ = ["Agreement", "MaskQuality", "Part", "limit_of", "mask_ap", "measure_mask_quality"]

# How the masks of a model can be ranked; "true_iou" is the ceiling of the others
RANKINGS = ("class_score", "mask_score", "true_iou")
SCORES = ("class_score", "predicted_iou", "mask_score")
# Where results have them; those of a plain Mask R-CNN have the first only
KEYS = {"class_score": "score", "predicted_iou": "pred_mask_iou", "mask_score": "mask_score"}
TITLES = {
    "class_score": "class score",
    "predicted_iou": "predicted IoU",
    "mask_score": "mask score",
    "true_iou": "true IoU (ceiling)",
}
# As COCO has it: areas in pixels, and an area at the limit belongs to both sides
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e5**2)}


@dataclass
class Agreement:
    """
    How well scores agree with the true IoU, over a set of detections.

    Attributes:
        count: number of detections.
        true_iou: mean true IoU, in [0, 1].
        pearson, spearman: {score: coefficient of correlation with the true IoU, in [-1, 1]}; of
            the class score, the predicted IoU and the mask score, as far as the model has them.
        mae: mean absolute difference of predicted and true IoU.
        bias: mean of predicted IoU - true IoU; positive where the model thinks too well of itself.
        ece: expected calibration error of the predicted IoU over ten bins.

    The last three are NaN for a model that predicts no IoU, and all means are without detections.
    """

    count: int
    true_iou: float
    pearson: dict[str, float]
    spearman: dict[str, float]
    mae: float
    bias: float
    ece: float


@dataclass
class Part:
    """
    The whole or a part of a test set: a class, objects of a size, an IoU threshold.

    Attributes:
        ap: {ranking: mask AP in percent}; NaN where there are no objects.
        gap_closed: share of the gap between the AP by class score and the ceiling, the AP by true
            IoU, that the mask score closes; negative where it loses AP; NaN without a gap.
        matched: over the detections that found an object.
        all: over all detections, with their largest IoU as the true one; None at a threshold.
    """

    ap: dict[str, float]
    gap_closed: float
    matched: Agreement
    all: Agreement | None


class MaskQuality:
    """
    What scores say about masks, and the AP that they lead to.

    A detection's *true IoU* is that of its mask with an object of its class. Which object that is
    says COCO's matching: within each image and class, in the order of the class score, each
    detection takes the object with the largest IoU that none before it has taken, if the IoU is at
    least the threshold, 0.5 if nothing else is said (details: :meth:`MaskOverlaps.match`). Such
    detections are *matched*; from 0.5 on a mask has no second object to choose, unless objects
    overlap. *All* detections are these, duplicates and mistakes: their true IoU is the largest
    with any object of their class in the image, or 0. Detections that fall to a crowd, and those
    beyond the number that counts for each class and image, are in neither.

    The chosen threshold cuts off low IoUs, so among matched detections low predictions look more
    pessimistic than they are, and among all detections any prediction looks more optimistic, since
    the MaskIoU head learns from masks that found their object. One should see both.

    The ceiling ranks by true IoU over all detections. It needs more than a perfect MaskIoU head:
    it also puts last what has the wrong class. It is not quite the best ranking, as it leaves
    duplicates of good masks among the first.

    Attributes:
        coco_gt, results, max_dets: what the numbers are about.
        evaluations: {ranking: COCO's evaluation}; without "mask_score" for a model that has none.
        scores: {score: N values}, of those that the model has.
        true_ious: N, the largest IoU with an object.
        matches: with the thresholds of COCO.
        counted: N, whether a detection is in the statistics.
        classes: names in the order of the category ids.
        class_indices: N, the index of each detection's class among them.
        num_objects: of each class, without crowds.
    """

    def __init__(
        self,
        coco_gt: COCO,
        results: Sequence[dict],
        evaluations: Mapping[str, Evaluation],
        overlaps: MaskOverlaps,
        max_dets: int = 100,
        img_ids: Collection | None = None,
    ):
        """
        Args:
            coco_gt: the ground truth.
            results: N detections in COCO's result format, with "segmentation" as RLE, and with
                "pred_mask_iou" and "mask_score" if the model scores masks.
            evaluations: {ranking: evaluation of these results ranked so}.
            overlaps: of these results.
            max_dets: number of detections of each image and class that count.
            img_ids: images to look at, by default all.
        """
        self.coco_gt, self.results, self.max_dets = coco_gt, results, max_dets
        self.evaluations = dict(evaluations)
        self.scores = scores_of(results)
        self.true_ious = overlaps.largest
        self.matches = overlaps.match(self.scores["class_score"], max_dets=max_dets)
        categories = sorted(coco_gt.getCatIds())
        images = set(coco_gt.getImgIds() if img_ids is None else img_ids)
        index = {category: k for k, category in enumerate(categories)}
        known = [r["image_id"] in images and r["category_id"] in index for r in results]
        self._counting = np.array(known, dtype=bool) & ~self.matches.beyond
        self.counted = self._counting & ~self.matches.ignored[0]
        self.classes = _class_names(coco_gt, categories)
        self.class_indices = np.array([index.get(r["category_id"], -1) for r in results], int)
        self.num_images = len(images)
        self.num_objects = [0] * len(categories)
        for annotation in coco_gt.dataset["annotations"]:
            k = index.get(annotation["category_id"])  # COCO, too, passes over unknown ones
            is_object = annotation["image_id"] in images and not annotation.get("iscrowd", 0)
            if k is not None and is_object:
                self.num_objects[k] += 1

    @property
    def matched(self) -> np.ndarray:
        """N, whether a detection is matched at an IoU of 0.5."""
        return self._matched(0)

    @property
    def matched_ious(self) -> np.ndarray:
        """N, the IoU with the object that a detection is matched with at 0.5; NaN without one."""
        return self.matches.ious[0]

    def _matched(self, threshold: int) -> np.ndarray:
        return self._counting & ~np.isnan(self.matches.ious[threshold])

    @cached_property
    def overall(self) -> Part:
        return self._part((slice(None), slice(None), slice(None), 0), self.counted)

    @cached_property
    def by_class(self) -> dict[str, Part]:
        """A part for each class, with the detections of it."""
        return {
            name: self._part(
                (slice(None), slice(None), k, 0), self.counted & (self.class_indices == k)
            )
            for k, name in enumerate(self.classes)
        }

    @cached_property
    def by_size(self) -> dict[str, Part]:
        """
        A part for objects of each of COCO's sizes ("small" up to 32 x 32 pixels, "large" from
        96 x 96 on). A detection is where its object is, an unmatched one where its mask is.
        """
        areas = np.where(self.matched, self.matches.areas[0], areas_of(self.results, "segm"))
        return {
            name: self._part(
                (slice(None), slice(None), slice(None), k),
                self.counted & (areas >= low) & (areas <= high),
            )
            for k, (name, (low, high)) in enumerate(SIZES.items(), start=1)
        }

    @cached_property
    def by_threshold(self) -> dict[str, Part]:
        """A part for each of COCO's IoU thresholds, "0.50" to "0.95", with what it matches."""
        return {
            f"{threshold:.2f}": self._part(
                (k, slice(None), slice(None), 0), self._counting, threshold=k, with_all=False
            )
            for k, threshold in enumerate(IOU_THRESHOLDS)
        }

    def precision_recall(self) -> dict[str, dict[str, list[float]]]:
        """
        For each IoU threshold and ranking the precision at recall 0, 0.01, ..., 1, as COCO
        interpolates it (the best one at this recall or a higher one), averaged over the classes
        that have objects.
        """
        curves = {}
        for k, threshold in enumerate(IOU_THRESHOLDS):
            at = {name: e.eval["precision"][k, :, :, 0, -1] for name, e in self.evaluations.items()}
            curves[f"{threshold:.2f}"] = {
                name: p[:, (p > -1).all(axis=0)].mean(axis=1).tolist() if (p > -1).any() else []
                for name, p in at.items()
            }
        return curves

    def reliability(self) -> dict[str, list[Bin]]:
        """Reliability diagrams of the predicted IoU over "matched" and over "all" detections."""
        if "predicted_iou" not in self.scores:
            return {}
        predicted = self.scores["predicted_iou"]
        matched, counted = self.matched, self.counted
        return {
            "matched": reliability(predicted[matched], self.matched_ious[matched]),
            "all": reliability(predicted[counted], self.true_ious[counted]),
        }

    def _part(self, place: tuple, chosen: np.ndarray, threshold: int = 0, with_all=True) -> Part:
        """
        Args:
            place: of precisions that belong to it, by threshold, recall, class and size.
            chosen: N, whether a detection belongs to it.
        """
        ap = {
            name: 100 * mean_of_defined(self.evaluations[name].eval["precision"][..., -1][place])
            for name in RANKINGS
            if name in self.evaluations
        }
        matched = chosen & self._matched(threshold)
        return Part(
            ap=ap,
            gap_closed=_gap_closed(ap),
            matched=self._agreement(matched, self.matches.ious[threshold]),
            all=self._agreement(chosen, self.true_ious) if with_all else None,
        )

    def _agreement(self, chosen: np.ndarray, true_ious: np.ndarray) -> Agreement:
        true = true_ious[chosen]
        scores = {name: values[chosen] for name, values in self.scores.items()}
        predicted = scores.get("predicted_iou", np.zeros(0))
        errors = predicted - true if len(predicted) else np.zeros(0)
        return Agreement(
            count=len(true),
            true_iou=mean(true),
            pearson={name: pearson(x, true) for name, x in scores.items()},
            spearman={name: spearman(x, true) for name, x in scores.items()},
            mae=mean(np.abs(errors)),
            bias=mean(errors),
            ece=expected_calibration_error(reliability(predicted, true)) if len(errors) else np.nan,
        )

    def headline(self) -> dict[str, float]:
        """
        The numbers that an evaluation shows and logs: AP in percent by each ranking, share of the
        gap closed, and over matched detections correlations, errors and their number.
        """
        part, agreement = self.overall, self.overall.matched
        numbers = {f"AP_{name}": value for name, value in part.ap.items()}
        if "mask_score" in self.scores:
            numbers["gap_closed"] = part.gap_closed
        for kind in ("pearson", "spearman"):
            numbers |= {f"{kind}_{k}": v for k, v in getattr(agreement, kind).items()}
        if "predicted_iou" in self.scores:
            numbers |= {"mae": agreement.mae, "bias": agreement.bias, "ece": agreement.ece}
        return {**numbers, "matched": agreement.count}

    def table(self) -> str:
        """For people: AP in percent, and over matched detections correlation with the true IoU."""
        ap, agreement = self.overall.ap, self.overall.matched
        rows = [
            [title, ap.get(name), agreement.pearson.get(name), agreement.spearman.get(name)]
            for name, title in TITLES.items()
            if name in ap or name in self.scores
        ]
        headers = ["masks ranked by", "mask AP", "correlation with true IoU", "of ranks"]
        table = tabulate(rows, headers, "github", floatfmt=("", ".2f", ".2f", ".2f"))
        if not agreement.count:
            return f"{table}\nNo mask is matched with an object."
        if "predicted_iou" not in self.scores:
            return table
        closed = self.overall.gap_closed
        return (
            f"{table}\nPredicted IoU of {agreement.count} matched masks: off by "
            f"{agreement.mae:.3f} on average, mean error {agreement.bias:+.3f}, calibration error "
            f"{agreement.ece:.3f}."
            + ("" if math.isnan(closed) else f" {100 * closed:.0f} % of the gap closed.")
        )

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON can hold them: NaN, which it has not, is None."""
        numbers = {
            "images": self.num_images,
            "objects": sum(self.num_objects),
            "detections": int(self.counted.sum()),
            "max_dets": self.max_dets,
            "overall": asdict(self.overall),
            "by_class": {k: asdict(v) for k, v in self.by_class.items()},
            "by_size": {k: asdict(v) for k, v in self.by_size.items()},
            "by_threshold": {k: asdict(v) for k, v in self.by_threshold.items()},
            "precision_recall": self.precision_recall(),
            "reliability": {k: [asdict(b) for b in v] for k, v in self.reliability().items()},
        }
        return _without_nan(numbers)


def limit_of(results: Sequence[dict]) -> int:
    """100, as in COCO, or the number of detections in the image that has the most, if larger."""
    return max([100, *Counter(r["image_id"] for r in results).values()])


def measure_mask_quality(
    coco_gt: COCO,
    results: Sequence[dict],
    engine: str | None = None,
    max_dets: int = 100,
    img_ids: Collection | None = None,
) -> MaskQuality:
    """
    Args:
        coco_gt: the ground truth.
        results: at least one detection of any model in COCO's result format, with "segmentation"
            as RLE and "score"; with "pred_mask_iou" and "mask_score" if the model scores masks.
        engine: "faster-coco-eval", "pycocotools", or None for the first one that is installed.
        max_dets: of each image, only so many of each class count, the best ones.
        img_ids: images to look at, by default all.
    """
    counting = build_engine(coco_gt, results, "segm", engine, [max_dets], img_ids)
    overlaps = MaskOverlaps(coco_gt, results)
    rankings = {**scores_of(results), "true_iou": overlaps.largest}
    evaluations = {k: counting.evaluate(v) for k, v in rankings.items() if k in RANKINGS}
    return MaskQuality(coco_gt, results, evaluations, overlaps, max_dets, img_ids)


def scores_of(results: Sequence[dict]) -> dict[str, np.ndarray]:
    """The scores that all of the results have: {score: N values}."""
    return {
        name: np.array([r[key] for r in results], dtype=float)
        for name, key in KEYS.items()
        if all(key in r for r in results)
    }


def mask_ap(
    coco_gt: COCO,
    results: Sequence[dict],
    scores: Sequence[float],
    max_dets: int = 100,
    engine: str | None = None,
) -> dict[str, float]:
    """
    Mask AP that a ranking gives to masks.

    Args:
        coco_gt: the ground truth.
        results: detections in COCO's result format, with "segmentation".
        scores: the number to rank each result by, instead of its "score". Equal ones keep the
            order of `results` within an image.
        max_dets: of each image, only so many of each class count, the best ones.
        engine: "faster-coco-eval", "pycocotools", or None for the first one that is installed.

    Returns:
        "AP" (mean over IoU 0.50:0.95), "AP50" and "AP75" in percent; NaN if there is nothing to
        compare.
    """
    names = ("AP", "AP50", "AP75")
    if not results:
        return dict.fromkeys(names, float("nan"))
    ranking = build_engine(coco_gt, results, "segm", engine, [max_dets])
    numbers = ranking.evaluate(scores).numbers
    return {name: 100 * numbers[name] for name in names}


def _class_names(coco_gt: COCO, categories: list) -> list[str]:
    """In the order of the ids, which they name where two classes have the same name."""
    names = [str(coco_gt.cats[k].get("name", k)) for k in categories]
    return [f"{n} ({k})" if names.count(n) > 1 else n for n, k in zip(names, categories)]


def _gap_closed(ap: dict[str, float]) -> float:
    gap = ap["true_iou"] - ap["class_score"]
    if "mask_score" not in ap or not gap > 0:
        return float("nan")
    return (ap["mask_score"] - ap["class_score"]) / gap


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
