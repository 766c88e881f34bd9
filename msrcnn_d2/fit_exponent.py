"""
Fit how much the predicted IoU counts in the ranking of masks: class score x mask IoU ** exponent.

In the paper the exponent is 1; with 0 only the class score counts. The best one depends on how well
the MaskIoU head has learned. The mask AP of the model's predictions under each exponent shows it,
without any training. The command is `msrcnn-d2 fit-exponent`.

Never fit on the images that you report results of: their AP would be too good. Hold out a part of
the training images, as a dataset that you neither train on nor report.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pycocotools.coco import COCO
from tqdm import tqdm

from .evaluation.average_precision import AveragePrecision
from .utils.errors import UserError

__all__ = ["EXPONENTS", "ExponentFit", "check_exponent", "fit_exponent"]

EXPONENTS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)
CLASS_SCORE, PAPER = 0.0, 1.0  # what every fit is compared with


@dataclass
class ExponentFit:
    """
    Attributes:
        exponent: the best one.
        curve: for each exponent, ascending, "AP" (mean over IoU 0.50:0.95), "AP50" and "AP75" of
            masks in percent.
    """

    exponent: float
    curve: dict[float, dict[str, float]]

    @property
    def gain(self) -> float:
        """How much mask AP, in percent, it adds to that of the paper's exponent."""
        return self.curve[self.exponent]["AP"] - self.curve[PAPER]["AP"]


def fit_exponent(
    coco_gt: COCO,
    results: Sequence[dict],
    exponents: Sequence[float] = EXPONENTS,
    max_dets: int = 100,
    engine: str | None = None,
    progress: bool = False,
) -> ExponentFit:
    """
    Find the exponent of the mask IoU that ranks masks best.

    Args:
        coco_gt: the ground truth of images that you neither train on nor report results of.
        results: detections of a mask-scoring model in COCO's result format, with "score" (the
            class score), "pred_mask_iou" and "segmentation" (compressed RLE).
        exponents: what to try in addition to 0 and 1.
        max_dets: how many detections of each image and class count, those with the best scores.
        engine: "faster-coco-eval", "pycocotools", or None for the first one that is installed.
        progress: whether to show a bar.

    Returns:
        the exponent with the highest mask AP, and the AP of all. Of several with the same AP it is
        the one nearest to 1, as a ratio; 0 is farther away than any other.

    Raises:
        UserError: an exponent is not a finite number of at least 0, results lack "pred_mask_iou",
            or there is no object to find.
        ValueError: from :class:`AveragePrecision`.
    """
    for exponent in exponents:
        check_exponent(exponent)
    grid = sorted({CLASS_SCORE, PAPER, *map(float, exponents)})
    scores, ious = _scores_and_ious(results)
    ranking = AveragePrecision(coco_gt, results, "segm", engine, [max_dets])
    curve = {}
    for exponent in tqdm(grid, desc="exponents", leave=False, disable=not progress):
        factors = ious if exponent == PAPER else ious**exponent
        numbers = ranking.evaluate((scores * factors).tolist()).numbers
        curve[exponent] = {name: 100 * numbers[name] for name in ("AP", "AP50", "AP75")}
    if math.isnan(curve[PAPER]["AP"]):
        raise UserError(
            "The annotations have no object to find but crowds: give those of the images that were "
            "predicted on."
        )

    def preference(exponent: float) -> tuple[float, float, float]:
        """Smallest for the best: the one with the highest AP up to rounding, then nearest to 1."""
        distance = abs(math.log(exponent)) if exponent else math.inf
        return -round(curve[exponent]["AP"], 9), distance, exponent

    return ExponentFit(min(grid, key=preference), curve)


def check_exponent(exponent: float) -> None:
    """Raise UserError unless the exponent is a finite number of at least 0."""
    if not (math.isfinite(exponent) and exponent >= 0):
        raise UserError(f"An exponent is a finite number of at least 0, not {exponent:g}.")


def _scores_and_ious(results: Sequence[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Class scores and predicted IoUs, float64 of shape (N,)."""
    if not results:
        raise UserError("There are no predictions to rank.")
    ious = [r.get("pred_mask_iou") for r in results]
    if any(iou is None for iou in ious):
        raise UserError(
            "The predictions have no 'pred_mask_iou', so they come from a plain Mask R-CNN, or are "
            "meant for a COCO server: give inference/coco_instances_results.json of a "
            "mask-scoring model."
        )
    if not all(isinstance(iou, (int, float)) and 0 <= iou <= 1 for iou in ious):
        raise UserError("A 'pred_mask_iou' of the predictions is not a number from 0 to 1.")
    scores = torch.tensor([r["score"] for r in results], dtype=torch.float64)
    return scores, torch.tensor(ious, dtype=torch.float64)
