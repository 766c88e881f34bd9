"""Look at the files of images: are they there, whole, and of which size."""

import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Optional

from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

__all__ = ["ImageFile", "look_at_images"]

# What the last bytes of a whole file are, by the names that Pillow has for formats
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\x00\x00\x00\x00IEND\xae\x42\x60\x82"}
TURNED = (5, 6, 7, 8)  # the orientations in EXIF that exchange height and width


@dataclass(frozen=True)
class ImageFile:
    """
    Attributes:
        size: height and width in pixels, as Detectron2 reads it; None if it cannot.
        kind: of the finding, if there is something wrong; see `KINDS`.
        message: what that is.
    """

    size: Optional[tuple[int, int]] = None
    kind: Optional[str] = None
    message: str = ""


def look_at_images(
    folder: str,
    names: Iterable[str],
    quick: bool = False,
    num_workers: Optional[int] = None,
    progress: bool = True,
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

    Returns:
        for each name what its file is.
    """
    names = list(dict.fromkeys(names))
    paths = [os.path.join(folder, name) for name in names]
    pool = ThreadPoolExecutor(num_workers or os.cpu_count())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: of large images, and odd EXIF
            files = pool.map(lambda path: _look_at(path, quick), paths)
            bar = tqdm(files, "images", len(paths), disable=None if progress else True)
            return dict(zip(names, bar))
    finally:
        pool.shutdown(cancel_futures=True)


def _look_at(path: str, quick: bool) -> ImageFile:
    try:
        with open(path, "rb") as f:
            return _read(f, quick)
    except (FileNotFoundError, NotADirectoryError):
        return ImageFile(kind="image-missing", message="there is no such file")
    except IsADirectoryError:
        return ImageFile(kind="image-unreadable", message="it is a folder")
    except UnidentifiedImageError:
        return ImageFile(kind="image-unreadable", message="it is no image that Pillow knows")
    except Exception as error:  # Pillow raises whatever the damage leads to
        return ImageFile(kind="image-unreadable", message=_first_line(error))


def _read(f: IO[bytes], quick: bool) -> ImageFile:
    tail = _tail(f)
    with Image.open(f) as image:
        ends_well = tail.endswith(ENDS.get(image.format or "", b""))
        if not (quick and ends_well):
            try:
                _decode(image)
            except Exception as error:
                cut = not ends_well or "truncated" in str(error)
                kind = "image-truncated" if cut else "image-unreadable"
                return ImageFile(kind=kind, message=_first_line(error))
        width, height = image.size
        return ImageFile(size=(width, height) if _is_turned(image) else (height, width))


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


def _is_turned(image: Image.Image) -> bool:
    """Whether Detectron2 exchanges height and width when it applies the orientation."""
    try:
        # Not that of PNG, which decodes the image to find what may come after it
        exif = Image.Image.getexif(image)
    except Exception:  # so does Detectron2, which then takes the image as it is
        return False
    return exif.get(ExifTags.Base.Orientation) in TURNED


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
