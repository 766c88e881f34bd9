"""
Federated annotations (LVIS, Gupta, Dollar and Girshick, CVPR 2019, Section 3) in COCO's terms.

LVIS does not say of every category whether it occurs in an image. In each image, categories are

- positive, with objects that are annotated;
- negative, without any ("neg_category_ids");
- unknown, which is all others: their detections do not count;
- some of the positive ones not exhaustively annotated ("not_exhaustive_category_ids"): their
  detections count if they match an object, and are no mistakes otherwise.
"""

import contextlib
import copy
import io
from collections.abc import Sequence

from pycocotools.coco import COCO

__all__ = ["in_terms_of_coco", "is_federated"]


def is_federated(coco_gt: COCO) -> bool:
    """Whether the images of a data set say which categories were looked for in them."""
    return any("neg_category_ids" in image for image in coco_gt.imgs.values())


def in_terms_of_coco(coco_gt: COCO, results: Sequence[dict]) -> tuple[COCO, list[dict]]:
    """
    Give COCO's rules the answers of LVIS's. Detections of unknown categories are left out. Where a
    category is not exhaustively annotated, a crowd of it covers the image: what matches no object
    matches the crowd, and so is no mistake.

    Args:
        coco_gt: federated ground truth. It is not modified.
        results: detections in COCO's result format.

    Returns:
        the ground truth with crowds, and the detections that count.
    """
    known = {(a["image_id"], a["category_id"]) for a in coco_gt.dataset["annotations"]}
    annotations = list(coco_gt.dataset["annotations"])
    next_id = max((a["id"] for a in annotations), default=0) + 1
    images = []
    for image in coco_gt.dataset["images"]:
        known.update((image["id"], k) for k in image.get("neg_category_ids", ()))
        height, width = image["height"], image["width"]
        for category in image.get("not_exhaustive_category_ids", ()):
            crowd = {
                "id": next_id,
                "image_id": image["id"],
                "category_id": category,
                "iscrowd": 1,
                "bbox": [0, 0, width, height],
                "area": height * width,
                "segmentation": {"size": [height, width], "counts": [0, height * width]},
            }
            annotations.append(crowd)
            next_id += 1
        images.append(image)
        if "file_name" not in image and "coco_url" in image:  # LVIS v1 has only the latter
            images[-1] = {**image, "file_name": "/".join(image["coco_url"].split("/")[-2:])}
    in_coco = copy.copy(coco_gt)
    in_coco.dataset = {**coco_gt.dataset, "images": images, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        in_coco.createIndex()
    return in_coco, [r for r in results if (r["image_id"], r["category_id"]) in known]
