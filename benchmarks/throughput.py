"""Images per second of `msrcnn-d2 evaluate`: workers and batches against neither."""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import Timing
from benchmarks.models import DEVICE, IMAGE_SIZE, build_models, model_input, photo
from benchmarks.report import Part
from msrcnn_d2_cli import main

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "projects" / "shapes"
BATCH_SIZE = 8
NUM_IMAGES = 80  # ten batches; Detectron2 does not time the first five
CASES = {
    "batch size 1, no workers": (1, 0),
    "batch size 1, a worker": (1, 1),
    f"batch size {BATCH_SIZE}, a worker": (BATCH_SIZE, 1),
}


class Work(NamedTuple):
    """
    Attributes:
        title: model and images, in words.
        config, weights: files of the model.
        annotations, images: a file and a folder.
        opts: overrides of the config.
    """

    title: str
    config: Path
    weights: Path
    annotations: Path
    images: Path
    opts: list[str] = []


def run(options) -> list[Part]:
    with tempfile.TemporaryDirectory() as folder:
        work = (r50_on_photos if DEVICE == "cuda" else shapes)(Path(folder), NUM_IMAGES)
        arguments = [
            *["--config-file", str(work.config)],
            *["--dataset", "bench", str(work.annotations), str(work.images)],
            "dataloader.test.dataset.names=bench",
            f"train.init_checkpoint={work.weights}",
            *work.opts,
        ]
        seconds: dict[str, list[float]] = {name: [] for name in CASES}
        for k in range(options.rounds):
            for name, (batch_size, workers) in CASES.items():
                output = Path(folder) / f"{k}-{batch_size}-{workers}"
                seconds[name].append(seconds_per_image(arguments, batch_size, workers, output))
    timings = {name: Timing(s) for name, s in seconds.items()}
    return [_part(work.title, timings)]


def shapes(folder: Path, num_images: int) -> Work:
    """The model of `make demo`, which is trained, on images drawn for it."""
    draw = [sys.executable, SHAPES / "draw.py", folder / "data"]
    subprocess.run(
        [*draw, "--num-train", "8", "--num-val", str(num_images)],
        check=True,
        capture_output=True,
    )
    return Work(
        "the small model of projects/shapes, 128 x 128 pixels",
        config=SHAPES / "ms_rcnn_shapes.py",
        weights=SHAPES / "ms_rcnn_shapes.safetensors",
        annotations=folder / "data" / "val.json",
        images=folder / "data" / "val",
    )


def r50_on_photos(folder: Path, num_images: int) -> Work:
    """R-50-FPN with random weights on copies of the photograph, at the size of COCO's recipe."""
    _, model = build_models()
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    height, width = IMAGE_SIZE
    images = [
        {"id": k, "file_name": f"{k}.jpg", "height": height, "width": width}
        for k in range(1, num_images + 1)
    ]
    (folder / "images").mkdir()
    for image in images:
        Image.fromarray(np.ascontiguousarray(photo()[:, :, ::-1])).save(
            folder / "images" / image["file_name"]
        )
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, 81)]
    annotations = {"images": images, "annotations": [], "categories": categories}
    (folder / "photos.json").write_text(json.dumps(annotations))
    return Work(
        "R-50-FPN, 800 x 1067 pixels, 100 detections",
        config=ROOT / "configs" / "COCO-InstanceSegmentation" / "ms_rcnn_R_50_FPN_1x.py",
        weights=folder / "model.pth",
        annotations=folder / "photos.json",
        images=folder / "images",
        opts=[f"model.roi_heads.box_predictor.test_score_thresh={_threshold(model)}"],
    )


@torch.no_grad()
def _threshold(model) -> float:
    """A threshold on class scores that a thousand candidates pass, so that 100 are kept."""
    predictor = model.roi_heads.box_predictor
    predictor.test_score_thresh, predictor.test_topk_per_image = 0.0, 1000
    (output,) = model.eval()([model_input()])
    return output["instances"].scores.min().item()


def seconds_per_image(arguments, batch_size: int, workers: int, output: Path) -> float:
    """As `msrcnn-d2 evaluate` logs it: all that it does for an image, without the AP at the end."""
    options = [
        f"dataloader.test.batch_size={batch_size}",
        f"dataloader.test.num_workers={workers}",
        f"train.output_dir={output}",
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(["evaluate", *arguments, *options])
    log = (output / "log.txt").read_text()
    (found,) = re.findall(r"Total inference time: .*\(([\d.]+) s / iter per device", log)
    return float(found) / batch_size


def _part(title: str, timings: dict[str, Timing]) -> Part:
    slowest = next(iter(timings.values()))
    return Part(
        f"Throughput of `msrcnn-d2 evaluate`: {title}, on {DEVICE}",
        ["", "images / s", "ratio"],
        [[name, 1 / t.median, 1 / t.ratio_to(slowest)] for name, t in timings.items()],
        data={name: t.as_dict() for name, t in timings.items()},
    )
