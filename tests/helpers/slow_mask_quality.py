"""
The numbers of `MaskQuality.to_json` a second time, each from its definition and none by code of the
package or of COCO's evaluation: dense masks, plain loops, correlations by SciPy.

As a script it checks a report that was written:

    python tests/slow_mask_quality.py REPORT.json RESULTS.json ANNOTATIONS.json
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import scipy.stats

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
SIZES = {
    "all": (0, 1e10),
    "small": (0, 32 * 32),
    "medium": (32 * 32, 96 * 96),
    "large": (96 * 96, 1e10),
}
KEYS = {
    "class_score": "score",
    "predicted_iou": "pred_mask_iou",
    "mask_score": "mask_score",
    "quality_score": "quality_score",
}
TOLERANCE = 1e-9


@dataclass
class Place:
    """
    One class in one image.

    Attributes:
        detections: index of each among all results.
        areas: of their masks in pixels.
        objects: annotations.
        ious: for each detection {index of the object: IoU}, without those of 0.
    """

    detections: list[int]
    areas: list[int]
    objects: list[dict]
    ious: list[dict[int, float]]


def slow_mask_quality(results: list[dict], annotations: dict, max_dets: int = 100) -> dict:
    """
    Args:
        results: detections in COCO's result format, with "segmentation" as RLE.
        annotations: what a JSON file of COCO holds.
        max_dets: number of detections of each image and class that count.

    Returns:
        what `MaskQuality.to_json` returns.
    """
    places = _places(results, annotations)
    all_places = [place for of_class in places.values() for place in of_class]
    scores = {
        name: [r[key] for r in results]
        for name, key in KEYS.items()
        if all(key in r for r in results)
    }
    true_ious, mask_areas = _true_ious(all_places, results), _mask_areas(all_places)
    counted = _counted(all_places, scores["class_score"], max_dets)
    # For each threshold {detection: (IoU, area) of its object}
    matched = [_matched(all_places, scores["class_score"], t, max_dets) for t in THRESHOLDS]
    rankings = {k: v for k, v in scores.items() if k != "predicted_iou"} | {"true_iou": true_ious}
    precisions = {name: _by_size(places, r, max_dets) for name, r in rankings.items()}

    def part(chosen, size="all", category=None, threshold=None):
        """The numbers of some of the detections that count."""
        objects = matched[threshold or 0]
        ap = {name: _ap(by_size[size], category, threshold) for name, by_size in precisions.items()}
        return {
            "ap": ap,
            "gap_closed": _gap_closed(ap),
            "matched": _agreement({i: objects[i][0] for i in chosen if i in objects}, scores),
            "all": _agreement({i: true_ious[i] for i in chosen}, scores)
            if threshold is None
            else None,
        }

    def of_class(category):
        return [i for i in counted if results[i]["category_id"] == category]

    def of_size(low, high):
        """An object's detection is where its object is, one without where its mask is."""
        areas = {i: matched[0][i][1] if i in matched[0] else mask_areas[i] for i in counted}
        return [i for i in counted if low <= areas[i] <= high]

    numbers = {
        "images": len(annotations["images"]),
        "objects": sum(not _is_crowd(a) for a in annotations["annotations"]),
        "detections": len(counted),
        "max_dets": max_dets,
        "overall": part(counted),
        "by_class": {
            name: part(of_class(c), category=c) for c, name in _class_names(annotations).items()
        },
        "by_size": {
            size: part(of_size(*limits), size) for size, limits in SIZES.items() if size != "all"
        },
        # What falls to a crowd at 0.5 may find an object at a higher threshold
        "by_threshold": {
            f"{t:.2f}": part(matched[k], threshold=k) for k, t in enumerate(THRESHOLDS)
        },
        "precision_recall": {
            f"{t:.2f}": {name: _mean_curve(p["all"], k) for name, p in precisions.items()}
            for k, t in enumerate(THRESHOLDS)
        },
        "reliability": {},
    }
    if "predicted_iou" in scores:
        ious = {i: iou for i, (iou, _) in matched[0].items()}
        numbers["reliability"] = {
            "matched": _reliability(ious, scores["predicted_iou"]),
            "all": _reliability({i: true_ious[i] for i in counted}, scores["predicted_iou"]),
        }
    numbers |= _calibration(places, results, scores, true_ious, max_dets)
    return _nan_to_none(numbers)


# ---- masks


