"""Exponential moving averages (EMA) of the weights of a model in training."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from detectron2.engine import hooks

__all__ = ["PreciseBNOfAverages", "WeightAverages"]


class WeightAverages:
    """
    An exponential moving average of each trained parameter and of each buffer:
    `average = decay * average + (1 - decay) * value` after each iteration.

    They are saved as "ema_state" in the form of detrex and d2go, so that these can load them: by
    the names of the model, with its frozen parameters and all buffers. A frozen parameter equals
    its average and takes no memory here.
    """

    def __init__(self, model: nn.Module, decay: float, device: str = ""):
        """
        Args:
            model: not wrapped for parallel training.
            decay: from 0 for the values themselves to 1 for those at the start.
            device: where the averages are kept; "" for that of each parameter.
        """
        self._model = model
        self._device = device
        self._average = get_ema_multi_avg_fn(decay)
        self._averages: dict[str, torch.Tensor] = {}
        self._own: dict[str, torch.Tensor] = {}

    def _values(self) -> Iterator[tuple[str, torch.Tensor]]:
        trained = ((k, p) for k, p in self._model.named_parameters() if p.requires_grad)
        return itertools.chain(trained, self._model.named_buffers())

    def start(self) -> None:
        """Take the present values of what has no average yet."""
        for name, value in self._values():
            if name not in self._averages:
                self._averages[name] = self._copy(value)

    @torch.no_grad()
    def update(self) -> None:
        """Call this after each iteration, also if its step was left out."""
        self.start()  # what a hook has unfrozen since
        averages, values = [], []
        for name, value in self._values():
            average = self._averages[name]
            if value.is_floating_point():
                averages.append(average)
                values.append(value.detach().to(average.device))
            else:
                average.copy_(value)  # a counter, of which there is no mean
        self._average(averages, values, 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In the block the model has the averages as its weights."""
        self._own = {name: self._copy(value) for name, value in self._values()}
        try:
            self._assign(self._averages)
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Give the model its own weights, if it has the averages."""
        self._assign(self._own)
        self._own = {}

    @torch.no_grad()
    def take_buffers(self) -> None:
        """The buffers that the model has now, in `applied`, become averages."""
        for name, value in self._model.named_buffers():
            self._averages[name].copy_(value)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in self._values():
            if name in values:
                value.copy_(values[name])

    def _copy(self, value: torch.Tensor) -> torch.Tensor:
        return value.detach().to(self._device or value.device, copy=True)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average of each parameter and each buffer of the model, by name."""
        named = itertools.chain(self._model.named_parameters(), self._model.named_buffers())
        return {name: self._averages.get(name, value.detach()) for name, value in named}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """
        Raises:
            ValueError: an average has another shape than the parameter.
        """
        for name, value in self._values():
            average = state_dict.get(name)
            if average is None:
                continue
            if not isinstance(average, torch.Tensor) or average.shape != value.shape:
                raise ValueError(f"'{name}' has another shape")
            device = self._device or value.device
            self._averages[name] = average.to(device, value.dtype, copy=True)


class PreciseBNOfAverages(hooks.PreciseBN):
    """
    `PreciseBN` for the averages of the weights: they are evaluated, and need other statistics than
    the weights. It has to come after the averages are updated.
    """

    def __init__(self, averages: WeightAverages, *args: Any):
        """
        Args:
            args: as for Detectron2's hook.
        """
        super().__init__(*args)
        self._averages = averages

    def update_stats(self) -> None:
        with self._averages.applied():
            super().update_stats()
            self._averages.take_buffers()
