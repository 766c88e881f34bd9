"""
Outlines of masks as polygons, from which COCO's tools draw exactly the same masks again.

COCO's polygons have no holes: a mask is the union of its polygons. So each hole is joined to the
outline above it by a cut without a width, which the polygon follows up and down. The hole stays
empty, whether a program fills polygons as pycocotools does, by the even-odd rule or by winding
numbers.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ..mask_encoding import run_lengths

__all__ = ["polygons_of"]

Points = list[tuple[int, int]]


def polygons_of(rle: dict) -> list[list[int]]:
    """
    Trace the outlines of a mask along the edges of its pixels: pixel (row, column) reaches from
    (column, row) to (column + 1, row + 1).

    Args:
        rle: compressed RLE, with "counts" as a string, without empty runs but the first.

    Returns:
        for each part of the mask the x and y of its corners, one after the other, in pixels. Pixels
        that touch at a corner belong to one part. An empty mask has no polygons.
    """
    columns, tops, bottoms = _intervals(rle)
    if not len(columns):
        return []

    # Edges above and below pixels, joined to horizontal segments. All are walked with the mask on
    # the right: segments above pixels to the right, those below to the left.
    num = len(columns)
    edge_y, edge_x = np.concatenate([tops, bottoms]), np.concatenate([columns, columns])
    is_below = np.arange(2 * num) >= num
    order = np.lexsort((edge_x, is_below, edge_y))
    y, x, below = edge_y[order], edge_x[order], is_below[order]
    first = np.flatnonzero(
        np.concatenate([[True], (y[1:] != y[:-1]) | (below[1:] != below[:-1]) | (np.diff(x) != 1)])
    )
    segment_of = np.empty(2 * num, dtype=int)
    segment_of[order] = np.repeat(np.arange(len(first)), np.diff([*first, 2 * num]))
    left, right = x[first], x[[*(first[1:] - 1), -1]] + 1
    y, below = y[first], below[first]
    start, end = np.where(below, right, left), np.where(below, left, right)
    # The segment above the pixels that lie above the first edge of a segment below
    above = segment_of[order[first] - num * below]

    # Corners in one column are joined in pairs by vertical edges. Where two corners meet, this
    # order keeps the two pixels together that touch there.
    corner_order = np.lexsort((np.tile(below, 2), np.tile(y, 2), np.concatenate([start, end])))
    pairs = np.sort(corner_order.reshape(-1, 2), axis=1)  # the start of one and the end of another
    following = np.empty(len(y), dtype=int)
    following[pairs[:, 1] - len(y)] = pairs[:, 0]
    rings = _cycles(following.tolist())

    # Lists are faster than arrays where single elements are read
    ys, starts, ends = y.tolist(), start.tolist(), end.tolist()
    attached: dict[int, list[tuple[int, Points]]] = defaultdict(list)

    def walk(ring: Sequence[int]) -> Points:
        """The corners of an outline and of the holes that are attached to it."""
        points: Points = []
        for s in ring:
            points.append((starts[s], ys[s]))
            for x, hole in sorted(attached.get(s, ())):
                # Down to the hole, around it, and up again
                points += [] if x == starts[s] else [(x, ys[s])]
                points += [*hole, (x, ys[s])]
            points.append((ends[s], ys[s]))
        return points

    # Around a hole the mask lies on the right, too, so that its area is negative. The lowest holes
    # come first, since each one is attached to an outline that begins above it.
    areas = np.array([np.dot(start[ring] - end[ring], y[ring]) for ring in rings])
    highest = [min(ring, key=lambda s: (ys[s], ends[s])) for ring in rings]
    for k in sorted(np.flatnonzero(areas < 0), key=lambda k: -ys[highest[k]]):
        ring, top = rings[k], highest[k]
        place = ring.index(top) + 1
        corner = (ends[top], ys[top])
        hole = [corner, *walk([*ring[place:], *ring[:place]])]
        attached[above[top]].append((corner[0], hole))
    return [[x for point in walk(rings[k]) for x in point] for k in np.flatnonzero(areas > 0)]


def _intervals(rle: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column, first row and row after the last of the runs of pixels in each column of a mask."""
    height = rle["size"][0]
    ends = run_lengths(rle["counts"]).cumsum()
    ends = ends[: len(ends) // 2 * 2].reshape(-1, 2)
    first, last = ends[:, 0], ends[:, 1] - 1
    # A run of the RLE may go on at the top of the next column
    columns = first // height
    times = last // height - columns + 1
    run = np.repeat(np.arange(len(first)), times)
    columns = columns[run] + np.arange(len(run)) - (times.cumsum() - times)[run]
    offsets = columns * height
    tops = np.maximum(first[run] - offsets, 0)
    bottoms = np.minimum(last[run] + 1 - offsets, height)
    return columns, tops, bottoms


def _cycles(following: list[int]) -> list[list[int]]:
    """The cycles of a permutation."""
    cycles, seen = [], [False] * len(following)
    for k in range(len(following)):
        cycle = []
        while not seen[k]:
            seen[k] = True
            cycle.append(k)
            k = following[k]
        if cycle:
            cycles.append(cycle)
    return cycles
