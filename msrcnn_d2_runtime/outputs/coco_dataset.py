"""Predictions as a COCO dataset, which annotation tools import and training reads."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

from ..scores import MASK_IOU_PROBS
from .coco_results import JsonList
from .polygons import polygons_of
from .records import SCORE_KEYS

__all__ = ["SEGMENTATIONS", "write_coco_dataset"]

SEGMENTATIONS = ("polygons", "rle")


def write_coco_dataset(
    file: IO[bytes],
    records: Callable[[], Iterable[dict[str, Any]]],
    *,
    image_ids: Mapping[str, int],
    categories: Mapping[int, str],
    segmentation: str,
) -> None:
    """
    Args:
        file: gets "images", "categories", and "annotations": objects, each with its scores, which
            are in its "attributes", too, since some tools keep only these. Objects without a pixel
            are left out. Boxes are those of the masks.
        records: iterates over the records of images, from :func:`record_of`.
        image_ids: name of an image -> its id.
        categories: id of a class -> its name.
        segmentation: "polygons", or "rle" for compressed RLE.
    """
    import pycocotools.mask as mask_util

    def dumped(value: Any) -> bytes:
        text = json.dumps(value, ensure_ascii=False)
        return text.encode("utf-8", "backslashreplace")

    classes = [{"id": k, "name": name, "supercategory": ""} for k, name in categories.items()]
    file.write(b'{"info": {"description": "Predictions of msrcnn_d2"},\n"licenses": [],\n')
    file.write(b'"categories": ' + dumped(classes) + b',\n"images": ')
    images = JsonList(file)
    for record in records():
        name = record["image"]
        sides = {"height": record["height"], "width": record["width"]}
        images.append({"id": image_ids[name], "file_name": name, **sides})
    images.end()

    file.write(b',\n"annotations": ')
    annotations, annotation_id = JsonList(file), 0
    for record in records():
        for entry in record["predictions"]:
            if not entry["area"]:
                continue
            annotation_id += 1
            rle = entry["segmentation"]
            scores = {key: entry[key] for key in SCORE_KEYS if key in entry}
            probs = {key: entry[key] for key in [MASK_IOU_PROBS] if key in entry}
            annotations.append(
                {
                    "id": annotation_id,
                    "image_id": image_ids[record["image"]],
                    "category_id": entry["category_id"],
                    "iscrowd": 0,
                    "area": entry["area"],
                    "bbox": mask_util.toBbox(rle).tolist(),
                    **scores,
                    **probs,
                    "attributes": scores,
                    "segmentation": polygons_of(rle) if segmentation == "polygons" else rle,
                }
            )
    annotations.end()
    file.write(b"}\n")
