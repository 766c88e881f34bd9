"""Int8 models: ranges of activations measured on images, by ONNX Runtime."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msrcnn_d2_runtime.image_reading import ImageLike, ImageSettings, read_bgr_image

from ..utils.errors import UserError
from .onnx_file import Session, import_onnx

__all__ = ["quantized"]

logger = logging.getLogger(__name__)

# The last layer of each head: small, and in them rounding costs most
KEPT = ("/objectness_logits", "/anchor_deltas", "/box_predictor", "/predictor", "/mask_calibrator")
WARNINGS, ERRORS = 2, 3  # severities of ONNX Runtime; the first is its default
LOG_PERIOD = 10  # images
OPERATORS = ("Conv", "ConvTranspose", "Gemm")


def quantized(
    model: Any, images: Sequence[ImageLike], settings: ImageSettings, metadata: dict[str, str]
) -> tuple[Any, np.ndarray]:
    """
    Args:
        model: an `onnx.ModelProto` from :func:`onnx_model`, which is not modified.
        images: like those that the model will see; 50 to 200 are enough.
        settings: how they are read.
        metadata: of the result.

    Returns:
        an `onnx.ModelProto` that computes its large layers in int8, and the first of the images in
        which the model finds something: uint8 (H, W, 3), RGB.

    Raises:
        UserError: the model finds nothing in the images.
    """
    onnx, onnxruntime = import_onnx()
    from onnxruntime import quantization

    reader = _Reader(model, images, settings)
    kept = [
        node.name
        for node in model.graph.node
        if node.op_type in OPERATORS and any(part in node.name for part in KEPT)
    ]
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, name)) for name in ("float32.onnx", "int8.onnx")]
        onnx.save(model, paths[0])
        # Of inputs that have defaults, and of preparations that change nothing here
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)
        onnxruntime.set_default_logger_severity(ERRORS)
        try:
            quantization.quantize_static(
                paths[0],
                paths[1],
                reader,
                op_types_to_quantize=list(OPERATORS),
                nodes_to_exclude=kept,
                per_channel=True,
                # Without it, sums of products overflow on CPUs that lack VNNI
                reduce_range=True,
            )
        finally:
            logging.root.setLevel(level)
            onnxruntime.set_default_logger_severity(WARNINGS)
        result = onnx.load(paths[1])
    onnx.helper.set_model_props(result, metadata)
    assert reader.first is not None  # it raises an error before
    return result, reader.first


class _Reader:
    """The images in which the model finds something: ranges need at least one value."""

    def __init__(self, model: Any, images: Sequence[ImageLike], settings: ImageSettings):
        self.session = Session(model.SerializeToString())
        self.images = enumerate(images)
        self.num_images = len(images)
        self.settings = settings
        self.first: np.ndarray | None = None

    def get_next(self) -> dict[str, np.ndarray] | None:
        for k, image in self.images:
            if k % LOG_PERIOD == 0:
                logger.info("Measuring ranges for int8 on image %d of %d", k + 1, self.num_images)
            pixels = np.ascontiguousarray(read_bgr_image(image, self.settings)[:, :, ::-1])
            if len(self.session(pixels)["boxes"]):
                self.first = pixels if self.first is None else self.first
                return {"image": pixels}
        if self.first is None:
            raise UserError(
                "The model finds no objects in the images that were given to calibrate int8 on, so "
                "there is nothing to measure: give images with objects."
            )
        return None
