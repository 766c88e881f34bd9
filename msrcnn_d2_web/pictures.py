"""The picture and the JSON of what is shown."""

import io
import json
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
from PIL import Image

from msrcnn_d2_runtime.drawing import LabelStyle, draw_predictions
from msrcnn_d2_runtime.image_reading import ImageSettings
from msrcnn_d2_runtime.outputs.records import record_of
from msrcnn_d2_runtime.predictions import PredictedImage

from .analysis import Analysis, View, fitted, ordered, read_image, shown

__all__ = ["display_picture", "full_picture", "object_at", "predictions_json", "stem_of"]

NARROW_SIDE = 400  # of the picture on a phone, in pixels
DIMMED = 0.4  # brightness of a picture around the object that is highlighted


def display_picture(
    analysis: Analysis, view: View, class_names: Sequence[str], narrow: bool = False
) -> bytes:
    """
    Args:
        narrow: whether the screen is that of a phone, on which labels are legible only if the
            picture has few pixels.

    Returns:
        a JPEG file of what is shown, in the size for the browser. If an object is selected, the
        rest of the picture is dark.
    """
    image, predictions, scale = analysis.display, analysis.displayed, None
    if narrow:
        image, predictions = fitted(image, predictions, NARROW_SIDE)
        scale = max(1, NARROW_SIDE // max(image.shape))
    index = shown(predictions, view)
    labels: LabelStyle = "short"
    if view.selected is not None and view.selected in index:
        index, labels = np.array([view.selected]), "full"
        top, left, inside = predictions.masks.crop(view.selected)
        part = np.s_[top : top + inside.shape[0], left : left + inside.shape[1]]
        dimmed = (image * np.float32(DIMMED)).astype(np.uint8)
        dimmed[part][inside] = image[part][inside]
        image = dimmed
    chosen = ordered(predictions, index, view.ranking)
    picture = draw_predictions(image, chosen, class_names, labels=labels, scale=scale)
    return _encoded(picture, "JPEG", quality=90)


def full_picture(
    analysis: Analysis, view: View, class_names: Sequence[str], settings: ImageSettings
) -> tuple[bytes, str]:
    """
    Returns:
        a file with the picture of all that is shown, in the size of the image, and the suffix of
        its name: ".jpg" if the image is a JPEG file, and ".png" otherwise.
    """
    image = read_image(analysis.data, settings)
    chosen = ordered(analysis.predictions, shown(analysis.predictions, view), view.ranking)
    picture = draw_predictions(image, chosen, class_names)
    if analysis.data.startswith(b"\xff\xd8"):
        return _encoded(picture, "JPEG", quality=95, subsampling=0), ".jpg"
    return _encoded(picture, "PNG", compress_level=3), ".png"


def predictions_json(analysis: Analysis, view: View, class_names: Sequence[str]) -> str:
    """
    Returns:
        what is shown, the best first, as a dataset in COCO's format with one image. The annotations
        have compressed RLEs and all scores.
    """
    chosen = ordered(analysis.predictions, shown(analysis.predictions, view), view.ranking)
    image = PredictedImage(analysis.name, analysis.name, analysis.display, chosen)
    record = record_of(image, class_names, range(1, len(class_names) + 1))
    annotations = [
        {"id": k, "image_id": 1, "iscrowd": 0, **entry}
        for k, entry in enumerate(record["predictions"], start=1)
    ]
    about = {key: record[key] for key in ("height", "width")}
    dataset = {
        "info": {"description": "Predictions of msrcnn_d2", "ranked_by": record["ranked_by"]},
        "images": [{"id": 1, "file_name": analysis.name, **about}],
        "categories": [{"id": k, "name": name} for k, name in enumerate(class_names, start=1)],
        "annotations": annotations,
    }
    return json.dumps(dataset, ensure_ascii=False, indent=1)


def object_at(analysis: Analysis, view: View, x: float, y: float) -> int | None:
    """
    Args:
        x, y: a place in the picture, from 0 to 1.

    Returns:
        index of the smallest shown object whose mask is there, or None.
    """
    displayed = analysis.displayed
    height, width = displayed.image_size
    row, column = int(y * height), int(x * width)
    found = []
    for k in shown(displayed, view).tolist():
        top, left, inside = displayed.masks.crop(k)
        i, j = row - top, column - left
        if 0 <= i < inside.shape[0] and 0 <= j < inside.shape[1] and inside[i, j]:
            found.append((int(np.count_nonzero(inside)), k))
    return min(found)[1] if found else None


def stem_of(analysis: Analysis) -> str:
    """The name of the file without folders and suffix, for the names of downloads."""
    return PurePath(analysis.name.replace("\\", "/")).stem or "image"


def _encoded(picture: np.ndarray, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()
