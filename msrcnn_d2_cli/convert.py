"""
Convert a checkpoint of another framework to Detectron2's names, once.

A ".pth" output then loads wherever Detectron2 loads checkpoints. (Programs that use msrcnn_d2 can
load the input without conversion.) Other contents of the input, such as the optimizer's state, are
left out.
"""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msrcnn_d2.checkpoint.conversion import Weights

USAGE = "IN OUT [--half]"
EXAMPLES = """
  a model of MMDetection:
    {prog} mask_rcnn_r50_fpn_1x_coco.pth mask_rcnn.pth
  published weights of Mask Scoring R-CNN (`msrcnn-d2 zoo` lists them), half as large:
    {prog} ms_rcnn_R_50_FPN_1x ms_rcnn.safetensors --half
"""

# How the names of a detector's parameters begin in Detectron2
DETECTOR = ("backbone.", "proposal_generator.", "roi_heads.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="file, URL, or name of the model zoo")
    parser.add_argument("output", metavar="OUT", help="file to write: .pth, .safetensors")
    parser.add_argument(
        "--half", action="store_true", help="write float16, half as large; it loads as float32"
    )


def run(args: argparse.Namespace) -> None:
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
    from msrcnn_d2.checkpoint.conversion import SCORE_EXPONENT, check_finite, read_weights
    from msrcnn_d2.checkpoint.fetching import find_file
    from msrcnn_d2.checkpoint.writing import check_target, write_weights
    from msrcnn_d2.utils.errors import UserError
    from msrcnn_d2_runtime.text import listed

    check_target(target, source)  # before a download
    file = find_file(source)
    check_target(target, file)
    weights = read_weights(file)
    if weights.matched_by_suffix:
        raise UserError(
            f"'{source}' ({weights.source}) has no names of its own to convert: they are matched "
            "to a model's when it is loaded, by Detectron2 as well as by this package."
        )
    exponent = weights.state_dict.pop(SCORE_EXPONENT, None)
    check_finite(weights.state_dict, source)
    unknown = [n for n in weights.state_dict if not n.startswith(DETECTOR)]
    if len(unknown) == len(weights.state_dict):
        raise UserError(
            f"'{source}' has parameters such as {listed(unknown)}, which neither Detectron2 has "
            "nor any other framework that is known here. Save the state_dict() of the detector "
            f"itself, whose names begin with {', '.join(DETECTOR)}."
        )
    write_weights(weights.state_dict, target, half, weights.class_names)
    if unknown:
        print(f"Note: names that are not a Mask R-CNN's stay as they are: {listed(unknown)}.")
    if exponent is not None:
        print("Note: the score exponent is left out: masks are ranked by class score x IoU.")
    if weights.note:
        print(f"Note: {weights.note}")
    return f"{source} ({weights.origin}): {_summary(weights)} -> {target}"


def _summary(weights: "Weights") -> str:
    from msrcnn_d2.checkpoint.conversion import CLASS_SCORE, COUNTER

    names = [n for n in weights.state_dict if not n.endswith(COUNTER)]
    text = f"{len(names)} parameters"
    scores = weights.state_dict.get(CLASS_SCORE + "bias")
    return text if scores is None else f"{text}, {len(scores) - 1} classes"
