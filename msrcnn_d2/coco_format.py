"""
Read files in COCO's format: annotations and predictions.

The rules for what such a file may contain are stated here once. :func:`check_entries` and
:func:`check_masks` report each entry that breaks one, which is how a dataset is checked;
:func:`read_annotations` and :func:`read_results` raise an error at the first one.
"""

import codecs
import contextlib
import gc
import io
import json
import math
import os
import re
import sys
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from msrcnn_d2_runtime.iou_thresholds import IOU_THRESHOLDS
from msrcnn_d2_runtime.mask_encoding import run_lengths
from msrcnn_d2_runtime.text import plural, shown

from .utils.errors import UserError

__all__ = [
    "Entries",
    "Id",
    "Polygons",
    "check_entries",
    "check_fits",
    "check_masks",
    "compressed",
    "has_byte_order_mark",
    "indices_of",
    "is_id",
    "is_of_pairs",
    "read_annotations",
    "read_json",
    "read_results",
    "said",
    "sides_of",
    "to_floats",
]

Id = int | float | str
# Called with the list that the entry is in, its place there from 0 on, the kind of the problem, a
# message, and `part=` for the place of a polygon in its mask
Report = Callable[..., None]

RESULTS_ADVICE = (
    "give predictions with masks, such as inference/coco_instances_results.json, which "
    "`msrcnn-d2 evaluate` writes"
)
ANNOTATIONS_ADVICE = "give annotations in COCO's format with masks, as for training"
# Problems that do not keep pycocotools from evaluating predictions
TOLERATED = {
    "image-id-twice",
    "category-id-twice",
    "annotation-id-twice",
    "annotation-id-odd",
    "unknown-image",
    "unknown-category",
    "iscrowd-missing",
}

# pycocotools walks along a polygon pixel by pixel, which takes hours for one that is far away
MAX_COORDINATE = 1e6
MAX_PIXELS = 2**32  # of an image; pycocotools counts with 32 bits
MAX_AREA = 1e5**2  # the end of COCO's range of all sizes
# pycocotools keeps ids of annotations as floating-point numbers, which are exact up to here
MAX_ANNOTATION_ID = 2**53
# A character has six bits. One of them says that the number continues, so the last character must
# not have it: pycocotools would read beyond the text. Seven characters hold any count of 32 bits.
COMPRESSED_COUNTS = re.compile("([P-o]{0,6}[0-O])+")
# What East Asian systems wrote before UTF-8, and Python's names for it
OLD_ENCODINGS = {"GBK": "gbk", "Big5": "big5", "Shift JIS": "cp932", "EUC-KR": "cp949"}
CHUNK = 20_000  # masks that are read at once; their coordinates take about 10 MB


