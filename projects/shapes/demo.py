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
# One thread trains and another process loads images. At this size a second thread brings nothing
# (measured: README.md), and with one the results do not depend on the number of cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
# How masks can be ranked: name -> what a detection has it under
RANKINGS = {"class_score": "score", "mask_score": "mask_score", "true_iou": "true_iou"}
TITLES = {
    "class_score": "class score",
    "mask_score": "mask score",
    "true_iou": "true IoU (ceiling)",
}


def main() -> None:
    args = parse_args()
    data, training = args.output / "data", args.output / "training"
    size = ["--num-train", args.num_train, "--num-val", args.num_val]
    seconds = {"draw": run(HERE / "draw.py", data, "--seed", args.seed, *size)}
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
    parser.add_argument("--num-train", type=int, default=2000, help="images to train on")
    parser.add_argument("--num-val", type=int, default=200, help="images to evaluate on")
    parser.add_argument("--max-iter", type=int, help="iterations (default: the config's)")
    return parser.parse_args()


def run(script: Path, *arguments) -> float:
    """
    Runs a script of the project, and shows the command for the reader to repeat.

    Returns:
        how long it took, in seconds
    """
    command = [os.path.relpath(script), *map(str, arguments)]
    shown = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    print(f"\n$ {' '.join(shown)} python {shlex.join(command)}\n", flush=True)
    start = time.perf_counter()
    environment = {**os.environ, **ENVIRONMENT}
    code = subprocess.run([sys.executable, *command], env=environment).returncode
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
        "mask_ap": {ranking: {"AP", "AP50", "AP75"}} and "box_ap": AP, in percent;
        "correlation_with_true_iou": {score: Pearson's coefficient over the masks whose true IoU
        is above 0.5, since no threshold of AP can tell those below apart}.
    """
    scores = {name: [d[key] for d in detections] for name, key in RANKINGS.items()}
    found = [d for d in detections if d["true_iou"] > 0.5]
    return {
        "mask_ap": {name: mask_ap(coco_gt, detections, s) for name, s in scores.items()},
        "box_ap": silently(box_ap, coco_gt, detections),
        "correlation_with_true_iou": {
            name: correlation([d[RANKINGS[name]] for d in found], [d["true_iou"] for d in found])
            for name in ("class_score", "mask_score")
        },
    }


def box_ap(coco_gt: COCO, detections: list[dict]) -> float:
    """Box AP by class score, in percent; NaN without any detection."""
    if not detections:
        return float("nan")
    evaluation = COCOeval(coco_gt, coco_gt.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * float(evaluation.stats[0])


def correlation(first: list[float], second: list[float]) -> float:
    """Pearson's coefficient; NaN where one of the two does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def summary(metrics: dict) -> str:
    """The table that the demo ends with."""
    correlations = metrics["correlation_with_true_iou"]
    rows = [
        [f"masks by {name.replace('_iou', ' IoU').replace('_', ' ')}", *ap.values()]
        + [correlations.get(name)]
        for name, ap in metrics["mask_ap"].items()
    ]
    rows.append(["boxes by class score", metrics["box_ap"]])
    headers = ["ranking", "AP", "AP50", "AP75", "correlation with true IoU"]
    return tabulate(rows, headers=headers, floatfmt=("", ".1f", ".1f", ".1f", ".2f"))


if __name__ == "__main__":
    main()
