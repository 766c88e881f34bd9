"""What Detectron2 has to know about keypoints, from the files of datasets or from the config."""

import json
import logging
import re
from collections.abc import Collection, Sequence
from typing import Any

from detectron2.data import MetadataCatalog, detection_utils
from detectron2.utils.file_io import PathManager

from msrcnn_d2_runtime.class_colors import class_colors

from ..utils.errors import UserError
from .loaders import outlines

__all__ = ["check_keypoints", "complete_keypoints", "flip_map_of"]

logger = logging.getLogger(__name__)

NAMES = "dataloader.keypoints.names=[...] (yaml: INPUT.KEYPOINT_NAMES)"
FLIP_MAP = "dataloader.keypoints.flip_map=[[...]] (yaml: INPUT.KEYPOINT_FLIP_MAP)"
# Sides in names: "left_eye", "EyeLeft"; "l_eye", "eye-R"; "LEye", "eyeR"
WORD = re.compile("left|right", re.IGNORECASE)
LETTER = re.compile(
    r"(?<![a-z0-9])[lr](?![a-z0-9])|^(?-i:[LR](?=[A-Z][a-z]))|(?-i:(?<=[a-z])[LR])$", re.IGNORECASE
)
OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


def check_keypoints(
    datasets: Sequence[str],
    trained_on: Collection[str],
    num_keypoints: int | None,
    names: Sequence[str] | None = None,
    flip_map: Sequence[Sequence[str]] | None = None,
) -> None:
    """
    Check that the keypoints of datasets fit the model, and complete their metadata: names, which
    names change places when an image is flipped, and which are connected in pictures. The config
    comes first, then what a program has set, then the categories of the file.

    Args:
        datasets: names of registered datasets.
        trained_on: those among them that the model learns from.
        num_keypoints: of the model; None if its config does not say.
        names, flip_map: what the config says, if anything.

    Raises:
        UserError: a number of keypoints differs, names are missing, differ or cannot be paired, or
            no object to learn from has keypoints.
    """
    found: dict[str, bool] = {}
    first: tuple[str, list, list] | None = None
    for dataset in datasets:
        metadata = MetadataCatalog.get(dataset)
        contents: dict[str, Any] = {}
        if metadata.get("json_file"):
            with PathManager.open(metadata.json_file, encoding="utf-8-sig") as file:
                contents = json.load(file)
            annotations = contents.get("annotations") or []
            found[dataset] = _check_numbers(dataset, annotations, num_keypoints)
        _complete_metadata(dataset, metadata, contents.get("categories") or [], names, flip_map)
        own = metadata.get("keypoint_names")
        if num_keypoints is not None and own is not None and len(own) != num_keypoints:
            raise UserError(
                f"Dataset '{dataset}' has the names of {len(own)} keypoints ({', '.join(own)}), "
                f"but the model predicts {num_keypoints}: {_of_the_head(len(own))}, or give the "
                f"names in {NAMES}."
            )
        if dataset not in trained_on:
            continue
        if own is None:
            raise UserError(
                f"The keypoints of dataset '{dataset}' have no names, which are needed to flip "
                f'images: give its categories "keypoints" in the file, or set {NAMES}.'
            )
        swapped = [list(pair) for pair in metadata.keypoint_flip_map]
        if first is None:
            first = dataset, list(own), swapped
        elif first[1:] != (list(own), swapped):
            raise UserError(
                f"Datasets '{first[0]}' and '{dataset}' have different names of keypoints, or flip "
                f"them differently: set {NAMES} and {FLIP_MAP} for both."
            )
    if trained_on and found and not any(found.get(name, True) for name in trained_on):
        raise UserError(
            "The model has a keypoint head, but no object of the training data has keypoints: use "
            "other annotations, or a model without keypoint head."
        )


def _check_numbers(dataset: str, annotations: list[dict], num_keypoints: int | None) -> bool:
    """Check the numbers of keypoints that objects have; returns whether any object has some."""
    annotation_of: dict[float, Any] = {}  # with this number of keypoints
    for annotation in annotations:
        if annotation.get("keypoints"):
            annotation_of.setdefault(len(annotation["keypoints"]) / 3, annotation.get("id"))
    numbers = [f"{n:g} (annotation {k})" for n, k in annotation_of.items()]
    if len(numbers) > 1 or not all(n.is_integer() for n in annotation_of):
        raise UserError(
            f"Objects of dataset '{dataset}' have {' and '.join(numbers)} keypoints: give all the "
            "same number, with three values for each: x, y and visibility."
        )
    (number,) = annotation_of or [None]
    if number is not None and num_keypoints not in (None, number):
        raise UserError(
            f"Objects of dataset '{dataset}' have {number:g} keypoints, but the model predicts "
            f"{num_keypoints}: {_of_the_head(int(number))}."
        )
    return number is not None


def _of_the_head(number: int) -> str:
    return (
        f"set model.roi_heads.keypoint_head.num_keypoints={number} (yaml: "
        f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS {number})"
    )