def _places(results: list[dict], annotations: dict) -> dict[Any, list[Place]]:
    """For each class its places in the order of the image ids."""
    sizes = {x["id"]: (x["height"], x["width"]) for x in annotations["images"]}
    detections, objects = {}, {}
    for index, result in enumerate(results):
        detections.setdefault((result["image_id"], result["category_id"]), []).append(index)
    for annotation in annotations["annotations"]:
        place = annotation["image_id"], annotation["category_id"]
        objects.setdefault(place, []).append(annotation)
    return {
        category: [
            _place(
                results,
                detections.get((image, category), []),
                objects.get((image, category), []),
                sizes[image],
            )
            for image in sorted(sizes)
        ]
        for category in sorted(c["id"] for c in annotations["categories"])
    }


def _place(results: list[dict], detections: list[int], objects: list[dict], size) -> Place:
    masks = [_dense(results[i]["segmentation"], size) for i in detections]
    object_masks = [_dense(a["segmentation"], size) for a in objects] if masks else []
    ious = [
        {
            k: iou
            for k, (annotation, object_mask) in enumerate(zip(objects, object_masks))
            if (iou := _iou(mask, object_mask, _is_crowd(annotation))) > 0
        }
        for mask in masks
    ]
    return Place(detections, [np.count_nonzero(m) for m in masks], objects, ious)


def _dense(segmentation: dict | list, size: tuple[int, int]) -> np.ndarray:
    """All pixels of an image, whether they belong to a mask."""
    if isinstance(segmentation, list):
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        rle = mask_util.frPyObjects(segmentation, *size)
    else:
        rle = segmentation
    return mask_util.decode(rle).astype(bool)


def _iou(mask: np.ndarray, object_mask: np.ndarray, is_crowd: bool) -> float:
    intersection = np.count_nonzero(mask & object_mask)
    union = np.count_nonzero(mask if is_crowd else mask | object_mask)
    return intersection / union if intersection else 0.0


def _true_ious(places: list[Place], results: list[dict]) -> list[float]:
    """The largest IoU of each detection with any object of its class, crowds being none."""
    largest = {
        i: max((x for g, x in ious.items() if not _is_crowd(place.objects[g])), default=0.0)
        for place in places
        for i, ious in zip(place.detections, place.ious)
    }
    return [largest.get(i, 0.0) for i in range(len(results))]


def _mask_areas(places: list[Place]) -> dict[int, int]:
    return {i: area for place in places for i, area in zip(place.detections, place.areas)}


def _is_crowd(annotation: dict) -> bool:
    return bool(annotation.get("iscrowd", 0))


# ---- matching


def _matches(
    place: Place, scores: Sequence[float], threshold: float, max_dets: int, ignored: list[bool]
) -> list[tuple[int, int | None]]:
    """
    COCO's rule. `ignored` says which objects a detection is given to only where it finds no other.

    Returns:
        in the order of the scores, for the detections of the place that count: its index there and
        that of its object.
    """
    order = sorted(range(len(place.detections)), key=lambda k: -scores[place.detections[k]])
    taken, matches = set(), []
    for k in order[:max_dets]:
        ious = place.ious[k]
        free = [
            g
            for g in ious
            if ious[g] >= min(threshold, 1 - 1e-10)
            and (g not in taken or _is_crowd(place.objects[g]))
        ]
        wanted = [g for g in free if not ignored[g]] or free
        # The later one of two with the same IoU
        match = max(wanted, key=lambda g: (ious[g], g), default=None)
        taken.add(match)
        matches.append((k, match))
    return matches


def _counted(places: list[Place], scores: Sequence[float], max_dets: int) -> list[int]:
    """The detections that are not given to a crowd at the lowest threshold."""
    return [
        place.detections[k]
        for place in places
        for k, g in _matches(place, scores, THRESHOLDS[0], max_dets, _crowds(place))
        if g is None or not _is_crowd(place.objects[g])
    ]


def _matched(
    places: list[Place], scores: Sequence[float], threshold: float, max_dets: int
) -> dict[int, tuple[float, float]]:
    """{detection that finds an object: (IoU, area) of it}."""
    return {
        place.detections[k]: (place.ious[k][g], place.objects[g]["area"])
        for place in places
        for k, g in _matches(place, scores, threshold, max_dets, _crowds(place))
        if g is not None and not _is_crowd(place.objects[g])
    }


def _crowds(place: Place) -> list[bool]:
    return [_is_crowd(a) for a in place.objects]


# ---- AP


