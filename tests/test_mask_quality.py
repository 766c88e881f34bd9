import copy
import json
import math
import os
from functools import cache
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import scipy.ndimage

from msrcnn_d2.evaluation import measure_mask_quality
from msrcnn_d2.evaluation.average_precision import ENGINES
from msrcnn_d2.evaluation.matching import Overlaps
from msrcnn_d2.evaluation.score_statistics import (
    expected_calibration_error,
    pearson,
    reliability,
    spearman,
)
from tests.helpers.filled_boxes import (
    HEIGHT,
    WIDTH,
    build_coco,
    calibrated,
    dataset_of,
    found,
    measure,
    rle,
    scored,
    thing,
)
from tests.helpers.slow_mask_quality import differences, main, slow_mask_quality

NAN = pytest.approx(math.nan, nan_ok=True)
# An object, a crowd, and objects of another class and in another image
OBJECT, CROWD, OTHER, FAR = (0, 0, 20, 20), (40, 0, 40, 40), (100, 0, 20, 20), (0, 60, 20, 20)
NOWHERE, NOWHERE_ELSE = (100, 80, 20, 20), (130, 80, 20, 20)


# ---- which detections are matched, and with what


SCENE = [
    thing(OBJECT),
    thing(CROWD, iscrowd=1),
    thing(OTHER, category_id=2),
    thing(FAR, image_id=2),
]


@pytest.mark.parametrize(
    "box, matched, overlapping",
    [
        pytest.param(OBJECT, [1], [1], id="equal"),
        pytest.param((0, 0, 10, 20), [1 / 2], [1 / 2], id="half-of-the-object"),
        # 10 x 20 in common; 400 + 400 - 200 in the union
        pytest.param((10, 0, 20, 20), [], [1 / 3], id="shifted-by-half"),
        pytest.param(OTHER, [], [0], id="object-of-another-class"),
        pytest.param(FAR, [], [0], id="object-in-another-image"),
        pytest.param(NOWHERE, [], [0], id="nothing"),
        pytest.param((0, 0, 0, 0), [], [0], id="empty-mask"),
        # What falls to a crowd is in no statistics
        pytest.param((40, 0, 20, 20), [], [], id="inside-the-crowd"),
        pytest.param((70, 0, 20, 20), [], [], id="half-inside-the-crowd"),
        pytest.param((75, 0, 20, 20), [], [0], id="a-quarter-inside-the-crowd"),  # no object
    ],
)
def test_one_detection(box, matched, overlapping):
    quality = measure(SCENE, [found(box, 0.9, 0.8)])

    assert_ious(quality, matched, overlapping)
    numbers = quality.to_json()
    assert [numbers[k] for k in ("images", "objects", "detections")] == [2, 3, len(overlapping)]
    assert quality.num_objects == [2, 1]


def assert_ious(quality, matched, overlapping):
    """The IoUs of the detections with their objects, and of all with the nearest one."""
    part = quality.overall
    assert quality.matched_ious[quality.matched].tolist() == pytest.approx(matched)
    assert quality.true_ious[quality.counted].tolist() == pytest.approx(overlapping)
    assert (part.matched.count, part.all.count) == (len(matched), len(overlapping))
    for agreement, ious in [(part.matched, matched), (part.all, overlapping)]:
        mean = np.mean(ious) if ious else math.nan
        assert agreement.true_iou == pytest.approx(mean, nan_ok=True)


def test_the_higher_class_score_takes_the_object_though_its_mask_is_worse():
    worse, better = found((0, 0, 12, 20), 0.9, 0.1), found(OBJECT, 0.8, 0.9)

    assert_ious(measure([thing(OBJECT)], [worse, better]), [12 / 20], [12 / 20, 1])
    assert_ious(measure([thing(OBJECT)], [better, worse]), [12 / 20], [1, 12 / 20])


def test_what_takes_no_object_at_a_stricter_threshold_leaves_it_to_the_next():
    worse, better = found((0, 0, 12, 20), 0.9, 0.1), found((0, 0, 18, 20), 0.8, 0.9)

    parts = measure([thing(OBJECT)], [worse, better]).by_threshold

    assert list(parts) == [f"0.{k}" for k in range(50, 100, 5)]
    ious = {name: part.matched.true_iou for name, part in parts.items()}
    low, high = 12 / 20, 18 / 20
    # Equal to a threshold, an IoU still passes
    assert list(ious.values()) == pytest.approx(3 * [low] + 6 * [high] + [math.nan], nan_ok=True)
    assert [part.matched.count for part in parts.values()] == 9 * [1] + [0]
    assert all(part.all is None for part in parts.values())


def test_at_equal_class_scores_the_first_result_takes_the_object():
    results = [found((0, 0, width, 20), 0.5, 0.5) for width in (12, 20, 16)]

    for first, *others in (results, results[::-1]):
        quality = measure([thing(OBJECT)], [first, *others])
        assert quality.matched.tolist() == [True, False, False]


def test_a_detection_takes_the_free_object_with_the_largest_iou():
    # Two objects that overlap: IoUs of the second detection are 1 and, once that is taken, 12 / 28
    objects = [thing((0, 0, 20, 20)), thing((4, 0, 20, 20))]
    results = [found((0, 0, 20, 20), s, 0.5) for s in (0.9, 0.8, 0.7)]

    quality = measure(objects, results)

    # 16 x 20 in common, 24 x 20 in the union; then there is none left
    assert_ious(quality, [1, 16 / 24], [1, 1, 1])


