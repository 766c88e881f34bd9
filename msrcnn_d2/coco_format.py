"""Read files of predictions and of annotations in COCO's format, and say what is wrong in them."""

import codecs
import contextlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from .utils.errors import UserError
from .utils.text import shown

__all__ = ["check_fits", "read_annotations", "read_results"]

RESULTS_ADVICE = (
    "give predictions with masks, such as inference/coco_instances_results.json, which "
    "`msrcnn-d2 evaluate` writes"
)
ANNOTATIONS_ADVICE = "give a file of COCO's format with masks, as for training"

# Six bits a character, of which one says that the number goes on, so none ends with it:
# pycocotools would read on in memory that is not its own. Seven hold any count of 32 bits.
COMPRESSED_COUNTS = re.compile("([P-o]{0,6}[0-O])+")
# pycocotools walks along a polygon pixel by pixel, in vain or for hours where one is farther away
# than any image is wide
MAX_COORDINATE = 1e6
MAX_PIXELS = 2**32  # of an image; pycocotools counts with 32 bits
# What East Asian systems wrote before UTF-8, and Python's names for them
OLD_ENCODINGS = {"GBK": "gbk", "Big5": "big5", "Shift JIS": "cp932", "EUC-KR": "cp949"}


def read_results(path: str) -> list[dict]:
    """
    Args:
        path: of a JSON file in COCO's result format, as the evaluators write it.

    Returns:
        at least one detection, each with "image_id", "category_id", a finite "score" and
        "segmentation": compressed RLE, or still polygons, see :func:`check_fits`. What else the
        detections have is left as it is.

    Raises:
        UserError: the file cannot be read, or it is something else.
    """
    results = read_json(path, RESULTS_ADVICE)
    if not isinstance(results, list) or not all(isinstance(r, dict) for r in results):
        raise UserError(f"'{path}' is not a list of predictions: {RESULTS_ADVICE}.")
    if not results:
        raise UserError(
            f"'{path}' has no predictions at all: see whether the model is the trained one, and "
            "lower its threshold on the class score."
        )
    for number, result in enumerate(results, start=1):
        problem = _problem_of_result(result)
        if problem:
            raise UserError(f"Prediction {number} in '{path}' {problem}: {RESULTS_ADVICE}.")
    for key in ("pred_mask_iou", "mask_score"):
        count = sum(key in r for r in results)
        if 0 < count < len(results):
            raise UserError(
                f"Of {len(results)} predictions in '{path}' {count} have a '{key}': give those of "
                "one model."
            )
    return [_compressed(r) for r in results]


def read_annotations(path: str) -> COCO:
    """
    Args:
        path: of a JSON file in COCO's annotation format.

    Returns:
        the ground truth, at least one object with a mask; without an "iscrowd" it is no crowd.

    Raises:
        UserError: the file cannot be read, or it is something else.
    """
    data = read_json(path, ANNOTATIONS_ADVICE)
    if not isinstance(data, dict) or not isinstance(data.get("annotations"), list):
        raise UserError(f"'{path}' has no annotations of objects: {ANNOTATIONS_ADVICE}.")
    kinds = {
        "images": ("id", "height", "width"),
        "categories": ("id",),
        "annotations": ("id", "image_id", "category_id", "area", "segmentation"),
    }
    for kind, keys in kinds.items():
        if not data.get(kind):
            raise UserError(f"'{path}' has no {kind}: {ANNOTATIONS_ADVICE}.")
        _check_entries(path, kind, data[kind], keys)
        _check_values(path, kind, data[kind])
    sizes = {image["id"]: [image["height"], image["width"]] for image in data["images"]}
    for annotation in data["annotations"]:
        annotation["iscrowd"] = annotation.get("iscrowd") or 0
        size = sizes.get(annotation["image_id"])
        mask = annotation["segmentation"]
        if isinstance(mask, dict) and size is not None and list(mask.get("size", [])) != size:
            raise UserError(
                f"The mask of annotation {shown(annotation['id'])} in '{path}' has the size "
                f"{mask.get('size')}, but its image has {size}: {ANNOTATIONS_ADVICE}."
            )
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def check_fits(results: Sequence[dict], coco_gt: COCO) -> list[dict]:
    """
    Args:
        results: from :func:`read_results`.
        coco_gt: from :func:`read_annotations`.

    Returns:
        the results, with polygons as compressed RLE: what AP can be computed of.

    Raises:
        UserError: the ground truth does not have all images and classes, or has an image in
            another size.
    """
    _check_known("images", {r["image_id"] for r in results}, coco_gt.imgs)
    _check_known("classes", {r["category_id"] for r in results}, coco_gt.cats)
    return [_sized(r, coco_gt.imgs[r["image_id"]]) for r in results]


