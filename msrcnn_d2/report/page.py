"""The report: one HTML file that needs no other, the figures as PNG and the numbers as JSON."""

import base64
import io
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from ..evaluation.mask_quality import MaskQuality, Part
from ..image_reading import ImageSettings
from ..utils.errors import UserError
from .figures import Chart, charts
from .gallery import Move, draw_move, largest_moves

__all__ = ["write_report"]

logger = logging.getLogger(__name__)

PIXELS_PER_INCH = 150
THUMBNAIL_PIXELS_PER_INCH = 110
NUM_MOVES = 8  # of detections that are shown, upwards and downwards each


def write_report(
    quality: MaskQuality,
    folder: str | os.PathLike,
    title: str = "Mask quality",
    image_root: str | None = None,
    settings: ImageSettings | None = None,
) -> Path:
    """
    Write what :class:`MaskQuality` knows for people to look at.

    The folder then has "report.html", which holds its figures and opens from disk without a
    network, each of its figures (not the gallery) as PNG, and "report.json": the title and what
    :meth:`MaskQuality.to_json` returns.

    Args:
        folder: where to write, created if need be.
        title: what was evaluated, shown at the top.
        image_root: the folder of the images, for the gallery; without it masks are shown alone.
        settings: how images are read, such as the scale of 16-bit images.

    Returns:
        the path of the page.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    with _said_if_it_fails(folder):
        folder.mkdir(parents=True, exist_ok=True)
    drawn = [_Drawn.of(chart) for chart in charts(quality)]
    moves = {}
    if "mask_score" in quality.scores:
        moves = _moves(quality, image_root, settings or ImageSettings())
    numbers = {"title": title, **quality.to_json()}
    page = _template().render(
        title=title,
        quality=quality,
        has_mask_scores="mask_score" in quality.scores,
        overall=quality.overall,
        charts=drawn,
        moves=moves,
        has_images=image_root is not None,
        tables={
            "class": _shown_classes(quality),
            "object size": quality.by_size,
            "IoU threshold": quality.by_threshold,
        },
    )
    with _said_if_it_fails(folder):
        for chart in drawn:
            (folder / f"{chart.name}.png").write_bytes(chart.png)
        (folder / "report.json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
        (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


@contextmanager
def _said_if_it_fails(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The report cannot be written into '{folder}' ({error.strerror}): give another folder."
        ) from error


@dataclass
class _Drawn:
    """A chart as the page shows it."""

    name: str
    section: str
    alt: str
    png: bytes

    @classmethod
    def of(cls, chart: Chart) -> "_Drawn":
        return cls(chart.name, chart.section, chart.alt, _png(chart.figure, PIXELS_PER_INCH))

    @property
    def source(self) -> str:
        return _data_url(self.png)


def _moves(
    quality: MaskQuality, image_root: str | None, settings: ImageSettings
) -> dict[str, list[dict[str, Any]]]:
    up, down = largest_moves(quality, NUM_MOVES)
    return {
        "up": [_card(quality, move, image_root, settings) for move in up],
        "down": [_card(quality, move, image_root, settings) for move in down],
    }


def _card(
    quality: MaskQuality, move: Move, image_root: str | None, settings: ImageSettings
) -> dict[str, Any]:
    result = quality.results[move.index]
    image = quality.coco_gt.imgs[result["image_id"]]
    figure = draw_move(quality, move, image_root, settings)
    return {
        "move": move,
        "source": _data_url(_png(figure, THUMBNAIL_PIXELS_PER_INCH)),
        "class": quality.classes[quality.class_indices[move.index]],
        "image": image.get("file_name", image["id"]),
        "true_iou": quality.true_ious[move.index],
        **{name: values[move.index] for name, values in quality.scores.items()},
    }


def _shown_classes(quality: MaskQuality) -> dict[str, Part]:
    """Those that have objects, without which there is no AP."""
    parts = quality.by_class
    return {k: part for k, part in parts.items() if not math.isnan(part.ap["class_score"])}


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    # No date and no version, so that the same numbers give the same file
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _template():
    environment = Environment(
        loader=PackageLoader("msrcnn_d2.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, signed=_signed, percent=_percent, tail=_tail)
    return environment.get_template("report.html.jinja")


def _number(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def _signed(value: float, digits: int = 1) -> str:
    if math.isnan(value):
        return "–"
    value = round(value, digits) + 0.0  # there is no negative zero
    return f"{value:+.{digits}f}".replace("-", "−")


def _tail(text: str, length: int) -> str:
    """The end of a path says more than its beginning."""
    return text if len(text) <= length else "…" + text[-length:]


def _percent(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{round(100 * value) + 0} %".replace("-", "−")
