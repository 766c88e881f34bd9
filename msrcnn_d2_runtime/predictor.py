"""What a predictor is, whatever runs its model."""

from collections.abc import Sequence
from typing import Protocol

from .image_reading import ImageLike, ImageSettings
from .predictions import Predictions

__all__ = ["Predictor"]


class Predictor(Protocol):
    """
    `msrcnn_d2.MaskScoringPredictor` and the predictors for exported models.

    Attributes:
        class_names: index of a class -> its name.
        rank_by: "quality_score", "mask_score" or "score": what predictions are sorted by.
        image_settings: how images are read.
    """

    class_names: tuple[str, ...]
    image_settings: ImageSettings

    @property
    def rank_by(self) -> str: ...

    def predictions(self, images: Sequence[ImageLike]) -> list[Predictions]:
        """
        Args:
            images: which the model sees as one batch, if it can. An image is a path, a PIL image or
                a uint8 array of shape (H, W, 3), BGR.

        Returns:
            the predictions of each image, sorted by `rank_by`, without those below the predictor's
            threshold.
        """
        ...
