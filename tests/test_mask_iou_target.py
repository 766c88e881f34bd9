import copy

import numpy as np
import pytest
import torch
from matplotlib.path import Path

from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from msrcnn_d2.modeling.mask_iou_target import (
    CroppedMasks,
    _in_one_copy,
    crop_gt_masks,
    mask_iou_targets,
)
from tests.helpers.toy import toy_instances, without_objects

S = 28
FORMATS = ["polygon", "bitmask"]


def rectangle(x0, y0, x1, y1):
    return [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=float)]


def gt_masks(polygons, mask_format, image_size=(100, 100)):
    masks = PolygonMasks(polygons)
    return masks if mask_format == "polygon" else BitMasks.from_polygon_masks(masks, *image_size)


def cropped(masks, boxes, image_size=(100, 100)):
    proposals = Instances(image_size, proposal_boxes=Boxes(boxes), gt_masks=masks)
    return crop_gt_masks([proposals], S)[0].gt_masks


def targets(pred_masks, masks, boxes, image_size=(100, 100)):
    """The targets of `pred_masks` (N, S, S) in `boxes`, for ground truth of either form."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    gt = cropped(masks, boxes, image_size)
    return mask_iou_targets(pred_masks, gt.crops, gt.areas, boxes)


def columns(start, stop):
    """A predicted mask (1, S, S) that fills the columns from `start` to `stop`."""
    mask = torch.zeros(1, S, S, dtype=torch.bool)
    mask[:, :, start:stop] = True
    return mask


# Boxes of 28 x 28 pixels, so that a mask cell is a pixel: areas below are in pixels.
@pytest.mark.parametrize("mask_format", FORMATS)
@pytest.mark.parametrize(
    "predicted, truth, expected",
    [
        pytest.param((0, 28), (0, 0, 28, 28), 1.0, id="equal"),
        pytest.param((0, 14), (0, 0, 28, 28), 1 / 2, id="half-of-the-object"),
        # 28 x 28 predicted, all of it object, which is 56 x 28
        pytest.param((0, 28), (0, 0, 56, 28), 1 / 2, id="half-of-the-object-outside-the-box"),
        # 14 x 28 predicted, all of it object, which is 56 x 28
        pytest.param((0, 14), (0, 0, 56, 28), 1 / 4, id="quarter-predicted-half-outside"),
        # 7 of 35 columns in common
        pytest.param((0, 14), (7, 0, 28, 28), 7 / 28, id="overlap"),
        pytest.param((0, 28), (7, 0, 21, 28), 1 / 2, id="object-is-half-of-the-prediction"),
        pytest.param((0, 14), (14, 0, 28, 28), 0.0, id="disjoint"),
        pytest.param((0, 28), (40, 0, 68, 28), 0.0, id="object-outside-the-box"),
        pytest.param((0, 0), (0, 0, 28, 28), 0.0, id="nothing-predicted"),
        pytest.param((0, 0), (40, 0, 68, 28), 0.0, id="nothing-predicted-nothing-in-the-box"),
    ],
)
def test_squares_of_known_iou(mask_format, predicted, truth, expected):
    masks = gt_masks([rectangle(*truth)], mask_format)

    target = targets(columns(*predicted), masks, [0, 0, 28, 28])

    assert target.dtype == torch.float32
    torch.testing.assert_close(target, torch.tensor([expected]))


@pytest.mark.parametrize("mask_format", FORMATS)
def test_cells_are_measured_in_pixels_in_boxes_of_any_shape(mask_format):
    # Cells of 2 x 1 and 1 x 3 pixels. The first object fills its box; of the second,
    # 28 x 84 pixels, the box covers all, and a quarter is predicted.
    boxes = [[10, 10, 66, 38], [5, 10, 33, 94]]
    masks = gt_masks([rectangle(*box) for box in boxes], mask_format)

    ious = targets(torch.cat([columns(0, 28), columns(0, 7)]), masks, boxes)

    torch.testing.assert_close(ious, torch.tensor([1.0, 0.25]))


@pytest.mark.parametrize("mask_format", FORMATS)
def test_an_object_cut_by_the_image_border_is_what_is_left_of_it(mask_format):
    # It touches the right and the lower border of the 100 x 100 image.
    box = [72, 72, 100, 100]
    masks = gt_masks([rectangle(*box)], mask_format)

    torch.testing.assert_close(targets(columns(0, 28), masks, box), torch.tensor([1.0]))
    torch.testing.assert_close(targets(columns(0, 14), masks, box), torch.tensor([0.5]))


@pytest.mark.parametrize("prediction", [columns(0, 0), columns(0, 28)], ids=["empty", "full"])
@pytest.mark.parametrize(
    "masks",
    [PolygonMasks([[]]), BitMasks(torch.zeros(1, 100, 100))],
    ids=["no-polygon", "all-zero-bitmask"],
)
def test_an_object_that_augmentation_removed_has_iou_zero(masks, prediction):
    assert targets(prediction, masks, [0, 0, 28, 28]).tolist() == [0.0]


@pytest.mark.parametrize("mask_format", FORMATS)
@pytest.mark.parametrize("image_size", [(100, 100), (100.0, 100.0)], ids=["int", "float"])
@pytest.mark.parametrize(
    "parts, box",
    [
        pytest.param([(72, 10, 128, 38)], (72, 10, 100, 38), id="half-outside"),
        pytest.param([(-56, -28, 28, 28)], (0, 0, 28, 28), id="a-corner-is-inside"),
        pytest.param([(-200, -200, 300, 300)], (0, 0, 100, 100), id="covers-the-image"),
        pytest.param([(10, 10, 38, 38)] * 2, (10, 10, 38, 38), id="twice"),
        pytest.param([(10, 10, 30, 38), (20, 10, 40, 38)], (10, 10, 40, 38), id="half-overlaps"),
        pytest.param([(10, 10, 38, 38), (15, 15, 20, 20)], (10, 10, 38, 38), id="one-in-another"),
        pytest.param([(10, 10, 11, 90)] * 2, (10, 10, 11, 90), id="thin-and-twice"),
        pytest.param([(72, 10, 128, 38)] * 2, (72, 10, 100, 38), id="twice-and-half-outside"),
        pytest.param([(72, 10, 100, 38), (200, 0, 300, 9)], (72, 10, 100, 38), id="a-part-outside"),
        pytest.param([(72, 10, 1e6, 38)], (72, 10, 100, 38), id="far-outside"),
    ],
)
def test_a_perfect_mask_has_iou_one(parts, box, image_size, mask_format):
    polygons = [[p for part in parts for p in rectangle(*part)]]
    masks = gt_masks(polygons, mask_format)

    found = targets(columns(0, 28), masks, box, image_size)

    torch.testing.assert_close(found, torch.tensor([1.0]), rtol=0, atol=1e-4)
    half = targets(columns(0, 14), masks, box, image_size)
    torch.testing.assert_close(half, torch.tensor([0.5]), rtol=0, atol=1e-4)


def test_several_polygons_are_one_object():
    # Two halves with a gap of 10 columns between them, 9 columns each: 18 of 28 columns
    polygons = [rectangle(0, 0, 9, 28) + rectangle(19, 0, 28, 28)]

    iou = targets(columns(0, 28), PolygonMasks(polygons), [0, 0, 28, 28])

    torch.testing.assert_close(iou, torch.tensor([18 / 28]))


@pytest.mark.parametrize("side", [0.0, 0.01, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("mask_format", FORMATS)
def test_tiny_boxes_and_objects_have_an_iou_in_the_unit_interval(mask_format, side):
    box = [20.3, 20.3, 20.3 + side, 20.3 + side]
    polygons = [rectangle(*box), rectangle(20, 20, 21, 21), rectangle(0, 0, 99, 99)]
    masks = gt_masks(polygons, mask_format)

    for prediction in (columns(0, 0), columns(3, 9), columns(0, 28)):
        ious = targets(prediction.expand(3, -1, -1), masks, [box] * 3)
        assert ((ious >= 0) & (ious <= 1)).all(), ious


@pytest.mark.parametrize("side", [0.1, 0.4, 1.0])
def test_a_subpixel_object_that_is_predicted_completely_has_iou_one(side):
    box = [20.3, 20.3, 20.3 + side, 20.3 + side]

    iou = targets(columns(0, 28), PolygonMasks([rectangle(*box)]), box)

    torch.testing.assert_close(iou, torch.tensor([1.0]), rtol=0, atol=1e-4)


def test_cells_are_measured_in_subpixel_boxes_too():
    box = [20.3, 20.3, 20.7, 20.7]
    twice_as_wide = PolygonMasks([rectangle(20.3, 20.3, 21.1, 20.7)])

    iou = targets(columns(0, 28), twice_as_wide, box)

    torch.testing.assert_close(iou, torch.tensor([0.5]), rtol=0, atol=0.01)


def test_boxes_below_a_tenth_of_a_pixel_are_measured_as_detectron2_rasterises_them():
    # It scales this box, and with it the object that fills it, as if its sides were 0.1 long:
    # the object has 14 x 14 of the 28 x 28 cells.
    box = [20.0, 20.0, 20.05, 20.05]

    iou = targets(columns(0, 28), PolygonMasks([rectangle(*box)]), box)

    torch.testing.assert_close(iou, torch.tensor([0.25]), rtol=0, atol=0.01)


def test_a_huge_object_in_a_tiny_box_has_an_iou_near_zero():
    # 784 cells of 1 / 28 pixel a side in an object of 90 x 90 pixels
    iou = targets(columns(0, 28), PolygonMasks([rectangle(5, 5, 95, 95)]), [50, 50, 51, 51])

    torch.testing.assert_close(iou, torch.tensor([1 / 8100]), rtol=1e-3, atol=0)


def star(rng, center, radius):
    """A random star-shaped polygon (M, 2)."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    radii = radius * rng.uniform(0.5, 1, 12)
    return center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def random_cases(count):
    """Polygons, boxes around them that are up to a fifth off, and imperfect masks in the boxes."""
    rng = np.random.default_rng(0)
    polygons, boxes, predictions = [], [], []
    for _ in range(count):
        polygon = star(rng, rng.uniform(60, 100, 2), rng.uniform(10, 55))
        size = np.ptp(polygon, axis=0)
        box = np.concatenate([polygon.min(axis=0), polygon.max(axis=0)])
        box = (box + rng.uniform(-0.2, 0.2, 4) * np.tile(size, 2)).clip(0, 160)
        # The mask is the object, distorted: another star near it
        shifted = polygon + rng.uniform(-0.4, 0.4, 2) * size
        centers = box[:2] + (np.indices((S, S))[::-1].reshape(2, -1).T + 0.5) * (
            (box[2:] - box[:2]) / S
        )
        polygons.append(polygon)
        boxes.append(box)
        predictions.append(Path(shifted).contains_points(centers).reshape(S, S))
    return polygons, np.array(boxes, dtype=np.float32), np.array(predictions)


