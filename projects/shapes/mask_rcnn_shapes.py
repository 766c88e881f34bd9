"""
A Mask R-CNN that a CPU trains in minutes: the usual ResNet-FPN model, narrow and shallow,
with the usual parts at the usual strides, for images of about 128 x 128 pixels.

README.md says what each choice brought. All of it would train on real images too.
"""

import torch
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import OmegaConf

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params

# The names that draw.py gives to its classes, for predictions without the data
MetadataCatalog.get("shapes_val").thing_classes = ["star", "moon", "heart", "ring"]
CHANNELS = 32  # of the FPN and of all that looks at it


def residual_stage(num_blocks: int, stride: int, in_channels: int, out_channels: int):
    return L(ResNet.make_stage)(
        block_class=BasicBlock,
        num_blocks=num_blocks,
        stride_per_block=[stride] + [1] * (num_blocks - 1),
        in_channels=in_channels,
        out_channels=out_channels,
        norm="BN",
    )


def roi_pooler(output_size: int):
    return L(ROIPooler)(
        output_size=output_size,
        scales=[1 / 4, 1 / 8],
        # The backward pass of RoIAlign runs on one core and costs as much as its samples
        sampling_ratio=1,
        pooler_type="ROIAlignV2",
        canonical_box_size=128,  # boxes below 64 pixels are pooled at stride 4, others at 8
        canonical_level=4,
    )


model = L(GeneralizedRCNN)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=24, norm="BN"),
            stages=[
                residual_stage(1, 1, 24, 32),
                residual_stage(2, 2, 32, 64),
                residual_stage(2, 2, 64, 128),
            ],
            out_features=["res2", "res3", "res4"],
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=CHANNELS,
        norm="BN",
    ),
    proposal_generator=L(RPN)(
        in_features=["p3", "p4"],
        head=L(StandardRPNHead)(in_channels=CHANNELS, num_anchors=6),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[20, 36], [56, 80]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[8, 16],
            offset=0.5,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=128,
        positive_fraction=0.5,
        pre_nms_topk=(200, 200),
        post_nms_topk=(100, 100),
        nms_thresh=0.7,
    ),
    roi_heads=L(StandardROIHeads)(
        num_classes=4,
        batch_size_per_image=32,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=["p2", "p3"],
        box_pooler=roi_pooler(7),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=CHANNELS, height=7, width=7),
            conv_dims=[],
            fc_dims=[256, 256],
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=256),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes="${..num_classes}",
        ),
        mask_in_features=["p2", "p3"],
        mask_pooler=roi_pooler(14),
        mask_head=L(MaskRCNNConvUpsampleHead)(
            input_shape=ShapeSpec(channels=CHANNELS, height=14, width=14),
            num_classes="${..num_classes}",
            conv_dims=[CHANNELS] * 3,
        ),
    ),
    pixel_mean=[128.0, 128.0, 128.0],
    pixel_std=[64.0, 64.0, 64.0],
    input_format="RGB",
)

dataloader = OmegaConf.create()
dataloader.train = L(build_detection_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names="shapes_train"),
    mapper=L(DatasetMapper)(
        is_train=True,
        augmentations=[L(T.RandomFlip)(horizontal=True)],
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",  # visible parts can have holes, which polygons cannot
    ),
    total_batch_size=8,
    aspect_ratio_grouping=False,  # all are square
    num_workers=1,
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="shapes_val", filter_empty=False),
    mapper=L(DatasetMapper)(
        is_train=False, augmentations=[], image_format="${...train.mapper.image_format}"
    ),
    num_workers=1,
)
dataloader.evaluator = L(COCOEvaluator)(dataset_name="${..test.dataset.names}")

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
    lr=1e-3,
    weight_decay=0.05,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_length=0.05,  # share of the run
    warmup_method="linear",
    warmup_factor=0.01,
)
train = dict(
    output_dir="output/shapes/training",
    init_checkpoint="",  # from scratch
    max_iter=1000,
    seed=0,
    device="cpu",
    amp=dict(enabled=False),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False),
    checkpointer=dict(period=5000, max_to_keep=1),  # and at the end
    eval_period=0,  # only at the end
    log_period=50,
)
