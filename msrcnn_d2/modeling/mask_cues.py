"""
Cues: numbers that say something about how good a detected mask is.

All of them come from what inference has computed anyway: the class score, the box, the mask's
probabilities, and the predicted IoU if the model has a MaskIoU head. :class:`MaskCalibrator` learns
what they mean together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from detectron2.layers import cat
from detectron2.structures import Instances

__all__ = ["CUES", "Cue", "Detections", "mask_cues"]

# Probabilities are kept this far from 0 and 1, so that their log-odds are finite
MARGIN = 1e-6
# Areas and perimeters are at least one cell, so that ratios of empty masks are finite
ONE_CELL = 1.0
# Masks at two probabilities each, whose IoU says how stable the outline is
STABILITY_LEVELS = ((0.4, 0.6), (0.3, 0.7), (0.2, 0.8), (0.1, 0.9), (0.05, 0.95))
# All probabilities at which the area of a mask is needed
LEVELS = sorted({0.5, *(level for pair in STABILITY_LEVELS for level in pair)})


@dataclass
class Detections:
    """
    The detections of a batch of images; N counts those of all images.

    Attributes:
        probs: float Tensor of shape (N, S, S), the probabilities of each mask in the cells of its
            box.
        scores: Tensor of shape (N,), class scores in [0, 1].
        mask_ious: Tensor of shape (N,), predicted IoUs in [0, 1]; None if the model predicts none.
        boxes: Tensor of shape (N, 4), XYXY in pixels of the image that the model sees.
        image_sizes: Tensor of shape (N, 2), height and width of that image in pixels.
    """

    probs: torch.Tensor
    scores: torch.Tensor
    mask_ious: torch.Tensor | None
    boxes: torch.Tensor
    image_sizes: torch.Tensor

    @classmethod
    def of(cls, instances: list[Instances]) -> "Detections":
        """
        Args:
            instances: one Instances per image, with "pred_masks" of shape (N, 1, S, S),
                "pred_boxes", "scores" and, if the model has a MaskIoU head, "pred_mask_ious".
        """
        boxes = cat([x.pred_boxes.tensor for x in instances]).float()
        # Filled in on the device: a tensor that is copied there would make the host wait. With
        # new_full and len(), a traced model would keep the size and count of its example
        sizes = [
            torch.stack(
                [torch.ones_like(x.pred_boxes.tensor[:, 0]) * side for side in x.image_size], dim=1
            )
            for x in instances
        ]
        has_ious = all(x.has("pred_mask_ious") for x in instances)
        return cls(
            probs=cat([x.pred_masks for x in instances])[:, 0].float(),
            scores=cat([x.scores for x in instances]).float(),
            mask_ious=cat([x.pred_mask_ious for x in instances]).float() if has_ious else None,
            boxes=boxes,
            image_sizes=cat(sizes),
        )

    @cached_property
    def score_log_odds(self) -> torch.Tensor:
        """(N,), log-odds of the mask score, or of the class score without predicted IoUs."""
        return _log_odds(self.scores if self.mask_ious is None else self.scores * self.mask_ious)

    @cached_property
    def inside(self) -> torch.Tensor:
        """(N, S, S), 1 where the mask is, 0 elsewhere."""
        return (self.probs > 0.5).to(self.probs.dtype)

    @cached_property
    def area(self) -> torch.Tensor:
        """(N,), cells of the mask, at least 1."""
        return self.cells_above(0.5).clamp(min=ONE_CELL)

    def cells_above(self, level: float) -> torch.Tensor:
        """(N,), number of cells whose probability is above one of `LEVELS`."""
        return self._cells_above[level]

    @cached_property
    def _cells_above(self) -> dict[float, torch.Tensor]:
        probs = self.probs.flatten(1)
        # 1 where a probability is above the level, else 0. A sum of bools takes 6 times as long
        return {level: (probs - level).ceil_().sum(dim=1) for level in LEVELS}

    @cached_property
    def mass(self) -> torch.Tensor:
        """(N,), sum of the probabilities: the expected area in cells."""
        return _total(self.probs)

    @cached_property
    def mass_inside(self) -> torch.Tensor:
        """(N,), sum of the probabilities in the mask."""
        return _total(self.probs * self.inside)

    @cached_property
    def entropy(self) -> torch.Tensor:
        """(N, S, S), entropy of each cell, in nats."""
        p = self.probs.clamp(MARGIN, 1 - MARGIN)
        q = 1 - p
        return -(p * p.log() + q * q.log())

    @cached_property
    def total_entropy(self) -> torch.Tensor:
        """(N,), in nats."""
        return _total(self.entropy)

    @cached_property
    def outline(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Between cells, in x and in y: 1 where the outline of the mask passes, 0 elsewhere."""
        x, y = _steps(self.inside)
        return x.abs(), y.abs()

    @cached_property
    def perimeter(self) -> torch.Tensor:
        """(N,), length of the outline in the box, in cells, at least 1."""
        x, y = self.outline
        return (_total(x) + _total(y)).clamp(min=ONE_CELL)

    @cached_property
    def relative_box_area(self) -> torch.Tensor:
        """(N,), area of the box / area of the image."""
        return self.box_size.prod(dim=1) / self.image_sizes.prod(dim=1)

    @cached_property
    def box_size(self) -> torch.Tensor:
        """(N, 2), width and height of the box in pixels, at least 1."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]).clamp(min=1)


@dataclass
class Cue:
    """
    Attributes:
        compute: takes :class:`Detections`, returns N values.
        unit: of the values.
        meaning: what they are, in a few words.
        source: where the cue comes from; "" for plain geometry or statistics.
    """

    compute: Callable[[Detections], torch.Tensor]
    unit: str
    meaning: str
    source: str = ""


def _total(values: torch.Tensor) -> torch.Tensor:
    return values.sum(dim=(1, 2))


def _steps(cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From each cell to the next, in x and in y. `Tensor.diff` cannot be exported to ONNX."""
    return cells[:, :, 1:] - cells[:, :, :-1], cells[:, 1:] - cells[:, :-1]