def test_of_two_objects_with_the_same_iou_the_later_one_is_taken():
    small, medium = (thing(OBJECT, area=area) for area in (400, 2000))

    for annotations, size in [([small, medium], "medium"), ([medium, small], "small")]:
        parts = measure(annotations, [found(OBJECT, 0.9, 0.5)]).by_size
        assert [k for k, part in parts.items() if part.matched.count] == [size]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_crowd_takes_what_finds_no_other_object_and_any_number_of_it(engine):
    # The object lies in the crowd; all three detections in both
    crowd, inside = thing(CROWD, iscrowd=1), thing((50, 10, 20, 20))
    results = [found((50, 10, 14, 20), s, 0.5) for s in (0.9, 0.8, 0.7)]

    for annotations in ([crowd, inside], [inside, crowd]):
        quality = measure(annotations, results, engine)
        ious = quality.matched_ious.tolist()
        assert ious == pytest.approx([14 / 20, math.nan, math.nan], nan_ok=True)
        assert quality.counted.tolist() == [True, False, False]
        # Up to 0.7 the object is found, and beyond it all three fall to the crowd
        assert quality.overall.ap["class_score"] == pytest.approx(100 * 5 / 10)


def test_ious_of_all_thresholds_pass_at_their_own():
    # Widths 10, ..., 19 of 20: the IoUs are the ten thresholds
    objects = [thing((0, 10 * k, 20, 10)) for k in range(10)]
    results = [found((0, 10 * k, 10 + k, 10), 0.9, 0.5) for k in range(10)]

    parts = measure(objects, results).by_threshold.values()

    assert [part.matched.count for part in parts] == list(range(10, 0, -1))


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_best_of_a_class_and_image_count(engine):
    objects = [thing(OBJECT), thing(OTHER), thing(OBJECT, category_id=2), thing(OBJECT, 2)]
    results = [
        found(OBJECT, 0.7, 0.5),
        found(OTHER, 0.8, 0.5),
        found(OBJECT, 0.1, 0.5, category_id=2),
        found(OBJECT, 0.2, 0.5, image_id=2),
    ]

    quality = measure(objects, results, engine, max_dets=1)

    assert quality.counted.tolist() == [False, True, True, True]
    assert np.isnan(quality.matched_ious).tolist() == [True, False, False, False]
    assert quality.overall.all.count == 3
    # Class 1: two of three objects are found, precision is 1 at 67 of 101 recalls; class 2: all
    assert quality.overall.ap["class_score"] == pytest.approx(100 * (67 / 101 + 1) / 2)
    assert measure(objects, results, engine).overall.ap["class_score"] == pytest.approx(100)


# ---- AP, and the share of the gap


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "scores, ap, gap_closed",
    [
        # By class score a mistake, the object, a mistake: half is right where it is found. By true
        # IoU the object is first. The mask score puts it first, second or last:
        pytest.param([(0.9, 0.1), (0.8, 0.9), (0.7, 0.1)], (50, 100), 1, id="closed"),
        pytest.param([(0.9, 0.9), (0.8, 0.9), (0.7, 0.1)], (50, 50), 0, id="unchanged"),
        pytest.param([(0.9, 0.9), (0.8, 0.1), (0.7, 0.9)], (50, 100 / 3), -1 / 3, id="worse"),
        pytest.param([(0.7, 0.1), (0.8, 0.9), (0.6, 0.1)], (100, 100), math.nan, id="no-gap"),
        pytest.param([(0.7, 0.9), (0.8, 0.1), (0.6, 0.1)], (100, 50), math.nan, id="no-gap-worse"),
    ],
)
def test_ap_and_the_gap_that_mask_scores_close(scores, ap, gap_closed, engine):
    boxes = (NOWHERE, OBJECT, NOWHERE_ELSE)
    results = [found(box, score, iou) for box, (score, iou) in zip(boxes, scores)]

    quality = measure([thing(OBJECT)], results, engine)

    by_class_score, by_mask_score = ap
    expected = {"class_score": by_class_score, "mask_score": by_mask_score, "true_iou": 100}
    assert quality.overall.ap == pytest.approx(expected)
    expected_gap = {"mask_score": pytest.approx(gap_closed, nan_ok=True)}
    assert quality.overall.gap_closed == expected_gap
    curves = {name: 101 * [value / 100] for name, value in expected.items()}
    for of_threshold in quality.precision_recall().values():
        assert of_threshold == {k: pytest.approx(v) for k, v in curves.items()}


@pytest.mark.parametrize("engine", ENGINES)
def test_there_is_no_gap_where_duplicates_put_the_true_iou_behind_the_class_score(engine):
    # IoU 0.6 of the second object comes after 0.9 of a second detection of the first
    results = [
        found(OBJECT, 0.9, 0.5),
        found((100, 0, 12, 20), 0.8, 0.5),
        found((0, 0, 18, 20), 0.7, 0.5),
    ]

    part = measure([thing(OBJECT), thing(OTHER)], results, engine).by_threshold["0.50"]

    by_true_iou = 100 * (51 + 50 * 2 / 3) / 101
    expected = {"class_score": 100, "mask_score": 100, "true_iou": by_true_iou}
    assert part.ap == pytest.approx(expected)
    assert part.gap_closed == {"mask_score": NAN}


