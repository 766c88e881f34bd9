"""
Convert a checkpoint of another framework once, into one with Detectron2's names.

A ".pth" then loads wherever Detectron2 loads checkpoints, without this package. (With this package
no conversion is needed.) What else the input holds, such as its optimizer's state, is left out.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from ..errors import UserError, exit_on_user_error
from .conversion import CLASS_SCORE, COUNTER, Weights, read_weights
from .fetching import find_file
from .reading import reason


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m msrcnn_d2.checkpoint", description=__doc__)
    parser.add_argument("input", metavar="IN", help="file, URL, or name of the model zoo")
    parser.add_argument("output", metavar="OUT", help=f"file to write: {', '.join(WRITERS)}")
    parser.add_argument(
        "--half", action="store_true", help="write float16, half as large; it loads as float32"
    )
    args = parser.parse_args()
    with exit_on_user_error():
        print(convert_file(args.input, args.output, args.half))


def convert_file(source: str, target: str, half: bool = False) -> str:
    """
    Args:
        source: what :meth:`MaskScoringCheckpointer.load` takes.
        target: path of the file to write; its suffix decides on the format, see `WRITERS`.
        half: whether to write floating-point numbers as float16.

    Returns:
        one line that says what was converted.

    Raises:
        UserError: the source cannot be had, read or converted, or the target cannot be written.
    """
    write = WRITERS.get(os.path.splitext(target)[1])
    if write is None:
        raise UserError(f"'{target}' has to end with one of {', '.join(WRITERS)}.")
    if not os.path.isdir(os.path.dirname(target) or "."):
        raise UserError(f"The folder of '{target}' does not exist.")
    file = find_file(source)
    if os.path.exists(target) and os.path.samefile(file, target):
        raise UserError(f"'{target}' is the input: give another name for the output.")
    weights = read_weights(file)
    if weights.matched_by_suffix:
        raise UserError(
            f"'{source}' ({weights.source}) has no names of its own to convert: they are matched "
            "to a model's when it is loaded, by Detectron2 as well as by this package."
        )
    _write_completely(write, _contiguous(weights.state_dict, half), target)
    if weights.note:
        print(f"Note: {weights.note}")
    return f"{source} ({weights.source}): {_summary(weights)} -> {target}"


def _contiguous(state_dict: dict[str, torch.Tensor], half: bool) -> dict[str, torch.Tensor]:
    return {
        # Copies, as safetensors refuses tensors that share memory
        name: (_halved(value) if half else value).clone(memory_format=torch.contiguous_format)
        for name, value in state_dict.items()
    }


def _halved(value: torch.Tensor) -> torch.Tensor:
    """As float16, unless numbers are too large for it: variances of batch norm can be."""
    half = value.half() if value.is_floating_point() else value
    return half if torch.equal(half.isfinite(), value.isfinite()) else value


def _write_completely(write: Callable, state_dict: dict[str, torch.Tensor], target: str) -> None:
    incomplete = f"{target}.incomplete"
    try:
        write(state_dict, incomplete)
        os.replace(incomplete, target)
    except (OSError, RuntimeError) as error:  # the latter from PyTorch
        raise UserError(f"Cannot write '{target}' ({reason(error)}).") from error
    finally:
        if os.path.exists(incomplete):
            os.remove(incomplete)


def _summary(weights: Weights) -> str:
    names = [name for name in weights.state_dict if not name.endswith(COUNTER)]
    text = f"{len(names)} parameters"
    scores = weights.state_dict.get(CLASS_SCORE + "bias")
    return text if scores is None else f"{text}, {len(scores) - 1} classes"


WRITERS: dict[str, Callable] = {
    ".pth": lambda state_dict, path: torch.save({"model": state_dict}, path),
    # Not save_file, whose files only their owner may read
    ".safetensors": lambda state_dict, path: Path(path).write_bytes(save(state_dict)),
}

if __name__ == "__main__":
    main()
