"""Mask scores for a trained model of mask_rcnn_nuclei.py."""

from detectron2.config import LazyConfig

from msrcnn_d2 import retrofit

_cfg = LazyConfig.load_rel("../nuclei/mask_rcnn_nuclei.py")
_cfg = retrofit(_cfg, num_conv=4, conv_dim=32, num_fc=1, fc_dim=256)  # as wide as the model
model, dataloader, train = _cfg.model, _cfg.dataloader, _cfg.train
optimizer, lr_multiplier = _cfg.optimizer, _cfg.lr_multiplier
