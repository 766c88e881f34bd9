"""The pictures of the demo: predictions with their scores, and masks under either ranking."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import pycocotools.mask as mask_util
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from PIL import Image
from pycocotools.coco import COCO

# Okabe and Ito's palette, which colour-blind readers can tell apart, without black and yellow
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7")
NUM_IMAGES = 8
MIN_MASK_SCORE = 0.4  # of the predictions that are shown
NUM_RANKED = 10
MIN_CLASS_SCORE = 0.9  # of the masks that are ranked: all look certain to the class score
IOU_COLORS = "cividis"  # a colour map that looks the same to colour-blind readers
IOU_RANGE = (0.4, 1.0)  # true IoU of its darkest and its brightest colour
# The rows of the ranking: title -> what a detection has the score under
RANKINGS = {
    "ranked by class score": "score",
    "ranked by mask score = class score × predicted mask IoU": "mask_score",
}
BADGE_DISTANCE = 10  # between the numbers on two masks, pixels
MARGIN = 8  # around a thumbnail's mask, pixels


def draw_predictions(path: Path, coco_gt: COCO, image_dir: Path, detections: list[dict]) -> None:
    """
    Draws a sheet of images with predicted masks, their scores, and the true outlines.

    Args:
        path: of the PNG to write.
        coco_gt: ground truth.
        image_dir: folder of the images.
        detections: COCO results with "score", "pred_mask_iou", "mask_score" and "true_iou".
    """
    figure = Figure(figsize=(16, 11.3), dpi=100)
    grid = figure.subplots(2, NUM_IMAGES // 2)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image_id in zip(grid.flat, _images_to_show(detections)):
        _show_image(axes, _load_image(coco_gt, image_dir, image_id))
        for annotation in coco_gt.imgToAnns[image_id]:
            _outline(axes, coco_gt.annToMask(annotation), "white", 1.0)
            _outline(axes, coco_gt.annToMask(annotation), "black", 1.0, "dashed")
        badges: list[tuple[float, float]] = []
        for detection in _shown(detections, image_id):
            name = coco_gt.cats[detection["category_id"]]["name"]
            badges.append(_show_detection(axes, detection, name, badges))
    title = (
        "class score × predicted mask IoU = mask score  (dashed black and white: the true outlines)"
    )
    figure.suptitle(title, fontsize=16, y=0.985)
    figure.subplots_adjust(0.01, 0.135, 0.99, 0.955, wspace=0.03, hspace=0.35)
    figure.savefig(path)


def _load_image(coco_gt: COCO, image_dir: Path, image_id: int) -> np.ndarray:
    return np.asarray(Image.open(image_dir / coco_gt.imgs[image_id]["file_name"]))


def _show_image(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="bilinear")
    axes.set_xlim(-0.5, image.shape[1] - 0.5)  # outlines reach half a pixel further
    axes.set_ylim(image.shape[0] - 0.5, -0.5)


def _images_to_show(detections: list[dict]) -> list[int]:
    """
    Ids of the first images with four masks or more that the two scores rank differently.

    The choice looks at predictions only, so it does not favour those that are right.
    """
    chosen = []
    for image_id in sorted({d["image_id"] for d in detections}):
        scores = [d["score"] for d in _shown(detections, image_id)]
        if len(scores) >= 4 and scores != sorted(scores, reverse=True):
            chosen.append(image_id)
    return chosen[:NUM_IMAGES]


def _shown(detections: list[dict], image_id: int) -> list[dict]:
    """The detections of an image that are worth a look, the best first."""
    of_image = (d for d in detections if d["image_id"] == image_id)
    good = [d for d in of_image if d["mask_score"] >= MIN_MASK_SCORE]
    return sorted(good, key=lambda d: -d["mask_score"])[: len(COLORS)]


def _show_detection(
    axes: Axes, detection: dict, name: str, badges: list[tuple[float, float]]
) -> tuple[float, float]:
    """
    Draws a mask with a number on it, and a line of scores with that number below the image.

    Args:
        name: of the class.
        badges: x, y of the numbers that are there already, in pixels.

    Returns:
        x, y of the new number
    """
    mask, color = mask_util.decode(detection["segmentation"]), COLORS[len(badges)]
    axes.imshow(np.dstack([*(np.full(mask.shape, c) for c in to_rgb(color)), 0.4 * mask]))
    _outline(axes, mask, color, 2.0)
    text = (
        f"{name} {detection['score']:.2f} × IoU {detection['pred_mask_iou']:.2f} = "
        f"{detection['mask_score']:.2f}"
    )
    circle = {"boxstyle": "circle,pad=0.15", "facecolor": color, "edgecolor": "white"}
    number = {"s": str(len(badges) + 1), "color": "white", "weight": "bold", "ha": "center"}
    center = _badge_position(mask, badges)
    axes.text(*center, **number, va="center", size=10, bbox=circle)
    line = {"y": -0.045 - 0.063 * len(badges), "va": "center", "transform": axes.transAxes}
    axes.text(0.03, **line, **number, size=9, bbox=circle)
    axes.text(0.075, s=text, **line, size=12)
    true = f"true IoU {detection['true_iou']:.2f}"
    axes.text(1, s=true, **line, ha="right", size=10, color="0.4")
    return center


def _outline(axes: Axes, mask: np.ndarray, color, width: float, style: str = "solid") -> None:
    padded = np.pad(mask, 1)  # closes outlines at the image border
    x, y = np.arange(padded.shape[1]) - 1, np.arange(padded.shape[0]) - 1
    axes.contour(x, y, padded, levels=[0.5], colors=[color], linewidths=width, linestyles=style)


def _badge_position(mask: np.ndarray, badges: list[tuple[float, float]]) -> tuple[float, float]:
    """x, y of the middle of a mask's thickest part, as far as other numbers leave room."""
    free = mask.astype(bool)
    rows, columns = np.indices(mask.shape)
    for x, y in badges:
        free &= np.hypot(columns - x, rows - y) > BADGE_DISTANCE
    if not free.any():
        free = mask.astype(bool)
    inner = np.pad(free, 1)
    while inner.any():  # peel until nothing is left
        remaining = inner
        inner = inner & np.roll(inner, 1, 0) & np.roll(inner, -1, 0)
        inner = inner & np.roll(inner, 1, 1) & np.roll(inner, -1, 1)
    rows, columns = np.nonzero(remaining)
    middle = len(rows) // 2
    return float(columns[middle] - 1), float(rows[middle] - 1)