@pytest.mark.parametrize("engine", ENGINES)
def test_ap_at_each_threshold_counts_the_masks_that_are_good_enough(engine):
    # IoU 0.7 found first, and 1 second, of two objects
    results = [found((0, 0, 14, 20), 0.9, 0.9), found(OTHER, 0.8, 0.9)]

    quality = measure([thing(OBJECT), thing(OTHER)], results, engine)

    # Above 0.7 the first is a mistake: then precision is 1 / 2 at 51 of 101 recalls
    good = {"class_score": 100, "mask_score": 100, "true_iou": 100}
    half = 100 * 51 / 101
    bad = {"class_score": half / 2, "mask_score": half / 2, "true_iou": half}
    parts = list(quality.by_threshold.values())
    assert [part.ap for part in parts] == 5 * [pytest.approx(good)] + 5 * [pytest.approx(bad)]
    assert [part.gap_closed["mask_score"] for part in parts] == 5 * [NAN] + 5 * [0]
    assert quality.overall.ap == pytest.approx({k: (good[k] + bad[k]) / 2 for k in good})
    curve = quality.precision_recall()["0.75"]["class_score"]
    assert curve == pytest.approx(51 * [1 / 2] + 50 * [0])


@pytest.mark.parametrize("has_mask_scores", [True, False])
def test_ap_and_the_gap_by_calibrated_score(has_mask_scores):
    # By class score the object is second; by calibrated score it is first
    results = [found(NOWHERE, 0.9, 0.5), found(OBJECT, 0.8, 0.5)]
    if not has_mask_scores:
        results = [found(NOWHERE, 0.9), found(OBJECT, 0.8)]
    results = [calibrated(r, 10 * [p]) for r, p in zip(results, (0.2, 0.7))]

    quality = measure([thing(OBJECT)], results)

    by_mask_score = {"mask_score": 50} if has_mask_scores else {}
    expected = {"class_score": 50, **by_mask_score, "quality_score": 100, "true_iou": 100}
    assert quality.overall.ap == pytest.approx(expected)
    assert list(quality.overall.ap) == list(expected)
    assert quality.rankings == list(expected)[:-1]
    gaps = {"mask_score": 0, "quality_score": 1} if has_mask_scores else {"quality_score": 1}
    assert quality.overall.gap_closed == pytest.approx(gaps)
    headline = quality.headline()
    assert {k: headline[f"gap_closed_{k}"] for k in gaps} == pytest.approx(gaps)
    assert headline["AP_quality_score"] == pytest.approx(100)
    assert "calibrated score" in quality.table()


# ---- parts


@pytest.mark.parametrize("engine", ENGINES)
def test_classes_without_objects_are_not_in_the_mean(engine):
    annotations = [thing(OBJECT), thing(OTHER, category_id=5)]
    categories = ((9, "none"), (5, "twice"), (1, "twice"), (7, None))
    results = [
        found(OBJECT, 0.9, 0.8),
        found((100, 0, 10, 20), 0.8, 0.8, category_id=5),
        found(NOWHERE, 0.9, 0.8, category_id=9),
    ]

    quality = measure(annotations, results, engine, categories=categories)
    parts = quality.by_class

    # In the order of the ids, and with them where names do not tell classes apart
    assert list(parts) == ["twice (1)", "twice (5)", "None", "none"]
    # IoU 1 / 2: right at one of ten thresholds
    assert [p.ap["class_score"] for p in parts.values()] == pytest.approx(
        [100, 10, math.nan, math.nan], nan_ok=True
    )
    assert quality.overall.ap["class_score"] == pytest.approx((100 + 10) / 2)
    assert [p.matched.count for p in parts.values()] == [1, 1, 0, 0]
    assert [p.all.count for p in parts.values()] == [1, 1, 0, 1]
    assert parts["twice (5)"].matched.true_iou == pytest.approx(1 / 2)
    assert parts["None"].all.true_iou == NAN
    curve = quality.precision_recall()["0.55"]["class_score"]
    assert curve == pytest.approx(101 * [1 / 2])


def test_classes_without_names_are_named_by_their_ids():
    dataset = dataset_of([thing(OBJECT)])
    dataset["categories"] = [{"id": 2}, {"id": 1}]

    quality = measure_mask_quality(build_coco(dataset), [found(OBJECT, 0.9)])

    assert list(quality.by_class) == quality.classes == ["1", "2"]


@pytest.mark.parametrize("engine", ENGINES)
def test_results_of_an_unknown_class_are_left_out(engine):
    known, unknown = found(OBJECT, 0.5, 0.8), found(OBJECT, 0.9, 0.1, category_id=77)

    with_unknown = measure([thing(OBJECT)], [unknown, known, unknown], engine)

    assert with_unknown.counted.tolist() == [False, True, False]
    assert with_unknown.to_json() == measure([thing(OBJECT)], [known], engine).to_json()


