"""How good masks are, and the mask AP that a ranking gives to them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Optional

import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from .coco_engine import build_engine

__all__ = ["mask_ap", "true_mask_ious"]


def true_mask_ious(coco_gt: COCO, results: Sequence[dict]) -> list[float]:
    """
    The score that the MaskIoU head tries to predict, from ground truth.

    Args:
        coco_gt: the ground truth.
        results: detections in COCO's result format, with "segmentation" as RLE.

    Returns:
        for each result the largest IoU of its mask with an object of its class in its image, in
        [0, 1]; 0 without such an object. With a crowd it is, as everywhere in COCO, the share of
        the mask that lies in the crowd.
    """
    groups = defaultdict(list)
    for index, result in enumerate(results):
        groups[result["image_id"], result["category_id"]].append(index)
    ious = [0.0] * len(results)
    for (image_id, category_id), indices in groups.items():
        annotations = coco_gt.loadAnns(coco_gt.getAnnIds(imgIds=image_id, catIds=category_id))
        if annotations:
            table = mask_util.iou(
                [results[i]["segmentation"] for i in indices],
                [coco_gt.annToRLE(a) for a in annotations],
                [a.get("iscrowd", 0) for a in annotations],
            )
            for index, iou in zip(indices, table.max(axis=1).tolist()):
                ious[index] = iou
    return ious


def mask_ap(
    coco_gt: COCO,
    results: Sequence[dict],
    scores: Sequence[float],
    max_dets: int = 100,
    engine: Optional[str] = None,
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
