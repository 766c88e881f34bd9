"""Weights of other frameworks, under their names."""

import re

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection._utils import overwrite_eps

from detectron2.config import instantiate
from detectron2.modeling import build_model

from msrcnn_d2 import model_zoo
from msrcnn_d2.checkpoint.conversion import read_weights
from msrcnn_d2.checkpoint.reading import read_file
from msrcnn_d2.utils.errors import UserError
from tests.helpers.weights import (
    BODY,
    BOXES,
    FILLED,
    HEADS,
    IOUS,
    MASKIOU,
    MASKS,
    MMDETECTION,
    PAPER,
    SCORES,
    arrays,
    assert_has,
    error_of,
    load,
    pickled,
    renamed,
    resnet_name,
    saved,
    slim_model,
    weights_for,
    with_background_first,
)


def with_counters(state_dict):
    """Batch norm that was trained counts its batches."""
    means = [k for k in state_dict if k.endswith("running_mean")]
    counters = {k.replace("running_mean", "num_batches_tracked"): torch.tensor(5) for k in means}
    return {**state_dict, **counters}


# ---- MMDetection


def test_mmdetection(slim, tmp_path):
    expected = weights_for(slim)
    theirs = with_counters(renamed(expected, MMDETECTION))
    meta = {"CLASSES": ("a", "b", "c"), "epoch": 12, "config": "img_norm_cfg = dict(mean=[1.0])"}
    lines = load(slim, saved({"meta": meta, "state_dict": theirs}, tmp_path / "x.pth"))

    assert_has(slim, expected)
    assert len(lines) == 1, lines
    assert f"{len(expected)} of {len(expected)} parameters" in lines[0]
    assert "x.pth' (MMDetection)" in lines[0]


def test_mmdetection_mask_rcnn(slim, plain, tmp_path):
    expected = weights_for(plain)
    file = saved({"state_dict": renamed(expected, MMDETECTION)}, tmp_path / "x.pth")
    load(plain, file)
    assert_has(plain, expected)

    assert "mask IoU head has no weights" in error_of(slim, file)
    assert "fresh, in whole or in part: roi_heads.mask_iou_head" in load(slim, file, False)[0]
    assert_has(slim, expected, but=[HEADS + "mask_iou_head."])


@pytest.mark.parametrize(
    "prefix, wrapper", [("", ""), ("", "state_dict"), ("backbone.", "state_dict")]
)
@pytest.mark.parametrize("resnext", [False, True], ids=["resnet", "resnext"])
def test_imagenet_backbones(prefix, wrapper, resnext, tmp_path):
    """Of torchvision, MMDetection and MMPretrain."""
    groups = ["MODEL.RESNETS.NUM_GROUPS", 2 if resnext else 1, "MODEL.BACKBONE.FREEZE_AT", 2]
    model = slim_model(*groups)
    expected = {k: v for k, v in weights_for(model).items() if k.startswith(BODY)}
    theirs = with_counters({prefix + resnet_name(k): v for k, v in expected.items()})
    if prefix or not wrapper:
        theirs["head.fc.weight" if prefix else "fc.weight"] = torch.ones(10, 3)
    file = saved({wrapper: theirs} if wrapper else theirs, tmp_path / "x.pth")

    lines = load(model, file, strict=False)
    others = [k for k in model.state_dict() if not k.startswith(BODY)]
    assert_has(model, expected, but=others)
    assert not any("Not used" in line for line in lines)
    # Of torchvision it is known by which pixels they are trained; the model has Caffe's, as have
    # some of MMDetection's backbones, which come without a classifier
    assert any("Set model.pixel_mean" in line for line in lines) is not bool(wrapper)
    assert "weights of a backbone only" in error_of(model, file)


CONFIG_TEXT = """
img_norm_cfg = dict(
    mean=[{mean}], std=[1.0, 1.0,
    1.0], to_rgb=False)
bbox_coder=dict(target_means=[0.0, 0.0], target_stds=[0.1, 0.1])
"""


@pytest.mark.parametrize("key", ["config", "cfg"])
@pytest.mark.parametrize(
    "mean, warns", [("103.53, 116.28, 123.675", False), ("123.675, 116.28, 103.53", True)]
)
def test_pixels_of_the_config_in_mmdetections_file(key, mean, warns, plain, tmp_path):
    plain.pixel_mean.copy_(torch.tensor([103.53, 116.28, 123.675]).reshape(3, 1, 1))
    plain.pixel_std.fill_(1.0)
    state_dict = renamed(weights_for(plain), MMDETECTION)
    contents = {"meta": {key: CONFIG_TEXT.format(mean=mean)}, "state_dict": state_dict}
    lines = load(plain, saved(contents, tmp_path / "x.pth"))
    assert any("normalised by mean [123.675, 116.28, 103.53]" in line for line in lines) is warns


