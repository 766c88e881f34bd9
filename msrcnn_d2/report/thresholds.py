"""Which threshold on which score? The numbers of that section of the report."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from msrcnn_d2_runtime.iou_thresholds import IOU_THRESHOLDS, iou_index
from msrcnn_d2_runtime.scores import MASK_IOU_PROBS, TITLES

from ..evaluation.mask_quality import MaskQuality
from ..evaluation.matching import right_detections
from ..evaluation.operating_points import OperatingPoint, ThresholdCurve

__all__ = ["ThresholdedScore", "readable_thresholds", "thresholded_scores"]

IOUS = [f"{t:.2f}" for t in IOU_THRESHOLDS]
SHOWN_IOUS = ("0.50", "0.75", "0.90")
# Rows of the table, for scores from 0 to 1
ROWS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass
class ThresholdedScore:
    """
    A score, and what thresholds on it do.

    Attributes:
        name, title: of the score.
        curves: {IoU: curve}, for "0.50", "0.55", ... "0.95", all with the same thresholds.
        iou: the IoU of the operating point, one of these.
        point: where to accept, and where to drop.
    """

    name: str
    title: str
    curves: dict[str, ThresholdCurve]
    iou: str
    point: OperatingPoint

    def rows(self) -> list[dict[str, Any]]:
        """Some of the thresholds, with precision, its interval and objects found at SHOWN_IOUS."""
        thresholds = self.curves[self.iou].thresholds
        chosen = np.flatnonzero(np.isin(thresholds, ROWS))
        if len(chosen) < len(ROWS):  # a score with another range
            chosen = np.arange(0, len(thresholds), 20)
        shown = [self.curves[iou] for iou in SHOWN_IOUS]
        return [
            {
                "threshold": thresholds[k].item(),
                "detections": int(shown[0].counts[k]),
                "precision": dict(zip(SHOWN_IOUS, (float(c.precision[k]) for c in shown))),
                "interval": dict(zip(SHOWN_IOUS, (c.intervals[k].tolist() for c in shown))),
                "found": dict(zip(SHOWN_IOUS, (float(c.found[k]) for c in shown))),
            }
            for k in chosen
        ]

    def to_json(self) -> dict[str, Any]:
        """The operating point and the rows, with None in place of NaN."""
        numbers = {**asdict(self.point), "thresholds": self.rows()}
        return json.loads(json.dumps(numbers), parse_constant=lambda nan: None)

    def for_page(self) -> dict[str, Any]:
        """What the script in the page needs; ends of intervals in parts of a thousand."""
        curves = {
            iou: {
                "count": curve.counts.tolist(),
                "right": curve.right.tolist(),
                "low": _thousandths(curve.intervals[:, 0]),
                "high": _thousandths(curve.intervals[:, 1]),
            }
            for iou, curve in self.curves.items()
        }
        thresholds = self.curves[self.iou].thresholds.tolist()
        return {"title": self.title, "thresholds": thresholds, "curves": curves}


def thresholded_scores(
    quality: MaskQuality, precision: float = 0.95, iou: float = 0.75
) -> list[ThresholdedScore]:
    """
    Args:
        quality: has the detections and their scores.
        precision: the wanted precision, between 0 and 1.
        iou: one of COCO's IoU thresholds.

    Returns:
        an entry for the class score and, if the model has them, for the mask score, the calibrated
        score and the probability of a mask IoU of at least `iou`.

    Raises:
        UserError: the precision is not between 0 and 1, or the IoU is none of COCO's.
    """
    chosen = iou_index(iou)
    scores = {name: quality.scores[name] for name in quality.rankings}
    titles = dict(TITLES)
    if all(MASK_IOU_PROBS in r for r in quality.results):
        scores["mask_iou_prob"] = np.array([r[MASK_IOU_PROBS][chosen] for r in quality.results])
        titles["mask_iou_prob"] = f"P(IoU ≥ {IOUS[chosen]})"
    ids = np.array([r["image_id"] for r in quality.results])
    known = np.isin(ids, quality.average_precision.image_ids) & (quality.class_indices >= 0)
    entries = []
    for name, values in scores.items():
        overlaps = quality.average_precision.overlaps
        thresholds = readable_thresholds(values)
        curves = {}
        for t, right, counted in zip(IOUS, *right_detections(overlaps, values, quality.max_dets)):
            kept = counted & known
            curves[t] = ThresholdCurve(
                values[kept], right[kept], ids[kept], sum(quality.num_objects), thresholds
            )
        point = curves[IOUS[chosen]].operating_point(precision)
        entries.append(ThresholdedScore(name, titles[name], curves, IOUS[chosen], point))
    return entries


def readable_thresholds(scores: np.ndarray) -> np.ndarray:
    """
    Thresholds with few digits, ascending: for scores from 0 to 1 steps of 0.005, and finer ones
    near both ends, where many scores lie close together; for other scores 201 of equal distance.
    """
    if scores.min() < 0 or scores.max() > 1:
        return np.linspace(scores.min(), scores.max(), 201)
    near_0 = np.concatenate([np.arange(1, 10) / 10_000, np.arange(1, 10) / 1000])
    thresholds = np.concatenate([np.arange(201) / 200, near_0, 1 - near_0])
    return np.unique(thresholds.round(4))


def _thousandths(shares: np.ndarray) -> list[int | None]:
    return [None if np.isnan(x) else round(1000 * x) for x in shares.tolist()]
