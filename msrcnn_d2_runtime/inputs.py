"""Find the images and videos that are asked for: files, folders, patterns, lists, addresses."""

import glob
import hashlib
import io
import os
import posixpath
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
from PIL import UnidentifiedImageError

from .errors import UserError
from .image_reading import (
    ImageLike,
    ImageSettings,
    open_image,
    picture_formats,
    read_bgr_image,
    to_rgb,
)
from .sources import Reader, Source, printable
from .text import listed, plural
from .video import VIDEO_SUFFIXES, VideoSource

__all__ = [
    "IMAGE_SUFFIXES",
    "FoundInputs",
    "ImageInMemory",
    "ImageSource",
    "download",
    "find_inputs",
]

# What is taken from folders and by patterns; a file that is named is always tried
IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff "
    ".webp".split()
)
SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
RESULTS = {"run.json", "predictions.jsonl"}  # what is in each folder that OutputFolder has written
STANDARD_INPUT = "-"
MAX_NAME_BYTES = 200  # files have up to 255, and results add suffixes such as ".png.incomplete"
TIMEOUT = 30.0  # seconds without any data
MAX_SECONDS = 300.0  # of a download
MAX_BYTES = 2**28  # of a download
CHUNK = 2**16


@dataclass
class ImageSource(Source):
    """A file or a URL with one image."""

    name: str
    location: str

    def images(self, settings: ImageSettings) -> Iterator[tuple[str, Reader]]:
        yield self.name, lambda: self.read(settings)

    def read(self, settings: ImageSettings) -> np.ndarray:
        """
        Returns:
            uint8 (H, W, 3), BGR.

        Raises:
            UserError: it cannot be read or downloaded.
        """
        if not _is_url(self.location):
            return read_bgr_image(self.location, settings)
        data = download(self.location)
        try:
            with open_image(io.BytesIO(data), settings, picture_formats()) as image:
                return np.asarray(to_rgb(image, settings))[:, :, ::-1]
        except UnidentifiedImageError:
            raise UserError(f"'{self.location}' is not an image that can be read.") from None
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises each of them
            raise UserError(f"Image '{self.location}' cannot be read ({error}).") from error


@dataclass
class ImageInMemory(Source):
    """A PIL image, or an array as :func:`read_bgr_image` takes it."""

    name: str
    image: ImageLike

    def __post_init__(self) -> None:
        self.location = f"image {self.name} in memory"  # to tell it from others in messages

    def images(self, settings: ImageSettings) -> Iterator[tuple[str, Reader]]:
        yield self.name, lambda: read_bgr_image(self.image, settings)


@dataclass(frozen=True)
class FoundInputs:
    """
    Attributes:
        sources: without repetitions, in the order of the inputs; folders are sorted.
        num_ignored: files that are no images by their suffixes, in folders and by patterns.
    """

    sources: list[Source]
    num_ignored: int


@dataclass(frozen=True)
class _Found:
    """
    Attributes:
        location: to open.
        root: the folder that was given, or that of the file; of a URL with the server.
        relative: POSIX path below it.
    """

    location: str
    root: str
    relative: str


