"""Images with their predictions drawn on them."""

import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from ..files import write_whole
from ..predictions import PredictedImage

if TYPE_CHECKING:
    from ..drawing import LabelStyle

__all__ = ["picture_name", "write_picture"]

JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")


def picture_name(name: str, taken: Collection[str]) -> str:
    """
    Args:
        name: of an image.
        taken: the pictures that there are.

    Returns:
        the name of its picture: the same for JPEG and PNG, and with ".png" at the end for other
        formats, which browsers may not show.
    """
    if not name.lower().endswith((*JPEG, ".png")):
        name += ".png"
    while name in taken:  # "a.tif.png" can be the picture of "a.tif" and an image of its own
        name += ".png"
    return name


def write_picture(
    path: str,
    image: PredictedImage,
    class_names: Sequence[str],
    labels: "LabelStyle",
    legend: bool,
) -> None:
    """
    Args:
        path: from :func:`picture_name`, whose end decides about the format.
        class_names, labels, legend: as in :func:`~msrcnn_d2_runtime.drawing.draw_predictions`.
    """
    import cv2  # unlike the other outputs

    from ..drawing import draw_predictions

    drawn = draw_predictions(
        image.image, image.predictions, class_names, labels=labels, legend=legend
    )
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with write_whole(path, sync=False) as f:
        if path.lower().endswith(JPEG):
            # Coloured outlines keep their edges
            Image.fromarray(drawn).save(f, format="JPEG", quality=92, subsampling=0)
        else:
            options = [cv2.IMWRITE_PNG_COMPRESSION, 1]
            # Pillow, and OpenCV before 4.12, try five filters on each row: twice the time for
            # files of about the same size
            if hasattr(cv2, "IMWRITE_PNG_FILTER"):
                options += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
            f.write(cv2.imencode(".png", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR), options)[1])
