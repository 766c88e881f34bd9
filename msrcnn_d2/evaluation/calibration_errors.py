"""Are scores honest? Calibration errors of scores, and of the probability that a mask is right."""

from dataclasses import dataclass

import numpy as np

from .matching import Overlaps
from .score_statistics import mean

__all__ = [
    "PROBABILITY_IOUS",
    "CalibrationErrors",
    "brier_score",
    "iou_targets",
    "localisation_aware_errors",
]

NUM_BINS = 25
PROBABILITY_IOUS = (0.5, 0.75)


@dataclass
class CalibrationErrors:
    """
    How far a score is from the truth. All are 0 for a perfect score.

    Attributes:
        laece, laace: LaECE_0 and LaACE_0, see :func:`localisation_aware_errors`; NaN where no class
            with objects has detections.
        brier: {IoU threshold: Brier score}, for "0.50" and "0.75", of the probability that a
            detection is right at this threshold if the best masks choose objects first
            (:func:`right_detections` of :attr:`Overlaps.largest`), so that no score decides which
            of two duplicates is right. For the calibrated score these are the calibrator's
            "mask_iou_probs". Other scores are read as if they were this probability. NaN
            without detections; empty for the expected IoU, which is made of these probabilities.
        ece: {IoU threshold: expected calibration error over ten bins} of the same probability.
    """

    laece: float
    laace: float
    brier: dict[str, float]
    ece: dict[str, float]


def iou_targets(
    overlaps: Overlaps, scores: np.ndarray, max_dets: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """
    What a localisation-aware score should say: the IoU of a true positive, 0 of a false positive.

    Detections choose objects in the order of `scores`, as in :meth:`Overlaps.match` with the IoU
    threshold 0. So a duplicate is a false positive, however well it fits. A detection without any
    pixel in common with a free object takes none.

    Args:
        scores: N, the scores that are to be measured.
        max_dets: how many detections of each image and class count, those with the best scores.

    Returns:
        N IoUs in [0, 1]; and N bools, whether a detection counts. Detections that are matched with
        a crowd or that exceed the limit do not.
    """
    matches = overlaps.match(scores, [0], max_dets)
    return np.nan_to_num(matches.ious[0]), ~matches.ignored[0] & ~matches.beyond


def localisation_aware_errors(
    scores: np.ndarray, targets: np.ndarray, class_indices: np.ndarray
) -> tuple[float, float]:
    """
    LaECE_0 and LaACE_0 of Kuzucu, Oksuz, Sadeghi and Dokania, "On Calibration of Object Detectors:
    Pitfalls, Evaluation and Baselines", ECCV 2024 (arXiv 2405.20459).

    LaECE_0 puts the detections of a class in 25 bins of equal width by their score. The error of a
    bin is the absolute difference of mean score and mean target, where the mean target is precision
    x mean IoU of the true positives; a class has the mean of its bins, weighted by their
    detections. LaACE_0 is the mean absolute difference of score and target over the detections of a
    class. Both are averaged over classes.

    Where the paper leaves a choice: as in the authors' code, a score on the edge of two bins
    belongs to the lower one, and classes without objects or without detections are not in the
    mean (leave the former out of the arguments). Unlike there, IoUs are those of masks, a class
    without any error counts, and no detections are removed by a threshold first.

    Args:
        scores: N, in [0, 1]. Others are put in the first or the last bin.
        targets: N, see :func:`iou_targets`.
        class_indices: N, from 0 on.

    Returns:
        LaECE_0 and LaACE_0, NaN without detections.
    """
    edges = np.linspace(0, 1, NUM_BINS + 1)
    bins = np.clip(np.searchsorted(edges, scores) - 1, 0, NUM_BINS - 1)
    errors = scores - targets
    counts = np.bincount(class_indices)
    cells = class_indices * NUM_BINS + bins
    # n / N |mean score - mean target| of a bin is |sum of errors| / N
    of_bins = np.bincount(cells, errors, len(counts) * NUM_BINS).reshape(-1, NUM_BINS)
    seen = counts > 0
    of_classes = np.abs(of_bins).sum(axis=1)[seen] / counts[seen]
    absolute = np.bincount(class_indices, np.abs(errors))[seen] / counts[seen]
    return mean(of_classes), mean(absolute)


def brier_score(probs: np.ndarray, right: np.ndarray) -> float:
    """
    The mean squared difference of a probability and what happened, 1 or 0 (Brier, 1950); NaN
    without detections. Always saying the base rate p gives p (1 - p).
    """
    return mean((probs - right) ** 2)
