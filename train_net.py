#!/usr/bin/env python
"""
Train or evaluate Mask Scoring R-CNN, from a LazyConfig (.py) or a yacs config (.yaml).

On one machine, or started by torchrun on many; see --help for examples.
"""

import argparse
from contextlib import nullcontext

import msrcnn_d2  # noqa: F401  says how to get Detectron2, where the next lines would only fail

# isort: split

import torch

from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from msrcnn_d2.engine import (
    build_recipe,
    check_data,
    check_recipe,
    device_of,
    evaluate_checkpoint,
    find_config_file,
    keep_config_of_training,
    launch,
    load_config,
    refuse_other_run,
    register_dataset,
    train,
)
from msrcnn_d2.published_models import published_results
from msrcnn_d2.utils.errors import agree_on_user_errors, exit_on_user_error

EXAMPLES = """
examples:
  train on COCO with 8 GPUs:
    train_net.py --config-file configs/COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py --num-gpus 8
  go on after an interruption:
    train_net.py --config-file ... --resume
  evaluate a checkpoint:
    train_net.py --config-file ... --eval-only train.init_checkpoint=model.pth
  give a trained Mask R-CNN mask scores, and leave all its other outputs as they are:
    train_net.py --retrofit --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml \\
      MODEL.WEIGHTS mask_rcnn.pth
  your own data in COCO's format:
    train_net.py --config-file ... \\
      --dataset my_train train.json images/ --dataset my_val val.json images/ \\
      dataloader.train.dataset.names=my_train dataloader.test.dataset.names=my_val \\
      model.roi_heads.num_classes=3
  two machines with 8 GPUs each, on both:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
      train_net.py --config-file ...

A yaml config takes MODEL.ROI_HEADS.NUM_CLASSES=3 or MODEL.ROI_HEADS.NUM_CLASSES 3 and so on.
"""


def argument_parser() -> argparse.ArgumentParser:
    parser = default_argument_parser(epilog=EXAMPLES)
    parser.add_argument(
        "--retrofit",
        action="store_true",
        help="train mask scores for the trained Mask R-CNN of the config; change nothing else",
    )
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ANNOTATIONS", "IMAGES"),
        help="register a dataset in COCO's format under a name; can be given several times",
    )
    return parser


def prepare(args: argparse.Namespace):
    """Register datasets and read the config, in each process."""
    for dataset in args.dataset:
        register_dataset(*dataset)
    args.config_file = find_config_file(args.config_file)
    return load_config(args.config_file, args.opts, retrofitted=args.retrofit)


def main(args: argparse.Namespace) -> None:
    """What each process does."""
    with exit_on_user_error():
        with agree_on_user_errors():
            cfg = prepare(args)
            recipe = build_recipe(cfg)
            if not (args.eval_only or args.resume):
                refuse_other_run(recipe.output_dir)
            check_recipe(recipe, comm.get_world_size(), training=not args.eval_only)
        with keep_config_of_training(recipe.output_dir) if args.eval_only else nullcontext():
            default_setup(cfg, args)
        logger = setup_logger(recipe.output_dir, comm.get_rank(), name="msrcnn_d2")
        if not torch.cuda.is_available():
            logger.info("There is no GPU that PyTorch can use: running on the CPU.")
        with agree_on_user_errors():
            check_data(recipe, training=not args.eval_only)
        with agree_on_user_errors():
            for test_set in recipe.test_sets:
                test_set.prepare()
        if args.eval_only:
            evaluate_checkpoint(recipe, args.resume, published_results(args.config_file))
        else:
            train(recipe, resume=args.resume)


def run(args: argparse.Namespace) -> None:
    """Start the processes that the arguments ask for; each runs `main`."""
    with exit_on_user_error():
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            device=device_of(prepare(args)),
            args=(args,),
        )


if __name__ == "__main__":
    run(argument_parser().parse_args())
