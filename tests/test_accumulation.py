"""Gradients of a batch in parts: those of the whole batch."""

import pytest
import torch
from torch import nn

from detectron2.utils.events import EventStorage

from msrcnn_d2.engine.trainer import FiniteTrainer
from msrcnn_d2.utils.distributed import StepAgreement
from msrcnn_d2.utils.errors import UserError
from tests.helpers import many_processes

LR = 0.5


class Squares(nn.Module):
    """Two losses that are means over the images of a batch, which are pairs (x, y)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.sizes = []

    def forward(self, batch):
        self.sizes.append(len(batch))
        x, y = torch.tensor(batch).T
        return {"fit": (self.weight * x - y).square().mean(), "size": self.weight.square()}


def trainer_of(batches, num_parts, model=None, **kwargs):
    model = model or Squares()
    return FiniteTrainer(
        *(model, batches, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)),
        max_nonfinite_steps=kwargs.pop("max_nonfinite_steps", 0),
        agreement=StepAgreement(),
        image_ids=lambda: [],
        accumulation_steps=num_parts,
        **kwargs,
    )


def by_hand(batches):
    """Weights after each step, and losses before it, in plain numbers."""
    weight, momentum, found = 2.0, 0.0, []
    for batch in batches:
        fit = sum((weight * x - y) ** 2 for x, y in batch) / len(batch)
        slope = sum(2 * x * (weight * x - y) for x, y in batch) / len(batch) + 2 * weight
        losses = {"fit": fit, "size": weight**2, "total_loss": fit + weight**2}
        momentum = 0.9 * momentum + slope
        weight -= LR * momentum
        found.append((weight, losses))
    return found


@pytest.mark.parametrize(
    "num_parts, sizes", [(1, [5]), (2, [2, 3]), (3, [1, 2, 2]), (5, [1, 1, 1, 1, 1])]
)
def test_a_step_in_parts_is_that_of_the_whole_batch(num_parts, sizes):
    first = [(0.5, 1.0), (-0.25, 2.0), (0.125, 0.0), (1.0, 1.5), (0.75, -1.0)]
    batches = [first, [(x / 2, y + 1) for x, y in first]]
    trainer = trainer_of(batches, num_parts)
    for weight, losses in by_hand(batches):
        with EventStorage() as storage:
            trainer.run_step()
            logged = {k: v for k, (v, _) in storage.latest().items() if k in losses}
        assert trainer.model.weight.item() == pytest.approx(weight, rel=1e-5)
        assert logged == pytest.approx(losses, rel=1e-5)
    assert isinstance(trainer.model, Squares) and trainer.model.sizes == 2 * sizes


def test_a_part_that_is_not_finite_leaves_out_the_whole_step():
    good, bad = [(0.5, 1.0), (1.0, 1.5)], [(float("nan"), 1.0), (1.0, 1.5)]
    trainer = trainer_of([good, bad, good], 2, max_nonfinite_steps=1)
    trainer.train(0, 3)
    expected = by_hand([good, good])[-1][0]  # the gradient of the bad one is not left behind
    assert trainer.model.weight.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch", [[(0.5, 1.0)], torch.ones(4, 2)])
def test_a_batch_that_cannot_be_split_is_one_sentence(batch):
    trainer = trainer_of([batch], 2)
    with pytest.raises(UserError, match="train.accumulation_steps"):
        trainer.train(0, 1)


def test_a_detector_has_the_gradients_of_the_whole_batch_if_samples_are_as_many():
    images = many_processes.images_of("all samples")
    model = many_processes.build_model("all samples")
    whole = many_processes.step(model, images, seed=0)["gradients"]
    trainer = trainer_of([images], 2, many_processes.build_model("all samples"))
    with EventStorage():
        trainer.run_step()
    for name, parameter in trainer.model.named_parameters():
        if name in whole:
            error = (parameter.grad - whole[name]).abs().max() / whole[name].abs().max()
            assert error <= 2e-5, name