@pytest.mark.parametrize("engine", ENGINES)
def test_sizes_are_those_of_the_objects_and_of_unmatched_masks(engine):
    objects = [thing((0, 0, 10, 20)), thing((0, 20, 96, 98)), thing((100, 0, 30, 40))]
    results = [
        found((0, 0, 10, 20), 0.9, 0.5),  # small
        found((0, 20, 96, 90), 0.8, 0.5),  # of medium size, the object is large
        found((100, 0, 25, 40), 0.7, 0.5),  # small, the object is medium
        found((100, 50, 40, 40), 0.95, 0.5),  # medium, without an object
    ]

    parts = measure(objects, results, engine).by_size

    assert list(parts) == ["small", "medium", "large"]
    assert [p.matched.count for p in parts.values()] == [1, 1, 1]
    assert [p.all.count for p in parts.values()] == [1, 2, 1]
    assert [p.matched.true_iou for p in parts.values()] == pytest.approx([1, 25 / 30, 90 / 98])
    # Of medium size the mistake comes first, and the object is found at 7 of 10 thresholds. The
    # large object is found at 9; beyond, its detection is no mistake among large ones.
    assert [p.ap["class_score"] for p in parts.values()] == pytest.approx([100, 70 / 2, 90])
    assert [p.ap["true_iou"] for p in parts.values()] == pytest.approx([100, 70, 90])
    gaps = [p.gap_closed["mask_score"] for p in parts.values()]
    assert gaps == [NAN, pytest.approx(0), NAN]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "box, sizes",
    [
        pytest.param((0, 0, 31, 33), ["small"], id="1023"),
        pytest.param((0, 0, 32, 32), ["small", "medium"], id="1024"),
        pytest.param((0, 0, 25, 41), ["medium"], id="1025"),
        pytest.param((0, 0, 95, 97), ["medium"], id="9215"),
        pytest.param((0, 0, 96, 96), ["medium", "large"], id="9216"),
        pytest.param((0, 0, 79, 117), ["large"], id="9243"),
    ],
)
def test_an_area_at_the_limit_belongs_to_both_sides(box, sizes, engine):
    parts = measure([thing(box)], [found(box, 0.9, 0.5)], engine).by_size

    assert [k for k, p in parts.items() if p.matched.count] == sizes
    assert [k for k, p in parts.items() if p.ap["class_score"] == pytest.approx(100)] == sizes
    # An unmatched detection is where its mask is
    alone = measure([thing(OBJECT, 2)], [found(box, 0.9, 0.5)], engine).by_size
    assert [k for k, p in alone.items() if p.all.count] == sizes


@pytest.mark.parametrize("engine", ENGINES)
def test_only_some_images(engine):
    annotations = [thing(OBJECT, 1), thing(OTHER, 1), thing(FAR, 2), thing(CROWD, 2, iscrowd=1)]
    results = [found(FAR, 0.9, 0.8, image_id=2), found(NOWHERE, 0.8, 0.8, image_id=1)]

    quality = measure(annotations, results, engine, img_ids=[2, 2])

    numbers = quality.to_json()
    assert [numbers[k] for k in ("images", "objects", "detections")] == [1, 1, 1]
    assert quality.counted.tolist() == [True, False]
    assert quality.overall.ap["class_score"] == pytest.approx(100)
    assert_ious(quality, [1], [1])
    assert quality.to_json() == measure(annotations, results, engine, img_ids=(2,)).to_json()


def test_what_falls_to_a_crowd_at_one_threshold_can_find_an_object_at_another():
    inside_a_crowd = (50, 10, 20, 20)
    truth = [thing(CROWD, iscrowd=1), thing(inside_a_crowd)]
    # The first takes the object at 0.5, so the better one falls to the crowd; not so at 0.75
    results = [found((50, 10, 12, 20), 0.9, 0.5), found((50, 10, 18, 20), 0.8, 0.9)]
    quality = measure(truth, results)
    assert quality.counted.tolist() == [True, False]
    assert quality.by_threshold["0.50"].matched.true_iou == pytest.approx(0.6)
    strict = quality.by_threshold["0.75"]
    assert (strict.matched.count, strict.matched.true_iou) == (1, pytest.approx(0.9))
    assert strict.ap["class_score"] == pytest.approx(100)


def test_objects_of_unknown_classes_are_passed_over():
    unknown = thing(OTHER, category_id=9)
    with_it = measure([thing(OBJECT), unknown], [found(OBJECT, 0.9, 0.5)])
    assert with_it.num_objects == [1, 0]
    assert with_it.to_json() == measure([thing(OBJECT)], [found(OBJECT, 0.9, 0.5)]).to_json()


# ---- calibration and correlation


def test_errors_of_predicted_ious():
    # Matched: IoU 1/2 and 3/4, predicted 0.6 and 0.65, in one bin; a mistake predicted as 0.3
    results = [
        found((0, 0, 10, 20), 0.9, 0.6),
        found((100, 0, 15, 20), 0.8, 0.65),
        found(NOWHERE, 0.7, 0.3),
    ]

    part = measure([thing(OBJECT), thing(OTHER)], results).overall

    assert part.matched.true_iou == pytest.approx(5 / 8)
    assert part.matched.mae == pytest.approx((0.1 + 0.1) / 2)
    assert part.matched.bias == pytest.approx(0)
    assert part.matched.ece == pytest.approx(0)  # both bins of one, 0.625 on average twice
    assert part.all.true_iou == pytest.approx(5 / 12)
    assert part.all.mae == pytest.approx((0.1 + 0.1 + 0.3) / 3)
    assert part.all.bias == pytest.approx((0.1 - 0.1 + 0.3) / 3)
    assert part.all.ece == pytest.approx((2 * 0 + 1 * 0.3) / 3)
    for name in ("class_score", "predicted_iou", "mask_score"):
        assert part.matched.spearman[name] == pytest.approx(1 if name == "predicted_iou" else -1)


