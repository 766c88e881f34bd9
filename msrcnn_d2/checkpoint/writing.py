"""Write checkpoints with Detectron2's names, wholly or not at all."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import torch
from safetensors.torch import save

from ..utils.errors import UserError
from ..utils.files import os_error_of, write_whole
from .conversion import CLASS_NAMES, SCORE_EXPONENT
from .reading import reason

__all__ = ["WRITERS", "check_target", "why_not_written", "write_weights"]

WRITERS: dict[str, Callable[[dict[str, torch.Tensor], dict[str, list[str]], IO[bytes]], object]] = {
    ".pth": lambda state_dict, names, f: torch.save({"model": state_dict, **names}, f),
    # Not save_file, whose files only their owner may read. It keeps texts beside tensors only
    ".safetensors": lambda state_dict, names, f: f.write(
        save(state_dict, {k: json.dumps(v) for k, v in names.items()} or None)
    ),
}


def check_target(target: str, source: str) -> None:
    """
    Raises:
        UserError: if the path of a file to write has none of the suffixes in `WRITERS`, no folder,
            or is that of the file `source`.
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
        half: whether to write floating-point numbers as float16.
        class_names: to keep with the weights.

    Raises:
        UserError: the file cannot be written; what was there before is still there.
    """
    contents = {
        # Copies, as safetensors refuses tensors that share memory
        name: (_halved(name, value) if half else value).clone(memory_format=torch.contiguous_format)
        for name, value in state_dict.items()
    }
    names = {CLASS_NAMES: list(class_names)} if class_names is not None else {}
    try:
        with write_whole(target) as f:
            WRITERS[os.path.splitext(target)[1]](contents, names, f)
    except (OSError, RuntimeError) as error:  # the latter from PyTorch
        raise UserError(f"Cannot write '{target}' ({why_not_written(error)}).") from error


def why_not_written(error: Exception) -> str:
    """What the system says, where it has refused something: a disk may be full."""
    refused = os_error_of(error)
    return refused.strerror if refused and refused.strerror else reason(error)


def _halved(name: str, value: torch.Tensor) -> torch.Tensor:
    """
    As float16, unless numbers are too large for it: variances of batch norm can be. The exponent
    of the mask scores is a setting that would save nothing.
    """
    if not value.is_floating_point() or name == SCORE_EXPONENT:
        return value
    half = value.half()
    return half if torch.equal(half.isfinite(), value.isfinite()) else value
