"""What holds for mask scores, whatever the model says."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from detectron2.config import instantiate
from detectron2.modeling import build_model, detector_postprocess
from detectron2.structures import Boxes, Instances

from msrcnn_d2 import MaskScoringPredictor
from msrcnn_d2.modeling import mask_iou_inference
from msrcnn_d2.modeling.postprocessing import rescale_unpasted
from tests.helpers.strategies import UNUSUAL, Untouched, boxes, holds, same, seeds
from tests.helpers.toy import (
    IMAGE_SIZE,
    NUM_CLASSES,
    tiny_mask_scoring_rcnn,
    tiny_yacs_config,
    toy_features,
)

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCORES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, width=16))
IOUS = st.one_of(st.sampled_from([-0.1, 0.0, 0.5, 1.0, 1.1, -1e38, 1e38]), FINITE)


@st.composite
def detections(draw, max_images=3):
    """Detections of some images, perhaps without scores, with scores of any precision."""
    precision = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    scored = draw(st.booleans())
    images = []
    for count in draw(st.lists(st.integers(0, 4), min_size=1, max_size=max_images)):
        instances = Instances(IMAGE_SIZE)
        given = [draw(boxes(UNUSUAL)) for _ in range(count)]
        instances.pred_boxes = Boxes(torch.tensor(given).reshape(-1, 4))
        if scored:
            instances.scores = torch.tensor([draw(SCORES) for _ in range(count)]).to(precision)
        classes = [draw(st.integers(0, NUM_CLASSES - 1)) for _ in range(count)]
        instances.pred_classes = torch.tensor(classes).long()
        images.append(instances)
    return images


def ious_for(images):
    count = sum(map(len, images)) * NUM_CLASSES
    return st.lists(IOUS, min_size=count, max_size=count).map(
        lambda x: torch.tensor(x, dtype=torch.float32).reshape(-1, NUM_CLASSES)
    )


def assert_scored(instances):
    """All numbers are finite and in [0, 1], and no mask score is above its class score."""
    names = {"pred_mask_ious", "mask_scores", "scores"} & instances.get_fields().keys()
    assert ("mask_scores" in names) is instances.has("scores")
    for name in names:
        values = instances.get(name)
        assert values.shape == (len(instances),), name
        assert ((values >= 0) & (values <= 1)).all(), name  # not so for NaN
    if "scores" in names:
        assert (instances.mask_scores <= instances.scores).all()


@holds(40, data=st.data(), images=detections())
def test_no_mask_score_is_above_its_class_score(data, images):
    ious = data.draw(ious_for(images))
    untouched = Untouched(ious, *(dict(x.get_fields()) for x in images))

    mask_iou_inference(ious, images)

    untouched.check()
    chosen = torch.cat([x.pred_classes for x in images])
    own = ious[torch.arange(len(chosen)), chosen].split([len(x) for x in images])
    for instances, ious_of_image, fields in zip(images, own, untouched.things[1:]):
        assert_scored(instances)
        assert torch.equal(instances.pred_mask_ious, ious_of_image.clip(0, 1))
        assert instances.get_fields().keys() - fields.keys() <= {"pred_mask_ious", "mask_scores"}
        for name, value in fields.items():
            assert instances.get(name) is value, name


# ---- through the ROI heads


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(1)
    return instantiate(tiny_mask_scoring_rcnn().model.roi_heads).eval()


def given_features(seed, scale):
    torch.manual_seed(seed)
    return {k: scale * v for k, v in toy_features().items()}


def loudened(heads, seed):
    """Predictors with weights that say something, else all boxes and classes are alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in heads.named_parameters():
        if "predictor" in name:
            parameter.data.normal_(0, 1, generator=generator)


SCALES = st.sampled_from([0.0, 0.01, 1.0, 1000.0])


