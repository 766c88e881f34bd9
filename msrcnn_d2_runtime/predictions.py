"""The predictions of an image, in NumPy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .mask_encoding import Crop, encode_crops, paste_roi_masks
from .scores import MASK_IOU_PROBS, SCORES

__all__ = [
    "KEYPOINTS",
    "SCORE_NAMES",
    "TRACK_IDS",
    "CroppedMasks",
    "Masks",
    "PredictedImage",
    "Predictions",
    "RoiMasks",
]

TRACK_IDS = "track_ids"
KEYPOINTS = "pred_keypoints"
# What predictions may have besides boxes, classes and masks
SCORE_NAMES = (*(score.field for score in SCORES.values()), MASK_IOU_PROBS)


def _moved(boxes: np.ndarray, top: int, left: int) -> np.ndarray:
    return boxes + np.array([left, top, left, top], dtype=boxes.dtype)


class Masks:
    """
    N masks of an image, which are only pasted into it where they are needed: bitmaps of the whole
    image take N x height x width bytes.

    Attributes:
        image_size: height and width in pixels.
    """

    image_size: tuple[int, int]

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: Any) -> "Masks":
        """
        Args:
            index: a slice, or an array of bools or of indices.
        """
        raise NotImplementedError

    def crop(self, k: int) -> Crop:
        """
        Returns:
            row and column at which a part of the image begins that contains all of mask k, and the
            mask there: bool, (h, w). The part of an empty mask may have no pixels.
        """
        raise NotImplementedError

    def moved(self, top: int, left: int, image_size: tuple[int, int]) -> "Masks":
        """
        The masks in an image of which theirs is a part.

        Args:
            top, left: the row and column at which the part begins.
            image_size: height and width of the whole image, in pixels.
        """
        raise NotImplementedError

    @staticmethod
    def concatenated(masks: Sequence["Masks"]) -> "Masks":
        """
        Args:
            masks: at least one, all of the same image.
        """
        size = masks[0].image_size
        in_boxes = [x for x in masks if isinstance(x, RoiMasks)]
        if len(in_boxes) == len(masks) and len({x.probs.shape[1:] for x in in_boxes}) == 1:
            probs = np.concatenate([x.probs for x in in_boxes])
            return RoiMasks(probs, np.concatenate([x.boxes for x in in_boxes]), size)
        return CroppedMasks([x.crop(k) for x in masks for k in range(len(x))], size)

    def areas(self) -> np.ndarray:
        """(N,), int64: pixels of each mask."""
        areas = [np.count_nonzero(self.crop(k)[2]) for k in range(len(self))]
        return np.array(areas, dtype=np.int64)

    def rles(self) -> list[dict]:
        """For each mask its compressed RLE in COCO's format, with "counts" as a string."""
        return encode_crops((self.crop(k) for k in range(len(self))), self.image_size)

    def pasted(self) -> np.ndarray:
        """(N, H, W), bool: bitmaps of the whole image."""
        bitmaps = np.zeros((len(self), *self.image_size), dtype=bool)
        for k in range(len(self)):
            top, left, inside = self.crop(k)
            height, width = inside.shape
            bitmaps[k, top : top + height, left : left + width] = inside
        return bitmaps


class RoiMasks(Masks):
    """
    Masks as a mask head predicts them.

    Attributes:
        probs: float32 (N, S, S), the probabilities in S x S cells of each box.
        boxes: float32 (N, 4), XYXY in pixels of the image.
    """

    def __init__(self, probs: np.ndarray, boxes: np.ndarray, image_size: tuple[int, int]):
        self.probs, self.boxes, self.image_size = probs, boxes, image_size

    def __len__(self) -> int:
        return len(self.probs)

    def __getitem__(self, index: Any) -> "RoiMasks":
        return RoiMasks(self.probs[index], self.boxes[index], self.image_size)

    def moved(self, top: int, left: int, image_size: tuple[int, int]) -> "RoiMasks":
        return RoiMasks(self.probs, _moved(self.boxes, top, left), image_size)

    def crop(self, k: int) -> Crop:
        (crop,) = paste_roi_masks(self.probs[k, None], self.boxes[k, None], self.image_size)
        return crop


class CroppedMasks(Masks):
    """
    Masks that are pasted already, of which only the parts around them are kept.

    Attributes:
        crops: for each mask a part of the image that contains all of it, as :meth:`Masks.crop`
            returns it.
    """

    def __init__(self, crops: Sequence[Crop], image_size: tuple[int, int]):
        self.crops, self.image_size = list(crops), image_size

    @classmethod
    def of(cls, bitmaps: np.ndarray) -> "CroppedMasks":
        """
        Args:
            bitmaps: (N, H, W); values other than 0 are inside.
        """
        crops = []
        for bitmap in bitmaps:
            rows, columns = (np.flatnonzero(bitmap.any(axis=axis)) for axis in (1, 0))
            y, x = ((side[0], side[-1] + 1) if len(side) else (0, 0) for side in (rows, columns))
            crops.append((int(y[0]), int(x[0]), bitmap[slice(*y), slice(*x)] != 0))
        return cls(crops, bitmaps.shape[1:])

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: Any) -> "CroppedMasks":
        kept = np.arange(len(self))[index]
        return CroppedMasks([self.crops[k] for k in kept], self.image_size)

    def moved(self, top: int, left: int, image_size: tuple[int, int]) -> "CroppedMasks":
        return CroppedMasks(
            [(top + y, left + x, inside) for y, x, inside in self.crops], image_size
        )

    def crop(self, k: int) -> Crop:
        return self.crops[k]


