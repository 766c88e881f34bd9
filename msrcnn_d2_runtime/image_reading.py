"""Read images in one way for training, evaluation, prediction, checks and reports."""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import UserError

__all__ = [
    "IMAGE_KEYS",
    "ImageSettings",
    "NeedsSetting",
    "open_image",
    "orientation_of",
    "picture_formats",
    "read_bgr_image",
    "refuse_unless_readable",
    "scaled_to_8_bits",
    "to_rgb",
    "without_pixel_limit",
]

# The keys in dataloader.images of a LazyConfig, each with its yaml key and its default
IMAGE_KEYS: dict[str, tuple[str, Any]] = {
    "intensity_range": ("INPUT.INTENSITY_RANGE", None),
    "intensity_percentiles": ("INPUT.INTENSITY_PERCENTILES", None),
    "apply_exif": ("INPUT.APPLY_EXIF", True),
    "max_pixels": ("INPUT.MAX_IMAGE_PIXELS", None),
}
# EXIF orientation -> what turns the stored image into what the camera saw
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ImageLike = np.ndarray | Image.Image | str | os.PathLike
# Those of photographs and microscopes. Pillow knows more, some of which run other programs: for an
# EPS file Ghostscript, which is a programming language
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
FULL_RANGE = (0.0, 65535.0)  # of 16 bits, where the upper 8 bits are the scaled value


@dataclass(frozen=True)
class ImageSettings:
    """
    How images are read.

    Attributes:
        intensity_range: the two values that become 0 and 255 in images with more than 8 bits per
            pixel. Values between them are scaled linearly and rounded, values outside are clipped,
            and NaN becomes 0.
        intensity_percentiles: the same two values as percentiles, from 0 to 100, of the finite
            values of each image.
        apply_exif: whether to turn images as the orientation in their EXIF data says.
        max_pixels: the largest image to read; None for twice Pillow's MAX_IMAGE_PIXELS.

    Raises:
        UserError: a value is wrong, or range and percentiles are both given.
    """

    intensity_range: tuple[float, float] | None = None
    intensity_percentiles: tuple[float, float] | None = None
    apply_exif: bool = True
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for key in ("intensity_range", "intensity_percentiles"):
            object.__setattr__(self, key, _pair(key, getattr(self, key)))
        low, high = self.intensity_percentiles or (0, 100)
        if low < 0 or high > 100:
            raise _wrong("intensity_percentiles", [low, high], "percentiles from 0 to 100")
        if self.intensity_range and self.intensity_percentiles:
            raise UserError(
                "Images can be scaled by a range or by percentiles, not by both: set one of "
                f"{_both_keys('intensity_range')} and {_both_keys('intensity_percentiles')}."
            )
        if not isinstance(self.apply_exif, bool):
            raise _wrong("apply_exif", self.apply_exif, "True or False")
        limit = self.max_pixels
        if limit is not None and (type(limit) is not int or limit < 1):
            raise _wrong("max_pixels", limit, "a positive whole number")

    @property
    def has_scale(self) -> bool:
        return bool(self.intensity_range or self.intensity_percentiles)

    @property
    def pixel_limit(self) -> float:
        if self.max_pixels is not None:
            return self.max_pixels
        limit = _limits.of_pillow()
        return math.inf if limit is None else 2 * limit


def _pair(key: str, value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    expected = "two numbers, the lower one first"
    # A list in a LazyConfig is another type
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise _wrong(key, value, expected)
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in value):
        raise _wrong(key, value, expected)
    low, high = map(float, value)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise _wrong(key, value, expected)
    return low, high


def _wrong(key: str, value: Any, expected: str) -> UserError:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    shown = list(value) if is_list else value
    return UserError(f"{_both_keys(key)} is {shown!r}, but must be {expected}.")


def _both_keys(key: str) -> str:
    return f"dataloader.images.{key} (yaml: {IMAGE_KEYS[key][0]})"


