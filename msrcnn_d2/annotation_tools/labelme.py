"""Read what LabelMe 3 to 6 writes: a JSON file beside each image."""

import base64
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from msrcnn_d2_runtime.text import shown

from ..coco_format import read_json
from .shapes import Part, Size, ellipse, flat, rectangle, rle_in_place
from .source import AnnotatedImage, Source, files_in, open_image

__all__ = ["read_labelme"]

# LabelMe's own names for what is no object
NO_OBJECT = ("__ignore__", "_background_")


def read_labelme(source: Source) -> Iterator[AnnotatedImage]:
    """The images of a file of LabelMe, or of all below a folder."""
    for path in files_in(source, "*.json"):
        source.reading = path
        contents = read_json(str(path), "give the folder that LabelMe has saved to")
        if not isinstance(contents, dict) or "shapes" not in contents:
            source.skip(path, "it is no file of LabelMe")
            continue
        image = contents["imagePath"].replace("\\", "/")  # of Windows
        base = Path(image).name
        subfolder = path.parent.relative_to(source.folder)  # images may lie in the same one
        name = source.name_of(
            *(path.parent / image, source.root / subfolder / base),
            *(source.root / base, path.parent / base),
        )
        size = contents.get("imageHeight") or 0, contents.get("imageWidth") or 0
        if not all(size):
            size = source.sizes([name]).get(name, (0, 0))
        if not all(size):
            continue
        groups: dict[tuple, list[Part]] = {}
        for k, shape in enumerate(contents["shapes"], start=1):
            label, kind = shape["label"], shape.get("shape_type") or "polygon"
            part = None if label in NO_OBJECT else _part_of(kind, shape, size)
            if part is None:
                reason = "" if label in NO_OBJECT else ", which has no area"
                source.skip(path, f"shape {k} is a {kind} {shown(label)}{reason}")
                continue
            group = shape.get("group_id")  # None, or the same number for the parts of an object
            groups.setdefault((label, group, k if group is None else 0), []).append(part)
        yield AnnotatedImage(name, size, [(key[0], parts) for key, parts in groups.items()])


def _part_of(kind: str, shape: dict, size: Size) -> Part | None:
    points = shape["points"]
    if kind == "mask":
        with open_image(base64.b64decode(shape["mask"])) as image:
            mask = np.asarray(image).astype(bool)
        return rle_in_place(mask, int(points[0][0]), int(points[0][1]), size)
    if kind == "circle":
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return ellipse(x, y, radius, radius)
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        return rectangle(min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0))
    if kind in ("polygon", "rectangle", "oriented_rectangle") and len(points) >= 3:
        return flat(points)
    return None