def _precisions(
    places: list[Place], scores: Sequence[float], size: str, max_dets: int
) -> np.ndarray | None:
    """Of one class the best precision at each threshold and recall; None without objects."""
    low, high = SIZES[size]
    ignored = [
        [_is_crowd(a) or not low <= a["area"] <= high for a in place.objects] for place in places
    ]
    num_objects = sum(of_place.count(False) for of_place in ignored)
    if not num_objects:
        return None
    rows = []
    for threshold in THRESHOLDS:
        ranked = []  # score, and whether the detection found an object
        for place, of_place in zip(places, ignored):
            for k, g in _matches(place, scores, threshold, max_dets, of_place):
                counts = low <= place.areas[k] <= high if g is None else not of_place[g]
                if counts:
                    ranked.append((scores[place.detections[k]], g is not None))
        ranked.sort(key=lambda x: -x[0])
        right = np.cumsum([found for _, found in ranked])
        precision = right / np.arange(1, len(ranked) + 1)
        reached = right / num_objects >= RECALLS[:, None]
        rows.append(np.where(reached, precision, 0).max(axis=1, initial=0))
    return np.array(rows)


def _by_size(places: dict, scores: Sequence[float], max_dets: int) -> dict[str, dict]:
    """{size: {class: 10 x 101 precisions}}, of the classes that have objects of the size."""
    by_size = {
        size: {c: _precisions(of_class, scores, size, max_dets) for c, of_class in places.items()}
        for size in SIZES
    }
    return {
        size: {c: p for c, p in by_class.items() if p is not None}
        for size, by_class in by_size.items()
    }


def _ap(by_class: dict, category: Any, threshold: int | None) -> float:
    """In percent, over all classes and thresholds or at one."""
    chosen = [p for c, p in by_class.items() if category in (None, c)]
    where = slice(None) if threshold is None else threshold
    return 100 * np.mean([p[where] for p in chosen]) if chosen else math.nan


def _mean_curve(by_class: dict, threshold: int) -> list[float]:
    curves = [precision[threshold] for precision in by_class.values()]
    return np.mean(curves, axis=0).tolist() if curves else []


def _gap_closed(ap: dict[str, float]) -> dict[str, float]:
    gap = ap["true_iou"] - ap["class_score"]
    refined = ap.keys() - {"class_score", "true_iou"}
    if not gap > 100 * TOLERANCE:  # a smaller one is rounding
        return dict.fromkeys(refined, math.nan)
    return {name: (ap[name] - ap["class_score"]) / gap for name in refined}


# ---- scores against true IoUs, {detection: IoU}


def _agreement(ious: dict[int, float], scores: dict[str, list[float]]) -> dict:
    true = list(ious.values())
    values = {name: [of_all[i] for i in ious] for name, of_all in scores.items()}
    errors = [p - t for p, t in zip(values.get("predicted_iou", []), true)]
    bins = _reliability(ious, scores["predicted_iou"]) if errors else []
    return {
        "count": len(true),
        "true_iou": _mean(true),
        "pearson": {k: _correlation(scipy.stats.pearsonr, v, true) for k, v in values.items()},
        "spearman": {k: _correlation(scipy.stats.spearmanr, v, true) for k, v in values.items()},
        "mae": _mean([abs(e) for e in errors]),
        "bias": _mean(errors),
        "ece": _mean([abs(b["predicted"] - b["true"]) for b in bins for _ in range(b["count"])]),
    }


