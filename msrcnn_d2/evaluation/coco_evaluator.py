"""COCO evaluation for models that score their masks: boxes by class score, masks by mask score."""

import copy
import json
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence

import torch

from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

from ..class_names import match, obstacle, same
from ..utils.errors import UserError
from .average_precision import (
    COCO_MAX_DETS,
    Engine,
    Evaluation,
    build_engine,
    choose_engine,
    coco_numbers,
)
from .mask_encoding import encode_predicted_masks
from .mask_quality import MaskQuality, scores_of
from .matching import MaskOverlaps

__all__ = ["MaskScoringCOCOEvaluator"]

logger = logging.getLogger(__name__)


class MaskScoringCOCOEvaluator(COCOEvaluator):
    """
    :class:`COCOEvaluator` that ranks boxes by "scores" and masks by "mask_scores".

    Its results are "bbox", "segm" and, so that every evaluation shows what mask scoring brought,
    "segm_by_class_score": the mask AP of the very same masks ranked by "scores"; and
    "mask_quality", what the scores say about the masks (:meth:`MaskQuality.headline`). For a model
    without mask scores it equals `COCOEvaluator`, with "mask_quality" besides.

    With an `output_dir` it writes, besides the files of `COCOEvaluator`, what a COCO server takes:
    "coco_bbox_results.json" with class scores, "coco_segm_results.json" with mask scores. The
    entries of "coco_instances_results.json" have both, as "score" and "mask_score", and
    "pred_mask_iou".

    Where more than 100 detections of an image count, "AP" and what else has no limit in its name
    count all of them, and "AP@100", "AP50@100" and "AP75@100" are the numbers to compare with
    others'.

    "pred_masks" may be full-size masks, or the `ROIMasks` (probabilities) of "pred_boxes".
    """

    def __init__(
        self,
        *args,
        engine: str | None = None,
        use_fast_impl: bool | None = None,
        mask_quality: bool = True,
        max_dets_per_image: int | None = None,
        class_names: Sequence[str] | None = None,
        **kwargs,
    ):
        """
        Args:
            args, kwargs: those of `COCOEvaluator`.
            engine: what computes AP, "faster-coco-eval" or "pycocotools"; by default the first
                if it is installed. The numbers are the same up to the rounding of float64. AP of
                keypoints always takes pycocotools.
            use_fast_impl: as in Detectron2 False asks for the official implementation, here
                engine="pycocotools".
            max_dets_per_image: of each image and class, so many detections count, the best ones; by
                default 100, with a warning where there are more.
            class_names: of the model, if the dataset may have others: see `use_class_names`.
            mask_quality: whether to measure it. After an evaluation of masks all of it is in the
                attribute `mask_quality`, on the main process; else that is None.

        Raises:
            ValueError: if the engine is unknown, not installed or not what `use_fast_impl` says; or
                if `max_dets_per_image` is not a whole number from 1 on.
            UserError: from :meth:`use_class_names`.
        """
        limit = max_dets_per_image
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"max_dets_per_image is a whole number from 1 on, not {limit!r}.")
        if use_fast_impl is False and engine is None:
            engine = "pycocotools"
        official = engine == "pycocotools"
        if use_fast_impl is not None and use_fast_impl == official:
            raise ValueError(
                f"engine='{engine}' contradicts use_fast_impl={use_fast_impl}: give only `engine`."
            )
        self._engine = choose_engine(engine)
        # Detectron2's own fast implementation is not used: it is not part of every build
        super().__init__(*args, use_fast_impl=False, max_dets_per_image=limit, **kwargs)
        self._limit_is_default = limit is None
        for annotation in self._coco_api.dataset.get("annotations", []):
            annotation.setdefault("iscrowd", 0)  # as in training
        self._measures_mask_quality = mask_quality
        self.mask_quality: MaskQuality | None = None
        self._class_in_dataset: torch.Tensor | None = None
        if class_names is not None:
            self.use_class_names(class_names)

    def use_class_names(self, class_names: Sequence[str]) -> None:
        """
        Find the model's classes in the dataset by name. Predictions of classes that the dataset
        does not have are left out; objects of classes that the model does not know are missed.

        Args:
            class_names: of the model, in the order of its classes.

        Raises:
            UserError: the names are the same in another order, or none is the same.
        """
        own = self._metadata.get("thing_classes")
        if own is None:  # until Detectron2 has loaded the dataset, which takes them from the file
            categories = self._coco_api.dataset.get("categories", [])
            own = [c["name"] for c in sorted(categories, key=lambda c: c["id"])]
        self._class_in_dataset = None
        if not own or same(own, class_names):
            return
        dataset = f"dataset '{self._metadata.get('name')}'"
        why_not = obstacle("the model", class_names, dataset, own)
        if why_not:
            raise UserError(
                f"{why_not} Evaluate on annotations with the model's names, in the order of their "
                "ids."
            )
        positions = match(class_names, own)
        self._class_in_dataset = torch.tensor([-1 if k is None else k for k in positions])
        left_out = [name for name, k in zip(class_names, positions) if k is None]
        if left_out:
            logger.info(
                "Predictions of classes that %s does not have are left out: %s.",
                *(dataset, ", ".join(left_out)),
            )
        unknown = [name for name in own if name not in class_names]
        if unknown:
            logger.warning(
                "Classes of %s that the model does not know, so that all their objects count as "
                "missed: %s.",
                *(dataset, ", ".join(unknown)),
            )

    def reset(self):
        super().reset()
        self.mask_quality = None

    def process(self, inputs, outputs):
        outputs = [self._with_classes_of_dataset(_on_cpu(x)) for x in outputs]
        first = len(self._predictions)
        super().process(inputs, [_without_masks(x) for x in outputs])
        # The base class skips outputs that it knows nothing to do with
        known = [x for x in outputs if "instances" in x or "proposals" in x]
        for prediction, output in zip(self._predictions[first:], known):
            if "instances" in output:
                _attach_masks(prediction["instances"], output["instances"])

    def _with_classes_of_dataset(self, output: dict) -> dict:
        if self._class_in_dataset is None or "instances" not in output:
            return output
        instances = output["instances"]
        classes = self._class_in_dataset[instances.pred_classes]
        kept = instances[classes >= 0]
        kept.pred_classes = classes[classes >= 0]
        return {**output, "instances": kept}

    def _eval_predictions(self, predictions, img_ids=None):
        logger.info("Preparing results for COCO format ...")
        results = self._with_dataset_categories(predictions)
        if self._output_dir:
            self._write_files(results)
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        if self._limit_is_default:
            _warn_of_more_than(self._max_dets_per_image[-1], results)
        logger.info("Evaluating predictions with %s ...", self._engine)
        for task in sorted(self._tasks or self._tasks_from_predictions(results)):
            if task == "keypoints":
                self._results[task] = self._keypoint_results(predictions, img_ids)
            elif not results:
                self._results[task] = self._derive_coco_results(None, task)
            else:
                self._results.update(self._ranked_results(task, results, img_ids))

    def _with_dataset_categories(self, predictions: list[dict]) -> list[dict]:
        """Copies of all results, with category ids of the dataset instead of classes."""
        results = [dict(r) for x in predictions for r in x["instances"]]
        classes = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if classes is None:
            return results
        categories = {class_: category for category, class_ in classes.items()}
        for result in results:
            class_ = result["category_id"]
            if class_ not in categories:
                raise ValueError(
                    f"A prediction has class {class_}, but the dataset has {len(categories)} "
                    "classes, counted from 0: set the number of classes of the model to that."
                )
            result["category_id"] = categories[class_]
        return results

    def _ranked_results(self, task: str, results: list[dict], img_ids) -> dict[str, dict]:
        """AP of a task; of masks that have mask scores, under both rankings, and their quality."""
        limits = self._max_dets_per_image
        if limits[-1] > COCO_MAX_DETS[-1]:
            limits = [*COCO_MAX_DETS, limits[-1]]
        engine = build_engine(self._coco_api, results, task, self._engine, limits, img_ids)
        scores = scores_of(results)
        evaluations = {"class_score": engine.evaluate(scores["class_score"])}
        by_class_score = self._results_of(evaluations["class_score"], task)
        if task != "segm":
            return {task: by_class_score}
        if "mask_score" in scores:
            logger.info("Masks ranked by mask score, class score x predicted mask IoU ** exponent:")
            evaluations["mask_score"] = engine.evaluate(scores["mask_score"])
            by_mask_score = self._results_of(evaluations["mask_score"], task)
            ranked = {"segm": by_mask_score, "segm_by_class_score": by_class_score}
        else:
            ranked = {"segm": by_class_score}
        if self._measures_mask_quality:
            self.mask_quality = self._mask_quality_of(engine, results, evaluations, img_ids)
            logger.info("Quality of masks:\n%s", self.mask_quality.table())
            ranked["mask_quality"] = self.mask_quality.headline()
        return ranked

    def _mask_quality_of(self, engine: Engine, results, evaluations, img_ids) -> MaskQuality:
        overlaps = MaskOverlaps(self._coco_api, results)
        evaluations = {**evaluations, "true_iou": engine.evaluate(overlaps.largest)}
        max_dets = self._max_dets_per_image[-1]
        return MaskQuality(self._coco_api, results, evaluations, overlaps, max_dets, img_ids)

    def _results_of(self, evaluation: Evaluation, task: str) -> dict[str, float]:
        recalls = {k: 100 * v for k, v in evaluation.numbers.items() if k.startswith("AR")}
        logger.info("Average recall for %s:\n%s", task, create_small_table(recalls))
        class_names = self._metadata.get("thing_classes")
        numbers = self._derive_coco_results(evaluation, task, class_names=class_names)
        if self._max_dets_per_image[-1] > COCO_MAX_DETS[-1]:
            number_of_limits = len(COCO_MAX_DETS)
            at_100 = coco_numbers(
                evaluation.eval["precision"][..., :number_of_limits],
                evaluation.eval["recall"][..., :number_of_limits],
                COCO_MAX_DETS,
            )
            numbers.update({f"{k}@100": 100 * at_100[k] for k in ("AP", "AP50", "AP75")})
        return numbers

    def _keypoint_results(self, predictions: list[dict], img_ids) -> dict[str, float]:
        """Those of the base class, for a copy, since it changes the predictions."""
        predictions = [{"instances": [dict(r) for r in x["instances"]]} for x in predictions]
        evaluator = copy.copy(self)  # shares the ground truth
        evaluator._tasks, evaluator._results = ("keypoints",), OrderedDict()
        evaluator._output_dir = None  # the files are written already
        COCOEvaluator._eval_predictions(evaluator, predictions, img_ids)
        return evaluator._results["keypoints"]

    def _write_files(self, results: list[dict]) -> None:
        logger.info("Saving results to %s", self._output_dir)
        self._write_json("coco_instances_results.json", results)
        for task, part in (("bbox", "bbox"), ("segm", "segmentation")):
            if any(part in r for r in results):
                entries = [_server_entry(r, part) for r in results]
                self._write_json(f"coco_{task}_results.json", entries)

    def _write_json(self, name: str, entries: list[dict]) -> None:
        with PathManager.open(os.path.join(self._output_dir, name), "w") as f:
            f.write(json.dumps(entries))


