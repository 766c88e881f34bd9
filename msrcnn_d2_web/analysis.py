"""An uploaded image and its predictions; which of them are shown, and in which order."""

import dataclasses
import io
import threading
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, UnidentifiedImageError

from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.image_reading import (
    ImageSettings,
    NeedsSetting,
    open_image,
    picture_formats,
    to_rgb,
    without_pixel_limit,
)
from msrcnn_d2_runtime.mask_encoding import Crop
from msrcnn_d2_runtime.predictions import CroppedMasks, Masks, Predictions, RoiMasks
from msrcnn_d2_runtime.predictor import Predictor

__all__ = ["Analyser", "Analysis", "View", "fitted", "ordered", "read_image", "scaled", "shown"]

# Longest side of what the browser gets, in pixels; downloads have the size of the image
DISPLAY_SIDE = 1280
# Unless --max-pixels says otherwise. Reading takes about 10 bytes of memory per pixel
MAX_PIXELS = 64_000_000


@dataclass(frozen=True)
class View:
    """
    What a user wants to see of the predictions of an image.

    Attributes:
        ranking: field of the score that they are sorted by, such as "mask_scores".
        minima: {field of a score: objects with a lower one are left out}.
        selected: index of the highlighted object among all predictions; None for no object.
    """

    ranking: str
    minima: dict[str, float] = field(default_factory=dict)
    selected: int | None = None


@dataclass(frozen=True)
class Analysis:
    """
    An image, predicted once; changing the :class:`View` needs no model.

    Attributes:
        name: of the file, as its user calls it.
        data: the file.
        size: height and width of the image in pixels.
        predictions: in pixels of the image.
        display: uint8 (h, w, 3), RGB: the image, made smaller if it is large.
        displayed: the predictions, in pixels of `display`.
    """

    name: str
    data: bytes
    size: tuple[int, int]
    predictions: Predictions
    display: np.ndarray
    displayed: Predictions

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        masks = (self.predictions.masks, self.displayed.masks)
        return len(self.data) + self.display.nbytes + sum(map(_nbytes, masks))


class Analyser:
    """Predicts uploaded images, one at a time, in whichever threads ask for it."""

    def __init__(self, predictor: Predictor, max_pixels: int | None = None):
        """
        Args:
            max_pixels: the largest image to read; by default what the predictor's settings say, or
                `MAX_PIXELS` if they leave it open.
        """
        self.predictor = predictor
        limit = max_pixels or predictor.image_settings.max_pixels or MAX_PIXELS
        self.settings = dataclasses.replace(predictor.image_settings, max_pixels=limit)
        self._lock = threading.Lock()

    def analyse(self, name: str, data: bytes) -> Analysis:
        """
        Args:
            name: of the file, from which nothing is read.
            data: the file.

        Raises:
            UserError: the file is no image, or one that cannot be read.
        """
        # One at a time also reads: memory for large images is needed once, not once per user
        with self._lock:
            image = read_image(data, self.settings)
            (predictions,) = self.predictor.predictions([image[:, :, ::-1]])
        display, displayed = fitted(image, predictions, DISPLAY_SIDE)
        return Analysis(name, data, image.shape[:2], predictions, display, displayed)


def read_image(data: bytes, settings: ImageSettings) -> np.ndarray:
    """
    Args:
        data: a file.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        UserError: it is no image, or one that cannot be read with these settings.
    """
    formats = picture_formats()
    try:
        with open_image(io.BytesIO(data), settings, formats) as image:
            return np.asarray(to_rgb(image, settings))
    except UnidentifiedImageError:
        raise UserError(
            "This file is not an image that can be read: try a JPEG, PNG, WebP or TIFF file."
        ) from None
    except NeedsSetting as error:
        if error.kind == "image-pixels":
            with without_pixel_limit(), Image.open(io.BytesIO(data), formats=formats) as image:
                width, height = image.size
            limit = f"{settings.pixel_limit / 1e6:.3g} million"
            advice = (
                f"{width} x {height} pixels, and this page takes up to {limit}: make it smaller"
            )
        elif error.kind == "image-deep":
            advice = (
                "more than 8 bits per pixel, and nothing says which values are black and white: "
                "restart this page with --intensity-percentiles 0.1 99.9, or --intensity-range"
            )
        else:
            advice = "16 bits per channel, which cannot be scaled: convert it to 8 bits"
        raise UserError(f"This image has {advice}.") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of them on bad files
        raise UserError(f"This image is damaged and cannot be read ({error}).") from None


def ordered(predictions: Predictions, index: np.ndarray, ranking: str) -> Predictions:
    """The predictions with these indices, in their order, which is by the score `ranking`."""
    return predictions[index].replaced(ranking=ranking)


def shown(predictions: Predictions, view: View) -> np.ndarray:
    """
    Returns:
        int (K,), indices of the predictions that are shown, the best first.
    """
    order = np.argsort(-predictions.get(view.ranking), kind="stable")
    kept = np.ones(len(predictions), dtype=bool)
    for name, minimum in view.minima.items():
        if predictions.has(name):
            kept &= predictions.get(name) >= np.float32(minimum)
    return order[kept[order]]


def fitted(
    image: np.ndarray, predictions: Predictions, max_side: int
) -> tuple[np.ndarray, Predictions]:
    """An image and its predictions, made smaller if a side has more than so many pixels."""
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return image, predictions
    size = max(1, round(height * scale)), max(1, round(width * scale))
    picture = Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(picture), scaled(predictions, size)


def scaled(predictions: Predictions, size: tuple[int, int]) -> Predictions:
    """The predictions in an image of another height and width."""
    height, width = predictions.image_size
    factors = np.array([size[1] / width, size[0] / height] * 2, dtype=np.float32)
    boxes = predictions.pred_boxes * factors
    masks = predictions.masks
    resized: Masks
    if isinstance(masks, RoiMasks):
        resized = RoiMasks(masks.probs, masks.boxes * factors, size)
    else:
        crops = [_scaled_crop(masks.crop(k), (height, width), size) for k in range(len(masks))]
        resized = CroppedMasks(crops, size)
    return predictions.replaced(pred_boxes=boxes, masks=resized)


def _scaled_crop(crop: Crop, old_size: tuple[int, int], new_size: tuple[int, int]) -> Crop:
    """The crop in an image of another size, which has the value at the centre of each pixel."""
    starts, inside = crop[:2], crop[2]
    corner, nearest = [], []
    for start, length, old, new in zip(starts, inside.shape, old_size, new_size):
        first, last = start * new // old, -(-(start + length) * new // old)
        source = ((np.arange(first, last) + 0.5) * old / new).astype(int) - start
        kept = np.flatnonzero((source >= 0) & (source < length))
        corner.append(first + int(kept[0]) if len(kept) else first)
        nearest.append(source[kept])
    return corner[0], corner[1], inside[np.ix_(*nearest)]


def _nbytes(masks: Masks) -> int:
    if isinstance(masks, RoiMasks):
        return masks.probs.nbytes
    return sum(masks.crop(k)[2].nbytes for k in range(len(masks)))