def _complete_metadata(
    dataset: str,
    metadata: Any,
    categories: list[dict],
    names: Sequence[str] | None,
    flip_map: Sequence[Sequence[str]] | None,
) -> None:
    with_keypoints = [c for c in categories if c.get("keypoints")]
    of_file = [list(map(str, c["keypoints"])) for c in with_keypoints]
    given = list(names) if names is not None else metadata.get("keypoint_names")
    if given is None and of_file:
        given = of_file[0]
        other = next((k for k, x in enumerate(of_file) if x != given), None)
        if other is not None:
            raise UserError(
                f"Categories '{with_keypoints[0].get('name')}' and "
                f"'{with_keypoints[other].get('name')}' of dataset '{dataset}' have different "
                f"keypoints, but a model has one list of them: set {NAMES}."
            )
    if given is None:
        return
    if len(set(given)) != len(given):
        raise UserError(
            f"Two keypoints of dataset '{dataset}' have the same name ({', '.join(given)}): set "
            f"{NAMES}."
        )
    pairs: Any = flip_map if flip_map is not None else metadata.get("keypoint_flip_map")
    if pairs is None:
        try:
            pairs = flip_map_of(given)
        except ValueError as error:
            raise UserError(
                f"{error} (dataset '{dataset}'): say by {FLIP_MAP} which keypoints change places "
                "when an image is flipped, [] for none."
            ) from error
        text = ", ".join(f"{a} and {b}" for a, b in pairs) or "none"
        logger.info(
            "Keypoints of '%s': %s. These change places in flipped images: %s.",
            *(dataset, ", ".join(given), text),
        )
    unknown = sorted({name for pair in pairs for name in pair} - set(given))
    if unknown:
        raise UserError(
            f"The flip map has '{unknown[0]}', which is no keypoint of dataset '{dataset}' "
            f"({', '.join(given)}): correct {FLIP_MAP}."
        )
    rules = metadata.get("keypoint_connection_rules")
    if rules is None and of_file and of_file[0] == list(given):
        skeleton = with_keypoints[0].get("skeleton") or []
        # Numbers of keypoints from 1 on; files without a skeleton may have zeros
        lines = [(a, b) for a, b in skeleton if 1 <= min(a, b) and max(a, b) <= len(given)]
        colors = class_colors(len(lines)).tolist()
        rules = [(given[a - 1], given[b - 1], tuple(c)) for (a, b), c in zip(lines, colors)]
    new = {
        "keypoint_names": list(given),
        "keypoint_flip_map": [tuple(pair) for pair in pairs],
        "keypoint_connection_rules": rules or [],
    }
    for key, value in new.items():
        # Metadata take no other value than they have
        if metadata.get(key) is None:
            metadata.set(**{key: value})
        elif key != "keypoint_connection_rules" and _as_lists(metadata.get(key)) != _as_lists(
            value
        ):
            raise UserError(
                f"The config and the metadata of dataset '{dataset}' have different {key}: leave "
                "out one of them."
            )


def _as_lists(value: Sequence) -> list:
    return [x if isinstance(x, str) else list(x) for x in value]


def flip_map_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """
    Args:
        names: of keypoints.

    Returns:
        pairs of names that differ in the side only, such as ("left_eye", "right_eye") or
        ("LEye", "REye").

    Raises:
        ValueError: "left" or "right" stands in a name that has no counterpart.
    """
    pairs = []
    for k, name in enumerate(names):
        mirrored = _mirrored(name)
        if mirrored != name and mirrored in names:
            if names.index(mirrored) > k:
                pairs.append((name, mirrored))
        elif re.search(r"(?<![a-zA-Z])(?i:left|right)|Left|Right", name):
            raise ValueError(f"Keypoint '{name}' has no counterpart '{mirrored}'")
    return pairs


def _mirrored(name: str) -> str:
    def other(match: re.Match) -> str:
        side = match.group()
        swapped = OTHER_SIDE[side.lower()]
        return (
            swapped.upper() if side.isupper() else swapped.title() if side[0].isupper() else swapped
        )

    if WORD.search(name):
        return WORD.sub(other, name)
    return name if len(name) == 1 else LETTER.sub(other, name)


def complete_keypoints(mapper: Any, dataset: Any, names: Sequence[str] = ()) -> None:
    """
    Give a `DatasetMapper` what it needs to read keypoints. Other mappers stay as they are.

    Objects without keypoints get ones that are not labelled, in place: Detectron2 takes only
    images in which all objects have them.

    Args:
        dataset: list of dataset dicts.
        names: of the datasets if the model predicts keypoints: a mapper then reads them, which
            MODEL.KEYPOINT_ON says in a yaml config. Otherwise only one that does so is completed.
    """
    wrapped: Any = getattr(mapper, "_obj", mapper)  # inside Detectron2's PicklableWrapper
    if names and hasattr(wrapped, "use_keypoint"):
        wrapped.use_keypoint = True
    if not getattr(wrapped, "use_keypoint", False):
        return
    have_names = all(MetadataCatalog.get(n).get("keypoint_names") is not None for n in names)
    if names and have_names and wrapped.keypoint_hflip_indices is None:
        wrapped.keypoint_hflip_indices = detection_utils.create_keypoint_hflip_indices(list(names))
    annotations = [a for d in outlines(dataset) for a in d.get("annotations", ())]
    length = next((len(a["keypoints"]) for a in annotations if a.get("keypoints")), 0)
    for annotation in annotations:
        if not annotation.get("keypoints"):
            annotation["keypoints"] = [0.0] * length