def read_results(path: str) -> list[dict]:
    """
    Read predictions.

    Args:
        path: a JSON file in COCO's result format, as the evaluators write it.

    Returns:
        At least one detection, each with "image_id", "category_id", a finite "score" and a
        "segmentation", which is compressed RLE, or polygons as in the file. All have a finite
        "pred_mask_iou", "mask_score", "quality_score" or "expected_iou" or none has. The last two
        are in [0, 1], and so are the ten numbers of "mask_iou_probs". Other keys stay.

    Raises:
        UserError: the file cannot be read, or an entry breaks a rule.
    """
    results = read_json(path, RESULTS_ADVICE)
    if not isinstance(results, list) or not all(isinstance(r, dict) for r in results):
        raise UserError(f"'{path}' is not a list of predictions: {RESULTS_ADVICE}.")
    if not results:
        raise UserError(
            f"'{path}' has no predictions: check that the model is the trained one, and lower its "
            "threshold on the class score."
        )

    def refuse(_: str, k: int, kind: str, message: str, **part: Any) -> None:
        if kind == "mask-missing" and results[k].get("segmentation") == []:
            return  # no polygons: an empty mask
        raise UserError(f"Prediction {k + 1} in '{path}': {message} ({kind}); {RESULTS_ADVICE}.")

    num_probs = len(IOU_THRESHOLDS)
    scores = ("pred_mask_iou", "mask_score", "quality_score", "expected_iou")
    for k, result in enumerate(results):
        for key in ("image_id", "category_id"):
            if not is_id(result.get(key)):
                refuse("", k, key, f"the {key} is {said(result, key)}")
        for key in ("score", *(key for key in scores if key in result)):
            if not _is_finite(result.get(key)):
                refuse("", k, key, f"the {key} is {said(result, key)}, not a finite number")
        for key in ("quality_score", "expected_iou"):
            if not _is_probability(result.get(key, 0)):
                refuse("", k, key, f"{said(result, key)} is not from 0 to 1")
        probs = result.get("mask_iou_probs", [0] * num_probs)
        if not (isinstance(probs, list) and len(probs) == num_probs):
            found = plural(len(probs), "number") if isinstance(probs, list) else shown(probs)
            refuse("", k, "mask_iou_probs", f"{found} in place of a list of {num_probs}")
        if not all(map(_is_probability, probs)):
            refuse("", k, "mask_iou_probs", f"{shown(probs)} has values that are not from 0 to 1")
    for key in (*scores, "mask_iou_probs"):
        count = sum(key in r for r in results)
        if 0 < count < len(results):
            raise UserError(
                f"{count:,} of {plural(len(results), 'prediction')} in '{path}' have a '{key}': "
                "give the predictions of one model."
            )
    for _ in check_masks([r.get("segmentation") for r in results], None, refuse):
        pass
    return [
        {**r, "segmentation": compressed(r["segmentation"])}
        if isinstance(r["segmentation"], dict)
        else r
        for r in results
    ]


def read_annotations(path: str) -> COCO:
    """
    Read ground truth for an evaluation.

    Args:
        path: a JSON file in COCO's annotation format.

    Returns:
        At least one object with a mask. An object without "iscrowd" is not a crowd.

    Raises:
        UserError: the file cannot be read, or an entry breaks a rule.
    """
    contents = read_json(path, ANNOTATIONS_ADVICE)
    for key in ("annotations", "images", "categories"):
        entries = contents.get(key) if isinstance(contents, dict) else None
        if not isinstance(entries, list) or not entries:
            raise UserError(f"'{path}' has no list of {key}, or it is empty: {ANNOTATIONS_ADVICE}.")

    def refuse(of: str, k: int, kind: str, message: str, **part: Any) -> None:
        if kind not in TOLERATED:
            raise UserError(
                f"Entry {k + 1} of the {of} in '{path}': {message} ({kind}); {ANNOTATIONS_ADVICE}."
            )

    entries = check_entries(contents, refuse)
    masks = [annotation.get("segmentation") for annotation in entries.annotations]
    for _ in check_masks(masks, entries.sizes[entries.image_of], refuse):
        pass
    for annotation in entries.annotations:
        annotation.setdefault("iscrowd", 0)
    coco = COCO()
    coco.dataset = contents
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def check_fits(results: Sequence[dict], coco_gt: COCO) -> list[dict]:
    """
    Check that predictions are of the images and classes of the ground truth.

    Args:
        results: from :func:`read_results`.
        coco_gt: from :func:`read_annotations`.

    Returns:
        The results, with all masks as compressed RLE.

    Raises:
        UserError: the ground truth lacks an image or a class, or an image has another size.
    """
    advice = "give the annotations of the images that were predicted on"
    known: tuple[tuple[str, str, Collection], ...] = (
        ("image", "image_id", coco_gt.imgs),
        ("category", "category_id", coco_gt.cats),
    )
    for noun, key, ids in known:
        unknown = sorted({r[key] for r in results} - set(ids), key=str)
        if unknown:
            raise UserError(
                f"The predictions have {plural(len(unknown), f'{noun} id')} that the annotations "
                f"do not have, such as {shown(unknown[0])}: {advice}."
            )
    fitting = []
    for result in results:
        image, mask = coco_gt.imgs[result["image_id"]], result["segmentation"]
        size = [image["height"], image["width"]]
        if isinstance(mask, list):
            empty = {"size": size, "counts": [math.prod(size)]}  # all pixels are outside
            rles = mask_util.frPyObjects(mask, *size) if mask else [compressed(empty)]
            mask = _as_text(mask_util.merge(rles))
        elif mask["size"] != size:
            raise UserError(
                f"A mask of image {shown(result['image_id'])} has {mask['size'][0]} x "
                f"{mask['size'][1]} pixels (height x width), but the annotations say {size[0]} x "
                f"{size[1]}: {advice}."
            )
        fitting.append({**result, "segmentation": mask})
    return fitting


