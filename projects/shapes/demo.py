"""
The whole of Mask Scoring R-CNN in a few minutes on a CPU: draws a dataset, trains a small model on
it, calibrates its scores, evaluates it, and shows what it brings to rank masks by these scores.

What it leaves in the output folder::

    metrics.json      mask AP by each score and by true IoU; box AP; seconds
    predictions.png   predicted masks and their scores, beside the true outlines
    ranking.png       the same masks, ranked by class score and by mask score
    report/           report.html, what the scores are worth; its figures and numbers
    data/             the dataset in COCO format, written by draw.py
    training/         log and checkpoint, written by train_net.py
    calibrated/       the model with calibrated scores, and its detections
"""

import argparse
import contextlib
import io
import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from pycocotools.coco import COCO
from tabulate import tabulate

import detectron2

from msrcnn_d2.evaluation import MaskQuality, measure_mask_quality
from msrcnn_d2.evaluation.average_precision import AveragePrecision
from msrcnn_d2.report import write_report
from msrcnn_d2_runtime.scores import TITLES
from pictures import draw_predictions, draw_ranking

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = "ms_rcnn_shapes.py"
# One thread trains and another process loads images. At this size a second thread brings nothing
# (measured: README.md), and with one the results do not depend on the number of cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
COMMAND = ("-m", "msrcnn_d2_cli")  # msrcnn-d2, also where it is not in the PATH
NUM_CALIBRATION_IMAGES = 400  # of the training images


def main() -> None:
    args = parse_args()
    data, training = args.output / "data", args.output / "training"
    calibrated = args.output / "calibrated"
    size = ["--num-train", args.num_train, "--num-val", args.num_val]
    # Neither a training nor a calibration mixes its files with an earlier one's
    for folder in (training, calibrated):
        for file in (
            *folder.glob("model*.pth"),
            folder / "last_checkpoint",
            folder / "config.yaml",
        ):
            file.unlink(missing_ok=True)
    seconds = {"draw": run(HERE / "draw.py", data, "--seed", args.seed, *size)}
    seconds["train and evaluate"] = run(*train_command(data, training, args.seed, args.max_iter))
    # After a few iterations hardly a mask is right, and there is too little to fit a calibrator to
    is_calibrated = mask_ap50(training) >= 1
    if is_calibrated:
        command = calibrate_command(data, training, calibrated, args.seed)
        seconds["calibrate"] = run(*command)
        seconds["evaluate again"] = run(*evaluate_command(data, calibrated))

    start = time.perf_counter()
    coco_gt = silently(COCO, data / "val.json")
    detections = load_detections(calibrated if is_calibrated else training)
    if not detections:
        sys.exit("The model found nothing, so there is nothing to show: it needs more iterations.")
    quality = measure_mask_quality(coco_gt, detections)
    metrics = {**compute_metrics(quality), "seed": args.seed, "seconds": seconds}
    metrics["versions"] = {"torch": torch.__version__, "detectron2": detectron2.__version__}
    for detection, iou in zip(detections, quality.true_ious.tolist()):
        detection["true_iou"] = iou
    pictures = [args.output / "predictions.png", args.output / "ranking.png"]
    for draw, path in zip((draw_predictions, draw_ranking), pictures):
        draw(path, coco_gt, data / "val", detections)
    title = f"Mask Scoring R-CNN on shapes, seed {args.seed}"
    report = write_report(quality, args.output / "report", title, str(data / "val"))
    seconds["measure and draw pictures"] = time.perf_counter() - start

    numbers = args.output / "metrics.json"
    numbers.write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\n{summary(metrics)}\n\nnumbers:  {numbers}")
    print("pictures:", *pictures)
    print("report:  ", report, flush=True)


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


