"""The calibrator: its arithmetic, and its place in models of all kinds."""

import copy
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.solver import get_default_optimizer_params
from detectron2.structures import Boxes, Instances

from msrcnn_d2 import add_mask_calibrator, add_mask_scoring, add_msrcnn_config, retrofit
from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator
from msrcnn_d2.modeling import (
    CascadeMaskScoringROIHeads,
    MaskCalibrator,
    MaskScoringRCNNWithTTA,
    MaskScoringROIHeads,
    UnpastedMasks,
    expected_ious,
)
from msrcnn_d2.modeling.mask_cues import CUES
from tests.helpers.simulated_cuda import SimulatedCuda
from tests.helpers.toy import (
    IMAGE_SIZE,
    tiny_mask_rcnn,
    tiny_mask_scoring_rcnn,
    tiny_yacs_config,
    toy_features,
    toy_inputs,
    toy_instances,
    toy_proposals,
)

OF_MASK_RCNN = {"pred_boxes", "scores", "pred_classes", "pred_masks"}
OF_MASK_IOU_HEAD = {"pred_mask_ious", "mask_scores"}
OF_CALIBRATOR = {"mask_iou_probs", "quality_scores", "expected_mask_ious"}
NUM_CUES = len(CUES)


def randomised(calibrator, seed=0):
    """With weights as after a fit: none is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in calibrator.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        if name == "slope":
            parameter.abs_()
    calibrator.cue_mean.copy_(torch.randn(NUM_CUES, generator=generator) / 4)
    calibrator.cue_std.copy_(torch.rand(NUM_CUES, generator=generator) + 0.5)
    return calibrator.eval()


def image_with(count, seed=0, with_ious=True):
    """Random detections of an image, as the ROI heads give them to a calibrator."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=generator) * 30
    boxes[:, 2:] += boxes[:, :2] + 3
    instances = Instances(IMAGE_SIZE, pred_boxes=Boxes(boxes))
    instances.scores = torch.rand(count, generator=generator)
    instances.pred_masks = torch.rand(count, 1, 28, 28, generator=generator)
    if with_ious:
        instances.pred_mask_ious = torch.rand(count, generator=generator)
    return instances


# ---- arithmetic


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_without_networks_it_is_a_line_through_the_log_odds():
    calibrator = MaskCalibrator().eval()
    calibrator.slope.copy_(torch.linspace(2, 1.1, 10))
    calibrator.offset.copy_(torch.linspace(0, -4.5, 10))
    probs = calibrator.probs(torch.randn(2, NUM_CUES), torch.tensor([-1.0, 2.0]))
    for found, x in zip(probs.tolist(), (-1, 2), strict=True):
        expected = [sigmoid((2 - 0.1 * t) * x - 0.5 * t) for t in range(10)]
        # On the left the lines cross, so that probabilities would increase with the threshold
        expected = [min(expected[: t + 1]) for t in range(10)]
        assert found == pytest.approx(expected, abs=1e-6)


def test_networks_by_a_plain_loop():
    calibrator = randomised(MaskCalibrator(hidden_dim=3, num_members=2))
    cues, score = torch.randn(NUM_CUES).tolist(), 0.7
    cues[0] = 1e6  # far outside of what the fit has seen
    parts = {name: value.tolist() for name, value in calibrator.state_dict().items()}
    total = [0.0] * 10
    for member in range(2):
        values = [
            max(-5, min(5, (x - mean) / std))
            for x, mean, std in zip(cues, parts["cue_mean"], parts["cue_std"], strict=True)
        ]
        for layer in range(3):
            weight, (bias,) = (parts[f"layers.{layer}.{x}"][member] for x in ("weight", "bias"))
            values = [
                sum(values[i] * weight[i][o] for i in range(len(values))) + bias[o]
                for o in range(len(bias))
            ]
            if layer < 2:
                values = [max(0, x) for x in values]
        for t in range(10):
            log_odds = parts["slope"][t] * score + parts["offset"][t] + values[t]
            total[t] += sigmoid(log_odds) / 2
    expected = [min(total[: t + 1]) for t in range(10)]
    (found,) = calibrator.probs(torch.tensor([cues]), torch.tensor([score])).tolist()
    assert found == pytest.approx(expected, rel=1e-5)


def test_probabilities_never_increase_with_the_threshold():
    probs = randomised(MaskCalibrator()).probs(torch.randn(50, NUM_CUES), torch.randn(50))
    assert (probs.diff(dim=1) <= 0).all() and (probs.diff(dim=1) < 0).any()
    assert ((probs > 0) & (probs < 1)).all()


