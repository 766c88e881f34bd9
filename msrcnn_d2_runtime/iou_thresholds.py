"""COCO's IoU thresholds, from 0.50 to 0.95, which many arrays have a row or a column for."""

import numpy as np

from .errors import UserError

__all__ = ["IOU_THRESHOLDS", "iou_index"]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # as in COCO, 0.05 apart


def iou_index(iou: float) -> int:
    """
    The index of an IoU among COCO's thresholds 0.50, 0.55, ..., 0.95.

    Raises:
        UserError: it is none of them.
    """
    (found,) = np.isclose(IOU_THRESHOLDS, iou, rtol=0, atol=1e-6).nonzero()
    if not len(found):
        raise UserError(f"{iou} is none of COCO's IoUs: choose 0.50, 0.55, ... or 0.95.")
    return int(found[0])
