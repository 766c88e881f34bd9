"""COCO evaluation for models that score their masks: boxes by class score, masks by mask score."""

import contextlib
import copy
import io
import json
import logging
import os
from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager

__all__ = ["MaskScoringCOCOEvaluator", "mask_ap", "true_mask_ious"]

logger = logging.getLogger(__name__)


class MaskScoringCOCOEvaluator(COCOEvaluator):
    """
    :class:`COCOEvaluator` that ranks boxes by "scores" and masks by "mask_scores".

    Its results are "bbox", "segm" and, so that every evaluation shows what mask scoring brought,
    "segm_by_class_score": the mask AP of the very same masks ranked by "scores". For a model
    without mask scores it equals `COCOEvaluator`.

    With an `output_dir` it writes, besides the files of `COCOEvaluator`, what a COCO server takes:
    "coco_bbox_results.json" with class scores, "coco_segm_results.json" with mask scores. The
    entries of "coco_instances_results.json" have both, as "score" and "mask_score", and
    "pred_mask_iou".

    All arguments are those of `COCOEvaluator`.
    """

    def process(self, inputs, outputs):
        first = len(self._predictions)
        super().process(inputs, outputs)
        # The base class skips outputs that it knows nothing to do with
        known = [x for x in outputs if "instances" in x or "proposals" in x]
        for prediction, output in zip(self._predictions[first:], known):
            instances = output.get("instances")
            if instances is not None and instances.has("mask_scores"):
                _attach_mask_scores(prediction["instances"], instances)

    def _eval_predictions(self, predictions, img_ids=None):
        # Copied first: the base class translates the category ids of `predictions` in place
        by_mask_score = [
            {**x, "instances": [_ranked_by_mask_score(r) for r in x["instances"]]}
            for x in predictions
        ]
        results = [r for x in predictions for r in x["instances"]]
        # Asked first: pycocotools gives results without masks the outlines of their boxes, in place
        parts = [p for p in ("bbox", "segmentation") if any(p in r for r in results)]
        super()._eval_predictions(predictions, img_ids)
        if self._output_dir:
            self._write_server_files(results, parts)
        if "segm" in self._results and any("mask_score" in r for r in results):
            self._results["segm_by_class_score"] = self._results["segm"]
            self._results["segm"] = self._mask_results(by_mask_score, img_ids)

    def _mask_results(self, predictions, img_ids):
        """Mask AP, as the base class computes it, of predictions under another score."""
        logger.info("Masks ranked by mask score, which is class score x predicted mask IoU:")
        ranking = copy.copy(self)  # shares the ground truth
        ranking._tasks = ("segm",)
        ranking._output_dir = None  # the files are written already
        ranking._results = OrderedDict()
        COCOEvaluator._eval_predictions(ranking, predictions, img_ids)
        return ranking._results["segm"]

    def _write_server_files(self, results, parts):
        for part in parts:
            task = {"bbox": "bbox", "segmentation": "segm"}[part]
            path = os.path.join(self._output_dir, f"coco_{task}_results.json")
            with PathManager.open(path, "w") as f:
                json.dump([_server_entry(r, part) for r in results], f)


def _attach_mask_scores(results, instances):
    scores, ious = instances.mask_scores.tolist(), instances.pred_mask_ious.tolist()
    for result, mask_score, mask_iou in zip(results, scores, ious):
        result.update(mask_score=mask_score, pred_mask_iou=mask_iou)


def _ranked_by_mask_score(result: dict) -> dict:
    return {**result, "score": result.get("mask_score", result["score"])}


def _server_entry(result: dict, part: str) -> dict:
    if part == "segmentation":
        result = _ranked_by_mask_score(result)
    return {key: result[key] for key in ("image_id", "category_id", part, "score")}


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
    coco_gt: COCO, results: Sequence[dict], scores: Sequence[float], max_dets: int = 100
) -> dict[str, float]:
    """
    Mask AP that a ranking gives to masks.

    Args:
        coco_gt: the ground truth.
        results: detections in COCO's result format, with "segmentation".
        scores: the number to rank each result by, instead of its "score".
        max_dets: of each image, only so many of each class count, the best ones.

    Returns:
        "AP" (mean over IoU 0.50:0.95), "AP50" and "AP75" in percent; NaN if there is nothing to
        compare.
    """
    if not results:
        return dict.fromkeys(("AP", "AP50", "AP75"), float("nan"))
    # With a bbox, COCO would take the area of the box for that of the mask
    ranked = [
        {**{k: v for k, v in r.items() if k != "bbox"}, "score": s} for r, s in zip(results, scores)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco_gt, coco_gt.loadRes(ranked), "segm")
        evaluation.params.maxDets = [max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
    # By IoU threshold, recall, class, size of the objects (0: all) and number of detections
    precision = evaluation.eval["precision"][..., 0, 0]
    parts = {"AP": precision, "AP50": precision[0], "AP75": precision[5]}
    return {name: 100 * _mean_of_defined(part) for name, part in parts.items()}


def _mean_of_defined(precision: np.ndarray) -> float:
    defined = precision[precision >= 0]  # -1 for classes without objects
    return float(defined.mean()) if len(defined) else float("nan")