# ---- the paper's release


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_release_of_the_paper(prefix, slim, tmp_path):
    expected = weights_for(slim)
    theirs = renamed(with_background_first(expected), PAPER, "backbone.body.")
    theirs["rpn.anchor_generator.cell_anchors.0"] = torch.ones(3, 4)
    stem = {
        k: k.replace("body.", "body.stem.") for k in theirs if re.search(r"body\.(conv|bn)1", k)
    }
    theirs = {prefix + stem.get(k, k): v for k, v in theirs.items()}

    lines = load(slim, saved({"model": theirs}, tmp_path / "x.pth"))
    for name in expected:  # Detectron2 adds 1e-5, which the original does not
        if name.endswith("running_var"):
            expected[name] = expected[name] - 1e-5
    assert_has(slim, expected)
    assert "maskrcnn-benchmark" in lines[0] and "inclusive pixel coordinates" in lines[1]


# Rows of background, a, b; by hand
HAND_MADE = {
    "roi_heads.box.predictor.cls_score.bias": [0.0, 1, 2],
    "roi_heads.box.predictor.bbox_pred.bias": [0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    "roi_heads.mask.predictor.mask_fcn_logits.bias": [0.0, 1, 2],
    "roi_heads.maskiou.predictor.maskiou.bias": [0.0, 1, 2],
    "roi_heads.mask.feature_extractor.mask_fcn1.bias": [0.0, 1, 2],  # not a class's rows
}


def test_background_moves_behind_the_classes(tmp_path):
    theirs = {k: torch.tensor(v) for k, v in HAND_MADE.items()}
    theirs["roi_heads.box.predictor.cls_score.weight"] = torch.tensor([[0.0], [1], [2]])
    ours = read_weights(str(saved({"model": theirs}, tmp_path / "x.pth"))).state_dict
    assert ours[SCORES + "bias"].tolist() == [1, 2, 0]
    assert ours[SCORES + "weight"].tolist() == [[1], [2], [0]]
    assert ours[BOXES + "bias"].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert ours[MASKS + "bias"].tolist() == ours[IOUS + "bias"].tolist() == [1, 2]
    assert ours[HEADS + "mask_head.mask_fcn1.bias"].tolist() == [0, 1, 2]


def test_only_torchvision_numbers_classes_with_gaps(tmp_path):
    theirs = {"roi_heads.box.predictor.cls_score.bias": torch.arange(91.0)}
    ours = read_weights(str(saved({"model": theirs}, tmp_path / "x.pth"))).state_dict
    assert ours[SCORES + "bias"].tolist() == [*range(1, 91), 0]


def test_class_agnostic_rows_stay(tmp_path):
    theirs = {
        "roi_heads.box.predictor.cls_score.bias": torch.tensor([0.0, 1, 2, 3]),
        "roi_heads.box.predictor.bbox_pred.bias": torch.arange(4.0),
        "roi_heads.mask.predictor.mask_fcn_logits.bias": torch.arange(1.0),
    }
    ours = read_weights(str(saved({"model": theirs}, tmp_path / "x.pth"))).state_dict
    assert ours[SCORES + "bias"].tolist() == [1, 2, 3, 0]
    assert ours[BOXES + "bias"].tolist() == [0, 1, 2, 3]
    assert ours[MASKS + "bias"].tolist() == [0]


def test_frozen_batch_norm_without_an_eps(tmp_path):
    """Small variances, where 1e-5 more is a third more."""
    scale, shift, mean, var = (torch.rand(8) + 0.1 for _ in range(4))
    var = var * 3e-5
    values = {"weight": scale, "bias": shift, "running_mean": mean, "running_var": var}
    theirs = {f"backbone.body.layer1.0.bn1.{k}": v for k, v in values.items()}
    theirs["roi_heads.box.predictor.cls_score.bias"] = torch.ones(4)
    slim = slim_model("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN").eval()
    load(slim, saved({"model": theirs}, tmp_path / "x.pth"), strict=False)

    images = torch.randn(2, 8, 3, 3)
    expected = (images - mean[:, None, None]) / var.sqrt()[:, None, None]
    expected = expected * scale[:, None, None] + shift[:, None, None]
    norm = slim.backbone.bottom_up.res2[0].conv1.norm
    torch.testing.assert_close(norm(images), expected, rtol=1e-4, atol=1e-3)


# ---- ports to Detectron2 with a head of the paper's names


def with_maskiou_head(state_dict):
    return {
        next((k.replace(ours, MASKIOU[ours]) for ours in MASKIOU if k.startswith(ours)), k): v
        for k, v in state_dict.items()
    }


def test_maskscoring_rcnn_detectron2(slim, tmp_path):
    """lsrock1/maskscoring_rcnn.detectron2: classes are in Detectron2's order."""
    expected = weights_for(slim)
    theirs = with_maskiou_head(expected)
    assert f"{HEADS}maskiou_head.maskiou_fcn4.bias" in theirs
    assert f"{HEADS}maskiou_head.maskiou_fc2.weight" in theirs
    theirs["proposal_generator.anchor_generator.cell_anchors.0"] = torch.ones(3, 4)
    lines = load(slim, saved({"model": theirs, "iteration": 5}, tmp_path / "x.pth"))
    assert_has(slim, expected)
    assert f"{len(expected)} of {len(expected)} parameters" in lines[0]


def test_centermask2(slim, tmp_path):
    """youngwanLEE/centermask2 has the same head in another model: what is not there is said."""
    weights = weights_for(slim)
    absent = ("proposal_generator.", HEADS + "box_head.", HEADS + "box_predictor.")
    theirs = {k: v for k, v in with_maskiou_head(weights).items() if not k.startswith(absent)}
    theirs["proposal_generator.fcos_head.cls_logits.weight"] = torch.ones(3)
    theirs[HEADS + "mask_head.spatialAtt.conv1.weight"] = torch.ones(3)
    file = saved({"model": theirs}, tmp_path / "x.pth")
    message = error_of(slim, file)
    for name in ("proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.box_predictor"):
        assert name in message
    assert "but has proposal_generator.fcos_head, roi_heads.mask_head" in message

    lines = load(slim, file, strict=False)
    assert_has(slim, weights, but=absent)
    assert "Starting fresh" in lines[0] and "proposal_generator.fcos_head" in lines[1]


# ---- torchvision


@pytest.fixture(scope="module")
def torchvision_detector():
    """With the published weights' batch norm, which has no eps, and without a trained head."""
    torch.manual_seed(0)
    build = torchvision.models.detection.maskrcnn_resnet50_fpn
    model = build(weights=None, weights_backbone=None).eval()
    overwrite_eps(model, 0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.1, 0.1)
    return model


@pytest.fixture(scope="module")
def full_size_plain():
    """Detectron2's R-50 FPN with strides as in torchvision."""
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.yaml")
    cfg.merge_from_list(["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.DEVICE", "cpu"])
    cfg.merge_from_list(["MODEL.RESNETS.STRIDE_IN_1X1", False])
    return build_model(cfg).eval()


COCO_GAPS = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]  # no category of COCO has these ids
COCO_IDS = [i for i in range(1, 91) if i not in COCO_GAPS]