def test_the_fields_of_instances():
    (found,) = randomised(MaskCalibrator())([image_with(5)])
    assert found.mask_iou_probs.shape == (5, 10)
    assert found.mask_iou_probs.dtype == found.quality_scores.dtype == torch.float32
    expected = [sum(row) / 10 for row in found.mask_iou_probs.tolist()]
    assert found.quality_scores.tolist() == pytest.approx(expected)
    assert found.expected_mask_ious.shape == (5,)
    assert found.expected_mask_ious.dtype == torch.float32


def test_expected_ious():
    # Surely 0.70 to 0.75; at least 0.95 or else below 0.5; surely below 0.5
    probs = torch.tensor([[1.0] * 5 + [0.0] * 5, [0.4] * 10, [0.0] * 10])
    expected = [0.725, 0.4 * 0.975, 0]
    assert expected_ious(probs).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("with_ious", [True, False])
def test_a_batch_has_the_scores_of_each_image_alone(with_ious):
    calibrator = randomised(MaskCalibrator())
    counts = (4, 0, 3)
    together = calibrator([image_with(n, n, with_ious) for n in counts])
    assert [len(x.quality_scores) for x in together] == [*counts]
    for n, found in zip(counts, together, strict=True):
        (alone,) = calibrator([image_with(n, n, with_ious)])
        torch.testing.assert_close(found.mask_iou_probs, alone.mask_iou_probs)
        torch.testing.assert_close(found.quality_scores, alone.quality_scores)


def test_no_detections_at_all():
    (found,) = MaskCalibrator()([image_with(0)])
    assert found.mask_iou_probs.shape == (0, 10) and found.quality_scores.shape == (0,)


def test_boxes_of_the_user_have_no_scores_to_calibrate():
    given = image_with(3)
    given.remove("scores")
    before = given.get_fields().keys()
    (found,) = MaskCalibrator()([given])
    assert found.get_fields().keys() == before


# ---- precision and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_at_half_precision(dtype):
    calibrator = randomised(MaskCalibrator())
    (expected,) = calibrator([image_with(6)])
    images = image_with(6)
    for name in ("scores", "pred_masks", "pred_mask_ious"):
        images.set(name, images.get(name).to(dtype))
    (found,) = calibrator.to(dtype)([images])
    assert found.mask_iou_probs.dtype == torch.float32
    torch.testing.assert_close(found.mask_iou_probs, expected.mask_iou_probs, rtol=0, atol=0.05)


def test_autocast_does_not_round_the_probabilities():
    calibrator = randomised(MaskCalibrator())
    (expected,) = calibrator([image_with(6)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = calibrator([image_with(6)])
    assert torch.equal(found.mask_iou_probs, expected.mask_iou_probs)


@pytest.mark.parametrize("amp", [True, False])
def test_the_host_does_not_wait_for_a_gpu(amp):
    calibrator = randomised(MaskCalibrator())
    counts = (4, 0, 3)
    expected = calibrator([image_with(n) for n in counts])
    with SimulatedCuda().running() as device:
        on_gpu = copy.deepcopy(calibrator).to("cuda")
        images = [image_with(n).to("cuda") for n in counts]
        device.events.clear()
        with torch.autocast("cuda", enabled=amp):
            found = on_gpu(images)
        assert device.events == []
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.mask_iou_probs.cpu(), b.mask_iou_probs)


# ---- configs


def plain_yacs_config(cascade=False):
    cfg = tiny_yacs_config(cascade)
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads" if cascade else "StandardROIHeads"
    return cfg


def config_of(kind, cascade=False, scoring=False):
    """Of a model without a calibrator."""
    if kind == "yacs":
        return tiny_yacs_config(cascade) if scoring else plain_yacs_config(cascade)
    return tiny_mask_scoring_rcnn(cascade) if scoring else tiny_mask_rcnn(cascade)


def model_of(cfg):
    torch.manual_seed(0)
    return instantiate(cfg.model) if OmegaConf.is_config(cfg) else build_model(cfg)


def calibrated_model(*args, **kwargs):
    model = model_of(add_mask_calibrator(config_of(*args, **kwargs))).eval()
    randomised(model.roi_heads.mask_calibrator)
    return model


@pytest.fixture(params=["yacs", "lazy"])
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["standard", "cascade"])
def cascade(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "scoring"])
def scoring(request):
    return request.param


