"""What the tests of checkpoints share: small models, files, and the names of other frameworks."""

import io
import logging
import pickle
from pathlib import Path

import pytest
import torch

from detectron2.modeling import build_model

from msrcnn_d2.checkpoint import MaskScoringCheckpointer
from msrcnn_d2.utils.errors import UserError
from tests.helpers.toy import tiny_yacs_config

BODY, RPN, HEADS = "backbone.bottom_up.", "proposal_generator.rpn_head.", "roi_heads."
SCORES, BOXES = HEADS + "box_predictor.cls_score.", HEADS + "box_predictor.bbox_pred."
MASKS, IOUS = HEADS + "mask_head.predictor.", HEADS + "mask_iou_head.predictor."
FILLED = -7.0  # before loading: what is left of it was not loaded


def slim_model(*options):
    """A ResNet-50 FPN model with all of its modules, but 8 channels, and 3 classes."""
    cfg = tiny_yacs_config()
    cfg.merge_from_list(["MODEL.ROI_MASK_HEAD.NUM_CONV", 4, "MODEL.ROI_MASK_IOU_HEAD.NUM_CONV", 4])
    cfg.merge_from_list(list(options))
    return build_model(cfg)


def weights_for(model):
    """For each parameter and buffer of a model random values, of which no two are alike."""
    generator = torch.Generator().manual_seed(4)
    return {
        k: torch.rand(v.shape, generator=generator) + 0.5 if v.is_floating_point() else v.clone()
        for k, v in model.state_dict().items()
    }


def fill(model):
    for value in model.state_dict().values():
        value.fill_(FILLED)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def load(model, path, strict=True):
    """Load into a model that is filled before, and return what was logged."""
    fill(model)
    handler, checkpointer = Lines(), MaskScoringCheckpointer(model)
    checkpointer.logger.addHandler(handler)
    level = checkpointer.logger.level
    checkpointer.logger.setLevel(logging.INFO)
    try:
        checkpointer.load(str(path), strict=strict)
    finally:
        checkpointer.logger.setLevel(level)
        checkpointer.logger.removeHandler(handler)
    return handler.lines


def error_of(model, path, strict=True):
    """The message of the error; the model has to stay as it was, bit for bit."""
    with pytest.raises(UserError) as caught:
        load(model, path, strict)
    assert all((v == FILLED).all() for v in model.state_dict().values())
    return str(caught.value)


def assert_has(model, expected, but=()):
    """Each value of the model is the expected one, except for names that begin with `but`."""
    for name, value in model.state_dict().items():
        if name.startswith(tuple(but)):
            assert (value == FILLED).all(), name
        else:
            assert torch.equal(value, expected[name].to(value.dtype)), name


def saved(contents, path, **kwargs):
    torch.save(contents, path, **kwargs)
    return path


def pickled(contents, path, protocol=2):
    Path(path).write_bytes(pickle.dumps(contents, protocol))
    return path


def arrays(state_dict):
    return {k: v.numpy() for k, v in state_dict.items()}


