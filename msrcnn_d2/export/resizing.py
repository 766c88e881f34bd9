"""Pillow's bilinear resizing of images, by operators that ONNX and TorchScript have."""

from typing import NamedTuple

import torch

__all__ = ["ResizeRule", "resized", "resized_size"]


class ResizeRule(NamedTuple):
    """
    Detectron2's `ResizeShortestEdge`: the shorter side becomes `short_edge`, unless the longer
    one would be longer than `max_size`, which it then gets. In pixels.
    """

    short_edge: int
    max_size: int


def resized_size(size: torch.Tensor, rule: ResizeRule) -> torch.Tensor:
    """
    What `ResizeShortestEdge.get_output_shape` computes, operation by operation.

    Args:
        size: int64 Tensor of shape (2,), height and width.

    Returns:
        int64 Tensor of shape (2,).
    """
    sides = size.double()
    # As tensors: PyTorch divides a number by a tensor as number * (1 / tensor), rounded twice
    short_edge, max_size = torch.tensor(rule, dtype=torch.float64)
    shorter = sides.min()
    scaled = torch.where(sides == shorter, short_edge, short_edge / shorter * sides)
    longest = scaled.max()
    scaled = torch.where(longest > max_size, scaled * (max_size / longest), scaled)
    return (scaled + 0.5).floor().long()


@torch.jit._script_if_tracing
def resized(pixels: torch.Tensor, new_size: torch.Tensor) -> torch.Tensor:
    """
    Pillow's `resize` with `BILINEAR`, which averages when it makes an image smaller. Like Pillow,
    it goes along x first, rounds weights to multiples of 2^-22 and the results to whole numbers, so
    that the results are equal. (Newer versions of Pillow make tall images smaller along y first;
    then results differ by 1 at most.) Numbers are float64, which has all sums exactly.

    Args:
        pixels: uint8 Tensor of shape (H, W, C).
        new_size: int64 Tensor of shape (2,), the new height and width.

    Returns:
        float32 Tensor of shape (C, H', W'), whole numbers from 0 to 255.
    """
    height, width = pixels.shape[0], pixels.shape[1]
    new_height, new_width = int(new_size[0]), int(new_size[1])
    if height == new_height and width == new_width:
        return pixels.permute(2, 0, 1).float()
    # Each of the two is one product of large matrices: (H C, W) x (W, W'), (H', H) x (H, C W')
    rows = pixels.permute(0, 2, 1).double().flatten(0, 1) @ weights(width, new_width).t()
    rows = (rows + 0.5).floor().reshape([height, -1])
    columns = (weights(height, new_height) @ rows + 0.5).floor()
    return columns.reshape([new_height, -1, new_width]).transpose(0, 1).float()


def weights(length: int, new_length: int) -> torch.Tensor:
    """
    Returns:
        float64 Tensor of shape (new_length, length): the weights of the pixels in each new one.
    """
    scale = length / new_length
    centers = (torch.arange(new_length, dtype=torch.float64) + 0.5) * scale
    pixels = torch.arange(length, dtype=torch.float64) + 0.5
    triangles = 1 - (pixels - centers[:, None]).abs() / max(scale, 1.0)
    triangles = triangles.clamp(min=0)
    parts = triangles / triangles.sum(dim=1, keepdim=True)
    return (parts * 4194304.0 + 0.5).floor() / 4194304.0
