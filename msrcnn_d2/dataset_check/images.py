"""Check the images of a dataset: whether files are there and whole, and their size and depth."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from msrcnn_d2_runtime.image_reading import (
    ImageSettings,
    NeedsSetting,
    has_16_bit_colors,
    open_image,
    orientation_of,
    refuse_unless_readable,
    without_pixel_limit,
)

from ..coco_format import Entries, Report, said, sides_of

__all__ = ["ImageFile", "check_images", "look_at_images"]

# The last bytes of a whole file, by Pillow's names of formats
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\x00\x00\x00\x00IEND\xae\x42\x60\x82"}
# What Label Studio puts before the name of an uploaded file
UPLOAD_PREFIX = re.compile("^[0-9a-f]{8}-")
TURNED = (5, 6, 7, 8)  # the orientations in EXIF that exchange height and width

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class ImageFile:
    """
    Attributes:
        size: height and width in pixels, as the image is read; None if it cannot be read.
        kind: kind of the finding, if something is wrong with the file; see `KINDS`.
        message: message of the finding.
        orientation: from EXIF; 1 if there is none.
        is_turned: whether the image is turned as the orientation says, or read as it is stored.
        other_size: height and width if it were read the other way.
        other_name: if there is no such file, the name of the one in the folder that is meant.
        other: that file.
    """

    size: Size | None = None
    kind: str | None = None
    message: str = ""
    orientation: int = 1
    is_turned: bool = False
    other_size: Size | None = None
    other_name: str | None = None
    other: "ImageFile | None" = None


def check_images(
    entries: Entries, images: list, files: dict[str, ImageFile] | None, report: Report
) -> None:
    """
    Check file names and image files, and whether images have annotations.

    Args:
        images: the images of the file.
        files: from :func:`look_at_images`; None to leave them out.
    """
    names: set[str] = set()
    readable: dict[int, ImageFile] = {}
    for k, image in enumerate(images):
        if not isinstance(image, dict):
            continue
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            report("images", k, "image-file-name", f"the file name is {said(image, 'file_name')}")
            continue
        if name in names:
            report("images", k, "image-file-twice", "an image before it has the same file")
        names.add(name)
        if files is None:
            continue
        file, size = files[name], sides_of(image)
        if file.kind:
            report("images", k, file.kind, file.message)
        if size and file.size:
            readable[k] = file
            if size not in (file.size, file.other_size):
                report("images", k, "image-size", _size_message(file.size, size))
    _check_orientations(entries, readable, report)
    used = set(entries.image_of.tolist())
    for k in entries.image_index.values():
        if k not in used:
            report("images", k, "image-empty", "it has no annotations")


def _check_orientations(entries: Entries, files: dict[int, ImageFile], report: Report) -> None:
    """
    Find annotations that treat the orientation in EXIF in another way than images are read.

    Annotations describe images either as stored or as EXIF turns them. A file does it in one way
    for all images, so the majority of the images whose size shows the way decides.

    Args:
        files: those that can be read, by the place of the image.
    """
    fits_now: list[int] = []
    fits_other: list[int] = []
    unclear: list[int] = []
    sizes = {k: sides_of(entries.images[k]) for k in files}
    for k, file in files.items():
        if file.orientation != 1 and sizes[k] in (file.size, file.other_size):
            if file.size == file.other_size:
                unclear.append(k)
            else:
                (fits_now if sizes[k] == file.size else fits_other).append(k)
    decided = bool(fits_other) and len(fits_other) >= len(fits_now)
    for k in fits_other:
        message = _size_message(files[k].size, sizes[k])
        if decided:
            report("images", k, "image-orientation", f"{message}; {_advice(files[k])}")
        else:
            report("images", k, "image-size", message)
    for k in unclear:
        if decided:
            message = f"its size does not tell, but that of other images does; {_advice(files[k])}"
            report("images", k, "image-orientation", message)
        elif not fits_now:
            message = f"its orientation is {files[k].orientation}"
            report("images", k, "image-orientation-unclear", message)


def _size_message(size: Size | None, expected: Size | None) -> str:
    found, said_ = ("{1} x {0}".format(*x or ("?", "?")) for x in (size, expected))
    return f"it has {found} pixels (width x height), the annotations say {said_}"


def _advice(file: ImageFile) -> str:
    read, meant = ("turned", "stored") if file.is_turned else ("stored", "turned")
    return (
        f"it is read as {read} (orientation {file.orientation} in EXIF), and the annotations are "
        f"of the image as {meant}: set dataloader.images.apply_exif={not file.is_turned} (yaml: "
        f"INPUT.APPLY_EXIF {not file.is_turned})"
    )


def look_at_images(
    folder: str,
    names: Iterable[str],
    quick: bool = False,
    num_workers: int | None = None,
    progress: bool = True,
    settings: ImageSettings | None = None,
) -> dict[str, ImageFile]:
    """
    Read image files.

    Args:
        folder: the folder of the images.
        names: names of their files in it.
        quick: whether to read only the headers, and of JPEG and PNG the ends, which show whether a
            file is whole. A file that does not end as it should is decoded.
        num_workers: threads; by default as many as there are cores. Pillow decodes in parallel.
        progress: whether to show a progress bar, if there is a terminal.
        settings: how images are read.
    """
    names = list(dict.fromkeys(names))
    settings = settings or ImageSettings()
    pool = ThreadPoolExecutor(num_workers or os.cpu_count())
    try:
        with warnings.catch_warnings(), without_pixel_limit():
            warnings.simplefilter("ignore")  # Pillow's, about large images and odd EXIF
            looked_at = pool.map(lambda name: _look_at(folder, name, quick, settings), names)
            bar = tqdm(looked_at, "images", len(names), disable=None if progress else True)
            files = dict(zip(names, bar))
    finally:
        pool.shutdown(cancel_futures=True)
    # A file that may be that of several images is that of none
    uses = Counter([*names, *(file.other_name for file in files.values() if file.other_name)])
    for name, file in files.items():
        if file.other_name and uses[file.other_name] > 1:
            message = f"there is no such file, and '{file.other_name}' may be that of others, too"
            files[name] = ImageFile(kind="image-missing", message=message)
    return files


def _look_at(folder: str, name: str, quick: bool, settings: ImageSettings) -> ImageFile:
    try:
        with open(os.path.join(folder, name), "rb") as f:
            return _read(f, quick, settings)
    except (FileNotFoundError, NotADirectoryError):
        base = re.split(r"[/\\]", name)[-1]  # Windows' paths, too
        for other in (base, UPLOAD_PREFIX.sub("", base, count=1)):
            if other and other != name and os.path.isfile(os.path.join(folder, other)):
                message = f"there is no such file, but there is '{other}'"
                found = _look_at(folder, other, quick, settings)
                return ImageFile(
                    kind="image-renamed", message=message, other_name=other, other=found
                )
        return ImageFile(kind="image-missing", message="there is no such file")
    except IsADirectoryError:
        return ImageFile(kind="image-unreadable", message="it is a folder")
    except UnidentifiedImageError:
        message = (
            "Pillow does not know the format (a TIFF with several float or 32-bit channels, or "
            "with more than four channels, must be converted to 8 bits or to a single channel)"
        )
        return ImageFile(kind="image-unreadable", message=message)
    except NeedsSetting as error:
        return ImageFile(kind=error.kind, message=str(error))
    except Exception as error:  # Pillow raises whatever the damage leads to
        return ImageFile(kind="image-unreadable", message=_first_line(error))


def _read(f: IO[bytes], quick: bool, settings: ImageSettings) -> ImageFile:
    f.seek(max(0, f.seek(0, os.SEEK_END) - max(map(len, ENDS.values()))))
    tail = f.read()
    f.seek(0)
    with open_image(f, settings) as image:
        kind, message = _depth_problem(image, settings)  # before the image is decoded
        ends_well = tail.endswith(ENDS.get(image.format or "", b""))
        if not (quick and ends_well):
            try:
                image.load()
                if image.mode != "RGB":  # Detectron2 converts all to RGB
                    image.convert("RGB")
            except Exception as error:
                is_cut = not ends_well or "truncated" in str(error)
                kind = "image-truncated" if is_cut else "image-unreadable"
                return ImageFile(kind=kind, message=_first_line(error))
        width, height = image.size
        orientation = orientation_of(image, may_decode=False)
        stored = (height, width)
        turned = (width, height) if orientation in TURNED else stored
        size, other = (turned, stored) if settings.apply_exif else (stored, turned)
        is_turned = settings.apply_exif and orientation != 1
        return ImageFile(size, kind, message, orientation, is_turned, other)


def _depth_problem(image: Image.Image, settings: ImageSettings) -> tuple[str | None, str]:
    """Kind and message of a finding about the depth of an image, if there is one."""
    try:
        refuse_unless_readable(image, settings)
    except NeedsSetting as error:
        return error.kind, str(error)
    if has_16_bit_colors(image) and not settings.has_scale:
        return "image-16-bits", f"it has 16 bits per channel (mode {image.mode})"
    return None, ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
