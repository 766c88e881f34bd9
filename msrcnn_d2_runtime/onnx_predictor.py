"""Predict with an exported ONNX file: with ONNX Runtime, NumPy and Pillow alone."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import UserError
from .exported import ExportedPredictor

__all__ = ["OnnxPredictor"]


class OnnxPredictor(ExportedPredictor):
    """
    `msrcnn_d2.MaskScoringPredictor` for a file that `msrcnn-d2 export` has written, on the CPU.

    It needs neither PyTorch nor Detectron2, and finds what the original model finds, up to
    rounding. Its predictions are NumPy arrays with the names of Detectron2's `Instances`.

    Attributes:
        path: of the file.
        metadata: what the file says about its model, decoded; see `msrcnn_d2.export`.
        class_names: index of a class -> its name.
        image_settings: how images are read, such as the scale of 16-bit images.
        ranking: by which score predictions are sorted, and which are left out.

    Example:
        >>> predict = OnnxPredictor("model.onnx", score_threshold=0.5)
        >>> predictions = predict("image.jpg")["instances"]
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        rank_by: str | None = None,
        score_threshold: float | str = 0.0,
        threads: int | None = None,
    ):
        """
        Args:
            path: of a file that `msrcnn-d2 export` has written.
            rank_by: "quality_score" for the calibrated score, "mask_score", or "score" for the
                class score. By default the score that the file was exported with.
            score_threshold: predictions with a lower score are left out. `rank_by` chooses the
                score. Or, for a model with a calibrator, the precision that the predictions should
                have, such as "p95@75"; see `msrcnn_d2.MaskScoringPredictor`. The threshold on the
                class score in the file also applies.
            threads: how many threads compute; by default one for each core.

        Raises:
            UserError: there is no such file, it was not written by `msrcnn-d2 export`, or by a
                newer version of it, ONNX Runtime is not installed, the model lacks the score or
                the calibrator that is asked for, or its detections did not reach the precision.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"threads is at least 1, not {threads}.")
        path = os.fspath(path)
        self._session = _open(path, threads)
        self._outputs = [x.name for x in self._session.get_outputs()]
        metadata = self._session.get_modelmeta().custom_metadata_map
        super().__init__(path, metadata, rank_by=rank_by, score_threshold=score_threshold)

    def _output_names(self) -> Sequence[str]:
        return self._outputs

    def _run(self, image: np.ndarray, output_size: np.ndarray) -> dict[str, np.ndarray]:
        values = self._session.run(None, {"image": image, "output_size": output_size})
        return dict(zip(self._outputs, values, strict=True))


def _open(path: str, threads: int | None) -> Any:
    """
    Returns:
        an `onnxruntime.InferenceSession`.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise UserError(
            f"'{path}' runs with ONNX Runtime, which is not installed: run `pip install "
            "onnxruntime`."
        ) from None
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UserError(f"'{path}' {what}: give the path of an exported .onnx file.")
    options = onnxruntime.SessionOptions()
    # Errors only: it would warn of inputs with a default value, which the file has on purpose
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own types, which it does not document
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"'{path}' is not an ONNX file that can be read ({reason}).") from error
