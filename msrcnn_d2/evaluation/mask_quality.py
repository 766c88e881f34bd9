"""How well scores tell good masks from bad ones, and the AP that each ranking of masks gives."""

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from tabulate import tabulate

from msrcnn_d2_runtime.iou_thresholds import IOU_THRESHOLDS, iou_index
from msrcnn_d2_runtime.scores import MASK_IOU_PROBS, RANKINGS, TITLES, scores_of

from .average_precision import AveragePrecision, Evaluation, mean_of_defined
from .calibration_errors import (
    PROBABILITY_IOUS,
    CalibrationErrors,
    brier_score,
    iou_targets,
    localisation_aware_errors,
)
from .matching import right_detections
from .score_statistics import Bin, expected_calibration_error, mean, pearson, reliability, spearman

__all__ = ["Agreement", "MaskQuality", "Part", "limit_of", "mask_ap", "measure_mask_quality"]

# In pixels; as in COCO, an area at the limit belongs to both sides
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e5**2)}


@dataclass
class Agreement:
    """
    How well scores agree with the true IoU, over a set of detections.

    Attributes:
        count: number of detections.
        true_iou: mean true IoU, in [0, 1].
        pearson, spearman: {score: coefficient of correlation with the true IoU, in [-1, 1]}, for
            the scores that the model has.
        mae: mean absolute difference of predicted and true IoU.
        bias: mean of predicted IoU - true IoU; positive where predictions are too high.
        ece: expected calibration error of the predicted IoU over ten bins.

    The last three are NaN for a model that predicts no IoU. All means are NaN without detections.
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
        gap_closed: {ranking: share of the gap between the AP by class score and the ceiling, the AP
            by true IoU, that it closes}, for the other scores that rank masks; negative where it
            lowers AP; NaN without a gap.
        matched: over the matched detections.
        all: over all detections, with their largest IoU as the true one; None for a single IoU
            threshold.
    """

    ap: dict[str, float]
    gap_closed: dict[str, float]
    matched: Agreement
    all: Agreement | None


