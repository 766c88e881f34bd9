"""The formats of annotation tools, each with the function that reads it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .label_studio import read_label_studio
from .labelme import read_labelme
from .mask_images import read_mask_images
from .source import AnnotatedImage, Source
from .supervisely import read_supervisely
from .via import read_via
from .voc import read_voc
from .yolo import read_yolo

__all__ = ["FORMATS", "Format"]


@dataclass(frozen=True)
class Format:
    """
    Attributes:
        read: what it says about a source is in order; it raises what wrong contents lead to.
        tool: name of the tool.
        is_file: whether the source is a file; None if it may be either.
    """

    read: Callable[[Source], Iterator[AnnotatedImage]]
    tool: str
    is_file: bool | None = False


FORMATS = {
    "labelme": Format(read_labelme, "LabelMe", None),
    "via": Format(read_via, "VIA", True),
    "label-studio": Format(read_label_studio, "Label Studio", True),
    "supervisely": Format(read_supervisely, "Supervisely"),
    "yolo": Format(read_yolo, "YOLO", None),
    "voc": Format(read_voc, "Pascal VOC"),
    "masks": Format(read_mask_images, "a program for masks"),
}
