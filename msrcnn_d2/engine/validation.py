"""The losses of a training on held-out images."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase as NormLayer  # those with statistics

from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from .evaluate import own_model, share_buffers, test_precision
from .hooks import text_of_losses
from .loaders import leaving_generators
from .recipe import Recipe

__all__ = ["validation_losses"]

logger = logging.getLogger(__name__)


def validation_losses(recipe: Recipe, model: nn.Module) -> dict[str, float]:
    """
    The losses of the training on the recipe's validation set, and log them. The same weights have
    the same losses each time, with any number of processes: each image is a batch of its own, its
    anchors and proposals are sampled with the same random numbers, and layers such as dropout and
    batch norm work as in an evaluation. The model stays as it is, and so do the generators of
    random numbers. All processes call it.

    Args:
        model: in training mode.

    Returns:
        means over all images of each loss and of "total_loss"; NaN where predictions are not
        finite. On the main process; empty on others, and without a validation set.
    """
    if recipe.validation_set is None:
        return {}
    share_buffers(model)
    model = own_model(model)
    losses_of_images: list[dict[str, float]] = []
    # A storage of its own, since models log into the current one. Detectron2 draws pictures in
    # iterations that are multiples of a period
    storage = EventStorage(start_iter=-1)
    with leaving_generators(), _quiet_layers(model), test_precision(recipe), storage:
        seed_all_rng(0)  # of the loader
        for batch in recipe.validation_set.build_loader():
            seed_all_rng(0)
            try:
                with torch.no_grad():
                    # Not that of `adapt_forward`, in which processes wait for each other
                    losses = type(model).forward(model, batch)
            except FloatingPointError as error:
                logger.warning("%s", error)
                losses = {"total_loss": torch.tensor(math.nan)}
            if isinstance(losses, torch.Tensor):
                losses = {"total_loss": losses}
            values = {k: x.item() for k, x in losses.items()}
            values.setdefault("total_loss", math.fsum(values.values()))
            losses_of_images.append(values)
    gathered = [losses for part in comm.gather(losses_of_images) for losses in part]
    if not gathered:
        return {}
    names = dict.fromkeys(["total_loss", *(name for losses in gathered for name in losses)])
    # The sum of `fsum` does not depend on the order
    means = {
        name: math.fsum(x.get(name, math.nan) for x in gathered) / len(gathered) for name in names
    }
    logger.info(
        "Validation on %d images of %s:  %s",
        *(len(gathered), ", ".join(recipe.validation_set.names), text_of_losses(means)),
    )
    return means


@contextmanager
def _quiet_layers(model: nn.Module) -> Iterator[None]:
    """Layers neither draw random numbers nor collect statistics; the model still gives losses."""
    layers = [
        m
        for m in model.modules()
        if m.training and (isinstance(m, NormLayer) or next(m.children(), None) is None)
    ]
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer in layers:
            layer.training = True
