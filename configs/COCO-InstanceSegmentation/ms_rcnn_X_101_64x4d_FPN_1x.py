from .ms_rcnn_X_101_32x4d_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

for stage in model.backbone.bottom_up.stages:
    stage.num_groups = 64
    stage.bottleneck_channels = stage.out_channels
train.init_checkpoint = (
    "https://download.openmmlab.com/pretrain/third_party/resnext101_64x4d-ee2c6f71.pth"
)
