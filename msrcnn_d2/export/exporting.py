"""Export a model into a file of either format, checked before it is written."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msrcnn_d2_runtime.files import write_whole
from msrcnn_d2_runtime.image_reading import ImageLike

from ..modeling import is_point_rend
from ..prediction.predictor import MaskScoringPredictor
from ..utils.errors import UserError
from .checking import INT8, Comparison, check, drawn_image, threshold_for
from .graph import InferenceGraph
from .metadata import metadata_of
from .onnx_file import Session, import_onnx, onnx_model, onnx_operators
from .quantization import quantized
from .torchscript_file import TORCHSCRIPT_OPERATORS, run_torchscript, torchscript_model

__all__ = ["Exported", "export_onnx", "export_torchscript"]


@dataclass
class Exported:
    """
    Attributes:
        path: of the file.
        num_bytes: its size.
        seconds: that the export took.
        comparisons: of the file with the model, all of which agree.
    """

    path: str
    num_bytes: int
    seconds: float
    comparisons: list[Comparison]


def export_onnx(
    predict: MaskScoringPredictor,
    path: str | os.PathLike,
    *,
    masks: str = "unpasted",
    calibration_images: Sequence[ImageLike] | None = None,
) -> Exported:
    """
    Write a model into an ONNX file, in the format of :mod:`msrcnn_d2.export`.

    The file is compared with the model, by ONNX Runtime on two images, before it is written. The
    model itself does not change.

    Args:
        predict: has the model, and says by which score it ranks and how it reads images. Its own
            `score_threshold` does not apply.
        path: of the file, which ends with ".onnx".
        masks: "unpasted" for probabilities in boxes, or "pasted" for bitmaps of the image.
        calibration_images: None for float32. Images, such as 100 of those that the model was
            trained on, for a model whose layers compute in int8: the ranges of their inputs are
            measured on them. The float32 model is checked as always, and the int8 model on the
            first of these images in which it finds something: at least half of what the model finds
            there has to be found. Compare AP as well, by `evaluate_predictor`.

    Raises:
        UserError: the model cannot be exported or the file cannot be written, a package is missing,
            the file does not find what the model finds, or nothing is found in the calibration
            images.
        ValueError: `masks` is something else.
    """
    start = time.perf_counter()
    path = checked_target(path, ".onnx")
    import_onnx()
    model: Any = predict.model
    if is_point_rend(getattr(model.roi_heads, "mask_head", None)):
        raise UserError(
            "A PointRend cannot be exported to ONNX, because the file would fail where nothing is "
            "found: export it to TorchScript (--format torchscript)."
        )
    num_groups = max(model.roi_heads.num_classes, len(model.proposal_generator.in_features))
    graph = InferenceGraph(predict, masks == "pasted", onnx_operators(num_groups))
    metadata = metadata_of(predict, masks, "float32")
    exported = onnx_model(graph, example_of(graph), metadata)
    contents = exported.SerializeToString()
    comparisons = check(graph, Session(contents))
    if calibration_images is not None:
        metadata = metadata_of(predict, masks, "int8")
        exported, image = quantized(exported, calibration_images, predict.image_settings, metadata)
        contents = exported.SerializeToString()
        comparisons = check(graph, Session(contents), image, INT8)
    write(path, contents)
    return Exported(path, len(contents), time.perf_counter() - start, comparisons)


def export_torchscript(
    predict: MaskScoringPredictor, path: str | os.PathLike, *, masks: str = "unpasted"
) -> Exported:
    """
    Write a model into a TorchScript file, for programs that have PyTorch and torchvision: the same
    as :func:`export_onnx`, except for the format of the file. No further package is needed.

    Args:
        predict, masks: as for :func:`export_onnx`.
        path: of the file, which ends with ".ts".

    Raises:
        UserError: the model cannot be exported or the file cannot be written, or the file does not
            find what the model finds.
        ValueError: `masks` is something else.
    """
    start = time.perf_counter()
    path = checked_target(path, ".ts")
    graph = InferenceGraph(predict, masks == "pasted", TORCHSCRIPT_OPERATORS)
    metadata = metadata_of(predict, masks, "float32")
    contents = torchscript_model(graph, example_of(graph), metadata)
    comparisons = check(graph, lambda *args: run_torchscript(contents, *args))
    write(path, contents)
    return Exported(path, len(contents), time.perf_counter() - start, comparisons)


def example_of(graph: InferenceGraph) -> tuple[torch.Tensor, ...]:
    """Arguments of a graph to trace it with, for which it finds something."""
    image = drawn_image(graph, portrait=False, seed=0)
    threshold = threshold_for(graph, image)
    # Copies: Pillow's arrays cannot be written
    return torch.tensor(image), torch.zeros(2, dtype=torch.int64), torch.tensor(threshold)


def checked_target(path: str | os.PathLike, suffix: str) -> str:
    """
    Raises:
        UserError: the file cannot be written, as far as one can tell before it is.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"'{target}' is a folder: name a file for the output, with {suffix}.")
    if target.suffix != suffix:
        raise UserError(f"'{target}' has to end with {suffix}.")
    if not target.parent.is_dir():
        raise UserError(f"The folder of '{target}' does not exist.")
    if not os.access(target.parent, os.W_OK):
        raise UserError(
            f"'{target}' is in a folder that cannot be written to: give another name for the "
            "output."
        )
    return str(target)


def write(path: str, contents: bytes) -> None:
    """
    Raises:
        UserError: the file cannot be written; what was there before is still there.
    """
    try:
        with write_whole(path) as f:
            f.write(contents)
    except OSError as error:
        raise UserError(f"Cannot write '{path}' ({error.strerror}).") from error
