"""A predictor without a model, and files to upload to its page."""

import io

import numpy as np
from PIL import Image

from msrcnn_d2_runtime.image_reading import ImageSettings
from msrcnn_d2_runtime.predictions import CroppedMasks, Masks, Predictions, RoiMasks

# Class score and predicted IoU of each object
SCORES = [(0.9, 0.5), (0.8, 0.3), (0.7, 0.9), (0.2, 0.6)]


class FakePredictor:
    """
    Finds the same objects in every image. The lowest class score says which image it was: it is the
    mean of all pixels / 1000.
    """

    class_names: tuple[str, ...] = ("cat", "<b>dog</b>")
    rank_by = "mask_score"

    def __init__(self, num_objects=4, settings=None, cropped=False, plain=False, calibrated=False):
        """
        Args:
            cropped: whether masks are cropped bitmaps, such as those of tiled images.
            plain: whether this is a Mask R-CNN without mask scores.
            calibrated: whether it has the scores of a calibrator, too. It ranks by mask scores.
        """
        self.image_settings = settings or ImageSettings()
        self.num_objects, self.cropped, self.plain = num_objects, cropped, plain
        self.calibrated = calibrated
        self.rank_by = "score" if plain else "mask_score"
        self.seen: list[np.ndarray] = []

    def predictions(self, images):
        self.seen += [np.array(x) for x in images]
        return [self._predict(np.asarray(x)) for x in images]

    def _predict(self, image):
        height, width = image.shape[:2]
        n = self.num_objects
        pairs = np.array([SCORES[k % len(SCORES)] for k in range(n)], np.float32).reshape(-1, 2)
        if n:
            pairs[-1, 0] = image.mean() / 1000
        # Each object in a column of its own, and smaller than the one before
        k = np.arange(n)
        boxes = np.stack(
            [k / max(n, 1), k * 0, (k + 0.9) / max(n, 1), 0.9 - 0.5 * k / max(n, 1)], 1
        )
        boxes = (boxes * [width, height, width, height]).astype(np.float32)
        masks: Masks = RoiMasks(np.ones((n, 4, 4), np.float32), boxes, (height, width))
        if self.cropped:
            masks = CroppedMasks.of(masks.pasted())
        scores = {"scores": pairs[:, 0]}
        if not self.plain:
            scores |= {"pred_mask_ious": pairs[:, 1], "mask_scores": pairs.prod(axis=1)}
        if self.calibrated:
            scores |= {"quality_scores": pairs[:, 1], "expected_mask_ious": pairs[:, 1]}
        ranking = "scores" if self.plain else "mask_scores"
        predictions = Predictions(
            pred_boxes=boxes, pred_classes=k % 2, masks=masks, scores=scores, ranking=ranking
        )
        return predictions[np.argsort(-predictions.rank_scores, kind="stable")]


def image_file(image=(120, 80), kind="PNG", **options) -> bytes:
    """
    Args:
        image: an image, or height and width of a grey one.
        kind, options: of the file, as Pillow calls them.
    """
    if not isinstance(image, Image.Image):
        image = Image.new("RGB", image[::-1], (60, 60, 60))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
