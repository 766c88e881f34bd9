"""
Finds the images that are neighbouring tiles of one larger picture, and keeps them together when
images are divided: a model that has seen one tile has seen half of the nuclei at its border.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

SMOOTHING = 9  # pixels; what is coarser than that, such as uneven lighting, does not count
MIN_CORRELATION = 0.8  # of the borders of two tiles that were cut from one picture


def group_tiles(images: Sequence[np.ndarray]) -> list[list[int]]:
    """
    Args:
        images: (H, W) uint8, gray. Two are neighbours if a border of one correlates with the
            opposite border of the other by more than MIN_CORRELATION, without what is coarser
            than SMOOTHING.

    Returns:
        groups of indices of images that are neighbours, or neighbours of neighbours; each image
        is in one group. In the order of their first images.
    """
    group_of = list(range(len(images)))
    for first, second in _neighbours(images):
        old, new = group_of[second], group_of[first]
        group_of = [new if group == old else group for group in group_of]
    groups = defaultdict(list)
    for index, group in enumerate(group_of):
        groups[group].append(index)
    return list(groups.values())


def divide(groups: Sequence[Sequence[int]], share: float, seed: int) -> tuple[list, list]:
    """
    Args:
        groups: of indices, from :func:`group_tiles`.
        share: of all indices that the second part gets, about.
        seed: of the order in which groups are taken.

    Returns:
        the indices of two parts, ascending; each group is in one of them as a whole.
    """
    wanted = share * sum(map(len, groups))
    first: list[int] = []
    second: list[int] = []
    for k in np.random.default_rng(seed).permutation(len(groups)):
        (second if len(second) + len(groups[k]) <= wanted else first).extend(groups[k])
    return sorted(first), sorted(second)


def _neighbours(images: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs of indices: one image's right or lower border goes on at the other's opposite one."""
    pairs = []
    for borders in (lambda x: (x[:, -1], x[:, 0]), lambda x: (x[-1], x[0])):
        by_length = defaultdict(list)
        for index, image in enumerate(images):
            by_length[len(borders(image)[0])].append(index)
        for indices in by_length.values():
            ends, starts = (
                np.stack([_detail(borders(images[k])[side]) for k in indices]) for side in (0, 1)
            )
            found = np.argwhere(ends @ starts.T > MIN_CORRELATION)
            pairs += [(indices[a], indices[b]) for a, b in found if a != b]
    return pairs


def _detail(border: np.ndarray) -> np.ndarray:
    """What of a row of pixels is finer than SMOOTHING, of length 1, or 0 if there is nothing."""
    border = border.astype(int)  # exact: a border of one gray has no detail at all
    padded = np.pad(border, SMOOTHING // 2, mode="edge")
    detail = SMOOTHING * border - np.convolve(padded, np.ones(SMOOTHING, int), mode="valid")
    length = np.linalg.norm(detail)
    return detail / length if length else detail.astype(float)
