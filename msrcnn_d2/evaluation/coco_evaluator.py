"""COCO evaluation that ranks boxes by class score, and masks by every score that they have."""

import copy
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.utils.logger import create_small_table

from msrcnn_d2_runtime.scores import RANKINGS, TITLES, scores_of

from .average_precision import (
    COCO_MAX_DETS,
    AveragePrecision,
    Evaluation,
    choose_engine,
    coco_numbers,
)
from .instance_results import InstanceResults, check_limit
from .mask_quality import MaskQuality

__all__ = ["MaskScoringCOCOEvaluator", "check_settings"]

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm", "keypoints")
# Tasks that Detectron2 does not know, and those with the same metrics that it does
METRICS_OF = {"boundary": "segm"}
COCO_KEYPOINTS = 17


class MaskScoringCOCOEvaluator(InstanceResults, COCOEvaluator):
    """
    :class:`COCOEvaluator` that ranks boxes by "scores" and masks by "mask_scores".

    Its results are "bbox", "segm" and others that show what better scores gain:
    "segm_by_class_score", the AP of the same masks ranked by "scores"; "segm_by_quality_score",
    their AP ranked by "quality_scores", if the model has a calibrator; and "mask_quality", what the
    scores say about the masks (:meth:`MaskQuality.headline`). For a model without mask scores
    "segm" is ranked by "scores", as in `COCOEvaluator`. With `boundary_ap` there are also
    "boundary", "boundary_by_class_score" and "boundary_by_quality_score".

    With an `output_dir` it writes, besides the files of `COCOEvaluator`, the files that a COCO
    server takes: "coco_bbox_results.json" with class scores, "coco_segm_results.json" with mask
    scores, and "coco_segm_by_quality_score_results.json" with calibrated scores. The entries of
    "coco_instances_results.json" have all scores of the model ("score", "pred_mask_iou",
    "mask_score", "quality_score", "expected_iou") and its "mask_iou_probs", rounded to six digits.

    If more than 100 detections of an image count, "AP" and the other numbers without a limit in
    their names count all of them. "AP@100", "AP50@100" and "AP75@100" are comparable with published
    results.

    "pred_masks" may be full-size masks, or the `ROIMasks` (probabilities) of "pred_boxes".
    """

    file_prefix = "coco"

    def __init__(
        self,
        *args: Any,
        engine: str | None = None,
        use_fast_impl: bool | None = None,
        mask_quality: bool = True,
        boundary_ap: bool = False,
        max_dets_per_image: int | None = None,
        class_names: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            args, kwargs: those of `COCOEvaluator`.
            engine: the library that computes AP, "faster-coco-eval" or "pycocotools"; by default
                the first if it is installed. Their numbers differ only by the rounding of float64.
                AP of keypoints always uses pycocotools.
            use_fast_impl: as in Detectron2, False asks for the official implementation, here
                engine="pycocotools".
            max_dets_per_image: how many detections, those with the best scores, count for each
                image and class. By default 100, with a warning if there are more. As in Detectron2,
                at least 10 count.
            class_names: names of the model's classes, if the dataset may have others; see
                `use_class_names`.
            mask_quality: whether to measure the quality of masks. After an evaluation of masks, the
                attribute `mask_quality` of the main process holds all of it; otherwise it is None.
            boundary_ap: whether to compute Boundary AP, too, where masks are evaluated: AP with the
                IoU of masks or that of their boundaries, whichever is smaller (Cheng et al.,
                CVPR 2021). Boundaries are as wide as 2 % of the image's diagonal.

        Raises:
            ValueError: the engine is unknown, not installed or contradicts `use_fast_impl`; or
                `max_dets_per_image` is not a positive whole number.
            UserError: from :meth:`use_class_names`.
        """
        if max_dets_per_image is not None:
            check_limit(max_dets_per_image)
        if use_fast_impl is False and engine is None:
            engine = "pycocotools"
        if use_fast_impl is not None and use_fast_impl == (engine == "pycocotools"):
            raise ValueError(
                f"engine='{engine}' contradicts use_fast_impl={use_fast_impl}: give only `engine`."
            )
        self._engine = choose_engine(engine)
        # Detectron2's own fast implementation is not used, because not every build has it
        super().__init__(
            *args, use_fast_impl=False, max_dets_per_image=max_dets_per_image, **kwargs
        )
        self._limit_is_default = max_dets_per_image is None
        for annotation in self._coco_api.dataset.get("annotations", []):
            annotation.setdefault("iscrowd", 0)  # as in training
        self._complete_keypoints()
        self._measures_mask_quality, self._measures_boundaries = mask_quality, boundary_ap
        self.mask_quality: MaskQuality | None = None
        if class_names is not None:
            self.use_class_names(class_names)

    def _complete_keypoints(self) -> None:
        """COCO's evaluation needs keypoints of all objects. Without labelled ones, they are 0."""
        annotations = self._coco_api.dataset.get("annotations", [])
        length = next((len(a["keypoints"]) for a in annotations if a.get("keypoints")), 0)
        for annotation in annotations if length else ():
            keypoints = annotation.get("keypoints") or [0] * length
            labelled = sum(v > 0 for v in keypoints[2::3])
            annotation.update(keypoints=keypoints)
            annotation.setdefault("num_keypoints", labelled)
        self._has_keypoints = length > 0

    def _own_class_names(self) -> Sequence[str] | None:
        own = super()._own_class_names()
        if own is None:  # Detectron2 has not loaded the dataset yet, and would take these names
            categories = self._coco_api.dataset.get("categories", [])
            own = [c["name"] for c in sorted(categories, key=lambda c: c["id"])]
        return own

    def reset(self) -> None:
        super().reset()
        self.mask_quality = None

    def _eval_predictions(self, predictions: list[dict], img_ids: Collection | None = None) -> None:
        results = self._prepared_results(predictions)
        if results is None:
            return
        limit = self._max_dets_per_image[-1]
        counts = Counter((r["image_id"], r["category_id"]) for r in results)
        if self._limit_is_default and max(counts.values(), default=0) > limit:
            most = max(counts.values())
            logger.warning(
                "An image has %d detections of one class, of which the best %d count: "
                "max_dets_per_image=%d counts all of them.",
                *(most, limit, most),
            )
        logger.info("Evaluating predictions with %s ...", self._engine)
        tasks = set(self._tasks or self._tasks_from_predictions(results))
        if not self._tasks and "keypoints" in tasks and not self._has_keypoints:
            logger.info("Keypoints are not evaluated, since no object has any.")
            tasks.remove("keypoints")
        if self._measures_boundaries and "segm" in tasks:
            tasks.add("boundary")
        for task in sorted(tasks, key=(*TASKS, "boundary").index):
            if task == "keypoints":
                self._results[task] = self._keypoint_results(predictions, img_ids)
            elif not results:
                self._results[task] = self._derive_coco_results(None, METRICS_OF.get(task, task))
            else:
                self._results.update(self._ranked_results(task, results, img_ids))

    def _ranked_results(
        self, task: str, results: list[dict], img_ids: Collection | None
    ) -> dict[str, dict[str, float]]:
        """
        AP of boxes; AP of masks under every ranking that they have, and their quality; or Boundary
        AP under every ranking.
        """
        limits = self._max_dets_per_image
        if limits[-1] > COCO_MAX_DETS[-1]:
            limits = [*COCO_MAX_DETS, limits[-1]]
        ranking = AveragePrecision(self._coco_api, results, task, self._engine, limits, img_ids)
        scores = scores_of(results)
        if task == "bbox":
            return {task: self._results_of(ranking.evaluate(scores["class_score"]), task)}
        evaluations, by_score = {}, {}
        for name in (name for name in RANKINGS if name in scores):
            if task == "boundary":
                logger.info("Boundary AP of masks ranked by %s:", TITLES[name])
            elif name != "class_score":
                logger.info("Masks ranked by %s:", TITLES[name])
            evaluations[name] = ranking.evaluate(scores[name])
            by_score[name] = self._results_of(evaluations[name], task)
        # A model without mask scores has Detectron2's ranking
        main = "mask_score" if "mask_score" in by_score else "class_score"
        ranked = {task: by_score.pop(main)}
        ranked |= {f"{task}_by_{name}": numbers for name, numbers in by_score.items()}
        if task == "segm" and self._measures_mask_quality:
            self.mask_quality = MaskQuality(ranking, evaluations)
            logger.info("Quality of masks:\n%s", self.mask_quality.table())
            ranked["mask_quality"] = self.mask_quality.headline()
        return ranked

    def _results_of(self, evaluation: Evaluation, task: str) -> dict[str, float]:
        recalls = {k: 100 * v for k, v in evaluation.numbers.items() if k.startswith("AR")}
        logger.info("Average recall for %s:\n%s", task, create_small_table(recalls))
        class_names = self._metadata.get("thing_classes")
        numbers = self._derive_coco_results(
            evaluation, METRICS_OF.get(task, task), class_names=class_names
        )
        if self._max_dets_per_image[-1] > COCO_MAX_DETS[-1]:
            number_of_limits = len(COCO_MAX_DETS)
            at_100 = coco_numbers(
                evaluation.eval["precision"][..., :number_of_limits],
                evaluation.eval["recall"][..., :number_of_limits],
                COCO_MAX_DETS,
            )
            numbers.update({f"{k}@100": 100 * at_100[k] for k in ("AP", "AP50", "AP75")})
        return numbers

    def _keypoint_results(
        self, predictions: list[dict], img_ids: Collection | None
    ) -> dict[str, float]:
        """The results of the base class, which gets a copy since it changes the predictions."""
        predictions = [{"instances": [dict(r) for r in x["instances"]]} for x in predictions]
        evaluator = copy.copy(self)  # shares the ground truth
        evaluator._tasks, evaluator._results = ("keypoints",), OrderedDict()
        evaluator._output_dir = None  # the files are written already
        COCOEvaluator._eval_predictions(evaluator, predictions, img_ids)
        return evaluator._results["keypoints"]


def check_settings(evaluator: COCOEvaluator, predicts_keypoints: bool) -> None:
    """
    Refuse arguments that would make an evaluation fail only after all images were predicted.

    Args:
        evaluator: Detectron2's evaluator, or one that is derived from it.
        predicts_keypoints: whether the model predicts keypoints.

    Raises:
        ValueError: `max_dets_per_image`, `tasks` or `kpt_oks_sigmas` has the wrong form, or the
            number of keypoints in the annotations is not the number of sigmas.
    """
    check_limit(evaluator._max_dets_per_image[-1])
    tasks = evaluator._tasks
    if tasks is not None and (not _is_list(tasks) or not set(tasks) <= set(TASKS)):
        raise ValueError(f"tasks is a list of some of {', '.join(TASKS)}, not {tasks!r}.")
    if not evaluator._do_evaluation:
        return
    sigmas = evaluator._kpt_oks_sigmas
    if sigmas and not (_is_list(sigmas) and all(map(_is_positive, sigmas))):
        raise ValueError(f"kpt_oks_sigmas is a list of numbers above 0, not {sigmas!r}.")
    if tasks is not None:
        predicts_keypoints = "keypoints" in tasks
    annotations = evaluator._coco_api.dataset["annotations"]
    keypoints = next((a["keypoints"] for a in annotations if a.get("keypoints")), None)
    number = len(sigmas) if sigmas else COCO_KEYPOINTS
    if keypoints and (sigmas or predicts_keypoints) and len(keypoints) // 3 != number:
        raise ValueError(
            f"kpt_oks_sigmas has {number} numbers{'' if sigmas else ' by default'}, but objects "
            f"have {len(keypoints) // 3} keypoints: give one number for each."
        )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
