"""Deformable convolution by torchvision, which has both passes compiled, for CPUs and GPUs.

These two functions have the arguments of Detectron2's. Channels of the offsets and masks have the
same order in both libraries, and torchvision infers the numbers of groups from the shapes.
"""

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

Size = int | tuple[int, int]
HALVES = (torch.float16, torch.bfloat16)


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    deformable_groups: int = 1,
    im2col_step: int = 64,
) -> Tensor:
    """Deformable convolution (https://arxiv.org/abs/1703.06211).

    Args:
        input: (N, C, H, W).
        offset: (N, 2 * deformable_groups * kernel height * kernel width, H_out, W_out), y before x.
        weight: (C_out, C / groups, kernel height, kernel width).

    Returns:
        (N, C_out, H_out, W_out).
    """
    return _convolve(input, offset, weight, None, stride, padding, dilation, None)


def modulated_deform_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    deformable_groups: int = 1,
) -> Tensor:
    """Deformable convolution v2 (https://arxiv.org/abs/1811.11168).

    Args:
        mask: (N, deformable_groups * kernel height * kernel width, H_out, W_out), factors of the
            values that are sampled; the others as for :func:`deform_conv`.
    """
    return _convolve(input, offset, weight, bias, stride, padding, dilation, mask)


def _convolve(input, offset, weight, bias, stride, padding, dilation, mask):
    dtype = input.dtype
    if dtype in HALVES:  # mixed precision: torchvision has no 16-bit types on CPUs
        input, offset, weight = input.float(), offset.float(), weight.float()
        bias, mask = (None if x is None else x.float() for x in (bias, mask))
    return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask).to(dtype)
