"""A batch of a loader as plain containers and tensors, which can be read back without trust."""

from typing import Any

import numpy as np
import torch

from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

__all__ = ["from_plain", "to_plain"]

KIND = "structure"
TENSOR_STRUCTURES = {x.__name__: x for x in (BitMasks, Boxes, Keypoints)}


def to_plain(value: Any) -> Any:
    """
    Args:
        value: mapped dataset dicts, or a part of them.

    Returns:
        the same in dicts, lists, numbers, strings and tensors on the CPU. What it does not know is
        its `repr`.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.as_tensor(value)
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(x) for x in value]
    if isinstance(value, Instances):
        fields = to_plain(value.get_fields())
        return {KIND: "Instances", "image_size": list(value.image_size), "fields": fields}
    if isinstance(value, PolygonMasks):
        return {KIND: "PolygonMasks", "polygons": to_plain(value.polygons)}
    if type(value).__name__ in TENSOR_STRUCTURES:
        return {KIND: type(value).__name__, "tensor": to_plain(value.tensor)}
    return repr(value)


def from_plain(value: Any) -> Any:
    """What :func:`to_plain` was given; tuples come back as lists."""
    if isinstance(value, list):
        return [from_plain(x) for x in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    if kind == "Instances":
        height, width = value["image_size"]
        return Instances((height, width), **from_plain(value["fields"]))
    if kind == "PolygonMasks":
        return PolygonMasks([[p.numpy() for p in polygons] for polygons in value["polygons"]])
    if kind in TENSOR_STRUCTURES:
        return TENSOR_STRUCTURES[kind](value["tensor"])
    return {k: from_plain(v) for k, v in value.items()}
