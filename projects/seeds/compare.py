"""
Trains Mask R-CNN and Mask Scoring R-CNN with several seeds and compares them, since one run of each
says little: tables with mean and standard deviation, and what the paper claims.

    compare.py nuclei --data NUCLEI   data from projects/nuclei/prepare.py; two hours on two cores
    compare.py shapes                 draws its data; models of the demo

What it leaves in the output folder::

    tables.md, numbers.json   the result
    <model>-<seed>/           a training as of train_net.py, evaluated on val
    ms_rcnn-<seed>/holdout/   predictions on training images that were held out
    ms_rcnn-<seed>/train/     and on some that it was trained on
    ms_rcnn-<seed>/report/    what its mask scores are worth on val

What is there already is not done again, so that a run can be interrupted and go on.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pycocotools.coco import COCO

from msrcnn_d2.evaluation import measure_mask_quality
from msrcnn_d2.report import write_report
from msrcnn_d2.utils.errors import UserError, exit_on_user_error
from tables import Run, tables

PROJECTS = Path(__file__).resolve().parents[1]
ROOT = PROJECTS.parent
MODELS = ("mask_rcnn", "ms_rcnn")
# With one thread the results do not depend on the number of cores, and runs go on side by side
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
NUM_TRAIN_IMAGES = 100  # to see whether the MaskIoU head knows them better than new ones


@dataclass
class Study:
    """
    Attributes:
        name: of the project, its configs and its datasets.
        max_dets: detections per image that count.
        parts: {part: (annotations, folder of images)} of "train", "val", "holdout" and "seen",
            some of the training images; for each seed.
    """

    name: str
    max_dets: int
    parts: dict[int, dict[str, tuple[Path, Path]]] = field(default_factory=dict)

    def config(self, model: str) -> Path:
        return PROJECTS / self.name / f"{model}_{self.name}.py"


def main() -> None:
    args = parse_args()
    with exit_on_user_error():
        study = PREPARE[args.study](args)
        output = args.output or Path("output") / f"{args.study}-seeds"
        jobs = [(model, seed) for seed in args.seeds for model in args.models]
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = list(pool.map(lambda job: make_run(study, output, *job), jobs))
        text, numbers = tables(runs, study.max_dets)
        (output / "tables.md").write_text(text)
        (output / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
        print(f"\n{text}\ntables: {output / 'tables.md'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=PREPARE, help="which data and configs")
    parser.add_argument("--data", type=Path, metavar="DIR", help="nuclei: folder of prepare.py")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default output/STUDY-seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time (default 2)")
    args = parser.parse_args()
    if "ms_rcnn" not in args.models:
        parser.error("--models needs ms_rcnn, which all tables are about")
    args.seeds = sorted(set(args.seeds))
    return args


def prepare_nuclei(args: argparse.Namespace) -> Study:
    if args.data is None or not (args.data / "annotations" / "nuclei_holdout.json").is_file():
        raise UserError(
            "Give the nuclei with --data: a folder that projects/nuclei/prepare.py has written."
        )
    parts = {
        part: (args.data / "annotations" / f"nuclei_{part}.json", args.data / folder)
        for part, folder in (("train", "train"), ("holdout", "train"), ("val", "val"))
    }
    parts["seen"] = first_images(parts["train"])
    return Study("nuclei", 200, dict.fromkeys(args.seeds, parts))


def prepare_shapes(args: argparse.Namespace) -> Study:
    study = Study("shapes", 100)
    for seed in args.seeds:
        data = (args.data or Path("output/shapes-seeds")) / f"data-{seed}"
        draw = PROJECTS / "shapes" / "draw.py"
        run(draw, data, "--seed", seed)
        # Other seeds draw other images of the same kind: nobody trains on these
        run(draw, data / "more", "--seed", 1000 + seed, "--num-train", 1, "--num-val", 200)
        parts = {part: (data / f"{part}.json", data / part) for part in ("train", "val")}
        parts["holdout"] = (data / "more" / "val.json", data / "more" / "val")
        parts["seen"] = first_images(parts["train"])
        study.parts[seed] = parts
    return study


PREPARE = {"nuclei": prepare_nuclei, "shapes": prepare_shapes}


def first_images(part: tuple[Path, Path]) -> tuple[Path, Path]:
    """A part of the first NUM_TRAIN_IMAGES images only."""
    annotations, images = part
    dataset = json.loads(annotations.read_text())
    dataset["images"] = dataset["images"][:NUM_TRAIN_IMAGES]
    ids = {image["id"] for image in dataset["images"]}
    dataset["annotations"] = [a for a in dataset["annotations"] if a["image_id"] in ids]
    path = annotations.with_name(f"{annotations.stem}_first_{NUM_TRAIN_IMAGES}.json")
    path.write_text(json.dumps(dataset))
    return path, images


def make_run(study: Study, output: Path, model: str, seed: int) -> Run:
    """Train and evaluate, as far as it is not done yet, and read what came out."""
    folder, parts = output / f"{model}-{seed}", study.parts[seed]
    command = [ROOT / "train_net.py", "--config-file", study.config(model)]
    for part in ("train", "val", "holdout", "seen"):
        command += ["--dataset", f"{study.name}_{part}", *parts[part]]
    weights = folder / "model_final.pth"
    if not weights.is_file() or not predictions_of(folder).is_file():
        resume = ["--resume"] if (folder / "last_checkpoint").is_file() else []
        run(*command, *resume, f"train.output_dir={folder}", f"train.seed={seed}")
    predicted = {"val": folder}
    if model == "ms_rcnn":
        for part, name in (("holdout", "holdout"), ("seen", "train")):
            predicted[part] = folder / name
            if not predictions_of(predicted[part]).is_file():
                run(
                    *(*command, "--eval-only", f"train.output_dir={predicted[part]}"),
                    f"train.init_checkpoint={weights}",
                    f"dataloader.test.dataset.names={study.name}_{part}",
                )
    measured = {
        part: measure_mask_quality(
            read_truth(parts[part][0]),
            json.loads(predictions_of(where).read_text()),
            max_dets=study.max_dets,
        )
        for part, where in predicted.items()
    }
    title = f"{'Mask R-CNN' if model == 'mask_rcnn' else 'Mask Scoring R-CNN'} on {study.name}, "
    title += f"seed {seed}"
    write_report(measured["val"], folder / "report", title, str(parts["val"][1]))
    return Run(model, seed, measured)


def predictions_of(folder: Path) -> Path:
    return folder / "inference" / "coco_instances_results.json"


def read_truth(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def run(script: Path, *arguments) -> None:
    """Run a script of the project, and show the command for the reader to repeat."""
    command = [os.path.relpath(script), *map(str, arguments)]
    shown = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    print(f"\n$ {' '.join(shown)} python {shlex.join(command)}\n", flush=True)
    environment = {**os.environ, **ENVIRONMENT}
    code = subprocess.run([sys.executable, *command], env=environment).returncode
    if code:
        raise UserError(f"{os.path.relpath(script)} has failed, see above.")


if __name__ == "__main__":
    main()