def find_inputs(
    inputs: Iterable[str | os.PathLike],
    *,
    standard_input: IO[bytes] | None = None,
    without: str | os.PathLike | None = None,
    stride: int = 1,
) -> FoundInputs:
    """
    Args:
        inputs: each is a file; a folder, with its subfolders; a pattern such as
            ``photos/**/*.jpg``; an address that begins with "http://" or "https://"; or "-" for a
            list of these, one in each line (or separated by NUL, as `find -print0` writes it), from
            `standard_input`.
        without: a folder that is left out, such as the one that results are written to.
        stride: every so many frames of a video are read.

    Returns:
        their images and videos. The name of one is its path in the folder that was given, or below
        the part of a pattern before the first wildcard; that of a file is its own. If two inputs
        then have equal names, all names begin with folders that tell the inputs apart. Hidden files
        and folders are left out, and in folders also the results of earlier runs.

    Raises:
        UserError: an input does not exist, cannot be read, or has no image.
    """
    given: list[str] = []
    for x in inputs:
        path = os.fspath(x)
        if path == STANDARD_INPUT and standard_input is not None:
            given += _lines(standard_input)
        else:
            given.append(path)
    if not given:
        raise UserError("There are no inputs: the list on standard input is empty.")
    excluded = None if without is None else os.path.realpath(without)
    found: dict[str, _Found] = {}
    missing = []
    ignored: set[str] = set()
    for value in given:
        others: list[str] = []
        if _is_url(value):
            images = [_of_url(value)]
        elif re.match(r"[A-Za-z][\w+.-]+://", value):
            raise UserError(
                f"Input '{printable(value)}' is neither a file nor an address with http:// or "
                "https://."
            )
        elif os.path.isdir(value):
            if os.path.realpath(value) == excluded:
                raise UserError(
                    f"Folder '{printable(value)}' is the one that results are written to: give "
                    "another one for them."
                )
            images, others = _in_folder(value, value, excluded)
            if not images:
                note = f", only {plural(len(others), 'other file')}" if others else ""
                raise UserError(f"Folder '{printable(value)}' has no images{note}.")
        elif os.path.exists(value):
            images = [_Found(value, *os.path.split(value))]
        elif glob.has_magic(value):
            images, others = _matching(value, excluded)
            if not images:
                note = ": only other files do" if others else ""
                raise UserError(f"No image matches '{printable(value)}'{note}.")
        else:
            missing.append(f"'{printable(value)}'")
            continue
        ignored.update(map(os.path.abspath, others))
        for image in images:
            place = image.location
            found.setdefault(place if _is_url(place) else os.path.abspath(place), image)
    if missing:
        raise UserError(f"Not found: {listed(missing)}.")
    unique = list(found.values())
    sources: list[Source] = []
    for name, place in zip(_names(unique), [x.location for x in unique]):
        if _suffix(place) not in VIDEO_SUFFIXES:
            sources.append(ImageSource(name, place))
        elif not _is_url(place):
            sources.append(VideoSource(name, place, stride))
        else:
            raise UserError(f"Video '{printable(place)}' is on a server: download it first.")
    return FoundInputs(sources, len(ignored))


def _lines(file: IO[bytes]) -> list[str]:
    data = file.read()
    separator = b"\0" if b"\0" in data else b"\n"
    return [os.fsdecode(x.rstrip(b"\r")) for x in data.split(separator) if x.strip()]


def _in_folder(folder: str, root: str, excluded: str | None) -> tuple[list[_Found], list[str]]:
    """
    Returns:
        the images in a folder and its subfolders, sorted, and the paths of other files.
    """
    images, others = [], []
    seen = set()  # links to folders are followed, but not in circles
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or real == excluded or (place != folder and RESULTS <= {*files}):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        for file in sorted(x for x in files if not x.startswith(".")):
            path = os.path.join(place, file)
            if _suffix(file) in SUFFIXES:
                images.append(_Found(path, root, os.path.relpath(path, root)))
            else:
                others.append(path)
    return images, others


def _refuse(error: OSError) -> None:
    raise UserError(
        f"Folder '{printable(str(error.filename))}' cannot be read ({error.strerror})."
    ) from error


def _matching(pattern: str, excluded: str | None) -> tuple[list[_Found], list[str]]:
    """The images that match a pattern or lie in a folder that does, and other files that do."""
    parts = pattern.split(os.sep)
    first = next(k for k, part in enumerate(parts) if glob.has_magic(part))
    root = os.sep.join(parts[:first]) or (os.sep if pattern.startswith(os.sep) else "")
    images, others = [], []
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(path):
            if "**" in parts and parts[-1] in ("*", "**"):  # which match the files in it, too
                continue
            in_folder, others_there = _in_folder(path, root or ".", excluded)
            images += in_folder
            others += others_there
        elif excluded and os.path.realpath(path).startswith(os.path.join(excluded, "")):
            continue
        elif _suffix(path) in SUFFIXES:
            images.append(_Found(path, root, os.path.relpath(path, root or ".")))
        else:
            others.append(path)
    return images, others


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


# ---- names