def slow_iou(polygon, box, prediction, subpixels=4):
    """IoU of the pasted mask with the whole object, counted on points 1 / `subpixels` apart."""
    low = np.floor(np.minimum(polygon.min(axis=0), box[:2]))
    high = np.ceil(np.maximum(polygon.max(axis=0), box[2:]))
    xs, ys = (np.arange(a, b, 1 / subpixels) + 0.5 / subpixels for a, b in zip(low, high))
    points = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    cells = np.floor((points - box[:2]) / (box[2:] - box[:2]) * S).astype(int)
    inside = ((cells >= 0) & (cells < S)).all(axis=1)
    x, y = cells.clip(0, S - 1).T
    predicted = prediction[y, x] & inside
    truth = Path(polygon).contains_points(points)
    return (predicted & truth).sum() / (predicted | truth).sum()


@pytest.mark.parametrize("mask_format", FORMATS)
def test_agrees_with_a_slow_count_at_full_resolution(mask_format):
    polygons, boxes, predictions = random_cases(150)
    masks = gt_masks([[p.reshape(-1)] for p in polygons], mask_format, image_size=(160, 160))

    ious = targets(torch.from_numpy(predictions), masks, boxes, (160, 160))

    truth = [slow_iou(*case) for case in zip(polygons, boxes, predictions)]
    assert np.std(truth) > 0.1  # good masks and bad ones
    errors = ious.numpy() - truth
    # Measured on 1500 such cases: mean error 0.004, largest 0.03, bias 0.0002. What remains is
    # the edge of the object, which the mask head's 28 x 28 cells cannot resolve.
    assert abs(errors).mean() < 0.005
    assert abs(errors).max() < 0.03
    assert abs(errors.mean()) < 0.001


