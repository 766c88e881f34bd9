"""What the tests share: two images with two objects each, tiny models, and a data set on disk."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from msrcnn_d2 import add_mask_scoring, add_msrcnn_config

IMAGE_SIZE = (64, 96)  # height, width
NUM_CLASSES = 3
CHANNELS = 8

# For each image its objects: class and polygon
OBJECTS = [
    [(0, [8, 8, 40, 8, 40, 40, 8, 40]), (1, [50, 10, 90, 10, 90, 50])],
    [(2, [10, 20, 70, 20, 70, 60, 10, 60]), (0, [72, 4, 92, 4, 92, 24, 72, 24])],
]


def toy_instances(mask_format: str = "polygon") -> list[Instances]:
    """Ground truth of the two images; the two forms, "polygon" and "bitmask", agree."""
    return [_instances(objects, mask_format) for objects in OBJECTS]


def _instances(objects, mask_format):
    masks = PolygonMasks([[np.array(polygon, dtype=float)] for _, polygon in objects])
    instances = Instances(IMAGE_SIZE)
    instances.gt_boxes = masks.get_bounding_boxes()
    instances.gt_classes = torch.tensor([c for c, _ in objects])
    if mask_format == "bitmask":
        masks = BitMasks.from_polygon_masks(masks, *IMAGE_SIZE)
    instances.gt_masks = masks
    return instances


def without_objects() -> Instances:
    """Ground truth of an image without objects, which in Detectron2 has no "gt_masks"."""
    return Instances(
        IMAGE_SIZE, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long()
    )


def toy_proposals() -> list[Instances]:
    """For each of the two images, proposals around its objects, and two in the background."""
    shifts = torch.tensor([[0, 0, 0, 0], [3, 0, 2, -3], [-2, 4, 3, 1], [-5, -3, 4, 3]])
    background = torch.tensor([[0.0, 50, 12, 64], [42, 52, 50, 64]])
    proposals = []
    for truth in toy_instances():
        boxes = Boxes(torch.cat([*(truth.gt_boxes.tensor + s for s in shifts), background]))
        boxes.clip(IMAGE_SIZE)
        proposals.append(
            Instances(IMAGE_SIZE, proposal_boxes=boxes, objectness_logits=torch.ones(len(boxes)))
        )
    return proposals


def without_proposals() -> Instances:
    return toy_proposals()[0][:0]


def toy_features() -> dict[str, torch.Tensor]:
    """Random features of the two images."""
    height, width = IMAGE_SIZE
    return {f"p{k}": torch.randn(2, CHANNELS, height // 2**k, width // 2**k) for k in (2, 3, 4, 5)}


def toy_inputs(mask_format: str = "polygon") -> list[dict]:
    """Inputs of a whole model: the two images, random, and their objects."""
    height, width = IMAGE_SIZE
    return [
        {
            "image": 255 * torch.rand(3, height, width),
            "height": height,
            "width": width,
            "instances": x,
        }
        for x in toy_instances(mask_format)
    ]


def _stages(count):
    """Stages of a ResNet, with one block each; each doubles the channels."""
    return [
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            in_channels=CHANNELS * 2**k,
            out_channels=CHANNELS * 2 ** (k + 1),
            stride=2 if k else 1,
        )
        for k in range(count)
    ]


def tiny_mask_rcnn(cascade: bool = False):
    """The LazyConfig of a Mask R-CNN that has Detectron2's structure, but few channels."""
    name = "cascade_rcnn" if cascade else "mask_rcnn_fpn"
    cfg = model_zoo.get_config(f"common/models/{name}.py")
    model = cfg.model
    model.pixel_std = [60.0, 60.0, 60.0]
    model.backbone.bottom_up.stem = L(BasicStem)(in_channels=3, out_channels=CHANNELS)
    model.backbone.bottom_up.stages = _stages(4)
    model.backbone.out_channels = CHANNELS
    model.proposal_generator.head.in_channels = CHANNELS
    model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
    model.proposal_generator.post_nms_topk = (50, 20)

    heads = model.roi_heads
    heads.num_classes = NUM_CLASSES
    heads.batch_size_per_image = 16
    box_heads = heads.box_heads if cascade else [heads.box_head]
    box_predictors = heads.box_predictors if cascade else [heads.box_predictor]
    for box_head in box_heads:
        box_head.input_shape = ShapeSpec(channels=CHANNELS, height=7, width=7)
        box_head.fc_dims = [16]
    for box_predictor in box_predictors:
        box_predictor.input_shape = ShapeSpec(channels=16)
        box_predictor.test_score_thresh = 0.0
    heads.mask_head.input_shape = ShapeSpec(channels=CHANNELS, height=14, width=14)
    heads.mask_head.conv_dims = [CHANNELS, CHANNELS]
    return cfg


