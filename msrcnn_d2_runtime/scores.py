"""The scores that a detection can have, and their names everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["MASK_IOU_PROBS", "RANKINGS", "SCORES", "TITLES", "Score", "scores_of"]


@dataclass(frozen=True)
class Score:
    """
    Attributes:
        key: its name in results in COCO's format.
        field: its name in predicted `Instances`.
        title: what people read.
        ranks: whether masks are ranked by it.
    """

    key: str
    field: str
    title: str
    ranks: bool = True


# A model has the first, and any of the others
SCORES = {
    "class_score": Score("score", "scores", "class score"),
    "predicted_iou": Score("pred_mask_iou", "pred_mask_ious", "predicted IoU", ranks=False),
    "mask_score": Score("mask_score", "mask_scores", "mask score"),
    "quality_score": Score("quality_score", "quality_scores", "calibrated score"),
    "expected_iou": Score("expected_iou", "expected_mask_ious", "expected IoU", ranks=False),
}
# The probabilities that the calibrated score is the mean of have the same name in both places
MASK_IOU_PROBS = "mask_iou_probs"
# How masks can be ranked; "true_iou" gives the ceiling
RANKINGS = (*(name for name, score in SCORES.items() if score.ranks), "true_iou")
TITLES = {name: score.title for name, score in SCORES.items()} | {"true_iou": "true IoU (ceiling)"}


def scores_of(results: Sequence[dict]) -> dict[str, np.ndarray]:
    """The scores that all of the results have: {score: N values}."""
    return {
        name: np.array([r[score.key] for r in results], dtype=float)
        for name, score in SCORES.items()
        if all(score.key in r for r in results)
    }
