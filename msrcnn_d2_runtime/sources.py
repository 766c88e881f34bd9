"""What images are read from."""

import os
from collections.abc import Callable, Iterator

import numpy as np

from .image_reading import ImageSettings

__all__ = ["Reader", "Source", "printable"]

# Reads an image: uint8 (H, W, 3), BGR
Reader = Callable[[], np.ndarray]


class Source:
    """
    Something that has images: one, or many as a video does.

    Attributes:
        name: POSIX path that its outputs are called by, unique in a run.
        location: the file or URL.
    """

    name: str
    location: str

    @property
    def num_images(self) -> int:
        """How many images it has, maybe estimated."""
        return 1

    def images(self, settings: ImageSettings) -> Iterator[tuple[str, Reader]]:
        """
        Yields:
            name and reader of each image, in order. A reader may be called in another thread, while
            the next image is asked for, or not at all.
        """
        raise NotImplementedError


def printable(path: str) -> str:
    """A path in which bytes that are no text, as names of files can have, are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")
