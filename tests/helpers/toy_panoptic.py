"""A tiny Panoptic FPN, and a panoptic data set on disk."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.data.datasets import register_coco_panoptic_separated
from detectron2.modeling import PanopticFPN
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.structures import BitMasks

from tests.helpers.toy import (
    CHANNELS,
    IMAGE_SIZE,
    OBJECTS,
    tiny_mask_rcnn,
    tiny_yacs_config,
    write_coco_json,
)

STUFF = {10: "sky", 11: "sea"}  # the upper and the lower half; 0 in semantic segmentation: objects
NUM_IMAGES = 4
METADATA = {
    "thing_classes": ["a", "b", "c"],
    "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1, 3: 2},
    "stuff_classes": ["things", *STUFF.values()],
    "stuff_dataset_id_to_contiguous_id": {0: 0, 10: 1, 11: 2},
}
CATEGORIES = [
    *({"id": k, "name": name, "isthing": 1} for k, name in enumerate("abc", start=1)),
    *({"id": k, "name": name, "isthing": 0} for k, name in STUFF.items()),
]


def tiny_panoptic_fpn():
    """The LazyConfig of Detectron2's Panoptic FPN with few channels."""
    cfg = tiny_mask_rcnn()
    sem_seg_head = model_zoo.get_config("common/models/panoptic_fpn.py").model.sem_seg_head
    sem_seg_head.update(num_classes=len(STUFF) + 1, conv_dims=CHANNELS, norm="")
    cfg.model._target_ = PanopticFPN
    cfg.model.sem_seg_head = L(SemSegFPNHead)(
        **{k: v for k, v in sem_seg_head.items() if k != "_target_"}
    )
    cfg.model.combine_stuff_area_thresh = 16
    cfg.model.combine_instances_score_thresh = 0.2
    return cfg


def tiny_panoptic_yacs() -> CfgNode:
    """The same as a yacs config, with mask scoring."""
    cfg = tiny_yacs_config()
    cfg.MODEL.META_ARCHITECTURE = "MaskScoringPanopticFPN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.SEM_SEG_HEAD.update(NUM_CLASSES=len(STUFF) + 1, CONVS_DIM=CHANNELS, NORM="")
    cfg.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = 16
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.2
    return cfg


def write_panoptic_dataset(folder: Path, name: str = "toy") -> str:
    """
    Write `NUM_IMAGES` images, the last of them without objects, and register them.

    Returns:
        the name under which Detectron2 knows them, "toy_separated".
    """
    height, width = IMAGE_SIZE
    objects = [*(OBJECTS * NUM_IMAGES)[: NUM_IMAGES - 1], []]
    parts = {x: folder / x for x in ("images", "panoptic", "stuff")}
    for part in parts.values():
        part.mkdir(parents=True)
    annotations = []
    for image, objects_per_image in enumerate(objects, start=1):
        pixels = np.full((height, width, 3), 40, dtype=np.uint8)
        pixels[height // 2 :] = 90
        labels = np.repeat([1, 2], height // 2)[:, None].repeat(width, axis=1)
        ids = labels + 9  # any numbers that no object has
        category_of = {10: 10, 11: 11}
        for k, (class_, polygon) in enumerate(objects_per_image, start=1):
            masks = BitMasks.from_polygon_masks([[np.array(polygon, dtype=float)]], *IMAGE_SIZE)
            mask = masks.tensor[0].numpy()
            pixels[mask, class_] = 220
            labels[mask], ids[mask], category_of[k] = 0, k, class_ + 1
        Image.fromarray(pixels).save(parts["images"] / f"{image}.jpg")
        Image.fromarray(labels.astype(np.uint8)).save(parts["stuff"] / f"{image}.png")
        colors = np.stack([ids, 0 * ids, 0 * ids], axis=-1).astype(np.uint8)
        Image.fromarray(colors).save(parts["panoptic"] / f"{image}.png")
        infos = [
            {"id": int(k), "category_id": category_of[k], "area": int(area), "iscrowd": 0}
            for k, area in zip(*np.unique(ids, return_counts=True))
        ]
        annotations.append({"image_id": image, "file_name": f"{image}.png", "segments_info": infos})
    instances = json.loads(Path(write_coco_json(folder / "instances.json", objects)).read_text())
    for x in instances["images"]:
        x["file_name"] = f"{x['id']}.jpg"
    (folder / "instances.json").write_text(json.dumps(instances))
    panoptic = {
        "images": instances["images"],
        "annotations": annotations,
        "categories": CATEGORIES,
    }
    (folder / "panoptic.json").write_text(json.dumps(panoptic))
    register_coco_panoptic_separated(
        name,
        METADATA,
        image_root=str(parts["images"]),
        panoptic_root=str(parts["panoptic"]),
        panoptic_json=str(folder / "panoptic.json"),
        sem_seg_root=str(parts["stuff"]),
        instances_json=str(folder / "instances.json"),
    )
    return f"{name}_separated"
