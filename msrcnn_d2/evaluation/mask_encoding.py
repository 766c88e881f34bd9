"""Predicted masks in COCO's run-length encoding, without pasting them into the image first."""

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch

from detectron2.structures import BitMasks, Boxes, Instances, ROIMasks

__all__ = ["encode_bitmasks", "encode_predicted_masks", "encode_roi_masks"]


def encode_predicted_masks(instances: Instances) -> list[dict]:
    """
    Args:
        instances: predictions with "pred_masks": full-size masks (N x H x W, a tensor or
            `BitMasks`), or `ROIMasks` (N x M x M, probabilities) that belong to "pred_boxes".

    Returns:
        for each instance the compressed RLE of its mask, with "counts" as a string.
    """
    masks = instances.pred_masks
    if isinstance(masks, ROIMasks):
        return encode_roi_masks(masks.tensor, instances.pred_boxes, instances.image_size)
    return encode_bitmasks(masks.tensor if isinstance(masks, BitMasks) else masks)


def encode_roi_masks(
    masks: torch.Tensor,
    boxes: Boxes | torch.Tensor,
    image_size: tuple[int, int],
    threshold: float = 0.5,
) -> list[dict]:
    """
    Encode the masks that `detectron2.layers.paste_masks_in_image` would give, without pasting.

    Args:
        masks: N x M x M, probabilities inside the boxes.
        boxes: N x 4 (x0, y0, x1, y1) in pixels; they may extend beyond the image.
        image_size: height and width in pixels.
        threshold: the smallest interpolated probability of a pixel inside the mask.

    Returns:
        for each mask its compressed RLE, with "counts" as a string.
    """
    height, width = image_size
    boxes = boxes if isinstance(boxes, torch.Tensor) else boxes.tensor
    padded = np.pad(_floats(masks), ((0, 0), (1, 2), (1, 2)))  # cells from -1 to M + 1
    runs = []
    with np.errstate(all="ignore"):  # boxes without a size
        for cells, (x0, y0, x1, y1) in zip(padded, _floats(boxes)):
            left, x, x_share = _neighbours(x0, x1, width, masks.shape[2])
            top, y, y_share = _neighbours(y0, y1, height, masks.shape[1])
            across = cells[:, x] * (1 - x_share) + cells[:, x + 1] * x_share
            probs = across[y] * (1 - y_share)[:, None] + across[y + 1] * y_share[:, None]
            runs.append(_run_ends(probs >= threshold, height, top, left))
    return _compress(runs, height, width)


def encode_bitmasks(masks: torch.Tensor) -> list[dict]:
    """
    Args:
        masks: N x H x W, a tensor or array; values other than 0 are inside.

    Returns:
        for each mask its compressed RLE, with "counts" as a string.
    """
    height, width = masks.shape[1:]
    runs = [_run_ends(mask, height) for mask in torch.as_tensor(masks).bool().cpu().numpy()]
    return _compress(runs, height, width)


def _floats(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


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
    size = [height, width]
    uncompressed = []
    for ends in run_ends:
        ends = ends[ends < height * width]
        # Lengths of the runs, the first of which lies outside the mask; the last is never empty
        counts = np.diff(np.concatenate([[0], ends, [height * width]]))
        uncompressed.append({"size": size, "counts": counts})
    rles = mask_util.frPyObjects(uncompressed, height, width) if uncompressed else []
    return [{"size": size, "counts": rle["counts"].decode()} for rle in rles]