def draw_ranking(path: Path, coco_gt: COCO, image_dir: Path, detections: list[dict]) -> None:
    """
    Draws the same masks twice, from the best to the worst: by class score and by mask score.

    A frame's colour and the number below tell a mask's true IoU, so that a good ranking runs
    from bright to dark. Arguments as in :func:`draw_predictions`.
    """
    chosen = _masks_of_every_quality(detections)
    figure = Figure(figsize=(1.5 * NUM_RANKED, 5.6), dpi=90)
    grid = figure.subplots(2, NUM_RANKED)
    places = []
    for row, (title, key) in zip(grid, RANKINGS.items()):
        order = sorted(range(len(chosen)), key=lambda i: -chosen[i][key])
        for axes, i in zip(row, order):
            image = _load_image(coco_gt, image_dir, chosen[i]["image_id"])
            _show_thumbnail(axes, image, chosen[i], key)
        places.append({i: axes for axes, i in zip(row, order)})
        row[0].annotate(title, (0, 1.27), xycoords="axes fraction", fontsize=14, weight="bold")
    _connect(figure, *places, chosen)
    figure.subplots_adjust(0.008, 0.055, 0.992, 0.885, wspace=0.1, hspace=0.72)
    _save_small(figure, path)


def _save_small(figure: Figure, path: Path) -> None:
    """Saves with 256 colours, a third of the bytes: the picture is part of a README."""
    with io.BytesIO() as buffer:
        figure.savefig(buffer)
        Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def _masks_of_every_quality(detections: list[dict]) -> list[dict]:
    """
    Confident detections at equal steps of the true IoU, between nearly the worst and the best.

    The choice does not look at the mask scores, so it does not favour either ranking.
    """
    confident = [d for d in detections if d["score"] >= MIN_CLASS_SCORE and d["true_iou"] > 0]
    if not confident:
        return []
    ious = np.array([d["true_iou"] for d in confident])
    steps = np.linspace(*np.quantile(ious, [0.02, 0.98]), NUM_RANKED)
    nearest = dict.fromkeys(int(np.abs(ious - step).argmin()) for step in steps)
    return [confident[i] for i in nearest]


def _show_thumbnail(axes: Axes, image: np.ndarray, detection: dict, key: str) -> None:
    mask = mask_util.decode(detection["segmentation"])
    color = _iou_color(detection["true_iou"])
    _show_image(axes, image)
    _outline(axes, mask, "white", 3.0)
    _outline(axes, mask, "black", 1.2)
    rows, columns = np.nonzero(mask)
    half = max(np.ptp(rows), np.ptp(columns)) / 2 + MARGIN
    x, y = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
    axes.set_xlim(x - half, x + half)
    axes.set_ylim(y + half, y - half)
    axes.set(xticks=[], yticks=[], facecolor="0.85")
    axes.set_title(f"{detection[key]:.2f}", fontsize=12, pad=7)
    axes.set_xlabel(f"true IoU {detection['true_iou']:.2f}", fontsize=11, labelpad=6)
    for side in axes.spines.values():
        side.set(color=color, linewidth=5)


def _iou_color(iou: float) -> tuple[float, float, float, float]:
    low, high = IOU_RANGE
    return matplotlib.colormaps[IOU_COLORS]((iou - low) / (high - low))


def _connect(figure: Figure, upper: dict, lower: dict, chosen: list[dict]) -> None:
    """Joins the two thumbnails of each mask by a line in the colour of its true IoU."""
    for i, detection in enumerate(chosen):
        line = ConnectionPatch(
            xyA=(0.5, -0.22),
            xyB=(0.5, 1.5),
            coordsA=upper[i].transAxes,
            coordsB=lower[i].transAxes,
            color=_iou_color(detection["true_iou"]),
            linewidth=2,
        )
        figure.add_artist(line)
