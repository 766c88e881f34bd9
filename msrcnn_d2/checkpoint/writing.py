"""Write checkpoints with Detectron2's names, completely or not at all."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import torch
from safetensors.torch import save

from msrcnn_d2_runtime.files import write_whole

from ..utils.errors import UserError
from .compatibility import MASK_CALIBRATOR
from .conversion import CLASS_NAMES
from .reading import reason

__all__ = ["WRITERS", "check_target", "why_not_written", "write_weights"]

WRITERS: dict[str, Callable[[dict[str, torch.Tensor], dict[str, list[str]], IO[bytes]], object]] = {
    ".pth": lambda state_dict, names, f: torch.save({"model": state_dict, **names}, f),
    # Not `save_file`, whose files only their owner may read. Metadata can only be text
    ".safetensors": lambda state_dict, names, f: f.write(
        save(state_dict, {k: json.dumps(v) for k, v in names.items()} or None)
    ),
}


def check_target(target: str, source: str) -> None:
    """
    Raises:
        UserError: `target`, the path of a file to write, has none of the suffixes in `WRITERS`, its
            folder does not exist, or it is the file `source`.
    """
    if os.path.splitext(target)[1] not in WRITERS:
        raise UserError(f"'{target}' has to end with one of {', '.join(WRITERS)}.")
    if not os.path.isdir(os.path.dirname(target) or "."):
        raise UserError(f"The folder of '{target}' does not exist.")
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
        raise UserError(f"'{target}' is the input: give another name for the output.")


def write_weights(
    state_dict: Mapping[str, torch.Tensor],
    target: str,
    half: bool = False,
    class_names: Sequence[str] | None = None,
) -> None:
    """
    Args:
        state_dict: tensors by their names in a model.
        target: path of the file, see :func:`check_target`; its suffix decides on the format.
        half: whether to write floating-point numbers as float16. Parameters with numbers that are
            too large for it, as variances of batch norm can be, keep their type. So does a
            calibrator, whose thresholds are compared with its probabilities.
        class_names: names to keep with the weights.

    Raises:
        UserError: the file cannot be written; what was there before is still there.
    """
    contents = {}
    for name, value in state_dict.items():
        if half and value.is_floating_point() and not name.startswith(MASK_CALIBRATOR):
            halved = value.half()
            value = halved if torch.equal(halved.isfinite(), value.isfinite()) else value
        # A copy, as safetensors refuses tensors that share memory
        contents[name] = value.clone(memory_format=torch.contiguous_format)
    names = {CLASS_NAMES: list(class_names)} if class_names is not None else {}
    try:
        with write_whole(target) as f:
            WRITERS[os.path.splitext(target)[1]](contents, names, f)
    except (OSError, RuntimeError) as error:  # the latter from PyTorch
        raise UserError(f"Cannot write '{target}' ({why_not_written(error)}).") from error


def why_not_written(error: Exception) -> str:
    """What the operating system says, such as that the disk is full; else the error's own words."""
    cause: BaseException | None = error  # PyTorch's own errors do not name a full disk
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause.strerror if cause and cause.strerror else reason(error)
