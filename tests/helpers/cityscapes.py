"""Draws data in the folders and formats of Cityscapes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

IDS = {"road": 7, "person": 24, "rider": 25, "car": 26, "bicycle": 33}
SIZE = (64, 96)  # height, width
VOID = 1  # "ego vehicle"


def write_cityscapes(root, images, split="val") -> None:
    """
    Args:
        root: the folder that gets leftImg8bit/ and gtFine/.
        images: for each image its objects (label, box as x, y, width, height), the later ones in
            front. The label may be a class, a group such as "cargroup", or "void".
    """
    for k, objects in enumerate(images):
        city = ("aachen", "bochum")[k % 2]
        base = f"{city}_{k:06}_000019"
        instance_ids = np.full(SIZE, IDS["road"], dtype=np.uint16)
        pixels = np.full((*SIZE, 3), 40, dtype=np.uint8)
        polygons = [{"label": "road", "polygon": _corners(0, 0, SIZE[1], SIZE[0])}]
        for number, (label, box) in enumerate(objects):
            x, y, w, h = box
            inside = slice(y, y + h), slice(x, x + w)
            id_ = VOID if label == "void" else IDS[label.removesuffix("group")]
            is_object = label in IDS
            instance_ids[inside] = 1000 * id_ + number if is_object else id_
            pixels[inside] = (220, 7 * id_ % 256, 60)
            name = "ego vehicle" if label == "void" else label
            polygons.append({"label": name, "polygon": _corners(x, y, w, h)})
        label_ids = np.where(instance_ids < 1000, instance_ids, instance_ids // 1000)
        folders = [Path(root) / kind / split / city for kind in ("leftImg8bit", "gtFine")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folders[0] / f"{base}_leftImg8bit.png")
        truth = folders[1] / f"{base}_gtFine"
        Image.fromarray(instance_ids).save(f"{truth}_instanceIds.png")
        Image.fromarray(label_ids.astype(np.uint8)).save(f"{truth}_labelIds.png")
        Image.fromarray(pixels).save(f"{truth}_color.png")
        contents = {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": polygons}
        Path(f"{truth}_polygons.json").write_text(json.dumps(contents))


def _corners(x, y, w, h):
    return [[x, y], [x + w - 1, y], [x + w - 1, y + h - 1], [x, y + h - 1]]
