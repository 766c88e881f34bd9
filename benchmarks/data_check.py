"""The check of a dataset of COCO's size, and of its images, beside Detectron2's reading of it."""

import json
import tempfile
from pathlib import Path

from matplotlib.cbook import get_sample_data
from PIL import Image

from detectron2.data.datasets import load_coco_json

from benchmarks.measuring import Stopwatch, Timing, time_in_turn, time_steps_in_turn
from benchmarks.report import Part
from benchmarks.synthetic_coco import HEIGHT, NUM_DISTINCT, WIDTH, draw_dataset
from msrcnn_d2.dataset_check.check import find_issues, read_dataset
from msrcnn_d2.dataset_check.images import look_at_images

NUM_IMAGES = 118_000  # of COCO train2017
NUM_FILES = 2_000
ROUNDS = 3  # of half a minute each
OURS, THEIRS = "check", "Detectron2's load_coco_json"


def run(options) -> list[Part]:
    with tempfile.TemporaryDirectory() as folder:
        return [_annotations(Path(folder)), _images(Path(folder), options.rounds)]


def _annotations(folder: Path) -> Part:
    path = str(folder / "annotations.json")
    num_annotations = _write(path)

    def check(stopwatch: Stopwatch) -> None:
        dataset = stopwatch("read", read_dataset, path, None)
        stopwatch("check", find_issues, dataset)

    def load(stopwatch: Stopwatch) -> None:
        stopwatch("read", load_coco_json, path, "")

    timings = time_steps_in_turn({OURS: check, THEIRS: load}, ROUNDS, warm_up=False)
    rows = [
        [name, *(steps[s].median if s in steps else None for s in ("read", "check", "total"))]
        for name, steps in timings.items()
    ]
    return Part(
        f"Annotations of {NUM_IMAGES:,} images: {num_annotations:,}, as polygons",
        ["", "reading the JSON (s)", "checking (s)", "in all (s)"],
        rows,
        data={n: {s: t.as_dict() for s, t in steps.items()} for n, steps in timings.items()},
    )


def _write(path: str) -> int:
    """Write the same images again and again, with ids of their own; returns how many objects."""
    dataset, _ = draw_dataset(NUM_DISTINCT)
    size = {"height": HEIGHT, "width": WIDTH}
    dataset["images"] = [{"id": k, "file_name": f"{k}.jpg", **size} for k in range(NUM_IMAGES)]
    drawn, dataset["annotations"] = dataset["annotations"], []
    for first in range(0, NUM_IMAGES, NUM_DISTINCT):
        for entry in drawn:
            number, image = len(dataset["annotations"]) + 1, first + entry["image_id"] - 1
            dataset["annotations"].append({**entry, "id": number, "image_id": image})
    Path(path).write_text(json.dumps(dataset))
    return len(dataset["annotations"])


def _images(folder: Path, rounds: int) -> Part:
    photograph = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False))
    names = [f"{k}.jpg" for k in range(NUM_FILES)]
    for name in names:
        photograph.resize((WIDTH, HEIGHT)).save(folder / name)
    timings: dict[str, Timing] = time_in_turn(
        {
            "beginning and end": lambda: look_at_images(str(folder), names, True, None, False),
            "decoded": lambda: look_at_images(str(folder), names, False, None, False),
        },
        rounds,
    )
    return Part(
        f"{NUM_FILES:,} images of {WIDTH} x {HEIGHT} pixels, in the memory of the file system",
        ["", "s"],
        [[name, t.median] for name, t in timings.items()],
        data={name: t.as_dict() for name, t in timings.items()},
    )
