"""Check categories and annotations of a dataset, apart from their form, their masks and boxes."""

import math

import numpy as np

from msrcnn_d2_runtime.text import plural, shown

from ..coco_format import Entries, Report, said, to_floats

__all__ = [
    "check_annotations",
    "check_categories",
    "find_copies",
    "rotation_of",
    "turned_rectangle",
    "why_no_objects",
]


def check_categories(entries: Entries, categories: list, report: Report) -> None:
    """
    Check names and numbers of categories, and whether they are used.

    Args:
        categories: of the file.
    """
    names = set()
    for k, category in enumerate(categories):
        if not isinstance(category, dict):
            continue
        name, place = category.get("name"), f"category {said(category, 'id')}"
        if not isinstance(name, str):
            report(
                "categories", k, "category-name", f"{place}: the name is {said(category, 'name')}"
            )
        elif name in names:
            message = f"{place}: a category before it is called '{name}', too"
            report("categories", k, "category-name-twice", message)
        else:
            names.add(name)
    index = entries.category_index
    first_gap = next((k for k in range(1, len(index) + 1) if k not in index), None)
    if first_gap:
        message = f"the category ids are not 1 to {len(index)}: {first_gap} is not among them"
        report("", -1, "category-ids", message)
    used = set(entries.category_of.tolist())
    groups = [x.get("supercategory") for x in categories if isinstance(x, dict)]
    for id_, k in index.items() if entries.annotations else ():
        if k not in used:
            message, category = f"category {shown(id_)}", categories[k]
            is_root = category.get("supercategory") == "none" and category.get("name") in groups
            kind = "category-root" if is_root else "category-unused"
            report("categories", k, kind, f"{message}, {said(category, 'name')}")


def check_annotations(entries: Entries, report: Report) -> None:
    """
    Check crowds, keypoints and "ignore".

    A crowd is a mask of a tool that writes every RLE as a crowd if it has CVAT's and Datumaro's
    "attributes", or if most annotations are such crowds: 1 % of COCO's are.
    """
    crowds = [annotation.get("iscrowd", 0) == 1 for annotation in entries.annotations]
    are_rle = [isinstance(x.get("segmentation"), dict) for x in entries.annotations]
    most = 2 * sum(map(all, zip(crowds, are_rle))) > len(crowds)
    for k, (place, annotation) in enumerate(zip(entries.places.tolist(), entries.annotations)):
        if crowds[k] and are_rle[k] and "attributes" in annotation:
            report("annotations", place, "crowd-mask", "it is RLE, and has attributes of CVAT")
        elif crowds[k] and are_rle[k] and most:
            report("annotations", place, "crowd-mask", "it is RLE, as most annotations are")
        elif crowds[k]:
            report("annotations", place, "crowd", "it is a crowd")
        if annotation.get("ignore", 0) != 0:
            report("annotations", place, "ignore", f'"ignore" is {shown(annotation["ignore"])}')
        keypoints = annotation.get("keypoints")
        if keypoints:
            is_list = isinstance(keypoints, list)
            if not is_list or not np.isfinite(to_floats(keypoints)).all():
                report("annotations", place, "keypoints", f"the keypoints are {shown(keypoints)}")


def why_no_objects(entries: Entries, contents: dict) -> str:
    """Why there is no object that is not a crowd; `contents` are those of the file."""
    if not entries.annotations:
        return "the list of annotations is empty"
    annotations = plural(len(entries.annotations), "annotation")
    if (entries.image_of < 0).all():
        # The first of each, as the ids may be of two kinds
        reference = said(entries.annotations[0], "image_id")
        images = [x for x in contents["images"] if isinstance(x, dict)]
        return (
            f"none of {annotations} is of an image in the file: their image_id is such as "
            f"{reference}, and the ids of images are such as "
            f"{said(images[0], 'id') if images else 'missing'}"
        )
    if (entries.category_of < 0).all():
        return f"none of {annotations} is of a category in the file"
    message = f"none of {annotations} is an object that is not a crowd"
    if not entries.crowds.all():
        return message
    all_rle = all(isinstance(x.get("segmentation"), dict) for x in entries.annotations)
    cause = ", as CVAT and Datumaro write it for every mask that is RLE" if all_rle else ""
    return (
        f"{message}: all have iscrowd 1{cause}; if each is a single object, `msrcnn-d2 check-data` "
        "with --fix OUT.json --crowds-to-objects makes it one"
    )


def rotation_of(annotation: dict) -> float:
    """By how many degrees CVAT has turned a rectangle, clockwise about its centre; mostly 0."""
    attributes = annotation.get("attributes")
    rotation = attributes.get("rotation") if isinstance(attributes, dict) else 0
    if not isinstance(rotation, (int, float)) or not abs(rotation) <= 360:
        return 0
    return rotation % 360


def turned_rectangle(annotation: dict) -> list[float] | None:
    """
    The outline of a rectangle that CVAT has turned.

    Args:
        annotation: one with a box of four numbers.

    Returns:
        the polygon [x, y, x, y, ...] in pixels; None if the mask is not that of the unturned box,
        or nothing was turned.
    """
    rotation, mask = rotation_of(annotation), annotation.get("segmentation")
    left, top, width, height = annotation["bbox"]
    corners = {(x, y) for x in (left, left + width) for y in (top, top + height)}
    if not rotation or not isinstance(mask, list) or len(mask) != 1 or len(mask[0]) not in (8, 10):
        return None
    points = np.array(mask[0]).reshape(-1, 2)
    if {min(corners, key=lambda c: math.dist(c, p)) for p in points.tolist()} != corners:
        return None
    distances = [min(math.dist(c, p) for c in corners) for p in points.tolist()]
    if max(distances) > 0.5:
        return None
    angle, centre = math.radians(rotation), np.array([left + width / 2, top + height / 2])
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return ((points - centre) @ turn + centre).round(2).ravel().tolist()


def find_copies(entries: Entries, extents: np.ndarray, report: Report) -> None:
    """
    Find annotations that repeat another one. Only those of a known image and with a mask that has
    nothing wrong are compared.

    Args:
        extents: (A, 4), left, top, right and bottom of masks, NaN for those with something wrong.
    """
    keys = [entries.image_of, extents[:, 0], extents[:, 1]]
    order = np.lexsort(keys)
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for key in keys:
        same &= key[order[1:]] == key[order[:-1]]
    # All that have these keys in common with another one, in the order of the file
    alike = np.unique(np.concatenate([order[:-1][same], order[1:][same]]))
    first: dict[str, int] = {}
    for k in alike[entries.image_of[alike] >= 0].tolist():
        annotation = entries.annotations[k]
        owner = int(entries.image_of[k]), int(entries.category_of[k]), bool(entries.crowds[k])
        earlier = first.setdefault(repr((owner, annotation["segmentation"])), k)
        if earlier != k:
            message = f"it repeats annotation {said(entries.annotations[earlier], 'id')}"
            report("annotations", int(entries.places[k]), "annotation-copy", message)