class NeedsSetting(ValueError):
    """
    An image cannot be read with these settings, but may be with others.

    Attributes:
        kind: the kind of finding that this is in the check of a dataset.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class _PixelLimits:
    """Lifts Pillow's limit, which all threads share, until the last of them has finished."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._of_pillow: int | None = None

    def of_pillow(self) -> int | None:
        return self._of_pillow if self._depth else Image.MAX_IMAGE_PIXELS

    @contextmanager
    def lifted(self) -> Iterator[None]:
        with self._lock:
            if not self._depth:
                self._of_pillow, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    Image.MAX_IMAGE_PIXELS = self._of_pillow


_limits = _PixelLimits()
without_pixel_limit = _limits.lifted


@contextmanager
def open_image(
    file: str | IO[bytes], settings: ImageSettings, formats: list[str] | None = None
) -> Iterator[Image.Image]:
    """
    Open an image with the pixel limit of the settings instead of Pillow's.

    Args:
        formats: Pillow's names of those that it may have, such as :func:`picture_formats` for
            files of strangers; any by default.

    Raises:
        NeedsSetting: the image has more pixels.
        OSError, SyntaxError, ValueError: it is damaged, or in no such format.
    """
    with without_pixel_limit(), Image.open(file, formats=formats) as image:
        width, height = image.size
        if width * height > settings.pixel_limit:
            raise NeedsSetting(
                "image-pixels",
                f"it has {width} x {height} pixels, and {settings.pixel_limit:,} are the limit: "
                f"set {_both_keys('max_pixels')} to {width * height} if its source is trusted",
            )
        try:
            yield image
        except RuntimeError as error:  # what Pillow raises for a damaged AVIF file
            raise OSError(str(error)) from error