def _warn_of_more_than(limit: int, results: list[dict]) -> None:
    counts = Counter((r["image_id"], r["category_id"]) for r in results)
    most = max(counts.values(), default=0)
    if most > limit:
        logger.warning(
            "An image has %d detections of one class, of which the best %d count: "
            "max_dets_per_image=%d counts all of them.",
            *(most, limit, most),
        )


def _on_cpu(output: dict) -> dict:
    if "instances" not in output:
        return output
    return {**output, "instances": output["instances"].to("cpu")}


def _without_masks(output: dict) -> dict:
    """A copy of what a model gives for an image, whose masks the base class does not encode."""
    if "instances" not in output:
        return output
    instances = output["instances"]
    fields = {k: v for k, v in instances.get_fields().items() if k != "pred_masks"}
    return {**output, "instances": Instances(instances.image_size, **fields)}


def _attach_masks(results: list[dict], instances: Instances) -> None:
    """Add masks and mask scores to what the base class has made of the instances."""
    if instances.has("pred_masks"):
        for result, rle in zip(results, encode_predicted_masks(instances)):
            result["segmentation"] = rle
    if instances.has("mask_scores"):
        scores, ious = instances.mask_scores.tolist(), instances.pred_mask_ious.tolist()
        for result, mask_score, mask_iou in zip(results, scores, ious):
            result.update(mask_score=mask_score, pred_mask_iou=mask_iou)


def _mask_score(result: dict) -> float:
    return result.get("mask_score", result["score"])


def _server_entry(result: dict, part: str) -> dict:
    score = result["score"] if part == "bbox" else _mask_score(result)
    return {
        "image_id": result["image_id"],
        "category_id": result["category_id"],
        part: result[part],
        "score": score,
    }
