"""
Compares a Mask R-CNN with the same model after a retrofit: what has changed, and what it cost.

    measure.py --before CONFIG WEIGHTS --after CONFIG WEIGHTS --dataset NAME JSON IMAGES ...

It prints whether all outputs of the Mask R-CNN are the same bit for bit on the test set; mask AP
by class score (before), by mask score (after) and with the help of the true IoU (ceilings);
seconds and memory per iteration of a retrofit and of full trainings, with one thread unless
OMP_NUM_THREADS says more.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported

import numpy as np
import torch
from pycocotools.coco import COCO
from tabulate import tabulate

from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage

from msrcnn_d2.checkpoint import MaskScoringCheckpointer
from msrcnn_d2.engine import build_recipe, find_config_file, load_config, register_dataset
from msrcnn_d2.engine.loaders import ResumableBatches, StepSeeds
from msrcnn_d2.evaluation import mask_ap, true_mask_ious

OUTPUTS = ("pred_boxes", "pred_classes", "pred_masks", "scores")  # of a Mask R-CNN
TRAININGS = ("Mask R-CNN", "Mask Scoring R-CNN", "retrofit")
NUM_BATCHES = 8  # to repeat in turn, so that all trainings see the same
NUM_MEMORY_STEPS = 10


def main() -> None:
    args = parse_args()
    for dataset in args.dataset:
        register_dataset(*dataset)
    if args.memory_of:
        print(json.dumps(step_memory(args, args.memory_of)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = {
            **compare_on_test_set(args, Path(folder)),
            "seconds": seconds_per_iteration(args),
            "memory": {name: memory_in_a_process_of_its_own(name) for name in TRAININGS},
        }
    print(summary(results))
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    both = {"nargs": 2, "required": True, "metavar": ("CONFIG", "WEIGHTS")}
    parser.add_argument("--before", **both, help="the Mask R-CNN")
    parser.add_argument("--after", **both, help="the retrofit")
    names = ("NAME", "ANNOTATIONS", "IMAGES")
    parser.add_argument("--dataset", nargs=3, action="append", default=[], metavar=names)
    parser.add_argument("--rounds", type=int, default=40, help="steps to time of each training")
    parser.add_argument("--output", type=Path, help="json file for the numbers")
    parser.add_argument("--memory-of", choices=TRAININGS, help=argparse.SUPPRESS)
    return parser.parse_args()


def load_model(config: str, weights: str):
    """The recipe of a config, and its model in evaluation mode with weights."""
    path = find_config_file(config)
    cfg = load_config(path, [f"train.init_checkpoint={weights}"])
    recipe = build_recipe(cfg)
    model = recipe.build_model().to(recipe.device)
    MaskScoringCheckpointer(model).load(weights)
    return cfg, recipe, model.eval()


@torch.no_grad()
def compare_on_test_set(args: argparse.Namespace, folder: Path) -> dict:
    """
    Returns:
        "detections": how many there are; "changed": those with an output, besides mask scores,
        that is not the same bit for bit; "ap": {ranking: {"AP", "AP50", "AP75"}} of masks, and
        of "boxes" by class score, in percent.
    """
    _, _, before = load_model(*args.before)
    cfg, recipe, after = load_model(*args.after)
    (test_set,) = recipe.test_sets
    cfg.dataloader.evaluator.output_dir = str(folder)
    evaluator = test_set.build_evaluator()
    evaluator.reset()
    detections = changed = 0
    for inputs in test_set.build_loader():
        outputs = after(inputs)
        for a, b in zip(before(inputs), outputs):
            detections += len(a["instances"])
            changed += num_changed(a["instances"], b["instances"])
        evaluator.process(inputs, outputs)
    results = silently(evaluator.evaluate)
    coco_gt = silently(COCO, MetadataCatalog.get(test_set.names[0]).json_file)
    found = json.loads((folder / "coco_instances_results.json").read_text())
    ious = true_mask_ious(coco_gt, found)
    max_dets = (evaluator._max_dets_per_image or [100])[-1]
    perfect = [d["score"] * iou for d, iou in zip(found, ious)]
    return {
        "detections": detections,
        "changed": changed,
        "ap": {
            "boxes": first_three(results["bbox"]),
            "class score": first_three(results["segm_by_class_score"]),
            "mask score": first_three(results["segm"]),
            "class score x true IoU": mask_ap(coco_gt, found, perfect, max_dets),
            "true IoU": mask_ap(coco_gt, found, ious, max_dets),
        },
        "correlation": correlations(found, ious),
    }


def num_changed(before, after) -> int:
    if len(before) != len(after):
        return max(len(before), len(after))
    same = torch.ones(len(before), dtype=torch.bool)
    for name in OUTPUTS:
        a, b = (getattr(x.get(name), "tensor", x.get(name)).cpu() for x in (before, after))
        same &= (a == b).flatten(1).all(1) if a.dim() > 1 else a == b
    return int((~same).sum())


def first_three(results: dict) -> dict:
    return {name: results[name] for name in ("AP", "AP50", "AP75")}


def correlations(detections: list[dict], ious: list[float]) -> dict[str, float]:
    """Pearson's with the true IoU, over the masks where it is above 0.5, as AP counts no others."""
    right = [i for i, iou in enumerate(ious) if iou > 0.5]
    true = [ious[i] for i in right]
    keys = ("score", "mask_score", "pred_mask_iou")
    return {k: float(np.corrcoef([detections[i][k] for i in right], true)[0, 1]) for k in keys}


