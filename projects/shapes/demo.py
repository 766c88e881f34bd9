"""
The whole of Mask Scoring R-CNN in a few minutes on a CPU: draws a dataset, trains a small model on
it, evaluates it, and shows what it brings to rank masks by mask score.

What it leaves in the output folder::

    metrics.json      mask AP by class score, by mask score and by true IoU; box AP; seconds
    predictions.png   predicted masks and their scores, beside the true outlines
    ranking.png       the same masks, ranked by class score and by mask score
    data/             the dataset in COCO format, written by draw.py
    training/         log, checkpoint and detections, written by train_net.py
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from pictures import draw_predictions, draw_ranking
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

import detectron2

from msrcnn_d2.evaluation import mask_ap, true_mask_ious

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = "ms_rcnn_shapes.py"
# How masks can be ranked: name -> what a detection has it under
RANKINGS = {"class_score": "score", "mask_score": "mask_score", "true_iou": "true_iou"}


def main() -> None:
    args = parse_args()
    data, training = args.output / "data", args.output / "training"
    seconds = {"draw": run(HERE / "draw.py", data, "--seed", args.seed)}
    seconds["train and evaluate"] = run(*train_command(data, training, args.seed, args.max_iter))

    start = time.perf_counter()
    coco_gt = silently(COCO, data / "val.json")
    detections = load_detections(coco_gt, training)
    metrics = {**compute_metrics(coco_gt, detections), "seed": args.seed, "seconds": seconds}
    metrics["versions"] = {"torch": torch.__version__, "detectron2": detectron2.__version__}
    pictures = [args.output / "predictions.png", args.output / "ranking.png"]
    for draw, path in zip((draw_predictions, draw_ranking), pictures):
        draw(path, coco_gt, data / "val", detections)
    seconds["measure and draw pictures"] = time.perf_counter() - start

    report = args.output / "metrics.json"
    report.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\n{summary(metrics)}\n\nnumbers:  {report}")
    print("pictures:", *pictures, flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/shapes"), help="folder")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the training")
    parser.add_argument("--max-iter", type=int, help="iterations (default: the config's)")
    return parser.parse_args()


def run(script: Path, *arguments) -> float:
    """
    Runs a script of the project, and shows the command for the reader to repeat.

    Returns:
        how long it took, in seconds
    """
    command = [os.path.relpath(script), *map(str, arguments)]
    print(f"\n$ python {shlex.join(command)}\n", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        sys.exit(code)  # the script has said why
    return time.perf_counter() - start


def train_command(data: Path, training: Path, seed: int, max_iter: Optional[int]) -> list:
    """The script to train and evaluate with, and its arguments."""
    command = [ROOT / "train_net.py", "--config-file", os.path.relpath(HERE / CONFIG)]
    for split in ("train", "val"):
        command += ["--dataset", f"shapes_{split}", data / f"{split}.json", data / split]
    command += [f"train.output_dir={training}", f"train.seed={seed}"]
    return command + ([f"train.max_iter={max_iter}"] if max_iter else [])


def silently(function, *args):
    """What a function returns, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def load_detections(coco_gt: COCO, training: Path) -> list[dict]:
    """The detections that train_net.py wrote, each with its "true_iou" besides."""
    path = training / "inference" / "coco_instances_results.json"
    detections = json.loads(path.read_text())
    for detection, iou in zip(detections, true_mask_ious(coco_gt, detections)):
        detection["true_iou"] = iou
    return detections


def compute_metrics(coco_gt: COCO, detections: list[dict]) -> dict:
    """
    Returns:
        "mask_ap": {ranking: {"AP", "AP50", "AP75"}} and "box_ap", in percent; "correlation":
        {score: Pearson's, with the true IoU, over all detections}.
    """
    scores = {name: [d[key] for d in detections] for name, key in RANKINGS.items()}
    return {
        "mask_ap": {name: mask_ap(coco_gt, detections, s) for name, s in scores.items()},
        "box_ap": silently(box_ap, coco_gt, detections),
        "correlation_with_true_iou": {
            name: float(np.corrcoef(s, scores["true_iou"])[0, 1])
            for name, s in scores.items()
            if name != "true_iou"
        },
    }


def box_ap(coco_gt: COCO, detections: list[dict]) -> float:
    """Box AP by class score, in percent."""
    evaluation = COCOeval(coco_gt, coco_gt.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * float(evaluation.stats[0])


def summary(metrics: dict) -> str:
    """The table that the demo ends with."""
    rows = [
        [f"masks by {name.replace('_', ' ')}", *ap.values(), correlation.get(name)]
        for correlation in [metrics["correlation_with_true_iou"]]
        for name, ap in metrics["mask_ap"].items()
    ]
    rows[-1][0] += " (ceiling)"
    rows.append(["boxes by class score", metrics["box_ap"]])
    headers = ["ranking", "AP", "AP50", "AP75", "correlation with true IoU"]
    return tabulate(rows, headers=headers, floatfmt=("", ".1f", ".1f", ".1f", ".2f"))


if __name__ == "__main__":
    main()
