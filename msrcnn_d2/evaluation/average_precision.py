"""
Average precision as COCO defines it, of the same detections under any number of rankings; by
pycocotools or, several times as fast, with faster-coco-eval.
"""

import contextlib
import copy
import importlib
import io
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["ENGINES", "Evaluation", "build_engine", "choose_engine", "coco_numbers"]

ENGINES = ("faster-coco-eval", "pycocotools")
COCO_MAX_DETS = (1, 10, 100)

Place = tuple[int, int]  # image and class


@dataclass
class Evaluation:
    """
    What `COCOeval` holds after `summarize`, as far as it is needed.

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


class Engine(Protocol):
    def evaluate(self, scores: Iterable[float]) -> Evaluation:
        """Evaluate the detections with these scores, one for each result; NaN comes last."""


def choose_engine(engine: str | None = None) -> str:
    """
    Args:
        engine: one of ENGINES, or None for faster-coco-eval where it can be imported and
            pycocotools elsewhere.

    Raises:
        ValueError: for any other name, and for faster-coco-eval where it cannot be imported.
    """
    if engine is None:
        return ENGINES[0] if _has_faster_coco_eval() else ENGINES[1]
    if engine not in ENGINES:
        raise ValueError(f"There is no engine '{engine}'; choose one of {', '.join(ENGINES)}.")
    if engine == "faster-coco-eval" and not _has_faster_coco_eval():
        raise ValueError(
            "engine='faster-coco-eval' needs that library: `pip install faster-coco-eval`, or "
            "choose engine='pycocotools'."
        )
    return engine


def _has_faster_coco_eval() -> bool:
    try:
        importlib.import_module("faster_coco_eval")
    except ImportError:
        return False
    return True


def build_engine(
    coco_gt: COCO,
    results: Sequence[dict],
    task: str,
    engine: str | None = None,
    max_dets: Sequence[int] = COCO_MAX_DETS,
    img_ids: Collection | None = None,
) -> Engine:
    """
    Prepare detections for evaluation under one or more rankings.

    Both engines give the same numbers, also where scores are equal: within an image and class the
    detections then keep the order of `results`; across images they are in the order of the image
    ids. Nothing that is passed in is modified.

    Args:
        coco_gt: the ground truth.
        results: at least one detection in COCO's result format, with "bbox" or "segmentation" (as
            compressed RLE) depending on the task. "score" is not looked at.
        task: "bbox" or "segm". As in COCO the size of an object, for AP by size, is the area of its
            "bbox" or of its mask.
        engine: see :func:`choose_engine`.
        max_dets: in how many detections of each image and class recall is measured; AP counts the
            largest number of them.
        img_ids: images to evaluate, by default all.

    Raises:
        ValueError: for another task, and if results belong to images that the ground truth does not
            have.
    """
    if task not in ("bbox", "segm"):
        raise ValueError(f"There is no task '{task}'; choose 'bbox' or 'segm'.")
    unknown = {r["image_id"] for r in results} - set(coco_gt.getImgIds())
    if unknown:
        raise ValueError(
            f"There are results for {len(unknown)} images that the ground truth does not have, one "
            f"of them '{unknown.pop()}': give the annotations of the images that were predicted on."
        )
    cls = _FasterCocoEval if choose_engine(engine) == "faster-coco-eval" else _Pycocotools
    return cls(coco_gt, results, task, max_dets, img_ids)


class _Pycocotools:
    """The official implementation, run from the beginning for each ranking."""

    def __init__(self, coco_gt, results, task, max_dets, img_ids):
        # With a bbox, COCO would take the area of the box for that of the mask, and with a caption
        # all results for captions
        used = "image_id", "category_id", "segmentation" if task == "segm" else "bbox"
        # By their place in the order of the ids: pycocotools puts ids into arrays, where large ones
        # become equal by rounding
        self._images = {id_: k for k, id_ in enumerate(sorted(coco_gt.getImgIds()))}
        classes = {id_: k for k, id_ in enumerate(sorted(coco_gt.getCatIds()))}

        def placed(entry: dict) -> dict:
            # -1 is no image and no class, so that pycocotools passes over it
            image = self._images.get(entry["image_id"], -1)
            return {
                **entry,
                "image_id": image,
                "category_id": classes.get(entry["category_id"], -1),
            }

        self._results = [placed({k: r[k] for k in used}) for r in results]
        self._truth = copy.copy(coco_gt)
        # pycocotools writes into annotations, but only their own keys
        self._truth.dataset = {
            **coco_gt.dataset,
            "images": [{**x, "id": self._images[x["id"]]} for x in coco_gt.dataset["images"]],
            "categories": [{**x, "id": classes[x["id"]]} for x in coco_gt.dataset["categories"]],
            "annotations": [placed(a) for a in _numbered(coco_gt.dataset["annotations"])],
        }
        with _silence():
            self._truth.createIndex()
        self._task, self._max_dets, self._img_ids = task, max_dets, img_ids

    def evaluate(self, scores: Iterable[float]) -> Evaluation:
        ranked = [{**r, "score": s} for r, s in zip(self._results, scores)]
        with _silence():
            coco_eval = COCOeval(self._truth, self._truth.loadRes(ranked), self._task)
            coco_eval.params.maxDets = list(self._max_dets)
            if self._img_ids is not None:
                coco_eval.params.imgIds = [
                    self._images[k] for k in self._img_ids if k in self._images
                ]
            coco_eval.evaluate()
            coco_eval.accumulate()
        return _evaluation(coco_eval)


class _FasterCocoEval:
    """
    Matching and accumulation of faster-coco-eval. What does not depend on the ranking, IoUs and
    areas, is computed once, by the same code as in pycocotools.

    Images and classes are known by their indices in the order of their ids, and a pair of them is
    a `Place`; faster-coco-eval never sees shapes.
    """

    def __init__(self, coco_gt, results, task, max_dets, img_ids):
        self._library = importlib.import_module("faster_coco_eval")
        images = coco_gt.getImgIds() if img_ids is None else img_ids
        self._images = {i: k for k, i in enumerate(sorted(set(images)))}
        self._classes = {i: k for k, i in enumerate(sorted(coco_gt.getCatIds()))}
        self._max_dets = sorted(max_dets)
        annotations = _numbered(coco_gt.dataset["annotations"])
        objects = self._by_place(annotations)
        self._detections = self._by_place(results)
        areas = areas_of(results, task)
        self._coco_gt = self._coco(
            _entry(place, a["id"], a["area"], a.get("iscrowd", 0))
            for place, indices in objects.items()
            for a in (annotations[k] for k in indices)
        )
        self._entries = [
            (k, _entry(place, k + 1, areas[k], 0))
            for place, indices in self._detections.items()
            for k in indices
        ]
        self._ious = {
            place: _ious(
                coco_gt,
                [results[k] for k in self._detections[place]],
                [annotations[k] for k in objects[place]],
                task,
            )
            for place in objects.keys() & self._detections.keys()
        }

    def evaluate(self, scores: Iterable[float]) -> Evaluation:
        # faster-coco-eval takes no NaN; pycocotools sorts it to the end
        scores = [-math.inf if math.isnan(s) else float(s) for s in scores]
        coco_dt = self._coco({**entry, "score": scores[k]} for k, entry in self._entries)
        # Of type "bbox", since for masks it would want to see shapes
        coco_eval = self._library.COCOeval_faster(self._coco_gt, coco_dt, "bbox")
        coco_eval.params.maxDets = list(self._max_dets)
        coco_eval.computeIoU = lambda *place: self._ranked_ious(place, scores)
        coco_eval.evaluate()
        coco_eval.accumulate()
        return _evaluation(coco_eval)

    def _by_place(self, entries: Sequence[dict]) -> dict[Place, list[int]]:
        """Indices of the entries of each place, in their order, without those that do not count."""
        places = defaultdict(list)
        for k, entry in enumerate(entries):
            image, class_ = entry["image_id"], entry["category_id"]
            if image in self._images and class_ in self._classes:
                places[self._images[image], self._classes[class_]].append(k)
        return places

    def _coco(self, annotations: Iterable[dict]):
        return self._library.COCO(
            {
                "images": [{"id": k} for k in self._images.values()],
                "categories": [{"id": k} for k in self._classes.values()],
                "annotations": list(annotations),
            }
        )

    def _ranked_ious(self, place: Place, scores: Sequence[float]) -> np.ndarray | list:
        """IoUs (detections, the best ones first, x objects) that count in a place."""
        if place not in self._ious:
            return []
        ranks = np.argsort([-scores[k] for k in self._detections[place]], kind="stable")
        return self._ious[place][ranks[: self._max_dets[-1]]]


def _numbered(annotations: Sequence[dict]) -> list[dict]:
    """
    Copies with ids from 1 on, and an iscrowd, which is 0 if it was missing.

    COCO takes objects with the same id for one, and an object with the id 0 for missed, whatever
    was found; of an id that is negative or text the two libraries make different things.
    """
    return [{**a, "id": k, "iscrowd": a.get("iscrowd", 0)} for k, a in enumerate(annotations, 1)]


def _entry(place: Place, id_: int, area: float, iscrowd: int) -> dict:
    return dict(image_id=place[0], category_id=place[1], id=id_, area=area, iscrowd=iscrowd)


def areas_of(results: Sequence[dict], task: str) -> list[float]:
    """Of boxes ("bbox") or masks ("segm"), in pixels."""
    if task == "bbox":
        return [r["bbox"][2] * r["bbox"][3] for r in results]
    rles = [r["segmentation"] for r in results]
    # In groups: pycocotools 2.0.11 fails at more than 255 at once if NumPy is 2
    groups = [rles[k : k + 100] for k in range(0, len(rles), 100)]
    return [float(area) for group in groups for area in mask_util.area(group)]


def _ious(coco_gt: COCO, detections: list[dict], objects: list[dict], task: str) -> np.ndarray:
    """IoUs (detections x objects); with a crowd, the share of the detection that is inside."""
    if task == "bbox":
        shapes = [x["bbox"] for x in detections], [x["bbox"] for x in objects]
    else:
        shapes = [x["segmentation"] for x in detections], [coco_gt.annToRLE(x) for x in objects]
    return mask_util.iou(*shapes, [x.get("iscrowd", 0) for x in objects])


def _evaluation(coco_eval) -> Evaluation:
    evaluation, max_dets = coco_eval.eval, coco_eval.params.maxDets
    numbers = coco_numbers(evaluation["precision"], evaluation["recall"], max_dets)
    return Evaluation(evaluation, numbers)


def coco_numbers(
    precision: np.ndarray, recall: np.ndarray, max_dets: Sequence[int]
) -> dict[str, float]:
    """
    The numbers of `COCOeval.summarize`, also for other limits than (1, 10, 100).

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
    """NaN if all are -1, which stands where there are no objects."""
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else float("nan")


def _silence():
    return contextlib.redirect_stdout(io.StringIO())
