"""
A small Mask R-CNN for microscopy images of nuclei, 256 to 360 pixels wide: the one of shapes with
one class, smaller anchors from stride 4 on, and more of everything per image.

It knows its datasets as nuclei_train and nuclei_val; `train_net.py --dataset` registers them.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from ..shapes.mask_rcnn_shapes import dataloader, lr_multiplier, model, optimizer, train

MAX_NUCLEI = 200  # per image; the fullest image of the training set has 131

model.proposal_generator.in_features = ["p2", "p3", "p4"]
# Half of all nuclei are less than 16 pixels wide
model.proposal_generator.anchor_generator.sizes = [[8, 14], [22, 34], [50, 75]]
model.proposal_generator.anchor_generator.strides = [4, 8, 16]
model.proposal_generator.pre_nms_topk = (500, 500)
model.proposal_generator.post_nms_topk = (400, 400)
model.roi_heads.num_classes = 1
model.roi_heads.batch_size_per_image = 64
model.roi_heads.box_predictor.test_topk_per_image = MAX_NUCLEI

dataloader.train.dataset.names = "nuclei_train"
dataloader.test.dataset.names = "nuclei_val"
dataloader.train.mapper.augmentations = [
    L(T.RandomCrop)(crop_type="absolute", crop_size=(256, 256)),
    L(T.RandomFlip)(horizontal=True),
    L(T.RandomFlip)(horizontal=False, vertical=True),  # under a microscope there is no upright
]
dataloader.train.total_batch_size = 4
dataloader.evaluator.max_dets_per_image = MAX_NUCLEI

train.update(output_dir="output/nuclei", max_iter=1200, checkpointer=dict(period=5000))
