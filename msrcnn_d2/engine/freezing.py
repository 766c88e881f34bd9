"""Freeze parts of a model by the names of its parameters."""

import logging
import re
from collections.abc import Sequence

from torch import nn

from detectron2.layers import FrozenBatchNorm2d

from ..utils.errors import UserError

__all__ = ["freeze"]

logger = logging.getLogger(__name__)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """
    Keep the parameters whose names begin with one of the patterns as they are.

    Batch norms that are frozen no longer normalise by the statistics of a batch, nor update
    theirs: they become Detectron2's :class:`FrozenBatchNorm2d`, as those below `freeze_at`.

    Args:
        patterns: regular expressions, such as `backbone` or `roi_heads.mask_(iou_)?head`.

    Raises:
        UserError: a pattern matches no parameter, or nothing is left to train.
    """
    if not patterns:
        return
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = [p for name, p in parameters.items() if re.match(pattern, name)]
        if not matching:
            parts = ", ".join(name for name, _ in model.named_children())
            raise UserError(
                f"train.freeze (yaml: SOLVER.FREEZE): no parameter has a name that begins with "
                f"'{pattern}'. The parts of the model are {parts}."
            )
        for parameter in matching:
            parameter.requires_grad = False
        logger.info(
            "Frozen by '%s': %d of %d parameters (%.2f of %.2f million numbers).",
            *(pattern, len(matching), len(parameters)),
            *(sum(p.numel() for p in x) / 1e6 for x in (matching, parameters.values())),
        )
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError("train.freeze (yaml: SOLVER.FREEZE) leaves no parameter to train.")
    for module in model.modules():
        for name, child in module.named_children():
            is_norm = isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)) and child.affine
            if is_norm and not any(p.requires_grad for p in child.parameters()):
                setattr(module, name, FrozenBatchNorm2d.convert_frozen_batchnorm(child))
