"""Read a project of VGG Image Annotator (VIA) 1 or 2, or its export as JSON."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from msrcnn_d2_runtime.text import listed, shown

from ..coco_format import read_json
from ..utils.errors import UserError
from .shapes import Part, ellipse, flat, rectangle
from .source import AnnotatedImage, Source

__all__ = ["read_via"]

# Attributes of VIA that are taken for the class if there are several
CLASS_ATTRIBUTES = ("class", "label", "name", "type", "category")


def read_via(source: Source) -> Iterator[AnnotatedImage]:
    """The images that are named in a project or an export."""
    contents = read_json(str(source.path), "give a project of VIA, or its export as JSON")
    entries = contents.get("_via_img_metadata", contents) if isinstance(contents, dict) else None
    if not entries or not all(isinstance(x, dict) and "filename" in x for x in entries.values()):
        raise UserError(f"'{source.path}' is no project of VIA 1 or 2, and no export as JSON.")
    regions_of: dict[str, list[dict]] = {}
    bytes_of: dict[str, set] = {}
    for entry in entries.values():
        regions = entry["regions"]  # version 1 has numbers as keys
        file = source.root / entry["filename"].replace("\\", "/")
        name = source.name_of(file, source.root / file.name)
        regions = regions.values() if isinstance(regions, dict) else regions
        regions_of.setdefault(name, []).extend(regions)
        bytes_of.setdefault(name, set()).add(entry.get("size", -1))
        if len(bytes_of[name] - {-1}) > 1:  # VIA knows names without folders
            raise UserError(
                f"'{source.path}' has several files '{name}' of different sizes: give them "
                "different names."
            )
    attribute = source.attribute or _class_attribute(source.path, regions_of.values())
    for name, size in source.sizes(regions_of).items():
        image = AnnotatedImage(name, size)
        for k, region in enumerate(regions_of[name], start=1):
            label, shape = region["region_attributes"].get(attribute), region["shape_attributes"]
            if isinstance(label, dict):  # of boxes to tick: those that are
                label = next((key for key, is_ticked in label.items() if is_ticked), "")
            part = _part_of(shape)
            if part is None or not label:
                kind = shape["name"]
                reason = f"has no {shown(attribute)}" if part else f"is a {kind} without area"
                source.skip(name, f"region {k} {reason}")
            else:
                image.objects.append((str(label).strip(), [part]))
        yield image


def _class_attribute(path: Path, regions: Iterable[list]) -> str:
    names = list(dict.fromkeys(n for x in regions for r in x for n in r["region_attributes"]))
    likely = [n for n in names if n.lower() in CLASS_ATTRIBUTES]
    if not names:
        raise UserError(
            f"The regions in '{path}' have no attributes: add one for the class in VIA."
        )
    if len(likely or names) != 1:
        raise UserError(
            f"The regions in '{path}' have the attributes {listed(names)}: name the one of the "
            "class with --attribute."
        )
    return (likely or names)[0]


def _part_of(shape: dict) -> Part | None:
    kind = shape["name"]
    if kind == "rect":
        return rectangle(shape["x"], shape["y"], shape["width"], shape["height"])
    if kind == "circle":
        return ellipse(shape["cx"], shape["cy"], shape["r"], shape["r"])
    if kind == "ellipse":
        degrees = math.degrees(shape.get("theta", 0))
        return ellipse(shape["cx"], shape["cy"], shape["rx"], shape["ry"], degrees)
    if kind == "polygon" and len(shape["all_points_x"]) >= 3:
        return flat(list(zip(shape["all_points_x"], shape["all_points_y"], strict=True)))
    return None
