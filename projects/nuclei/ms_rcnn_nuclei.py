"""The Mask R-CNN of mask_rcnn_nuclei.py, with mask scoring."""

from omegaconf import OmegaConf

from msrcnn_d2 import add_mask_scoring

from .mask_rcnn_nuclei import dataloader, lr_multiplier, model, optimizer, train

_cfg = OmegaConf.create({"model": model, "dataloader": dataloader}, flags={"allow_objects": True})
_cfg = add_mask_scoring(_cfg, num_conv=4, conv_dim=32, num_fc=1, fc_dim=256)  # as wide as the model
model, dataloader = _cfg.model, _cfg.dataloader
