"""Which predictions are returned, and in which order."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .errors import UserError
from .iou_thresholds import iou_index
from .scores import MASK_IOU_PROBS, SCORES

__all__ = [
    "NUM_PERCENTS",
    "SCORE_FIELDS",
    "UNREACHED",
    "Ranking",
    "check_ranking",
    "parse_operating_point",
    "rank_by_of",
]

logger = logging.getLogger(__name__)

NUM_PERCENTS = 99  # precisions of 1 % to 99 %
UNREACHED = 2.0  # a threshold above every probability: nothing is accepted

# {rank_by: the field of predictions that has it}
SCORE_FIELDS = {score.key: score.field for score in SCORES.values() if score.ranks}


@dataclass(frozen=True)
class Ranking:
    """
    Predictions are sorted by a score, and left out below a threshold.

    Attributes:
        rank_by: a key of `SCORE_FIELDS`.
        threshold: predictions with a lower value of `field` are left out.
        field: that is thresholded.
        column: index of the column of this field, or None if it has only one.
    """

    rank_by: str
    threshold: float
    field: str
    column: int | None = None

    @classmethod
    def of(
        cls, rank_by: str, score_threshold: float | str, accept_thresholds: np.ndarray | None
    ) -> "Ranking":
        """
        Args:
            rank_by: a key of `SCORE_FIELDS`.
            score_threshold: of the score that `rank_by` names; or for a model with a calibrator a
                precision, such as "p95@75".
            accept_thresholds: (10, 99), the table of the model's calibrator.

        Raises:
            UserError: no threshold reached this precision.
        """
        if not isinstance(score_threshold, str):
            return cls(rank_by, score_threshold, SCORE_FIELDS[rank_by])
        assert accept_thresholds is not None, "rank_by_of refuses a precision without a calibrator"
        precision, iou = parse_operating_point(score_threshold)
        row = accept_thresholds[iou_index(iou)]
        threshold = row[round(100 * precision) - 1].item()
        if threshold < UNREACHED:
            return cls(rank_by, threshold, MASK_IOU_PROBS, iou_index(iou))
        (reached,) = (row < UNREACHED).nonzero()
        highest = f"the highest is {reached[-1] + 1} %" if len(reached) else "nor was 1 %"
        raise UserError(
            f"A precision of {precision:.0%} at IoU {iou:.2f} was not reached when the model was "
            f"calibrated ({highest}): ask for a lower precision or a lower IoU."
        )

    def order(self, fields: Mapping[str, np.ndarray]) -> np.ndarray:
        """
        Args:
            fields: the scores by their names, whose first index counts the predictions.

        Returns:
            int array, the indices of the predictions that are returned, the best first.
        """
        thresholded = fields[self.field]
        if self.column is not None:
            thresholded = thresholded[:, self.column]
        order = np.argsort(-fields[SCORE_FIELDS[self.rank_by]], kind="stable")
        return order[thresholded[order] >= self.threshold]


def check_ranking(rank_by: str | None, score_threshold: float | str) -> None:
    """
    Check arguments of a predictor before its model is there.

    Raises:
        ValueError, UserError: they can be meant for no model.
    """
    if rank_by is not None and rank_by not in SCORE_FIELDS:
        raise ValueError(f"rank_by is one of {', '.join(SCORE_FIELDS)}, not '{rank_by}'.")
    if isinstance(score_threshold, str):
        parse_operating_point(score_threshold)


def rank_by_of(
    rank_by: str | None,
    score_threshold: float | str,
    has_mask_scores: bool,
    has_calibrator: bool,
) -> str:
    """
    Args:
        rank_by, score_threshold: arguments of a predictor, which have passed `check_ranking`.
        has_mask_scores, has_calibrator: what the model predicts.

    Returns:
        a key of `SCORE_FIELDS`: `rank_by`, or by default the best score that there is: the
        calibrated score, else the mask score, else the class score, which a warning tells.

    Raises:
        UserError: the model lacks the score or the calibrator that is asked for.
    """
    needs_calibrator = rank_by == "quality_score" or isinstance(score_threshold, str)
    if needs_calibrator and not has_calibrator:
        raise UserError(
            "This model has no calibrated scores: calibrate it with `msrcnn-d2 calibrate`, or "
            'rank by "mask_score" or "score" with a number as score_threshold.'
        )
    if rank_by is None and not (has_calibrator or has_mask_scores):
        logger.warning("This model does not score its masks: they are ranked by class score.")
        return "score"
    rank_by = rank_by or ("quality_score" if has_calibrator else "mask_score")
    if rank_by == "mask_score" and not has_mask_scores:
        raise UserError(
            "This model does not score its masks: rank them by class score with "
            'rank_by="score", or give it a mask IoU head (see add_mask_scoring).'
        )
    return rank_by


def parse_operating_point(text: str) -> tuple[float, float]:
    """
    Args:
        text: such as "p95@75" for a precision of 95 percent at an IoU of 0.75.

    Returns:
        precision and IoU, here (0.95, 0.75).

    Raises:
        UserError: the text means something else.
    """
    parts = re.fullmatch(r"p(\d{1,2})@(\d{2})", text)
    ious = range(50, 100, 5)
    if not parts or int(parts[1]) < 1 or int(parts[2]) not in ious:
        raise UserError(
            f"'{text}' is not an operating point: write p, a precision in percent from 1 to 99, @ "
            "and an IoU of 50, 55, ... or 95, such as p95@75 for 95 percent at IoU 0.75."
        )
    return int(parts[1]) / 100, int(parts[2]) / 100
