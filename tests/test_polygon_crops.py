import numpy as np
import pytest
import torch

from detectron2.structures import PolygonMasks

from msrcnn_d2.modeling.polygon_crops import crop_polygons, polygon_areas
from tests.helpers.rasterised import assert_areas_are_rasterised

SQUARE = [10.0, 10, 30, 10, 30, 30, 10, 30]
TRIANGLE = [5.0, 40, 60.5, 44.25, 20.1, 70.7]
BOW_TIE = [0.0, 0, 40, 40, 40, 0, 0, 40]  # intersects itself
APART = [50.0, 10, 70, 10, 70, 30, 50, 30]
HALF_OVER = [20.0, 10, 40, 10, 40, 30, 20, 30]
INSIDE = [12.0, 12, 17, 12, 17, 17, 12, 17]
MOVED = [90.0, 110, 90, 90, 110, 90]  # a triangle of 200 pixels
AROUND = [-50.0, -50, 900, -50, 900, 900, -50, 900]
OUTSIDE = [-30.0, 10, -10, 10, -10, 30]
# A comb: three teeth of 20 x 10 pixels in the image, their back outside of it
CUT_TWICE = [
    *(120.0, 0, 80, 0, 80, 10, 110, 10, 110, 20, 80, 20),
    *(80, 30, 110, 30, 110, 40, 80, 40, 80, 50, 120, 50),
]


def assert_same_crops(masks, boxes, mask_size=28):
    expected = masks.crop_and_resize(boxes, mask_size)
    crops = crop_polygons(masks, boxes, mask_size)
    assert crops.dtype == expected.dtype == torch.bool
    assert crops.is_contiguous()
    assert torch.equal(crops, expected)
    return crops


@pytest.mark.parametrize("mask_size", [14, 28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "objects, box",
    [
        pytest.param([[SQUARE]], [10, 10, 30, 30], id="fills-its-square-box"),
        pytest.param([[SQUARE]], [8.3, 11.7, 29.9, 40.2], id="partly-outside"),
        pytest.param([[SQUARE]], [15, 15, 20, 20], id="box-inside-the-object"),
        pytest.param([[SQUARE]], [40, 40, 60, 60], id="outside-the-box"),
        pytest.param([[TRIANGLE]], [5, 40, 61, 71], id="triangle"),
        pytest.param([[BOW_TIE]], [0, 0, 40, 40], id="intersects-itself"),
        pytest.param([[TRIANGLE[::-1]]], [5, 4, 71, 61], id="other-direction"),
        pytest.param([[[3.0, 3, 3, 3, 3, 3]]], [0, 0, 9, 9], id="all-vertices-in-one-point"),
        pytest.param([[[3.0, 3, 9, 3, 5, 3]]], [0, 0, 9, 9], id="all-vertices-on-a-line"),
        pytest.param([[[-20.0, -20, 30, -20, 30, 30]]], [-5, -5, 9, 9], id="negative-coordinates"),
        pytest.param([[SQUARE, TRIANGLE]], [5, 8, 61, 71], id="two-polygons"),
        pytest.param([[SQUARE, SQUARE]], [5, 8, 61, 71], id="the-same-polygon-twice"),
        pytest.param([[SQUARE] * 300], [5, 8, 61, 71], id="more-polygons-than-a-byte-counts"),
        pytest.param([[]], [5, 8, 61, 71], id="removed"),
        pytest.param([[], [SQUARE], []], [5, 8, 61, 71], id="removed-before-and-after-another"),
        pytest.param([[SQUARE, BOW_TIE], [], [SQUARE]], [5, 8, 61, 71], id="two-none-one"),
        pytest.param([[SQUARE]], [20, 20, 20, 20], id="empty-box"),
        pytest.param([[SQUARE]], [20, 8, 20, 40], id="box-without-width"),
        pytest.param([[SQUARE]], [25, 28, 15, 12], id="negative-sides"),
        pytest.param([[SQUARE]], [20, 20, 20.05, 20.4], id="box-in-a-pixel"),
        pytest.param([[SQUARE]], [20, 20, 20 + 0.1, 21], id="side-at-detectron2s-limit"),
    ],
)
def test_crops_are_those_of_detectron2(objects, box, dtype, mask_size):
    boxes = torch.tensor([box] * len(objects), dtype=dtype)

    assert_same_crops(PolygonMasks(objects), boxes, mask_size)


def random_polygon(rng):
    """Coordinates of 3 to 120 vertices in, or somewhat outside of, an image of 640 pixels."""
    count = int(rng.choice([3, 4, 10, 40, 120]))
    angles = np.sort(rng.uniform(0, 2 * np.pi, count))
    outline = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.4, 1, (count, 1))
    polygon = rng.uniform(-20, 660, 2) + outline * np.exp(rng.uniform(0, 6))
    return (polygon.round() if rng.random() < 0.3 else polygon).ravel()


def random_boxes(rng, objects):
    """For each object a box that is up to a third off, square or at integers at times."""
    boxes = []
    for polygons in objects:
        points = np.concatenate([*polygons, rng.uniform(0, 640, 4)]).reshape(-1, 2)
        points = points if not polygons else points[:-2]
        low, high = points.min(axis=0), points.max(axis=0)
        box = np.concatenate([low, high]) + rng.uniform(-0.33, 0.33, 4) * np.tile(high - low, 2)
        if rng.random() < 0.3:
            box = box.round()
        if rng.random() < 0.3:
            box[2:] = box[:2] + box[2] - box[0]
        boxes.append(box)
    return torch.tensor(np.array(boxes), dtype=torch.float32)