def test_polygons_and_bitmasks_of_the_same_objects_agree():
    polygons, boxes, predictions = random_cases(150)
    by_polygon, by_bitmask = (
        targets(
            torch.from_numpy(predictions),
            gt_masks([[p.reshape(-1)] for p in polygons], mask_format, image_size=(160, 160)),
            boxes,
            (160, 160),
        )
        for mask_format in FORMATS
    )
    # Bitmasks rasterise the object to pixels first, an edge of half a pixel at most
    differences = (by_polygon - by_bitmask).abs()
    assert differences.mean() < 0.005
    assert differences.max() < 0.03


def test_no_gradient_flows_into_the_target():
    boxes = torch.tensor([[0.0, 0, 28, 28]], requires_grad=True)
    areas = torch.tensor([784.0], requires_grad=True)
    crops = torch.ones(1, S, S, dtype=torch.bool)

    assert not mask_iou_targets(columns(0, 14), crops, areas, boxes).requires_grad


@pytest.mark.parametrize("mask_format", FORMATS)
def test_areas_count_the_part_of_the_object_outside_its_box(mask_format):
    masks = gt_masks([rectangle(10, 10, 40, 30), rectangle(0, 0, 5, 4)], mask_format)

    gt = cropped(masks, torch.tensor([[20.0, 15, 25, 20], [50, 50, 60, 60]]))

    assert gt.areas.tolist() == [30 * 20, 5 * 4]
    assert gt.crops.sum(dim=(1, 2)).tolist() == [S * S, 0]


