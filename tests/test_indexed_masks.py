import copy

import numpy as np
import pytest
import torch

from detectron2.config import instantiate
from detectron2.modeling.roi_heads import StandardROIHeads, select_foreground_proposals
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from msrcnn_d2 import retrofit
from msrcnn_d2.modeling import MaskScoringROIHeads
from msrcnn_d2.modeling.indexed_masks import (
    BITMASKS_AT_A_TIME,
    BITMASKS_AT_A_TIME_ON_GPU,
    IndexedMasks,
    _crop_all_boxes,
    with_indexed_masks,
)
from msrcnn_d2.modeling.mask_iou_target import crop_gt_masks
from tests.helpers.rasterised import assert_areas_are_rasterised
from tests.helpers.toy import (
    tiny_mask_rcnn,
    tiny_mask_scoring_rcnn,
    toy_features,
    toy_inputs,
    toy_instances,
    toy_proposals,
    without_objects,
)

FORMATS = ["polygon", "bitmask"]
HEIGHT, WIDTH = 90, 120
NUM_OBJECTS = 12 * BITMASKS_AT_A_TIME + 1


def random_masks(mask_format, count=NUM_OBJECTS):
    """Objects of no, one or two polygons, partly outside of the image."""
    rng = np.random.default_rng(0)
    polygons = [
        [
            (rng.uniform(-10, 100, 2) + rng.uniform(2, 60) * rng.random((5, 2))).ravel()
            for _ in range(k % 3)
        ]
        for k in range(count)
    ]
    masks = PolygonMasks(polygons)
    if mask_format == "polygon":
        return masks
    return BitMasks.from_polygon_masks(masks, HEIGHT, WIDTH)


def random_boxes(count):
    """Boxes in the image and across its border, every fifth without an area."""
    corners = torch.rand(count, 2, generator=torch.Generator().manual_seed(1)) * 120 - 10
    sides = torch.rand(count, 2, generator=torch.Generator().manual_seed(2)) * 70
    sides[::5, 0] = 0
    return torch.cat([corners, corners + sides], dim=1)


def contents(masks):
    if isinstance(masks, PolygonMasks):
        return [[p.tolist() for p in polygons] for polygons in masks.polygons]
    return masks.tensor.tolist()


def assert_stands_in_for(indexed, masks):
    """`indexed` gives what these masks, which Detectron2 indexed, give themselves."""
    assert len(indexed) == len(masks)
    assert type(indexed.materialize()) is type(masks)
    assert contents(indexed.materialize()) == contents(masks)
    boxes = random_boxes(len(masks))
    for mask_size in (28, 14):
        crops, expected = (x.crop_and_resize(boxes, mask_size) for x in (indexed, masks))
        assert crops.dtype == torch.bool and torch.equal(crops, expected)
    if isinstance(masks, BitMasks):
        assert indexed.area((HEIGHT, WIDTH)).tolist() == masks.tensor.sum(dim=(1, 2)).tolist()
    else:
        assert_areas_are_rasterised(masks, (HEIGHT, WIDTH), indexed.area((HEIGHT, WIDTH)))


EVERY_THIRD = torch.arange(NUM_OBJECTS) % 3 == 0


@pytest.mark.parametrize("mask_format", FORMATS)
@pytest.mark.parametrize(
    "item",
    [
        pytest.param(torch.arange(NUM_OBJECTS), id="all"),
        pytest.param(torch.arange(200) * 7 % NUM_OBJECTS, id="repeated"),
        pytest.param(torch.tensor([4, 4, 4, 1]), id="few-of-many"),
        pytest.param(torch.tensor([0, 3, 0]), id="without-polygons"),
        pytest.param(torch.tensor([], dtype=torch.int64), id="none"),
        pytest.param([5, 2, 5], id="list"),
        pytest.param(EVERY_THIRD, id="bool"),
        pytest.param(EVERY_THIRD & False, id="bool-none"),
        pytest.param(slice(3, 40, 2), id="slice"),
        pytest.param(slice(0), id="slice-none"),
        pytest.param(7, id="int"),
        pytest.param(-1, id="last"),
    ],
)
def test_indexing_is_that_of_detectron2(mask_format, item):
    masks = random_masks(mask_format)

    assert_stands_in_for(IndexedMasks(masks)[item], masks[item])


@pytest.mark.parametrize("count", [1, BITMASKS_AT_A_TIME_ON_GPU + 1])
def test_a_gpu_crops_the_same(count):
    masks = BitMasks(random_masks("bitmask", count).tensor)
    indices = torch.arange(50) * 7 % count
    boxes = random_boxes(50)
    expected = masks[indices].crop_and_resize(boxes, 28)
    assert expected.any() or count == 1
    assert torch.equal(_crop_all_boxes(masks.tensor, indices, boxes, 28), expected)


