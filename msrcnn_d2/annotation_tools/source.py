"""What to convert, what a reader says about it, and how the files in it are read."""

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from msrcnn_d2_runtime.inputs import IMAGE_SUFFIXES

from ..dataset_check.images import look_at_images
from ..utils.errors import UserError
from .shapes import Part, Size

__all__ = [
    "AnnotatedImage",
    "Source",
    "files_in",
    "images_in",
    "open_image",
    "read_ids",
    "read_text",
]


@dataclass
class AnnotatedImage:
    """
    Attributes:
        file_name: path of its file in the folder of images.
        size: height and width in pixels.
        objects: the class and the parts of each object.
    """

    file_name: str
    size: Size
    objects: list[tuple[str, list[Part]]] = field(default_factory=list)


@dataclass
class Source:
    """
    What to convert, and what a reader says about it.

    Attributes:
        path: the file or folder.
        images: the folder of images, if it was given.
        subset: name of the part to read, if one was given.
        attribute: of VIA's regions, the one that is the class; see `via.CLASS_ATTRIBUTES`.
        class_names: those that were given, in the order of their numbers; a reader adds the tool's
            own, if it knows their order and none were given.
        skipped: a sentence for each thing that is left out.
        reading: the file that is read now, for messages about what is wrong with it.
    """

    path: Path
    images: Path | None = None
    subset: str | None = None
    attribute: str | None = None
    class_names: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    reading: Path | None = None

    @property
    def folder(self) -> Path:
        """The path, or of a file its folder."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def root(self) -> Path:
        """The folder that names of images start at."""
        return self.images or self.folder

    def skip(self, place: object, reason: str) -> None:
        self.skipped.append(f"{place}: {reason}")

    def name_of(self, *candidates: Path) -> str:
        """The name, in the folder of images, of the first file that is there, else of the first."""
        found = next((path for path in candidates if path.is_file()), candidates[0])
        return Path(os.path.relpath(found, self.root)).as_posix()

    def sizes(self, names: Iterable[str]) -> dict[str, Size]:
        """Sizes of image files, as they are read; those that cannot be read are left out."""
        files = look_at_images(str(self.root), names, quick=True)
        for name, file in files.items():
            if not file.size:
                self.skip(name, file.message)
        return {name: file.size for name, file in files.items() if file.size}


def files_in(source: Source, pattern: str, under: str = "") -> list[Path]:
    """The source if it is a file, else all files of a pattern below a folder in it, sorted."""
    folder = source.path / under
    found = [folder]
    if folder.is_dir():
        found = sorted(x for x in folder.rglob(pattern) if not x.name.startswith("."))
    if not found:
        raise UserError(f"There are no files {pattern} in '{folder}'.")
    return found


def images_in(folder: Path, pattern: str = "*") -> list[Path]:
    """The images in a folder, sorted, without hidden files."""
    found = (x for x in folder.glob(pattern) if x.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(x for x in found if not x.name.startswith("."))


def read_text(path: Path) -> str:
    """Empty if there is no such file: an image without objects may have none."""
    return path.read_text("utf-8-sig") if path.is_file() else ""


def open_image(data: bytes) -> Image.Image:
    """An image that a tool writes into JSON."""
    return Image.open(io.BytesIO(data))


def read_ids(
    path: Path, is_one_object: bool = False
) -> tuple[np.ndarray, dict[int, tuple[int, ...]]]:
    """
    The number of each pixel, (H, W), 0 for none, black or transparent; and the colours of numbers,
    if any. Numbers of pixels with a colour of their own are larger than all indices.
    """
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError("it has several pages")
            if image.format == "JPEG":
                if not is_one_object:
                    raise ValueError("JPEG changes numbers of objects, save it as PNG or TIFF")
                return (np.asarray(image.convert("L")) >= 128).astype(np.int64), {}
            if image.mode in ("1", "F", "I", "L", "P") or image.mode.startswith("I;"):
                palette = np.reshape((image.mode == "P" and image.getpalette()) or [], (-1, 3))
                return np.asarray(image).astype(np.int64), dict(
                    enumerate(map(tuple, palette.tolist()))
                )
            rgba = np.asarray(image.convert("RGBA")).astype(np.int64)
            codes = (rgba[..., 0] << 16) + (rgba[..., 1] << 8) + rgba[..., 2]
            codes = np.where((codes > 0) & (rgba[..., 3] > 0), codes + (1 << 24), 0)
            found = np.unique(codes).tolist()
            return codes, {x: (x >> 16 & 255, x >> 8 & 255, x & 255) for x in found}
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{path}' cannot be read as a mask: {reason}.") from None
