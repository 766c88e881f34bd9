"""Masks may be polygons or RLE, and Detectron2 has to be told which."""

import logging
from collections.abc import Callable, Iterable

__all__ = ["fit_mask_format"]

logger = logging.getLogger(__name__)


def fit_mask_format(mapper: Callable, dataset: Iterable[dict]) -> None:
    """
    Set the `instance_mask_format` of a `DatasetMapper` to "bitmask" if there are objects whose mask
    is RLE: as polygons, its default, they cannot be read. A mapper without it is left alone.

    Args:
        dataset: dataset dicts. Crowds do not count, since training leaves them out.
    """
    mapper = getattr(mapper, "_obj", mapper)  # inside Detectron2's PicklableWrapper
    if getattr(mapper, "instance_mask_format", None) != "polygon":
        return
    if any(_is_rle(a) for d in dataset for a in d.get("annotations", ())):
        mapper.instance_mask_format = "bitmask"  # type: ignore
        logger.info("There are masks in run-length encoding: all are trained on as bitmasks.")


def _is_rle(annotation: dict) -> bool:
    return isinstance(annotation.get("segmentation"), dict) and not annotation.get("iscrowd")
