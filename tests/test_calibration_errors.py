"""Calibration errors in cases that can be worked out by hand; the slow second computation of all
numbers is compared in test_mask_quality.py."""

import math

import numpy as np
import pytest

from msrcnn_d2.evaluation.calibration_errors import (
    brier_score,
    iou_targets,
    localisation_aware_errors,
)
from msrcnn_d2.evaluation.matching import Overlaps, right_detections
from msrcnn_d2.report import write_report
from tests.helpers.filled_boxes import build_coco, calibrated, dataset_of, found, measure, thing

NAN = pytest.approx(math.nan, nan_ok=True)
# An object, a crowd, and an object of another class
OBJECT, CROWD, OTHER = (0, 0, 20, 20), (40, 0, 40, 40), (100, 0, 20, 20)
SCENE = [thing(OBJECT), thing(CROWD, iscrowd=1), thing(OTHER, category_id=2)]


def overlaps_of(results, annotations=SCENE):
    return Overlaps(build_coco(dataset_of(annotations)), results)


# ---- what a score should say


@pytest.mark.parametrize(
    "box, target, counts",
    [
        pytest.param(OBJECT, 1, True, id="equal"),
        pytest.param((0, 0, 10, 20), 1 / 2, True, id="half-of-the-object"),
        pytest.param((19, 19, 20, 20), 1 / 799, True, id="one-pixel-of-it"),
        pytest.param((20, 20, 20, 20), 0, True, id="none-of-it"),
        pytest.param(OTHER, 0, True, id="another-class"),
        pytest.param((0, 0, 0, 0), 0, True, id="empty-mask"),
        pytest.param((79, 0, 20, 20), 0, False, id="touches-the-crowd"),
    ],
)
def test_the_target_of_one_detection(box, target, counts):
    targets, counting = iou_targets(overlaps_of([found(box, 0.9)]), np.array([0.9]))

    assert targets.tolist() == [pytest.approx(target)]
    assert counting.tolist() == [counts]


def test_a_duplicate_has_the_target_0_and_scores_decide_which_one_it_is():
    overlaps = overlaps_of([found((0, 0, 10, 20), 0.9), found(OBJECT, 0.8)])

    assert iou_targets(overlaps, np.array([0.9, 0.8]))[0].tolist() == [0.5, 0]
    assert iou_targets(overlaps, np.array([0.1, 0.8]))[0].tolist() == [0, 1]


def test_what_touches_no_free_object_leaves_it_to_others():
    # The better score shares no pixel with the object
    overlaps = overlaps_of([found((20, 0, 20, 20), 0.9), found((0, 0, 10, 20), 0.1)])

    assert iou_targets(overlaps, np.array([0.9, 0.1]))[0].tolist() == [0, 0.5]


def test_only_the_best_count():
    overlaps = overlaps_of([found(OBJECT, 0.9), found((0, 0, 10, 20), 0.8), found(OTHER, 0.7)])

    targets, counts = iou_targets(overlaps, np.array([0.1, 0.8, 0.7]), max_dets=2)

    assert (targets.tolist(), counts.tolist()) == ([0, 0.5, 0], [False, True, True])


# ---- LaECE_0 and LaACE_0


ONE_CLASS = [
    # 0.5 and 0.51 share a bin, (0.48, 0.52]: errors of opposite sign cancel there
    pytest.param([0.5, 0.51], [0.8, 0.21], 0, 0.3, id="one-bin"),
    # 0.5 and 0.53 do not
    pytest.param([0.5, 0.53], [0.8, 0.23], 0.3, 0.3, id="two-bins"),
    # On an edge, 0.52 belongs to the lower bin
    pytest.param([0.5, 0.52], [0.8, 0.22], 0, 0.3, id="an-edge"),
    # Bins count by their detections: (3 * 0.1 + 1 * 0.5) / 4
    pytest.param([0.1, 0.1, 0.1, 0.9], [0, 0, 0, 0.4], 0.2, 0.2, id="weights"),
    # In a bin: scores 0.9, half right with IoU 0.8: precision x IoU is 0.4
    pytest.param([0.9, 0.9], [0.8, 0], 0.5, (0.1 + 0.9) / 2, id="precision-times-iou"),
    pytest.param([0.0, 1.0], [0.0, 1.0], 0, 0, id="perfect"),
    pytest.param([0.0, 1.0], [1.0, 0.0], 1, 1, id="the-opposite"),
]


@pytest.mark.parametrize("scores, targets, laece, laace", ONE_CLASS)
def test_errors_of_one_class(scores, targets, laece, laace):
    found = localisation_aware_errors(
        np.array(scores), np.array(targets), np.zeros(len(scores), dtype=int)
    )

    assert found == (pytest.approx(laece), pytest.approx(laace))


def test_classes_count_alike_and_those_without_detections_do_not():
    # Class 0: one detection, off by 0.4. Class 2: three, right. Class 1 has none.
    scores, targets = np.array([0.5, 0.2, 0.4, 0.6]), np.array([0.9, 0.2, 0.4, 0.6])

    errors = localisation_aware_errors(scores, targets, np.array([0, 2, 2, 2]))

    assert errors == (pytest.approx(0.2), pytest.approx(0.2))


def test_without_detections_there_are_no_errors():
    nothing = np.zeros(0)
    assert localisation_aware_errors(nothing, nothing, np.zeros(0, dtype=int)) == (NAN, NAN)


# ---- the probability that a mask is right


def test_the_better_mask_is_right_whatever_the_scores():
    overlaps = overlaps_of([found((0, 0, 14, 20), 0.9), found((0, 0, 18, 20), 0.1)])

    right, counts = right_detections(overlaps, overlaps.largest, thresholds=[0.5, 0.75, 0.95])

    assert right.tolist() == [[False, True], [False, True], [False, False]]
    assert counts.all()