def older_names(state_dict):
    """Before 0.13, convolutions were not yet sequences of one."""
    result = {}
    for name, value in state_dict.items():
        name = re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", name)
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        name = re.sub(
            r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", name
        )
        result[name] = value
    assert result.keys() != state_dict.keys()
    return result


@pytest.mark.parametrize("names", [dict, older_names])
@torch.no_grad()
def test_torchvision_detector(names, torchvision_detector, full_size_plain, tmp_path):
    theirs, ours = torchvision_detector, full_size_plain
    file = saved(names(theirs.state_dict()), tmp_path / "x.pth")
    lines = load(ours, file)
    file.unlink()  # 170 MB, which pytest would keep
    assert "torchvision's detectors" in lines[0] and "strides in the 3x3" in lines[1]

    images = torch.randn(1, 3, 64, 96)
    features, expected = ours.backbone(images), theirs.backbone(images)
    for name, key in zip(("p2", "p3", "p4", "p5", "p6"), ("0", "1", "2", "3", "pool")):
        torch.testing.assert_close(features[name], expected[key], rtol=1e-4, atol=1e-4)

    logits, deltas = ours.proposal_generator.rpn_head([features["p3"]])
    their_logits, their_deltas = theirs.rpn.head([features["p3"]])
    torch.testing.assert_close(logits[0], their_logits[0])
    torch.testing.assert_close(deltas[0], their_deltas[0])

    regions, heads = torch.randn(2, 256, 7, 7), theirs.roi_heads
    scores, boxes = ours.roi_heads.box_predictor(ours.roi_heads.box_head(regions))
    their_scores, their_boxes = heads.box_predictor(heads.box_head(regions))
    torch.testing.assert_close(scores, their_scores[:, [*COCO_IDS, 0]])
    their_boxes = their_boxes.reshape(2, 91, 4)[:, COCO_IDS].reshape(2, 320)
    torch.testing.assert_close(boxes, their_boxes)

    regions = torch.randn(2, 256, 14, 14)
    masks = ours.roi_heads.mask_head.layers(regions)
    torch.testing.assert_close(masks, heads.mask_predictor(heads.mask_head(regions))[:, COCO_IDS])