class SoftMasks(BitMasks):
    """Masks whose crops are floats, as Detectron2 allows."""

    def crop_and_resize(self, boxes, mask_size):
        return 0.4 + 0.2 * super().crop_and_resize(boxes, mask_size).float()


def test_float_crops_are_binarised_like_in_the_mask_loss():
    masks = gt_masks([rectangle(0, 0, 14, 28)], "bitmask")

    gt = cropped(SoftMasks(masks.tensor), torch.tensor([[0.0, 0, 28, 28]]))

    assert gt.crops.dtype == torch.bool
    assert torch.equal(gt.crops, columns(0, 14))


def test_cropped_masks_of_another_size_are_an_error():
    masks = CroppedMasks(torch.zeros(2, S, S, dtype=torch.bool), torch.zeros(2))
    boxes = torch.zeros(2, 4)

    assert masks.crop_and_resize(boxes, S) is masks.crops
    with pytest.raises(ValueError, match=r"\(2, 28, 28\), not \(2, 14, 14\)"):
        masks.crop_and_resize(boxes, 14)
    with pytest.raises(ValueError, match=r"\(2, 28, 28\), not \(1, 28, 28\)"):
        masks.crop_and_resize(boxes[:1], S)


@pytest.mark.parametrize("mask_format", FORMATS)
def test_crops_of_many_proposals_are_those_of_detectron2(mask_format):
    polygons, boxes, _ = random_cases(49)
    masks = gt_masks([[p.reshape(-1)] for p in polygons], mask_format, image_size=(160, 160))
    boxes = torch.from_numpy(boxes)

    gt = cropped(masks, boxes, image_size=(160, 160))

    assert torch.equal(gt.crops, masks.crop_and_resize(boxes, S))
    if mask_format == "bitmask":
        assert gt.areas.tolist() == masks.tensor.sum(dim=(1, 2)).tolist()