def test_brier_score():
    probs, right = np.array([0.9, 0.2, 0.5]), np.array([True, False, True])
    assert brier_score(probs, right) == pytest.approx((0.1**2 + 0.2**2 + 0.5**2) / 3)
    assert brier_score(np.zeros(0), np.zeros(0, dtype=bool)) == NAN


# ---- all of it


def test_errors_of_a_calibrated_model():
    # Of class 1 the object, IoU 1, and a mistake; of class 2 a mask of IoU 0.6
    probs = [[1.0] * 10, [0.3] * 10, [0.8] * 5 + [0.1] * 5]
    results = [
        found(OBJECT, 0.9, 0.8),
        found((100, 80, 20, 20), 0.7, 0.5),
        found((100, 0, 12, 20), 0.5, 0.5, category_id=2),
    ]
    results = [calibrated(r, p) for r, p in zip(results, probs)]

    quality = measure(SCENE, results)

    errors = quality.calibration
    assert list(errors) == ["class_score", "predicted_iou", "mask_score", "quality_score"]
    # Errors of class scores -0.1 and 0.7; -0.1. Each is alone in its bin
    of_scores = (0.4 + 0.1) / 2
    assert (errors["class_score"].laece, errors["class_score"].laace) == (
        pytest.approx(of_scores),
        pytest.approx(of_scores),
    )
    # Calibrated scores 1, 0.3, 0.45 for 1, 0, 0.6
    assert errors["quality_score"].laece == pytest.approx((0.15 + 0.15) / 2)
    # Read as probabilities, class scores are 0.9, 0.7, 0.5. At 0.5 two are right, at 0.75 one
    assert errors["class_score"].brier == {
        "0.50": pytest.approx((0.1**2 + 0.7**2 + 0.5**2) / 3),
        "0.75": pytest.approx((0.1**2 + 0.7**2 + 0.5**2) / 3),
    }
    assert errors["class_score"].ece["0.50"] == pytest.approx((0.1 + 0.7 + 0.5) / 3)
    # The calibrator has probabilities of its own: 1, 0.3, 0.8 and 1, 0.3, 0.1
    assert errors["quality_score"].brier == {
        "0.50": pytest.approx((0.3**2 + 0.2**2) / 3),
        "0.75": pytest.approx((0.3**2 + 0.1**2) / 3),
    }
    assert errors["quality_score"].ece == {
        "0.50": pytest.approx((0.3 + 0.2) / 3),
        "0.75": pytest.approx((0.3 + 0.1) / 3),
    }
    headline = quality.headline()
    assert headline["LaECE_quality_score"] == errors["quality_score"].laece
    assert headline["brier75_quality_score"] == errors["quality_score"].brier["0.75"]
    assert headline["ece50_class_score"] == errors["class_score"].ece["0.50"]
    in_use = {
        name: [(b.predicted, b.true) for b in bins if b.count]
        for name, bins in quality.reliability_of_scores().items()
    }
    assert in_use["quality_score"] == [
        pytest.approx((0.3, 0)),
        pytest.approx((0.45, 0.6)),
        pytest.approx((1, 1)),
    ]
    probs_at_75 = [b for b in quality.reliability_of_probs()["0.75"] if b.count]
    assert [(b.predicted, b.true) for b in probs_at_75] == [
        pytest.approx((0.1, 0)),
        pytest.approx((0.3, 0)),
        pytest.approx((1, 1)),
    ]


def test_the_expected_iou_has_no_errors_of_the_probability(tmp_path):
    result = calibrated(found(OBJECT, 0.9, 0.8), [0.9] * 5 + [0.7] * 5) | {"expected_iou": 0.85}

    quality = measure([thing(OBJECT)], [result])

    errors = quality.calibration["expected_iou"]
    assert (errors.laece, errors.brier, errors.ece) == (pytest.approx(0.15), {}, {})
    assert quality.to_json()["calibration"]["expected_iou"]["brier"] == {}
    of_expected_iou = {key: x for key, x in quality.headline().items() if "expected_iou" in key}
    assert of_expected_iou == {
        **{"pearson_expected_iou": NAN, "spearman_expected_iou": NAN},
        **{"LaECE_expected_iou": errors.laece, "LaACE_expected_iou": errors.laace},
    }
    row = [x for x in quality.table().splitlines() if "expected IoU" in x][-1]
    assert [cell.strip() for cell in row.split("|")][2:] == ["0.150", "0.150", *5 * [""]]
    page = write_report(quality, tmp_path).read_text()
    cells = "".join(f"<td>{x}</td>" for x in ("0.150", "0.150", *4 * "–"))
    assert f'<th scope="row">expected IoU</th>{cells}</tr>' in page


def test_mistakes_of_classes_without_objects_are_not_in_the_mean_over_classes():
    right, elsewhere = found(OBJECT, 0.9), found(OBJECT, 0.9, category_id=2)

    quality = measure([thing(OBJECT)], [right, elsewhere])

    assert quality.calibration["class_score"].laece == pytest.approx(0.1)
    assert quality.calibration["class_score"].brier["0.50"] == pytest.approx((0.01 + 0.81) / 2)
    assert quality.reliability_of_probs() == {}


def test_without_objects_there_is_no_mean_over_classes():
    errors = measure([thing(CROWD, iscrowd=1)], [found(OBJECT, 0.5)]).calibration["class_score"]

    assert (errors.laece, errors.laace, errors.brier["0.50"]) == (NAN, NAN, 0.25)
