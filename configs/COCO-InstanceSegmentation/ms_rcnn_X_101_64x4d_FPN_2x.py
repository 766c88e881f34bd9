from .ms_rcnn_R_50_FPN_2x import lr_multiplier
from .ms_rcnn_X_101_64x4d_FPN_1x import dataloader, model, optimizer, train

train.max_iter = 180000