def test_pessimism_is_a_negative_bias():
    results = [found(OBJECT, 0.9, 0.8), found((100, 0, 10, 20), 0.8, 0.45)]

    matched = measure([thing(OBJECT), thing(OTHER)], results).overall.matched

    assert matched.bias == pytest.approx(-(0.2 + 0.05) / 2)
    assert matched.mae == matched.ece == pytest.approx((0.2 + 0.05) / 2)


def test_a_reliability_diagram_of_matched_and_of_all_detections():
    # Matched: IoU 1/2 and 3/4. IoU 1/4 is none of an object, but one of all detections.
    results = [
        found((0, 0, 10, 20), 0.9, 0.64),
        found((100, 0, 15, 20), 0.8, 0.66),
        found((0, 60, 5, 20), 0.7, 0.68),
        found(NOWHERE, 0.6, 0.2),
    ]

    diagrams = measure([thing(OBJECT), thing(OTHER), thing(FAR)], results).reliability()

    assert list(diagrams) == ["matched", "all"]
    in_use = {
        name: [(b.low, b.high, b.count, b.predicted, b.true) for b in bins if b.count]
        for name, bins in diagrams.items()
    }
    assert in_use["matched"] == [pytest.approx((0.6, 0.7, 2, 0.65, 5 / 8))]
    assert in_use["all"] == [
        pytest.approx((0.2, 0.3, 1, 0.2, 0)),
        pytest.approx((0.6, 0.7, 3, 0.66, (1 / 2 + 3 / 4 + 1 / 4) / 3)),
    ]


def test_a_prediction_on_an_edge_belongs_to_the_bin_above_and_1_to_the_last():
    edges = np.array([k / 10 for k in range(11)])

    bins = reliability(edges, edges)

    assert [b.low for b in bins] == edges[:-1].tolist()
    assert [b.high for b in bins] == edges[1:].tolist()
    assert [b.count for b in bins] == 9 * [1] + [2]
    assert [b.predicted for b in bins] == pytest.approx([*edges[:-2], 0.95])


def test_a_prediction_right_below_an_edge_belongs_to_the_bin_below():
    below = np.nextafter([k / 10 for k in range(1, 11)], 0)

    assert [b.count for b in reliability(below, np.ones(10))] == 10 * [1]


def test_bins_without_detections():
    bins = reliability(np.array([0.25, 0.75]), np.array([0.5, 1.0]), num_bins=4)

    assert [(b.low, b.high, b.count) for b in bins] == [
        (0, 0.25, 0),
        (0.25, 0.5, 1),
        (0.5, 0.75, 0),
        (0.75, 1, 1),
    ]
    assert [b.true for b in bins] == [NAN, 0.5, NAN, 1]
    assert [b.predicted for b in bins] == [NAN, 0.25, NAN, 0.75]
    assert expected_calibration_error(bins) == pytest.approx(0.25)
    assert expected_calibration_error(reliability(np.zeros(0), np.zeros(0))) == NAN


def test_calibration_error_weighs_bins_by_their_detections():
    predicted, true = np.array([0.1, 0.1, 0.1, 0.9]), np.array([0.2, 0.0, 0.4, 0.4])

    # 0.1 for 0.2 on average, three times; 0.9 for 0.4
    error = expected_calibration_error(reliability(predicted, true))

    assert error == pytest.approx((3 * 0.1 + 0.5) / 4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "first, second, of_values, of_ranks",
    [
        pytest.param([1, 2, 3], [1, 2, 3], 1, 1, id="line"),
        pytest.param([1, 2, 3], [5, 3, 1], -1, -1, id="falling-line"),
        # Deviations -1, 0, 1 and -4, -3, 7: 11 / sqrt(2 * 74)
        pytest.param([1, 2, 3], [1, 2, 12], 11 / math.sqrt(148), 1, id="curve"),
        # Deviations of values and ranks -1.5, 0, 0, 1.5 and -1.5, 0.5, -0.5, 1.5: 4.5 / sqrt(22.5)
        pytest.param([1, 2.5, 2.5, 4], [1, 3, 2, 4], 0.9**0.5, 0.9**0.5, id="ties"),
        pytest.param([2, 1, 2, 1], [3, 3, 1, 1], 0, 0, id="unrelated"),
        # The mean of three times 0.1 is not 0.1
        pytest.param(3 * [0.1], [0.1, 0.2, 0.4], math.nan, math.nan, id="constant"),
        pytest.param([0.1, 0.2, 0.4], 3 * [0.1], math.nan, math.nan, id="constant-truth"),
        pytest.param([0.5], [0.5], math.nan, math.nan, id="single"),
        pytest.param([], [], math.nan, math.nan, id="none"),
    ],
)
def test_correlations(first, second, of_values, of_ranks):
    first, second = np.array(first, dtype=float), np.array(second, dtype=float)

    assert pearson(first, second) == pytest.approx(of_values, nan_ok=True)
    assert spearman(first, second) == pytest.approx(of_ranks, nan_ok=True)


def test_constant_scores_have_no_correlation():
    results = [found(OBJECT, 0.5, 0.5), found((100, 0, 15, 20), 0.5, 0.6)]

    agreement = measure([thing(OBJECT), thing(OTHER)], results).overall.matched

    expected = {"class_score": math.nan, "predicted_iou": -1, "mask_score": -1}
    assert agreement.pearson == pytest.approx(expected, nan_ok=True)
    assert agreement.spearman == pytest.approx(expected, nan_ok=True)


