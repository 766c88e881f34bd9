"""Boundaries of masks, which Boundary IoU compares (Cheng et al., CVPR 2021)."""

import math
from collections.abc import Sequence

import numpy as np

from msrcnn_d2_runtime.mask_encoding import decode_crop, encode_crops

__all__ = ["boundaries_of", "boundary_width"]

WIDTH_OF_DIAGONAL = 0.02  # share of the image's diagonal, as in the authors' code


def boundary_width(image_size: Sequence[int]) -> int:
    """
    Args:
        image_size: height and width in pixels.

    Returns:
        how far a boundary reaches into its mask, in pixels: 2 % of the image's diagonal, rounded,
        and at least 1.
    """
    height, width = image_size
    return max(round(WIDTH_OF_DIAGONAL * math.sqrt(height**2 + width**2)), 1)


def boundaries_of(rles: Sequence[dict]) -> list[dict]:
    """
    The boundary of a mask is the mask without its erosion by a square that reaches d pixels in each
    direction, where d is the :func:`boundary_width` of the image. This equals d erosions by 3 x 3
    pixels. What lies beyond the image is not in the mask, so that a mask also has a boundary where
    the image cuts it.

    Args:
        rles: masks in compressed RLE.

    Returns:
        their boundaries in compressed RLE, with "counts" as a string.
    """
    boundaries = []
    for rle in rles:
        counts, size = rle["counts"], rle["size"]
        if isinstance(counts, bytes):
            counts = counts.decode()
        top, left, inside = decode_crop({"counts": counts, "size": size})
        width = boundary_width(size)
        side = 2 * width + 1
        if min(inside.shape) >= side:
            inner = _eroded_rows(_eroded_rows(inside, side).T, side).T
            inside = inside.copy()
            inside[width:-width, width:-width] &= ~inner
        boundaries += encode_crops([(top, left, inside)], size)
    return boundaries


def _eroded_rows(inside: np.ndarray, length: int) -> np.ndarray:
    """
    For each stretch of `length` rows, in each column, whether it is inside from end to end. Each
    step about doubles the length, since two shorter stretches that overlap make a longer one.
    """
    done = 1
    while done < length:
        step = min(done, length - done)
        inside = inside[step:] & inside[:-step]
        done += step
    return inside
