"""
Convert a checkpoint of another framework once, into one with Detectron2's names.

A ".pth" then loads wherever Detectron2 loads checkpoints, without this package. (With this package
no conversion is needed.) What else the input holds, such as its optimizer's state, is left out.
"""

import argparse

from ..utils.errors import UserError, exit_on_user_error
from ..utils.text import listed
from .conversion import (
    CLASS_SCORE,
    COUNTER,
    SCORE_EXPONENT,
    Weights,
    check_finite,
    read_weights,
)
from .fetching import find_file
from .writing import WRITERS, check_target, write_weights

# How the names of a detector's parameters begin in Detectron2
DETECTOR = ("backbone.", "proposal_generator.", "roi_heads.")


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
    check_target(target, source)  # before a download
    file = find_file(source)
    check_target(target, file)
    weights = read_weights(file)
    if weights.matched_by_suffix:
        raise UserError(
            f"'{source}' ({weights.source}) has no names of its own to convert: they are matched "
            "to a model's when it is loaded, by Detectron2 as well as by this package."
        )
    check_finite(weights.state_dict, source)
    unknown = [n for n in weights.state_dict if not n.startswith(DETECTOR)]
    if len(unknown) == len(weights.state_dict):
        raise UserError(
            f"'{source}' has names that no model of Detectron2 has, such as {listed(unknown)}, and "
            "that are of no framework known here. Save the state_dict() of the detector itself, "
            f"whose names begin with {', '.join(DETECTOR)}."
        )
    write_weights(weights.state_dict, target, half, weights.class_names)
    if unknown:
        print(f"Note: names that are not a Mask R-CNN's stay as they are: {listed(unknown)}.")
    if weights.note:
        print(f"Note: {weights.note}")
    return f"{source} ({weights.source}): {_summary(weights)} -> {target}"


def _summary(weights: Weights) -> str:
    names = [n for n in weights.state_dict if n != SCORE_EXPONENT and not n.endswith(COUNTER)]
    text = f"{len(names)} parameters"
    scores = weights.state_dict.get(CLASS_SCORE + "bias")
    return text if scores is None else f"{text}, {len(scores) - 1} classes"


if __name__ == "__main__":
    main()
