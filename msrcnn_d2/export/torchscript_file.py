"""Models as TorchScript files."""

import io
import json
import warnings

import numpy as np
import torch
from torch import nn

from .graph import InferenceGraph, Operators, moved_apart

__all__ = ["METADATA_FILE", "TORCHSCRIPT_OPERATORS", "run_torchscript", "torchscript_model"]

METADATA_FILE = "metadata.json"


class _WithDefaults(nn.Module):
    """A traced graph whose inputs besides the image can be left out."""

    def __init__(self, traced: nn.Module, score_threshold: float):
        super().__init__()
        self.traced = traced
        self.score_threshold = score_threshold

    def forward(
        self,
        image: torch.Tensor,
        output_size: torch.Tensor | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, torch.Tensor]:
        if output_size is None:
            output_size = torch.zeros([2], dtype=torch.int64)
        if score_threshold is None:
            score_threshold = self.score_threshold
        return self.traced(image, output_size, torch.tensor(score_threshold))


def torchscript_model(
    graph: InferenceGraph, example: tuple[torch.Tensor, ...], metadata: dict[str, str]
) -> bytes:
    """
    Args:
        graph: with `TORCHSCRIPT_OPERATORS`.
        example: arguments of its `forward`.
        metadata: see :func:`metadata_of`.

    Returns:
        the contents of the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing takes for a constant; it is compared
        # Not strict, as the outputs are a dict; its names are always the same
        traced = torch.jit.trace(graph, example, check_trace=False, strict=False)
        model = torch.jit.script(_WithDefaults(traced, float(metadata["score_threshold"])).eval())
    buffer = io.BytesIO()
    torch.jit.save(model, buffer, _extra_files={METADATA_FILE: json.dumps(metadata)})
    return buffer.getvalue()


def run_torchscript(contents: bytes, image: np.ndarray, score_threshold: float) -> dict:
    """
    Args:
        contents: of a file.
        image: uint8 (H, W, 3), RGB.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the age of TorchScript
        model = torch.jit.load(io.BytesIO(contents))
    found = model(torch.tensor(image), score_threshold=score_threshold)
    return {name: value.numpy() for name, value in found.items()}


def _best_first(scores: torch.Tensor) -> torch.Tensor:
    return scores.sort(descending=True, stable=True).indices


def _nms(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    return _nms_by_class(moved_apart(boxes, idxs), scores, idxs, iou_threshold)


@torch.jit.script_if_tracing
def _nms_by_class(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for k in torch.unique(idxs):
        of_class = torch.where(idxs == k)[0]
        best = torch.ops.torchvision.nms(boxes[of_class], scores[of_class], iou_threshold)
        kept[of_class[best]] = True
    indices = torch.where(kept)[0]
    return indices[torch.sort(scores[indices], stable=True, dim=0, descending=True)[1]]


TORCHSCRIPT_OPERATORS = Operators(_nms, _best_first)