# ---- models without mask scores, and detections that find nothing


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_without_mask_scores(engine):
    results = [found(NOWHERE, 0.9), found(OBJECT, 0.8), found((100, 0, 15, 20), 0.7)]

    quality = measure([thing(OBJECT), thing(OTHER)], results, engine)

    part = quality.overall
    assert part.ap.keys() == {"class_score", "true_iou"}
    assert part.gap_closed == {}
    for agreement in (part.matched, part.all):
        assert agreement.pearson.keys() == agreement.spearman.keys() == {"class_score"}
        assert [agreement.mae, agreement.bias, agreement.ece] == 3 * [NAN]
    assert part.matched.spearman["class_score"] == pytest.approx(1)
    assert part.all.spearman["class_score"] == pytest.approx(-0.5)  # ranks 3, 2, 1 and 1, 3, 2
    assert quality.reliability() == {}
    assert all(x.keys() == part.ap.keys() for x in quality.precision_recall().values())
    kinds = ("AP", "pearson", "spearman", "LaECE", "LaACE", "brier50", "brier75", "ece50", "ece75")
    names = [f"{kind}_class_score" for kind in kinds]
    assert list(quality.headline()) == [names[0], "AP_true_iou", *names[1:], "matched"]


def test_a_score_that_some_results_lack_is_none_of_the_model():
    results = [found(OBJECT, 0.9, 0.8), found(OTHER, 0.8)]

    objects = [thing(OBJECT), thing(OTHER)]

    numbers = measure(objects, results).to_json()

    assert numbers == measure(objects, [found(OBJECT, 0.9), found(OTHER, 0.8)]).to_json()


@pytest.mark.parametrize("engine", ENGINES)
def test_detections_that_find_nothing(engine):
    quality = measure([thing(OBJECT)], [found(NOWHERE, 0.9, 0.8), found(FAR, 0.8, 0.6)], engine)

    part = quality.overall
    assert part.ap == {"class_score": 0, "mask_score": 0, "true_iou": 0}
    assert part.gap_closed == {"mask_score": NAN}
    assert part.matched.count == 0
    assert [part.matched.true_iou, part.matched.mae, part.matched.bias] == 3 * [NAN]
    assert [part.matched.ece, part.matched.pearson["mask_score"]] == 2 * [NAN]
    assert (part.all.count, part.all.true_iou, part.all.mae) == (2, 0, pytest.approx(0.7))
    assert [b.count for b in quality.reliability()["matched"]] == 10 * [0]
    assert [b.count for b in quality.reliability()["all"]] == [0, 0, 0, 0, 0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("engine", ENGINES)
def test_no_objects(engine):
    quality = measure([thing(CROWD, iscrowd=1)], [found(NOWHERE, 0.9, 0.8)], engine)

    assert list(quality.overall.ap.values()) == 3 * [NAN]
    assert (quality.to_json()["objects"], quality.overall.all.count) == (0, 1)
    curves = quality.to_json()["precision_recall"].values()
    assert all(x == {"class_score": [], "mask_score": [], "true_iou": []} for x in curves)


def test_the_headline_has_the_numbers_of_the_whole():
    results = [
        found(NOWHERE, 0.9, 0.2),
        found((0, 0, 12, 20), 0.8, 0.7),
        found((100, 0, 18, 20), 0.7, 0.8),
    ]

    quality = measure([thing(OBJECT), thing(OTHER)], results)

    part, headline = quality.overall, quality.headline()
    matched = part.matched
    assert headline == {
        **{f"AP_{name}": part.ap[name] for name in ("class_score", "mask_score", "true_iou")},
        "gap_closed_mask_score": part.gap_closed["mask_score"],
        **{f"pearson_{name}": r for name, r in matched.pearson.items()},
        **{f"spearman_{name}": r for name, r in matched.spearman.items()},
        **{"mae": matched.mae, "bias": matched.bias, "ece": matched.ece, "matched": 2},
        **{f"LaECE_{name}": x.laece for name, x in quality.calibration.items()},
        **{f"LaACE_{name}": x.laace for name, x in quality.calibration.items()},
        **{f"brier50_{name}": x.brier["0.50"] for name, x in quality.calibration.items()},
        **{f"brier75_{name}": x.brier["0.75"] for name, x in quality.calibration.items()},
        **{f"ece50_{name}": x.ece["0.50"] for name, x in quality.calibration.items()},
        **{f"ece75_{name}": x.ece["0.75"] for name, x in quality.calibration.items()},
    }
    assert len(headline) == 4 + 6 + 4 + 3 * 6
    # IoU 0.6 and 0.9 for 0.7 and 0.8
    assert (headline["mae"], headline["bias"]) == (pytest.approx(0.1), pytest.approx(0, abs=1e-12))


# ---- all numbers, against another computation of them


def random_mask(rng, size):
    """A rectangle or an ellipse of any of COCO's sizes, at times beyond the border."""
    height, width = size
    radii = np.exp(rng.uniform(np.log(4), np.log(0.9 * height), 2))
    center = rng.uniform(0, [height, width])
    ys, xs = np.ogrid[:height, :width]
    dy, dx = abs(ys - center[0]) / radii[0], abs(xs - center[1]) / radii[1]
    return (np.maximum(dy, dx) if rng.random() < 0.5 else np.hypot(dy, dx)) <= 1


def annotation_of(mask, image_id, category_id, iscrowd=0):
    encoded = rle(mask)
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": mask_util.toBbox(encoded).tolist(),
        "area": int(mask.sum()),
        "iscrowd": int(iscrowd),
        "segmentation": encoded,
    }