def tiny_c4_mask_rcnn():
    """The LazyConfig of a C4 model that has Detectron2's structure, but few channels."""
    cfg = model_zoo.get_config("common/models/mask_rcnn_c4.py")
    model = cfg.model
    model.pixel_std = [60.0, 60.0, 60.0]
    model.backbone.stem = L(BasicStem)(in_channels=3, out_channels=CHANNELS)
    model.backbone.stages = _stages(3)
    model.proposal_generator.head.in_channels = 8 * CHANNELS
    model.proposal_generator.anchor_generator.sizes = [[8, 16, 32, 64, 128]]
    model.proposal_generator.post_nms_topk = (50, 20)

    heads = model.roi_heads
    heads.num_classes = NUM_CLASSES
    heads.batch_size_per_image = 16
    heads.res5.in_channels = 8 * CHANNELS
    heads.res5.bottleneck_channels = CHANNELS
    heads.res5.out_channels = 2 * CHANNELS
    heads.box_predictor.test_score_thresh = 0.0
    heads.mask_head.conv_dims = [CHANNELS]
    return cfg


def tiny_mask_scoring_rcnn(cascade: bool = False):
    """The LazyConfig of the mask-scoring twin of :func:`tiny_mask_rcnn`."""
    return add_mask_scoring(tiny_mask_rcnn(cascade), conv_dim=CHANNELS, num_conv=2, fc_dim=16)


def tiny_yacs_config(cascade: bool = False) -> CfgNode:
    """A yacs config of a mask-scoring model with few channels."""
    cfg = get_cfg()
    add_msrcnn_config(cfg)
    name = (
        "Misc/cascade_mask_rcnn_R_50_FPN_1x"
        if cascade
        else ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x")
    )
    cfg.merge_from_file(model_zoo.get_config_file(f"{name}.yaml"))
    cfg.MODEL.ROI_HEADS.NAME = f"{'Cascade' if cascade else ''}MaskScoringROIHeads"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    return _with_few_channels(cfg)


def tiny_c4_yacs_config() -> CfgNode:
    """A yacs config of a mask-scoring model without FPN that has few channels."""
    cfg = get_cfg()
    add_msrcnn_config(cfg)
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
    cfg.merge_from_file(model_zoo.get_config_file(name))
    cfg.MODEL.ROI_HEADS.NAME = "Res5MaskScoringROIHeads"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8, 16, 32, 64, 128]]
    return _with_few_channels(cfg)


def _with_few_channels(cfg):
    cfg.merge_from_list(
        # fmt: off
        [
            "MODEL.DEVICE",
            "cpu",
            "MODEL.WEIGHTS",
            "",
            "MODEL.PIXEL_STD",
            [60.0, 60.0, 60.0],
            "MODEL.RESNETS.STEM_OUT_CHANNELS",
            CHANNELS,
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            CHANNELS,
            "MODEL.RESNETS.WIDTH_PER_GROUP",
            CHANNELS,
            "MODEL.FPN.OUT_CHANNELS",
            CHANNELS,
            "MODEL.RPN.POST_NMS_TOPK_TRAIN",
            50,
            "MODEL.RPN.POST_NMS_TOPK_TEST",
            20,
            "MODEL.ROI_HEADS.NUM_CLASSES",
            NUM_CLASSES,
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
            16,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
            0.0,
            "MODEL.ROI_BOX_HEAD.FC_DIM",
            16,
            "MODEL.ROI_MASK_HEAD.CONV_DIM",
            CHANNELS,
            "MODEL.ROI_MASK_HEAD.NUM_CONV",
            2,
            "MODEL.ROI_MASK_IOU_HEAD.CONV_DIM",
            CHANNELS,
            "MODEL.ROI_MASK_IOU_HEAD.NUM_CONV",
            2,
            "MODEL.ROI_MASK_IOU_HEAD.FC_DIM",
            16,
            "INPUT.MIN_SIZE_TRAIN",
            (64,),
            "INPUT.MIN_SIZE_TEST",
            64,
        ]
        # fmt: on
    )
    return cfg


