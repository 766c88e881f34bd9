"""Predict with a model that `msrcnn-d2 export` has written, whatever runs it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from PIL import Image

from .errors import UserError
from .image_reading import ImageLike, ImageSettings, read_bgr_image
from .predictions import SCORE_NAMES, CroppedMasks, Masks, PredictedImage, Predictions, RoiMasks
from .ranking import SCORE_FIELDS, Ranking, check_ranking, rank_by_of
from .text import shown

__all__ = ["FORMAT_VERSION", "ExportedPredictor", "resized_size"]

FORMAT_VERSION = 1  # of files that are written now; `msrcnn_d2.export` describes it


class ExportedPredictor:
    """
    What the predictors of exported models have in common; those for a kind of file add `_run`.

    Attributes:
        path: of the file.
        metadata: what the file says about its model, decoded; see `msrcnn_d2.export`.
        class_names: index of a class -> its name.
        image_settings: how images are read.
        ranking: by which score predictions are sorted, and which are left out.
    """

    def __init__(
        self,
        path: str,
        metadata: Mapping[str, str],
        *,
        rank_by: str | None,
        score_threshold: float | str,
    ):
        """
        Args:
            path: of the file.
            metadata: as it is in the file, all of it text.
            rank_by, score_threshold: as for :class:`OnnxPredictor`.

        Raises:
            UserError: the file was not written by `msrcnn-d2 export`, or by a newer version of it;
                or its model lacks the score or the calibrator that is asked for.
        """
        check_ranking(rank_by, score_threshold)
        self.path = path
        self.metadata = _decoded(path, metadata)
        self.class_names = tuple(self.metadata["class_names"])
        self.image_settings = ImageSettings(**self.metadata["image_settings"])
        own_ranking = self.metadata["ranking"]
        if rank_by is None:
            (rank_by,) = (key for key, field in SCORE_FIELDS.items() if field == own_ranking)
        table = self.metadata.get("accept_thresholds")
        outputs = self._output_names()
        rank_by = rank_by_of(rank_by, score_threshold, "mask_scores" in outputs, table is not None)
        thresholds = None if table is None else np.array(table, dtype=np.float32)
        self.ranking = Ranking.of(rank_by, score_threshold, thresholds)

    @property
    def rank_by(self) -> str:
        """ "quality_score", "mask_score" or "score": what predictions are sorted by."""
        return self.ranking.rank_by

    @overload
    def __call__(self, images: list[ImageLike]) -> list[dict[str, Predictions]]: ...
    @overload
    def __call__(self, images: ImageLike) -> dict[str, Predictions]: ...
    def __call__(self, images: Any) -> Any:
        """
        Args:
            images: an image, or a list of images. An image is a path, a PIL image, or what
                `cv2.imread` returns: a uint8 array of shape (H, W, 3), BGR. Grey images of shape
                (H, W) or (H, W, 1) and images with an alpha channel (BGRA), which is ignored, are
                accepted.

        Returns:
            for each image a dict with "instances", its :class:`Predictions`.

        Raises:
            UserError: a file is missing or not an image.
            TypeError, ValueError: an array is not an image as described above.
        """
        if isinstance(images, (list, tuple)):
            return [{"instances": x} for x in self.predictions(images)]
        return {"instances": self.predictions([images])[0]}

    def predictions(self, images: Sequence[ImageLike]) -> list[Predictions]:
        """
        Args, Raises: as for calling it. The images are predicted one after the other.

        Returns:
            for each image its :class:`Predictions`.
        """
        return [self._predicted(read_bgr_image(x, self.image_settings)) for x in images]

    def predict_all(self, inputs: Any, **options: Any) -> Iterator[PredictedImage]:
        """
        Predict the images of files, folders, videos and URLs one after the other.

        Args:
            inputs, options: as for :func:`msrcnn_d2_runtime.pipeline.predict_all`.
        """
        from .pipeline import predict_all

        return predict_all(self, inputs, **options)

    def _output_names(self) -> Sequence[str]:
        raise NotImplementedError

    def _run(self, image: np.ndarray, output_size: np.ndarray) -> Mapping[str, np.ndarray]:
        """
        Args:
            image: uint8 (H, W, 3), in the channel order of the metadata, contiguous.
            output_size: int64 (2,), height and width that boxes and masks are for.

        Returns:
            the outputs of the model by their names.
        """
        raise NotImplementedError

    def _predicted(self, image: np.ndarray) -> Predictions:
        """The predictions for an image in BGR order."""
        height, width = size = image.shape[:2]
        if self.metadata["channel_order"] == "RGB":
            image = image[:, :, ::-1]
        image = np.ascontiguousarray(image)
        rule = self.metadata["resize"]
        # The file would do the same to the same pixels, but Pillow is faster
        if rule is not None:
            new_size = resized_size(size, **rule)
            resized = Image.fromarray(image).resize(new_size[::-1], Image.Resampling.BILINEAR)
            image = np.array(resized)
        found = self._run(image, np.array(size, dtype=np.int64))

        scores = {name: found[name] for name in SCORE_NAMES if name in found}
        masks: Masks
        if self.metadata["masks"] == "pasted":
            masks = CroppedMasks.of(found["masks"])
        else:
            masks = RoiMasks(found["masks"], found["boxes"], (height, width))
        predictions = Predictions(
            pred_boxes=found["boxes"],
            pred_classes=found["classes"],
            masks=masks,
            scores=scores,
            ranking=SCORE_FIELDS[self.rank_by],
        )
        return predictions[self.ranking.order(scores)]


def resized_size(size: tuple[int, int], short_edge: int, max_size: int) -> tuple[int, int]:
    """
    Detectron2's `ResizeShortestEdge`.

    Args:
        size: height and width in pixels.
        short_edge: what the shorter side becomes,
        max_size: unless the longer side would be longer than this; that side then gets this length.

    Returns:
        the new height and width.
    """
    # The same operations in the same order as in Detectron2, for the same rounding
    scale = short_edge / min(size)
    height, width = (float(short_edge) if x == min(size) else scale * x for x in size)
    if max(height, width) > max_size:
        scale = max_size / max(height, width)
        height, width = height * scale, width * scale
    return int(height + 0.5), int(width + 0.5)


def _decoded(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """
    Raises:
        UserError: these are not the metadata of an exported model that can be read.
    """
    if metadata.get("format") != "msrcnn_d2":
        raise UserError(
            f"'{path}' was not written by `msrcnn-d2 export`: export the checkpoint that it comes "
            "from with that command."
        )
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        writer = shown(metadata.get("msrcnn_d2_version"))
        raise UserError(
            f"'{path}' has format {shown(version)}, and this version of msrcnn_d2 reads formats up "
            f"to {FORMAT_VERSION}: install version {writer} of msrcnn_d2, which wrote it, or a "
            "newer one."
        )
    plain = ("format", "format_version", "msrcnn_d2_version")
    decoded: dict[str, Any] = {}
    for name, value in metadata.items():
        try:
            decoded[name] = value if name in plain else json.loads(value)
        except ValueError:  # plain text
            decoded[name] = value
    needed = ("class_names", "image_settings", "ranking", "channel_order", "resize", "masks")
    missing = [name for name in needed if name not in decoded]
    if missing:
        raise UserError(f"'{path}' is damaged: its metadata lack {missing[0]}. Export it again.")
    return decoded
