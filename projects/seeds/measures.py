"""What is measured of each trained model: numbers for the tables."""

import random
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from detections import Found
from msrcnn_d2.calibration import Samples, add_scores, fit_calibrator, fit_if_better
from msrcnn_d2.calibration.collect import MAX_IMAGES
from msrcnn_d2.evaluation import MaskQuality
from msrcnn_d2.evaluation.average_precision import AveragePrecision
from msrcnn_d2.evaluation.matching import right_detections
from msrcnn_d2.modeling import CUES, MaskCalibrator
from msrcnn_d2_runtime.iou_thresholds import IOU_THRESHOLDS, iou_index

__all__ = [
    "CUE_SETS",
    "calibrate",
    "calibrated_quality",
    "measure",
    "measure_amounts",
    "measure_cues",
    "measure_precisions",
    "measure_rankings",
    "measure_transfer",
    "with_cues",
]

THRESHOLDS = (50, 75, 90)
PRECISIONS = (50, 60, 70, 80, 90, 95)  # percent, that a user wants
NUM_IMAGES = (10, 20, 50, 100)  # that a calibrator is fitted to, to see how many it needs

SCORE, IOU = {"class_log_odds"}, {"mask_iou"}
SHAPE = {
    *("compactness", "fill", "tightness", "elongation"),
    *("log_box_area", "log_mask_area", "sides_at_image_border"),
}
PROBABILITIES = set(CUES) - SCORE - IOU - SHAPE
# What a calibrator may know
CUE_SETS = {
    "all cues": set(CUES),
    "all but the predicted IoU": set(CUES) - IOU,
    "all but the mask's probabilities": SCORE | IOU | SHAPE,
    "all but shape and size": SCORE | IOU | PROBABILITIES,
    "class score and predicted IoU": SCORE | IOU,
    "class score and the mask's probabilities": SCORE | PROBABILITIES,
    "class score, shape and size": SCORE | SHAPE,
    "class score": SCORE,
}


def measure(found: Mapping[str, Found]) -> dict[str, Any]:
    """
    How good the model's own scores are.

    Args:
        found: {part: detections}, for "val", "holdout" and "train".
    """
    quality = {part: MaskQuality(x.ranking) for part, x in found.items()}
    val = quality["val"]
    boxes = AveragePrecision(val.coco_gt, val.results, "bbox", max_dets=[val.max_dets])
    numbers: dict[str, Any] = {
        "box_ap": 100 * boxes.evaluate(val.scores["class_score"]).numbers["AP"],
        "ap": val.overall.ap,
        **{f"ap{k}": val.by_threshold[f"0.{k}"].ap for k in THRESHOLDS},
        "pearson": val.overall.matched.pearson,
        "spearman": val.overall.matched.spearman,
    }
    if "predicted_iou" in val.scores:
        numbers["head"] = {part: _head(x) for part, x in quality.items()}
        numbers["better_heads"] = _better_head_aps(val)
    return numbers


def _head(quality: MaskQuality) -> dict[str, float]:
    """How well IoUs are predicted, over matched detections and over all."""
    matched, everything = quality.overall.matched, quality.overall.all
    assert everything is not None  # of the overall part
    return {
        "correlation": matched.pearson["predicted_iou"],
        "mae": matched.mae,
        "bias": matched.bias,
        "ece": matched.ece,
        "ece_all": everything.ece,
    }


def _better_head_aps(quality: MaskQuality) -> dict[str, float]:
    """Mask AP if the predicted IoU were the true one, of some detections or of all."""
    scores, predicted = quality.scores["class_score"], quality.scores["predicted_iou"]
    found = quality.true_ious >= 0.5
    rankings = {
        "class score x predicted IoU": predicted,
        "the same, with the true IoU where that is at least 0.5": np.where(
            found, quality.true_ious, predicted
        ),
        "the same, with the true IoU where that is below 0.5": np.where(
            found, predicted, quality.true_ious
        ),
        "class score x true IoU": quality.true_ious,
    }
    ranking = quality.average_precision
    return {
        name: 100 * ranking.evaluate(scores * ious).numbers["AP"] for name, ious in rankings.items()
    }


def calibrate(found: Found, seed: int) -> tuple[MaskCalibrator, dict[str, Any]]:
    """
    Fit a calibrator as `msrcnn-d2 calibrate` does.

    Returns:
        the calibrator, and what it was fitted to.
    """
    calibrator = MaskCalibrator()
    fit = fit_if_better(calibrator, found.ranking, found.samples, seed=seed)
    return calibrator, {
        "images": len(found.image_ids),
        "detections": len(found.samples),
        "with_network": fit.with_network,
    }


def calibrated_quality(calibrator: MaskCalibrator, found: Found) -> MaskQuality:
    """What the scores of a calibrator are worth. They are written into the results."""
    probs = calibrator.probs(found.samples.cues, found.samples.score_log_odds)
    add_scores(found.results, probs)
    return MaskQuality(found.ranking)


def measure_rankings(
    val: Found, calibrators: Mapping[str, MaskCalibrator]
) -> tuple[dict[str, dict[str, float]], MaskQuality]:
    """
    Args:
        val: detections that no calibrator was fitted to.
        calibrators: one or more, by name.

    Returns:
        for the model's own rankings, for that of each calibrator and for "true_iou": mask AP in
        percent ("ap", "ap50", "ap75"), and for all but the last how honest the score is ("laece",
        and the calibration error and Brier score of the probability of an IoU of 0.5 or 0.75 or
        more); for a calibrator also "laece_iou", LaECE_0 of the expected IoU.
        And the quality of masks with the scores of the last calibrator.
    """
    numbers: dict[str, dict[str, float]] = {}
    for name, calibrator in calibrators.items():
        quality = calibrated_quality(calibrator, val)
        for ranking in (*quality.rankings, "true_iou"):
            key = name if ranking == "quality_score" else ranking
            if key not in numbers:
                numbers[key] = _numbers_of(quality, ranking)
    return numbers, quality