def torch_bytes(contents, zipped=True):
    buffer = io.BytesIO()
    torch.save(contents, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


GOOD = {"model": {"a": torch.arange(300.0), "b": torch.ones(3)}}


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


# ---- names of other frameworks, written from shared knowledge of them, not from our tables


def resnet_name(name):
    """How everybody but Detectron2 and Caffe2 names a parameter of a ResNet."""
    stage, block, *rest = name.removeprefix(BODY).split(".")
    if stage == "stem":
        return ".".join(["bn1", rest[-1]] if "norm" in rest else ["conv1", rest[-1]])
    layer, leaf = rest[0], rest[-1]
    if layer == "shortcut":
        layer = "downsample.1" if "norm" in rest else "downsample.0"
    elif "norm" in rest:
        layer = layer.replace("conv", "bn")
    return f"layer{int(stage[3:]) - 1}.{block}.{layer}.{leaf}"


MMDETECTION = {
    **{f"backbone.fpn_lateral{i + 2}.": f"neck.lateral_convs.{i}.conv." for i in range(4)},
    **{f"backbone.fpn_output{i + 2}.": f"neck.fpn_convs.{i}.conv." for i in range(4)},
    RPN + "conv.": "rpn_head.rpn_conv.",
    RPN + "objectness_logits.": "rpn_head.rpn_cls.",
    RPN + "anchor_deltas.": "rpn_head.rpn_reg.",
    HEADS + "box_head.fc1.": "roi_head.bbox_head.shared_fcs.0.",
    HEADS + "box_head.fc2.": "roi_head.bbox_head.shared_fcs.1.",
    SCORES: "roi_head.bbox_head.fc_cls.",
    BOXES: "roi_head.bbox_head.fc_reg.",
    **{
        f"{HEADS}mask_head.mask_fcn{i + 1}.": f"roi_head.mask_head.convs.{i}.conv."
        for i in range(4)
    },
    HEADS + "mask_head.deconv.": "roi_head.mask_head.upsample.",
    MASKS: "roi_head.mask_head.conv_logits.",
    **{
        f"{HEADS}mask_iou_head.convs.conv{i + 1}.": f"roi_head.mask_iou_head.convs.{i}."
        for i in range(4)
    },
    HEADS + "mask_iou_head.fcs.fc1.": "roi_head.mask_iou_head.fcs.0.",
    HEADS + "mask_iou_head.fcs.fc2.": "roi_head.mask_iou_head.fcs.1.",
    IOUS: "roi_head.mask_iou_head.fc_mask_iou.",
}
PAPER = {
    **{f"backbone.fpn_lateral{i + 1}.": f"backbone.fpn.fpn_inner{i}." for i in (1, 2, 3, 4)},
    **{f"backbone.fpn_output{i + 1}.": f"backbone.fpn.fpn_layer{i}." for i in (1, 2, 3, 4)},
    RPN + "conv.": "rpn.head.conv.",
    RPN + "objectness_logits.": "rpn.head.cls_logits.",
    RPN + "anchor_deltas.": "rpn.head.bbox_pred.",
    HEADS + "box_head.fc1.": "roi_heads.box.feature_extractor.fc6.",
    HEADS + "box_head.fc2.": "roi_heads.box.feature_extractor.fc7.",
    SCORES: "roi_heads.box.predictor.cls_score.",
    BOXES: "roi_heads.box.predictor.bbox_pred.",
    HEADS + "mask_head.mask_fcn": "roi_heads.mask.feature_extractor.mask_fcn",
    HEADS + "mask_head.deconv.": "roi_heads.mask.predictor.conv5_mask.",
    MASKS: "roi_heads.mask.predictor.mask_fcn_logits.",
    HEADS + "mask_iou_head.convs.conv": "roi_heads.maskiou.feature_extractor.maskiou_fcn",
    HEADS + "mask_iou_head.fcs.fc": "roi_heads.maskiou.feature_extractor.maskiou_fc",
    IOUS: "roi_heads.maskiou.predictor.maskiou.",
}

# Ports to Detectron2, which name only this head in a way of their own
MASKIOU = {
    HEADS + "mask_iou_head.convs.conv": "roi_heads.maskiou_head.maskiou_fcn",
    HEADS + "mask_iou_head.fcs.fc": "roi_heads.maskiou_head.maskiou_fc",
    IOUS: "roi_heads.maskiou_head.maskiou.",
}


def renamed(state_dict, heads, body="backbone."):
    result = {}
    for name, value in state_dict.items():
        if name.startswith(BODY):
            result[body + resnet_name(name)] = value
            continue
        (ours,) = [prefix for prefix in heads if name.startswith(prefix)]
        result[heads[ours] + name.removeprefix(ours)] = value
    assert len(result) == len(state_dict)
    return result


def with_background_first(state_dict):
    """Class 0 is the background, which elsewhere than in the class scores has values of no use."""
    result = dict(state_dict)
    for name, value in state_dict.items():
        if name.startswith(SCORES):
            result[name] = torch.cat([value[-1:], value[:-1]])
        elif name.startswith(BOXES):
            result[name] = torch.cat([torch.full_like(value[:4], 9), value])
        elif name.startswith((MASKS, IOUS)):
            result[name] = torch.cat([torch.full_like(value[:1], 9), value])
    return result
