from .ms_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

train.max_iter = 180000
# Milestones are relative to the length of the run; the warm-up is still 1000 iterations
lr_multiplier.warmup_length = 1000 / 180000
