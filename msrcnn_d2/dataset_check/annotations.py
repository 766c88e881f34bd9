"""Check images, categories and annotations of a dataset, apart from masks and boxes."""

import math
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..coco_format import MAX_PIXELS
from ..utils.text import shown
from .findings import Findings, Id
from .images import ImageFile

__all__ = [
    "MISSING",
    "Annotations",
    "Images",
    "check_annotations",
    "check_categories",
    "check_images",
    "id_or_none",
    "indices_of",
    "is_id",
    "sides_of",
    "to_floats",
    "where",
]

# pycocotools keeps ids of annotations as floating-point numbers, which are exact up to here
MAX_ANNOTATION_ID = 2**53
MAX_AREA = 1e5**2  # of COCO's range of all sizes

MISSING = object()  # what an entry has in place of a key that it does not have


@dataclass
class Images:
    """
    The images of a dataset, in the order of the file.

    Attributes:
        entries: of the file; an empty one where it has something else.
        index: of each id the first image that has it.
        sizes: (N, 2), height and width in pixels, NaN where they are missing.
    """

    entries: list[dict]
    index: dict[Id, int]
    sizes: np.ndarray

    def where(self, k: int) -> dict:
        """What a finding says about an image; nothing for -1."""
        if k < 0:
            return {}
        name = self.entries[k].get("file_name")
        return dict(
            image_id=id_or_none(self.entries[k].get("id")),
            file_name=name if isinstance(name, str) else None,
        )


@dataclass
class Annotations:
    """
    The annotations of a dataset, in the order of the file, without what is no annotation at all.

    Attributes:
        entries: of the file.
        indices: their places in the file.
        images: which image each belongs to; -1 if to none.
        categories: likewise.
        crowds: whether each is a crowd.
    """

    entries: list[dict]
    indices: np.ndarray
    images: np.ndarray
    categories: np.ndarray
    crowds: np.ndarray

    def column(self, key: str) -> list:
        return [entry.get(key, MISSING) for entry in self.entries]


def check_images(entries: list, files: dict[str, ImageFile] | None, findings: Findings) -> Images:
    """
    Args:
        entries: "images" of the file.
        files: what :func:`look_at_images` says about them; None if it was not asked.
    """
    dicts = [entry if isinstance(entry, dict) else {} for entry in entries]
    index, problems = _index_of(entries, "image")
    images = Images(dicts, index, np.array([sides_of(x) or (math.nan,) * 2 for x in dicts]))
    images.sizes = images.sizes.reshape(-1, 2)
    for k, kind, message in problems:
        findings.add(kind, message, index=k, **images.where(k))
    names: set[str] = set()
    for k, entry in enumerate(entries):
        if isinstance(entry, dict):
            for kind, message in _problems_of_image(entry, names, files):
                findings.add(kind, message, index=k, **images.where(k))
    for k, kind, message in _problems_of_orientation(dicts, files or {}):
        findings.add(kind, message, index=k, **images.where(k))
    return images


def _problems_of_orientation(
    entries: list[dict], files: dict[str, ImageFile]
) -> Iterator[tuple[int, str, str]]:
    """
    Annotations are of images either as they are stored or as EXIF turns them. Most images that a
    quarter turn gives another size decide for all, since the file cannot have been made both ways.

    Yields:
        place, kind and message.
    """
    fits_now: list[int] = []
    fits_other: list[int] = []
    unclear: list[int] = []
    all_files: dict[int, ImageFile] = {}
    for k, entry in enumerate(entries):
        name, sides = entry.get("file_name"), sides_of(entry)
        file = files.get(name) if isinstance(name, str) else None
        if file is None or file.orientation == 1 or sides not in (file.size, file.other_size):
            continue
        all_files[k] = file
        if file.size == file.other_size:
            unclear.append(k)
        else:
            (fits_now if sides == file.size else fits_other).append(k)
    decided = bool(fits_other) and len(fits_other) >= len(fits_now)
    for k in fits_other:
        if decided:
            yield k, "image-orientation", _said_of_orientation(all_files[k], sides_of(entries[k]))
        else:
            yield k, "image-size", _said_of_size(all_files[k], sides_of(entries[k]))
    for k in unclear:
        if decided:
            yield k, "image-orientation", f"so are others; {_said_of_orientation(all_files[k])}"
        elif not fits_now:
            yield k, "image-orientation-unclear", f"its orientation is {all_files[k].orientation}"


