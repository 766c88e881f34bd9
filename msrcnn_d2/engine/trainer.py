"""Detectron2's trainers, with an eye on numbers that go wrong."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from torch import nn

from detectron2.engine import AMPTrainer, SimpleTrainer

from .agreement import any_process

__all__ = ["FiniteAMPTrainer", "FiniteTrainer", "losses_instead_of_errors", "nonfinite_gradients"]

logger = logging.getLogger(__name__)


class _LeftStep(Exception):
    """The step must not reach the optimizer."""


class _FiniteSteps(SimpleTrainer):
    """
    A step whose loss, or the gradient of it, is not finite does not reach the optimizer, which
    would carry it into every weight. Of such steps up to `max_nonfinite_steps` are left out; the
    one after them ends the training.

    Under AMP infinite gradients are normal: its scaler leaves those steps out, and looks for a
    smaller scale.
    """

    looks_at_gradients = True

    def __init__(
        self,
        *args,
        max_nonfinite_steps: int,
        describe: Callable[[list[str], list[str]], str],
        stop: Callable[[str], None],
        **kwargs,
    ):
        """
        Args:
            args, kwargs: those of the Detectron2 trainer.
            describe: called in all processes with what is not finite in this one: texts about its
                losses, and names of parameters for their gradients. Returns the same sentence in
                all of them.
            stop: called in all processes with this sentence when there are too many such steps;
                has to raise an error.
        """
        super().__init__(*args, **kwargs)
        self._max_nonfinite_steps = max_nonfinite_steps
        self._describe = describe
        self._stop = stop
        self._num_nonfinite_steps = 0

    def run_step(self):
        with suppress(_LeftStep):
            super().run_step()

    def _write_metrics(self, loss_dict: Mapping[str, torch.Tensor], *args, **kwargs):
        # What Detectron2 calls between the backward pass and the optimizer's step, whatever its
        # version and trainer
        losses = _nonfinite_losses(loss_dict)
        looks = self.looks_at_gradients and not losses
        gradients = nonfinite_gradients(self.model) if looks else []
        if any_process(bool(losses or gradients)):
            self._leave_step(losses, gradients)
        super()._write_metrics(loss_dict, *args, **kwargs)

    def _leave_step(self, losses: list[str], gradients: list[str]):
        description = self._describe(losses, gradients)
        if self._num_nonfinite_steps >= self._max_nonfinite_steps:
            self._stop(description)
        self._num_nonfinite_steps += 1
        logger.warning(
            "%s The step is left out (%d of at most %d).",
            *(description, self._num_nonfinite_steps, self._max_nonfinite_steps),
        )
        raise _LeftStep

    def state_dict(self):
        return {**super().state_dict(), "num_nonfinite_steps": self._num_nonfinite_steps}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._num_nonfinite_steps = state_dict.get("num_nonfinite_steps", 0)


class FiniteTrainer(_FiniteSteps):
    """:class:`SimpleTrainer` that stops at numbers that are not finite."""


class FiniteAMPTrainer(_FiniteSteps, AMPTrainer):
    """:class:`AMPTrainer` that stops at losses that are not finite."""

    looks_at_gradients = False


def losses_instead_of_errors(model: nn.Module) -> None:
    """
    Let a model in training have a loss that is NaN where Detectron2 refuses predictions that are
    not finite. In many processes only one has such an error, while the others wait for its
    gradients; a loss reaches all of them.
    """
    forward = model.forward

    def forward_or_nan(inputs):
        try:
            return forward(inputs)
        except FloatingPointError as error:
            if not model.training:
                raise
            logger.warning("%s", error)  # it says what was not finite
            # Of all parameters, since processes wait for the gradient of each
            parts = (p.sum() * math.nan for p in model.parameters() if p.requires_grad)
            return {"a prediction": sum(parts)}

    model.forward = forward_or_nan  # type: ignore[method-assign]


def _nonfinite_losses(loss_dict: Mapping[str, torch.Tensor]) -> list[str]:
    values = torch.stack([x.detach().float() for x in loss_dict.values()]).tolist()
    return [f"{k} is {value}" for k, value in zip(loss_dict, values) if not math.isfinite(value)]


def nonfinite_gradients(model: nn.Module) -> list[str]:
    """Names of parameters whose gradient has an infinite number or a NaN."""
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # One number to look at as long as all is well; finite gradients can have an infinite norm
    if is_finite(nn.utils.get_total_norm(named.values())):
        return []
    return [name for name, gradient in named.items() if not is_finite(gradient)]


def is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())