def run(script: Path | str, *arguments) -> float:
    """
    Runs a script of the project, and shows the command for the reader to repeat.

    Args:
        script: a path, or an option of Python.
        arguments: what follows.

    Returns:
        how long it took, in seconds
    """
    script = os.path.relpath(script) if isinstance(script, Path) else script
    command = [script, *map(str, arguments)]
    shown = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    print(f"\n$ {' '.join(shown)} python {shlex.join(command)}\n", flush=True)
    start = time.perf_counter()
    environment = {**os.environ, **ENVIRONMENT}
    code = subprocess.run([sys.executable, *command], env=environment).returncode
    if code:
        sys.exit(code)  # the script has said why
    return time.perf_counter() - start


def train_command(data: Path, training: Path, seed: int, max_iter: int | None) -> list:
    """The script to train and evaluate with, and its arguments."""
    command = [ROOT / "train_net.py", "--config-file", os.path.relpath(HERE / CONFIG)]
    command += [*dataset(data, "train"), *dataset(data, "val")]
    command += [f"train.output_dir={training}", f"train.seed={seed}"]
    return command + ([f"train.max_iter={max_iter}"] if max_iter else [])


def calibrate_command(data: Path, training: Path, calibrated: Path, seed: int) -> list:
    """What fits calibrated scores to some of the training images."""
    command = [*COMMAND, "calibrate", "--config-file", os.path.relpath(HERE / CONFIG)]
    command += ["--weights", training / "model_final.pth", *dataset(data, "train")]
    command += ["--max-images", NUM_CALIBRATION_IMAGES]
    return [*command, "--seed", seed, "--output", calibrated]


def evaluate_command(data: Path, calibrated: Path) -> list:
    """What evaluates the model with calibrated scores."""
    command = [*COMMAND, "evaluate", "--config-file", calibrated / "config.yaml"]
    return [*command, *dataset(data, "train"), *dataset(data, "val")]


def dataset(data: Path, split: str) -> list:
    return ["--dataset", f"shapes_{split}", data / f"{split}.json", data / split]


def silently(function, *args):
    """What a function returns, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def mask_ap50(training: Path) -> float:
    """In percent, of the last evaluation; NaN if the model found nothing."""
    lines = map(json.loads, (training / "metrics.json").read_text().splitlines())
    *_, last = (line for line in lines if "bbox/AP50" in line)
    return last.get("segm/AP50", math.nan)


def load_detections(folder: Path) -> list[dict]:
    """The detections that an evaluation wrote."""
    return json.loads((folder / "inference" / "coco_instances_results.json").read_text())


def compute_metrics(quality: MaskQuality) -> dict:
    """
    Returns:
        "mask_ap": {ranking: {"AP", "AP50", "AP75", "AP90"}} and "box_ap": AP, in percent;
        "correlation_with_true_iou": {score: Pearson's coefficient over the masks that are matched
        with an object}.
    """
    parts = {"AP": quality.overall}
    parts |= {f"AP{k}": quality.by_threshold[f"0.{k}"] for k in (50, 75, 90)}
    boxes = AveragePrecision(quality.coco_gt, quality.results, "bbox")
    return {
        "mask_ap": {
            ranking: {name: part.ap[ranking] for name, part in parts.items()}
            for ranking in quality.overall.ap
        },
        "box_ap": 100 * boxes.evaluate(quality.scores["class_score"]).numbers["AP"],
        "correlation_with_true_iou": quality.overall.matched.pearson,
    }


def summary(metrics: dict) -> str:
    """The table that the demo ends with."""
    correlations = metrics["correlation_with_true_iou"]
    rows = [
        [f"masks by {TITLES[name]}", *ap.values(), correlations.get(name)]
        for name, ap in metrics["mask_ap"].items()
    ]
    rows.append(["boxes by class score", metrics["box_ap"]])
    headers = ["ranking", "AP", "AP50", "AP75", "AP90", "correlation with true IoU"]
    return tabulate(rows, headers=headers, floatfmt=("", ".1f", ".1f", ".1f", ".1f", ".2f"))


if __name__ == "__main__":
    main()
