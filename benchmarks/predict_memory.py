"""Peak memory of `msrcnn-d2 predict`: for few and for many images, and for a large one."""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detectron2.config import instantiate

from benchmarks.models import photo, set_batch_norm
from benchmarks.report import Part, Target
from benchmarks.throughput import ROOT, SHAPES
from msrcnn_d2 import model_zoo
from msrcnn_d2_runtime.outputs import KINDS

NUM_IMAGES = (50, 1000)
SIZE = (1152, 864)  # width and height: a megapixel
LARGE = (8000, 6000)
NUM_MASKS = 100
GROWTH = 1.05  # the largest ratio of the peaks for many and for few images
LIMIT = 3.0  # GB, for the large image
NAME = "COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py"
# In the child, since a process inherits the peak that the system tells its parent
CHILD = """
import sys
from benchmarks.measuring import resident_kb
from msrcnn_d2_cli import main
code = main(sys.argv[1:])
print(resident_kb("VmHWM"))
sys.exit(code)
"""


def run(options) -> list[Part]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few, many = (_of_copies(folder / str(count), count) for count in NUM_IMAGES)
        large, area = _of_large_image(folder)
    rows = [
        [f"{count:,} images of {SIZE[0]} x {SIZE[1]}, the demo's model, pictures and COCO", peak]
        for count, peak in zip(NUM_IMAGES, (few, many))
    ]
    what = f"an image of {LARGE[0]} x {LARGE[1]}, R-50-FPN, {NUM_MASKS} masks, all outputs"
    return [
        Part(
            "Peak memory of `msrcnn-d2 predict` (GB of 2^30 bytes)",
            ["", "GB"],
            [*rows, [what, large]],
            targets=[
                Target(f"{NUM_IMAGES[1]:,} images / {NUM_IMAGES[0]} images", many / few, GROWTH),
                Target("the large image, GB", large, LIMIT),
            ],
            notes=[f"The masks of the large image have {area:,.0f} pixels on average."],
            data={"few": few, "many": many, "large": large},
        )
    ]


def _of_copies(folder: Path, count: int) -> float:
    """Peak memory for hard links of one image."""
    images = folder / "images"
    images.mkdir(parents=True)
    Image.fromarray(photo()[:, :, ::-1]).resize(SIZE).save(images / "0.jpg")
    for k in range(1, count):
        (images / f"{k}.jpg").hardlink_to(images / "0.jpg")
    # The demo's model takes images as they are; at a megapixel it would take a second for each
    resize = "{_target_: detectron2.data.transforms.ResizeShortestEdge, short_edge_length: 128}"
    return _peak(
        images,
        *["--config-file", SHAPES / "ms_rcnn_shapes.py"],
        *["--weights", SHAPES / "ms_rcnn_shapes.safetensors"],
        *["--save", "pictures,coco", "--output", folder / "output"],
        *["--set", f"dataloader.test.mapper.augmentations=[{resize}]"],
    )


@torch.no_grad()
def _of_large_image(folder: Path) -> tuple[float, float]:
    """Peak memory, and the mean area of the masks."""
    cfg = model_zoo.get_config(NAME)
    cfg.model.roi_heads.num_classes = 1
    model = instantiate(cfg.model)
    set_batch_norm(model)
    # Random weights find small boxes; these are 60 times as wide and high, up to the image
    model.roi_heads.box_predictor.bbox_pred.bias[2:] = 5 * np.log(60)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    del model
    Image.fromarray(photo()[:, :, ::-1]).resize(LARGE).save(folder / "large.jpg")
    opts = {
        "num_classes": 1,
        "box_predictor.test_score_thresh": 0,
        "box_predictor.test_nms_thresh": 1,
        "box_predictor.test_topk_per_image": NUM_MASKS,
    }
    peak = _peak(
        folder / "large.jpg",
        *["--config-file", ROOT / "configs" / NAME, "--weights", folder / "model.pth"],
        *["--class-names", "object", "--score-threshold", "0", "--save", ",".join(KINDS)],
        *["--output", folder / "large"],
        *[x for key, value in opts.items() for x in ("--set", f"model.roi_heads.{key}={value}")],
    )
    with open(folder / "large" / "predictions.csv", encoding="utf-8-sig") as f:
        areas = [int(row["area"]) for row in csv.DictReader(f)]
    if len(areas) != NUM_MASKS:
        raise RuntimeError(f"{len(areas)} masks instead of {NUM_MASKS}")
    return peak, float(np.mean(areas))


def _peak(*arguments: str | Path) -> float:
    """Of a process that runs `msrcnn-d2 predict`, in GB."""
    command = [sys.executable, "-c", CHILD, "predict", *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return int(output.splitlines()[-1]) / 2**20