def picture_formats() -> list[str]:
    """The formats of photographs and microscopes that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF is new


def is_deep(image: Image.Image) -> bool:
    """Whether Pillow has more than 8 bits per pixel, which its conversion to RGB would clip."""
    return image.mode.startswith(("I", "F"))


def has_16_bit_colors(image: Image.Image) -> bool:
    """Whether the file has 16 bits per channel, of which Pillow decodes the upper 8."""
    if is_deep(image):
        return False
    tiles = getattr(image, "tile", ())
    modes = (t[3] if isinstance(t[3], str) else next(iter(t[3] or ()), "") for t in tiles)
    return any(";16" in mode for mode in modes if isinstance(mode, str))


def refuse_unless_readable(image: Image.Image, settings: ImageSettings) -> None:
    """
    Args:
        image: just opened: Pillow forgets how a file is encoded when it decodes it.

    Raises:
        NeedsSetting: the image has more than 8 bits per pixel and there is no scale for it.
    """
    if is_deep(image) and not settings.has_scale:
        raise NeedsSetting(
            "image-deep",
            f"it has more than 8 bits per pixel (mode {image.mode}): say which values become 0 and "
            f"255 by {_both_keys('intensity_range')}, such as [0,4095], or "
            f"{_both_keys('intensity_percentiles')}, such as [0.1,99.9]",
        )
    scales_differently = settings.has_scale and settings.intensity_range != FULL_RANGE
    if scales_differently and has_16_bit_colors(image):
        raise NeedsSetting(
            "image-deep-color",
            f"it has 16 bits per channel (mode {image.mode}), of which Pillow reads the upper 8 "
            "only, so that it cannot be scaled: convert it to 8 bits, or to a single channel",
        )


def orientation_of(image: Image.Image, may_decode: bool = True) -> int:
    """
    The orientation in EXIF, from 1 (as stored) to 8; 1 if there is none.

    Args:
        may_decode: whether a PNG may be decoded to find EXIF data that follow the pixels.
    """
    try:
        exif = image.getexif() if may_decode else Image.Image.getexif(image)
        orientation = exif.get(ExifTags.Base.Orientation)
    except Exception:  # Detectron2, too, then takes the image as it is
        return 1
    return orientation if orientation in TURNS else 1


def to_rgb(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """
    Convert an image to RGB, 8 bits per channel, turned by its EXIF data.

    Raises:
        NeedsSetting: see :func:`refuse_unless_readable`.
    """
    refuse_unless_readable(image, settings)
    orientation = orientation_of(image) if settings.apply_exif else 1
    if is_deep(image):
        image = Image.fromarray(scaled_to_8_bits(np.asarray(image), settings))
    image = image.convert("RGB")
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def scaled_to_8_bits(pixels: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """
    Scale the values of an image.

    Args:
        pixels: numbers of any type and shape.
        settings: with a range or percentiles.

    Returns:
        A uint8 array of the same shape. If the two percentiles are equal, values above them are
        255 and all others 0.
    """
    values = pixels.astype(np.float64)
    if settings.intensity_percentiles:
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, settings.intensity_percentiles) if finite.size else (0, 1)
    else:
        low, high = settings.intensity_range or FULL_RANGE
    if low == high:
        return np.where(values > high, 255, 0).astype(np.uint8)
    values = np.where(np.isnan(values), low, values).clip(low, high)
    return np.rint((values - low) * (255 / (high - low))).astype(np.uint8)


def read_bgr_image(image: ImageLike, settings: ImageSettings | None = None) -> np.ndarray:
    """
    Args:
        image: a path, a PIL image, or an array as `cv2.imread` returns it: uint8 of shape
            (H, W, 3), BGR. Grey images of shape (H, W) or (H, W, 1) are accepted too, and images
            with an alpha channel (BGRA), which is ignored.
        settings: how to read it; by default images are turned as the camera was held, and those
            with more than 8 bits per pixel are refused.

    Returns:
        uint8 array of shape (H, W, 3), BGR.
    """
    settings = settings or ImageSettings()
    if isinstance(image, (str, os.PathLike)):
        return _read_file(os.fspath(image), settings)
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image, settings))[:, :, ::-1]
    if image is None:
        raise TypeError("The image is None, which cv2.imread returns for files it cannot read.")
    if not isinstance(image, np.ndarray):
        raise TypeError(
            "An image is a path, a PIL image, or a uint8 array of shape (height, width, 3) in BGR "
            f"order, not a {type(image).__module__}.{type(image).__name__}."
        )
    if settings.has_scale and image.dtype != np.uint8 and image.dtype.kind in "uif":
        image = scaled_to_8_bits(image, settings)
    _check_array(image)
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image[:, :, :3]


def _read_file(path: str, settings: ImageSettings) -> np.ndarray:
    try:
        with open_image(path, settings) as image:
            return np.asarray(to_rgb(image, settings))[:, :, ::-1]
    except FileNotFoundError:
        hint = ": it is a URL, so download it first" if "://" in path else ""
        raise UserError(f"Image '{path}' does not exist{hint}.") from None
    except UnidentifiedImageError:
        raise UserError(f"'{path}' is not an image that can be read.") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises each of them on bad files
        raise UserError(f"Image '{path}' cannot be read ({error}).") from error


def _check_array(image: np.ndarray) -> None:
    if image.dtype != np.uint8:
        from_0_to_1 = image.size > 0 and image.min() >= 0 and image.max() <= 1
        scale = "multiply it by 255" if from_0_to_1 else "bring it to that range"
        raise ValueError(
            f"An image has uint8 pixels from 0 to 255, not {image.dtype}: {scale}, and convert it "
            "by image.astype(np.uint8)."
        )
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] in (1, 3, 4)):
        advice = "."
        if image.ndim == 3 and image.shape[0] in (1, 3, 4):
            advice = ": its channels come first, so give image.transpose(1, 2, 0)."
        elif image.ndim == 4:
            advice = ". Give several images as a list."
        raise ValueError(f"An image has the shape (height, width, 3), not {image.shape}{advice}")
    if image.size == 0:
        raise ValueError(f"The image is empty: its shape is {image.shape}.")
