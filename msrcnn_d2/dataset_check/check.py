"""Check a dataset in COCO's format before a model is trained on it."""

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..coco_format import ANNOTATIONS_ADVICE, has_byte_order_mark, read_json
from ..image_reading import ImageSettings
from ..utils.errors import UserError
from ..utils.text import plural, shown
from .annotations import Annotations, check_annotations, check_categories, check_images
from .findings import Findings
from .images import ImageFile, look_at_images
from .masks import check_masks

__all__ = ["check_contents", "check_dataset", "check_encoding", "read_contents", "read_images"]


def check_dataset(
    annotations: str,
    images: str | None,
    quick: bool = False,
    num_workers: int | None = None,
    progress: bool = True,
    needs_annotations: bool = True,
    settings: ImageSettings | None = None,
) -> Findings:
    """
    Args:
        annotations: path of a JSON file in COCO's format.
        images: folder of its images; None to leave them out.
        quick: whether to read only the headers and ends of images, instead of decoding them.
        num_workers: threads that read images, by default as many as there are cores.
        progress: whether to show a bar for the images, where there is a terminal.
        needs_annotations: whether the file has to have a list of annotations, which one of images
            to predict on may lack.
        settings: how images are read.

    Raises:
        UserError: the file cannot be read, or it is something else; or there is no such folder.
    """
    check_folder(images)
    contents = read_contents(annotations, needs_annotations)
    files = read_images(contents, images, quick, num_workers, progress, settings)
    has_annotations = "annotations" in contents
    findings = check_contents({"annotations": [], **contents}, files)
    findings.has_annotations = has_annotations
    check_encoding(annotations, findings)
    return findings


def check_encoding(annotations: str, findings: Findings) -> None:
    """What is wrong with a file though its contents could be read."""
    if has_byte_order_mark(annotations):
        findings.add("byte-order-mark", "the file starts with the byte order mark of UTF-8")


def check_folder(images: str | None) -> None:
    if images is not None and not os.path.isdir(images):
        raise UserError(f"There is no folder '{images}': give that of the images.")


def read_contents(annotations: str, needs_annotations: bool = True) -> dict:
    """
    Args:
        annotations, needs_annotations: as in :func:`check_dataset`.

    Returns:
        the contents of the file, with lists of images, annotations and categories, of anything;
        without annotations only if they are not needed.
    """
    with _without_garbage_collection():
        contents = read_json(annotations, ANNOTATIONS_ADVICE)
    for key in ("images", "annotations", "categories"):
        if key == "annotations" and key not in contents and not needs_annotations:
            continue
        if not isinstance(contents, dict) or not isinstance(contents.get(key), list):
            raise UserError(f"'{annotations}' has no list of {key}: {ANNOTATIONS_ADVICE}.")
    return contents


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """It looks for cycles in lists of numbers again and again: three quarters of the reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_images(
    contents: dict,
    images: str | None,
    quick: bool,
    num_workers: int | None,
    progress: bool,
    settings: ImageSettings | None = None,
) -> dict[str, ImageFile] | None:
    """What the files of images are, by name; None without a folder."""
    if images is None:
        return None
    entries = (entry for entry in contents["images"] if isinstance(entry, dict))
    names = (entry.get("file_name") for entry in entries)
    known = [name for name in names if isinstance(name, str) and name]
    return look_at_images(images, known, quick, num_workers, progress, settings)


def check_contents(contents: dict, files: dict[str, ImageFile] | None) -> Findings:
    """
    Args:
        contents: from :func:`read_contents`; they are not modified.
        files: from :func:`read_images`.
    """
    findings = Findings(
        num_images=len(contents["images"]),
        num_annotations=len(contents["annotations"]),
        num_categories=len(contents["categories"]),
        num_files=None if files is None else len(files),
    )
    images = check_images(contents["images"], files, findings)
    categories = check_categories(contents["categories"], findings)
    annotations = check_annotations(contents["annotations"], images, categories, findings)
    usable = (annotations.images >= 0) & (annotations.categories >= 0) & ~annotations.crowds
    for k, number in enumerate(np.bincount(annotations.images[usable]).tolist()):
        if number:
            findings.objects_per_image[contents["images"][k]["id"]] = number
    check_masks(annotations, images, findings)
    for k in _without(contents["images"], images.index, annotations.images):
        findings.add("image-empty", "it has no annotations", index=k, **images.where(k))
    _check_categories_used(contents["categories"], categories, annotations, findings)
    _check_anything_there(contents, annotations, findings)
    return findings


def _without(entries: list, index: dict, used: np.ndarray) -> list[int]:
    """Which of the entries are not used."""
    numbers = np.bincount(used[used >= 0], minlength=len(entries))
    return [k for k in index.values() if not numbers[k]]


def _check_categories_used(
    entries: list, categories: dict[Any, int], annotations: Annotations, findings: Findings
) -> None:
    unused = _without(entries, categories, annotations.categories)
    if len(annotations.entries) == 0:
        return  # then it is said of all of them together
    for k in unused:
        id_, name = entries[k]["id"], entries[k].get("name")
        findings.add("category-unused", f"category {shown(id_)}, {shown(name)}", index=k)


def _check_anything_there(contents: dict, annotations: Annotations, findings: Findings) -> None:
    for key in ("images", "categories"):
        if not contents[key]:
            findings.add(f"no-{key}", f"the list of {key} is empty")
    usable = (annotations.images >= 0) & (annotations.categories >= 0)
    if (~annotations.crowds & usable).any():
        return
    number = plural(len(annotations.entries), "annotation")
    if not annotations.entries:
        findings.add("no-objects", "the list of annotations is empty")
    elif (annotations.images < 0).all():
        said, known = (
            next((x.get(key) for x in entries if isinstance(x, dict)), None)
            for key, entries in (("image_id", annotations.entries), ("id", contents["images"]))
        )
        findings.add(
            "no-objects",
            f"of {number} none is of an image of the file: their image_id is such as "
            f"{shown(said)}, the images' ids are such as {shown(known)}",
        )
    elif (annotations.categories < 0).all():
        findings.add("no-objects", f"of {number} none is of a category of the file")
    else:
        findings.add("no-objects", f"of {number} none is an object that is not a crowd")