@holds(
    8,
    seed=seeds(),
    scale=SCALES,
    proposals=st.lists(st.lists(boxes(("usual",)), max_size=4), min_size=2, max_size=2),
)
@torch.no_grad()
def test_the_roi_heads_score_what_they_find(seed, scale, proposals, heads):
    loudened(heads, seed)
    features = given_features(seed, scale)
    proposals = [
        Instances(IMAGE_SIZE, proposal_boxes=Boxes(torch.tensor(x).reshape(-1, 4)))
        for x in proposals
    ]
    for x in proposals:
        x.objectness_logits = torch.ones(len(x))
    untouched = Untouched(features, proposals)

    found = heads(None, features, proposals)[0]

    untouched.check()
    assert len(found) == 2
    for given, instances in zip(proposals, found):
        assert_scored(instances)
        assert len(given) or not len(instances)
        assert instances.pred_masks.shape == (len(instances), 1, 28, 28)
        assert ((instances.pred_masks >= 0) & (instances.pred_masks <= 1)).all()


@holds(8, seed=seeds(), scale=SCALES, images=detections(2))
@torch.no_grad()
def test_given_boxes_keep_their_number_order_and_fields(seed, scale, images, heads):
    loudened(heads, seed)
    features = {k: v[: len(images)] for k, v in given_features(seed, scale).items()}
    images = images if len(images) == len(features["p2"]) else images[:1]
    untouched = Untouched(features, images)
    fields = [dict(x.get_fields()) for x in images]

    found = heads.forward_with_given_boxes(features, images)

    for instances, given, before in zip(found, fields, untouched.before[1]):
        assert_scored(instances)
        for name, value in given.items():
            assert same(instances.get(name), before.get(name)), name
            assert same(value, before.get(name)), name
    assert same(features, untouched.before[0])


# ---- in pixels of the image that was given


@holds(
    25,
    images=detections(1),
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    seed=seeds(),
)
def test_postprocessing_keeps_order_scores_and_all_boxes_that_are_not_empty(images, size, seed):
    (instances,) = images
    torch.manual_seed(seed)
    mask_iou_inference(torch.rand(len(instances), NUM_CLASSES), images)
    instances.pred_masks = torch.rand(len(instances), 1, 28, 28)
    instances.number = torch.arange(len(instances))
    untouched = Untouched(instances)

    ours = rescale_unpasted(instances, *size)

    untouched.check()
    expected = detector_postprocess(instances, *size)
    assert ours.image_size == expected.image_size == size
    assert ours.get_fields().keys() == expected.get_fields().keys()
    kept = ours.number
    assert (kept.diff() > 0).all()
    for name, value in ours.get_fields().items():
        if name == "pred_masks":
            assert torch.equal(value.tensor, instances.pred_masks[kept, 0])
        else:
            assert same(value, expected.get(name)), name
        if name not in ("pred_masks", "pred_boxes"):
            assert torch.equal(value, instances.get(name)[kept]), name


# ---- a whole model


@pytest.fixture(scope="module")
def predict(tmp_path_factory):
    torch.manual_seed(0)
    cfg = tiny_yacs_config()
    cfg.DATASETS.TEST = ()  # COCO has other classes
    model = build_model(cfg)
    loudened(model.roi_heads, 0)
    cfg.MODEL.WEIGHTS = str(tmp_path_factory.mktemp("predictor") / "model.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    return MaskScoringPredictor(cfg)


@st.composite
def images(draw):
    """Grey, in colour or with an alpha channel, of any size and shape."""
    shape = draw(st.integers(1, 90)), draw(st.integers(1, 90)), draw(st.sampled_from([1, 3, 4]))
    levels = draw(st.sampled_from([1, 2, 256]))
    return np.random.default_rng(draw(seeds())).integers(0, levels, shape, dtype=np.uint8)


@holds(4, batch=st.lists(images(), min_size=1, max_size=2), threshold=st.sampled_from([0, 0.01]))
def test_the_predictor_takes_any_image_and_gives_the_best_first(batch, threshold, predict):
    before = copy.deepcopy(batch)
    predict.ranking = dataclasses.replace(predict.ranking, threshold=threshold)

    outputs = predict(batch)

    assert all(map(np.array_equal, batch, before))
    for image, output in zip(batch, outputs):
        instances = output["instances"]
        assert_scored(instances)
        assert instances.image_size == image.shape[:2]
        assert instances.pred_masks.shape == (len(instances), *image.shape[:2])
        assert (instances.mask_scores.diff() <= 0).all()
        assert (instances.mask_scores >= threshold).all()
        assert instances.pred_boxes.tensor.isfinite().all()
