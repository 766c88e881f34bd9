"""Make a model faster without changing its results, up to rounding."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

__all__ = ["channels_last_on_cpu", "compile_dense_parts", "use_channels_last_on_cpu"]


def use_channels_last_on_cpu(model: nn.Module) -> bool:
    """
    Convert the weights of a model to channels-last order if it is on a CPU.

    Convolutions then take and return channels-last tensors, which oneDNN does not have to reorder.
    Use it for inference only: gradients are slower in that order.

    Returns:
        whether the model is on a CPU.
    """
    on_cpu = all(x.device.type == "cpu" for x in model.parameters())
    if on_cpu:
        model.to(memory_format=torch.channels_last)
    return on_cpu


@contextmanager
def channels_last_on_cpu(model: nn.Module) -> Iterator[None]:
    """Call :func:`use_channels_last_on_cpu`, and restore the usual order after the block."""
    on_cpu = use_channels_last_on_cpu(model)
    try:
        yield
    finally:
        if on_cpu:
            model.to(memory_format=torch.contiguous_format)


def compile_dense_parts(model: nn.Module, backend: str = "inductor") -> None:
    """
    Have `torch.compile` compile the parts of a Mask R-CNN that are only layers: backbone, RPN head,
    and the heads over regions. They are compiled when they are first called.

    The code between them, which selects boxes and masks, depends on data and is not compiled. Names
    in the state dict do not change.

    Images of another size do not cause another compilation. The heads over regions are compiled
    once for two or more regions, once for one region and once for none. On a CPU, mask head and
    mask IoU head are also compiled separately for fewer than 16 regions, for which PyTorch's
    convolutions may use another library. So a part is compiled at most four times.

    Args:
        backend: the backend of `torch.compile`.
    """
    for path in ("backbone", "proposal_generator.rpn_head", "roi_heads.box_head"):
        for part in _parts(model, path):
            part.compile(dynamic=True, backend=backend)
    for path in ("roi_heads.mask_head", "roi_heads.mask_iou_head"):
        for part in _parts(model, path):
            if not hasattr(part, "layers"):  # a mask head that samples features itself
                continue
            # A partial of a function that pickle finds: copies bind it to their own part
            part.layers = partial(_compiled_layers, part, backend)


def _compiled_layers(part: Any, backend: Any, *inputs: torch.Tensor) -> torch.Tensor:
    return _compiled(type(part).layers, backend)(part, *inputs)


@cache
def _compiled(function: Callable, backend: Any) -> Callable:
    return torch.compile(function, dynamic=True, backend=backend)


def _parts(model: nn.Module, path: str) -> list[Any]:
    """The submodule at a path: several for a Cascade's box heads, none if it is missing."""
    part: Any = model
    for name in path.split("."):
        part = getattr(part, name, None)
    if part is None:
        return []
    return list(part) if isinstance(part, nn.ModuleList) else [part]
