"""
How other frameworks name the parameters of a Mask (Scoring) R-CNN, and what else differs in their
weights: one table of names and one :class:`Source` for each.

A name in a table is the beginning of parameters' names. A letter in braces stands for a number;
the right side may count it differently, as in "res{i+1}".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

__all__ = ["COCO_IDS", "DERIVED", "NUM_COCO_IDS", "SOURCES", "Pixels", "Source"]


def _nested(names: Mapping[str, str], theirs: str, ours: str) -> dict[str, str]:
    """The table of a module's names, for where the module is a part of a larger one."""
    return {theirs + old: ours + new for old, new in names.items()}


# ResNet and ResNeXt: the names that all but Detectron2 and Caffe2 use
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

# lsrock1/maskscoring_rcnn.detectron2 and youngwanLEE/centermask2; all else is Detectron2's
MASKIOU_HEAD = {
    "roi_heads.maskiou_head.maskiou_fcn{i}.": "roi_heads.mask_iou_head.convs.conv{i}.",
    "roi_heads.maskiou_head.maskiou_fc{i}.": "roi_heads.mask_iou_head.fcs.fc{i}.",
    "roi_heads.maskiou_head.maskiou.": "roi_heads.mask_iou_head.predictor.",
}

# PointRend of Detectron2 before April 2021, and before November 2020
OLDER_POINT_REND = {
    "roi_heads.mask_head.coarse_head.coarse_mask_fc{i}.": "roi_heads.mask_head.coarse_head.fc{i}.",
    "roi_heads.mask_coarse_head.coarse_mask_fc{i}.": "roi_heads.mask_head.coarse_head.fc{i}.",
    **{
        f"roi_heads.mask_coarse_head.{name}.": f"roi_heads.mask_head.coarse_head.{name}."
        for name in ("reduce_channel_dim_conv", "reduce_spatial_dim_conv", "prediction")
    },
    "roi_heads.mask_point_head.fc{i}.": "roi_heads.mask_head.point_head.fc{i}.",
    "roi_heads.mask_point_head.predictor.": "roi_heads.mask_head.point_head.predictor.",
}

# maskrcnn_resnet50_fpn. Since torchvision 0.13 each convolution is in a sequence of its own
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

# A number on the right side of a table
NUMBER = re.compile(r"\{(\w)(\+\d+)?\}")

# Mean and standard deviation of each channel, in the order of the model's input
Pixels = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Source:
    """
    Attributes:
        name: who named the parameters.
        marks: regular expression that matches parameter names of this source, and none of those
            further down in `SOURCES`.
        table: as above.
        dropped: regular expression for names that have no counterpart in a detector.
        background_first: whether the background is class 0; in Detectron2 it is the last class.
        coco_ids: whether a model of 91 classes numbers them as COCO does, with gaps.
        eps_of_frozen_bn: whether batch norm adds a small number to the variance, as in
            Detectron2.
        pixels: how images were normalised in training, if that is known.
        note: what users of such a file should know.
    """

    name: str
    marks: str
    table: Mapping[str, str]
    dropped: str = r"$^"
    background_first: bool = False
    coco_ids: bool = False
    eps_of_frozen_bn: bool = True
    pixels: Pixels | None = None
    note: str = ""

    def renamed(self, name: str) -> str:
        """A parameter's name in Detectron2; the same name if the table lacks it."""
        for pattern, ours in self._rows:
            found = pattern.fullmatch(name)
            if found:
                for number in NUMBER.finditer(ours):
                    value = int(found[number[1]]) + int(number[2] or 0)
                    ours = ours.replace(number[0], str(value))
                return ours + found["leaf"]
        return name

    @cached_property
    def _rows(self) -> list[tuple[re.Pattern, str]]:
        rows = []
        for theirs, ours in self.table.items():
            numbered = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(theirs))
            rows.append((re.compile(numbered + r"(?P<leaf>\w+)"), ours))  # leaf: such as "weight"
        return rows


# COCO numbers its categories from 1 to 90 with gaps, which torchvision's own detectors keep
COCO_IDS = [c["id"] for c in COCO_CATEGORIES if c["isthing"]]
NUM_COCO_IDS = 91

# Older versions of Detectron2 saved these; they follow from the config
DERIVED = re.compile(r"(.*\.)?anchor_generator\.cell_anchors\.\d+|pixel_(mean|std)")

IMAGENET_RGB = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])

SOURCES = [
    Source(
        "Detectron2's names, with a maskiou_head",
        marks=r"roi_heads\.maskiou_head\.",
        table=MASKIOU_HEAD,
        dropped=rf"({DERIVED.pattern})$",
    ),
    Source(
        "Detectron2, an older PointRend",
        marks=r"roi_heads\.(mask_coarse_head\.|mask_head\.coarse_head\.coarse_mask_fc)",
        table=OLDER_POINT_REND,
        dropped=rf"({DERIVED.pattern})$",
    ),
    Source(
        "the paper's maskrcnn-benchmark",
        marks=r"roi_heads\.(box|mask|maskiou)\.(feature_extractor|predictor)\.",
        table=MASKRCNN_BENCHMARK,
        dropped=r"rpn\.anchor_generator\.cell_anchors\.",
        background_first=True,
        eps_of_frozen_bn=False,
        pixels=([102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0]),
        note=(
            "It was trained with boxes of inclusive pixel coordinates and an unaligned RoIAlign: "
            "results differ slightly from those of the original code."
        ),
    ),
    Source(
        "torchvision's detectors",
        marks=r"backbone\.(body|fpn\.inner_blocks)\.|roi_heads\.mask_predictor\.",
        table=TORCHVISION_DETECTOR,
        background_first=True,
        coco_ids=True,
        eps_of_frozen_bn=False,  # in the published weights, so in what was fine-tuned from them
        pixels=IMAGENET_RGB,
        note=(
            "It was trained with RGB images, strides in the 3x3 convolutions and an unaligned "
            "RoIAlign: the config has to say the first two, and results differ slightly from those "
            "of torchvision. If it has 91 classes, the 80 that COCO really has are taken."
        ),
    ),
    Source(
        "MMDetection",
        marks=r"(neck|rpn_head|roi_head)\.|backbone\.(conv1|layer1)\.",
        table=MMDETECTION,
        # A classifier's, and those of MMCV's EMA: it saves the averages as the weights themselves
        dropped=r"head\.fc\.|ema_\w+$",
    ),
    Source(
        "torchvision",
        marks=r"fc\.weight$",
        table=TORCHVISION_RESNET,
        dropped=r"fc\.",
        pixels=IMAGENET_RGB,
    ),
    # Other programs use these names as well; MMDetection also does for weights from Caffe
    Source(
        "torchvision's names",
        marks=r"layer1\.0\.conv1\.",
        table=TORCHVISION_RESNET,
    ),
]
