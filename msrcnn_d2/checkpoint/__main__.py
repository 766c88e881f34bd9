"""
Convert a checkpoint of another framework once, into one with Detectron2's names.

The result loads wherever Detectron2 loads checkpoints, without this package. (With this package no
conversion is needed.) What else the input holds, such as the state of its optimizer, is left out.
"""

import argparse
import os
from collections.abc import Callable

import torch
from safetensors.torch import save_file

from ..errors import UserError, exit_on_user_error
from .conversion import CLASS_SCORE, Weights, read_weights
from .fetching import find_file


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m msrcnn_d2.checkpoint", description=__doc__)
    parser.add_argument("input", metavar="IN", help="file, URL, or name of the model zoo")
    parser.add_argument("output", metavar="OUT", help=f"file to write: {', '.join(WRITERS)}")
    args = parser.parse_args()
    with exit_on_user_error():
        print(convert_file(args.input, args.output))


def convert_file(source: str, target: str) -> str:
    """
    Args:
        source: what :meth:`MaskScoringCheckpointer.load` takes.
        target: path of the file to write; its suffix decides on the format, see `WRITERS`.

    Returns:
        one line that says what was converted.

    Raises:
        UserError: the source cannot be had, read or converted, or the target cannot be written.
    """
    write = WRITERS.get(os.path.splitext(target)[1])
    if write is None:
        raise UserError(f"'{target}' has to end with one of {', '.join(WRITERS)}.")
    file = find_file(source)
    if os.path.exists(target) and os.path.samefile(file, target):
        raise UserError(f"'{target}' is the input: give another name for the output.")
    weights = read_weights(file)
    if weights.matched_by_suffix:
        raise UserError(
            f"'{source}' ({weights.source}) has no names of its own to convert: they are matched "
            "to a model's when it is loaded, by Detectron2 as well as by this package."
        )
    _write_completely(write, weights, target)
    if weights.note:
        print(f"Note: {weights.note}")
    return f"{source} ({weights.source}): {_summary(weights)} -> {target}"


def _write_completely(write: Callable, weights: Weights, target: str) -> None:
    incomplete = f"{target}.incomplete"
    try:
        write({k: v.contiguous() for k, v in weights.state_dict.items()}, incomplete)
        os.replace(incomplete, target)
    except OSError as error:
        raise UserError(f"Cannot write '{target}' ({error.strerror}).") from error
    finally:
        if os.path.exists(incomplete):
            os.remove(incomplete)


def _summary(weights: Weights) -> str:
    text = f"{len(weights.state_dict)} parameters"
    scores = weights.state_dict.get(CLASS_SCORE + "bias")
    return text if scores is None else f"{text}, {len(scores) - 1} classes"


WRITERS: dict[str, Callable] = {
    ".pth": lambda state_dict, path: torch.save({"model": state_dict}, path),
    ".safetensors": save_file,
}

if __name__ == "__main__":
    main()
