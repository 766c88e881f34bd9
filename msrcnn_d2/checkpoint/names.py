"""
How other frameworks name the parameters of a Mask (Scoring) R-CNN: one table for each.

A name in a table is the beginning of parameters' names. A letter in braces stands for a number
there; on the right it may be counted differently, as in "res{i+1}".
"""

import re
from collections.abc import Callable, Mapping

__all__ = [
    "MASKRCNN_BENCHMARK",
    "MASKIOU_HEAD",
    "MMDETECTION",
    "TORCHVISION_DETECTOR",
    "TORCHVISION_RESNET",
    "compile_names",
]


def _nested(names: Mapping[str, str], theirs: str, ours: str) -> dict[str, str]:
    """The table of a module's names, for where the module is a part of a larger one."""
    return {theirs + old: ours + new for old, new in names.items()}


# ResNet and ResNeXt, as everybody but Detectron2 and Caffe2 names them
_RESNET = {
    "conv1.": "stem.conv1.",
    "bn1.": "stem.conv1.norm.",
    "layer{i}.{j}.conv{k}.": "res{i+1}.{j}.conv{k}.",
    "layer{i}.{j}.bn{k}.": "res{i+1}.{j}.conv{k}.norm.",
    "layer{i}.{j}.downsample.0.": "res{i+1}.{j}.shortcut.",
    "layer{i}.{j}.downsample.1.": "res{i+1}.{j}.shortcut.norm.",
}

TORCHVISION_RESNET = _nested(_RESNET, "", "backbone.bottom_up.")

MMDETECTION = {
    **_nested(_RESNET, "backbone.", "backbone.bottom_up."),
    "neck.lateral_convs.{i}.conv.": "backbone.fpn_lateral{i+2}.",
    "neck.fpn_convs.{i}.conv.": "backbone.fpn_output{i+2}.",
    "rpn_head.rpn_conv.": "proposal_generator.rpn_head.conv.",
    "rpn_head.rpn_cls.": "proposal_generator.rpn_head.objectness_logits.",
    "rpn_head.rpn_reg.": "proposal_generator.rpn_head.anchor_deltas.",
    "roi_head.bbox_head.shared_fcs.{i}.": "roi_heads.box_head.fc{i+1}.",
    "roi_head.bbox_head.fc_cls.": "roi_heads.box_predictor.cls_score.",
    "roi_head.bbox_head.fc_reg.": "roi_heads.box_predictor.bbox_pred.",
    "roi_head.mask_head.convs.{i}.conv.": "roi_heads.mask_head.mask_fcn{i+1}.",
    "roi_head.mask_head.upsample.": "roi_heads.mask_head.deconv.",
    "roi_head.mask_head.conv_logits.": "roi_heads.mask_head.predictor.",
    "roi_head.mask_iou_head.convs.{i}.": "roi_heads.mask_iou_head.convs.conv{i+1}.",
    "roi_head.mask_iou_head.fcs.{i}.": "roi_heads.mask_iou_head.fcs.fc{i+1}.",
    "roi_head.mask_iou_head.fc_mask_iou.": "roi_heads.mask_iou_head.predictor.",
}

# The paper's release
MASKRCNN_BENCHMARK = {
    "backbone.body.stem.conv1.": "backbone.bottom_up.stem.conv1.",
    "backbone.body.stem.bn1.": "backbone.bottom_up.stem.conv1.norm.",
    **_nested(_RESNET, "backbone.body.", "backbone.bottom_up."),
    "backbone.fpn.fpn_inner{i}.": "backbone.fpn_lateral{i+1}.",
    "backbone.fpn.fpn_layer{i}.": "backbone.fpn_output{i+1}.",
    "rpn.head.conv.": "proposal_generator.rpn_head.conv.",
    "rpn.head.cls_logits.": "proposal_generator.rpn_head.objectness_logits.",
    "rpn.head.bbox_pred.": "proposal_generator.rpn_head.anchor_deltas.",
    "roi_heads.box.feature_extractor.fc6.": "roi_heads.box_head.fc1.",
    "roi_heads.box.feature_extractor.fc7.": "roi_heads.box_head.fc2.",
    "roi_heads.box.predictor.cls_score.": "roi_heads.box_predictor.cls_score.",
    "roi_heads.box.predictor.bbox_pred.": "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask.feature_extractor.mask_fcn{i}.": "roi_heads.mask_head.mask_fcn{i}.",
    "roi_heads.mask.predictor.conv5_mask.": "roi_heads.mask_head.deconv.",
    "roi_heads.mask.predictor.mask_fcn_logits.": "roi_heads.mask_head.predictor.",
    "roi_heads.maskiou.feature_extractor.maskiou_fcn{i}.": (
        "roi_heads.mask_iou_head.convs.conv{i}."
    ),
    "roi_heads.maskiou.feature_extractor.maskiou_fc{i}.": "roi_heads.mask_iou_head.fcs.fc{i}.",
    "roi_heads.maskiou.predictor.maskiou.": "roi_heads.mask_iou_head.predictor.",
}