@pytest.mark.parametrize("name", ["R_50", "X_101_32x4d"])
def test_torchvision_backbones(name, tmp_path):
    """By shape and by value at a few places, without the memory of two whole models."""
    build = {"R_50": "resnet50", "X_101_32x4d": "resnext101_32x8d"}[name]
    with torch.device("meta"):
        theirs = getattr(torchvision.models, build)(weights=None).state_dict()
        cfg = model_zoo.get_config(f"COCO-InstanceSegmentation/ms_rcnn_{name}_FPN_1x.py")
        ours = instantiate(cfg.model).backbone.bottom_up.state_dict()
    # One number instead of each tensor tells which it is; a few of the names' shapes are checked
    numbers = {k: torch.full((1,), float(i)) for i, k in enumerate(theirs)}
    found = read_weights(str(saved(numbers, tmp_path / "x.pth"))).state_dict
    assert found.keys() == {BODY + k for k in ours}
    for ours_name, index in found.items():
        assert list(theirs)[int(index)] == resnet_name(ours_name)
    if name == "R_50":
        for k, v in ours.items():
            assert theirs[resnet_name(BODY + k)].shape == v.shape, k


@torch.no_grad()
def test_torchvision_resnet_gives_the_same_features(full_size_plain, tmp_path):
    theirs = torchvision.models.resnet50(weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    file = saved(theirs.state_dict(), tmp_path / "x.pth")
    lines = load(full_size_plain, file, strict=False)
    file.unlink()
    assert "(torchvision)" in lines[0] and "Not used" not in "".join(lines)

    images = torch.randn(1, 3, 64, 64)
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
    features = full_size_plain.backbone.bottom_up(images)["res5"]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


# ---- Detectron2's own


def test_zoo_pickle(plain, slim, tmp_path):
    expected = weights_for(plain)
    theirs = arrays(expected)
    theirs["proposal_generator.anchor_generator.cell_anchors.0"] = np.ones((3, 4), "f4")
    theirs["pixel_mean"] = np.ones((3, 1, 1), "f4")
    contents = {"model": theirs, "__author__": "Detectron2 Model Zoo"}
    for protocol in range(6):
        lines = load(plain, pickled(contents, tmp_path / "x.pkl", protocol))
        assert_has(plain, expected)
        assert len(lines) == 1 and "Detectron2" in lines[0]
    assert torch.all(plain.pixel_mean.abs() < 200) and "pixel_mean" not in plain.state_dict()
    lines = load(slim, tmp_path / "x.pkl", strict=False)
    assert "fresh, in whole or in part: roi_heads.mask_iou_head" in lines[0]


def test_arrays_of_all_layouts(tmp_path):
    values = {
        "half": np.arange(6).astype("f2"),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "permuted": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
        "big_endian": np.arange(3, dtype=">f4"),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3), "f4"),
        "count": np.arange(3),
        "flag": np.array([True, False]),
    }
    for protocol in range(6):
        contents = {"model": values, "number": np.float32(3), "text": np.array(["a", "bc"])}
        weights = read_weights(str(pickled(contents, tmp_path / "x.pkl", protocol)))
        for name, value in values.items():
            assert np.array_equal(weights.state_dict[name].numpy(), value), (protocol, name)
        assert weights.extras["number"] == 3 and weights.extras["text"].tolist() == ["a", "bc"]
    for zipped in (True, False):
        saved(contents, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        weights = read_weights(str(tmp_path / "x.pth"))
        assert all(np.array_equal(weights.state_dict[k].numpy(), v) for k, v in values.items())
    saved(weights.extras, tmp_path / "again.pth")  # as what a trainer keeps would be
    assert read_file(str(tmp_path / "again.pth"))["text"].tolist() == ["a", "bc"]


def caffe2_weights(model):
    """Caffe2's names of a ResNet, batch norm folded into scale and shift, and what they become."""
    branches = dict(conv1="branch2a", conv2="branch2b", conv3="branch2c", shortcut="branch1")
    theirs, ours = {}, {}
    for name, value in weights_for(model).items():
        if not name.startswith(BODY) or "running" in name:
            continue
        stage, block, layer, *_ = [*name.removeprefix(BODY).split("."), ""]
        kind = "bn_s" if name.endswith("norm.weight") else "bn_b" if "norm" in name else "w"
        if stage == "stem":
            caffe2 = "conv1_w" if kind == "w" else f"res_conv1_{kind}"
        else:
            caffe2 = f"{stage}_{block}_{branches[layer]}_{kind}"
        theirs[caffe2], ours[name] = value.numpy(), value
        theirs[caffe2 + "_momentum"] = np.full_like(value.numpy(), 9)
    return theirs, ours


@pytest.mark.parametrize("wrapped", [False, True], ids=["imagenet", "blobs"])
def test_caffe2_backbone(wrapped, slim, tmp_path):
    theirs, ours = caffe2_weights(slim)
    assert {"res_conv1_bn_s", "res2_0_branch2a_w", "res5_2_branch2c_bn_b"} < theirs.keys()
    theirs.update({"fc1000_w": np.ones((10, 4), "f4"), "fc1000_b": np.ones(10, "f4")})
    contents = {"blobs": theirs, "cfg": "NUM_GPUS: 8"} if wrapped else theirs
    lines = load(slim, pickled(contents, tmp_path / "x.pkl"), strict=False)

    loaded = next(line for line in lines if line.startswith("Loaded"))
    assert "(Caffe2)" in loaded and "fresh, in whole or in part: backbone.fpn_lateral2" in loaded
    assert "backbone.bottom_up" not in loaded  # the folded mean and variance are not missed
    assert lines[-1] == "Not used, since the model has none: fc1000.bias, fc1000.weight"
    for name, value in slim.state_dict().items():
        if name in ours:
            assert torch.equal(value, ours[name]), name
        elif name.startswith(BODY):  # folded: a mean of 0 and a variance of 1
            expected = 0.0 if name.endswith("running_mean") else 1.0
            assert (value - expected).abs().max() < 2e-5, name
        else:
            assert (value == FILLED).all(), name


def test_matching_heuristics(plain, tmp_path):
    """As configs of Detectron2 ask for it in the path, and as files do."""
    expected = weights_for(plain)
    body = {k: v for k, v in expected.items() if k.startswith(BODY)}
    bare = {k.removeprefix(BODY): v for k, v in body.items()}
    others = [k for k in expected if k not in body]
    file = saved({"model": bare}, tmp_path / "x.pth")
    assert "?matching_heuristics=True" in error_of(plain, file, strict=False)
    load(plain, f"{file}?matching_heuristics=True", strict=False)
    assert_has(plain, expected, but=others)

    contents = {"model": arrays(bare), "__author__": "me", "matching_heuristics": True}
    load(plain, pickled(contents, tmp_path / "x.pkl"), strict=False)
    assert_has(plain, expected, but=others)


def test_a_name_that_ends_several_is_an_error(plain, tmp_path):
    name, value = next((k, v) for k, v in weights_for(plain).items() if k.endswith("norm.bias"))
    file = saved({"model": {"norm.bias": value}}, tmp_path / "x.pth")
    message = error_of(plain, f"{file}?matching_heuristics=True", strict=False)
    assert "the end of several of the model's" in message


def test_pycls_backbone(plain, tmp_path):
    """Files of pycls keep their weights as "model_state", and name only the ends."""
    expected = weights_for(plain)
    bare = {k.removeprefix(BODY): v for k, v in expected.items() if k.startswith(BODY)}
    lines = load(plain, saved({"model_state": bare}, tmp_path / "x.pyth"), strict=False)
    assert "(pycls)" in lines[-1]
    assert_has(plain, expected, but=[k for k in expected if not k.startswith(BODY)])


def test_a_name_with_the_end_of_a_line_is_quoted_on_one_line(tmp_path):
    with pytest.raises(UserError, match=r"a value of type NoneType as '\\n'\.$") as caught:
        read_weights(str(saved({"\n": None}, tmp_path / "x.pth")))
    assert "\n" not in str(caught.value)
