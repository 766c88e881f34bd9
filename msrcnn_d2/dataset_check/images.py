"""Look at the files of images: are they there, whole, of which size and depth."""

import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from ..image_reading import (
    ImageSettings,
    NeedsSetting,
    has_16_bit_colors,
    open_image,
    refuse_unless_readable,
    without_pixel_limit,
)

__all__ = ["ImageFile", "look_at_images"]

# What the last bytes of a whole file are, by the names that Pillow has for formats
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\x00\x00\x00\x00IEND\xae\x42\x60\x82"}
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes
TURNED = (5, 6, 7, 8)  # the orientations in EXIF that exchange height and width


@dataclass(frozen=True)
class ImageFile:
    """
    Attributes:
        size: height and width in pixels, as it is read; None if it cannot be.
        kind: of the finding, if there is something wrong; see `KINDS`.
        message: what that is.
        orientation: from EXIF; 1 if there is none.
        is_turned: whether it is read as the orientation says, or as it is stored.
        other_size: height and width if it were read the other way.
    """

    size: tuple[int, int] | None = None
    kind: str | None = None
    message: str = ""
    orientation: int = 1
    is_turned: bool = False
    other_size: tuple[int, int] | None = None


def look_at_images(
    folder: str,
    names: Iterable[str],
    quick: bool = False,
    num_workers: int | None = None,
    progress: bool = True,
    settings: ImageSettings | None = None,
) -> dict[str, ImageFile]:
    """
    Args:
        folder: that of the images.
        names: of their files in it.
        quick: to read the headers only. Of JPEG and PNG the end of the file is looked at as well,
            and the file is decoded if that is not as it has to be.
        num_workers: threads; by default as many as there are cores. Pillow decodes without holding
            up the others.
        progress: whether to show a bar, where there is a terminal.
        settings: how images are read.

    Returns:
        for each name what its file is.
    """
    names = list(dict.fromkeys(names))
    settings = settings or ImageSettings()
    paths = [os.path.join(folder, name) for name in names]
    pool = ThreadPoolExecutor(num_workers or os.cpu_count())
    try:
        with warnings.catch_warnings(), without_pixel_limit():
            warnings.simplefilter("ignore")  # of Pillow: of large images, and odd EXIF
            files = pool.map(lambda path: _look_at(path, quick, settings), paths)
            bar = tqdm(files, "images", len(paths), disable=None if progress else True)
            return dict(zip(names, bar))
    finally:
        pool.shutdown(cancel_futures=True)


def _look_at(path: str, quick: bool, settings: ImageSettings) -> ImageFile:
    try:
        with open(path, "rb") as f:
            return _read(f, quick, settings)
    except (FileNotFoundError, NotADirectoryError):
        return ImageFile(kind="image-missing", message="there is no such file")
    except IsADirectoryError:
        return ImageFile(kind="image-unreadable", message="it is a folder")
    except UnidentifiedImageError:
        return ImageFile(kind="image-unreadable", message=_unknown(path))
    except NeedsSetting as error:
        return ImageFile(kind=error.kind, message=str(error))
    except Exception as error:  # Pillow raises whatever the damage leads to
        return ImageFile(kind="image-unreadable", message=_first_line(error))


def _unknown(path: str) -> str:
    with open(path, "rb") as f:
        is_tiff = f.read(4) in TIFF
    if is_tiff:
        return (
            "Pillow reads no TIFF of this kind, such as one of several float, 32-bit or over four "
            "channels: convert it to 8 bits, or to a single channel"
        )
    return "it is no image that Pillow knows"


def _read(f: IO[bytes], quick: bool, settings: ImageSettings) -> ImageFile:
    tail = _tail(f)
    with open_image(f, settings) as image:
        problem = _problem(image, settings)  # before the image is decoded
        ends_well = tail.endswith(ENDS.get(image.format or "", b""))
        if not (quick and ends_well):
            try:
                _decode(image)
            except Exception as error:
                cut = not ends_well or "truncated" in str(error)
                kind = "image-truncated" if cut else "image-unreadable"
                return ImageFile(kind=kind, message=_first_line(error))
        width, height = image.size
        orientation = _orientation(image)
        stored = (height, width)
        turned = (width, height) if orientation in TURNED else stored
        sizes = (turned, stored) if settings.apply_exif else (stored, turned)
        is_turned = settings.apply_exif and orientation != 1
        return ImageFile(sizes[0], *problem, orientation, is_turned, sizes[1])


def _problem(image: Image.Image, settings: ImageSettings) -> tuple[str | None, str]:
    """Kind and message of a finding about the depth of an image, if there is one."""
    try:
        refuse_unless_readable(image, settings)
    except NeedsSetting as error:
        return error.kind, str(error)
    if has_16_bit_colors(image) and not settings.has_scale:
        return "image-16-bits", f"it has 16 bits per channel (mode {image.mode})"
    return None, ""


def _tail(f: IO[bytes]) -> bytes:
    longest = max(map(len, ENDS.values()))
    f.seek(max(0, f.seek(0, os.SEEK_END) - longest))
    tail = f.read()
    f.seek(0)
    return tail


def _decode(image: Image.Image) -> None:
    """As Detectron2 does, which converts all to RGB."""
    image.load()
    if image.mode != "RGB":
        image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        # Not that of PNG, which decodes the image to find what may come after it
        exif = Image.Image.getexif(image)
    except Exception:  # so does Detectron2, which then takes the image as it is
        return 1
    orientation = exif.get(ExifTags.Base.Orientation)
    return orientation if orientation in range(2, 9) else 1  # type: ignore[return-value]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
