"""Masks that are left as predicted, to be pasted or encoded by whoever wants them."""

import pytest
import torch
from torch import nn

from detectron2.config import instantiate
from detectron2.modeling import GeneralizedRCNN, detector_postprocess
from detectron2.structures import Boxes, Instances, ROIMasks

from msrcnn_d2 import retrofit
from msrcnn_d2.modeling import UnpastedMasks
from msrcnn_d2.modeling.postprocessing import rescale_unpasted
from tests.helpers.toy import tiny_mask_rcnn, tiny_mask_scoring_rcnn, toy_inputs


def assert_pastes_to(unpasted: Instances, expected: Instances):
    """All fields are the same bit for bit, once masks are pasted as Detectron2 does it."""
    assert unpasted.image_size == expected.image_size and len(unpasted) == len(expected)
    assert set(unpasted.get_fields()) == set(expected.get_fields())
    for name, value in expected.get_fields().items():
        found = unpasted.get(name)
        if name == "pred_masks":
            assert isinstance(found, ROIMasks)
            found = found.to_bitmasks(unpasted.pred_boxes, *unpasted.image_size).tensor
        assert torch.equal(getattr(found, "tensor", found), getattr(value, "tensor", value)), name


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(tiny_mask_rcnn, id="mask-rcnn"),
        pytest.param(tiny_mask_scoring_rcnn, id="mask-scoring"),
        pytest.param(lambda: tiny_mask_scoring_rcnn(cascade=True), id="cascade"),
        pytest.param(lambda: retrofit(tiny_mask_rcnn()), id="retrofit"),
    ],
)
def test_pasted_the_outputs_are_those_of_the_model(config):
    model = instantiate(config().model).eval()
    inputs = toy_inputs()
    inputs[0].update(height=100, width=120)  # not the size that the network sees
    del inputs[1]["height"], inputs[1]["width"]
    assert UnpastedMasks.supports(model)
    with torch.no_grad():
        outputs = UnpastedMasks(model)(inputs)
        for output, expected in zip(outputs, model(inputs)):
            assert len(expected["instances"]) > 0
            assert_pastes_to(output["instances"], expected["instances"])


def detections(boxes, **fields):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.rand(len(boxes), 1, 28, 28)
    return Instances((40, 60), pred_boxes=Boxes(boxes), pred_masks=masks, **fields)


@pytest.mark.parametrize(
    "boxes",
    [
        pytest.param([], id="no-detections"),
        pytest.param([[0, 0, 60, 40], [5, 5, 20, 30]], id="whole-image"),
        pytest.param([[70, 5, 80, 30], [5, 5, 20, 30]], id="a-box-outside-is-dropped"),
        pytest.param([[5, 5, 5, 30]], id="none-left"),
    ],
)
def test_rescaling_is_detectron2s(boxes):
    found = detections(boxes)
    scores = torch.arange(float(len(found)))
    found.scores = scores
    kept = {k: v.clone() for k, v in found.get_fields().items()}
    expected = detector_postprocess(Instances(found.image_size, **kept), 80, 90)
    assert_pastes_to(rescale_unpasted(found, 80, 90), expected)
    assert found.has("pred_masks") and not found.has("roi_masks")


def test_detections_without_masks_are_rescaled_too():
    found = detections([[5, 5, 20, 30]])
    found.remove("pred_masks")
    rescaled = rescale_unpasted(found, 80, 60)
    assert rescaled.pred_boxes.tensor.tolist() == [[5, 10, 20, 60]]
    assert not rescaled.has("pred_masks")


def test_the_mode_is_that_of_the_model(tiny):
    assert UnpastedMasks(tiny.train()).training
    assert not UnpastedMasks(tiny.eval()).training


class OwnForward(GeneralizedRCNN):
    def forward(self, batched_inputs):
        return [{"instances": None} for _ in batched_inputs]


class OwnInference(GeneralizedRCNN):
    def inference(self, *args, **kwargs):
        return []


@pytest.mark.parametrize("target", [OwnForward, OwnInference])
def test_a_model_with_outputs_of_its_own_keeps_them(target):
    cfg = tiny_mask_scoring_rcnn()
    cfg.model._target_ = target
    assert not UnpastedMasks.supports(instantiate(cfg.model))
    assert not UnpastedMasks.supports(nn.Identity())


def test_rescaling_leaves_the_given_detections_as_they_are():
    found = detections([[5, 5, 20, 30]], pred_keypoints=torch.ones(1, 2, 3))
    rescale_unpasted(found, 80, 120)
    assert found.pred_boxes.tensor.tolist() == [[5, 5, 20, 30]]
    assert (found.pred_keypoints == 1).all()
