"""Read a project in Supervisely's own format: meta.json, and a JSON file for each image."""

import base64
import zlib
from collections.abc import Iterator

import numpy as np

from ..coco_format import read_json
from ..utils.errors import UserError
from .shapes import Part, Size, flat, rectangle, rle_in_place, with_holes
from .source import AnnotatedImage, Source, files_in, open_image

__all__ = ["read_supervisely"]


def read_supervisely(source: Source) -> Iterator[AnnotatedImage]:
    """The images of all datasets of a project, or of the one that is the subset."""
    meta = read_json(
        str(source.path / "meta.json"), "give the folder of a project in Supervisely's format"
    )
    source.class_names = source.class_names or [str(x["title"]) for x in meta["classes"]]
    if source.subset and not (source.path / source.subset / "ann").is_dir():
        raise UserError(f"'{source.path}' has no dataset '{source.subset}'.")
    for path in files_in(source, "ann/*.json", source.subset or ""):
        source.reading = path
        contents = read_json(str(path), "download the project once more")
        size = contents["size"]["height"], contents["size"]["width"]
        name = source.name_of(path.parent.parent / "img" / path.stem)
        image = AnnotatedImage(name, size)
        for k, shape in enumerate(contents["objects"], start=1):
            part = _part_of(shape, size)
            if part is None:
                source.skip(path, f"object {k} is a {shape['geometryType']}")
            else:
                image.objects.append((shape["classTitle"], [part]))
        yield image


def _part_of(shape: dict, size: Size) -> Part | None:
    kind = shape["geometryType"]
    if kind == "bitmap":
        data = base64.b64decode(shape["bitmap"]["data"])
        with open_image(zlib.decompress(data)) as image:
            pixels = np.asarray(image)
        mask = (pixels[:, :, -1] if pixels.ndim == 3 else pixels).astype(bool)
        left, top = shape["bitmap"]["origin"]
        return rle_in_place(mask, int(left), int(top), size)
    outline = shape.get("points", {}).get("exterior", [])
    if kind == "rectangle":
        (x0, y0), (x1, y1) = outline
        return rectangle(min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0))
    if kind == "polygon" and len(outline) >= 3:
        return with_holes(
            flat(outline), [flat(x) for x in shape["points"].get("interior", [])], size
        )
    return None
