"""Mask R-CNN R-50-FPN with mask scoring; 12 epochs, as in MMDetection's 1x."""

from fvcore.common.param_scheduler import MultiStepParamScheduler

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler

from msrcnn_d2 import add_mask_scoring

_cfg = add_mask_scoring(model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"))
model, dataloader, optimizer, train = _cfg.model, _cfg.dataloader, _cfg.optimizer, _cfg.train

train.max_iter = 90000
# The published models drop at 2/3 and 11/12 of the run, Detectron2's at 2/3 and 8/9
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[60000, 82500, 90000]),
    warmup_length=1000 / 90000,
    warmup_method="linear",
    warmup_factor=0.001,
)