class Predictions:
    """
    The predictions of one image, best first. Names and shapes are those of Detectron2's
    `Instances`; the arrays are NumPy's.

    Attributes:
        image_size: height and width in pixels.
        pred_boxes: float32 (N, 4), XYXY in pixels.
        pred_classes: int64 (N,), indices of classes.
        masks: N :class:`Masks`.
        ranking: name of the score that they are sorted by: "scores", "mask_scores" or
            "quality_scores".

    The scores that the model predicts are attributes too, float32 (N,): "scores",
    "pred_mask_ious", "mask_scores", "quality_scores", "expected_mask_ious"; and "mask_iou_probs",
    (N, 10). In a video whose objects are tracked, "track_ids" are their numbers, int64 (N,). A
    model with a keypoint head has "pred_keypoints", float32 (N, K, 3): x and y in pixels, score.
    """

    def __init__(
        self,
        *,
        pred_boxes: np.ndarray,
        pred_classes: np.ndarray,
        masks: Masks,
        scores: Mapping[str, np.ndarray],
        ranking: str,
    ):
        """
        Args:
            scores: by their names, with the one that `ranking` names. The others are as above.
        """
        self.image_size = masks.image_size
        self.pred_boxes, self.pred_classes, self.masks = pred_boxes, pred_classes, masks
        self.ranking = ranking
        self._scores = dict(scores)

    def __len__(self) -> int:
        return len(self.pred_classes)

    def __getitem__(self, index: Any) -> "Predictions":
        """
        Args:
            index: a slice, an array of bools or of indices, or the index of a single one.
        """
        if isinstance(index, (int, np.integer)):
            single = range(len(self))[index]
            index = slice(single, single + 1)
        return Predictions(
            pred_boxes=self.pred_boxes[index],
            pred_classes=self.pred_classes[index],
            masks=self.masks[index],
            scores={name: values[index] for name, values in self._scores.items()},
            ranking=self.ranking,
        )

    def moved(self, top: int, left: int, image_size: tuple[int, int]) -> "Predictions":
        """The predictions in an image of which theirs is a part; see :meth:`Masks.moved`."""
        fields = dict(self._scores)
        if KEYPOINTS in fields:
            shift = np.array([left, top, 0], dtype=fields[KEYPOINTS].dtype)
            fields[KEYPOINTS] = fields[KEYPOINTS] + shift
        return self.replaced(
            pred_boxes=_moved(self.pred_boxes, top, left),
            masks=self.masks.moved(top, left, image_size),
            scores=fields,
        )

    @classmethod
    def concatenated(cls, predictions: Sequence["Predictions"]) -> "Predictions":
        """
        Args:
            predictions: at least one, all of the same image and with the same scores.

        Returns:
            all of them in the given order, which is not that of a score.
        """
        return cls(
            pred_boxes=np.concatenate([x.pred_boxes for x in predictions]),
            pred_classes=np.concatenate([x.pred_classes for x in predictions]),
            masks=Masks.concatenated([x.masks for x in predictions]),
            scores={
                name: np.concatenate([x.get(name) for x in predictions])
                for name in predictions[0].scores_by_name
            },
            ranking=predictions[0].ranking,
        )

    def __getattr__(self, name: str) -> np.ndarray:
        if name == "_scores" or name not in self._scores:  # the former while it is unpickled
            what = "score" if name in SCORE_NAMES else "attribute"
            raise AttributeError(f"These predictions have no {what} '{name}'.")
        return self._scores[name]

    def __repr__(self) -> str:
        height, width = self.image_size
        fields = ", ".join(self.get_fields())
        return f"Predictions({len(self)} in an image of {width} x {height} pixels: {fields})"

    @property
    def pred_masks(self) -> np.ndarray:
        """(N, H, W), bool. They are pasted at each access; `masks` takes less memory."""
        return self.masks.pasted()

    @property
    def rank_scores(self) -> np.ndarray:
        """(N,), the score that they are sorted by."""
        return self._scores[self.ranking]

    @property
    def scores_by_name(self) -> dict[str, np.ndarray]:
        """The scores that there are, by their names."""
        return dict(self._scores)

    def replaced(self, **changes: Any) -> "Predictions":
        """
        Args:
            changes: some of the arguments of the class, in place of those of these predictions.
        """
        same: dict[str, Any] = {
            "pred_boxes": self.pred_boxes,
            "pred_classes": self.pred_classes,
            "masks": self.masks,
            "scores": self._scores,
            "ranking": self.ranking,
        }
        return Predictions(**same | changes)

    def has(self, name: str) -> bool:
        """Whether there is a field with this name."""
        return name in self._scores or name in ("pred_boxes", "pred_classes", "pred_masks")

    def get(self, name: str) -> np.ndarray:
        """The field with this name."""
        return getattr(self, name)

    def get_fields(self) -> dict[str, np.ndarray]:
        """All fields but the masks, by their names."""
        fields = {"pred_boxes": self.pred_boxes, "pred_classes": self.pred_classes}
        return fields | self._scores


@dataclass
class PredictedImage:
    """
    An image with its predictions.

    Attributes:
        name: what it is called in the outputs, such as "street/a.jpg": where it lies in the folder
            that was given. No two images of a run have the same name.
        source: the file or the URL that was read.
        image: uint8 (H, W, 3), RGB.
        predictions: of this image.
    """

    name: str
    source: str
    image: np.ndarray
    predictions: Predictions