def perturbed(mask, rng):
    """A mask like those that a model finds: shifted, thinner, thicker, or something else."""
    shift = rng.integers(-3, 4, 2)
    mask = np.roll(mask, shift, axis=(0, 1))
    steps = int(rng.integers(1, 4))
    kind = rng.choice(["shifted", "eroded", "dilated", "other"], p=[0.4, 0.25, 0.25, 0.1])
    if kind == "eroded":
        return scipy.ndimage.binary_erosion(mask, iterations=steps)
    if kind == "dilated":
        return scipy.ndimage.binary_dilation(mask, iterations=steps)
    return random_mask(rng, mask.shape) if kind == "other" else mask


def detections_of(
    coco_gt, annotations, category_ids, rng, copies=2, decimals=6, scores=True, probs=False
):
    """Imperfect detections of the objects in random order, some of them of another class."""
    results = []
    for annotation in annotations * copies:
        wrong = rng.random() < 0.15
        score, iou = (round(float(x), decimals) for x in rng.random(2))
        result = {
            "image_id": annotation["image_id"],
            "category_id": int(rng.choice(category_ids)) if wrong else annotation["category_id"],
            "score": score,
            "segmentation": rle(perturbed(coco_gt.annToMask(annotation).astype(bool), rng)),
        }
        result = scored(result, iou) if scores else result
        if probs:
            result = calibrated(result, np.sort(rng.random(10).round(decimals))[::-1].tolist())
        results.append(result)
    return [results[k] for k in rng.permutation(len(results))]


