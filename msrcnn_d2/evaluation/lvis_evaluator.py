"""LVIS evaluation that ranks boxes by class score, and masks by every score that they have."""

import contextlib
import copy
import io
import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from pycocotools.coco import COCO

from detectron2.evaluation import LVISEvaluator

from msrcnn_d2_runtime.scores import RANKINGS, SCORES, TITLES, scores_of

from .federated import in_terms_of_coco
from .instance_results import InstanceResults, check_limit
from .libraries import import_library, with_old_numpy_names
from .mask_quality import MaskQuality, measure_mask_quality

__all__ = ["MaskScoringLVISEvaluator"]

logger = logging.getLogger(__name__)

MAX_DETS = 300  # LVIS's own limit


class MaskScoringLVISEvaluator(InstanceResults, LVISEvaluator):
    """
    :class:`LVISEvaluator` that ranks boxes by "scores" and masks by "mask_scores".

    All AP is computed by LVIS's own code, the package `lvis`, once for each ranking. The names of
    results are those of :class:`MaskScoringCOCOEvaluator`: "bbox", "segm", "segm_by_class_score",
    "segm_by_quality_score" and "mask_quality". Each AP has, besides COCO's numbers, "APr", "APc"
    and "APf": AP of rare, common and frequent categories. It is NaN where there are no objects.

    With an `output_dir` it writes, besides "lvis_instances_results.json" with all scores of the
    model, the files that LVIS's server takes: "lvis_segm_results.json" with mask scores,
    "lvis_bbox_results.json" with class scores, and with a calibrator
    "lvis_segm_by_quality_score_results.json".

    The quality of masks follows LVIS's rules, too: what is not known to be wrong is no mistake (see
    :func:`in_terms_of_coco`).
    """

    file_prefix = "lvis"

    def __init__(
        self,
        *args: Any,
        mask_quality: bool = True,
        max_dets_per_image: int | None = None,
        class_names: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            args, kwargs: those of `LVISEvaluator`.
            max_dets_per_image: how many detections of each image count, over all categories, those
                with the best scores of a ranking. By default LVIS's 300.
            mask_quality: whether to measure the quality of masks, as in
                :class:`MaskScoringCOCOEvaluator`.
            class_names: names of the model's classes, if the dataset may have others; see
                `use_class_names`.

        Raises:
            ValueError: `max_dets_per_image` is not a positive whole number.
            UserError: the package `lvis` is not installed; or from :meth:`use_class_names`.
        """
        if max_dets_per_image is not None:
            check_limit(max_dets_per_image)
        self._library = import_library("lvis.eval", "LVIS", "lvis")
        super().__init__(*args, max_dets_per_image=max_dets_per_image, **kwargs)
        self._measures_mask_quality = mask_quality
        self.mask_quality: MaskQuality | None = None
        if class_names is not None:
            self.use_class_names(class_names)

    def reset(self) -> None:
        super().reset()
        self.mask_quality = None

    def _classes_of_categories(self) -> dict[int, int]:
        classes = super()._classes_of_categories()
        if classes is not None:  # COCO's categories in LVIS's format
            return classes
        names = self._metadata.get("thing_classes")
        return {k + 1: k for k in range(len(names or self._lvis_api.cats))}

    def _eval_predictions(self, predictions: list[dict]) -> None:
        results = self._prepared_results(predictions)
        if results is None:
            return
        has_masks = any("segmentation" in r for r in results)
        tasks = self._tasks or (("bbox", "segm") if has_masks else ("bbox",))
        rankings = [name for name in RANKINGS if name in scores_of(results)] or ["class_score"]
        if "bbox" in tasks:
            self._results["bbox"] = self._ap(predictions, "bbox", "class_score")
        if "segm" not in tasks:
            return
        # A model without mask scores has Detectron2's ranking
        main = "mask_score" if "mask_score" in rankings else "class_score"
        for name in sorted(rankings, key=lambda name: name != main):
            task = "segm" if name == main else f"segm_by_{name}"
            logger.info("Masks ranked by %s:", TITLES[name])
            self._results[task] = self._ap(predictions, "segm", name)
        if self._measures_mask_quality:
            self._measure_mask_quality(results)

    def _ap(self, predictions: list[dict], task: str, score: str) -> dict[str, float]:
        """What the base class makes of the predictions under one of their scores."""
        shape, key = {"bbox": "bbox", "segm": "segmentation"}[task], SCORES[score].key
        ranked = [
            {
                "instances": [
                    {
                        **{k: r[k] for k in ("image_id", "category_id", shape)},
                        "score": r[key],
                    }
                    for r in x["instances"]
                ]
            }
            for x in predictions
        ]
        evaluator = copy.copy(self)  # shares the ground truth
        evaluator._tasks, evaluator._results = (task,), OrderedDict()
        evaluator._output_dir = None  # the files are written already
        with with_old_numpy_names(self._library):
            LVISEvaluator._eval_predictions(evaluator, ranked)
        # LVIS has -1, here in percent, where there are no objects
        return {k: v if v >= 0 else math.nan for k, v in evaluator._results[task].items()}

    def _measure_mask_quality(self, results: list[dict]) -> None:
        coco_gt = COCO()
        coco_gt.dataset = self._lvis_api.dataset
        with contextlib.redirect_stdout(io.StringIO()):
            coco_gt.createIndex()
        coco_gt, known = in_terms_of_coco(coco_gt, results)
        if not known:
            logger.info("No detection is of a category that its image was searched for.")
            return
        limit = self._max_dets_per_image or MAX_DETS
        self.mask_quality = measure_mask_quality(coco_gt, known, max_dets=limit)
        logger.info("Quality of masks:\n%s", self.mask_quality.table())
        self._results["mask_quality"] = self.mask_quality.headline()
