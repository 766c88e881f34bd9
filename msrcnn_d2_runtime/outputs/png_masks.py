"""Masks as PNG files: a label map for each image, or a file for each object."""

import os
import shutil
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import INCOMPLETE, write_whole
from ..mask_encoding import decode_crop

__all__ = ["write_label_map", "write_object_masks"]

MAX_LABEL = 65535  # of 16 bits


def write_label_map(path: str, record: dict[str, Any]) -> None:
    """
    Write a PNG with 16 bits per pixel: 0 is the background, k the k-th object of the image. Where
    masks overlap, the object that is ranked higher has the pixel.

    Args:
        record: from :func:`record_of`.

    Raises:
        UserError: there are more objects than 16 bits can count.
    """
    if len(record["predictions"]) > MAX_LABEL:
        raise UserError(
            f"'{record['image']}' has more than {MAX_LABEL:,} objects, which a label map cannot "
            "tell apart: raise the threshold of the score, or write one PNG for each object."
        )
    rles = [entry["segmentation"] for entry in record["predictions"]]
    labels = np.zeros((record["height"], record["width"]), dtype=np.uint16)
    for k, (top, left, inside) in enumerate(map(decode_crop, rles), start=1):
        part = labels[top : top + inside.shape[0], left : left + inside.shape[1]]
        part[inside & (part == 0)] = k
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with write_whole(path, sync=False) as f:
        Image.fromarray(labels).save(f, format="PNG", compress_level=1)


def write_object_masks(folder: str, record: dict[str, Any]) -> None:
    """
    Write black and white PNGs, "001.png" for the first object of the image and so on. An image
    without objects has an empty folder.

    Args:
        folder: which is made. It gets its name when it has all files.
        record: from :func:`record_of`.
    """
    incomplete = f"{folder}{INCOMPLETE}"
    for leftover in (incomplete, folder):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    os.makedirs(incomplete)
    rles = [entry["segmentation"] for entry in record["predictions"]]
    for k, (top, left, inside) in enumerate(map(decode_crop, rles), start=1):
        mask = np.zeros((record["height"], record["width"]), dtype=bool)
        mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        Image.fromarray(mask).save(os.path.join(incomplete, f"{k:03}.png"), compress_level=1)
    os.rename(incomplete, folder)
