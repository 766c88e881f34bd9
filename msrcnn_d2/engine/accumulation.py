"""Gradients of a batch that is too large for the memory, part by part."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from msrcnn_d2_runtime.text import plural

from ..utils.errors import UserError

__all__ = ["ModelInParts"]


class ModelInParts:
    """
    Stands for a model in a training step: it is called with the whole batch, and gives the model
    one part of it after the other.

    It computes the gradients of all parts but the last. The trainer computes those of the last
    part, and must not set the others to zero before that. The sum is the gradient of the mean over
    the parts, where each counts by its number of images. Processes exchange it once.
    """

    def __init__(self, model: nn.Module, num_parts: int, backward: Callable[[Any], None]):
        """
        Args:
            model: in training mode; it returns a dict of losses. Other attributes of this object
                are those of the model.
            num_parts: at least 2.
            backward: called with the loss of a part, a scalar; computes its gradients.
        """
        self._model = model
        self._num_parts = num_parts
        self._backward = backward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, batch: Any) -> dict[str, torch.Tensor]:
        """
        Args:
            batch: list of the images of this process.

        Returns:
            the mean of each loss over the parts, by name. Only the share of the last part is
            connected to a graph.

        Raises:
            UserError: the batch is not a list of enough images.
        """
        *first_parts, last_part = self._split(batch)
        means: dict[str, Any] = defaultdict(int)
        for part in first_parts:
            is_parallel = isinstance(self._model, DistributedDataParallel)
            with self._model.no_sync() if is_parallel else nullcontext():  # type: ignore[operator]
                losses = self._losses(part, len(part) / len(batch))
                self._backward(sum(losses.values()))
            for name, loss in losses.items():
                means[name] = means[name] + loss.detach()
        for name, loss in self._losses(last_part, len(last_part) / len(batch)).items():
            means[name] = means[name] + loss
        return dict(means)

    def _split(self, batch: Any) -> list[Sequence]:
        count = self._num_parts
        if not isinstance(batch, (list, tuple)) or len(batch) < count:
            is_list = isinstance(batch, (list, tuple))
            found = plural(len(batch), "image") if is_list else f"type {type(batch).__name__}"
            raise UserError(
                f"A batch of {found} cannot be split into {count} parts: set "
                "train.accumulation_steps (yaml: SOLVER.ACCUMULATION_STEPS) to at most the number "
                "of images that each process has in an iteration."
            )
        return [
            batch[len(batch) * k // count : len(batch) * (k + 1) // count] for k in range(count)
        ]

    def _losses(self, part: Sequence, weight: float) -> dict[str, torch.Tensor]:
        losses = self._model(part)
        if isinstance(losses, torch.Tensor):
            losses = {"total_loss": losses}  # as Detectron2's trainer names it
        return {name: weight * loss for name, loss in losses.items()}
