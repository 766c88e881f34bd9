"""What holds for the targets of the MaskIoU head, whatever the objects, boxes and masks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from detectron2.config import instantiate
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from msrcnn_d2.modeling import mask_iou_head
from msrcnn_d2.modeling.mask_iou_target import MIN_BOX_SIDE, crop_gt_masks, mask_iou_targets
from tests.helpers.strategies import (
    HEIGHT,
    USUAL,
    WIDTH,
    Untouched,
    batches,
    bitmaps,
    boxes,
    holds,
    polygons,
    predicted_masks,
    seeds,
    stars,
)
from tests.helpers.toy import IMAGE_SIZE, NUM_CLASSES, tiny_mask_scoring_rcnn, toy_features

ROUNDING = 1e-5  # of the few operations in float32


def targets_of(proposals, predicted, size):
    """The targets of all images, one after the other."""
    cropped = [x for x in crop_gt_masks(proposals, size) if len(x)]
    if not cropped:
        return torch.zeros(0)
    return mask_iou_targets(
        torch.cat(predicted),
        torch.cat([x.gt_masks.crops for x in cropped]),
        torch.cat([x.gt_masks.areas for x in cropped]),
        torch.cat([x.proposal_boxes.tensor for x in cropped]),
    )


def targets_of_batch(batch):
    proposals = [batch.instances(k) for k in range(len(batch.objects))]
    return targets_of(proposals, batch.predicted, batch.size)


# ---- a slow definition: cell by cell, without what COCO and Detectron2 have to rasterise with


# A point stands for the square around it; an object is rasterised in cells of at most half a pixel
MARGIN = 0.6
PARTS = 4  # of a pixel, along each axis, whose centres are counted
POINTS = (np.indices((PARTS * HEIGHT, PARTS * WIDTH))[::-1].reshape(2, -1).T + 0.5) / PARTS


def areas_of_polygons(parts):
    """The least and the largest area of an object inside the image, counted point by point."""
    surely = np.zeros(len(POINTS), bool)
    possibly = surely.copy()
    for part in parts:
        inside, distance = inside_and_distance(part, POINTS)
        surely |= inside & (distance > MARGIN)
        possibly |= inside | (distance <= MARGIN)
    return [surely.sum() / PARTS**2, possibly.sum() / PARTS**2]


def inside_and_distance(polygon, points):
    """Whether points (N, 2) are inside, by the rule of even and odd, and how far from its edges."""
    inside, distance = np.zeros(len(points), bool), np.full(len(points), np.inf)
    vertices = polygon.reshape(-1, 2)
    for start, end in zip(vertices, np.roll(vertices, -1, axis=0)):
        edge = end - start
        along = ((points - start) @ edge / max(edge @ edge, 1e-300)).clip(0, 1)
        distance = np.minimum(
            distance, np.linalg.norm(points - start - along[:, None] * edge, axis=1)
        )
        crosses = (start[1] > points[:, 1]) != (end[1] > points[:, 1])
        if edge[1]:
            inside ^= crosses & (
                points[:, 0] < start[0] + (points[:, 1] - start[1]) * edge[0] / edge[1]
            )
    return inside, distance


def cells_of_polygons(parts, box, size, margin=1.0):
    """Which cells of a box surely are in the object, and which may be, near an edge, in cells."""
    sides = np.maximum(np.subtract(box[2:], box[:2]), MIN_BOX_SIDE)
    centres = np.indices((size, size))[::-1].reshape(2, -1).T + 0.5
    surely = np.zeros(size * size, bool)
    possibly = surely.copy()
    for part in parts:
        in_cells = (part.reshape(-1, 2) - box[:2]) / sides * size
        inside, distance = inside_and_distance(in_cells, centres)
        surely |= inside & (distance > margin)
        possibly |= inside | (distance <= margin)
    return surely, possibly


def cells_of_bitmap(mask, box, size, margin=1.5):
    """The same of a bitmask, whose pixels RoIAlign mixes, and whose border it repeats."""
    x0, y0, x1, y1 = box
    surely, possibly = np.zeros((size, size), bool), np.zeros((size, size), bool)
    if x1 <= x0 or y1 <= y0:
        return surely.ravel(), possibly.ravel()
    xs, ys = (np.linspace(a, b, size + 1) for a, b in ((x0, x1), (y0, y1)))
    for row in range(size):
        top, bottom = math.floor(ys[row] - margin), math.ceil(ys[row + 1] + margin)
        for column in range(size):
            left, right = math.floor(xs[column] - margin), math.ceil(xs[column + 1] + margin)
            part = mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
            whole = left >= 0 and top >= 0 and right <= WIDTH and bottom <= HEIGHT
            possibly[row, column] = part.any()
            surely[row, column] = whole and part.all()
    return surely.ravel(), possibly.ravel()


def bounds(shape, box, predicted):
    """The least and the largest IoU of a predicted mask with an object that edges leave open."""
    size = predicted.shape[-1]
    if isinstance(shape, list):
        cells, areas = cells_of_polygons(shape, box, size), areas_of_polygons(shape)
    else:
        cells, areas = cells_of_bitmap(shape, box, size), [shape.sum()] * 2
    return bounds_of(*cells, areas, box, predicted)


def bounds_of(surely, possibly, areas, box, predicted):
    predicted = predicted.numpy().ravel()
    sides = np.maximum(np.subtract(box[2:], box[:2]), MIN_BOX_SIDE)
    least, most = (np.asarray(areas) * predicted.size / sides.prod()).tolist()
    both, maybe_both = (surely & predicted).sum(), (possibly & predicted).sum()
    low = both / max(predicted.sum() + max(most, possibly.sum()) - both, 1)
    high = maybe_both / max(predicted.sum() + max(least, surely.sum()) - maybe_both, 1)
    union = max(predicted.sum() + max(least, surely.sum()) - maybe_both, 0)
    return low, min(high, 1) if union >= 1 else float(maybe_both > 0)


@holds(25, batch=batches(max_images=2, max_proposals=3))
def test_a_target_is_the_iou_up_to_the_cells_at_edges(batch):
    targets = targets_of_batch(batch)

    assert targets.dtype == torch.float32 and targets.isfinite().all()
    assert ((targets >= 0) & (targets <= 1)).all()
    cases = [
        (batch.objects[image][index], box, predicted)
        for image in range(len(batch.objects))
        for index, box, predicted in zip(
            batch.indices[image], batch.boxes[image], batch.predicted[image]
        )
    ]
    assert len(cases) == len(targets)
    for target, (shape, box, predicted) in zip(targets.tolist(), cases):
        low, high = bounds(shape, np.float32(box).astype(float), predicted)
        assert low - ROUNDING <= target <= high + ROUNDING, (target, low, high)


@holds(25, batch=batches())
def test_no_mask_has_a_larger_iou_than_the_part_of_the_object_in_the_box(batch):
    proposals = [batch.instances(k) for k in range(len(batch.objects))]
    crops = [x.gt_masks.crops for x in crop_gt_masks(proposals, batch.size) if len(x)]

    best = targets_of(proposals, crops, batch.size)

    assert ((best >= 0) & (best <= 1)).all()
    assert (targets_of_batch(batch) <= best + ROUNDING).all()
    assert torch.equal(best > 0, torch.cat([torch.zeros(0), *[x.sum((1, 2)) for x in crops]]) > 0)


@holds(25, batch=batches())
def test_crops_are_the_object_but_for_the_cells_at_its_edges(batch):
    for image, shapes in enumerate(batch.objects):
        proposals = batch.instances(image)
        if not len(proposals):
            continue
        crops = crop_gt_masks([proposals], batch.size)[0].gt_masks.crops
        for crop, index, box in zip(crops, batch.indices[image], batch.boxes[image]):
            shape, box = shapes[index], np.float32(box).astype(float)
            cells_of = cells_of_polygons if isinstance(shape, list) else cells_of_bitmap
            surely, possibly = cells_of(shape, box, batch.size)
            crop = crop.numpy().ravel()
            assert not (surely & ~crop).any() and not (crop & ~possibly).any()


@holds(25, batch=batches(max_images=2, max_proposals=6))
def test_crops_are_those_of_detectron2(batch):
    for image in range(len(batch.objects)):
        proposals = batch.instances(image)
        if len(proposals):
            crops = crop_gt_masks([proposals], batch.size)[0].gt_masks.crops
            boxes_of_image = proposals.proposal_boxes.tensor
            expected = proposals.gt_masks.crop_and_resize(boxes_of_image, batch.size)
            assert torch.equal(crops, expected > 0.5)


@holds(25, batch=batches())
def test_nothing_that_targets_are_computed_from_is_modified(batch):
    proposals = [batch.instances(k) for k in range(len(batch.objects))]
    untouched = Untouched(proposals, batch.predicted)

    targets_of(proposals, batch.predicted, batch.size)

    untouched.check()


# ---- symmetries


@holds(25, batch=batches(), seed=seeds())
def test_the_order_of_images_and_of_proposals_orders_the_targets(batch, seed):
    rng = np.random.default_rng(seed)
    images = rng.permutation(len(batch.objects))
    orders = [torch.from_numpy(rng.permutation(len(x))) for x in batch.boxes]
    proposals = [batch.instances(k) for k in range(len(batch.objects))]
    targets = targets_of_batch(batch).split([len(x) for x in batch.boxes])

    permuted = targets_of(
        [proposals[k][orders[k]] for k in images],
        [batch.predicted[k][orders[k]] for k in images],
        batch.size,
    )

    assert torch.equal(permuted, torch.cat([targets[k][orders[k]] for k in images]))


@holds(25, batch=batches())
def test_a_target_does_not_depend_on_what_else_is_in_the_batch(batch):
    alone = [
        targets_of([batch.instances(k)[[n]]], [batch.predicted[k][[n]]], batch.size)
        for k in range(len(batch.objects))
        for n in range(len(batch.boxes[k]))
    ]
    assert torch.equal(targets_of_batch(batch), torch.cat([torch.zeros(0), *alone]))


@holds(
    25,
    batch=batches(st.lists(polygons(), min_size=1, max_size=3), USUAL),
    shift=st.tuples(st.integers(-300, 300), st.integers(-300, 300)),
)
def test_moving_polygons_and_boxes_by_whole_pixels_changes_nothing(batch, shift):
    batch.boxes = [[np.add(box, 1000).tolist() for box in x] for x in batch.boxes]
    batch.objects = [[[p + 1000 for p in parts] for parts in x] for x in batch.objects]
    before = targets_in_a_large_image(batch)

    batch.boxes = [[np.add(box, shift * 2).tolist() for box in x] for x in batch.boxes]
    batch.objects = [
        [[p + np.tile(shift, len(p) // 2) for p in parts] for parts in x] for x in batch.objects
    ]

    # Coordinates are eighths of pixels, so that the differences between them are exact
    assert torch.equal(targets_in_a_large_image(batch), before)


def targets_in_a_large_image(batch):
    """None of the objects leaves it."""
    proposals = [batch.instances(k) for k in range(len(batch.objects))]
    proposals = [Instances((2000, 2000), **x.get_fields()) for x in proposals]
    return targets_of(proposals, batch.predicted, batch.size)


@holds(
    25,
    mask=bitmaps(),
    corner=st.tuples(st.integers(8, 8 * WIDTH), st.integers(8, 8 * HEIGHT)),
    # Cells of up to 2 pixels are sampled at halves of them: in float32 all of it is exact
    sides=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    shift=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    seed=seeds(),
)
def test_moving_bitmasks_and_boxes_by_whole_pixels_changes_nothing(
    mask, corner, sides, shift, seed
):
    size = 14
    predicted = torch.from_numpy(np.random.default_rng(seed).random((1, size, size)) < 0.5)
    targets = []
    for dx, dy in ((0, 0), shift):
        canvas = torch.zeros(1, HEIGHT + 100, WIDTH + 100, dtype=torch.bool)
        # Away from the border of the image, which RoIAlign repeats
        canvas[:, 20 + dy : 20 + dy + HEIGHT, 20 + dx : 20 + dx + WIDTH] = torch.from_numpy(mask)
        x0, y0 = 20 + dx + corner[0] / 8, 20 + dy + corner[1] / 8
        box = torch.tensor([[x0, y0, x0 + size * sides[0] / 8, y0 + size * sides[1] / 8]])
        proposals = Instances(
            canvas.shape[1:], proposal_boxes=Boxes(box), gt_masks=BitMasks(canvas)
        )
        targets.append(targets_of([proposals], [predicted], size))
    assert torch.equal(*targets)


@holds(30, star=stars(), box=boxes(USUAL), predicted=predicted_masks(1, 28))
def test_polygons_and_bitmasks_agree_but_for_the_pixels_at_edges(star, box, predicted):
    masks = PolygonMasks([[star]])
    bitmasks = BitMasks.from_polygon_masks(masks, HEIGHT, WIDTH)
    boxes_ = Boxes(torch.tensor([box]))
    by_polygon, by_bitmask = (
        targets_of([Instances((HEIGHT, WIDTH), proposal_boxes=boxes_, gt_masks=x)], [predicted], 28)
        for x in (masks, bitmasks)
    )

    # Rasterising to pixels moves an edge by up to a pixel, RoIAlign mixes it with the pixels around
    # it, and a cell has half a diagonal: so far from edges both are sure of what is inside. The
    # area is that of the pixels, each of which differs only within a pixel of an edge.
    cells_per_pixel = 28 / min(box[2] - box[0], box[3] - box[1])
    surely, possibly = cells_of_polygons([star], box, 28, margin=1 + 3 * cells_per_pixel)
    pixels = np.indices((HEIGHT, WIDTH))[::-1].reshape(2, -1).T + 0.5
    inside, distance = inside_and_distance(star, pixels)
    areas = [(inside & (distance > 1)).sum(), (inside | (distance <= 1)).sum()]
    low, high = bounds_of(surely, possibly, areas, box, predicted)
    for target in (by_polygon, by_bitmask):
        assert low - ROUNDING <= target.item() <= high + ROUNDING
    assert areas[0] <= bitmasks.tensor.sum() <= areas[1]


# ---- what is not finite

NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])


@holds(
    25,
    batch=batches(st.lists(polygons(), min_size=1, max_size=2), max_images=1),
    value=st.one_of(NOT_FINITE, st.sampled_from([1e9, -1e30])),
    place=st.integers(0, 5),
)
def test_polygons_that_are_not_finite_or_have_no_end_are_refused(batch, value, place):
    if batch.indices[0]:
        proposals = batch.instances(0)
        proposals.gt_masks.polygons[0][0] = proposals.gt_masks.polygons[0][0].copy()
        proposals.gt_masks.polygons[0][0][place] = value
        with pytest.raises(FloatingPointError, match="polygon of the ground truth or the box"):
            crop_gt_masks([proposals], batch.size)


@holds(25, batch=batches(max_images=1), value=NOT_FINITE, place=st.integers(0, 3), seed=seeds())
def test_a_box_that_is_not_finite_has_no_target_and_changes_no_other(batch, value, place, seed):
    count = len(batch.indices[0])
    if not count:
        return
    rng = np.random.default_rng(seed)
    crops = torch.from_numpy(rng.random((count, batch.size, batch.size)) < 0.5)
    areas = torch.from_numpy(rng.random(count) * 1000)
    boxes_ = torch.tensor(batch.boxes[0])
    expected = mask_iou_targets(batch.predicted[0], crops, areas, boxes_)
    boxes_[0, place] = value

    targets = mask_iou_targets(batch.predicted[0], crops, areas, boxes_)

    assert targets[0].isnan()
    assert torch.equal(targets[1:], expected[1:])


# ---- through the ROI heads, as in training

HEADS = {}


def heads():
    if not HEADS:
        torch.manual_seed(1)
        HEADS[None] = instantiate(tiny_mask_scoring_rcnn().model.roi_heads).train()
    return HEADS[None]


@st.composite
def training_batches(draw):
    """Ground truth and proposals of one or two images, of which some have no objects."""
    as_bitmasks = draw(st.booleans())
    truth, proposals = [], []
    for _ in range(2):
        objects = draw(st.lists(st.tuples(polygons(), st.integers(0, NUM_CLASSES - 1)), max_size=3))
        masks = PolygonMasks([[p] for p, _ in objects])
        instances = Instances(IMAGE_SIZE)
        instances.gt_boxes = masks.get_bounding_boxes() if objects else Boxes(torch.zeros(0, 4))
        instances.gt_boxes.clip(IMAGE_SIZE)
        instances.gt_classes = torch.tensor([c for _, c in objects]).long()
        if objects:
            instances.gt_masks = (
                BitMasks.from_polygon_masks(masks, *IMAGE_SIZE) if as_bitmasks else masks
            )
            # As the mapper does
            instances = instances[instances.gt_boxes.nonempty(1e-5)]
        near = instances.gt_boxes.tensor + draw(st.integers(-3, 3))
        others = torch.tensor([draw(boxes(USUAL)) for _ in range(draw(st.integers(0, 3)))])
        given = Boxes(torch.cat([near, others.reshape(-1, 4)]))
        given.clip(IMAGE_SIZE)
        truth.append(instances)
        proposals.append(
            Instances(IMAGE_SIZE, proposal_boxes=given, objectness_logits=torch.ones(len(given)))
        )
    return truth, proposals


@holds(12, batch=training_batches(), scale=st.sampled_from([0.0, 1.0, 100.0]), seed=seeds())
def test_the_roi_heads_learn_targets_in_the_unit_interval(batch, scale, seed):
    truth, proposals = batch
    torch.manual_seed(seed)
    features = {k: scale * v for k, v in toy_features().items()}
    untouched = Untouched(truth, proposals, features)
    seen = []

    def recorded(*args):
        seen.append(mask_iou_targets(*args))
        return seen[-1]

    mask_iou_head.mask_iou_targets = recorded
    try:
        with EventStorage():
            losses = heads()(None, features, proposals, truth)[1]
    finally:
        mask_iou_head.mask_iou_targets = mask_iou_targets

    for targets in seen:
        assert targets.isfinite().all() and ((targets >= 0) & (targets <= 1)).all()
    assert losses["loss_mask_iou"].isfinite() and losses["loss_mask_iou"] >= 0
    assert losses["loss_mask"].isfinite()
    untouched.check()


@holds(5, batch=training_batches(), value=NOT_FINITE, place=st.integers(0, 3))
def test_the_mask_iou_head_refuses_boxes_that_are_not_finite(batch, value, place):
    truth, _ = batch
    truth = [x for x in truth if len(x)]
    if not truth:
        return
    for x in truth:
        x.proposal_boxes = Boxes(x.gt_boxes.tensor.clone())
    cropped = crop_gt_masks(truth, 28)
    cropped[0].proposal_boxes.tensor[0, place] = value
    count = sum(map(len, truth))
    with EventStorage(), pytest.raises(FloatingPointError, match="box of a proposal is not finite"):
        heads().mask_iou_head(torch.rand(count, 8, 14, 14), torch.rand(count, 1, 28, 28), cropped)
