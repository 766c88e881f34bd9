"""
Train Mask Scoring R-CNN from a LazyConfig (.py) or a yacs config (.yaml), on any number of GPUs or
on the CPU. The config can be a file of yours, or one that comes with msrcnn-d2 or Detectron2.

Change the config by KEY=VALUE. A yaml config also takes KEY VALUE, as in Detectron2.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from detectron2.config import CfgNode

USAGE = "--config-file FILE [options] [KEY=VALUE ...]"
EXAMPLES = """
  train on COCO with 8 GPUs:
    {prog} --config-file COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py --num-gpus 8
  continue after an interruption:
    {prog} --config-file ... --resume
  train on your own data, in COCO's format:
    {prog} --config-file ... \\
      --dataset my_train train.json images/ --dataset my_val val.json images/ \\
      dataloader.train.dataset.names=my_train dataloader.test.dataset.names=my_val \\
      model.roi_heads.num_classes=3
  the same with a yaml config:
    {prog} --config-file COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.yaml \\
      --dataset my_train train.json images/ --dataset my_val val.json images/ \\
      DATASETS.TRAIN "('my_train',)" DATASETS.TEST "('my_val',)" MODEL.ROI_HEADS.NUM_CLASSES 3
  add mask scores to a trained Mask R-CNN, and leave its other outputs as they are:
    {prog} --retrofit --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml \\
      --weights mask_rcnn.pth
  train with fewer images per iteration than the config is made for, and in parts of 2 images:
    {prog} --config-file ... --scale-lr dataloader.train.total_batch_size=8 \\
      train.accumulation_steps=4
  use two machines with 8 GPUs each (run this on both):
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
      --no-python {prog} --config-file ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, weights="weights to start from", resume="continue from")
    parser.add_argument(
        "--eval-only", action="store_true", help="do not train, as `msrcnn-d2 evaluate`"
    )
    parser.add_argument(
        "--scale-lr",
        action="store_true",
        help="scale learning rate and schedule from the images per iteration that the config is "
        "made for to those of this run; what KEY=VALUE sets stays as it is",
    )


def add_run_arguments(
    parser: argparse.ArgumentParser, weights: str, resume: str | None = None
) -> None:
    """
    What commands have in common that run a model; names and defaults are those of Detectron2.

    Args:
        weights, resume: what the options of these names do, in a few words. Without the second,
            neither --resume nor --retrofit is added.
    """
    model = parser.add_argument_group("model and data")
    model.add_argument(
        "--config-file", default="", metavar="FILE", help="path or name of the config"
    )
    model.add_argument(
        "--weights",
        metavar="FILE",
        help=f"{weights}: a file, a URL or a name of the model zoo; the same as "
        "train.init_checkpoint=FILE (yaml: MODEL.WEIGHTS FILE)",
    )
    if resume is not None:
        model.add_argument(
            "--resume",
            action="store_true",
            help=f"{resume} the last checkpoint in the output folder, if there is one",
        )
        model.add_argument(
            "--retrofit",
            action="store_true",
            help="add mask scores to the trained Mask R-CNN of the config; nothing else of it "
            "changes",
        )
    model.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ANNOTATIONS", "IMAGES"),
        help="register a dataset in COCO's format under a name; can be given several times",
    )
    machines = parser.add_argument_group("GPUs and machines (torchrun needs none of these)")
    machines.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="GPUs of each machine (default: 1)"
    )
    machines.add_argument(
        "--num-machines", type=int, default=1, metavar="N", help="number of machines (default: 1)"
    )
    machines.add_argument(
        "--machine-rank",
        type=int,
        default=0,
        metavar="K",
        help="number of this machine, from 0 (default: 0)",
    )
    # Detectron2's port: the same for all runs of a user, so that a second run notices processes
    # that a first one left behind
    port = 2**15 + 2**14 + hash(os.getuid() if sys.platform != "win32" else 1) % 2**14
    machines.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{port}",
        metavar="URL",
        help="where the processes meet, such as tcp://HOST:PORT, or auto on a single machine",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="change the config")


def run(args: argparse.Namespace) -> None:
    """Start the processes that the arguments ask for; each runs :func:`run_process`."""
    start_processes(run_process, args)


def start_processes(run_process: Callable, args: argparse.Namespace) -> None:
    """
    Args:
        run_process: called with `args` in each process.
        args: of a parser with :func:`add_run_arguments`.
    """
    from msrcnn_d2.engine import device_of
    from msrcnn_d2.engine.launch import launch_processes

    launch_processes(
        run_process,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        device=device_of(read_config(args)),
        args=(args,),
    )


def run_process(args: argparse.Namespace) -> None:
    """What each process does."""
    import torch

    from detectron2.engine import default_setup
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from msrcnn_d2 import engine
    from msrcnn_d2.published_models import published_results
    from msrcnn_d2.utils.errors import agree_on_user_errors, exit_on_user_error

    with exit_on_user_error():
        with agree_on_user_errors():
            cfg, note = read_config(args), ""
            scaled = getattr(args, "scale_lr", False)  # not all commands have the option
            if not args.eval_only:
                cfg, note = engine.scale_to_batch(cfg, args.opts, scaled)
            recipe = engine.build_recipe(cfg)
            if not (args.eval_only or args.resume):
                engine.refuse_other_run(recipe.output_dir)
            engine.check_recipe(recipe, comm.get_world_size(), training=not args.eval_only)
        keep = engine.keep_config_of_training(recipe.output_dir)
        with keep if args.eval_only else nullcontext():
            default_setup(cfg, args)
        logger = setup_logger(recipe.output_dir, comm.get_rank(), name="msrcnn_d2")
        if not torch.cuda.is_available():
            logger.info("There is no GPU that PyTorch can use: running on the CPU.")
        if note:
            logger.log(logging.INFO if scaled else logging.WARNING, note)
        with agree_on_user_errors():
            engine.check_data(recipe, training=not args.eval_only)
        with agree_on_user_errors():
            evaluators = [test_set.prepare() for test_set in recipe.test_sets]
            if not args.eval_only:
                engine.check_metric(recipe, evaluators)
                if recipe.validation_set is not None:
                    recipe.validation_set.build_loader()
        if args.eval_only:
            published = published_results(args.config_file)
            engine.evaluate_checkpoint(recipe, args.resume, published)
        else:
            engine.train(recipe, resume=args.resume)


def read_config(args: argparse.Namespace) -> "DictConfig | CfgNode":
    """
    Register the datasets and read the config, in each process.

    Raises:
        UserError: see :func:`msrcnn_d2.engine.load_config`.
    """
    from msrcnn_d2.engine import find_config_file, load_config, register_dataset

    for dataset in args.dataset:
        register_dataset(*dataset)
    args.config_file = find_config_file(args.config_file)
    retrofitted = getattr(args, "retrofit", False)  # not all commands have the option
    return load_config(args.config_file, args.opts, retrofitted, args.weights)