class MaskQuality:
    """
    What scores say about masks, and the AP that they lead to.

    The *true IoU* of a detection is the IoU of its mask with an object of its class. COCO's
    matching decides which object that is: within each image and class, in the order of the class
    score, each detection takes the free object with the largest IoU, if the IoU is at least the
    threshold, 0.5 unless another is named (details: :meth:`Overlaps.match`). Such detections are
    *matched*. *All* detections also include duplicates and mistakes; the true IoU is then the
    largest IoU with any object of the class in the image, or 0. Neither set includes detections
    that are matched with a crowd, or that exceed the number that counts in each image and class.

    Both sets are biased. The threshold removes low IoUs from the matched detections, so that low
    predictions look more pessimistic there than they are. All detections include masks that miss
    their object, which the MaskIoU head never sees in training, so that its predictions look more
    optimistic than they are. It helps to look at both.

    The ceiling is the AP of a ranking by true IoU over all detections. It needs more than a perfect
    MaskIoU head, since it also puts detections of the wrong class last. A slightly better ranking
    may exist, since duplicates of good masks come early in this one.

    Attributes:
        average_precision: ranked the masks, and can evaluate further rankings of them.
        coco_gt, results, max_dets: the detections, and how many of each image and class count.
        evaluations: {ranking: COCO's evaluation}, for the rankings that the model has, and
            "true_iou".
        scores: {score: N values}, for the scores that the model has.
        mask_iou_probs: N x 10, the probabilities that a calibrated score is the mean of, None if
            the model has none.
        true_ious: N, the largest IoU with an object.
        matches: the matches at COCO's thresholds.
        counted: N, whether a detection is in the statistics.
        classes: names of the classes, in the order of the category ids.
        class_indices: N, the index of each detection's class among them.
        num_images: number of images that are evaluated.
        num_objects: number of objects of each class, without crowds.
    """

    def __init__(
        self,
        average_precision: AveragePrecision,
        evaluations: Mapping[str, Evaluation] | None = None,
    ):
        """
        Args:
            average_precision: of the masks of N detections, which have a "score" and those of the
                other keys in :data:`SCORES` that the model predicts.
            evaluations: {ranking: evaluation}, for rankings that have been evaluated already.
        """
        self.average_precision = average_precision
        overlaps, self.max_dets = average_precision.overlaps, average_precision.max_dets[-1]
        self.coco_gt, self.results = overlaps.coco_gt, overlaps.results
        self.scores = scores_of(self.results)
        self.mask_iou_probs: np.ndarray | None = None
        if all(MASK_IOU_PROBS in r for r in self.results):
            self.mask_iou_probs = np.array([r[MASK_IOU_PROBS] for r in self.results], dtype=float)
        self.true_ious = overlaps.largest
        rankings, evaluated = {**self.scores, "true_iou": self.true_ious}, evaluations or {}
        self.evaluations = {
            name: evaluated.get(name) or average_precision.evaluate(rankings[name])
            for name in RANKINGS
            if name in rankings
        }
        self.matches = overlaps.match(self.scores["class_score"], max_dets=self.max_dets)

        categories, images = average_precision.category_ids, set(average_precision.image_ids)
        index = {category: k for k, category in enumerate(categories)}
        known = [r["image_id"] in images and r["category_id"] in index for r in self.results]
        self._known = np.array(known, dtype=bool)
        self._counting = self._known & ~self.matches.beyond
        self.counted = self._counting & ~self.matches.ignored[0]
        names = [str(self.coco_gt.cats[k].get("name", k)) for k in categories]
        # Where two classes have the same name, their ids tell them apart
        self.classes = [
            f"{n} ({k})" if names.count(n) > 1 else n for n, k in zip(names, categories)
        ]
        self.class_indices = np.array([index.get(r["category_id"], -1) for r in self.results], int)
        self.num_images = len(images)
        self.num_objects = [0] * len(categories)
        for (image, category), place in overlaps.places.items():
            if image in images and category in index:
                self.num_objects[index[category]] += int((~place.is_crowd).sum())

    @property
    def rankings(self) -> list[str]:
        """The scores that rank masks, "class_score" first and the model's most refined one last."""
        return [name for name in self.evaluations if name != "true_iou"]

    @property
    def matched(self) -> np.ndarray:
        """N, whether a detection is matched at an IoU of 0.5."""
        return self._counting & ~np.isnan(self.matched_ious)

    @property
    def matched_ious(self) -> np.ndarray:
        """N, the IoU with the object that a detection is matched with at 0.5; NaN without one."""
        return self.matches.ious[0]

    @cached_property
    def overall(self) -> Part:
        return self._part(np.s_[:, :, :, 0], self.counted)

    @cached_property
    def by_class(self) -> dict[str, Part]:
        """A part for each class."""
        return {
            name: self._part(np.s_[:, :, k, 0], self.counted & (self.class_indices == k))
            for k, name in enumerate(self.classes)
        }

    @cached_property
    def by_size(self) -> dict[str, Part]:
        """
        A part for each of COCO's sizes ("small" up to 32 x 32 pixels, "large" from 96 x 96 on). A
        detection has the size of its object, or that of its own mask if it is unmatched.
        """
        areas = self.average_precision.overlaps.areas
        areas = np.where(self.matched, self.matches.areas[0], areas)
        return {
            name: self._part(np.s_[:, :, :, k], self.counted & (areas >= low) & (areas <= high))
            for k, (name, (low, high)) in enumerate(SIZES.items(), start=1)
        }

    @cached_property
    def by_threshold(self) -> dict[str, Part]:
        """A part for each of COCO's IoU thresholds, "0.50" to "0.95"."""
        return {
            f"{threshold:.2f}": self._part(np.s_[k, :, :, 0], self._counting, k)
            for k, threshold in enumerate(IOU_THRESHOLDS)
        }

    def precision_recall(self) -> dict[str, dict[str, list[float]]]:
        """
        For each IoU threshold and ranking, the precision at recall 0, 0.01, ..., 1, averaged over
        the classes that have objects. As COCO interpolates, this is the best precision at the given
        recall or a higher one.
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

    @cached_property
    def _targets(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{score: what it should say, which detections count}, see :func:`iou_targets`."""
        targets = {}
        for name, scores in self.scores.items():
            ious, counts = iou_targets(self.average_precision.overlaps, scores, self.max_dets)
            targets[name] = ious, counts & self._known
        return targets

    @cached_property
    def _right(self) -> tuple[np.ndarray, np.ndarray]:
        """2 x N each, for PROBABILITY_IOUS: which detections are right, which count."""
        overlaps = self.average_precision.overlaps
        right, counts = right_detections(
            overlaps, overlaps.largest, self.max_dets, PROBABILITY_IOUS
        )
        return right, counts & self._known

    def _probabilities(self, name: str) -> np.ndarray:
        """2 x N, what a score says about being right at PROBABILITY_IOUS."""
        if name == "quality_score" and self.mask_iou_probs is not None:
            return self.mask_iou_probs[:, [iou_index(x) for x in PROBABILITY_IOUS]].T
        return np.broadcast_to(self.scores[name], (len(PROBABILITY_IOUS), len(self.results)))

    @cached_property
    def calibration(self) -> dict[str, CalibrationErrors]:
        """How honest each score is: {score: errors}, over all detections."""
        has_objects = np.append(self.num_objects, 0)[self.class_indices] > 0  # -1 is no class
        errors = {}
        for name, scores in self.scores.items():
            targets, counts = self._targets[name]
            used = counts & has_objects
            laece, laace = localisation_aware_errors(
                scores[used], targets[used], self.class_indices[used]
            )
            errors[name] = CalibrationErrors(laece, laace, brier={}, ece={})
            if name == "expected_iou":
                continue
            for threshold, *arrays in zip(
                PROBABILITY_IOUS, self._probabilities(name), *self._right
            ):
                probs, right, counts = arrays
                errors[name].brier[f"{threshold:.2f}"] = brier_score(probs[counts], right[counts])
                errors[name].ece[f"{threshold:.2f}"] = expected_calibration_error(
                    reliability(probs[counts], right[counts])
                )
        return errors

    def reliability_of_scores(self) -> dict[str, list[Bin]]:
        """
        For each score a reliability diagram over all detections, in ten bins: the mean score beside
        the mean of what it should say (:func:`iou_targets`).
        """
        return {
            name: reliability(self.scores[name][counts], targets[counts])
            for name, (targets, counts) in self._targets.items()
        }

    def reliability_of_probs(self) -> dict[str, list[Bin]]:
        """
        For the thresholds "0.50" and "0.75" a reliability diagram of the calibrator's probabilities
        over all detections, in ten bins: the mean probability beside the share of detections that
        are right (:class:`CalibrationErrors`). Empty for a model without a calibrator.
        """
        if self.mask_iou_probs is None or "quality_score" not in self.scores:
            return {}
        return {
            f"{threshold:.2f}": reliability(probs[counts], right[counts])
            for threshold, probs, right, counts in zip(
                PROBABILITY_IOUS, self._probabilities("quality_score"), *self._right
            )
        }

    def _part(self, place: tuple, chosen: np.ndarray, threshold: int | None = None) -> Part:
        """
        Args:
            place: index of the part's precisions, by threshold, recall, class and size.
            chosen: N, whether a detection belongs to the part.
            threshold: index of the part's IoU threshold; None if it has all of them.
        """
        ap = {
            name: 100 * mean_of_defined(self.evaluations[name].eval["precision"][..., -1][place])
            for name in self.evaluations
        }
        gap = ap["true_iou"] - ap["class_score"]
        matched_ious = self.matches.ious[threshold or 0]
        return Part(
            ap=ap,
            gap_closed={
                name: (ap[name] - ap["class_score"]) / gap if gap > 0 else float("nan")
                for name in self.rankings[1:]
            },
            matched=self._agreement(chosen & ~np.isnan(matched_ious), matched_ious),
            all=self._agreement(chosen, self.true_ious) if threshold is None else None,
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
        The numbers that an evaluation shows and logs: AP in percent under each ranking, the shares
        of the gap closed; correlations, errors and the number of the matched detections; and the
        calibration errors of each score.
        """
        part, agreement = self.overall, self.overall.matched
        numbers = {f"AP_{name}": value for name, value in part.ap.items()}
        numbers |= {f"gap_closed_{name}": value for name, value in part.gap_closed.items()}
        for kind in ("pearson", "spearman"):
            numbers |= {f"{kind}_{k}": v for k, v in getattr(agreement, kind).items()}
        if "predicted_iou" in self.scores:
            numbers |= {"mae": agreement.mae, "bias": agreement.bias, "ece": agreement.ece}
        for name, errors in self.calibration.items():
            numbers |= {f"LaECE_{name}": errors.laece, f"LaACE_{name}": errors.laace}
            for kind in ("brier", "ece"):
                of_kind = getattr(errors, kind).items()
                numbers |= {f"{kind}{t[2:]}_{name}": value for t, value in of_kind}
        return {**numbers, "matched": agreement.count}

    def table(self) -> str:
        """
        Text to print: AP and shares of the gap in percent, and correlations; and how honest the
        scores are.
        """
        part, agreement = self.overall, self.overall.matched
        columns = {
            "mask AP": (part.ap, ".2f"),
            "% of the gap": (
                {k: 100 * v for k, v in part.gap_closed.items() if math.isfinite(v)},
                ".0f",
            ),
            "correlation with true IoU": (agreement.pearson, ".2f"),
            "of ranks": (agreement.spearman, ".2f"),
        }
        columns = {title: column for title, column in columns.items() if column[0]}
        rows = [
            [title, *(values.get(name) for values, _ in columns.values())]
            for name, title in TITLES.items()
            if name in part.ap or name in self.scores
        ]
        formats = ["", *(number for _, number in columns.values())]
        table = tabulate(rows, ["masks ranked by", *columns], "github", floatfmt=formats)
        if not agreement.count:
            table += "\nNo mask is matched with an object."
        elif "predicted_iou" in self.scores:
            table += (
                f"\nPredicted IoU of {agreement.count} matched masks: mean absolute error "
                f"{agreement.mae:.3f}, mean error {agreement.bias:+.3f}, calibration error "
                f"{agreement.ece:.3f}."
            )
        errors = [
            [TITLES[name], x.laece, x.laace, *(v[t] for t in x.brier for v in (x.brier, x.ece))]
            for name, x in self.calibration.items()
        ]
        headers = ["score", "LaECE_0", "LaACE_0", "Brier @50", "ECE @50", "Brier @75", "ECE @75"]
        return (
            f"{table}\n\nAre the scores honest? Over all detections; 0 is best. Brier score and "
            "expected calibration\nerror are those of the probability that a mask is right at IoU "
            "0.50 or 0.75.\n" + tabulate(errors, headers, "github", floatfmt=".3f")
        )

    def to_json(self) -> dict[str, Any]:
        """All numbers in a form that JSON can hold, with None in place of NaN."""
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
            "reliability": _as_dicts(self.reliability()),
            "calibration": {k: asdict(v) for k, v in self.calibration.items()},
            "reliability_of_scores": _as_dicts(self.reliability_of_scores()),
            "reliability_of_probs": _as_dicts(self.reliability_of_probs()),
        }
        return json.loads(json.dumps(numbers), parse_constant=lambda nan: None)


def _as_dicts(diagrams: dict[str, list[Bin]]) -> dict[str, list[dict[str, float]]]:
    return {name: [asdict(b) for b in bins] for name, bins in diagrams.items()}


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
        max_dets: how many detections of each image and class count, those with the best scores.
        img_ids: images to evaluate, by default all.
    """
    ranking = AveragePrecision(coco_gt, results, "segm", engine, [max_dets], img_ids)
    return MaskQuality(ranking)


def mask_ap(
    coco_gt: COCO,
    results: Sequence[dict],
    scores: Sequence[float],
    max_dets: int = 100,
    engine: str | None = None,
) -> dict[str, float]:
    """
    Mask AP of a ranking of masks.

    Args:
        coco_gt: the ground truth.
        results: detections in COCO's result format, with "segmentation".
        scores: the number to rank each result by, instead of its "score". Equal ones keep the
            order of `results` within an image.
        max_dets: how many detections of each image and class count, those with the best scores.
        engine: "faster-coco-eval", "pycocotools", or None for the first one that is installed.

    Returns:
        "AP" (mean over IoU 0.50:0.95), "AP50" and "AP75" in percent; NaN if there is nothing to
        compare.
    """
    names = ("AP", "AP50", "AP75")
    if not results:
        return dict.fromkeys(names, float("nan"))
    ranking = AveragePrecision(coco_gt, results, "segm", engine, [max_dets])
    numbers = ranking.evaluate(scores).numbers
    return {name: 100 * numbers[name] for name in names}
