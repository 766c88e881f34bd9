"""Objects and detections whose masks fill their boxes, so that IoUs can be worked out by hand."""

import contextlib
import io

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from msrcnn_d2.evaluation import measure_mask_quality

HEIGHT, WIDTH = 120, 160


def build_coco(dataset):
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def dataset_of(
    annotations, image_ids=(1, 2), categories=((1, "a"), (2, "b")), size=(HEIGHT, WIDTH)
):
    return {
        "images": [
            {"id": k, "file_name": f"{k}.png", "height": size[0], "width": size[1]}
            for k in image_ids
        ],
        "annotations": [{"id": k, **a} for k, a in enumerate(annotations, start=1)],
        "categories": [{"id": k, "name": name} for k, name in categories],
    }


def filled(box):
    x, y, width, height = box
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def rle(mask):
    encoded = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def thing(box, image_id=1, category_id=1, iscrowd=0, area=None):
    """An object that fills its box (x, y, width, height)."""
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "area": box[2] * box[3] if area is None else area,
        "iscrowd": iscrowd,
        "segmentation": rle(filled(box)),
    }


def found(box, score, iou=None, image_id=1, category_id=1):
    """A detection whose mask fills its box, by a model that predicts its IoU unless it is None."""
    result = {
        "image_id": image_id,
        "category_id": category_id,
        "score": score,
        "segmentation": rle(filled(box)),
    }
    return result if iou is None else scored(result, iou)


def scored(result, iou):
    return {**result, "pred_mask_iou": iou, "mask_score": result["score"] * iou}


def calibrated(result, probs):
    """With the ten probabilities of a calibrator."""
    return {**result, "mask_iou_probs": list(probs), "quality_score": sum(probs) / 10}


def measure(annotations, results, engine=None, max_dets=100, img_ids=None, **kwargs):
    coco_gt = build_coco(dataset_of(annotations, **kwargs))
    return measure_mask_quality(coco_gt, results, engine, max_dets, img_ids)