def _calibration(
    places: dict[Any, list[Place]],
    results: list[dict],
    scores: dict[str, list[float]],
    true_ious: list[float],
    max_dets: int,
) -> dict:
    """How far scores are from the IoU of what they find, and probabilities from what happens."""
    all_places = [place for of_class in places.values() for place in of_class]
    probs = None
    if all("mask_iou_probs" in r for r in results) and "quality_score" in scores:
        probs = {
            t: [r["mask_iou_probs"][k] for r in results] for t, k in (("0.50", 0), ("0.75", 5))
        }
    happened = {t: _happened(all_places, true_ious, float(t), max_dets) for t in ("0.50", "0.75")}
    of_score = {}
    for name, values in scores.items():
        binned, absolute = [], []
        for of_class in places.values():
            if not any(not _is_crowd(a) for place in of_class for a in place.objects):
                continue
            ious = _happened(of_class, values, 0, max_dets)
            if not ious:
                continue
            absolute.append(_mean([abs(values[i] - iou) for i, iou in ious.items()]))
            error = 0.0
            for k in range(25):
                inside = [
                    i
                    for i in ious
                    if k / 25 < values[i] <= (k + 1) / 25 or (k == 0 and values[i] == 0)
                ]
                hits = [ious[i] for i in inside if ious[i] > 0]
                if inside:
                    precision_times_iou = len(hits) / len(inside) * (_mean(hits) if hits else 0)
                    gap = abs(_mean([values[i] for i in inside]) - precision_times_iou)
                    error += len(inside) / len(ious) * gap
            binned.append(error)
        of_score[name] = {"laece": _mean(binned), "laace": _mean(absolute), "brier": {}, "ece": {}}
        for t, right in happened.items():
            p = probs[t] if probs and name == "quality_score" else values
            outcome = {i: float(iou > 0) for i, iou in right.items()}
            of_score[name]["brier"][t] = _mean([(p[i] - o) ** 2 for i, o in outcome.items()])
            of_score[name]["ece"][t] = _mean(
                [
                    abs(b["predicted"] - b["true"])
                    for b in _reliability(outcome, p)
                    for _ in range(b["count"])
                ]
            )
    return {
        "calibration": of_score,
        "reliability_of_scores": {
            name: _reliability(_happened(all_places, values, 0, max_dets), values)
            for name, values in scores.items()
        },
        "reliability_of_probs": {
            t: _reliability({i: float(iou > 0) for i, iou in happened[t].items()}, p)
            for t, p in (probs or {}).items()
        },
    }


def _happened(
    places: list[Place], scores: Sequence[float], threshold: float, max_dets: int
) -> dict[int, float]:
    """{detection that counts: IoU of the object that it finds, 0 if none}."""
    return {
        place.detections[k]: 0.0 if g is None else place.ious[k][g]
        for place in places
        for k, g in _matches(place, scores, threshold, max_dets, _crowds(place))
        if g is None or not _is_crowd(place.objects[g])
    }


def _correlation(statistic, first: list[float], second: list[float]) -> float:
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return float(statistic(first, second).statistic)


def _reliability(ious: dict[int, float], predicted_ious: list[float]) -> list[dict]:
    bins = []
    for k in range(10):
        low, high = k / 10, (k + 1) / 10
        inside = [
            i for i in ious if low <= predicted_ious[i] < high or predicted_ious[i] == high == 1
        ]
        predicted, true = [predicted_ious[i] for i in inside], [ious[i] for i in inside]
        bins.append(
            {
                "low": low,
                "high": high,
                "count": len(inside),
                "predicted": _mean(predicted),
                "true": _mean(true),
            }
        )
    return bins


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


# ---- form


def _class_names(annotations: dict) -> dict[Any, str]:
    """By id, in its order."""
    names = {c["id"]: str(c.get("name", c["id"])) for c in annotations["categories"]}
    several = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {c: f"{names[c]} ({c})" if names[c] in several else names[c] for c in sorted(names)}


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _nan_to_none(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nan_to_none(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    return value


def differences(actual: Any, expected: Any, path: str = "") -> Iterator[tuple[float, str]]:
    """
    Compare two values of JSON.

    Returns:
        for each number the absolute difference, of AP as a share of 100, and where it is; infinity
        where something is not a number in both, missing or surplus.
    """
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in sorted(expected.keys() | actual.keys()):
            inside = f"{path}/{key}"
            if key in expected and key in actual:
                yield from differences(actual[key], expected[key], inside)
            else:
                yield math.inf, f"{inside} is {'missing' if key in expected else 'surplus'}"
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        for k, (a, e) in enumerate(zip(actual, expected)):
            yield from differences(a, e, f"{path}/{k}")
    elif _is_number(expected) and _is_number(actual):
        scale = 100 if "/ap/" in path else 1
        yield abs(actual - expected) / scale, f"{path} is {actual}, expected {expected}"
    else:
        same = type(actual) is type(expected) and actual == expected
        yield 0.0 if same else math.inf, f"{path} is {actual}, expected {expected}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def main(report_file: str, results_file: str, annotations_file: str) -> int:
    """Say how far a report is from the truth; 1 if it is wrong."""
    report, results, annotations = (
        json.loads(Path(f).read_text(encoding="utf-8"))
        for f in (report_file, results_file, annotations_file)
    )
    expected = slow_mask_quality(results, annotations, report["max_dets"])
    found = list(differences({k: v for k, v in report.items() if k in expected}, expected))
    difference, where = max(found)
    print(f"{len(found)} numbers; the largest difference is {difference:.3g}: {where}")
    return int(difference > TOLERANCE)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("Usage: slow_mask_quality.py REPORT.json RESULTS.json ANNOTATIONS.json")
    sys.exit(main(*sys.argv[1:]))
