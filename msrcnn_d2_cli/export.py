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
    from msrcnn_d2.prediction.predictor import MaskScoringPredictor

MAX_IMAGES = 100  # to measure ranges on: more take time and change little

USAGE = "MODEL OUT [options] [KEY=VALUE ...]"
EXAMPLES = """
  a checkpoint, whose config lies beside it:
    {prog} output/model_final.pth model.onnx
  published weights (`msrcnn-d2 zoo` lists them), with masks as bitmaps of the image:
    {prog} ms_rcnn_R_50_FPN_1x model.onnx --masks pasted
  for programs that have PyTorch, such as those in C++ with LibTorch:
    {prog} output/model_final.pth model.ts --format torchscript
  in int8, and what that costs in AP:
    {prog} output/model_final.pth model.onnx --int8 train_images/ \\
      --dataset my_val val.json val_images/
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
        "--int8",
        metavar="IMAGES",
        action="append",
        help="compute large layers in int8, with ranges that are measured on these images: a file, "
        "folder or pattern; can be given several times. Of more than 100 images, 100 are used",
    )
    parser.add_argument(
        "--dataset",
        nargs=3,
        metavar=("NAME", "ANNOTATIONS", "IMAGES"),
        help="with --int8: a dataset in COCO's format, to print the AP before and after",
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
    from detectron2.utils.logger import setup_logger

    from msrcnn_d2.export import export_onnx, export_torchscript
    from msrcnn_d2.export.exporting import checked_target
    from msrcnn_d2.prediction.loading import load_predictor
    from msrcnn_d2.prediction.predictor import MaskScoringPredictor
    from msrcnn_d2.utils.errors import UserError

    if args.int8 and args.format == "torchscript":
        raise UserError("--int8 is for ONNX only: leave out --format torchscript.")
    if args.dataset and not args.int8:
        raise UserError(
            "--dataset is for --int8 only: `msrcnn-d2 evaluate` takes any exported file."
        )
    to_torchscript = args.format == "torchscript"
    # What can be wrong is found before a download, and before an export that takes minutes
    checked_target(args.output, ".ts" if to_torchscript else ".onnx")
    images = calibration_images(args.int8) if args.int8 else None
    if args.dataset:
        from msrcnn_d2.engine import register_dataset
        from msrcnn_d2.engine.preflight import check_registered

        register_dataset(*args.dataset)
        check_registered(args.dataset[0])
    predict = load_predictor(
        args.model,
        config_file=args.config_file,
        opts=args.opts,
        device="cpu",
        rank_by=args.rank_by,
    )
    if not isinstance(predict, MaskScoringPredictor):
        raise UserError(f"'{args.model}' is exported already: give the checkpoint it comes from.")
    if to_torchscript:
        show(export_torchscript(predict, args.output, masks=args.masks))
        return
    if args.dataset:
        from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator

        MaskScoringCOCOEvaluator(args.dataset[0], class_names=predict.class_names)
    for logger in ("msrcnn_d2.export", "detectron2.evaluation.evaluator"):  # they show the progress
        setup_logger(name=logger)
    show(export_onnx(predict, args.output, masks=args.masks, calibration_images=images))
    if args.dataset:
        show_ap(predict, args.output, args.dataset[0])


def calibration_images(inputs: list[str]) -> list[str]:
    """Up to 100 of the images, from all of a sorted folder."""
    from msrcnn_d2_runtime.inputs import find_inputs

    sources = find_inputs(inputs).sources
    step = max(1, len(sources) / MAX_IMAGES)
    return [sources[int(k * step)].location for k in range(min(len(sources), MAX_IMAGES))]


def show_ap(predict: "MaskScoringPredictor", path: str, name: str) -> None:
    """
    Args:
        path: of the int8 file.
        name: of the dataset.
    """
    from detectron2.data import DatasetCatalog

    from msrcnn_d2.engine import evaluate_predictor
    from msrcnn_d2_runtime.onnx_predictor import OnnxPredictor

    exported = OnnxPredictor(path, rank_by=predict.rank_by)
    limit = max(exported.metadata["max_detections"], 100)  # as for `msrcnn-d2 evaluate`
    before, after = (evaluate_predictor(x, name, None, limit) for x in (predict, exported))
    count = len(DatasetCatalog.get(name))
    print(f"AP on the {count:,} images of {name}, before and after int8:")
    for task, metrics in before.items():
        if "AP" in metrics:
            print(f"  {task}: {metrics['AP']:.2f}, {after[task]['AP']:.2f}")


def show(exported: "Exported") -> None:
    print("Compared with the model:")
    for comparison in exported.comparisons:
        print(f"  {comparison}")
    size = exported.num_bytes / 2**20
    print(f"{exported.path}: {size:.1f} MiB, in {exported.seconds:.0f} s")