def read_json(path: str, advice: str) -> Any:
    """
    Read a JSON file in UTF-8, with a byte order mark or without.

    Args:
        advice: what to give instead, for the error's message.

    Raises:
        UserError: the file cannot be read, is not JSON, or is in another encoding, which the
            message names.
    """
    if os.path.isdir(path):
        raise UserError(f"'{path}' is a folder: {advice}.")
    is_collecting = gc.isenabled()
    gc.disable()  # it would spend three quarters of the time on lists of numbers
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist: {advice}.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): check the path.") from error
    except (ValueError, RecursionError):  # of JSON and of UTF-8
        encoding = _other_encoding(path)
        if encoding:
            raise UserError(f"'{path}' is {encoding} text, not UTF-8: save it as UTF-8.") from None
        raise UserError(f"'{path}' is not JSON, or it is cut off: {advice}.") from None
    finally:
        if is_collecting:
            gc.enable()


def has_byte_order_mark(path: str) -> bool:
    """Whether a file starts with UTF-8's byte order mark, which `json.load` refuses."""
    with open(path, "rb") as f:
        return f.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def _other_encoding(path: str) -> str:
    """The encodings other than UTF-8 in which the file is valid JSON, or an empty text."""

    def is_json_in(codec: str) -> bool:
        try:
            json.loads(data.decode(codec))
        except (ValueError, RecursionError):
            return False
        return True

    with open(path, "rb") as f:
        data = f.read()
    detected = json.detect_encoding(data)  # UTF-8, or what the first bytes show, such as UTF-16
    if detected.startswith(("utf-16", "utf-32")):
        start = data[:400].decode(detected, "ignore").lstrip("\ufeff \t\r\n")
        return detected[:6].upper() if start.startswith(("{", "[")) else ""
    try:
        data.decode()
        return ""
    except UnicodeDecodeError:
        pass
    fitting = [name for name, codec in OLD_ENCODINGS.items() if is_json_in(codec)]
    # Any bytes are Windows-1252, so it is named only if nothing else fits, or if no word is long
    # enough to tell
    is_short = max(map(len, re.findall(rb"[\x80-\xff]+", data))) < 3
    if (is_short or not fitting) and is_json_in("cp1252"):
        fitting.append("Windows-1252")
    return " or ".join(fitting)


@dataclass
class Entries:
    """
    The entries of a file of annotations: N images and A annotations.

    Attributes:
        images: (N), the entries of the file, with {} in place of what is not a JSON object.
        image_index: the place of the first image with each id.
        sizes: (N + 1, 2), height and width in pixels, NaN where they are not known. The last row
            is NaN, for annotations of no image.
        category_index: the place of the first category with each id.
        annotations: (A), the entries of the file that are JSON objects.
        places: (A), their places in the file.
        image_of: (A), the place of the image of each; -1 if it is not in the file.
        category_of: (A), the same for categories.
        crowds: (A), whether Detectron2 takes each for a crowd.
    """

    images: list[dict]
    image_index: dict[Id, int]
    sizes: np.ndarray
    category_index: dict[Id, int]
    annotations: list[dict]
    places: np.ndarray
    image_of: np.ndarray
    category_of: np.ndarray
    crowds: np.ndarray


