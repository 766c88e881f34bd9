"""Convert what annotation tools write to COCO's format, where no library does it well."""

from .convert import Converted, convert_annotations
from .formats import FORMATS

__all__ = ["FORMATS", "Converted", "convert_annotations"]
