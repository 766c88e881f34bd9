"""Backbones of timm: names, sizes and order of their feature maps; they train and are chosen."""

import sys

import pytest
import torch

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model

from msrcnn_d2.modeling import TimmBackbone
from msrcnn_d2_cli import main
from tests.helpers.toy import (
    IMAGE_SIZE,
    tiny_mask_scoring_rcnn,
    tiny_yacs_config,
    toy_inputs,
)
from tests.helpers.toy_training import lazy_config, write_dataset

pytest.importorskip("timm")
ORDINARY = {"name": "convnext_atto", "dims": (4, 8, 16, 32), "depths": (1, 1, 1, 1)}
# Its features have the shape (N, H, W, C), and it takes any size of image only if it is told to
CHANNELS_LAST = {
    **{"name": "swin_tiny_patch4_window7_224", "embed_dim": 4, "depths": (1, 1, 1, 1)},
    **{"num_heads": (1, 1, 1, 1), "strict_img_size": False},
}


@pytest.mark.parametrize("args", [ORDINARY, CHANNELS_LAST], ids=lambda x: x["name"])
def test_names_strides_and_shapes(args):
    backbone = TimmBackbone(**args)
    shapes = {k: (x.channels, x.stride) for k, x in backbone.output_shape().items()}
    assert shapes == {"res2": (4, 4), "res3": (8, 8), "res4": (16, 16), "res5": (32, 32)}
    assert backbone.size_divisibility == 32
    maps = backbone(torch.rand(2, 3, 64, 96))
    assert {k: tuple(x.shape) for k, x in maps.items()} == {
        "res2": (2, 4, 16, 24),
        "res3": (2, 8, 8, 12),
        "res4": (2, 16, 4, 6),
        "res5": (2, 32, 2, 3),
    }


def test_features_stay_where_they_are_in_the_image():
    """The map of a bright corner differs from that of a black image near this corner only."""
    backbone = TimmBackbone(**CHANNELS_LAST).eval()
    black = torch.zeros(1, 3, 64, 96)
    bright = black.clone()
    bright[..., :4, 92:] = 9.0
    with torch.no_grad():
        changed = (backbone(bright)["res2"] - backbone(black)["res2"])[0].abs().sum(0) > 1e-6
    rows, columns = changed.nonzero().T
    # One window of 7 x 7 cells at the top right: the last of 24 columns are the 4th window's
    assert changed[0, 23] and rows.max() < 7 and columns.min() >= 21


def test_chosen_levels():
    backbone = TimmBackbone("resnet10t", out_features=["res2", "res4"])
    assert {k: x.stride for k, x in backbone.output_shape().items()} == {"res2": 4, "res4": 16}
    backbone = TimmBackbone("resnet10t", out_features=["res3"], out_indices=[2])
    assert backbone(torch.rand(1, 3, 64, 96))["res3"].shape == (1, 128, 8, 12)


def test_frozen_batch_norm_does_not_learn():
    backbone = TimmBackbone("resnet10t", freeze_batch_norm=True).train()
    before = {k: x.clone() for k, x in backbone.state_dict().items()}
    backbone(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(x, before[k]) for k, x in backbone.state_dict().items())
    assert not any(".bn" in name for name, _ in backbone.named_parameters())
    assert any(".conv" in name for name, _ in backbone.named_parameters())


def lazy_model(args):
    cfg = tiny_mask_scoring_rcnn()
    features = ["res2", "res3", "res4", "res5"]
    cfg.model.backbone.bottom_up = L(TimmBackbone)(**args, out_features=features)
    return instantiate(cfg.model)


def yacs_model(args):
    cfg = tiny_yacs_config()
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.TIMM.NAME = args["name"]
    cfg.MODEL.TIMM.ARGS.update({k: v for k, v in args.items() if k != "name"})
    return build_model(cfg)


@pytest.mark.parametrize("build", [lazy_model, yacs_model])
@pytest.mark.parametrize("args", [ORDINARY, CHANNELS_LAST], ids=lambda x: x["name"])
def test_a_step_trains_all_of_the_backbone(build, args, event_storage):
    model = build(args)
    losses = model(toy_inputs())
    assert "loss_mask_iou" in losses and all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    gradients = {k: p.grad for k, p in model.backbone.bottom_up.named_parameters()}
    # Windows without neighbours do not use all relative positions
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert any(k.startswith("net.stem") or "patch_embed" in k for k in gradients)
    assert all(g.any() for k, g in gradients.items() if "conv" in k or "qkv.weight" in k)
    with torch.no_grad():
        for output in model.eval()(toy_inputs()):
            assert output["instances"].image_size == IMAGE_SIZE
            assert output["instances"].has("mask_scores")


MISTAKES = {
    "convnext_atto": {"name": "convnext_attto"},  # the name that is near
    "no_such_argument": {"name": "convnext_atto", "no_such_argument": 1},
    "strides": {"name": "vit_tiny_patch16_224", "depth": 4},  # 16 in all layers
    "stage1": {"name": "convnext_atto", "out_features": ["stage1"]},
    "pip install timm": {"name": "convnext_atto"},  # without it
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_a_sentence(word, tmp_path, capsys, leave_no_traces, monkeypatch):
    cfg = lazy_config()
    cfg.model.backbone.in_features = ["res2", "res3", "res4", "res5"]
    cfg.model.backbone.bottom_up = L(TimmBackbone)(**MISTAKES[word])
    config = str(tmp_path / "config.yaml")
    LazyConfig.save(cfg, config)
    if "pip" in word:
        monkeypatch.setitem(sys.modules, "timm", None)
    options = ["--config-file", config, *write_dataset(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main(["train", *options, f"train.output_dir={tmp_path / 'output'}"])
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("error: ") and word in sentence