def check_entries(contents: dict, report: Report) -> Entries:
    """
    Check ids, references, sizes, areas and crowds.

    Args:
        contents: contents of a file, with lists of "images", "categories" and "annotations".
        report: called for each problem.
    """
    image_index = _index_ids(contents, "images", "image", report)
    images = [entry if isinstance(entry, dict) else {} for entry in contents["images"]]
    sides = [sides_of(entry) for entry in images]
    for k, entry in enumerate(contents["images"]):
        if sides[k] is None and isinstance(entry, dict):
            message = f"the height is {said(entry, 'height')}, the width {said(entry, 'width')}"
            report("images", k, "image-sides", message)
    category_index = _index_ids(contents, "categories", "category", report)

    places, annotations = [], []
    for k, entry in enumerate(contents["annotations"]):
        if isinstance(entry, dict):
            places.append(k)
            annotations.append(entry)
        else:
            report("annotations", k, "annotation-entry", f"the entry is {shown(entry)}")
    unknown = (math.nan, math.nan)
    entries = Entries(
        images,
        image_index,
        np.array([*(pair or unknown for pair in sides), unknown]),
        category_index,
        annotations,
        np.array(places, dtype=int),
        _places_of([entry.get("image_id") for entry in annotations], image_index),
        _places_of([entry.get("category_id") for entry in annotations], category_index),
        np.array([entry.get("iscrowd", 0) != 0 for entry in annotations], dtype=bool),
    )
    _check_annotations(entries, lambda k, *what: report("annotations", places[k], *what))
    return entries


def _index_ids(contents: dict, of: str, noun: str, report: Report) -> dict[Id, int]:
    """The place of the first entry with each id."""
    index: dict[Id, int] = {}
    for k, entry in enumerate(contents[of]):
        if not isinstance(entry, dict):
            report(of, k, f"{noun}-entry", f"the entry is {shown(entry)}")
        elif not is_id(entry.get("id")):
            report(of, k, f"{noun}-id", f"the id is {said(entry, 'id')}")
        elif index.setdefault(entry["id"], k) != k:
            first = index[entry["id"]] + 1
            report(of, k, f"{noun}-id-twice", f"entry {first} of the {of} has the same id")
    texts = {id_: k for id_, k in index.items() if isinstance(id_, str)}
    if len(texts) < len(index):
        for id_, k in texts.items():
            report(of, k, f"{noun}-id-mixed", f"the id {shown(id_)} is text, others are numbers")
    return index


def _places_of(ids: list, index: dict[Id, int]) -> np.ndarray:
    try:
        places = [index.get(id_, -1) for id_ in ids]
    except TypeError:  # a list or an object in place of an id
        places = [-1 if isinstance(id_, (list, dict)) else index.get(id_, -1) for id_ in ids]
    return np.array(places, dtype=int)


def _check_annotations(entries: Entries, report: Callable[[int, str, str], None]) -> None:
    annotations = entries.annotations
    for noun, places in (("image", entries.image_of), ("category", entries.category_of)):
        for k in indices_of(places < 0):
            key = f"{noun}_id"
            has_id = key in annotations[k] and not isinstance(annotations[k][key], (list, dict))
            kind = f"unknown-{noun}" if has_id else f"{noun}-reference"
            report(k, kind, f"the {key} is {said(annotations[k], key)}")

    first: dict[Id, int] = {}
    for k, annotation in enumerate(annotations):
        id_: Any = annotation.get("id")
        is_usual = type(id_) is int and 1 <= id_ <= MAX_ANNOTATION_ID
        if not (is_usual or is_id(id_)):
            report(k, "annotation-id", f"the id is {said(annotation, 'id')}")
        elif first.setdefault(id_, k) != k:
            place = entries.places[first[id_]] + 1
            report(k, "annotation-id-twice", f"entry {place} of the annotations has the same id")
        elif not is_usual:
            report(k, "annotation-id-odd", f"the id is {shown(id_)}")
        crowd = annotation.get("iscrowd")
        if "iscrowd" not in annotation:
            report(k, "iscrowd-missing", "there is no iscrowd")
        elif crowd != 0 and crowd != 1:
            report(k, "iscrowd", f"iscrowd is {shown(crowd)}")

    areas = to_floats([annotation.get("area") for annotation in annotations])
    for k in indices_of(~((areas >= 0) & (areas <= MAX_AREA))):
        report(k, "area", f"the area is {said(annotations[k], 'area')}")