def read_json(path: str, advice: str) -> Any:
    """
    The contents of a JSON file in UTF-8, with a byte order mark or without.

    Args:
        advice: what to give instead, for the message if it is something else.

    Raises:
        UserError: the file cannot be read, is not JSON, or is in another encoding, which it names.
    """
    if os.path.isdir(path):
        raise UserError(f"'{path}' is a folder: {advice}.")
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


def has_byte_order_mark(path: str) -> bool:
    """Whether a file starts with UTF-8's mark, at which other programs fail."""
    with open(path, "rb") as f:
        return f.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def _other_encoding(path: str) -> str:
    """In which encodings other than UTF-8 the file is JSON; empty if in none that is known."""
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
    fitting = [name for name, codec in OLD_ENCODINGS.items() if _is_json_in(data, codec)]
    # All that is left is what has any byte, so it is named where nothing else fits
    # or where no word is long enough to tell
    is_short = max(map(len, re.findall(rb"[\x80-\xff]+", data))) < 3
    if (is_short or not fitting) and _is_json_in(data, "cp1252"):
        fitting.append("Windows-1252")
    return " or ".join(fitting)


def _is_json_in(data: bytes, codec: str) -> bool:
    try:
        json.loads(data.decode(codec))
    except (ValueError, RecursionError):
        return False
    return True


def _problem_of_result(result: dict) -> str:
    """What a detection lacks; empty if nothing."""
    for key in ("image_id", "category_id", "score", "segmentation"):
        if key not in result:
            return f"has no '{key}'"
    for key in ("image_id", "category_id"):
        if not isinstance(result[key], (int, str)):
            return f"has a '{key}' that is neither a number nor a name"
    if not _is_finite(result["score"]):
        return f"has the score {shown(result['score'])}, which is not a finite number"
    for key in ("pred_mask_iou", "mask_score"):
        if key in result and not _is_finite(result[key]):
            return f"has the '{key}' {shown(result[key])}, which is not a finite number"
    return _problem_of_mask(result["segmentation"])


def _problem_of_mask(mask: Any) -> str:
    if isinstance(mask, list):
        return "" if _are_polygons(mask) else "has a mask that is no list of polygons"
    return "" if is_rle(mask) else "has a mask that is not in COCO's run-length encoding"


def _is_finite(value: Any, most: float = sys.float_info.max) -> bool:
    # Compared, as `math.isfinite` takes no integer that is too large for a float
    return isinstance(value, (int, float)) and abs(value) <= most


def _are_polygons(mask: list) -> bool:
    return all(
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(_is_finite(x, MAX_COORDINATE) for x in polygon)
        for polygon in mask
    )


def is_rle(mask: Any) -> bool:
    if not isinstance(mask, dict) or not _are_counts(mask.get("size"), 2):
        return False
    counts = mask.get("counts")
    if isinstance(counts, str) and COMPRESSED_COUNTS.fullmatch(counts):
        counts = _decoded(counts)
    # If they do not add up, pycocotools compares masks for ever, or reads memory of others
    return (
        isinstance(counts, list) and _are_counts(counts) and sum(counts) == math.prod(mask["size"])
    )


def _decoded(counts: str) -> list[int]:
    """The lengths of the runs in COCO's compressed form, as `rleFrString` in pycocotools reads."""
    codes = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)  # of each number, whose last five bits come first
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 5 * (np.arange(len(codes)) - starts.repeat(ends - starts + 1))
    values = np.add.reduceat((codes & 31) << shifts, starts)
    values -= (codes[ends] & 16) << (shifts[ends] + 1)  # the sign
    # From the fourth on they are differences to the last but one
    values[1::2], values[2::2] = values[1::2].cumsum(), values[2::2].cumsum()
    return values.tolist()


