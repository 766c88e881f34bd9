"""Check a dataset in COCO's format before a model is trained on it."""

import os
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from msrcnn_d2_runtime.image_reading import ImageSettings

from ..coco_format import (
    ANNOTATIONS_ADVICE,
    Entries,
    check_entries,
    has_byte_order_mark,
    is_id,
    read_json,
)
from ..utils.errors import UserError
from .annotations import check_annotations, check_categories, why_no_objects
from .images import ImageFile, check_images, look_at_images
from .issues import KINDS, Finding, Findings
from .masks import check_shapes, mask_format_of

__all__ = ["Dataset", "check_dataset", "find_issues", "read_dataset"]


@dataclass
class Dataset:
    """
    Attributes:
        contents: contents of the JSON file, with lists of "images", "annotations" and "categories",
            which may contain anything.
        files: what was found in the image files, by name; None if they were left out.
        has_mark: whether the file starts with a byte order mark.
        has_annotations: whether the file has a list of annotations, empty or not.
    """

    contents: dict
    files: dict[str, ImageFile] | None = None
    has_mark: bool = False
    has_annotations: bool = True


def check_dataset(
    annotations: str,
    images: str | None,
    quick: bool = False,
    num_workers: int | None = None,
    progress: bool = True,
    needs_annotations: bool = True,
    settings: ImageSettings | None = None,
    image_ids: Collection | None = None,
) -> Findings:
    """
    Args:
        annotations: path of a JSON file in COCO's format.
        images: the folder of the images; None to leave them out.
        quick: whether to read only the headers and ends of image files, instead of decoding them.
        num_workers: threads that read images, by default as many as there are cores.
        progress: whether to show a progress bar for the images, if there is a terminal.
        needs_annotations: whether to refuse a file without a list of annotations, such as one of
            images to predict on.
        settings: how images are read.
        image_ids: ids of the images to check, with their annotations; None for all.

    Raises:
        UserError: the file cannot be read or is not such a file, or the folder does not exist.
    """
    return find_issues(
        read_dataset(
            annotations,
            images,
            quick,
            num_workers,
            progress,
            needs_annotations,
            settings,
            image_ids,
        )
    )


def read_dataset(
    annotations: str,
    images: str | None,
    quick: bool = False,
    num_workers: int | None = None,
    progress: bool = True,
    needs_annotations: bool = True,
    settings: ImageSettings | None = None,
    image_ids: Collection | None = None,
) -> Dataset:
    """Read annotations and image files; for the arguments see :func:`check_dataset`."""
    if images is not None and not os.path.isdir(images):
        raise UserError(f"There is no folder '{images}': give the folder of the images.")
    contents = read_json(annotations, ANNOTATIONS_ADVICE)
    has_annotations = isinstance(contents, dict) and "annotations" in contents
    if isinstance(contents, dict) and not has_annotations and not needs_annotations:
        contents["annotations"] = []
    for key in ("images", "annotations", "categories"):
        if not isinstance(contents, dict) or not isinstance(contents.get(key), list):
            raise UserError(f"'{annotations}' has no list of {key}: {ANNOTATIONS_ADVICE}.")
    if image_ids is not None:
        kept = frozenset(image_ids)
        for key, reference in (("images", "id"), ("annotations", "image_id")):
            contents[key] = [
                x
                for x in contents[key]
                if isinstance(x, dict) and is_id(x.get(reference)) and x[reference] in kept
            ]
    files = None
    if images is not None:
        entries = (entry for entry in contents["images"] if isinstance(entry, dict))
        names = (entry.get("file_name") for entry in entries)
        known = [name for name in names if isinstance(name, str) and name]
        files = look_at_images(images, known, quick, num_workers, progress, settings)
    return Dataset(contents, files, has_byte_order_mark(annotations), has_annotations)


def find_issues(dataset: Dataset) -> Findings:
    """Check a dataset that has been read; it is not modified."""
    contents = dataset.contents
    issues: list[tuple] = []

    def report(of: str, k: int, kind: str, message: str, part: int | None = None) -> None:
        issues.append((of, k, kind, message, part))

    entries = check_entries(contents, report)
    check_images(entries, contents["images"], dataset.files, report)
    check_categories(entries, contents["categories"], report)
    check_annotations(entries, report)
    check_shapes(entries, report)
    for key in ("images", "categories"):
        if not contents[key]:
            report("", -1, f"no-{key}", f"the list of {key} is empty")
    objects = (entries.image_of >= 0) & (entries.category_of >= 0) & ~entries.crowds
    if not objects.any():
        report("", -1, "no-objects", why_no_objects(entries, contents))
    if dataset.has_mark:
        report("", -1, "byte-order-mark", "the file starts with the byte order mark of UTF-8")

    counts = np.bincount(entries.image_of[objects]).tolist()
    return Findings(
        all=[_finding(contents, entries, *issue) for issue in issues],
        num_images=len(contents["images"]),
        num_annotations=len(contents["annotations"]),
        num_categories=len(contents["categories"]),
        num_files=None if dataset.files is None else len(dataset.files),
        has_annotations=dataset.has_annotations,
        objects_per_image={entries.images[k]["id"]: n for k, n in enumerate(counts) if n},
        mask_format=mask_format_of(entries),
    )


def _finding(
    contents: dict, entries: Entries, of: str, k: int, kind: str, message: str, part: int | None
) -> Finding:
    """Add the ids and the file name of the entry that an issue is about."""
    image_id = annotation_id = None
    image: dict = {}
    if of == "images":
        image = entries.images[k]
        image_id = image.get("id")
    elif of == "annotations" and isinstance(contents[of][k], dict):
        annotation_id, image_id = (contents[of][k].get(key) for key in ("id", "image_id"))
        if is_id(image_id) and image_id in entries.image_index:
            image = entries.images[entries.image_index[image_id]]
    name = image.get("file_name")
    return Finding(
        kind,
        KINDS[kind].level,
        message,
        image_id if is_id(image_id) else None,  # what is not an id may be no plain data
        annotation_id if is_id(annotation_id) else None,
        name if isinstance(name, str) else None,
        k,
        part,
    )