@dataclass
class Polygons:
    """
    P polygons of some masks.

    Attributes:
        owners: (P), which mask each belongs to.
        parts: (P), the place of each in its mask.
        lengths: (P), how many coordinates each has.
        coordinates: x, y, x, y, ... in pixels, of one polygon after the other.
    """

    owners: np.ndarray
    parts: np.ndarray
    lengths: np.ndarray
    coordinates: np.ndarray

    def without(self, wrong: np.ndarray) -> "Polygons":
        if not wrong.any():
            return self
        return Polygons(
            self.owners[~wrong],
            self.parts[~wrong],
            self.lengths[~wrong],
            self.coordinates[~wrong.repeat(self.lengths)],
        )


def check_masks(masks: list, sizes: np.ndarray | None, report: Report) -> Iterator[Polygons]:
    """
    Check the form of masks.

    Args:
        masks: (M), the values of "segmentation"; None if there is none.
        sizes: (M, 2), height and width of the image of each, NaN where they are not known.
        report: called for each problem, with the list "annotations" and the place in `masks`.

    Yields:
        The polygons that have nothing wrong, of some thousand masks at a time. All masks have been
        checked when the iteration ends.
    """
    outlines = []
    for k, mask in enumerate(masks):
        if not mask:
            report("annotations", k, "mask-missing", "there is no mask")
        elif isinstance(mask, list):
            outlines.append(k)
        elif not isinstance(mask, dict):
            report("annotations", k, "mask-malformed", f"the segmentation is {shown(mask)}")
        elif not is_rle(mask):
            size, counts = said(mask, "size"), said(mask, "counts")
            report("annotations", k, "rle-counts", f"the size is {size}, the counts are {counts}")
        elif sizes is not None and not np.isnan(sizes[k]).any() and mask["size"] != [*sizes[k]]:
            size = sizes[k].astype(int).tolist()
            message = f"the mask has the size {mask['size']}, its image has {size}"
            report("annotations", k, "rle-size", message)
    for first in range(0, len(outlines), CHUNK):
        yield _read_polygons(outlines[first : first + CHUNK], masks, report)


def _read_polygons(owners: list[int], masks: list, report: Report) -> Polygons:
    shapes = [masks[k] for k in owners]
    try:
        coordinates, lengths = _flatten(shapes)
        is_plain = not (lengths == 2).any()  # else there may be points in place of polygons
    except (TypeError, OverflowError):  # something is not a number, or too large for a float
        is_plain = False
    if not is_plain:
        owners, shapes = _plain_polygons(owners, shapes, report)
        coordinates, lengths = _flatten(shapes)
    counts = np.array([len(shape) for shape in shapes], dtype=int)
    parts = np.arange(len(lengths)) - (counts.cumsum() - counts).repeat(counts)
    polygons = Polygons(np.array(owners, dtype=int).repeat(counts), parts, lengths, coordinates)

    def drop(wrong: np.ndarray, kind: str, message: Callable[[int], str]) -> Polygons:
        for p in indices_of(wrong):
            owner, part = int(polygons.owners[p]), int(polygons.parts[p])
            message_ = f"polygon {part + 1} {message(p)}"
            report("annotations", owner, kind, message_, part=part)
        return polygons.without(wrong)

    def points(p: int) -> str:
        if lengths[p] % 2:
            return f"has an odd number of coordinates, {lengths[p]}"
        return f"has {plural(lengths[p] // 2, 'point')}"

    def farthest() -> np.ndarray:
        ends = polygons.lengths.cumsum()
        return np.maximum.reduceat(abs(polygons.coordinates), ends - polygons.lengths)

    polygons = drop((lengths < 6) | (lengths % 2 == 1), "polygon-points", points)
    polygons = drop(
        ~np.isfinite(farthest()), "polygon-numbers", lambda _: "has a value that is not a number"
    )
    far = farthest()
    return drop(far > MAX_COORDINATE, "polygon-far", lambda p: f"has the coordinate {far[p]:.4g}")


