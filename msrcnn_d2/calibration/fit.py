"""Fit a calibrator to detections of which it is known whether they are right."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from ..modeling import MaskCalibrator

__all__ = ["Samples", "cross_validated_probs", "fit_calibrator"]

# Chosen on images of shapes that no result is reported on; none of them is critical
EPOCHS = 60
MAX_STEPS = 8000  # of the optimizer: a minute; reached from 34,000 detections on
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2
NUM_FOLDS = 5


@dataclass
class Samples:
    """
    Detections, and whether they are right.

    Attributes:
        cues: float32 Tensor of shape (N, C), from :func:`msrcnn_d2.modeling.mask_cues`.
        score_log_odds: float32 Tensor of shape (N,), log-odds of the mask score, or of the class
            score for a model without predicted IoUs.
        right: bool Tensor of shape (N, 10), whether a detection is a true positive at each of
            COCO's IoU thresholds.
        counted: bool Tensor of shape (N,), whether a detection is fitted to. Those that are matched
            with a crowd are neither right nor wrong.
        images: int64 Tensor of shape (N,), a number for the image of each detection.
    """

    cues: torch.Tensor
    score_log_odds: torch.Tensor
    right: torch.Tensor
    counted: torch.Tensor
    images: torch.Tensor

    def __len__(self) -> int:
        return len(self.cues)

    def __getitem__(self, chosen: torch.Tensor) -> "Samples":
        """A part of the detections, chosen by a bool Tensor of shape (N,)."""
        parts = (self.cues, self.score_log_odds, self.right, self.counted, self.images)
        return Samples(*(x[chosen] for x in parts))


def fit_calibrator(
    calibrator: MaskCalibrator,
    samples: Samples,
    *,
    with_network: bool = True,
    seed: int = 0,
    progress: str = "",
) -> None:
    """
    Fit a calibrator by the cross-entropy at all IoU thresholds, in place.

    First the line through the log-odds of the score is fitted (Platt, 1999), with a slope that is
    never negative: alone, it leaves the ranking as it is. Then the networks learn what to add to
    it; they start from adding nothing.

    Args:
        calibrator: on the CPU.
        with_network: whether to fit the networks, too. Otherwise they add nothing.
        seed: of the initial weights, the order of the detections and the dropout. The same seed and
            samples give the same weights on the same machine.
        progress: title of a bar; "" to show none.
    """
    samples = samples[samples.counted]
    right = samples.right.float()
    std, mean = torch.std_mean(samples.cues.double(), dim=0, unbiased=False)
    calibrator.cue_mean.copy_(mean)
    calibrator.cue_std.copy_(torch.where(std > 1e-6, std, 1))  # some cues may be constant
    for parameter in calibrator.layers.parameters():
        nn.init.zeros_(parameter)
    _fit_line(calibrator, samples.score_log_odds, right)
    if not with_network:
        return

    generator = torch.Generator().manual_seed(seed)
    hidden_layers: list[Any] = list(calibrator.layers[:-1])
    for layer in hidden_layers:
        bound = layer.weight.shape[1] ** -0.5  # as nn.Linear does it
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    cues = calibrator.standardised(samples.cues)
    num = len(samples)
    parameters = list(calibrator.layers.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = -(-num // BATCH_SIZE)
    num_steps = min(EPOCHS * steps_per_epoch, MAX_STEPS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    calibrator.layers.requires_grad_(True)
    # Dropout has no generator of its own
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        for step in tqdm(range(num_steps), progress, leave=False, disable=not progress):
            position = step % steps_per_epoch * BATCH_SIZE
            if position == 0:
                # Each network sees the detections in an order of its own
                order = torch.stack(
                    [
                        torch.randperm(num, generator=generator)
                        for _ in range(calibrator.num_members)
                    ]
                )
            batch = order[:, position : position + BATCH_SIZE]
            log_odds = calibrator.log_odds(
                cues[batch], samples.score_log_odds[batch], with_dropout=True
            )
            losses = F.binary_cross_entropy_with_logits(log_odds, right[batch], reduction="none")
            optimizer.zero_grad()
            losses.mean(dim=(1, 2)).sum().backward()  # the networks do not depend on each other
            optimizer.step()
            schedule.step()
    calibrator.requires_grad_(False)


def _fit_line(
    calibrator: MaskCalibrator, score_log_odds: torch.Tensor, right: torch.Tensor
) -> None:
    log_slope = torch.zeros(right.shape[1], dtype=torch.float64, requires_grad=True)
    offset = torch.zeros_like(log_slope, requires_grad=True)
    x, y = score_log_odds.double()[:, None], right.double()
    # Platt's targets: one detection more of either kind. So a score that separates them does not
    # give probabilities of 0 and 1, which would be ties.
    num_right = y.sum(dim=0)
    y = torch.where(right.bool(), (num_right + 1) / (num_right + 2), 1 / (len(y) - num_right + 2))
    optimizer = torch.optim.LBFGS(
        [log_slope, offset], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(log_slope.exp() * x + offset, y)
        # With few detections, the best line can still be very steep, or far away
        value = value + 1e-4 * (log_slope.square().mean() + offset.square().mean())
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        calibrator.slope.copy_(log_slope.exp())
        calibrator.offset.copy_(offset)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps are too small for more, and results would depend on their number."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


def cross_validated_probs(
    calibrator: MaskCalibrator,
    samples: Samples,
    *,
    with_network: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> torch.Tensor:
    """
    What calibrators say about detections that they were not fitted to. The images are divided into
    five parts, and the detections of each part get their probabilities from a calibrator that was
    fitted to the other four.

    Args:
        calibrator: says how large the networks are; it is not modified.
        with_network, seed: as in :func:`fit_calibrator`.
        progress: whether to show bars.

    Returns:
        float32 Tensor of shape (N, 10), as :meth:`MaskCalibrator.probs` returns them.
    """
    images, index = samples.images.unique(return_inverse=True)
    # Images without anything to fit to are in any part, the others evenly in all
    usable = torch.isin(images, samples.images[samples.counted])
    order = torch.zeros(len(images), dtype=torch.int64)
    order[usable] = torch.randperm(int(usable.sum()), generator=torch.Generator().manual_seed(seed))
    fold = (order % NUM_FOLDS)[index]
    probs = torch.zeros(samples.right.shape)
    for k in fold.unique().tolist():
        other = copy.deepcopy(calibrator)
        title = f"cross-validation {k + 1}/{NUM_FOLDS}" if progress else ""
        fit_calibrator(
            other, samples[fold != k], with_network=with_network, seed=seed, progress=title
        )
        held_out = samples[fold == k]
        probs[fold == k] = other.probs(held_out.cues, held_out.score_log_odds)
    return probs
