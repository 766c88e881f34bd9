"""Detectron2's trainers, which stop before a loss that is not finite spoils the weights."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm

from msrcnn_d2_runtime.text import listed

from ..utils.distributed import StepAgreement, forward_is_done, wait_for_other_forwards
from ..utils.errors import UserError
from .accumulation import ModelInParts

__all__ = ["FiniteAMPTrainer", "FiniteTrainer", "adapt_forward"]

logger = logging.getLogger(__name__)

# A scale starts at 65,536 and falls by half with each step that is skipped. Products with a smaller
# one than this are rounded to 0 in float16, whatever the loss is
MIN_SCALE = 1e-6


class _LeftStep(Exception):
    """The step must not reach the optimizer."""


class FiniteTrainer(SimpleTrainer):
    """
    :class:`SimpleTrainer` that looks at losses and gradients before the optimizer's step.

    A step with a loss or a gradient that is not finite would spoil every weight. Up to
    `max_nonfinite_steps` such steps are left out; the next one ends the training.
    """

    looks_at_gradients = True
    model: Any  # nn.Module, or what stands for it in a step

    def __init__(
        self,
        *args: Any,
        max_nonfinite_steps: int,
        agreement: StepAgreement,
        image_ids: Callable[[], list[str]],
        accumulation_steps: int = 1,
        **kwargs: Any,
    ):
        """
        Args:
            args, kwargs: those of the Detectron2 trainer.
            agreement: of the processes in each step. The trainer settles it between the backward
                pass and the optimizer's step.
            image_ids: returns the ids of this process's images in the current step.
            accumulation_steps: number of parts of a batch whose gradients are computed one after
                the other, see :class:`ModelInParts`.
        """
        super().__init__(*args, **kwargs)
        # PyTorch gives this warning if the very first step was left out
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)`")
        self._max_nonfinite_steps = max_nonfinite_steps
        self._agreement = agreement
        self._is_nonfinite = False
        self._any_process_is_nonfinite = agreement.add(lambda: self._is_nonfinite)
        self._image_ids = image_ids
        self._accumulation_steps = accumulation_steps
        self._num_nonfinite_steps = 0

    def run_step(self) -> None:
        with suppress(_LeftStep), self._in_parts():
            super().run_step()

    @contextmanager
    def _in_parts(self) -> Iterator[None]:
        """Around Detectron2's step, which sets gradients to zero after the forward pass."""
        if self._accumulation_steps == 1:
            yield
            return
        model: Any = self.model
        in_parts: Any = ModelInParts(model, self._accumulation_steps, self._backward)
        zero_grad = self.optimizer.zero_grad
        zero_grad()
        self.optimizer.zero_grad = lambda: None
        self.model = in_parts
        try:
            yield
        finally:
            self.model, self.optimizer.zero_grad = model, zero_grad

    def _backward(self, loss: torch.Tensor) -> None:
        """As the Detectron2 trainer does it."""
        loss.backward()

    def _write_metrics(
        self, loss_dict: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> None:
        # All trainers in all versions of Detectron2 call this method between the backward pass and
        # the optimizer's step
        values, losses, gradients = self._fetch(loss_dict)
        self._is_nonfinite = bool(losses or gradients)
        self._agreement.settle()
        if self._any_process_is_nonfinite():
            self._leave_step(losses, gradients)
        # Detectron2 fetches one loss after the other; these are on the CPU already
        super()._write_metrics(values, *args, **kwargs)

    def _fetch(
        self, loss_dict: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
        """
        Wait for the device only once if all is finite.

        Returns:
            the losses on the CPU; texts about those that are not finite; names of parameters whose
            gradient is not finite.
        """
        fetched = [x.detach().double() for x in loss_dict.values()]
        if self.looks_at_gradients:
            # The norm is finite only if all gradients are
            gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
            fetched.append(nn.utils.get_total_norm(gradients).double())
        values = torch.stack(fetched).cpu()
        on_cpu = dict(zip(loss_dict, values))
        wrong = [f"{k} is {x.item()}" for k, x in on_cpu.items() if not x.isfinite()]
        if wrong or not self.looks_at_gradients or values[-1].isfinite():
            return on_cpu, wrong, []
        return on_cpu, [], _nonfinite_gradients(self.model)  # none if only the norm is infinite

    def _leave_step(self, losses: list[str], gradients: list[str]) -> NoReturn:
        if self._num_nonfinite_steps >= self._max_nonfinite_steps:
            self._stop(
                losses,
                gradients,
                "Most often the learning rate (optimizer.lr, yaml: SOLVER.BASE_LR) is too high or "
                "the warm-up too short. `--resume train.detect_anomaly=True` (yaml: "
                "SOLVER.DETECT_ANOMALY True) repeats the iterations after the last checkpoint "
                "with PyTorch's torch.autograd.set_detect_anomaly, which shows the operation that "
                "gave the first NaN. To leave out up to N such steps, set "
                "train.max_nonfinite_steps=N (yaml: SOLVER.MAX_NONFINITE_STEPS; now "
                f"{self._max_nonfinite_steps}).",
            )
        self._num_nonfinite_steps += 1
        logger.warning(
            "%s The step is left out (%d of at most %d).",
            self._describe(losses, gradients),
            self._num_nonfinite_steps,
            self._max_nonfinite_steps,
        )
        raise _LeftStep

    def _stop(self, losses: list[str], gradients: list[str], advice: str) -> NoReturn:
        raise UserError(f"{self._describe(losses, gradients)} {advice}", on_all_processes=True)

    def _describe(self, losses: list[str], gradients: list[str]) -> str:
        """
        Called in all processes, each with what is not finite in it; returns the same sentence in
        all of them: the iteration, what is not finite, and the images.
        """
        found = comm.all_gather((losses, gradients, self._image_ids()))
        culprits = [x for x in found if x[0]]
        texts = [text for losses, _, _ in culprits for text in losses]
        if not culprits:  # processes have averaged gradients: any of them may be the cause
            culprits = found
            texts = [f"the gradient of {name} is not finite" for name in found[0][1]]
        images = [image for _, _, ids in culprits for image in ids]
        what = listed(list(dict.fromkeys(texts)))
        return f"Iteration {self.iter}: {what} (images {', '.join(images)})."

    def state_dict(self) -> dict:
        return {**super().state_dict(), "num_nonfinite_steps": self._num_nonfinite_steps}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._num_nonfinite_steps = state_dict.get("num_nonfinite_steps", 0)


class FiniteAMPTrainer(FiniteTrainer, AMPTrainer):
    """
    :class:`AMPTrainer` that looks at losses, and at its gradient scaler.

    Under AMP infinite gradients are normal: the scaler skips the step and lowers its scale. The
    training ends after `max_skipped_steps` such steps in a row, or at a scale below `MIN_SCALE`.
    Processes share their gradients, so all of them count alike.
    """

    looks_at_gradients = False

    def __init__(self, *args: Any, max_skipped_steps: int, **kwargs: Any):
        """
        Args:
            args, kwargs: those of :class:`FiniteTrainer` and Detectron2's `AMPTrainer`.
            max_skipped_steps: at least 1.
        """
        super().__init__(*args, **kwargs)
        self._max_skipped_steps = max_skipped_steps
        self._num_skipped_steps = 0
        self._has_stepped = False
        # The scaler waits for the device before each step; to ask it would be a second wait
        self.optimizer.register_step_post_hook(self._on_optimizer_step)

    def _on_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A fused optimizer is called in any case, and skips the step itself where the scaler has
        # found something. The scaler does not wait then, so this is the only wait
        found = getattr(optimizer, "found_inf", None)
        self._has_stepped = found is None or not found.item()

    def _leave_step(self, losses: list[str], gradients: list[str]) -> NoReturn:
        self._has_stepped = True  # the scaler has not skipped it
        super()._leave_step(losses, gradients)

    def _backward(self, loss: torch.Tensor) -> None:
        with torch.autocast("cuda", enabled=False):
            self.grad_scaler.scale(loss).backward()
        torch.clear_autocast_cache()  # weights in float16 with the graph that is used up

    def run_step(self) -> None:
        self._has_stepped = False
        super().run_step()
        if self._has_stepped:
            self._num_skipped_steps = 0
            return
        self._num_skipped_steps += 1
        skipped, scale = self._num_skipped_steps, self.grad_scaler.get_scale()
        if skipped >= self._max_skipped_steps or scale < MIN_SCALE:
            self._stop(
                [],
                _nonfinite_gradients(self.model),
                f"The gradient scaler has skipped {skipped} step{'s' * (skipped > 1)} in a row and "
                f"has reached a scale of {scale:g}, so the weights no longer change. Train at full "
                "precision (train.amp.enabled=False, yaml: SOLVER.AMP.ENABLED False) to see "
                "whether the gradients are finite there, or allow more such steps by "
                "train.amp.max_skipped_steps (yaml: SOLVER.AMP.MAX_SKIPPED_STEPS; now "
                f"{self._max_skipped_steps}).",
            )

    def state_dict(self) -> dict:
        return {**super().state_dict(), "num_skipped_steps": self._num_skipped_steps}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._num_skipped_steps = state_dict.get("num_skipped_steps", 0)


def _nonfinite_gradients(model: nn.Module) -> list[str]:
    """Names of parameters whose gradient has an infinite number or a NaN."""
    named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return [name for name, gradient in named if not gradient.isfinite().all()]


def adapt_forward(model: nn.Module, autocast_on_cpu: bool = False) -> None:
    """
    Give a model in training a NaN loss where Detectron2 raises an error about predictions that are
    not finite. That error would end one process while the others wait for its gradients. A loss
    reaches all of them.

    Args:
        autocast_on_cpu: whether the model also trains in bfloat16. Its evaluation is left at full
            precision, as `AMPTrainer` leaves it on a GPU.
    """
    # Not a closure: a copy of the model, or one that was pickled, has to call its own layers
    model.forward = partial(_forward, model, autocast_on_cpu)  # type: ignore[method-assign]


def _forward(model: nn.Module, autocast_on_cpu: bool, inputs: Any) -> Any:
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
