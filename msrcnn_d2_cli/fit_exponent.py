"""
Fit how much the predicted IoU counts in the ranking of masks: class score x mask IoU ** exponent.

In the paper the exponent is 1; with 0 only the class score counts. The best one depends on how well
the MaskIoU head has learned. The model's predictions show it, without any training.

Never fit on the images that you report results of: their AP would be too good. Hold out a part of
the training images, as a dataset that you neither train on nor report; see the examples.
"""

import argparse
from typing import TYPE_CHECKING

from .parsing import ENGINES, UsageError, at_least

if TYPE_CHECKING:
    from msrcnn_d2.checkpoint.conversion import Weights
    from msrcnn_d2.fit_exponent import ExponentFit

USAGE = "RESULTS.json ANNOTATIONS.json [options]"
EXAMPLES = """
  train, predict on held-out images, fit:
    msrcnn-d2 train --config-file CONFIG.py --dataset rest rest.json images/ \\
      dataloader.train.dataset.names=rest train.output_dir=output/run
    msrcnn-d2 evaluate --config-file CONFIG.py --dataset held_out held_out.json images/ \\
      dataloader.test.dataset.names=held_out train.output_dir=output/fit \\
      --weights output/run/model_final.pth
    {prog} output/fit/inference/coco_instances_results.json held_out.json \\
      --checkpoint output/run/model_final.pth --output output/run/model_fitted.pth
  (yaml: DATASETS.TRAIN "('rest',)" OUTPUT_DIR output/run, and DATASETS.TEST "('held_out',)"
  OUTPUT_DIR output/fit.) Models take the exponent from model_fitted.pth with its weights.
  go back to the paper's exponent:
    {prog} --exponent 1 --checkpoint model_fitted.pth --output model.pth
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        metavar="RESULTS.json",
        nargs="?",
        help="predictions on held-out images, which `msrcnn-d2 evaluate` writes as "
        "inference/coco_instances_results.json",
    )
    parser.add_argument(
        "annotations",
        metavar="ANNOTATIONS.json",
        nargs="?",
        help="ground truth of those images, in COCO's format",
    )
    parser.add_argument("--checkpoint", metavar="IN", help="file, URL, or name of the model zoo")
    parser.add_argument(
        "--output",
        metavar="OUT",
        help="copy of the checkpoint to write, with the exponent: .pth, .safetensors",
    )
    parser.add_argument(
        "--exponent", metavar="G", type=float, help="write this exponent, and fit none"
    )
    parser.add_argument(
        "--exponents",
        metavar="G",
        type=float,
        nargs="+",
        help="exponents to try in addition to 0 and 1 (default: 13 from 0 to 16)",
    )
    parser.add_argument(
        "--max-dets",
        metavar="N",
        type=at_least(1),
        help="count the N best predictions of each class in each image (default: 100, or as many "
        "as the image with the most predictions has)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="library that counts AP (default: what is installed)",
    )


def check_arguments(args: argparse.Namespace) -> None:
    if (args.checkpoint is None) != (args.output is None):
        raise UsageError("Give --checkpoint IN and --output OUT together, or neither.")
    if args.exponent is not None:
        if args.output is None:
            raise UsageError("--exponent writes to a checkpoint: give --checkpoint and --output.")
        if args.results is not None:
            raise UsageError("--exponent replaces a fit: leave RESULTS.json out, or --exponent.")
    elif args.annotations is None:
        raise UsageError(
            "Give RESULTS.json and ANNOTATIONS.json, predictions and truth of held-out images, to "
            "fit an exponent, or --exponent to write one."
        )


def run(args: argparse.Namespace) -> None:
    if args.exponent is not None:
        from msrcnn_d2.fit_exponent import check_exponent

        check_exponent(args.exponent)
    weights = weights_to_change(args.checkpoint, args.output) if args.output else None
    exponent = fit_and_show(args) if args.exponent is None else args.exponent
    if weights is not None:
        write(weights, exponent, args.output)
        return
    print(
        f"To use it, set model.roi_heads.mask_iou_head.score_exponent={exponent:g} (yaml: "
        # yacs takes no whole number for the key
        f"MODEL.ROI_MASK_IOU_HEAD.SCORE_EXPONENT {float(f'{exponent:g}')}), or write it to a "
        "checkpoint: see --help."
    )


def weights_to_change(checkpoint: str, output: str) -> "Weights":
    """Read the weights before the fit, so that a mistake shows at once."""
    from msrcnn_d2.checkpoint.compatibility import MASK_IOU_HEAD
    from msrcnn_d2.checkpoint.conversion import SCORE_EXPONENT, check_finite, read_weights
    from msrcnn_d2.checkpoint.fetching import find_file
    from msrcnn_d2.checkpoint.writing import check_target
    from msrcnn_d2.utils.errors import UserError

    check_target(output, checkpoint)
    file = find_file(checkpoint)
    check_target(output, file)
    weights = read_weights(file)
    check_finite(weights.state_dict, checkpoint)
    if not any(k.startswith(MASK_IOU_HEAD) and k != SCORE_EXPONENT for k in weights.state_dict):
        raise UserError(
            f"'{checkpoint}' ({weights.source}) has no mask IoU head, so it takes no exponent: "
            "give the checkpoint of the mask-scoring model that made the predictions."
        )
    return weights


def fit_and_show(args: argparse.Namespace) -> float:
    """The best exponent."""
    from msrcnn_d2.coco_format import check_fits, read_annotations, read_results
    from msrcnn_d2.evaluation.mask_quality import limit_of
    from msrcnn_d2.fit_exponent import EXPONENTS, fit_exponent
    from msrcnn_d2.utils.errors import UserError

    coco_gt = read_annotations(args.annotations)
    results = check_fits(read_results(args.results), coco_gt)
    exponents = EXPONENTS if args.exponents is None else args.exponents
    max_dets = args.max_dets or limit_of(results)
    try:
        fit = fit_exponent(coco_gt, results, exponents, max_dets, args.engine, progress=True)
    except ValueError as error:  # an engine that is not installed
        raise UserError(str(error)) from error
    predicted = len({r["image_id"] for r in results})
    print(f"{len(results)} predictions in {predicted} of {len(coco_gt.imgs)} annotated images:\n")
    print(table_of(fit))
    print(f"\nChosen: {fit.exponent:g}, mask AP {fit.gain:+.2f} compared with the paper's 1.")
    if fit.exponent == max(fit.curve):
        print("It is the largest that was tried: try larger ones with --exponents.")
    return fit.exponent


def table_of(fit: "ExponentFit") -> str:
    from tabulate import tabulate

    from msrcnn_d2.fit_exponent import CLASS_SCORE, PAPER

    known = {CLASS_SCORE: "class score alone", PAPER: "the paper"}
    rows = []
    for exponent, numbers in fit.curve.items():
        notes = [known[exponent]] if exponent in known else []
        notes += ["chosen"] if exponent == fit.exponent else []
        ap = [f"{value:.2f}" for value in numbers.values()]
        rows.append([f"{exponent:g}", *ap, ", ".join(notes)])
    headers = ["exponent", "mask AP", "AP50", "AP75", ""]
    align = ("right", "right", "right", "right", "left")
    return tabulate(rows, headers, "github", colalign=align, disable_numparse=True)


def write(weights: "Weights", exponent: float, output: str) -> None:
    import torch

    from msrcnn_d2.checkpoint.conversion import SCORE_EXPONENT
    from msrcnn_d2.checkpoint.writing import write_weights

    value = torch.tensor(exponent, dtype=torch.float32)
    state_dict = {**weights.state_dict, SCORE_EXPONENT: value}
    write_weights(state_dict, output, class_names=weights.class_names)
    if weights.note:
        print(f"Note: {weights.note}")
    print(
        f"Wrote '{output}': models that load it rank masks by class score x mask IoU ** "
        f"{exponent:g}, unless their config sets an exponent."
    )
