"""Mask scoring in C4 models, whose box and mask heads share the features of a res5 block."""

import pytest
import torch

from detectron2.config import LazyConfig
from detectron2.modeling import build_model

from msrcnn_d2 import add_mask_calibrator, add_mask_scoring, retrofit
from msrcnn_d2.modeling import MaskScoringRCNNWithTTA, Res5MaskScoringROIHeads, RetrofitRCNN
from tests.helpers.toy import (
    CHANNELS,
    IMAGE_SIZE,
    built,
    tiny_c4_mask_rcnn,
    tiny_c4_yacs_config,
    toy_inputs,
    with_distinct_masks,
)

FIELDS = {"pred_boxes", "scores", "pred_classes", "pred_masks", "pred_mask_ious", "mask_scores"}
HEAD = {"conv_dim": CHANNELS, "num_conv": 2, "fc_dim": 16}


def lazy_config():
    return add_mask_scoring(tiny_c4_mask_rcnn(), **HEAD)


def twins():
    """Detectron2's model and ours, with the same weights in what they share."""
    plain, scoring = with_distinct_masks(built(tiny_c4_mask_rcnn())), built(lazy_config())
    assert not scoring.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    return plain, scoring


def losses_of(model):
    torch.manual_seed(2)
    return model.train()(toy_inputs())


def test_everything_else_is_as_in_detectron2(event_storage):
    plain, scoring = twins()
    new = scoring.state_dict().keys() - plain.state_dict().keys()
    assert new and all(name.startswith("roi_heads.mask_iou_head.") for name in new)

    expected, found = losses_of(plain), losses_of(scoring)
    assert found.keys() - expected.keys() == {"loss_mask_iou"}
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-6)

    inputs = toy_inputs()
    with torch.no_grad():
        for one, other in zip(plain.eval()(inputs), scoring.eval()(inputs)):
            one, other = one["instances"], other["instances"]
            assert len(one) > 0
            assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
            for name in ("scores", "pred_classes", "pred_masks"):
                assert torch.equal(one.get(name), other.get(name)), name


@pytest.mark.parametrize("kind", ["yacs", "LazyConfig", "saved LazyConfig"])
def test_whole_models_train_and_predict(kind, event_storage, tmp_path):
    if kind == "yacs":
        model = build_model(tiny_c4_yacs_config())
    else:
        cfg = lazy_config()
        if kind == "saved LazyConfig":
            LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
            cfg = LazyConfig.load(str(tmp_path / "config.yaml"))
        model = built(cfg)
    assert type(model.roi_heads) is Res5MaskScoringROIHeads

    losses = losses_of(model)
    sum(losses.values()).backward()
    for name, parameter in model.roi_heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    with torch.no_grad():
        for output in model.eval()(toy_inputs()):
            instances = output["instances"]
            assert len(instances) > 0
            assert instances.get_fields().keys() == FIELDS
            assert instances.pred_masks.shape[1:] == IMAGE_SIZE
            assert torch.equal(instances.mask_scores, instances.scores * instances.pred_mask_ious)


def test_features_of_regions_are_computed_once(event_storage):
    model = built(lazy_config())
    calls = []
    model.roi_heads.res5.register_forward_hook(lambda *_: calls.append(1))
    losses_of(model)
    assert len(calls) == 1
    with torch.no_grad():
        model.eval()(toy_inputs())
    assert len(calls) == 3  # of proposals, and of the boxes that are found


@pytest.mark.parametrize("size, cells", [(14, 4 * 4), (7, 2 * 2), (10, 3 * 3)])
def test_the_size_of_the_regions_reaches_the_mask_iou_head(size, cells, event_storage):
    """The res5 block halves a side, and so does the last convolution of the MaskIoU head."""
    cfg = lazy_config()
    cfg.model.roi_heads.pooler.output_size = size
    yacs = tiny_c4_yacs_config()
    yacs.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = size
    for model in (built(cfg), build_model(yacs)):
        assert model.roi_heads.mask_iou_head.fcs.fc1.in_features == CHANNELS * cells
        assert losses_of(model)["loss_mask_iou"].isfinite()


@pytest.mark.parametrize("learn_from", ["proposals", "detections"])
@pytest.mark.parametrize("kind", ["yacs", "LazyConfig"])
def test_retrofit(kind, learn_from, event_storage):
    if kind == "yacs":
        cfg = tiny_c4_yacs_config()
        cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
        model = build_model(retrofit(cfg, learn_from))
    else:
        model = built(retrofit(tiny_c4_mask_rcnn(), learn_from, **HEAD))
    assert type(model) is RetrofitRCNN and type(model.roi_heads) is Res5MaskScoringROIHeads
    losses = losses_of(model)
    assert losses.keys() == {"loss_mask_iou"}
    losses["loss_mask_iou"].backward()
    trained = {name for name, x in model.named_parameters() if x.grad is not None}
    assert trained == {
        f"roi_heads.{x}" for x, _ in model.roi_heads.named_parameters() if "mask_iou" in x
    }


def test_a_calibrator_scores_masks():
    model = built(add_mask_calibrator(tiny_c4_mask_rcnn()))
    with torch.no_grad():
        (instances, _) = (x["instances"] for x in model.eval()(toy_inputs()))
    assert instances.has("quality_scores") and not instances.has("pred_mask_ious")


def test_test_time_augmentation():
    cfg = tiny_c4_yacs_config()
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (IMAGE_SIZE[0],), True
    model = build_model(cfg).eval()
    inputs = toy_inputs()
    for x in inputs:
        x["image"] = x["image"].to(torch.uint8)
    with torch.no_grad():
        for output in MaskScoringRCNNWithTTA(cfg, model)(inputs):
            assert len(output["instances"]) > 0
            assert output["instances"].get_fields().keys() == FIELDS