def _said_of_orientation(file: ImageFile, sides: tuple[int, int] | None = None) -> str:
    read, meant = ("turned", "stored") if file.is_turned else ("stored", "turned")
    sizes = ""
    if sides and file.size:
        has, said = ("{1} x {0}".format(*size) for size in (file.size, sides))
        sizes = f", to {has} pixels (width x height), and the annotations say {said}"
    return (
        f"it is read as {read} by orientation {file.orientation} in EXIF{sizes}: they are of the "
        f"image as {meant}, so set dataloader.images.apply_exif={not file.is_turned} (yaml: "
        f"INPUT.APPLY_EXIF {not file.is_turned})"
    )


def _problems_of_image(
    entry: dict, names: set[str], files: dict[str, ImageFile] | None
) -> Iterator[tuple[str, str]]:
    """
    Kinds and messages.

    Args:
        names: the files of the images before; that of this one is added.
    """
    name, sides = entry.get("file_name"), sides_of(entry)
    if sides is None:
        height, width = (shown(entry.get(key)) for key in ("height", "width"))
        yield "image-sides", f"height {height} and width {width}"
    if not isinstance(name, str) or not name:
        yield "image-file-name", f"the file name is {shown(name)}"
        return
    if name in names:
        yield "image-file-twice", "an image before it has the same file"
    names.add(name)
    if files is None:
        return
    file = files[name]
    if file.kind:
        yield file.kind, file.message
    if sides and file.size and sides not in (file.size, file.other_size):
        yield "image-size", _said_of_size(file, sides)


def _said_of_size(file: ImageFile, sides: tuple[int, int] | None) -> str:
    has, said = ("{1} x {0}".format(*size or ("?", "?")) for size in (file.size, sides))
    return f"it has {has} pixels (width x height), the annotations say {said}"


def sides_of(entry: dict) -> tuple[int, int] | None:
    """Height and width in pixels; None unless they are whole numbers that an image can have."""
    height, width = entry.get("height"), entry.get("width")
    if type(height) is not int or type(width) is not int:
        return None  # a float is not enough: pycocotools takes integers
    if height < 1 or width < 1 or height * width >= MAX_PIXELS:
        return None
    return height, width


def check_categories(entries: list, findings: Findings) -> dict[Id, int]:
    """
    Args:
        entries: "categories" of the file.

    Returns:
        the place of each id.
    """
    index, problems = _index_of(entries, "category")
    for k, kind, message in problems:
        findings.add(kind, f"entry {k + 1} of the categories: {message}", index=k)
    names = set()
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict):
            continue
        name = entry.get("name")
        place = f"category {shown(entry.get('id'))}"
        if not isinstance(name, str):
            findings.add("category-name", f"{place}: the name is {shown(name)}", index=k)
        elif name in names:
            message = f"{place}: a category before it is called '{name}' as well"
            findings.add("category-name-twice", message, index=k)
        else:
            names.add(name)
    first_gap = next((k for k in range(1, len(index) + 1) if k not in index), None)
    if first_gap:
        message = f"the category ids are not 1 to {len(index)}: {first_gap} is not among them"
        findings.add("category-ids", message)
    return index


def _index_of(entries: list, noun: str) -> tuple[dict[Id, int], list[tuple[int, str, str]]]:
    """
    Returns:
        the first entry of each id, and of those with another id or none: index, kind, message.
    """
    index: dict[Id, int] = {}
    problems = []
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.append((k, f"{noun}-entry", f"it is {shown(entry)}"))
            continue
        id_: Any = entry.get("id")
        if not is_id(id_):
            problems.append((k, f"{noun}-id", f"the id is {shown(id_)}"))
        elif id_ in index:
            problems.append((k, f"{noun}-id-twice", f"entry {index[id_] + 1} has the id as well"))
        else:
            index[id_] = k
    texts = {id_: k for id_, k in index.items() if isinstance(id_, str)}
    if len(texts) < len(index):
        for id_, k in texts.items():
            problems.append((k, f"{noun}-id-mixed", f"the id {shown(id_)} is text, others are not"))
    return index, problems


def is_id(value: Any) -> bool:
    """Whether an entry can have it: text, or a finite number."""
    if isinstance(value, str):
        return True
    is_number = isinstance(value, (int, float)) and type(value) is not bool
    return is_number and abs(value) <= sys.float_info.max  # `math.isfinite` fails at a long integer


def id_or_none(value: Any) -> Id | None:
    """For findings, which have to be plain data."""
    return value if is_id(value) else None


