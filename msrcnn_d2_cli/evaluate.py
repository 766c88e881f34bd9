"""
Measure how well a model detects, how well it segments, and how well its scores rank its masks.

It prints box AP, mask AP by mask score and by class score, and writes predictions and a report into
the output folder.
"""

import argparse

from .train import add_run_arguments, run

__all__ = ["EXAMPLES", "USAGE", "add_arguments", "run"]

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
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, weights="weights to evaluate", resume="evaluate")
    parser.set_defaults(eval_only=True)
