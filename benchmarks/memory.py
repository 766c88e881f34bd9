"""Memory of a GPU in training, beside what MMDetection published for the same models."""

import gc

import torch

from detectron2.config import instantiate

from benchmarks.measuring import Stopwatch
from benchmarks.models import DEVICE, set_batch_norm
from benchmarks.report import Part, Target
from benchmarks.training import Training, training_input
from msrcnn_d2 import model_zoo, published_models

NAMES = (
    "ms_rcnn_R_50_FPN_1x",
    "ms_rcnn_R_101_FPN_1x",
    "ms_rcnn_X_101_32x4d_FPN_2x",
    "ms_rcnn_X_101_64x4d_FPN_1x",
)
SIZE = (800, 1333)  # height, width: what the published numbers are for
NUM_STEPS = 3  # the optimizer's state and cuDNN's workspaces are there after the first


def run(options) -> list[Part]:
    if DEVICE != "cuda":
        note = "Not measured: it is about the memory of a GPU, and PyTorch finds none."
        return [Part("Memory in training", [], [], notes=[note])]
    rows, targets = [], []
    for name in NAMES:
        measured, published = training_memory(name), published_models.PUBLISHED[name].memory
        rows.append([name, measured, published, measured / published])
        targets.append(Target(f"{name}, GB", measured, published))
    return [
        Part(
            f"Peak memory in training, 2 images of {SIZE[0]} x {SIZE[1]} pixels per GPU "
            "(GB of 2^30 bytes that PyTorch allocated)",
            ["config", "here", "published (MMDetection)", "ratio"],
            rows,
            targets=targets,
            data={row[0]: {"here": row[1], "published": row[2]} for row in rows},
        )
    ]


def training_memory(name: str) -> float:
    """The most that PyTorch allocates in a few steps, weights included, in GB of 2^30 bytes."""
    cfg = model_zoo.get_config(f"COCO-InstanceSegmentation/{name}.py")
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(DEVICE)
    set_batch_norm(model)
    training = Training(model, [training_input(k, SIZE) for k in range(2)])
    torch.cuda.reset_peak_memory_stats()
    for _ in range(NUM_STEPS):
        training(Stopwatch())
    peak = torch.cuda.max_memory_allocated() / 2**30
    del training, model
    gc.collect()
    torch.cuda.empty_cache()
    return peak