def random_case(seed, objects=8, crowds=0.0, classes=3, image_ids=(12, 5, 40), **kwargs):
    """
    Up to `objects`, which overlap, in each image but the last.

    Args:
        crowds: share of crowds among the objects.
        kwargs: for :func:`detections_of`.

    Returns:
        a dataset and results.
    """
    rng = np.random.default_rng(seed)
    annotations = [
        annotation_of(
            random_mask(rng, (HEIGHT, WIDTH)),
            image,
            int(rng.integers(1, classes + 1)),
            rng.random() < crowds,
        )
        for image in image_ids[:-1]
        for _ in range(rng.integers(objects // 2, objects + 1))
    ]
    # The last class never has an object
    dataset = dataset_of(annotations, image_ids, ((3, "c"), (1, "a"), (2, "b"), (4, "d")))
    results = detections_of(build_coco(dataset), annotations, [1, 2, 3, 4], rng, **kwargs)
    nothing = found(NOWHERE, 0.5, image_id=image_ids[-1])
    nothing = scored(nothing, 0.4) if kwargs.get("scores", True) else nothing
    nothing = calibrated(nothing, 10 * [0.25]) if kwargs.get("probs") else nothing
    return dataset, [*results, nothing]


CASES = {
    "a-few": random_case(0),
    "many-of-each": random_case(1, copies=8),
    "one-class-of-many-objects": random_case(2, objects=25, classes=1),
    "crowds": random_case(3, crowds=0.3, copies=4),
    "only-crowds": random_case(4, crowds=1.0),
    "ties": random_case(5, decimals=1, copies=5),
    "ties-and-crowds": random_case(6, decimals=1, crowds=0.2, copies=5),
    "all-scores-0-or-1": random_case(7, decimals=0, copies=3),
    "without-mask-scores": random_case(8, scores=False, crowds=0.2),
    "more-images": random_case(9, objects=5, image_ids=(3, 9, 1, 30, 12, 4), crowds=0.1),
    "one-object": random_case(10, objects=1, copies=1),
    "calibrated": random_case(11, crowds=0.2, copies=4, probs=True),
    "calibrated-ties": random_case(12, crowds=0.1, copies=3, probs=True, decimals=1),
    "calibrated-without-mask-scores": random_case(13, scores=False, probs=True),
}


@cache
def slow(case, max_dets):
    dataset, results = CASES[case]
    return slow_mask_quality(results, dataset, max_dets)


def assert_close(actual, expected):
    found = list(differences(actual, expected))
    wrong = [where for difference, where in sorted(found, reverse=True) if difference > 1e-9]
    assert not wrong, f"{len(wrong)} of {len(found)} numbers differ; " + "\n".join(wrong[:5])


@pytest.mark.parametrize("max_dets", [100, 4])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_all_numbers_are_those_of_a_slow_computation(case, engine, max_dets):
    dataset, results = copy.deepcopy(CASES[case])

    quality = measure_mask_quality(build_coco(dataset), results, engine, max_dets)

    numbers = quality.to_json()
    assert_close(numbers, slow(case, max_dets))
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    # Nothing that was passed in has changed
    assert (dataset["annotations"], results) == (CASES[case][0]["annotations"], CASES[case][1])


@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_of_some_images_are_those_of_a_smaller_set(engine):
    dataset, results = CASES["more-images"]
    chosen = [12, 3, 30]

    quality = measure_mask_quality(build_coco(dataset), results, engine, img_ids=chosen)

    smaller = {
        **dataset,
        "images": [x for x in dataset["images"] if x["id"] in chosen],
        "annotations": [x for x in dataset["annotations"] if x["image_id"] in chosen],
    }
    of_them = [r for r in results if r["image_id"] in chosen]
    assert 0 < len(of_them) < len(results)
    assert_close(quality.to_json(), slow_mask_quality(of_them, smaller))


def test_random_cases_are_what_they_are_called():
    matches, distinct = {}, {}
    for name, (dataset, results) in CASES.items():
        scores = [r["score"] for r in results]
        matches[name] = Overlaps(build_coco(dataset), results).match(scores, max_dets=4)
        distinct[name] = len(set(scores)) / len(scores)

    assert {k for k, m in matches.items() if not m.beyond.any()} == {"one-object"}
    on_crowds = {k for k, m in matches.items() if m.ignored.any()}
    assert on_crowds >= {"crowds", "only-crowds", "ties-and-crowds"}
    assert max(distinct["ties"], distinct["ties-and-crowds"]) < 1 / 4
    numbers = [slow(name, 100) for name in CASES]
    gaps = [x["overall"]["gap_closed"].get("mask_score") for x in numbers]
    assert sum(gap is not None and abs(gap) > 0.01 for gap in gaps) > 5
    for size in ("small", "medium", "large"):
        assert sum(x["by_size"][size]["matched"]["count"] for x in numbers) > 5


# ---- real images


def annotations_file(name) -> Path:
    """One of a data set, where there is any; else the test is skipped."""
    root = Path(__file__).parent.parent
    folders = [os.environ.get("DETECTRON2_DATASETS"), "../shared/data/datasets"]
    for folder in filter(None, folders):
        if (root / folder / name).is_file():
            return root / folder / name
    pytest.skip(f"no {name}: set DETECTRON2_DATASETS to the folder that it is in")


def real_case(name, num_images, copies):
    """Images of a data set, those with crowds first, and perturbed truth as their detections."""
    dataset = json.loads(annotations_file(name).read_text())
    crowded = {a["image_id"] for a in dataset["annotations"] if a["iscrowd"]}
    images = sorted(dataset["images"], key=lambda x: (x["id"] not in crowded, x["id"]))[:num_images]
    chosen = {x["id"] for x in images}
    annotations = [a for a in dataset["annotations"] if a["image_id"] in chosen]
    dataset = {"images": images, "annotations": annotations, "categories": dataset["categories"]}
    rng = np.random.default_rng(0)
    category_ids = sorted({a["category_id"] for a in annotations})
    return dataset, detections_of(build_coco(dataset), annotations, category_ids, rng, copies)


@pytest.mark.parametrize(
    "name, num_images, copies",
    [
        pytest.param("nuclei/annotations/nuclei_val.json", 12, 2, id="nuclei"),
        pytest.param("coco/annotations/instances_val2017.json", 20, 2, id="coco"),
    ],
)
def test_all_numbers_on_real_objects(name, num_images, copies):
    dataset, results = real_case(name, num_images, copies)
    expected = slow_mask_quality(results, dataset)
    assert expected["overall"]["matched"]["count"] > 100

    for engine in ENGINES:
        quality = measure_mask_quality(build_coco(copy.deepcopy(dataset)), results, engine)
        assert_close(quality.to_json(), expected)


# ---- the comparison itself


@pytest.mark.parametrize(
    "changed, difference, where",
    [
        ({"ap": {"x": 51.0}, "n": [1, None]}, 0.01, "/ap/x is 51.0, expected 50.0"),
        ({"ap": {"x": 50.0}, "n": [1.5, None]}, 0.5, "/n/0 is 1.5, expected 1"),
        ({"ap": {"x": 50.0}, "n": [1, 0.0]}, math.inf, "/n/1 is 0.0, expected None"),
        ({"ap": {"x": None}, "n": [1, None]}, math.inf, "/ap/x is None, expected 50.0"),
        ({"ap": {"x": math.nan}, "n": [1, None]}, math.inf, "/ap/x is nan, expected 50.0"),
        ({"ap": {}, "n": [1, None]}, math.inf, "/ap/x is missing"),
        ({"ap": {"x": 50.0, "y": 1}, "n": [1, None]}, math.inf, "/ap/y is surplus"),
        ({"ap": {"x": 50.0}, "n": [1]}, math.inf, "/n is [1], expected [1, None]"),
    ],
)
def test_a_difference_is_found(changed, difference, where):
    expected = {"ap": {"x": 50.0}, "n": [1, None]}

    assert max(differences(expected, expected))[0] == 0
    assert max(differences(changed, expected)) == (pytest.approx(difference), where)


def test_the_script_checks_a_report(tmp_path, capsys):
    dataset, results = CASES["a-few"]
    report = measure_mask_quality(build_coco(dataset), results).to_json()
    wrong = copy.deepcopy(report)
    wrong["by_size"]["small"]["ap"]["true_iou"] += 1e-6
    files = {"results": results, "truth": dataset, "right": {**report, "more": 1}, "wrong": wrong}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    paths = [str(tmp_path / f"{name}.json") for name in files]

    assert main(paths[2], *paths[:2]) == 0
    assert "numbers; the largest difference is" in capsys.readouterr().out
    assert main(paths[3], *paths[:2]) == 1
    assert "1e-08: /by_size/small/ap/true_iou is" in capsys.readouterr().out
