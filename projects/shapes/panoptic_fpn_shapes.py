"""
A small Panoptic FPN with mask scoring, for what draw_panoptic.py draws in output/panoptic_shapes.

The datasets are registered here: `--dataset` is for objects without stuff.
"""

from omegaconf import OmegaConf

from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_panoptic_separated
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, SemSegEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import PanopticFPN
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

from msrcnn_d2 import add_mask_scoring

from .mask_rcnn_shapes import CHANNELS, dataloader, lr_multiplier, model, optimizer, train

DATA = "output/panoptic_shapes"
THINGS = {1: "star", 2: "moon", 3: "heart", 4: "ring"}  # by their ids in the annotations
STUFF = {5: "stripes", 6: "clouds", 7: "grain"}
METADATA = {
    "thing_classes": list(THINGS.values()),
    "thing_dataset_id_to_contiguous_id": {id: k for k, id in enumerate(THINGS)},
    # In semantic segmentation, class 0 stands for all objects
    "stuff_classes": ["things", *STUFF.values()],
    "stuff_dataset_id_to_contiguous_id": {0: 0, **{id: k for k, id in enumerate(STUFF, start=1)}},
}
for _split in ("train", "val"):
    if f"shapes_{_split}_separated" not in DatasetCatalog:  # a config may be read twice
        register_coco_panoptic_separated(
            f"shapes_{_split}",
            METADATA,
            image_root=f"{DATA}/{_split}",
            panoptic_root=f"{DATA}/panoptic_{_split}",
            panoptic_json=f"{DATA}/panoptic_{_split}.json",
            sem_seg_root=f"{DATA}/stuff_{_split}",
            instances_json=f"{DATA}/{_split}.json",
        )

model._target_ = PanopticFPN
model.sem_seg_head = L(SemSegFPNHead)(
    input_shape={f"p{k}": L(ShapeSpec)(stride=2**k, channels=CHANNELS) for k in (2, 3, 4)},
    num_classes=len(METADATA["stuff_classes"]),
    conv_dims=CHANNELS,
    common_stride=4,
    loss_weight=0.5,
    norm="GN",
    ignore_value=255,
)
model.combine_stuff_area_thresh = 256  # pixels; 4096 for images of the usual size
dataloader.train.dataset.names = "shapes_train_separated"
dataloader.train.dataset.filter_empty = False
dataloader.test.dataset.names = "shapes_val_separated"
dataloader.evaluator = [
    L(evaluator)(dataset_name="${...test.dataset.names}")
    for evaluator in (COCOEvaluator, SemSegEvaluator, COCOPanopticEvaluator)
]
train["output_dir"] = "output/panoptic_shapes/training"

_cfg = OmegaConf.create({"model": model, "dataloader": dataloader}, flags={"allow_objects": True})
_cfg = add_mask_scoring(_cfg, num_conv=4, conv_dim=32, num_fc=1, fc_dim=256)
model, dataloader = _cfg.model, _cfg.dataloader