def _numbers_of(quality: MaskQuality, ranking: str) -> dict[str, float]:
    numbers = {
        "ap": quality.overall.ap[ranking],
        **{f"ap{k}": quality.by_threshold[f"0.{k}"].ap[ranking] for k in (50, 75)},
    }
    if ranking in quality.overall.gap_closed:
        numbers["gap_closed"] = quality.overall.gap_closed[ranking]
    if ranking in quality.calibration:
        errors = quality.calibration[ranking]
        numbers["laece"] = errors.laece
        for k in (50, 75):
            numbers |= {f"ece{k}": errors.ece[f"0.{k}"], f"brier{k}": errors.brier[f"0.{k}"]}
    if ranking == "quality_score":
        numbers["laece_iou"] = quality.calibration["expected_iou"].laece
    return numbers


def measure_precisions(
    val: Found, calibrators: Mapping[str, MaskCalibrator]
) -> dict[str, dict[str, list[float | None]]]:
    """
    Do the thresholds of a calibrator keep their word on new images?

    Args:
        val: detections that no calibrator was fitted to.
        calibrators: by name.

    Returns:
        {calibrator: {IoU: precisions in percent}}, for the IoUs "0.50" and "0.75" and each of
        PRECISIONS that was wanted; None where no threshold reaches it.
    """
    overlaps, limit = val.ranking.overlaps, val.ranking.max_dets[-1]
    reached: dict[str, dict[str, list[float | None]]] = {}
    for name, calibrator in calibrators.items():
        probs = calibrator.probs(val.samples.cues, val.samples.score_log_odds).numpy()
        reached[name] = {}
        for iou in (0.50, 0.75):
            index = iou_index(iou)
            thresholds = IOU_THRESHOLDS[[index]]
            (right,), (counted,) = right_detections(overlaps, probs[:, index], limit, thresholds)
            precisions: list[float | None] = []
            for wanted in PRECISIONS:
                threshold = calibrator.accept_thresholds[index, wanted - 1].item()
                accepted = counted & (probs[:, index] >= threshold)
                share = 100 * float(right[accepted].mean()) if accepted.any() else None
                precisions.append(share)
            reached[name][f"{iou:.2f}"] = precisions
    return reached


def measure_cues(holdout: Found, val: Found, seed: int) -> dict[str, float]:
    """{set of cues: mask AP on val of a calibrator that knows only these}."""
    aps = {}
    for name, names in CUE_SETS.items():
        calibrator = MaskCalibrator()
        fit_calibrator(calibrator, with_cues(holdout.samples, names), seed=seed)
        aps[name] = _mask_ap(calibrator, val.ranking, with_cues(val.samples, names))
    return aps


def with_cues(samples: Samples, names: Collection[str]) -> Samples:
    """The same detections, but the other cues have the same value for all of them."""
    known = torch.tensor([name in names for name in CUES])
    score = samples.score_log_odds
    if "mask_iou" not in names:  # the mask score knows it, too
        score = samples.cues[:, list(CUES).index("class_log_odds")]
    return replace(samples, cues=torch.where(known, samples.cues, 0), score_log_odds=score)


def measure_amounts(found: Mapping[str, Found], seed: int) -> list[dict[str, Any]]:
    """
    How much a calibrator gains on val that was fitted to few images.

    Returns:
        for each number of images of "holdout"; for as many images of "train" as "holdout" has, and
        for as many as `msrcnn-d2 calibrate` takes, if there are more: what :func:`calibrate`
        returns, the "part", "ap" and "ap_with_network". The last is that of a calibrator that ranks
        anew even if cross-validation advises against it.
    """
    val, num_holdout = found["val"], len(found["holdout"].image_ids)
    sizes = [("holdout", n) for n in NUM_IMAGES if n < num_holdout] + [("train", num_holdout)]
    if len(found["train"].image_ids) > MAX_IMAGES:
        sizes.append(("train", MAX_IMAGES))
    rows = []
    for part, number in sizes:
        ids = random.Random(seed).sample(found[part].image_ids, number)
        chosen = found[part].in_images(ids)
        calibrator, fit = calibrate(chosen, seed)
        ap = ap_with_network = _mask_ap(calibrator, val.ranking, val.samples)
        if not fit["with_network"]:
            fit_calibrator(calibrator, chosen.samples, seed=seed)
            ap_with_network = _mask_ap(calibrator, val.ranking, val.samples)
        rows.append({"part": part, **fit, "ap": ap, "ap_with_network": ap_with_network})
    return rows


def _mask_ap(calibrator: MaskCalibrator, ranking: AveragePrecision, samples: Samples) -> float:
    scores = calibrator.probs(samples.cues, samples.score_log_odds).mean(dim=1)
    return 100 * ranking.evaluate(scores.tolist()).numbers["AP"]


def measure_transfer(
    val: Found,
    calibrators: Mapping[str, MaskCalibrator],
    groups: Mapping[str, Collection],
) -> dict[str, dict[str, dict[str, float]]]:
    """
    What calibrators are worth on images of another kind than those that they were fitted to.

    Args:
        groups: {name: ids of images}

    Returns:
        {group of images: as :func:`measure_rankings`}
    """
    return {
        name: measure_rankings(val.in_images(ids), calibrators)[0] for name, ids in groups.items()
    }
