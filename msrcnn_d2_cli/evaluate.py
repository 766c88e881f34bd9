"""
Measure how well a model detects, how well it segments, and how well its scores rank its masks.

It prints box AP, mask AP by mask score and by class score, and writes predictions and a report into
the output folder.
"""

import argparse

from . import train
from .parsing import UsageError
from .train import add_run_arguments

USAGE = "--config-file FILE --weights FILE [options] [KEY=VALUE ...]"
EXAMPLES = """
  a checkpoint of yours, on COCO val2017:
    {prog} --config-file COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py \\
      --weights output/model_final.pth
  the published weights of a config (`msrcnn-d2 zoo` lists them):
    {prog} --config-file COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py \\
      --weights ms_rcnn_R_50_FPN_1x
  the last checkpoint of a run, with the config that the run saved:
    {prog} --config-file output/config.yaml --resume
  your own data, in COCO's format:
    {prog} --config-file ... --weights model.pth \\
      --dataset my_val val.json images/ dataloader.test.dataset.names=my_val
  an exported model, which needs no config, on each --dataset:
    {prog} --weights model.onnx --dataset my_val val.json images/ \\
      train.output_dir=output/exported
"""
# What can be changed for an exported model
OUTPUT_DIR, DATASETS = "train.output_dir", "dataloader.test.dataset.names"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, weights="weights to evaluate", resume="evaluate")
    parser.set_defaults(eval_only=True)


def check_arguments(args: argparse.Namespace) -> None:
    if not is_exported(args):
        return
    if args.config_file:
        raise UsageError(f"'{args.weights}' has all of its config: leave out --config-file")
    for name in ("resume", "retrofit"):
        if getattr(args, name):
            raise UsageError(f"--{name} does not go together with an exported model")
    if args.num_gpus != 1 or args.num_machines != 1:
        raise UsageError("an exported model runs in one process, on the CPU")
    for text in args.opts:
        if text.split("=")[0] not in (OUTPUT_DIR, DATASETS) or "=" not in text:
            raise UsageError(
                f"'{text}' cannot be changed for an exported model, only {OUTPUT_DIR}=FOLDER and "
                f"{DATASETS}=NAME"
            )


def run(args: argparse.Namespace) -> None:
    if is_exported(args):
        evaluate_exported(args)
    else:
        train.run(args)


def is_exported(args: argparse.Namespace) -> bool:
    return bool(args.weights) and args.weights.endswith(".onnx")


def evaluate_exported(args: argparse.Namespace) -> None:
    """Evaluate an exported model on each dataset that is named."""
    import os

    from detectron2.utils.logger import setup_logger

    from msrcnn_d2.engine import evaluate_predictor, register_dataset
    from msrcnn_d2.engine.preflight import check_output_dir
    from msrcnn_d2.utils.errors import UserError
    from msrcnn_d2_runtime.onnx_predictor import OnnxPredictor

    settings = dict(text.split("=", 1) for text in args.opts)
    folder = settings.get(OUTPUT_DIR, "./output")
    for dataset in args.dataset:
        register_dataset(*dataset)
    names = [settings[DATASETS]] if DATASETS in settings else [name for name, *_ in args.dataset]
    if not names:
        raise UserError(
            "On which dataset? Give --dataset NAME ANNOTATIONS.json IMAGES/, or one that "
            f"Detectron2 knows, such as {DATASETS}=coco_2017_val."
        )
    predictor = OnnxPredictor(args.weights)
    check_output_dir(folder)
    for logger in ("detectron2", "fvcore", "msrcnn_d2"):
        setup_logger(folder, name=logger)
    limit = predictor.metadata.get("max_detections", 0)
    for name in names:
        evaluate_predictor(
            predictor,
            name,
            folder if len(names) == 1 else os.path.join(folder, name),
            max_dets_per_image=limit if limit > 100 else None,
        )