def write_coco_json(path, objects=OBJECTS, category_ids=(1, 2, 3), image_size=IMAGE_SIZE) -> str:
    """
    Write ground truth in COCO's format: image k has id k + 1 and file name "{k + 1}.png".

    Args:
        path: the file to write.
        objects: for each image a list of (class, polygon), or (class, polygon, is crowd).
        category_ids: the category id of each class; its name is its letter: a, b, c.

    Returns:
        `path` as a string.
    """
    height, width = image_size
    annotations = []
    for image, objects_per_image in enumerate(objects, start=1):
        for class_, polygon, *crowd in objects_per_image:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category_ids[class_],
                    **_shape(polygon, image_size, bool(crowd and crowd[0])),
                }
            )
    images = [
        {"id": k, "file_name": f"{k}.png", "height": height, "width": width}
        for k in range(1, len(objects) + 1)
    ]
    categories = [{"id": k, "name": chr(ord("a") + i)} for i, k in enumerate(category_ids)]
    dataset = {"images": images, "annotations": annotations, "categories": categories}
    Path(path).write_text(json.dumps(dataset))
    return str(path)


def _shape(polygon, image_size, crowd):
    xs, ys = polygon[0::2], polygon[1::2]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    mask = BitMasks.from_polygon_masks([[np.array(polygon, dtype=float)]], *image_size).tensor[0]
    return {
        "bbox": box,
        "area": int(mask.sum()),
        "iscrowd": int(crowd),
        "segmentation": _uncompressed_rle(mask) if crowd else [polygon],
    }


def _uncompressed_rle(mask):
    """Lengths of the runs down the columns, the first one of zeros: how COCO writes crowds."""
    flat = np.concatenate([[0], mask.numpy().T.ravel(), [0]]).astype(int)
    changes = np.flatnonzero(np.diff(flat))
    ends = [*changes.tolist(), flat.size - 2]
    counts = np.diff([0, *ends]).tolist()
    return {"size": list(mask.shape), "counts": counts}


def write_images(folder, objects=OBJECTS, image_size=IMAGE_SIZE) -> None:
    """Draw the images of :func:`write_coco_json`: each object bright on a dark ground."""
    for image, objects_per_image in enumerate(objects, start=1):
        pixels = np.full((*image_size, 3), 40, dtype=np.uint8)
        for class_, polygon, *_ in objects_per_image:
            masks = BitMasks.from_polygon_masks([[np.array(polygon, dtype=float)]], *image_size)
            pixels[masks.tensor[0].numpy(), class_] = 220
        Image.fromarray(pixels).save(Path(folder) / f"{image}.png")


def real_datasets() -> Path | None:
    """The folder of coco/, if there is one."""
    beside = Path(__file__).resolve().parents[3] / "shared/data/datasets"
    for folder in map(Path, filter(None, [os.environ.get("DETECTRON2_DATASETS"), beside])):
        if (folder / "coco/annotations/instances_val2017.json").is_file():
            return folder.resolve()
    return None


def built(cfg):
    """The model of a LazyConfig, always with the same weights."""
    torch.manual_seed(1)
    return instantiate(cfg.model)


def with_distinct_masks(model):
    """The small initial weights give neither distinct boxes nor distinct masks."""
    torch.manual_seed(3)
    for name, parameter in sorted(model.roi_heads.named_parameters()):
        if any(x in name for x in ("predictor", "prediction")) and "mask_iou" not in name:
            parameter.data.copy_(torch.randn_like(parameter))
    return model
