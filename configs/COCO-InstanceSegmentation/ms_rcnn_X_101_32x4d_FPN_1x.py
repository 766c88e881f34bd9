"""ResNeXt-101 32x4d with torchvision's conventions: RGB input, stride in the 3x3 convolution."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet

from .ms_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=num_blocks,
        stride_per_block=[first_stride] + [1] * (num_blocks - 1),
        in_channels=in_channels,
        out_channels=out_channels,
        bottleneck_channels=out_channels // 2,  # 32 groups of 4 channels in res2
        num_groups=32,
        stride_in_1x1=False,
        norm="FrozenBN",
    )
    for num_blocks, first_stride, in_channels, out_channels in [
        (3, 1, 64, 256),
        (4, 2, 256, 512),
        (23, 2, 512, 1024),
        (3, 2, 1024, 2048),
    ]
]
model.input_format = dataloader.train.mapper.image_format = "RGB"
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]
train.init_checkpoint = (
    "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth"
)
