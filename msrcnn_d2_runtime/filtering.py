"""Keep the predictions that somebody wants: by their scores, classes and number."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import UserError
from .predictions import Predictions
from .scores import SCORES
from .text import listed

__all__ = ["Filter"]


@dataclass(frozen=True)
class Filter:
    """
    Which predictions are kept.

    Attributes:
        min_score, min_mask_score, min_iou: the smallest class score, mask score and predicted IoU.
        classes: names of the classes; None for all.
        top_k: how many of the others are kept at most in each image, the best; None for all.

    Example:
        >>> wanted = Filter(min_mask_score=0.5, classes=["person"], top_k=10)
        >>> people = wanted(predictions, predictor.class_names)
    """

    min_score: float = 0.0
    min_mask_score: float = 0.0
    min_iou: float = 0.0
    classes: Sequence[str] | None = None
    top_k: int | None = None

    def __call__(self, predictions: Predictions, class_names: Sequence[str]) -> Predictions:
        """
        Args:
            predictions: of an image.
            class_names: index of a class -> its name.

        Raises:
            UserError: the model has no such class, or does not predict the score.
        """
        kept = np.ones(len(predictions), dtype=bool)
        for name, minimum in (
            ("class_score", self.min_score),
            ("mask_score", self.min_mask_score),
            ("predicted_iou", self.min_iou),
        ):
            if minimum <= 0:
                continue
            if not predictions.has(SCORES[name].field):
                there = [x.title for x in SCORES.values() if predictions.has(x.field)]
                raise UserError(
                    f"The model predicts no {SCORES[name].title}, only {listed(there)}: there is "
                    "nothing that can be compared with the minimum."
                )
            kept &= predictions.get(SCORES[name].field) >= minimum
        if self.classes is not None:
            kept &= np.isin(predictions.pred_classes, self.class_indices(class_names))
        return predictions[np.flatnonzero(kept)[: self.top_k]]

    def class_indices(self, class_names: Sequence[str]) -> list[int]:
        """
        The indices of `classes`. Upper and lower case mean the same, unless the model has both.

        Raises:
            UserError: the model has no such class.
        """
        if self.classes is None:
            return [*range(len(class_names))]
        folded = [name.casefold() for name in class_names]
        indices: list[int] = []
        for name in self.classes:
            found = [k for k, x in enumerate(class_names) if x == name]
            found = found or [k for k, x in enumerate(folded) if x == name.casefold()]
            if not found:
                nearest = difflib.get_close_matches(name.casefold(), folded, n=1)
                near = [class_names[folded.index(x)] for x in nearest] or class_names
                advice = "did you mean" if nearest else "it has"
                raise UserError(
                    f"The model has no class '{name}'; {advice} {listed([*near], 10)}"
                    f"{'?' if nearest else '.'}"
                )
            indices += found
        return indices