def silently(function, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


class Training:
    """One of TRAININGS, from the weights of the trained Mask R-CNN, ready to do steps."""

    def __init__(self, args: argparse.Namespace, name: str):
        config = args.before[0] if name == "Mask R-CNN" else args.after[0]
        cfg, recipe, self.model = load_model(config, args.before[1])
        if name == "Mask Scoring R-CNN":
            cfg.model._target_ = GeneralizedRCNN
            recipe = build_recipe(cfg)
            trained, self.model = self.model, recipe.build_model().to(recipe.device)
            self.model.load_state_dict(trained.state_dict())
        self.model.train()
        self.optimizer = recipe.build_optimizer(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # the work of a step without its effect
        self.recipe = recipe

    def batches(self, count: int) -> list:
        batches = iter(ResumableBatches(self.recipe.build_train_loader, StepSeeds(0)))
        return [next(batches) for _ in range(count)]

    def step(self, batch) -> None:
        with EventStorage():
            loss = sum(self.model(batch).values())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def seconds_per_iteration(args: argparse.Namespace) -> dict[str, float]:
    """Median for each training; they do their steps in turn, on batches that are loaded already."""
    trainings = {name: Training(args, name) for name in TRAININGS}
    batches = trainings["retrofit"].batches(NUM_BATCHES)
    seconds: dict[str, list[float]] = {name: [] for name in TRAININGS}
    for i in range(args.rounds + 2):
        for name, training in trainings.items():
            start = time.perf_counter()
            training.step(batches[i % NUM_BATCHES])
            seconds[name].append(time.perf_counter() - start)
    return {name: median(s[2:]) for name, s in seconds.items()}  # the first ones warm up


def memory_in_a_process_of_its_own(name: str) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--memory-of", name]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout.splitlines()[-1])


def step_memory(args: argparse.Namespace, name: str) -> dict[str, float]:
    """
    Returns:
        MB of resident memory: "process", its peak while training; "step", how much of it came
        after the model and the images were there.
    """
    training = Training(args, name)
    batches = training.batches(NUM_BATCHES)
    before = resident_mb("VmRSS")
    for i in range(NUM_MEMORY_STEPS):
        training.step(batches[i % NUM_BATCHES])
    peak = resident_mb("VmHWM")
    return {"process": peak, "step": peak - before}


def resident_mb(which: str) -> float:
    """Of this process; unlike getrusage, it does not begin at that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (x for x in lines if x.startswith(which))
    return int(line.split()[1]) / 2**10


def summary(results: dict) -> str:
    changed = f"{results['changed']} of {results['detections']} detections have changed"
    correlation = [f"{name} {value:.2f}" for name, value in results["correlation"].items()]
    ap = [[name, *values.values()] for name, values in results["ap"].items()]
    reference = results["seconds"]["Mask Scoring R-CNN"]
    cost = [
        [name, seconds, seconds / reference, *results["memory"][name].values()]
        for name, seconds in results["seconds"].items()
    ]
    return "\n\n".join(
        [
            changed,
            tabulate(ap, ["ranked by", "AP", "AP50", "AP75"], "github", floatfmt=".2f"),
            f"correlation with true IoU: {', '.join(correlation)}",
            tabulate(
                cost,
                ["training", "s / iteration", "relative", "peak MB", "of it a step's"],
                "github",
                floatfmt=("", ".3f", ".2f", ".0f", ".0f"),
            ),
        ]
    )


if __name__ == "__main__":
    main()
