"""Predictions as lines of JSON in a stream, for pipes."""

from collections.abc import Sequence
from typing import IO

from ..predictions import PredictedImage
from .records import line_of, record_of

__all__ = ["JsonLines"]


class JsonLines:
    """Writes a line for each image, the same as in "predictions.jsonl" of :class:`OutputFolder`."""

    def __init__(self, stream: IO[bytes], class_names: Sequence[str]):
        """
        Args:
            stream: such as `sys.stdout.buffer`.
            class_names: index of a class -> its name.
        """
        self._stream, self._class_names = stream, class_names

    def write(self, image: PredictedImage) -> None:
        ids = range(1, len(self._class_names) + 1)
        self._stream.write(line_of(record_of(image, self._class_names, ids)))
        self._stream.flush()  # the next command in the pipe goes on with this image
