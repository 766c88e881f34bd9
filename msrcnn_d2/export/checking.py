"""Whether an exported model finds what the model finds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

import detectron2.data.transforms as T

from ..modeling.postprocessing import rescale_unpasted
from ..utils.errors import UserError
from .graph import OUTPUTS, InferenceGraph
from .metadata import box_predictor_of

__all__ = ["Comparison", "check", "drawn_image", "eager_outputs", "threshold_for"]

# image and threshold -> the outputs by their names
Run = Callable[[np.ndarray, float], dict[str, np.ndarray]]


class Tolerance(NamedTuple):
    """
    Attributes:
        score, box: two detections are the same one if their class scores and their boxes differ by
            less; boxes in the share of the longer side of the image.
        others: such a share of the detections may be other ones.
        difference: what the outputs may differ by; masks in the share of the pixels, or in the mean
            probability.
    """

    score: float
    box: float
    others: float
    difference: float


# Where two boxes overlap by just the threshold of non-maximum suppression, rounding decides
FLOAT32 = Tolerance(score=0.01, box=0.01, others=0.02, difference=0.02)
# A file that has gone wrong finds other things; how good it is, only AP says
INT8 = Tolerance(score=0.3, box=0.05, others=0.5, difference=1.0)


@dataclass
class Comparison:
    """
    An image by the model and by its file.

    Attributes:
        image_size: height and width in pixels.
        num_expected, num_found, num_same: detections of the model, of the file, of both.
        differences: the largest difference of each output, over the detections of both. Of masks,
            the largest mean difference over cells or pixels.
        tolerance: what is taken for the same.
    """

    image_size: tuple[int, int]
    num_expected: int
    num_found: int
    num_same: int
    differences: dict[str, float]
    tolerance: Tolerance

    @property
    def agrees(self) -> bool:
        most = max(self.num_expected, self.num_found)
        others = most - self.num_same
        boxes = self.tolerance.box * max(self.image_size)
        limits = {name: self.tolerance.difference for name in self.differences} | {"boxes": boxes}
        return others <= 1 + self.tolerance.others * most and all(
            value <= limits[name] for name, value in self.differences.items()
        )

    def __str__(self) -> str:
        height, width = self.image_size
        count = f"{self.num_same} of {self.num_expected} detections are the same"
        if not self.num_expected:
            count = "no detections" if not self.num_found else f"{self.num_found} detections, not 0"
        largest = ", ".join(f"{k} {v:.1g}" for k, v in self.differences.items() if k != "classes")
        return f"image of {width} x {height}: {count}" + (
            f"; largest differences: {largest}" if largest else ""
        )


def check(
    graph: InferenceGraph,
    run: Run,
    image: np.ndarray | None = None,
    tolerance: Tolerance = FLOAT32,
) -> list[Comparison]:
    """
    Compare a file with the model on an image of another size than the one that it was traced with,
    and on one without detections.

    Args:
        graph: has the model.
        run: runs the file.
        image: uint8 (H, W, 3), RGB, to compare them on. None for a drawn one.
        tolerance: what they may differ by.

    Raises:
        UserError: they differ by more than that.
    """
    if image is None:
        image = drawn_image(graph, portrait=True, seed=1)
    comparisons = []
    for threshold in (threshold_for(graph, image), 2.0):
        expected = eager_outputs(graph, image, threshold)
        comparisons.append(compared(expected, run(image, threshold), image.shape[:2], tolerance))
    for comparison in comparisons:
        if not comparison.agrees:
            raise UserError(
                f"The exported model does not find what the model finds, so it is not written: "
                f"{comparison}."
            )
    return comparisons


def drawn_image(graph: InferenceGraph, portrait: bool, seed: int) -> np.ndarray:
    """A blurred random image, uint8 (H, W, 3), smaller than the model sees it."""
    short = 80 if graph.resize is None else max(graph.resize.short_edge * 2 // 3, 16)
    size = (short, short * 3 // 2) if portrait else (short * 5 // 4, short)  # width, height
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))


def threshold_for(graph: InferenceGraph, image: np.ndarray) -> float:
    """
    A threshold on the class score for a few dozen detections, between two scores that differ as
    much as possible, so that rounding does not change their number.
    """
    scores = np.sort(eager_outputs(graph, image, 0.0)["scores"])[::-1]
    if len(scores) < 2:
        return 0.0
    few, many = min(5, len(scores) - 1), min(60, len(scores))
    gaps = scores[few - 1 : many - 1] - scores[few:many]
    place = few - 1 + int(gaps.argmax())
    return float(scores[place] + scores[place + 1]) / 2


@torch.no_grad()
def eager_outputs(
    graph: InferenceGraph, image: np.ndarray, score_threshold: float
) -> dict[str, np.ndarray]:
    """
    What Detectron2 and Pillow make of an image with the model of the graph, sorted by the ranking
    score, with the names of the graph's outputs.

    Args:
        image: uint8 (H, W, 3), RGB.
    """
    height, width = image.shape[:2]
    pixels = image
    if graph.resize is not None:
        short, longest = graph.resize
        pixels = T.ResizeShortestEdge(short, longest).get_transform(image).apply_image(image)
    if graph.flip_channels:
        pixels = pixels[:, :, ::-1]
    inputs = {"image": torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1))}
    predictor = box_predictor_of(graph.model)
    with mock.patch.object(predictor, "test_score_thresh", score_threshold):
        (found,) = graph.model.inference([inputs], do_postprocess=False)
    found = rescale_unpasted(found, height, width)
    found = found[found.get(graph.ranking).argsort(descending=True, stable=True)]
    outputs = {}
    for field, name in OUTPUTS.items():
        if found.has(field):
            value = found.get(field)
            if field == "pred_masks" and graph.paste_masks:
                value = value.to_bitmasks(found.pred_boxes, height, width)
            outputs[name] = (value if isinstance(value, torch.Tensor) else value.tensor).numpy()
    return outputs


def compared(
    expected: dict[str, np.ndarray],
    found: dict[str, np.ndarray],
    image_size: tuple[int, int],
    tolerance: Tolerance,
) -> Comparison:
    """
    Args:
        expected, found: outputs of the model and of the file. Where ranking scores are equal up to
            rounding, the order may be another one.
    """
    if expected.keys() != found.keys():
        raise UserError(
            f"The exported model has the outputs {', '.join(found)}, not {', '.join(expected)}."
        )
    # For each detection of the file the nearest one of the model that has its class
    distances = np.abs(found["boxes"][:, None] - expected["boxes"]).max(axis=2, initial=0)
    distances = distances / max(image_size) / tolerance.box
    scores = np.abs(found["scores"][:, None] - expected["scores"]) / tolerance.score
    distances = np.maximum(distances, scores)
    distances[found["classes"][:, None] != expected["classes"]] = np.inf
    pairs: dict[int, int] = {}
    for k in np.argsort(distances.min(axis=1, initial=np.inf)):
        nearest = int(distances[k].argmin()) if len(distances[k]) else -1
        if nearest >= 0 and distances[k, nearest] <= 1:
            pairs.setdefault(nearest, int(k))
    differences = {}
    for name in found if pairs else ():
        ours, theirs = expected[name][[*pairs]], found[name][[*pairs.values()]]
        if ours.shape != theirs.shape:
            # Code that asks whether something was found is traced for one answer only
            raise UserError(
                f"The exported model has {name} of shape {theirs.shape}, not {ours.shape}: perhaps "
                "it found nothing in the image that it was traced with."
            )
        values = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        values = values.mean(axis=(1, 2)) if name == "masks" else values
        differences[name] = float(values.max())
    counts = len(expected["scores"]), len(found["scores"]), len(pairs)
    return Comparison(image_size, *counts, differences, tolerance)
