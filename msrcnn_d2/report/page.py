"""Write the report: one self-contained HTML file, the figures as PNG, the numbers as JSON."""

import base64
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from msrcnn_d2_runtime.image_reading import ImageSettings
from msrcnn_d2_runtime.scores import TITLES

from ..evaluation.mask_quality import MaskQuality
from ..evaluation.operating_points import min_count
from ..utils.errors import UserError
from .figures import charts
from .gallery import draw_detection, largest_moves
from .thresholds import SHOWN_IOUS, thresholded_scores
from .worst_annotations import worst_annotations, write_csv

__all__ = ["write_report"]

PIXELS_PER_INCH = 150
THUMBNAIL_PIXELS_PER_INCH = 110
NUM_MOVES = 8  # detections that moved up, and as many that moved down
# Tasks of other evaluators, whose first metric is the main one
OTHER_TASKS = {"panoptic_seg": "panoptic quality", "sem_seg": "semantic segmentation"}
NUM_DISAGREEMENTS = 12  # with annotations
DISAGREEMENTS = {
    "class": "annotated as {}",
    "shape": "annotated differently",
    "missing": "not annotated",
}


def write_report(
    quality: MaskQuality,
    folder: str | os.PathLike,
    title: str = "Mask quality",
    image_root: str | None = None,
    settings: ImageSettings | None = None,
    precision: float = 0.95,
    iou: float = 0.75,
    results: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """
    Write a report on what :class:`MaskQuality` has measured.

    This writes "report.html", which contains its figures and opens without a network; a PNG of each
    figure, but not of the gallery; and "report.json" with the title, what
    :meth:`MaskQuality.to_json` returns, and the thresholds of each score ("thresholds"); and
    "worst_annotations.csv".

    Args:
        folder: where to write; it is created if it does not exist.
        title: what was evaluated, shown at the top.
        image_root: the folder of the images, for the gallery; without it masks are shown alone.
        settings: how images are read, such as the scale of 16-bit images.
        precision, iou: the thresholds that are shown first reach this precision, between 0 and 1,
            at this IoU, one of 0.50, 0.55, ... 0.95.
        results: of all evaluators, {task: {metric: percent}}. Those of panoptic and semantic
            segmentation are shown, and are in "report.json" ("other_results").

    Returns:
        the path of the page.

    Raises:
        UserError: the folder cannot be written, the precision is not between 0 and
            1, or the IoU is none of COCO's.
    """
    folder = Path(folder)
    with _said_if_it_fails(folder):
        folder.mkdir(parents=True, exist_ok=True)  # before the drawing, which takes seconds
    thresholds = thresholded_scores(quality, precision, iou)
    rankings = quality.rankings
    drawn = [(chart, _png(chart.figure, PIXELS_PER_INCH)) for chart in charts(quality)]
    nearest_object = quality.average_precision.overlaps.nearest_object
    moves = largest_moves(quality, rankings[-1], NUM_MOVES) if len(rankings) > 1 else ([], [])
    disagreements = worst_annotations(quality)
    others = {
        # Not those of each class, such as "IoU-sky"
        task: {name: value for name, value in (results or {})[task].items() if "-" not in name}
        for task in OTHER_TASKS
        if task in (results or {})
    }
    class_names = dict(zip(quality.average_precision.category_ids, quality.classes))

    def card(index: int, annotation: dict | None) -> dict[str, Any]:
        return _card(quality, index, annotation, image_root, settings)

    page = _template().render(
        title=title,
        quality=quality,
        rankings=rankings,
        titles=TITLES,
        overall=quality.overall,
        others=[(OTHER_TASKS[task], list(numbers.items())) for task, numbers in others.items()],
        charts=[(chart.section, chart.alt, _data_url(png)) for chart, png in drawn],
        moves={
            direction: [{"move": m, **card(m.index, nearest_object(m.index))} for m in chosen]
            for direction, chosen in zip(("up", "down"), moves)
        },
        disagreements=[
            {
                **card(x.index, x.annotation),
                "iou": x.iou,
                "says": DISAGREEMENTS[x.kind].format(
                    x.annotation and class_names.get(x.annotation["category_id"], "another class")
                ),
            }
            for x in disagreements[:NUM_DISAGREEMENTS]
        ],
        num_disagreements=len(disagreements),
        has_images=image_root is not None,
        tables={
            # Without objects a class has no AP
            "class": {k: p for k, p in quality.by_class.items() if p.ap["class_score"] >= 0},
            "object size": quality.by_size,
            "IoU threshold": quality.by_threshold,
        },
        thresholds=thresholds,
        threshold_data={
            "precision": precision,
            "objects": sum(quality.num_objects),
            "shown": SHOWN_IOUS,
            "scores": [score.for_page() for score in thresholds],
        },
        shown_ious=SHOWN_IOUS,
        wanted=precision,
        min_count=min_count(precision),
        iou=f"{iou:.2f}",
    )
    numbers = {
        "title": title,
        **quality.to_json(),
        "thresholds": {
            "precision": precision,
            "iou": iou,
            "scores": {score.name: score.to_json() for score in thresholds},
        },
    }
    if others:
        numbers["other_results"] = {
            task: {k: None if math.isnan(v) else v for k, v in metrics.items()}
            for task, metrics in others.items()
        }
    with _said_if_it_fails(folder):
        for chart, png in drawn:
            (folder / f"{chart.name}.png").write_bytes(png)
        (folder / "report.json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
        write_csv(quality, disagreements, folder / "worst_annotations.csv")
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


def _card(
    quality: MaskQuality,
    index: int,
    annotation: dict | None,
    image_root: str | None,
    settings: ImageSettings | None,
) -> dict[str, Any]:
    """A detection as the galleries show it, with the outline of an annotation."""
    image = quality.coco_gt.imgs[quality.results[index]["image_id"]]
    figure = draw_detection(quality, index, annotation, image_root, settings)
    return {
        "source": _data_url(_png(figure, THUMBNAIL_PIXELS_PER_INCH)),
        "class": quality.classes[quality.class_indices[index]],
        "image": image.get("file_name", image["id"]),
        "true_iou": quality.true_ious[index],
        "scores": {name: values[index] for name, values in quality.scores.items()},
    }


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    # No date and no version, so that the same numbers give the same file
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("msrcnn_d2.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, signed=_signed, percent=_percent, tail=_tail)
    environment.filters.update(share=_share, threshold=_threshold)
    return environment.get_template("report.html.jinja")


def _number(value: float, digits: int = 2, sign: str = "") -> str:
    """The number with a minus instead of a hyphen, or a dash for NaN."""
    if math.isnan(value):
        return "–"
    # There is no negative zero
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")


def _signed(value: float, digits: int = 1) -> str:
    return _number(value, digits, "+")


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{_number(100 * value, 0)} %"


def _share(value: float) -> str:
    """In percent with a digit after the point, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{_number(100 * value, 1)} %"


def _threshold(value: float) -> str:
    """A threshold without needless zeros."""
    return f"{round(value, 4):g}".replace("-", "−")


def _tail(text: str, length: int) -> str:
    """The end of a path, which says more than its beginning."""
    return text if len(text) <= length else "…" + text[-length:]
