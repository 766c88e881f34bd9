"""
Write a model into one file that runs without Detectron2.

An ONNX file runs without PyTorch too; a TorchScript file needs PyTorch and torchvision. Either has
the whole inference: it takes an image of any size, resizes it, and returns boxes, classes, scores
and masks, the best first. The file is compared with the model on two images before it is written.
"""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msrcnn_d2.export import Exported

USAGE = "MODEL OUT [options] [KEY=VALUE ...]"
EXAMPLES = """
  a checkpoint, whose config lies beside it:
    {prog} output/model_final.pth model.onnx
  published weights (`msrcnn-d2 zoo` lists them), with masks as bitmaps of the image:
    {prog} ms_rcnn_R_50_FPN_1x model.onnx --masks pasted
  for programs that have PyTorch, such as those in C++ with LibTorch:
    {prog} output/model_final.pth model.ts --format torchscript
  a plain Mask R-CNN:
    {prog} mask_rcnn.pth mask_rcnn.onnx --rank-by score
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, its folder, or a name")
    parser.add_argument(
        "output", metavar="OUT", help="file to write: .onnx, or .ts for TorchScript"
    )
    parser.add_argument("--format", choices=["onnx", "torchscript"], default="onnx")
    parser.add_argument(
        "--config-file", metavar="FILE", help="config of the model (default: the one beside it)"
    )
    parser.add_argument(
        "--masks",
        choices=["unpasted", "pasted"],
        default="unpasted",
        help="unpasted: probabilities in the box of each object, which are small (default); "
        "pasted: a bitmap of the whole image for each object",
    )
    parser.add_argument(
        "--rank-by",
        choices=["quality_score", "mask_score", "score"],
        help="the score that detections are sorted by (default: the calibrated score of a model "
        "with a calibrator, the mask score of others; a plain Mask R-CNN has only score)",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="KEY=VALUE", help="overrides of the config, as for training"
    )


def run(args: argparse.Namespace) -> None:
    from msrcnn_d2.export import export_onnx, export_torchscript
    from msrcnn_d2.export.exporting import checked_target
    from msrcnn_d2.prediction.loading import load_predictor
    from msrcnn_d2.prediction.predictor import MaskScoringPredictor
    from msrcnn_d2.utils.errors import UserError

    to_torchscript = args.format == "torchscript"
    checked_target(args.output, ".ts" if to_torchscript else ".onnx")  # before a download
    predict = load_predictor(
        args.model,
        config_file=args.config_file,
        opts=args.opts,
        device="cpu",
        rank_by=args.rank_by,
    )
    if not isinstance(predict, MaskScoringPredictor):
        raise UserError(f"'{args.model}' is exported already: give the checkpoint it comes from.")
    export = export_torchscript if to_torchscript else export_onnx
    show(export(predict, args.output, masks=args.masks))


def show(exported: "Exported") -> None:
    print("Compared with the model:")
    for comparison in exported.comparisons:
        print(f"  {comparison}")
    size = exported.num_bytes / 2**20
    print(f"{exported.path}: {size:.1f} MiB, in {exported.seconds:.0f} s")