@torch.no_grad()
def test_every_model_gets_the_fields_of_a_calibrator(kind, cascade, scoring):
    model = calibrated_model(kind, cascade, scoring)
    expected = CascadeMaskScoringROIHeads if cascade else MaskScoringROIHeads
    assert type(model.roi_heads) is expected
    names = OF_MASK_RCNN | OF_CALIBRATOR | (OF_MASK_IOU_HEAD if scoring else set())
    for output in model(toy_inputs()):
        found = output["instances"]
        assert found.get_fields().keys() == names
        assert found.mask_iou_probs.shape == (len(found), 10) and len(found) > 5
        assert found.quality_scores.isfinite().all()
        assert len(found.quality_scores.unique()) > 5


def test_the_rest_of_the_model_stays_as_it_was(kind, cascade, scoring):
    cfg = config_of(kind, cascade, scoring)
    before, after = (model_of(x).state_dict() for x in (cfg, add_mask_calibrator(cfg)))
    new = after.keys() - before.keys()
    assert not before.keys() - after.keys()
    assert all(name.startswith("roi_heads.mask_calibrator.") for name in new)
    assert {name.split(".")[2] for name in new} == {
        *("cue_mean", "cue_std", "slope", "offset", "layers", "accept_thresholds")
    }
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_config_that_is_given_is_not_modified(kind, scoring):
    cfg = config_of(kind, scoring=scoring)
    before = copy.deepcopy(cfg)
    add_mask_calibrator(cfg)
    assert cfg == before


def test_a_second_time_changes_nothing(kind, scoring):
    cfg = add_mask_calibrator(config_of(kind, scoring=scoring))
    if kind == "yacs":
        cfg.MODEL.ROI_MASK_CALIBRATOR.HIDDEN_DIM = 5
    else:
        cfg.model.roi_heads.mask_calibrator.hidden_dim = 5
    assert add_mask_calibrator(cfg) == cfg
    assert model_of(cfg).roi_heads.mask_calibrator.layers[0].weight.shape == (3, NUM_CUES, 5)


def test_a_saved_config_builds_the_same_model(kind, scoring, tmp_path):
    cfg = add_mask_calibrator(config_of(kind, scoring=scoring))
    path = str(tmp_path / "config.yaml")
    if kind == "yacs":
        (tmp_path / "config.yaml").write_text(cfg.dump())
        read = get_cfg()
        add_msrcnn_config(read)
        read.merge_from_file(path)
    else:
        LazyConfig.save(cfg, path)
        read = LazyConfig.load(path)
    expected, found = (model_of(x).state_dict() for x in (cfg, read))
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    # Also as a config that is to be calibrated anew
    assert model_of(add_mask_calibrator(read)).state_dict().keys() == expected.keys()


def test_yacs_configs_that_do_not_know_this_package():
    cfg = get_cfg()
    cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NAME = True, "StandardROIHeads"
    found = add_mask_calibrator(cfg).MODEL
    assert found.ROI_HEADS.NAME == "MaskScoringROIHeads"
    assert found.ROI_MASK_CALIBRATOR.NAME == "MaskCalibrator" and not found.ROI_MASK_IOU_HEAD.NAME


def test_lazy_configs_with_other_parts():
    """Mask scoring can be added before, but not after; our evaluator takes the place of theirs."""
    cfg = tiny_mask_rcnn()
    cfg.dataloader = {"evaluator": {"_target_": "detectron2.evaluation.COCOEvaluator"}}
    calibrated = add_mask_calibrator(cfg)
    assert calibrated.dataloader.evaluator._target_ is MaskScoringCOCOEvaluator
    with pytest.raises(ValueError, match="before it was calibrated"):
        add_mask_scoring(calibrated)


def without_masks(kind):
    cfg = config_of(kind)
    if kind == "yacs":
        cfg.MODEL.MASK_ON = False
    else:
        for key in ("mask_in_features", "mask_pooler", "mask_head"):
            del cfg.model.roi_heads[key]
    return cfg


def with_other_heads(kind):
    cfg = config_of(kind)
    if kind == "yacs":
        cfg.MODEL.ROI_HEADS.NAME = "RROIHeads"
    else:
        cfg.model.roi_heads._target_ = "detectron2.modeling.roi_heads.RROIHeads"
    return cfg


@pytest.mark.parametrize("change", [without_masks, with_other_heads])
def test_models_that_cannot_have_a_calibrator(kind, change):
    with pytest.raises(ValueError) as error:
        add_mask_calibrator(change(kind))
    assert "\n" not in str(error.value)