def _names(found: Sequence[_Found]) -> list[str]:
    """A name for each, different from all others, which is a POSIX path without ".."."""
    relative = [_safe(x.relative) for x in found]
    names = relative
    roots = [_parts(x.root if "://" in x.root else os.path.abspath(x.root)) for x in found]
    longest = max(map(len, roots))
    for length in range(1, longest + 1):
        if len(set(names)) == len(names):
            return names
        names = ["/".join([*root[-length:], x]) for root, x in zip(roots, relative)]
    # Some characters were replaced, so that names became equal
    taken: set[str] = set()
    for k, name in enumerate(names):
        stem, suffix = posixpath.splitext(name)
        number = 2
        while names[k] in taken:
            names[k] = f"{stem}-{number}{suffix}"
            number += 1
        taken.add(names[k])
    return names


def _parts(path: str) -> list[str]:
    return _safe(path.replace("://", "/")).split("/")


def _safe(path: str) -> str:
    """A relative POSIX path that leads nowhere else, and that the files of an image can have."""
    parts = printable(path).replace(os.sep, "/").split("/")
    # Names on the web may have what names of files cannot
    parts = [re.sub(r"[\x00-\x1f\x7f]", "_", x) for x in parts if x not in ("", ".")]
    return "/".join("_" if x == ".." else _shortened(x) for x in parts)


def _shortened(name: str) -> str:
    """A name that is as long as files allow leaves no room for the suffixes of the results."""
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    stem, suffix = os.path.splitext(name)
    end = f"~{_digest(name)}{suffix if len(suffix.encode()) < 20 else ''}"
    return stem.encode()[: MAX_NAME_BYTES - len(end.encode())].decode(errors="ignore") + end


def _digest(text: str) -> str:
    """Tells names apart."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]


# ---- the web


def _is_url(path: str) -> bool:
    return re.match(r"https?://", path, re.IGNORECASE) is not None


def _of_url(url: str) -> _Found:
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise UserError(f"'{printable(url)}' is not an address ({error}).") from None
    if "@" in parts.netloc:  # and say nothing of a password
        raise UserError(
            f"Addresses with a user name, here of {host}, are not supported: download "
            "the image first."
        )
    folder, name = posixpath.split(parts.path)
    # The names of others may differ in their query only
    stem, suffix = os.path.splitext(unquote(name).replace("/", "_") or "index")
    if parts.query:
        stem += f"-{_digest(parts.query)}"
    return _Found(url, f"{parts.scheme}://{host or ''}{unquote(folder)}", stem + suffix)


class _WebOnly(HTTPRedirectHandler):
    """Follows no server to other protocols, nor from an encrypted to an open connection."""

    def redirect_request(  # type: ignore[override]
        self, request: Request, fp: Any, code: int, message: str, headers: Any, url: str
    ) -> Request | None:
        scheme = urlsplit(url).scheme
        if scheme not in ("http", "https") or (request.type == "https" and scheme == "http"):
            raise URLError(f"it redirects to {scheme}://, which is not followed")
        return super().redirect_request(request, fp, code, message, headers, url)


def download(url: str, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS) -> bytes:
    """
    Args:
        url: with "http://" or "https://".
        max_bytes, max_seconds: more is not loaded.

    Returns:
        what is there.

    Raises:
        UserError: it cannot be loaded.
    """
    deadline = time.monotonic() + max_seconds
    try:
        parts = urlsplit(url)
        host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
        path, query = (quote(x, safe="/%:=&?+,;@!$'()*~[]") for x in (parts.path, parts.query))
        request = Request(
            urlunsplit((parts.scheme, host, path, query, "")), headers={"User-Agent": "msrcnn-d2"}
        )
        data = bytearray()
        with build_opener(_WebOnly).open(request, timeout=TIMEOUT) as answer:
            expected = answer.length  # of the body, if the server says it
            while chunk := answer.read1(CHUNK):
                data += chunk
                if len(data) > max_bytes:
                    raise URLError(f"it has more than {max_bytes:,} bytes")
                if time.monotonic() > deadline:
                    raise URLError(f"it takes longer than {max_seconds:g} seconds")
        if expected is not None and len(data) < expected:
            raise URLError(f"the connection ended after {len(data):,} of {expected:,} bytes")
        return bytes(data)
    except (OSError, ValueError, HTTPException) as error:
        shown = re.sub("//[^/]*@", "//", url)  # without a user's password
        raise UserError(f"Cannot download '{shown}' ({_what_failed(error)}).") from error


def _what_failed(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {(str(error.reason).splitlines() or [''])[0]}"
    if isinstance(error, URLError):
        return str(error.reason)
    return str(error) or type(error).__name__
