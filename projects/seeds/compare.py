"""
Trains Mask R-CNN and Mask Scoring R-CNN with several seeds, calibrates their scores, and compares
them, since one run of each says little: tables with mean and standard deviation.

    compare.py nuclei --data NUCLEI   data from projects/nuclei/prepare.py; hours on two cores
    compare.py shapes                 draws its data; models of the demo
    compare.py shapes --retrofit      also mask IoU heads for the Mask R-CNNs, trained afterwards

What it leaves in the output folder::

    tables.md, numbers.json   the result
    <model>-<seed>/           a training as of train_net.py, evaluated on val
      detections/             what the model finds in val, in training images and in images held out
      calibrators.pth         fitted to training images and to images held out
      measured/               numbers for the tables
      report/                 what its scores are worth on val, with the first of these calibrators

What is there already is not done again, so that a run can be interrupted and go on.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from detections import Found, find
from measures import (
    calibrate,
    measure,
    measure_amounts,
    measure_cues,
    measure_precisions,
    measure_rankings,
    measure_transfer,
)
from msrcnn_d2.calibration import fit_calibrator
from msrcnn_d2.modeling import MaskCalibrator
from msrcnn_d2.report import write_report
from msrcnn_d2.utils.errors import UserError, exit_on_user_error
from tables import TITLES, tables

PROJECTS = Path(__file__).resolve().parents[1]
ROOT = PROJECTS.parent
MODELS = ("mask_rcnn", "ms_rcnn")
# What the head of a retrofitted Mask R-CNN of the same seed learns from
RETROFITS = {"retrofit_on_proposals": "proposals", "retrofit_on_detections": "detections"}
# With one thread the results do not depend on the number of cores, and runs go on side by side
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
# Mean difference of the largest and the smallest of R, G and B; fluorescence has exactly 0
MIN_COLOUR = 5


@dataclass
class Study:
    """
    Attributes:
        name: of the project, its configs and its datasets.
        parts: {part: (annotations, folder of images)} of "train", "val" and "holdout"; for each
            seed.
        groups: {kind of images: ids}, for which a calibrator is fitted to one and used on others.
    """

    name: str
    parts: dict[int, dict[str, tuple[Path, Path]]] = field(default_factory=dict)
    groups: dict[str, Collection] = field(default_factory=dict)

    def config(self, model: str) -> Path:
        if model in RETROFITS:
            return PROJECTS / "retrofit" / f"retrofit_{self.name}.py"
        return PROJECTS / self.name / f"{model}_{self.name}.py"


def main() -> None:
    args = parse_args()
    os.environ.update(ENVIRONMENT)
    with exit_on_user_error():
        study = PREPARE[args.study](args)
        output = args.output or Path("output") / f"{args.study}-seeds"
        # PyTorch does not work in forked processes
        context = multiprocessing.get_context("spawn")
        runs: list[dict[str, Any]] = []
        with ProcessPoolExecutor(args.jobs, context) as pool:
            for models in (args.models, RETROFITS if args.retrofit else ()):
                jobs = [(model, seed) for seed in args.seeds for model in models]
                runs += pool.map(partial(make_run, study, output, args.other), *zip(*jobs))
        text = tables(runs)
        (output / "tables.md").write_text(text)
        (output / "numbers.json").write_text(json.dumps(runs, indent=1) + "\n")
        print(f"\n{text}\ntables: {output / 'tables.md'}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=PREPARE, help="which data and configs")
    parser.add_argument("--data", type=Path, metavar="DIR", help="nuclei: folder of prepare.py")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default output/STUDY-seeds")
    parser.add_argument(
        "--other",
        type=Path,
        metavar="DIR",
        help="output of the other study, whose calibrators are tried on this one's images",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument(
        "--retrofit",
        action="store_true",
        help="also train mask IoU heads for the Mask R-CNNs, on proposals and on detections",
    )
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default 2)")
    args = parser.parse_args()
    if "ms_rcnn" not in args.models:
        parser.error("--models needs ms_rcnn, which all tables are about")
    if args.retrofit and "mask_rcnn" not in args.models:
        parser.error("--retrofit needs the models of mask_rcnn")
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
    groups: dict[str, list] = {"fluorescence": [], "stained": []}
    for annotations, folder in parts.values():
        for image in json.loads(annotations.read_text())["images"]:
            kind = "stained" if is_coloured(folder / image["file_name"]) else "fluorescence"
            groups[kind].append(image["id"])
    return Study("nuclei", dict.fromkeys(args.seeds, parts), groups)


def is_coloured(path: Path) -> bool:
    with Image.open(path) as image:
        return float(np.ptp(np.asarray(image.convert("RGB")), axis=2).mean()) > MIN_COLOUR


def prepare_shapes(args: argparse.Namespace) -> Study:
    study = Study("shapes")
    for seed in args.seeds:
        data = (args.data or Path("output/shapes-seeds")) / f"data-{seed}"
        draw = PROJECTS / "shapes" / "draw.py"
        run(draw, data, "--seed", seed)
        # Other seeds draw other images of the same kind: nobody trains on these
        run(draw, data / "more", "--seed", 1000 + seed, "--num-train", 1, "--num-val", 200)
        parts = {part: (data / f"{part}.json", data / part) for part in ("train", "val")}
        parts["holdout"] = (data / "more" / "val.json", data / "more" / "val")
        study.parts[seed] = parts
    return study


PREPARE = {"nuclei": prepare_nuclei, "shapes": prepare_shapes}


def make_run(
    study: Study, output: Path, other: Path | None, model: str, seed: int
) -> dict[str, Any]:
    """Train, calibrate and measure, as far as it is not done yet."""
    torch.set_num_threads(1)
    folder, parts = output / f"{model}-{seed}", study.parts[seed]
    config, weights = study.config(model), folder / "model_final.pth"
    if not weights.is_file():
        command = [ROOT / "train_net.py", "--config-file", config]
        for part in ("train", "val"):
            command += ["--dataset", f"{study.name}_{part}", *parts[part]]
        resume = ["--resume"] if (folder / "last_checkpoint").is_file() else []
        command += [*resume, f"train.output_dir={folder}", f"train.seed={seed}"]
        if model in RETROFITS:
            trained = output / f"mask_rcnn-{seed}" / "model_final.pth"
            command += [f"train.init_checkpoint={trained}"]
            command += [f"model.learn_from={RETROFITS[model]}"]
        run(*command)

    calibrated_on = ("train",) if model in RETROFITS else ("holdout", "train")

    @cache
    def found(part: str) -> Found:
        file = folder / "detections" / f"{part}.pth"
        return find(config, weights, *parts[part], file, seed=seed)

    calibrators_file, measured = folder / "calibrators.pth", folder / "measured"
    if not calibrators_file.is_file():
        shutil.rmtree(measured, ignore_errors=True)  # of other calibrators
        calibrators, fits = {}, {}
        for part in calibrated_on:
            calibrators[part], fits[part] = calibrate(found(part), seed)
        for group, ids in study.groups.items() if model not in RETROFITS else ():
            calibrators[group] = MaskCalibrator()
            samples = found("train").in_images(ids).samples
            fit_calibrator(calibrators[group], samples, seed=seed)
        states = {name: calibrator.state_dict() for name, calibrator in calibrators.items()}
        torch.save({"states": states, "fits": fits}, calibrators_file)
    calibrators, fits = load_calibrators(calibrators_file)
    of_parts = {part: calibrators[part] for part in calibrated_on}
    measured.mkdir(exist_ok=True)

    def rankings() -> dict:
        numbers, quality = measure_rankings(found("val"), of_parts)
        if model in RETROFITS:
            title = f"Mask R-CNN retrofitted on {RETROFITS[model]}"
        else:
            title = TITLES[model]
        title = f"{title}: {study.name}, seed {seed}"
        write_report(quality, folder / "report", title, str(parts["val"][1]))
        return numbers

    numbers = {"model": model, "seed": seed, "fits": fits}
    used = ("val", *calibrated_on)
    numbers |= kept(measured / "scores.json", lambda: measure({k: found(k) for k in used}))
    numbers["rankings"] = kept(measured / "rankings.json", rankings)
    if model in RETROFITS:
        return numbers
    numbers["precisions"] = kept(
        measured / "precisions.json", lambda: measure_precisions(found("val"), of_parts)
    )
    numbers["cues"] = kept(
        measured / "cues.json", lambda: measure_cues(found("holdout"), found("val"), seed)
    )
    numbers["amounts"] = kept(
        measured / "amounts.json", lambda: measure_amounts({k: found(k) for k in parts}, seed)
    )
    if study.groups or other:
        tried = {name: x for name, x in calibrators.items() if name != "holdout"}
        if other:
            file = other / folder.name / "calibrators.pth"
            if not file.is_file():
                raise UserError(f"There is no '{file}': let compare.py make that study first.")
            tried["other"] = load_calibrators(file)[0]["train"]
        groups = {"all": found("val").image_ids, **study.groups}
        numbers["transfer"] = kept(
            measured / f"transfer{'_other' if other else ''}.json",
            lambda: measure_transfer(found("val"), tried, groups),
        )
    return numbers


def load_calibrators(file: Path) -> tuple[dict[str, MaskCalibrator], dict[str, dict]]:
    content = torch.load(file, weights_only=True)
    calibrators = {name: MaskCalibrator() for name in content["states"]}
    for name, state in content["states"].items():
        calibrators[name].load_state_dict(state)
    return calibrators, content["fits"]


def kept(file: Path, measure: Callable[[], Any]) -> Any:
    """What is measured, or has been before."""
    if not file.is_file():
        file.write_text(json.dumps(measure(), indent=1) + "\n")
    return json.loads(file.read_text())


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