class SquaresOnly(PolygonMasks):
    """Polygons with their own ideas of a crop and an area."""

    def crop_and_resize(self, boxes, mask_size):
        return torch.ones(len(self), mask_size, mask_size, dtype=torch.bool)

    def area(self):
        return torch.full((len(self),), 7.0)


def test_a_subclass_of_polygon_masks_crops_and_measures_itself():
    gt = cropped(SquaresOnly([rectangle(0, 0, 5, 4)]), torch.tensor([[50.0, 50, 60, 60]]))

    assert gt.crops.all()
    assert gt.areas.tolist() == [7]


@pytest.mark.parametrize("mask_format", FORMATS)
def test_cropping_leaves_the_given_instances_as_they_are(mask_format):
    instances = toy_instances(mask_format)
    for x in instances:
        x.proposal_boxes = Boxes(x.gt_boxes.tensor + 2.5)
    before = copy.deepcopy(instances)

    copies = crop_gt_masks(instances, S)

    for x, copied, old in zip(instances, copies, before):
        assert isinstance(copied.gt_masks, CroppedMasks)
        assert copied.image_size == x.image_size
        assert torch.equal(copied.gt_classes, x.gt_classes)
        assert x.get_fields().keys() == old.get_fields().keys()
        assert torch.equal(x.proposal_boxes.tensor, old.proposal_boxes.tensor)
        if mask_format == "polygon":
            assert [p[0].tolist() for p in x.gt_masks] == [p[0].tolist() for p in old.gt_masks]
        else:
            assert torch.equal(x.gt_masks.tensor, old.gt_masks.tensor)


def test_images_without_proposals_are_passed_on():
    empty = without_objects()
    empty.proposal_boxes = Boxes(torch.zeros(0, 4))

    assert crop_gt_masks([empty], S) == [empty]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_box_that_is_not_finite_has_no_iou(value):
    crops, areas = columns(0, 28).expand(2, -1, -1), torch.tensor([784.0, 784])
    for place in range(4):
        boxes = torch.tensor([[0.0, 0, 28, 28], [0, 0, 28, 28]])
        boxes[0, place] = value
        ious = mask_iou_targets(columns(0, 28).expand(2, -1, -1), crops, areas, boxes)
        assert ious[0].isnan() and ious[1] == 1, place


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_polygons_without_an_end_are_refused(value):
    # pycocotools walks along them cell by cell
    polygon = rectangle(0, 0, 14, 28)
    polygon[0][2] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        cropped(PolygonMasks([polygon]), torch.tensor([[0.0, 0, 28, 28]]))


def test_polygons_may_be_as_far_from_a_tiny_box_as_images_are_wide():
    masks = PolygonMasks([rectangle(-9000, -9000, 9000, 9000)])
    assert cropped(masks, torch.tensor([[0.0, 0, 0.1, 0.1]])).crops.all()


@pytest.mark.parametrize("size", [7, 28])
def test_crops_and_areas_travel_in_one_copy(size):
    torch.manual_seed(0)
    crops, areas = torch.rand(5, size, size) > 0.5, torch.rand(5)
    copies = _in_one_copy(crops, areas, torch.device("cpu"))
    assert copies[0].dtype == torch.bool and torch.equal(copies[0], crops)
    assert copies[1].dtype == torch.float32 and torch.equal(copies[1], areas)
