"""Predicted masks in COCO's run-length encoding, without pasting them into the image first."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

__all__ = [
    "Crop",
    "decode_crop",
    "encode_bitmasks",
    "encode_crops",
    "encode_roi_masks",
    "paste_roi_masks",
    "run_lengths",
]

# The first row and column of a part of an image, and the pixels in it: bool, (h, w)
Crop = tuple[int, int, np.ndarray]
PIXELS_AT_ONCE = 2**18  # whose probabilities fit into the cache of a core


def encode_roi_masks(
    masks: np.ndarray,
    boxes: np.ndarray,
    image_size: tuple[int, int],
    threshold: float = 0.5,
) -> list[dict]:
    """
    Encode the masks that `detectron2.layers.paste_masks_in_image` would give, without pasting.

    Args:
        masks, boxes, image_size, threshold: as in :func:`paste_roi_masks`.

    Returns:
        for each mask its compressed RLE, with "counts" as a string.
    """
    return encode_crops(paste_roi_masks(masks, boxes, image_size, threshold), image_size)


def paste_roi_masks(
    masks: np.ndarray,
    boxes: np.ndarray,
    image_size: tuple[int, int],
    threshold: float = 0.5,
) -> Iterator[Crop]:
    """
    Paste masks as `detectron2.layers.paste_masks_in_image` does, each into a part of the image.

    Args:
        masks: (N, M, M), probabilities inside the boxes.
        boxes: (N, 4), XYXY in pixels; they may extend beyond the image.
        image_size: height and width in pixels.
        threshold: the smallest interpolated probability of a pixel inside the mask.

    Yields:
        for each mask the part of the image around its box, which contains the whole mask.
    """
    height, width = image_size
    masks, boxes = np.asarray(masks, dtype=np.float32), np.asarray(boxes, dtype=np.float32)
    with np.errstate(all="ignore"):  # boxes without a size
        for cells, (x0, y0, x1, y1) in zip(masks, boxes):
            cells = np.pad(cells, (1, 2))  # from -1 to M + 1
            left, x, x_share = _neighbours(x0, x1, width, masks.shape[2])
            top, y, y_share = _neighbours(y0, y1, height, masks.shape[1])
            across = cells[:, x] * (1 - x_share) + cells[:, x + 1] * x_share
            inside = np.empty((len(y), len(x)), dtype=bool)
            # Some rows at a time: the probabilities of an object as large as the image would take
            # many times the memory of its mask
            step = max(PIXELS_AT_ONCE // max(len(x), 1), 1)
            for first in range(0, len(y), step):
                rows = slice(first, first + step)
                share = y_share[rows, None]
                probs = across[y[rows]] * (1 - share) + across[y[rows] + 1] * share
                inside[rows] = probs >= threshold
            yield top, left, inside


def encode_crops(crops: Iterable[Crop], image_size: tuple[int, int]) -> list[dict]:
    """
    Args:
        crops: for each mask a part of the image that contains all of it.
        image_size: height and width of the image in pixels.

    Returns:
        for each mask its compressed RLE, with "counts" as a string.
    """
    height, width = image_size
    runs = [_run_ends(inside, height, top, left) for top, left, inside in crops]
    return _compress(runs, height, width)


def encode_bitmasks(masks: np.ndarray) -> list[dict]:
    """
    Args:
        masks: (N, H, W); values other than 0 are inside.

    Returns:
        for each mask its compressed RLE, with "counts" as a string.
    """
    masks = np.asarray(masks)
    return encode_crops(((0, 0, mask != 0) for mask in masks), masks.shape[1:])


def decode_crop(rle: dict) -> Crop:
    """
    Decode a mask without the image around it, which takes less time and memory.

    Args:
        rle: compressed RLE, with "counts" as a string.

    Returns:
        the smallest part of the image that contains the whole mask; an empty mask has no pixels.
    """
    height = rle["size"][0]
    lengths = run_lengths(rle["counts"])
    lengths = lengths[: len(lengths) // 2 * 2]  # to the end of the mask
    ends = lengths.cumsum()
    if not lengths[1::2].any():
        return 0, 0, np.zeros((0, 0), dtype=bool)
    left, right = int(ends[0]) // height, -(-int(ends[-1]) // height)
    lengths[0] -= left * height
    lengths = np.append(lengths, right * height - ends[-1])
    columns = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(-1, height)
    rows = np.flatnonzero(columns.any(axis=0))
    return int(rows[0]), left, columns[:, rows[0] : rows[-1] + 1].T


def run_lengths(counts: str) -> np.ndarray:
    """
    Args:
        counts: "counts" of a compressed RLE. They have to be well-formed.

    Returns:
        int64, the lengths of the runs, as `rleFrString` in pycocotools reads them. The first run
        lies outside the mask.
    """
    codes = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)  # of each number, whose last five bits come first
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 5 * (np.arange(len(codes)) - starts.repeat(ends - starts + 1))
    values = np.add.reduceat((codes & 31) << shifts, starts)
    values -= (codes[ends] & 16) << (shifts[ends] + 1)  # the sign
    # From the fourth on, each is the difference to the value two places before it
    values[1::2], values[2::2] = values[1::2].cumsum(), values[2::2].cumsum()
    return values


def _neighbours(
    start: np.float32, end: np.float32, size: int, num_cells: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """
    Find the cells of a mask between which the pixels of the image lie, along one axis.

    Args:
        start, end: borders of the box, in pixels.
        size: length of the image, in pixels.
        num_cells: number of cells of the mask, without the zeros around it.

    Returns:
        the first pixel that the box may touch. For each pixel from there to the last one: the
        index, in the padded mask, of the cell at or before it, and the weight of the next cell in a
        linear interpolation between the centres of the two.
    """
    first, last = max(int(np.floor(start)) - 1, 0), min(int(np.ceil(end)) + 1, size)
    # The same operations as in Detectron2 and grid_sample, in the same order, for equal rounding
    pixels = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    grid = (pixels - start) / (end - start) * 2 - 1
    position = ((grid + 1) * num_cells - 1) / 2
    # Cells up to -1 and from M on are 0. NaN, if the box has no size, becomes -1.
    position = np.fmin(np.fmax(position, -1), num_cells)
    cell = np.floor(position)
    return first, cell.astype(np.intp) + 1, position - cell


def _run_ends(inside: np.ndarray, height: int, top: int = 0, left: int = 0) -> np.ndarray:
    """
    Find where the runs of a mask begin and end. COCO counts pixels down the columns of the image.

    Args:
        inside: bool, rows x columns: a part of the image that contains the whole mask.
        height: height of the image.
        top, left: the first row and column of the part in the image.

    Returns:
        the first pixel of each run and the first pixel after it, ascending.
    """
    rows, columns = inside.shape
    if not inside.size:
        return np.zeros(0, dtype=int)
    row, column = np.divmod(np.flatnonzero(inside[1:] != inside[:-1]), columns)
    first, last = np.flatnonzero(inside[0]), np.flatnonzero(inside[-1])
    pixels = [column * height + row + 1, first * height, last * height + rows]
    # A run that continues at the top of the next column would end and begin at the same pixel
    ends, times = np.unique(np.concatenate(pixels), return_counts=True)
    return ends[times == 1] + left * height + top


def _compress(run_ends: Sequence[np.ndarray], height: int, width: int) -> list[dict]:
    """RLEs from the :func:`_run_ends` of each mask."""
    import pycocotools.mask as mask_util

    size = [height, width]
    uncompressed = []
    for ends in run_ends:
        ends = ends[ends < height * width]
        # Lengths of the runs, the first of which lies outside the mask; the last is never empty
        counts = np.diff(np.concatenate([[0], ends, [height * width]]))
        uncompressed.append({"size": size, "counts": counts})
    rles = mask_util.frPyObjects(uncompressed, height, width) if uncompressed else []
    return [{"size": size, "counts": rle["counts"].decode()} for rle in rles]
