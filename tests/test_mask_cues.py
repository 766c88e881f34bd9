"""Cues of a detection: their values on masks that are small enough to be worked out by hand."""

import math

import numpy as np
import pytest
import torch

from detectron2.structures import Boxes, Instances

from msrcnn_d2.modeling.mask_cues import CUES, Detections, mask_cues
from tests.helpers.simulated_cuda import SimulatedCuda

IMAGE_SIZE = (100, 200)  # height, width
BOX = (10.0, 20, 50, 40)  # a twenty-fifth of the image, twice as wide as high

# Four cells are the mask; the object may be a bit wider
BLOCK = [
    [0, 0, 0, 0],
    [0, 1, 0.75, 0.25],
    [0, 1, 0.75, 0.25],
    [0, 0, 0, 0],
]
# In nats
ENTROPY_OF_A_QUARTER = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)

OF_BLOCK = {
    "class_log_odds": math.log(4),
    "mask_iou": 0.5,
    "stability_60": 1,
    "stability_70": 1,
    "stability_80": 2 / 6,
    "stability_90": 2 / 6,
    "stability_95": 2 / 6,
    "mean_inside": 3.5 / 4,
    "soft_iou": 3.5 / 4.5,  # overlap 1 + 1 + 0.75 + 0.75; union 4 + 0.25 + 0.25
    "relative_mass": 4 / 4,
    "entropy": 4 * ENTROPY_OF_A_QUARTER / 16,
    "entropy_inside": 2 * ENTROPY_OF_A_QUARTER / 4,
    "entropy_per_area": ENTROPY_OF_A_QUARTER,
    "sharpness": (2 * 1 + 2 * 0.5 + 2 * (1 + 0.75)) / 8,  # left, right, top and bottom
    "undecided": 4 / 8,
    "compactness": 8 / 2,
    "fill": 4 / 16,
    "maximum": 1,
    "at_box_border": 0.5 / 4 / 4,  # two cells of the right side
    "tightness": 4 / 16,
    "log_box_area": math.log(1 / 25),
    "log_mask_area": math.log(1 / 100),
    "elongation": math.log(2),
    "sides_at_image_border": 0,
}
# What does not depend on the mask
OF_BOX = {
    k: OF_BLOCK[k]
    for k in ("class_log_odds", "mask_iou", "log_box_area", "elongation", "sides_at_image_border")
}
# No cell is inside, so area and outline count as one cell
OF_EMPTY = OF_BOX | {
    **{f"stability_{q}": 0 for q in (60, 70, 80, 90, 95)},
    "mean_inside": 0,
    "soft_iou": 0,
    "relative_mass": 4,
    "entropy": ENTROPY_OF_A_QUARTER,
    "entropy_inside": 0,
    "entropy_per_area": 16 * ENTROPY_OF_A_QUARTER,
    "sharpness": 0,
    "undecided": 16,
    "compactness": 1,
    "fill": 0,
    "maximum": 0.25,
    "at_box_border": 0.25,
    "tightness": 0,
    "log_mask_area": math.log(1 / 25 / 16),
}
OF_FULL = OF_BOX | {
    **{f"stability_{q}": 1 for q in (60, 70)},
    **{f"stability_{q}": 0 for q in (80, 90, 95)},
    "mean_inside": 0.75,
    "soft_iou": 12 / 16,
    "relative_mass": 0.75,
    "entropy": ENTROPY_OF_A_QUARTER,
    "entropy_inside": ENTROPY_OF_A_QUARTER,
    "entropy_per_area": ENTROPY_OF_A_QUARTER,
    "sharpness": 0,
    "undecided": 16,
    "compactness": 1 / 4,
    "fill": 1,
    "maximum": 0.75,
    "at_box_border": 0.75,
    "tightness": 1,
    "log_mask_area": math.log(1 / 25),
}


def instances_of(masks, boxes=None, scores=None, mask_ious=0.5, image_size=IMAGE_SIZE):
    """The detections of one image, as the ROI heads give them to a calibrator."""
    masks = torch.as_tensor(masks, dtype=torch.float32)
    count = len(masks)
    boxes = [BOX] * count if boxes is None else boxes
    scores = [0.8] * count if scores is None else scores
    instances = Instances(image_size)
    instances.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.as_tensor(scores, dtype=torch.float32)
    instances.pred_masks = masks[:, None]
    if mask_ious is not None:
        instances.pred_mask_ious = torch.full((count,), mask_ious)
    return instances


def random_image(seed, count=7, size=6):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 4, generator=generator) * 40
    corners[:, 2:] += corners[:, :2] + 2
    return instances_of(
        torch.rand(count, size, size, generator=generator),
        boxes=corners.tolist(),
        scores=torch.rand(count, generator=generator).tolist(),
    )


def cues_of(*instances):
    return mask_cues(Detections.of(list(instances)))