def _log_odds(probs: torch.Tensor) -> torch.Tensor:
    return torch.logit(probs, eps=MARGIN)


def _stability(smaller: float, larger: float) -> Callable[[Detections], torch.Tensor]:
    return lambda d: d.cells_above(larger) / d.cells_above(smaller).clamp(min=ONE_CELL)


def _soft_iou(d: Detections) -> torch.Tensor:
    return d.mass_inside / (d.area + d.mass - d.mass_inside)


def _sharpness(d: Detections) -> torch.Tensor:
    x, y = (outline * step.abs() for outline, step in zip(d.outline, _steps(d.probs)))
    return (_total(x) + _total(y)) / d.perimeter


def _at_border(d: Detections) -> torch.Tensor:
    last = d.probs.shape[-1] - 1
    rows, columns = d.probs[:, ::last], d.probs[:, :, ::last]  # the first and the last ones
    return (rows.mean(dim=(1, 2)) + columns.mean(dim=(1, 2))) / 2


def _tightness(d: Detections) -> torch.Tensor:
    # Of rows and of columns, whether they have a cell of the mask: (2, N, S)
    filled = torch.stack([d.inside.amax(dim=2), d.inside.amax(dim=1)])
    size = filled.shape[-1]
    numbers = torch.arange(1, size + 1, device=filled.device)
    last, first = (filled * numbers).amax(dim=2), (filled * numbers.flip(0)).amax(dim=2)
    extents = (last + first - size).clamp(min=0) / size  # 0 for an empty mask
    return extents[0] * extents[1]


def _sides_at_border(d: Detections) -> torch.Tensor:
    height, width = d.image_sizes.T
    x0, y0, x1, y1 = d.boxes.T
    sides = x0 < 1, y0 < 1, x1 > width - 1, y1 > height - 1
    return torch.stack(sides).sum(dim=0).to(d.boxes.dtype)


CUES: dict[str, Cue] = {
    "class_log_odds": Cue(lambda d: _log_odds(d.scores), "nats", "log-odds of the class score"),
    "mask_iou": Cue(
        lambda d: torch.zeros_like(d.scores) if d.mask_ious is None else d.mask_ious,
        "IoU",
        "predicted IoU; 0 for all detections of a model without a MaskIoU head",
        "Huang et al., Mask Scoring R-CNN, CVPR 2019",
    ),
    **{
        f"stability_{round(100 * larger)}": Cue(
            _stability(smaller, larger),
            "IoU",
            f"IoU of the masks at the probabilities {smaller:g} and {larger:g}",
            "stability score of Kirillov et al., Segment Anything, ICCV 2023",
        )
        for smaller, larger in STABILITY_LEVELS
    },
    "mean_inside": Cue(
        lambda d: d.mass_inside / d.area,
        "probability",
        "mean probability of the cells of the mask",
        "mask score of Cheng et al., Masked-attention Mask Transformer, CVPR 2022",
    ),
    "soft_iou": Cue(_soft_iou, "IoU", "expected overlap / expected union of mask and object"),
    "relative_mass": Cue(lambda d: d.mass / d.area, "ratio", "expected area / area of the mask"),
    "entropy": Cue(
        lambda d: d.total_entropy / d.probs.shape[-1] ** 2, "nats", "mean entropy of all cells"
    ),
    "entropy_inside": Cue(
        lambda d: _total(d.entropy * d.inside) / d.area,
        "nats",
        "mean entropy of the cells of the mask",
    ),
    "entropy_per_area": Cue(
        lambda d: d.total_entropy / d.area, "nats", "entropy of all cells / area of the mask"
    ),
    "sharpness": Cue(
        _sharpness, "probability", "mean change of the probability across the outline"
    ),
    "undecided": Cue(
        lambda d: (d.cells_above(0.2) - d.cells_above(0.8)) / d.perimeter,
        "cells",
        "width of the band of probabilities from 0.2 to 0.8 along the outline",
    ),
    "compactness": Cue(
        lambda d: d.perimeter / d.area.sqrt(), "ratio", "perimeter / square root of the area"
    ),
    "fill": Cue(
        lambda d: d.cells_above(0.5) / d.probs.shape[-1] ** 2,
        "ratio",
        "area of the mask / area of the box",
    ),
    "maximum": Cue(lambda d: d.probs.amax(dim=(1, 2)), "probability", "largest probability"),
    "at_box_border": Cue(_at_border, "probability", "mean probability along the sides of the box"),
    "tightness": Cue(
        _tightness, "ratio", "area of the box around the mask / area of the detected box"
    ),
    "log_box_area": Cue(
        lambda d: d.relative_box_area.log(), "log of a ratio", "area of the box / area of the image"
    ),
    "log_mask_area": Cue(
        lambda d: (d.relative_box_area * d.area / d.probs.shape[-1] ** 2).log(),
        "log of a ratio",
        "area of the mask / area of the image",
    ),
    "elongation": Cue(
        lambda d: (d.box_size[:, 0] / d.box_size[:, 1]).log().abs(),
        "log of a ratio",
        "longer side of the box / shorter side",
    ),
    "sides_at_image_border": Cue(
        _sides_at_border, "count", "sides of the box within a pixel of the border of the image"
    ),
}


def mask_cues(detections: Detections) -> torch.Tensor:
    """
    Returns:
        Tensor of shape (N, C), the cues in the order of `CUES`.
    """
    return torch.stack([cue.compute(detections) for cue in CUES.values()], dim=1)