def check_annotations(
    entries: list, images: Images, categories: dict[Id, int], findings: Findings
) -> Annotations:
    """
    Args:
        entries: "annotations" of the file.
        categories: the place of each category id.
    """
    indices = [k for k, entry in enumerate(entries) if isinstance(entry, dict)]
    if len(indices) < len(entries):
        for k in sorted(set(range(len(entries))) - set(indices)):
            message = f"entry {k + 1} of the annotations is {shown(entries[k])}"
            findings.add("annotation-entry", message, index=k)
    dicts = [entries[k] for k in indices]
    annotations = Annotations(
        dicts,
        np.array(indices, dtype=int),
        _places([x.get("image_id") for x in dicts], images.index),
        _places([x.get("category_id") for x in dicts], categories),
        np.array([_is_crowd(x) for x in dicts], dtype=bool),
    )

    def report(k: int, kind: str, message: str) -> None:
        findings.add(kind, message, **where(k, annotations, images))

    _check_references(annotations, report)
    _check_ids(annotations, report)
    _check_crowds(annotations, report)
    _check_areas(annotations, report)
    _check_keypoints(annotations, report)
    return annotations


Report = Callable[[int, str, str], None]


def where(k: int, annotations: Annotations, images: Images) -> dict:
    """What a finding says about the place of an annotation."""
    entry = annotations.entries[k]
    place = images.where(annotations.images[k])
    place.setdefault("image_id", id_or_none(entry.get("image_id")))
    return dict(place, annotation_id=id_or_none(entry.get("id")), index=int(annotations.indices[k]))


def _places(ids: list, index: dict[Id, int]) -> np.ndarray:
    """The place of each id, -1 for one that is not known."""
    try:
        places = [index.get(id_, -1) for id_ in ids]
    except TypeError:  # of a list or a dict in place of an id
        places = [index.get(id_, -1) if _is_hashable(id_) else -1 for id_ in ids]
    return np.array(places, dtype=int)


def _is_hashable(value: Any) -> bool:
    return not isinstance(value, (list, dict))


def _is_crowd(entry: dict) -> bool:
    """As Detectron2 decides it."""
    return entry.get("iscrowd", 0) != 0


def _check_references(annotations: Annotations, report: Report) -> None:
    for k in indices_of(annotations.images < 0):
        image_id = annotations.entries[k].get("image_id", MISSING)
        if image_id is MISSING or not _is_hashable(image_id):
            report(k, "image-reference", f"the image_id is {_said(image_id)}")
        else:
            report(k, "unknown-image", f"there is no image {shown(image_id)}")
    for k in indices_of(annotations.categories < 0):
        category_id = annotations.entries[k].get("category_id", MISSING)
        report(k, "unknown-category", f"the category_id is {_said(category_id)}")


def _said(value: Any) -> str:
    return "missing" if value is MISSING else shown(value)


def _check_ids(annotations: Annotations, report: Report) -> None:
    first: dict[Id, int] = {}
    for k, id_ in enumerate(annotations.column("id")):
        is_usual = type(id_) is int and 1 <= id_ <= MAX_ANNOTATION_ID
        if not (is_usual or is_id(id_)):
            report(k, "annotation-id", f"the id is {_said(id_)}")
        elif first.setdefault(id_, k) != k:
            place = annotations.indices[first[id_]] + 1
            report(k, "annotation-id-twice", f"entry {place} of the annotations has the id as well")
        elif not is_usual:
            report(k, "annotation-id-odd", f"the id is {shown(id_)}")


def _check_crowds(annotations: Annotations, report: Report) -> None:
    for k, value in enumerate(annotations.column("iscrowd")):
        if value is MISSING:
            report(k, "iscrowd-missing", "it has no iscrowd")
        elif value != 0 and value != 1:
            report(k, "iscrowd", f"iscrowd is {shown(value)}")
        elif value:
            report(k, "crowd", "it is a crowd")
    for k, entry in enumerate(annotations.entries):
        if entry.get("ignore", 0) != 0:
            report(k, "ignore", f'"ignore" is {shown(entry["ignore"])}')


def _check_areas(annotations: Annotations, report: Report) -> None:
    values = annotations.column("area")
    areas = to_floats(values)
    for k in indices_of(~((areas >= 0) & (areas <= MAX_AREA))):
        report(k, "area", f"the area is {_said(values[k])}")


def _check_keypoints(annotations: Annotations, report: Report) -> None:
    for k, entry in enumerate(annotations.entries):
        keypoints = entry.get("keypoints")
        if keypoints and not (
            isinstance(keypoints, list) and np.isfinite(to_floats(keypoints)).all()
        ):
            report(k, "keypoints", f"the keypoints are {shown(keypoints)}")


def indices_of(chosen: np.ndarray) -> list[int]:
    """Where it is true, as integers of Python."""
    return np.flatnonzero(chosen).tolist()


def to_floats(values: Sequence | Iterable) -> np.ndarray:
    """As numbers; NaN for what is none, such as text."""
    values = values if isinstance(values, list) else list(values)
    try:
        return np.frombuffer(array("d", values))
    except (TypeError, OverflowError):
        return np.array([_float_or_nan(x) for x in values], dtype=float)


def _float_or_nan(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer that is too large
        return math.inf