@pytest.mark.parametrize("mask_format", FORMATS)
def test_indexing_again_and_again_is_that_of_detectron2(mask_format):
    masks, indexed = random_masks(mask_format), IndexedMasks(random_masks(mask_format))
    items = [torch.arange(512) * 11 % NUM_OBJECTS, torch.arange(512) % 4 == 0, slice(5, 99)]
    for item in items:
        masks, indexed = masks[item], indexed[item]

    assert_stands_in_for(indexed, masks)


@pytest.mark.parametrize("mask_format", FORMATS)
def test_masks_of_an_image_without_objects(mask_format):
    masks = random_masks(mask_format, count=0)

    indexed = IndexedMasks(masks)

    assert len(indexed) == len(indexed[:3]) == len(indexed.area((HEIGHT, WIDTH))) == 0
    assert indexed.crop_and_resize(torch.zeros(0, 4), 28).shape == (0, 28, 28)


@pytest.mark.parametrize(
    "mask_format, dtype",
    [
        ("polygon", torch.float64),
        ("polygon", torch.float16),
        ("bitmask", torch.float64),
        ("bitmask", torch.float16),
        ("bitmask", torch.bfloat16),
    ],
)
def test_boxes_of_other_precision(mask_format, dtype):
    indexed = IndexedMasks(random_masks(mask_format))
    boxes = random_boxes(NUM_OBJECTS).to(dtype)

    expected = indexed.materialize().crop_and_resize(boxes, 28)

    assert torch.equal(indexed.crop_and_resize(boxes, 28), expected)


@pytest.mark.parametrize("mask_format", FORMATS)
def test_each_mask_needs_a_box(mask_format):
    with pytest.raises(ValueError, match="2 boxes for 3 masks"):
        IndexedMasks(random_masks(mask_format))[:3].crop_and_resize(torch.zeros(2, 4), 28)


@pytest.mark.parametrize("mask_format", FORMATS)
def test_masks_move_with_their_instances(mask_format):
    masks = random_masks(mask_format)
    instances = Instances((HEIGHT, WIDTH), gt_masks=IndexedMasks(masks)[2:5])

    moved = instances.to("cpu").gt_masks

    assert isinstance(moved, IndexedMasks)
    assert_stands_in_for(moved, masks[2:5])


def test_bitmasks_are_copied_in_groups_however_many_there_are(monkeypatch):
    seen = []
    original = torch.Tensor.float

    def float_(tensor):
        seen.append(tuple(tensor.shape))
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "float", float_)
    masks = IndexedMasks(random_masks("bitmask"))[torch.arange(400) % (2 * BITMASKS_AT_A_TIME + 1)]

    masks.crop_and_resize(random_boxes(400), 28)

    # Each mask that occurs once, and none of the others
    assert seen == [(count, 1, HEIGHT, WIDTH) for count in (BITMASKS_AT_A_TIME,) * 2 + (1,)]


# ---- in the ROI heads


def heads_of(cascade):
    torch.manual_seed(1)
    return instantiate(tiny_mask_scoring_rcnn(cascade).model.roi_heads).train()


@pytest.fixture(params=[False, True], ids=["standard", "cascade"])
def heads(request):
    return heads_of(request.param)


def sample(heads, targets, base=None):
    """Sampled proposals as our heads give them, or as their `base` class does."""
    torch.manual_seed(2)
    label_and_sample = (base or type(heads)).label_and_sample_proposals
    with EventStorage():
        return label_and_sample(heads, toy_proposals(), targets)


@pytest.mark.parametrize("mask_format", FORMATS)
def test_sampled_proposals_are_those_of_detectron2(mask_format, heads):
    targets = toy_instances(mask_format)

    expected = sample(heads, targets, StandardROIHeads)

    for x, other, truth in zip(sample(heads, targets), expected, targets):
        assert x.get_fields().keys() == other.get_fields().keys()
        assert torch.equal(x.proposal_boxes.tensor, other.proposal_boxes.tensor)
        assert torch.equal(x.gt_boxes.tensor, other.gt_boxes.tensor)
        assert torch.equal(x.gt_classes, other.gt_classes)
        assert len(x) > len(truth)  # so that indices repeat
        assert_stands_in_for(x.gt_masks, other.gt_masks)


@pytest.mark.parametrize("mask_format", FORMATS)
def test_proposals_refer_to_the_masks_of_their_targets(mask_format, heads):
    targets = toy_instances(mask_format)

    sampled = sample(heads, targets)
    foreground = select_foreground_proposals(sampled, heads.num_classes)[0]

    for proposals in (sampled, foreground):
        for x, truth in zip(proposals, targets):
            assert isinstance(x.gt_masks, IndexedMasks)
            assert x.gt_masks.masks is truth.gt_masks