def _are_counts(values: Any, length: int | None = None) -> bool:
    return (
        isinstance(values, list)
        and length in (None, len(values))
        and all(isinstance(x, int) and x >= 0 for x in values)
    )


def _compressed(result: dict) -> dict:
    """The result, with uncompressed RLE compressed."""
    mask = result["segmentation"]
    if isinstance(mask, list) or isinstance(mask["counts"], str):
        return result
    return {**result, "segmentation": _as_text(mask_util.frPyObjects(mask, *mask["size"]))}


def _as_text(rle: dict) -> dict:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def _check_entries(path: str, kind: str, entries: Any, keys: Sequence[str]) -> None:
    if not isinstance(entries, list) or not all(isinstance(x, dict) for x in entries):
        raise UserError(f"'{path}' has no list of {kind}: {ANNOTATIONS_ADVICE}.")
    for number, entry in enumerate(entries, start=1):
        for key in keys:
            if entry.get(key) in (None, [], {}):
                raise UserError(
                    f"Entry {number} of the {kind} in '{path}' has no '{key}': "
                    f"{ANNOTATIONS_ADVICE}."
                )


def _check_values(path: str, kind: str, entries: Sequence[dict]) -> None:
    for number, entry in enumerate(entries, start=1):
        problem = _PROBLEMS[kind](entry)
        if problem:
            raise UserError(
                f"Entry {number} of the {kind} in '{path}' {problem}: {ANNOTATIONS_ADVICE}."
            )
    if kind != "annotations" and len({isinstance(x["id"], str) for x in entries}) > 1:
        raise UserError(  # COCO sorts them
            f"The ids of the {kind} in '{path}' are numbers and text: {ANNOTATIONS_ADVICE}, with "
            "ids of one kind."
        )


def _problem_of_id(entry: dict, keys: Sequence[str] = ("id",)) -> str:
    for key in keys:
        if not (isinstance(entry[key], str) or _is_finite(entry[key])):
            return f"has a '{key}' that is neither a number nor a name"
    return ""


def _problem_of_image(image: dict) -> str:
    size = [image["height"], image["width"]]
    if not _are_counts(size, 2) or not 0 < math.prod(size) < MAX_PIXELS:
        height, width = map(shown, size)
        return f"has a height and a width of {height} and {width}, which no image has"
    return _problem_of_id(image)


def _problem_of_annotation(annotation: dict) -> str:
    if not _is_finite(annotation["area"]):
        return f"has the area {shown(annotation['area'])}, which is not a finite number"
    if annotation.get("iscrowd") not in (None, 0, 1):
        return f"has the iscrowd {shown(annotation['iscrowd'])}, which is neither 0 nor 1"
    return _problem_of_id(annotation, ("id", "image_id", "category_id")) or _problem_of_mask(
        annotation["segmentation"]
    )


# What an entry of each kind has wrong; empty if nothing
_PROBLEMS: dict[str, Callable[[dict], str]] = {
    "images": _problem_of_image,
    "categories": _problem_of_id,
    "annotations": _problem_of_annotation,
}


def _check_known(what: str, found: set, known: Collection) -> None:
    unknown = sorted(found - set(known), key=str)
    if unknown:
        raise UserError(
            f"There are predictions for {len(unknown)} {what} that the annotations do not have, "
            f"one of them {shown(unknown[0])}: give the annotations of the images that were "
            "predicted on."
        )


def _sized(result: dict, image: dict) -> dict:
    """The result with its mask as compressed RLE in the image's size."""
    size, mask = [image["height"], image["width"]], result["segmentation"]
    if isinstance(mask, list):
        rles = mask_util.frPyObjects(mask, *size) if mask else []
        # Without polygons: all pixels are outside
        empty = {"size": size, "counts": [math.prod(size)]}
        rle = mask_util.merge(rles) if rles else mask_util.frPyObjects(empty, *size)
        return {**result, "segmentation": _as_text(rle)}
    if mask["size"] != size:
        raise UserError(
            f"A mask of image {shown(result['image_id'])} has {mask['size'][0]} x "
            f"{mask['size'][1]} pixels, but its annotation says {size[0]} x {size[1]}: give the "
            "annotations of the images that were predicted on."
        )
    return result
