"""Detectron2's trainers, with an eye on numbers that go wrong."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import torch
from torch import nn

from detectron2.engine import AMPTrainer, SimpleTrainer

from ..utils.distributed import StepAgreement
from .failed_forward import forward_is_done, wait_for_other_forwards

__all__ = ["FiniteAMPTrainer", "FiniteTrainer", "adapt_forward", "is_finite", "nonfinite_gradients"]

logger = logging.getLogger(__name__)

# A scale starts at 65,536 and falls by half with each step that is skipped. Products with a smaller
# one than this are rounded to 0 in float16, whatever the loss is
MIN_SCALE = 1e-6


class _LeftStep(Exception):
    """The step must not reach the optimizer."""


class _FiniteSteps(SimpleTrainer):
    """
    A step whose loss, or the gradient of it, is not finite does not reach the optimizer, which
    would carry it into every weight. Of such steps up to `max_nonfinite_steps` are left out; the
    one after them ends the training.

    Under AMP infinite gradients are normal: its scaler leaves those steps out, and looks for a
    smaller scale. What it does not come to an end with, :class:`FiniteAMPTrainer` ends.
    """

    looks_at_gradients = True

    def __init__(
        self,
        *args,
        max_nonfinite_steps: int,
        agreement: StepAgreement,
        describe: Callable[[list[str], list[str]], str],
        stop: Callable[..., None],
        **kwargs,
    ):
        """
        Args:
            args, kwargs: those of the Detectron2 trainer.
            agreement: of the processes in each step; it is settled between the backward pass and
                the optimizer's step.
            describe: called in all processes with what is not finite in this one: texts about its
                losses, and names of parameters for their gradients. Returns the same sentence in
                all of them.
            stop: called in all processes with this sentence when there are too many such steps;
                has to raise an error. Under AMP it may get another sentence as `advice`.
        """
        super().__init__(*args, **kwargs)
        # The scheduler of the learning rate also follows a first step that was left out
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)`")
        self._max_nonfinite_steps = max_nonfinite_steps
        self._agreement = agreement
        self._is_nonfinite = False
        self._any_process_is_nonfinite = agreement.add(lambda: self._is_nonfinite)
        self._describe = describe
        self._stop = stop
        self._num_nonfinite_steps = 0

    def run_step(self):
        with suppress(_LeftStep):
            super().run_step()

    def _write_metrics(self, loss_dict: Mapping[str, torch.Tensor], *args, **kwargs):
        # What Detectron2 calls between the backward pass and the optimizer's step, whatever its
        # version and trainer
        values, losses, gradients = self._fetch(loss_dict)
        self._is_nonfinite = bool(losses or gradients)
        self._agreement.settle()
        if self._any_process_is_nonfinite():
            self._leave_step(losses, gradients)
        # Detectron2 fetches one loss after the other; these are on the CPU already
        super()._write_metrics(values, *args, **kwargs)

    def _fetch(self, loss_dict: Mapping[str, torch.Tensor]):
        """
        Wait for the device once in a step that is finite.

        Returns:
            the losses on the CPU; texts about those that are not finite; names of parameters whose
            gradient is not finite.
        """
        fetched = [x.detach().double() for x in loss_dict.values()]
        if self.looks_at_gradients:
            # One number to look at as long as all is well
            fetched.append(_norm_of_gradients(self.model).double())
        values = torch.stack(fetched).cpu()
        on_cpu = dict(zip(loss_dict, values))
        losses = [f"{k} is {x.item()}" for k, x in on_cpu.items() if not is_finite(x)]
        gradients = []
        if self.looks_at_gradients and not losses and not is_finite(values[-1]):
            gradients = nonfinite_gradients(self.model)
        return on_cpu, losses, gradients

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
    """
    :class:`AMPTrainer` that stops at losses that are not finite, and where its scaler finds no
    scale: after `max_skipped_steps` steps in a row with gradients that are not finite, or at a
    scale of less than `MIN_SCALE`. Processes share their gradients, so all of them count alike.
    """

    looks_at_gradients = False

    def __init__(self, *args, max_skipped_steps: int, **kwargs):
        """
        Args:
            args, kwargs: those of :class:`FiniteTrainer` and Detectron2's `AMPTrainer`.
            max_skipped_steps: at least 1.
        """
        super().__init__(*args, **kwargs)
        self._max_skipped_steps = max_skipped_steps
        self._num_skipped_steps = 0
        self._has_stepped = False
        # The scaler has to wait for the device before each step. Who asks it waits again
        self.optimizer.register_step_post_hook(self._on_optimizer_step)

    def _on_optimizer_step(self, optimizer, *_):
        # A fused optimizer is called in any case, and skips the step itself where the scaler has
        # found something. The scaler does not wait then, so this is the only wait
        found = getattr(optimizer, "found_inf", None)
        self._has_stepped = found is None or not found.item()

    def _leave_step(self, losses: list[str], gradients: list[str]):
        self._has_stepped = True  # it has not been up to the scaler
        super()._leave_step(losses, gradients)

    def run_step(self):
        self._has_stepped = False
        super().run_step()
        if self._has_stepped:
            self._num_skipped_steps = 0
            return
        self._num_skipped_steps += 1
        scale = self.grad_scaler.get_scale()
        if self._num_skipped_steps < self._max_skipped_steps and scale >= MIN_SCALE:
            return
        skipped = self._num_skipped_steps
        self._stop(
            self._describe([], nonfinite_gradients(self.model)),
            advice=(
                f"The gradient scaler has skipped {skipped} step{'s' * (skipped > 1)} in a row and "
                f"has reached a scale of {scale:g}, so the weights no longer change. Train at full "
                "precision (train.amp.enabled=False, yaml: SOLVER.AMP.ENABLED False) to see "
                "whether the gradients are finite there, or allow more such steps by "
                "train.amp.max_skipped_steps (yaml: SOLVER.AMP.MAX_SKIPPED_STEPS; now "
                f"{self._max_skipped_steps})."
            ),
        )

    def state_dict(self):
        return {**super().state_dict(), "num_skipped_steps": self._num_skipped_steps}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._num_skipped_steps = state_dict.get("num_skipped_steps", 0)


def adapt_forward(model: nn.Module, autocast_on_cpu: bool = False) -> None:
    """
    Let a model in training have a loss that is NaN where Detectron2 refuses predictions that are
    not finite. In many processes only one has such an error, while the others wait for its
    gradients; a loss reaches all of them.

    Args:
        autocast_on_cpu: whether the model also trains in bfloat16. Its evaluation is left at full
            precision, as `AMPTrainer` leaves it on a GPU.
    """
    # Not a closure: a copy of the model, or one that was pickled, has to call its own layers
    model.forward = partial(_forward, model, autocast_on_cpu)  # type: ignore[method-assign]


def _forward(model: nn.Module, autocast_on_cpu: bool, inputs):
    forward = partial(type(model).forward, model)
    if not model.training:
        return forward(inputs)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast_on_cpu):
            losses = forward(inputs)
    except FloatingPointError as error:
        logger.warning("%s", error)  # it says what was not finite
        wait_for_other_forwards(" ".join(str(error).split()))
        # Of all parameters, since processes wait for the gradient of each
        parts = (p.sum() * math.nan for p in model.parameters() if p.requires_grad)
        return {"a prediction": sum(parts)}
    forward_is_done()
    return losses


def _norm_of_gradients(model: nn.Module) -> torch.Tensor:
    return nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)


def nonfinite_gradients(model: nn.Module) -> list[str]:
    """Names of parameters whose gradient has an infinite number or a NaN."""
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if is_finite(_norm_of_gradients(model)):
        return []
    # Finite gradients can have an infinite norm
    return [name for name, gradient in named.items() if not is_finite(gradient)]


def is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())