def test_no_step_of_training_copies_a_bitmask_for_each_proposal(heads, monkeypatch):
    def fail(*args):
        raise AssertionError("copied")

    monkeypatch.setattr(BitMasks, "__getitem__", fail)

    with EventStorage():
        losses = heads(None, toy_features(), toy_proposals(), toy_instances("bitmask"))[1]

    assert losses["loss_mask_iou"] > 0


@pytest.mark.parametrize("mask_format", FORMATS)
def test_losses_are_those_with_a_mask_for_each_proposal(mask_format, heads, monkeypatch):
    def losses():
        torch.manual_seed(3)
        with EventStorage():
            return heads(None, toy_features(), toy_proposals(), toy_instances(mask_format))[1]

    indexed = losses()
    original = StandardROIHeads.label_and_sample_proposals
    monkeypatch.setattr(type(heads), "label_and_sample_proposals", original)
    copied = losses()

    assert indexed.keys() == copied.keys() and indexed["loss_mask_iou"] > 0
    assert all(torch.equal(indexed[name], copied[name]) for name in copied)


@pytest.mark.parametrize("cascade", [False, True], ids=["standard", "cascade"])
@pytest.mark.parametrize("mask_format", FORMATS)
def test_retrofit_learns_the_same_with_a_mask_for_each_proposal(mask_format, cascade, monkeypatch):
    torch.manual_seed(1)
    cfg = retrofit(tiny_mask_rcnn(cascade), conv_dim=8, num_conv=2, fc_dim=16)
    model = instantiate(cfg.model)

    def loss():
        torch.manual_seed(3)
        with EventStorage():
            return model(toy_inputs(mask_format))["loss_mask_iou"]

    indexed = loss()
    original = StandardROIHeads.label_and_sample_proposals
    monkeypatch.setattr(type(model.roi_heads), "label_and_sample_proposals", original)

    assert indexed > 0 and torch.equal(indexed, loss())


@pytest.mark.parametrize("mask_format", FORMATS)
def test_targets_are_left_as_they_are(mask_format, heads):
    targets = toy_instances(mask_format)
    fields = [copy.copy(x.get_fields()) for x in targets]
    before = [contents(x.gt_masks) for x in targets]

    with EventStorage():
        heads(None, toy_features(), toy_proposals(), targets)

    for x, old, masks in zip(targets, fields, before):
        assert x.get_fields().keys() == old.keys()
        assert all(x.get(name) is value for name, value in old.items())
        assert contents(x.gt_masks) == masks


class SoftMasks(BitMasks):
    """Masks that may crop in their own way."""


@pytest.mark.parametrize(
    "targets",
    [
        without_objects(),
        Instances((HEIGHT, WIDTH), gt_masks=SoftMasks(torch.ones(2, HEIGHT, WIDTH))),
        Instances((HEIGHT, WIDTH), gt_boxes=Boxes(torch.ones(2, 4))),
        Instances((HEIGHT, WIDTH)),
    ],
    ids=["no-objects", "subclass", "no-masks", "no-fields"],
)
def test_other_targets_are_passed_on(targets):
    assert with_indexed_masks(targets) is targets


class ReadsMasks(MaskScoringROIHeads):
    """Heads of a user that look at the masks themselves."""

    def _forward_box(self, features, proposals, targets=None):
        self.seen = [x.gt_masks.materialize() for x in proposals]
        return super()._forward_box(features, proposals)


@pytest.mark.parametrize("mask_format", FORMATS)
def test_heads_of_users_can_get_the_masks(mask_format):
    heads = heads_of(cascade=False)
    heads.__class__ = ReadsMasks
    targets = toy_instances(mask_format)

    with EventStorage():
        proposals, _ = heads(None, toy_features(), toy_proposals(), targets)

    for masks, x, truth in zip(heads.seen, proposals, targets):
        assert type(masks) is type(truth.gt_masks)
        assert contents(masks) == contents(truth.gt_masks[x.gt_masks.indices])


@pytest.mark.parametrize("mask_format", FORMATS)
def test_crops_for_the_losses_are_the_same_for_both_kinds_of_masks(mask_format):
    heads = heads_of(cascade=False)
    indexed, copied = (
        crop_gt_masks(select_foreground_proposals(sampled, heads.num_classes)[0], 28)
        for sampled in (
            sample(heads, toy_instances(mask_format)),
            sample(heads, toy_instances(mask_format), StandardROIHeads),
        )
    )
    for x, other in zip(indexed, copied):
        assert torch.equal(x.gt_masks.crops, other.gt_masks.crops)
        assert torch.equal(x.gt_masks.areas, other.gt_masks.areas)
