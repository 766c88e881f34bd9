"""Images per second in training: one process against several, each with its own share of images."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measuring import Timing
from benchmarks.models import DEVICE
from benchmarks.report import Part

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "projects" / "shapes"
IMAGES_PER_PROCESS = 4
NUM_ITERATIONS = 33  # Detectron2 does not time the first three
ONE = "1 process"


def run(options) -> list[Part]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw = [sys.executable, SHAPES / "draw.py", folder / "data"]
        sizes = ["--num-train", "64", "--num-val", "1"]
        subprocess.run([*draw, *sizes], check=True, capture_output=True)
        seconds: dict[str, list[float]] = {case: [] for case in cases()}
        for k in range(options.rounds):
            for case in list(seconds)[:: 1 if k % 2 else -1]:
                processes, threads = cases()[case]
                output = folder / f"{k}-{processes}-{threads}"
                found = seconds_per_iteration(folder / "data", processes, threads, output)
                seconds[case].append(found / (processes * IMAGES_PER_PROCESS))
    return [_part({case: Timing(s) for case, s in seconds.items()})]


def cases() -> dict[str, tuple[int, int]]:
    """Numbers of processes and of threads of each."""
    if DEVICE == "cuda":
        numbers = [2**k for k in range(4) if 2**k <= torch.cuda.device_count()]
        return {f"{n} process{'es' if n > 1 else ''}": (n, 1) for n in numbers}
    cores = len(os.sched_getaffinity(0))
    several = {f"1 process with {cores} threads": (1, cores), f"{cores} processes": (cores, 1)}
    return {ONE: (1, 1), **(several if cores > 1 else {})}


def seconds_per_iteration(data: Path, processes: int, threads: int, output: Path) -> float:
    """As Detectron2 logs it: reading the images, both passes, and the optimizer."""
    subprocess.run(
        [
            *[sys.executable, "-W", "ignore", ROOT / "train_net.py"],
            *["--num-gpus", str(processes), "--dist-url", "auto"],
            *["--config-file", SHAPES / "ms_rcnn_shapes.py"],
            *["--dataset", "shapes_train", data / "train.json", data / "train"],
            *["--dataset", "shapes_val", data / "val.json", data / "val"],
            f"dataloader.train.total_batch_size={processes * IMAGES_PER_PROCESS}",
            "dataloader.train.num_workers=0",
            "dataloader.test.num_workers=0",
            f"train.max_iter={NUM_ITERATIONS}",
            f"train.device={DEVICE}",
            f"train.output_dir={output}",
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    log = (output / "log.txt").read_text()
    (found,) = re.findall(r"Overall training speed: .*\(([\d.]+) s / it\)", log)
    return float(found)


def _part(timings: dict[str, Timing]) -> Part:
    one = timings[ONE]
    rows = [[case, 1 / t.median, 1 / t.ratio_to(one)] for case, t in timings.items()]
    return Part(
        f"Training, the small model of projects/shapes, {IMAGES_PER_PROCESS} images of 128 x 128 "
        f"pixels per process, on {DEVICE}",
        ["", "images / s", "times as many as 1 process with 1 thread"],
        rows,
        data={case: t.as_dict() for case, t in timings.items()},
    )
