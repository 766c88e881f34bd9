"""A colour for each class, the same in every picture."""

import functools

import numpy as np

__all__ = ["class_color", "class_colors"]

# The first colours: those of Okabe and Ito, made for colour-blind readers, without black
FIRST = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
# Simulate in linear sRGB how readers without one kind of cone see a colour: for long, medium and
# short waves (Machado, Oliveira and Fernandes 2009, severity 1)
VISIONS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
    ]
)
# From linear sRGB to OKLab, a space in which distances are like differences that people see
# (Ottosson 2020)
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
LEVELS = range(0, 256, 15)  # of red, green and blue in the other colours
LIGHTNESS = (0.53, 0.92)  # neither black nor white, which pictures are full of; OKLab
MIN_CHROMA = 0.11  # nor grey; OKLab
BLOCK = 128  # colours are chosen this many at a time


def class_colors(num_classes: int) -> np.ndarray:
    """
    Returns:
        uint8 (num_classes, 3), RGB. Color k is the same for every number of classes. The first 7
        are Okabe and Ito's palette; each other one is as different as possible from all before it,
        for usual vision and for the colour-blind.
    """
    return _palette(-(-num_classes // BLOCK) * BLOCK)[:num_classes]


def class_color(k: int) -> tuple[int, int, int]:
    """RGB of the class with index k, from 0 to 255; see :func:`class_colors`."""
    red, green, blue = class_colors(k + 1)[k].tolist()
    return red, green, blue


@functools.cache
def _palette(num: int) -> np.ndarray:
    first = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in FIRST], np.uint8)
    grid = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS, indexing="ij"), -1).reshape(-1, 3)
    lab = _seen(grid)[:, 0] / 1000
    low, high = LIGHTNESS
    usable = (lab[:, 0] > low) & (lab[:, 0] < high) & (np.hypot(lab[:, 1], lab[:, 2]) > MIN_CHROMA)
    colors = np.concatenate([first, grid[usable].astype(np.uint8)])
    seen = _seen(colors)
    chosen = list(range(len(first)))
    nearest = np.full(len(colors), np.iinfo(np.int64).max)
    for n in range(num):
        if n == len(chosen):
            chosen.append(int(nearest.argmax()))
        apart = ((seen - seen[chosen[n]]) ** 2).sum(-1).min(-1)
        nearest = np.minimum(nearest, apart)
    return colors[chosen[:num]]


def _seen(colors: np.ndarray) -> np.ndarray:
    """
    Returns:
        int64 (N, 4, 3): thousandths of OKLab for each of the visions. Whole numbers, so that
        rounding errors of a machine do not change the palette.
    """
    share = colors / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.einsum("vij,nj->nvi", VISIONS, linear).clip(0, 1)
    return np.rint(np.cbrt(seen @ TO_CONES.T) @ TO_LAB.T * 1000).astype(np.int64)