def _flatten(masks: list[list]) -> tuple[np.ndarray, np.ndarray]:
    """
    The coordinates of all polygons, one after the other, and how many each polygon has.

    Raises:
        TypeError, OverflowError: a mask is not a list of lists of numbers.
    """
    polygons = list(chain.from_iterable(masks))
    lengths = np.array([len(polygon) for polygon in polygons], dtype=int)
    return np.frombuffer(array("d", chain.from_iterable(polygons))), lengths


def _plain_polygons(
    owners: list[int], masks: list[list], report: Report
) -> tuple[list[int], list[list]]:
    """Report masks that are not lists of polygons; return the others, with NaN for non-numbers."""
    kept, cleaned = [], []
    for k, mask in zip(owners, masks):
        message = f"the segmentation is {shown(mask)}"
        if all(isinstance(x, (int, float)) for x in mask):
            report("annotations", k, "mask-flat", message)
        elif any(map(is_of_pairs, mask)) or (is_of_pairs(mask) and len(mask) >= 3):
            report("annotations", k, "polygon-pairs", message)
        else:
            kept.append(k)
            cleaned.append(
                [to_floats(x).tolist() if isinstance(x, list) else [math.nan] * 6 for x in mask]
            )
    return kept, cleaned


def is_of_pairs(polygon: Any) -> bool:
    """Whether a polygon is a list of points, which are lists of two numbers."""
    return (
        isinstance(polygon, list)
        and bool(polygon)
        and all(isinstance(point, list) and len(point) == 2 for point in polygon)
        and all(isinstance(x, (int, float)) for x in chain.from_iterable(polygon))
    )


def is_rle(mask: dict) -> bool:
    """Whether a mask is COCO's RLE, compressed or not, and its runs fill its size."""

    def are_counts(values: Any) -> bool:
        return isinstance(values, list) and all(isinstance(x, int) and x >= 0 for x in values)

    size: Any = mask.get("size")
    counts: Any = mask.get("counts")
    if not are_counts(size) or len(size) != 2:
        return False
    if isinstance(counts, str) and COMPRESSED_COUNTS.fullmatch(counts):
        counts = run_lengths(counts).tolist()
    # If they do not add up, pycocotools compares masks forever, or reads beyond their memory
    return are_counts(counts) and sum(counts) == math.prod(size)


def compressed(rle: dict) -> dict:
    """The same RLE with its counts as text, as pycocotools and JSON take it."""
    if isinstance(rle["counts"], str):
        return rle
    return _as_text(mask_util.frPyObjects(rle, *rle["size"]))


def _as_text(rle: dict) -> dict:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def sides_of(entry: dict) -> tuple[int, int] | None:
    """Height and width of an image in pixels; None if they are not whole numbers in range."""
    height, width = entry.get("height"), entry.get("width")
    if type(height) is not int or type(width) is not int:  # pycocotools takes no floats
        return None
    return (height, width) if min(height, width) > 0 and height * width < MAX_PIXELS else None


def is_id(value: Any) -> bool:
    """Whether a value can be an id: text, or a finite number."""
    return isinstance(value, str) or (_is_finite(value) and type(value) is not bool)


def _is_finite(value: Any) -> bool:
    # `math.isfinite` fails at an integer that is too large for a float
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _is_probability(value: Any) -> bool:
    return _is_finite(value) and type(value) is not bool and 0 <= value <= 1


def indices_of(chosen: np.ndarray) -> list[int]:
    """The indices where an array is true, as Python's integers."""
    return np.flatnonzero(chosen).tolist()


def to_floats(values: Iterable) -> np.ndarray:
    """The values as floats: NaN for what is not a number, infinity for what is too large."""
    values = values if isinstance(values, list) else list(values)
    try:
        return np.frombuffer(array("d", values))
    except (TypeError, OverflowError):
        return np.array([_float_or_nan(x) for x in values], dtype=float)


def _float_or_nan(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.inf


def said(entry: dict, key: str) -> str:
    """What an entry says about a key, for a message."""
    return shown(entry[key]) if key in entry else "missing"
