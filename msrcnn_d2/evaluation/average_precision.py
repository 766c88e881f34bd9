"""Average precision as COCO defines it, of the same detections under any number of rankings."""

import contextlib
import importlib
import io
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .matching import Overlaps, Place

__all__ = ["ENGINES", "AveragePrecision", "Evaluation", "choose_engine", "coco_numbers"]

ENGINES = ("faster-coco-eval", "pycocotools")
TASKS = ("bbox", "segm", "boundary")
COCO_MAX_DETS = (1, 10, 100)


@dataclass
class Evaluation:
    """
    The parts of `COCOeval` after `summarize` that are needed here and by Detectron2.

    Attributes:
        eval: "precision" (IoU thresholds x recalls x classes x sizes x limits) and "recall" (the
            same without recalls), -1 where there are no objects.
        numbers: see :func:`coco_numbers`.
    """

    eval: dict[str, np.ndarray]
    numbers: dict[str, float]

    @property
    def stats(self) -> list[float]:
        """COCO's list of numbers, the first six of them AP; NaN where COCO has -1."""
        return list(self.numbers.values())


def choose_engine(engine: str | None = None) -> str:
    """
    Args:
        engine: one of ENGINES, or None for faster-coco-eval if it can be imported, and pycocotools
            otherwise.

    Raises:
        ValueError: for any other name, and for faster-coco-eval if it cannot be imported.
    """
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"There is no engine '{engine}'; choose one of {', '.join(ENGINES)}.")
    if engine == "pycocotools":
        return engine
    try:
        importlib.import_module("faster_coco_eval")
    except ImportError as error:
        if engine is None:
            return "pycocotools"
        raise ValueError(
            "engine='faster-coco-eval' needs that library: `pip install faster-coco-eval`, or "
            "choose engine='pycocotools'."
        ) from error
    return "faster-coco-eval"