def test_a_lazy_config_without_roi_heads():
    with pytest.raises(ValueError, match="roi_heads"):
        add_mask_calibrator(OmegaConf.create({"train": {}}))


def test_a_retrofit_does_not_keep_a_calibrator(kind, scoring):
    with pytest.raises(ValueError, match="calibrat"):
        retrofit(add_mask_calibrator(config_of(kind, scoring=scoring)))


def test_roi_heads_without_anything_to_score_masks(kind):
    cfg = add_mask_calibrator(config_of(kind))
    if kind == "yacs":
        cfg.MODEL.ROI_MASK_CALIBRATOR.NAME = ""
    else:
        del cfg.model.roi_heads.mask_calibrator
    with pytest.raises(ValueError, match="StandardROIHeads"):
        model_of(cfg)


# ---- training


def test_training_without_a_mask_iou_head_is_that_of_mask_rcnn(event_storage, cascade):
    plain = instantiate(tiny_mask_rcnn(cascade).model.roi_heads).train()
    ours = instantiate(add_mask_calibrator(tiny_mask_rcnn(cascade)).model.roi_heads).train()
    ours.load_state_dict(plain.state_dict(), strict=False)
    losses = []
    for heads in (plain, ours):
        torch.manual_seed(2)
        losses.append(heads(None, toy_features(), toy_proposals(), toy_instances())[1])
    assert isinstance(plain, StandardROIHeads) and losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        assert torch.equal(losses[1][name], loss) and loss > 0, name


def test_no_optimizer_changes_a_calibrator():
    model = model_of(add_mask_calibrator(tiny_mask_scoring_rcnn()))
    calibrator = {*model.roi_heads.mask_calibrator.parameters()}
    assert calibrator and not any(p.requires_grad for p in calibrator)
    given = {p for group in get_default_optimizer_params(model) for p in group["params"]}
    assert given == {*model.parameters()} - calibrator


# ---- what users run


@torch.no_grad()
def test_masks_that_are_not_pasted_keep_the_fields(scoring):
    model, images = calibrated_model("lazy", scoring=scoring), toy_inputs()
    pasted, unpasted = model(images), UnpastedMasks(model)(images)
    for a, b in zip(pasted, unpasted, strict=True):
        assert len(a["instances"]) > 5
        for name in OF_CALIBRATOR:
            assert torch.equal(a["instances"].get(name), b["instances"].get(name))


@torch.no_grad()
def test_test_time_augmentation_calibrates_the_averaged_masks(scoring):
    cfg = tiny_yacs_config()
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP = (64, 96), 200, False
    model = calibrated_model("lazy", scoring=scoring)
    seen = []
    model.roi_heads.mask_calibrator.register_forward_hook(
        lambda module, args, out: seen.append([copy.deepcopy(x) for x in out])
    )
    tta = MaskScoringRCNNWithTTA(cfg, model, batch_size=1)
    image = {k: toy_inputs()[0][k] for k in ("image", "height", "width")}
    found = tta([image])[0]["instances"]

    *augmented, merged = [x for (x,) in seen]  # one image at a time
    assert len(augmented) == 2 and len(merged) > 5
    mean = (augmented[0].pred_masks + augmented[1].pred_masks) / 2
    torch.testing.assert_close(merged.pred_masks, mean)
    assert (augmented[0].pred_masks - mean).abs().max() > 1e-4
    assert found.has("mask_scores") == scoring
    assert found.quality_scores.isfinite().all()
    # Masks whose boxes are empty are left out afterwards
    assert {*found.quality_scores.tolist()} <= {*merged.quality_scores.tolist()}
    # The second look at an image of another size gives other probabilities
    assert not torch.equal(merged.mask_iou_probs, augmented[0].mask_iou_probs)


@torch.no_grad()
def test_detectron2s_own_predictor(scoring, tmp_path):
    cfg = add_mask_calibrator(config_of("yacs", scoring=scoring))
    model = calibrated_model("yacs", scoring=scoring)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    pixels = np.random.default_rng(0).integers(0, 255, (*IMAGE_SIZE, 3), dtype=np.uint8)
    found = DefaultPredictor(cfg)(pixels)["instances"]
    image = {"image": torch.from_numpy(pixels.transpose(2, 0, 1).astype("float32"))}
    (expected,) = model([image | {"height": IMAGE_SIZE[0], "width": IMAGE_SIZE[1]}])
    torch.testing.assert_close(found.quality_scores, expected["instances"].quality_scores)
    assert len(found) > 5 and found.has("mask_iou_probs")
