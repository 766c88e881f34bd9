"""Tell where numbers went wrong, and keep the step so that it can be run again."""

import os

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.utils import comm

from ..checkpoint.writing import why_not_written
from ..utils.errors import UserError
from ..utils.files import write_whole
from ..utils.text import listed
from .loaders import ResumableBatches, StepSeeds
from .plain_batch import to_plain
from .recipe import Recipe

__all__ = ["StepKeeper"]


class StepKeeper:
    """What :class:`FiniteTrainer` asks when a loss is not finite; see its `describe`, `stop`."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, batches: ResumableBatches, seeds: StepSeeds
    ):
        self._recipe = recipe
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._batches = batches
        self._seeds = seeds

    def describe(self, losses: list[str], gradients: list[str]) -> str:
        """One sentence for all processes: the iteration, what is not finite, the images."""
        found = comm.all_gather((losses, gradients, self._image_ids()))
        culprits = [x for x in found if x[0]]
        texts = [text for losses, _, _ in culprits for text in losses]
        if not culprits:  # processes have averaged gradients: any of them may be the cause
            culprits = found
            texts = [f"the gradient of {name} is not finite" for name in found[0][1]]
        images = [image for _, _, ids in culprits for image in ids]
        return (
            f"Iteration {self._seeds.trainer.iter}: {listed(list(dict.fromkeys(texts)))} (images "
            f"{', '.join(images)})."
        )

    def _image_ids(self) -> list[str]:
        # A loader of the user's own may give others
        images = (x for x in self._batches.current if isinstance(x, dict))
        return [str(x.get("image_id", x.get("file_name"))) for x in images]

    def stop(self, description: str, advice: str = "") -> None:
        """
        Write the step to "nonfinite/" in the output folder.

        Args:
            advice: what to do, if it is not about the learning rate and `max_nonfinite_steps`.

        Raises:
            UserError: with the description, and what to do.
        """
        kept = comm.all_gather(self._keep())[0]
        advice = advice or (
            "Most often the learning rate (optimizer.lr, yaml: SOLVER.BASE_LR) is too high, or the "
            "warm-up too short. To leave out up to N such steps instead, set "
            "train.max_nonfinite_steps=N (yaml: SOLVER.MAX_NONFINITE_STEPS; now "
            f"{self._recipe.max_nonfinite_steps})."
        )
        raise UserError(f"{description} {kept} {advice}", on_all_processes=True)

    def _keep(self) -> str:
        """Write the step, on the main process; return a sentence about it."""
        inputs = to_plain(self._batches.current)
        parts = comm.gather({"seed": self._seeds.seed_of_step(), "inputs": inputs})
        if not comm.is_main_process():
            return ""
        iteration = self._seeds.trainer.iter
        step = {"model": self._model.state_dict(), "iteration": iteration, "batches": parts}
        path = os.path.join(self._recipe.output_dir, "nonfinite", f"step_{iteration:07d}.pth")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with write_whole(path) as f:
                torch.save(step, f)
        except (OSError, RuntimeError) as error:  # the latter from PyTorch
            return f"The step could not be kept ({why_not_written(error)})."
        return f"`python -m msrcnn_d2.engine.replay {path}` runs the step again."