class AveragePrecision:
    """
    Average precision of detections under one or more rankings.

    Matching and accumulation are those of pycocotools, the official implementation, or of
    faster-coco-eval, which is several times as fast. Both get the same IoUs, which pycocotools
    computes once. Both give the same numbers, even if scores are equal. Detections with equal
    scores keep the order of the results within an image and class; across images, they are in the
    order of the image ids.

    Attributes:
        overlaps: the IoUs.
        max_dets: as passed in, ascending.
        image_ids, category_ids: ids of the images and the classes that count, ascending.
    """

    def __init__(
        self,
        coco_gt: COCO,
        results: Sequence[dict],
        task: str = "segm",
        engine: str | None = None,
        max_dets: Sequence[int] = COCO_MAX_DETS,
        img_ids: Collection | None = None,
    ):
        """
        Args:
            coco_gt: the ground truth. Neither it nor `results` is modified.
            results: at least one detection in COCO's result format, with "bbox" or "segmentation"
                (as compressed RLE) depending on the task. "score" is not used.
            task: "bbox", "segm" or "boundary", for Boundary AP; see :class:`Overlaps`. As in COCO
                the size of an object, for AP by size, is the area of its "bbox" or of its mask.
            engine: see :func:`choose_engine`.
            max_dets: limits on the number of detections of each image and class. Recall is measured
                at each limit, and AP at the largest.
            img_ids: images to evaluate, by default all.

        Raises:
            ValueError: for another task, and if results belong to images that the ground truth
                does not have.
        """
        if task not in TASKS:
            raise ValueError(f"There is no task '{task}'; choose one of {', '.join(TASKS)}.")
        unknown = {r["image_id"] for r in results} - set(coco_gt.getImgIds())
        if unknown:
            raise ValueError(
                f"There are results for {len(unknown)} images that the ground truth does not have, "
                f"one of them '{unknown.pop()}': give the annotations of the images that were "
                "predicted on."
            )
        self._coco_class, self._eval_class = COCO, COCOeval
        if choose_engine(engine) == "faster-coco-eval":
            library = importlib.import_module("faster_coco_eval")
            self._coco_class, self._eval_class = library.COCO, library.COCOeval_faster
        self.overlaps = Overlaps(coco_gt, results, task)
        self.max_dets = sorted(max_dets)
        self.image_ids = sorted(set(coco_gt.getImgIds() if img_ids is None else img_ids))
        self.category_ids = sorted(coco_gt.getCatIds())
        # The libraries see neither shapes nor ids, but indices in the order of the ids. They put
        # ids into arrays, where rounding makes large ones equal, and they count an object with the
        # id 0 as missed
        images = {id_: k for k, id_ in enumerate(self.image_ids)}
        classes = {id_: k for k, id_ in enumerate(self.category_ids)}
        self._places: dict[tuple[int, int], Place] = {}
        objects: list[dict[str, Any]] = []
        self._detections: list[dict[str, Any]] = []
        areas = self.overlaps.areas.tolist()
        for (image_id, category_id), place in self.overlaps.places.items():
            if image_id not in images or category_id not in classes:
                continue
            image, class_ = images[image_id], classes[category_id]
            self._places[image, class_] = place
            for annotation, is_crowd in zip(place.objects, place.is_crowd.tolist()):
                area, number = annotation["area"], len(objects) + 1
                objects.append(_entry(image, class_, number, area, int(is_crowd)))
            for k in place.detections:
                self._detections.append(_entry(image, class_, k + 1, areas[k], 0))
        self._truth = self._indexed(objects)

    def evaluate(self, scores: Iterable[float]) -> Evaluation:
        """Evaluate the detections with these scores, one for each result; NaN comes last."""
        # faster-coco-eval takes no NaN
        values = [-math.inf if math.isnan(s) else float(s) for s in scores]
        found = self._indexed([{**d, "score": values[d["id"] - 1]} for d in self._detections])

        def ranked_ious(image: int, class_: int) -> np.ndarray | list:
            """IoUs of the detections that count, the best ones first, with all objects."""
            place = self._places.get((image, class_))
            if place is None or not place.ious.size:
                return []
            ranked = np.argsort([-values[k] for k in place.detections], kind="stable")
            return place.ious[ranked[: self.max_dets[-1]]]

        with contextlib.redirect_stdout(io.StringIO()):
            # Of type "bbox", because masks would need shapes
            evaluation = self._eval_class(self._truth, found, "bbox")
            evaluation.params.maxDets = list(self.max_dets)
            evaluation.computeIoU = ranked_ious
            evaluation.evaluate()
            evaluation.accumulate()
        precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
        return Evaluation(evaluation.eval, coco_numbers(precision, recall, self.max_dets))

    def _indexed(self, annotations: list[dict[str, Any]]) -> COCO:
        coco = self._coco_class()
        coco.dataset = {
            "images": [{"id": k} for k in range(len(self.image_ids))],
            "categories": [{"id": k} for k in range(len(self.category_ids))],
            "annotations": annotations,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def _entry(image: int, class_: int, id_: int, area: float, iscrowd: int) -> dict[str, Any]:
    return dict(image_id=image, category_id=class_, id=id_, area=area, iscrowd=iscrowd)


def coco_numbers(
    precision: np.ndarray, recall: np.ndarray, max_dets: Sequence[int]
) -> dict[str, float]:
    """
    The numbers of `COCOeval.summarize`, but for any limits, not only (1, 10, 100).

    Args:
        precision: by IoU threshold (0.50, 0.55, ..., 0.95), recall, class, size (all, small,
            medium, large) and limit; -1 where there are no objects.
        recall: the same without recalls.
        max_dets: the limits, ascending.

    Returns:
        in COCO's order "AP", "AP50", "AP75", "APs", "APm", "APl", all with the largest limit;
        "AR@1", ... for each limit; "ARs", "ARm", "ARl" with the largest one. In [0, 1], NaN where
        there are no objects.
    """
    ap, ar = precision[..., -1], recall[..., -1]
    parts = {"AP": ap[..., 0], "AP50": ap[0, ..., 0], "AP75": ap[5, ..., 0]}
    parts |= {f"AP{size}": ap[..., k] for k, size in enumerate("sml", start=1)}
    parts |= {f"AR@{limit}": recall[..., 0, m] for m, limit in enumerate(max_dets)}
    parts |= {f"AR{size}": ar[..., k] for k, size in enumerate("sml", start=1)}
    return {name: mean_of_defined(part) for name, part in parts.items()}


def mean_of_defined(values: np.ndarray) -> float:
    """The mean without values of -1, which stand for no objects; NaN if all are -1."""
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else float("nan")