def named(row):
    return dict(zip(CUES, row.tolist(), strict=True))


@pytest.mark.parametrize(
    "mask, expected",
    [(BLOCK, OF_BLOCK), ([[0.25] * 4] * 4, OF_EMPTY), ([[0.75] * 4] * 4, OF_FULL)],
    ids=["block", "empty", "full"],
)
def test_cues_by_hand(mask, expected):
    (row,) = cues_of(instances_of([mask]))
    assert named(row) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_certain_masks_have_finite_cues(value):
    scores_and_ious = [(0.0, 0.0), (1.0, 1.0)]
    for score, iou in scores_and_ious:
        image = instances_of(torch.full((1, 28, 28), value), scores=[score], mask_ious=iou)
        detections = Detections.of([image])
        assert mask_cues(detections).isfinite().all()
        assert detections.score_log_odds.isfinite().all()


def test_without_detections():
    nothing, something = instances_of(torch.zeros(0, 6, 6)), random_image(0)
    assert cues_of(nothing, nothing).shape == (0, len(CUES))
    assert torch.equal(cues_of(nothing, something, nothing), cues_of(something))


def test_a_batch_has_the_cues_of_each_image_alone():
    first, second = random_image(1), random_image(2)
    second._image_size = (90, 110)
    expected = torch.cat([cues_of(first), cues_of(second)])
    assert torch.equal(cues_of(first, second), expected)


def test_a_model_without_predicted_ious():
    without, certain = (instances_of([BLOCK], mask_ious=x) for x in (None, 1.0))
    a, b = Detections.of([without]), Detections.of([certain])
    assert named(mask_cues(a)[0]) == pytest.approx(OF_BLOCK | {"mask_iou": 0}, abs=1e-4)
    # The score is the class score
    assert a.score_log_odds.item() == pytest.approx(math.log(4), rel=1e-5)
    assert b.score_log_odds.item() == pytest.approx(math.log(4), rel=1e-5)


def test_the_score_is_the_mask_score():
    found = Detections.of([instances_of([BLOCK])]).score_log_odds  # 0.8 x 0.5
    assert found.item() == pytest.approx(math.log(0.4 / 0.6), rel=1e-5)


@pytest.mark.parametrize(
    "box, sides",
    [
        ((1, 1, 199, 99), 0),  # one pixel of distance
        ((0.9, 20, 50, 40), 1),
        ((10, 0, 50, 99.1), 2),
        ((0, 0, 199.5, 40), 3),
        ((0, 0, 200, 100), 4),
    ],
)
def test_sides_at_the_border_of_the_image(box, sides):
    (row,) = cues_of(instances_of([BLOCK], boxes=[box]))
    assert named(row)["sides_at_image_border"] == sides


def test_cues_do_not_depend_on_the_scale():
    small = random_image(3)
    large = Instances(tuple(2 * x for x in IMAGE_SIZE), **small.get_fields())
    large.pred_boxes = Boxes(2 * small.pred_boxes.tensor)
    names = [k for k, name in enumerate(CUES) if name != "sides_at_image_border"]
    torch.testing.assert_close(cues_of(small)[:, names], cues_of(large)[:, names])


def test_a_box_without_area_has_finite_cues():
    assert cues_of(instances_of([BLOCK], boxes=[(10, 10, 10, 10)])).isfinite().all()


def test_shapes_of_masks_cell_by_cell():
    image = random_image(4, count=20)
    found = [named(row) for row in cues_of(image)]
    for probs, cues in zip(image.pred_masks[:, 0].tolist(), found, strict=True):
        cells = {(y, x) for y in range(6) for x in range(6) if probs[y][x] > 0.5}
        sides = [
            abs(probs[y][x] - probs[y + dy][x + dx])
            for y, x in np.ndindex(6, 6)
            for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
            if (y, x) in cells
            and (y + dy, x + dx) not in cells
            and 0 <= y + dy < 6
            and 0 <= x + dx < 6
        ]
        ys, xs = {y for y, _ in cells}, {x for _, x in cells}
        assert cues["compactness"] == pytest.approx(len(sides) / len(cells) ** 0.5)
        assert cues["sharpness"] == pytest.approx(sum(sides) / len(sides))
        around = (max(ys) - min(ys) + 1) * (max(xs) - min(xs) + 1)
        assert cues["tightness"] == pytest.approx(around / 36)


def test_each_cue_has_a_unit_and_a_meaning():
    for name, cue in CUES.items():
        assert cue.unit and cue.meaning, name


def test_the_host_does_not_wait_for_a_gpu():
    images = [random_image(5), instances_of(torch.zeros(0, 6, 6)), random_image(6)]
    expected = cues_of(*images)
    with SimulatedCuda().running() as device:
        on_gpu = [x.to("cuda") for x in images]
        device.events.clear()
        found = cues_of(*on_gpu)
        assert device.events == []
        assert torch.equal(found.cpu(), expected)