@pytest.mark.parametrize("mask_size", [14, 28])
def test_crops_and_areas_of_random_objects_are_those_of_detectron2(mask_size):
    rng = np.random.default_rng(mask_size)
    objects = [[random_polygon(rng) for _ in range(rng.integers(0, 5))] for _ in range(500)]
    masks = PolygonMasks(objects)

    crops = assert_same_crops(masks, random_boxes(rng, objects), mask_size)

    assert crops.flatten(1).any(dim=1).sum() > 300  # of about 400 that have polygons
    assert_areas_are_rasterised(masks, (640, 640), polygon_areas(masks, (640, 640)))


def test_thousands_of_polygons_are_cropped_at_once():
    rng = np.random.default_rng(0)
    objects = [[random_polygon(rng)] for _ in range(50)]
    masks = PolygonMasks(objects * 100)

    crops = assert_same_crops(masks, random_boxes(rng, masks.polygons))

    assert len(crops) == 5000
    assert_areas_are_rasterised(masks, (640, 640), polygon_areas(masks, (640, 640)))


@pytest.mark.parametrize(
    "objects, expected",
    [
        pytest.param([[SQUARE]], [400], id="square"),
        pytest.param([[SQUARE[::-1]]], [400], id="other-direction"),
        pytest.param([[[0.0, 0, 8, 0, 0, 6]]], [24], id="triangle"),
        pytest.param([[[0.0, 0, 8, 0, 8, 6, 4, 6, 4, 3, 0, 3]]], [36], id="L-shape"),
        pytest.param([[BOW_TIE]], [800], id="intersects-itself"),
        pytest.param([[SQUARE + SQUARE]], [0], id="even-and-odd-as-pycocotools"),
        pytest.param([[MOVED]], [100], id="a-corner-of-the-image"),
        pytest.param([[AROUND]], [10_000], id="covers-the-image"),
        pytest.param([[CUT_TWICE]], [3 * 20 * 10], id="leaves-and-comes-back"),
        pytest.param([[OUTSIDE], [SQUARE, OUTSIDE]], [0, 400], id="outside"),
        pytest.param([[SQUARE, INSIDE], [INSIDE]], [400, 25], id="one-in-another"),
        pytest.param([[[3.0, 3, 3, 3, 3, 3]]], [0], id="a-point"),
        pytest.param([[SQUARE, APART]], [800], id="polygons-add-up"),
        pytest.param([[SQUARE, SQUARE]], [400], id="the-same-counts-once"),
        pytest.param([[SQUARE, SQUARE[::-1]]], [400], id="whatever-their-direction"),
        pytest.param([[SQUARE, HALF_OVER]], [600], id="half-overlap"),
        pytest.param([[]], [0], id="removed"),
        pytest.param([[], [SQUARE], [], [SQUARE] * 2, []], [0, 400, 0, 400, 0], id="some-removed"),
        pytest.param([], [], id="no-objects"),
    ],
)
def test_areas_of_polygons(objects, expected):
    masks = PolygonMasks(objects)

    areas = polygon_areas(masks, (100, 100))

    assert areas.dtype == torch.float64
    torch.testing.assert_close(areas, torch.tensor(expected).double(), rtol=0.01, atol=1e-9)


def test_no_objects_have_no_crops():
    assert assert_same_crops(PolygonMasks([]), torch.zeros(0, 4)).shape == (0, 28, 28)


def test_each_mask_needs_a_box():
    with pytest.raises(ValueError, match="2 boxes for 1 masks"):
        crop_polygons(PolygonMasks([[SQUARE]]), torch.zeros(2, 4), 28)


def test_polygons_and_boxes_are_left_as_they_are():
    masks, boxes = PolygonMasks([[SQUARE, TRIANGLE]]), torch.tensor([[5.0, 8, 61, 71]])

    crop_polygons(masks, boxes, 28)
    polygon_areas(masks, (50, 50))

    assert [p.tolist() for p in masks.polygons[0]] == [SQUARE, TRIANGLE]
    assert boxes.tolist() == [[5, 8, 61, 71]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_polygons_that_are_not_finite_have_no_area(value):
    with pytest.raises(FloatingPointError, match="not finite"):
        polygon_areas(PolygonMasks([[[value, *SQUARE[1:]]]]), (100, 100))


def test_areas_of_objects_beyond_any_image_take_no_time():
    # pycocotools walks along polygons cell by cell
    beyond = [50.0, 50, 1e30, 50, 1e30, 1e30, 50, 1e30]
    areas = polygon_areas(PolygonMasks([[beyond], [AROUND]]), (100, 40_000))
    torch.testing.assert_close(areas, torch.tensor([39_950 * 50.0, 900 * 100]).double())


def test_areas_of_simple_polygons_inside_the_image_are_exact():
    # Rasterised, the triangle would have 0 or 1 pixels
    tiny = [10.25, 10.25, 11.0, 10.25, 10.25, 10.75]
    areas = polygon_areas(PolygonMasks([[tiny], [SQUARE, APART]]), (100, 100))
    assert areas.tolist() == [0.1875, 800]
