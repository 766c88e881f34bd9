"""Operating points: small cases by hand, and the rules computed again, threshold by threshold."""

import math

import numpy as np
import pytest

from msrcnn_d2.evaluation.matching import Overlaps, right_detections
from msrcnn_d2.evaluation.operating_points import (
    ThresholdCurve,
    accept_thresholds,
    min_count,
    precision_interval,
)
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_runtime.ranking import UNREACHED, parse_operating_point
from tests.helpers.filled_boxes import build_coco, dataset_of, found, thing


def random_detections(seed, count=400, levels=60):
    """Scores with ties, and detections that are right the more often the higher the score."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=count) / levels
    return scores, rng.random(count) < scores, rng.integers(25, size=count)


# ---- the curve


def test_precision_and_objects_found_above_a_threshold():
    curve = ThresholdCurve(
        scores=np.array([0.9, 0.5, 0.9, 0.2]),
        right=np.array([True, True, False, False]),
        images=np.array([1, 1, 2, 2]),
        num_objects=4,
    )
    assert curve.thresholds.tolist() == [0.2, 0.5, 0.9]
    assert curve.counts.tolist() == [4, 3, 2]
    assert curve.precision.tolist() == [2 / 4, 2 / 3, 1 / 2]
    assert curve.found.tolist() == [0.5, 0.5, 0.25]


def test_other_thresholds_than_the_scores():
    curve = ThresholdCurve(
        np.array([0.9, 0.5]), np.array([1, 0]), np.array([1, 1]), 2, np.array([0, 0.5, 0.7, 1])
    )
    assert curve.counts.tolist() == [2, 2, 1, 0]
    np.testing.assert_array_equal(curve.precision, [0.5, 0.5, 1, np.nan])
    assert curve.found.tolist() == [0.5, 0.5, 0.5, 0]


def test_nothing_was_detected():
    curve = ThresholdCurve(np.zeros(0), np.zeros(0), np.zeros(0), 3, np.array([0.5]))
    point = curve.operating_point()
    assert curve.counts.tolist() == [0] and curve.found.tolist() == [0]
    assert np.isnan(curve.intervals).all()
    assert point.accept is None and point.drop is None and math.isnan(point.highest)
    assert point.between.count == 0 and point.between.of_objects == 0
    assert math.isnan(point.between.of_detections)


# ---- operating points


def three_parts():
    """
    100 detections at 0.9, of which 96 are right; 10 at 0.5, of which 5 are right; 100 at 0.1, of
    which 2 are right. 10 images have the same share of each. There are 206 objects.
    """
    scores = np.repeat([0.9, 0.5, 0.1], [100, 10, 100])
    right = np.zeros(210, dtype=bool)
    right[[*range(96), *range(100, 105), 110, 111]] = True
    return scores, right, np.arange(210) % 10, 206


def test_accept_look_at_and_drop():
    point = ThresholdCurve(*three_parts()).operating_point(0.95)
    # With those at 0.5, 101 of 110 are right, 92 %; below 0.5, 98 of 100 are wrong
    assert (point.accept, point.drop) == (0.9, 0.5)
    assert (point.accepted.count, point.accepted.right) == (100, 96)
    assert (point.between.count, point.between.right) == (10, 5)
    assert (point.dropped.count, point.dropped.right) == (100, 2)
    assert point.accepted.precision == 0.96 and point.between.precision == 0.5
    assert point.accepted.of_detections == 100 / 210
    assert point.dropped.of_objects == 2 / 206
    assert (point.highest, point.highest_at) == (0.96, 0.9)


def test_a_lower_precision_leaves_nothing_to_look_at():
    point = ThresholdCurve(*three_parts()).operating_point(0.9)
    # Below 0.9, 103 of 110 are wrong, so drop could be 0.9; but 0.5 is good enough to accept
    assert (point.accept, point.drop) == (0.5, 0.5)
    assert [g.count for g in (point.accepted, point.between, point.dropped)] == [110, 0, 100]
    assert math.isnan(point.between.precision)


def test_a_precision_that_no_threshold_reaches():
    point = ThresholdCurve(*three_parts()).operating_point(0.97)
    assert point.accept is None and point.accepted.count == 0
    assert point.highest == 0.96
    assert (point.drop, point.between.count) == (0.5, 110)  # 98 % of the others are wrong


COUNTS = {
    **{
        0.001: 20,
        0.3: 20,
        0.5: 20,
        0.6: 20,
        0.8: 20,
        0.9: 20,
        0.94: 20,
        0.95: 20,
        0.951: 21,
        0.96: 25,
        0.97: 34,
        0.98: 50,
    },
    **{0.99: 100, 0.995: 200, 0.999: 1000, 0.9995: 2000, 0.9999: 10_000, 0.99999: 100_000},
}


@pytest.mark.parametrize("precision", COUNTS)
def test_how_many_detections_tell(precision):
    assert min_count(precision) == COUNTS[precision]


@pytest.mark.parametrize("precision", [0, 1, 95, -0.1, math.nan])
def test_what_is_no_precision(precision):
    with pytest.raises(UserError, match=f"{precision} is no precision"):
        min_count(precision)


@pytest.mark.parametrize("precision", [0.95, 0.99])
@pytest.mark.parametrize("missing", [0, 1])
def test_few_detections_do_not_tell(precision, missing):
    count = COUNTS[precision] - missing
    right = np.repeat([True, False], count)
    curve = ThresholdCurve(np.repeat([0.9, 0.1], count), right, np.arange(2 * count), count)
    point = curve.operating_point(precision)
    # If they do not tell, neither 0.9 nor the lowest threshold of all has the precision
    assert (point.accept, point.drop) == ((None, None) if missing else (0.9, 0.9))
    alone = ThresholdCurve(np.full(count, 0.9), right[:count], np.arange(count), count)
    assert math.isnan(alone.operating_point(precision).highest) == bool(missing)


def test_nothing_is_dropped_where_everything_is_accepted():
    """Every second detection is right, above and below each threshold."""
    scores, right = np.repeat([0.9, 0.1], 30), np.tile([True, False], 30)
    point = ThresholdCurve(scores, right, np.arange(60), 30).operating_point(0.5)
    assert (point.accept, point.drop) == (0.1, None)
    assert [g.count for g in (point.accepted, point.between, point.dropped)] == [60, 0, 0]


def test_a_precision_that_is_just_reached():
    """19 of 20 are 95 percent, although 0.95 has no exact form; one of 20 may be dropped."""
    right = np.arange(40) % 20 > 0
    right[20:] = ~right[20:]
    scores = np.repeat([0.8, 0.2], 20)
    point = ThresholdCurve(scores, right, np.arange(40), 20).operating_point(0.95)
    assert (point.accept, point.drop) == (0.8, 0.8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("precision", [0.3, 0.6, 0.8, 0.95, 0.98])
def test_the_rules_again_threshold_by_threshold(seed, precision):
    scores, right, images = random_detections(seed)
    accept = drop = None
    for threshold in sorted(set(scores), reverse=True):
        above, below = right[scores >= threshold], right[scores < threshold]
        if len(above) >= COUNTS[precision] and above.mean() >= precision:
            accept = threshold
        if drop is None and len(below) >= COUNTS[precision] and (~below).mean() >= precision:
            drop = threshold
    if accept is not None and drop is not None:
        drop = min(drop, accept)
    if drop == min(scores):
        drop = None

    point = ThresholdCurve(scores, right, images, 300).operating_point(precision)

    assert (point.accept, point.drop) == (accept, drop)
    groups = point.accepted, point.between, point.dropped
    assert sum(g.count for g in groups) == len(scores)
    assert sum(g.right for g in groups) == right.sum()


# ---- confidence intervals


def test_the_interval_of_independent_detections():
    """One detection per image: the normal approximation, 0.8 +- 1.96 x sqrt(0.8 x 0.2 / 1000)."""
    right = (np.arange(1000) % 5 > 0).astype(int)
    low, high = precision_interval(right, np.ones(1000, dtype=int))
    assert low == pytest.approx(0.8 - 0.0248, abs=0.003)
    assert high == pytest.approx(0.8 + 0.0248, abs=0.003)


def test_detections_of_one_image_are_not_independent():
    """The same with ten detections per image that are all right or all wrong: as 100 of them."""
    right = 10 * (np.arange(100) % 5 > 0)
    low, high = precision_interval(right, np.full(100, 10))
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 100), rel=0.12)


def test_all_right_or_all_wrong_is_not_certain():
    """The bound b solves b^m = 0.025, where m images have detections."""
    counts = np.array([[3, 0], [2, 1], [0, 0]])
    intervals = precision_interval(counts * [1, 0], counts)
    assert intervals.tolist() == [[pytest.approx(0.025**0.5), 1], [0, pytest.approx(0.975)]]


def test_intervals_of_a_curve_are_those_of_its_groups():
    scores, right, images = random_detections(0)
    curve = ThresholdCurve(scores, right, images, 300)
    point = curve.operating_point(0.8)
    k = curve.thresholds.tolist().index(point.accept)
    assert curve.intervals[k].tolist() == [*point.accepted.interval]
    filled = curve.intervals[curve.counts > 0]
    assert (filled[:, 0] <= filled[:, 1]).all() and (0 <= filled).all() and (filled <= 1).all()
    again = ThresholdCurve(scores, right, images, 300)
    assert (again.intervals == curve.intervals).all()


# ---- what is right


def test_matching_goes_by_the_score_that_is_thresholded():
    """Of two masks of an object, the one with the higher score is right, the other a duplicate."""
    overlaps = Overlaps(
        build_coco(dataset_of([thing((10, 10, 20, 20)), thing((60, 10, 40, 40), iscrowd=1)])),
        [found((10, 10, 20, 20), 0.5), found((10, 10, 20, 16), 0.9), found((70, 20, 9, 9), 0.8)],
    )
    right, counted = right_detections(overlaps, np.array([0.5, 0.9, 0.8]))
    # The second has an IoU of 0.8
    assert right[:, 1].tolist() == [True] * 7 + [False] * 3
    assert right[:, 0].tolist() == [False] * 7 + [True] * 3
    assert not counted[:, 2].any() and counted[:, :2].all()  # it lies in a crowd
    right, counted = right_detections(overlaps, np.array([0.9, 0.5, 0.8]), max_dets=1)
    assert right[:, 0].all() and not right[:, 1].any()
    assert counted[:, 0].all() and not counted[:, 1:].any()


# ---- the table of thresholds


@pytest.mark.parametrize("seed", range(3))
def test_the_table_has_the_operating_points(seed):
    rng = np.random.default_rng(seed)
    probs = (rng.integers(50, size=(300, 10)) / 50).astype(np.float32)
    right, counted = rng.random((300, 10)) < probs**2, rng.random((300, 10)) < 0.9
    table = accept_thresholds(probs, right, counted)
    assert table.shape == (10, 99) and table.dtype == np.float32
    for t in range(10):
        kept = counted[:, t]
        curve = ThresholdCurve(probs[kept, t], right[kept, t], np.zeros(kept.sum()), 300)
        for percent in (1, 30, 50, 70, 90, 97, 99):
            accept = curve.operating_point(percent / 100).accept
            assert table[t, percent - 1] == (UNREACHED if accept is None else np.float32(accept))
    assert 0 < (table == UNREACHED).sum() < table.size


def test_tables_of_few_detections():
    assert (accept_thresholds(np.zeros((0, 10)), np.zeros((0, 10))) == UNREACHED).all()
    for count, highest in ((19, 0), (20, 95), (49, 97), (50, 98), (99, 98), (100, 99)):
        table = accept_thresholds(np.full((count, 10), 0.7), np.ones((count, 10)))
        assert (table[:, :highest] == np.float32(0.7)).all(), count
        assert (table[:, highest:] == UNREACHED).all(), count


# ---- their spelling


def test_spelling():
    assert parse_operating_point("p95@75") == (0.95, 0.75)
    assert parse_operating_point("p1@50") == (0.01, 0.5)


@pytest.mark.parametrize(
    "text",
    ["", "p95", "95@75", "p0@75", "p100@75", "p95@72", "p95@45", "p95@100", "p95@0.75", "p95@75 "],
)
def test_wrong_spellings_are_named(text):
    with pytest.raises(UserError, match="operating point"):
        parse_operating_point(text)