# lsrock1/maskscoring_rcnn.detectron2 and youngwanLEE/centermask2; the rest has Detectron2's names
MASKIOU_HEAD = {
    "roi_heads.maskiou_head.maskiou_fcn{i}.": "roi_heads.mask_iou_head.convs.conv{i}.",
    "roi_heads.maskiou_head.maskiou_fc{i}.": "roi_heads.mask_iou_head.fcs.fc{i}.",
    "roi_heads.maskiou_head.maskiou.": "roi_heads.mask_iou_head.predictor.",
}

# maskrcnn_resnet50_fpn; its convolutions became sequences of one in torchvision 0.13
TORCHVISION_DETECTOR = {
    **_nested(_RESNET, "backbone.body.", "backbone.bottom_up."),
    "backbone.fpn.inner_blocks.{i}.0.": "backbone.fpn_lateral{i+2}.",
    "backbone.fpn.inner_blocks.{i}.": "backbone.fpn_lateral{i+2}.",
    "backbone.fpn.layer_blocks.{i}.0.": "backbone.fpn_output{i+2}.",
    "backbone.fpn.layer_blocks.{i}.": "backbone.fpn_output{i+2}.",
    "rpn.head.conv.0.0.": "proposal_generator.rpn_head.conv.",
    "rpn.head.conv.": "proposal_generator.rpn_head.conv.",
    "rpn.head.cls_logits.": "proposal_generator.rpn_head.objectness_logits.",
    "rpn.head.bbox_pred.": "proposal_generator.rpn_head.anchor_deltas.",
    "roi_heads.box_head.fc6.": "roi_heads.box_head.fc1.",
    "roi_heads.box_head.fc7.": "roi_heads.box_head.fc2.",
    "roi_heads.box_predictor.cls_score.": "roi_heads.box_predictor.cls_score.",
    "roi_heads.box_predictor.bbox_pred.": "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask_head.{i}.0.": "roi_heads.mask_head.mask_fcn{i+1}.",
    "roi_heads.mask_head.mask_fcn{i}.": "roi_heads.mask_head.mask_fcn{i}.",
    "roi_heads.mask_predictor.conv5_mask.": "roi_heads.mask_head.deconv.",
    "roi_heads.mask_predictor.mask_fcn_logits.": "roi_heads.mask_head.predictor.",
}

_NUMBER = re.compile(r"\{(\w)(\+\d+)?\}")


def compile_names(names: Mapping[str, str]) -> Callable[[str], str | None]:
    """
    Args:
        names: a table as above.

    Returns:
        function that translates a parameter's name, or returns None if the table lacks it.
    """
    rows = [(_pattern(theirs), ours) for theirs, ours in names.items()]

    def translate(name: str) -> str | None:
        for pattern, ours in rows:
            match = pattern.fullmatch(name)
            if match:
                return _filled(ours, match) + match["leaf"]
        return None

    return translate


def _pattern(theirs: str) -> re.Pattern:
    escaped = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(theirs))
    return re.compile(escaped + r"(?P<leaf>\w+)")  # such as "weight"


def _filled(ours: str, match: re.Match) -> str:
    return _NUMBER.sub(lambda m: str(int(match[m[1]]) + int(m[2] or 0)), ours)
