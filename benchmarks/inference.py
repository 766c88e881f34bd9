"""Inference: Mask Scoring R-CNN against Detectron2's Mask R-CNN of the same weights."""

import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Boxes, Instances

from benchmarks.measuring import Stopwatch, Timing, time_in_turn, time_steps_in_turn
from benchmarks.models import (
    DEVICE,
    IMAGE_SIZE,
    build_models,
    model_input,
    random_proposals,
    set_number_of_detections,
)
from benchmarks.report import Part, Target
from msrcnn_d2.evaluation.mask_encoding import encode_predicted_masks
from msrcnn_d2.modeling import MaskCalibrator
from msrcnn_d2.modeling.acceleration import channels_last_on_cpu
from msrcnn_d2.modeling.postprocessing import rescale_unpasted

NUM_DETECTIONS = 100
STEPS = ("preprocess", "backbone", "RPN", "box", "mask", "mask IoU", "paste", "RLE", "total")
DETECTRON2, PLAIN, SCORING = "Mask R-CNN, Detectron2", "Mask R-CNN, here", "MS R-CNN, here"


class Pipeline:
    """
    A model from the pixels to encoded masks, step by step.

    Args:
        ours: whether masks are encoded, and weights kept, as our evaluation does it, or as that
            of Detectron2.
    """

    def __init__(self, model: nn.Module, inputs: list[dict], ours: bool):
        self.model = model.eval()
        self.heads = model.roi_heads
        self.inputs = inputs
        self.ours = ours
        self.proposals = random_proposals(tuple(inputs[0]["image"].shape[1:]))

    @torch.no_grad()
    def prepare(self, num_detections: int = NUM_DETECTIONS) -> "Pipeline":
        images = self.model.preprocess_image(self.inputs)
        features = self.model.backbone(images.tensor)
        set_number_of_detections(self.model, features, self.proposals, num_detections)
        return self

    def __call__(self, watch: Stopwatch) -> None:
        if not self.ours:
            self._run(watch)
            return
        with channels_last_on_cpu(self.model):  # once for a whole evaluation, so it is not timed
            self._run(watch)

    @torch.no_grad()
    def _run(self, watch: Stopwatch) -> None:
        images = watch("preprocess", self.model.preprocess_image, self.inputs)
        features = watch("backbone", self.model.backbone, images.tensor)
        watch("RPN", self.model.proposal_generator, images, features, None)
        found = watch("box", self.heads._forward_box, features, self.proposals)
        mask_features = watch("mask", self._masks, features, found)
        if hasattr(self.heads, "mask_iou_head"):
            probs = found[0].pred_masks
            watch("mask IoU", self.heads.mask_iou_head, mask_features, probs, found)
        if self.ours:
            self._encode(watch, found[0])
        else:
            self._paste_and_encode(watch, found, images.image_sizes)

    def _masks(self, features, found: list[Instances]) -> torch.Tensor:
        boxes = [x.pred_boxes for x in found]
        pooled = self.heads.mask_pooler([features[f] for f in self.heads.mask_in_features], boxes)
        mask_rcnn_inference(self.heads.mask_head.layers(pooled), found)
        return pooled

    def _encode(self, watch, found: Instances) -> None:
        height, width = self.inputs[0]["height"], self.inputs[0]["width"]
        found = watch("paste", rescale_unpasted, found, height, width)
        found = watch("RLE", found.to, "cpu")
        watch("RLE", encode_predicted_masks, found)

    def _paste_and_encode(self, watch, found: list[Instances], sizes) -> None:
        (output,) = watch("paste", self.model._postprocess, found, self.inputs, sizes)
        found = watch("RLE", output["instances"].to, "cpu")
        watch("RLE", instances_to_coco_json, found, 0)  # the rest of it takes no time


def run(options) -> list[Part]:
    plain, scoring = build_models()
    inputs = [model_input()]
    pipelines: dict[str, Callable] = {
        DETECTRON2: Pipeline(plain, inputs, ours=False).prepare(),
        PLAIN: Pipeline(plain, inputs, ours=True).prepare(),
        SCORING: Pipeline(scoring, inputs, ours=True).prepare(),
    }
    timings = time_steps_in_turn(pipelines, options.rounds)
    return [
        _steps_part(timings, inputs),
        _head_part(scoring, options),
        _calibrator_part(timings[SCORING]["total"], options),
        *_sync_parts(pipelines),
    ]


def _steps_part(timings, inputs) -> Part:
    height, width = inputs[0]["image"].shape[1:]
    total = timings[SCORING]["total"]
    rows = [
        [step, *(1000 * t[step].median if step in t else None for t in timings.values())]
        for step in STEPS
    ]
    ratio, same_way = (
        total.ratio_to(timings[DETECTRON2]["total"]),
        total.ratio_to(timings[PLAIN]["total"]),
    )
    rows.append(["ratio of totals: MS R-CNN to", ratio, same_way, None])
    return Part(
        f"Inference: R-50-FPN, {height} x {width} pixels, {NUM_DETECTIONS} detections, on {DEVICE}",
        ["step (ms)", *timings],
        rows,
        targets=[Target("MS R-CNN / Mask R-CNN of Detectron2, total", ratio, 1.10)],
        notes=[
            '"Here" is as in our evaluation: channels-last weights on a CPU, masks encoded without '
            "being pasted. Before each step the GPU, if there is one, has finished the last one."
        ],
        data={n: {s: t.as_dict() for s, t in steps.items()} for n, steps in timings.items()},
    )


def _head_part(model: nn.Module, options) -> Part:
    head = model.roi_heads.mask_iou_head
    features = torch.randn(NUM_DETECTIONS, 256, 14, 14, device=DEVICE).relu()
    masks = torch.rand(NUM_DETECTIONS, 1, 28, 28, device=DEVICE)
    with torch.no_grad(), channels_last_on_cpu(model):
        as_trained = features.contiguous(memory_format=_memory_format(head))
        x = torch.cat([as_trained, F.max_pool2d(masks, 2)], dim=1)
        timings = time_in_turn(
            {
                "the head": lambda: head.layers(as_trained, masks),
                "its convolutions and matrix products": lambda: _arithmetic(head, x),
            },
            options.rounds,
        )
    ratio = timings["the head"].ratio_to(timings["its convolutions and matrix products"])
    return Part(
        f"The MaskIoU head on {NUM_DETECTIONS} masks, and its arithmetic alone, on {DEVICE}",
        ["", "ms"],
        [[name, 1000 * t.median] for name, t in timings.items()],
        targets=[Target("head / arithmetic", ratio, 1.15)],
        data={name: t.as_dict() for name, t in timings.items()},
    )


def _calibrator_part(inference: Timing, options) -> Part:
    calibrator = MaskCalibrator().to(DEVICE).eval()
    size = IMAGE_SIZE
    corners = torch.rand(NUM_DETECTIONS, 2, device=DEVICE) * min(size) / 2
    found = Instances(
        size,
        pred_boxes=Boxes(torch.cat([corners, 2 * corners + 16], dim=1)),
        scores=torch.rand(NUM_DETECTIONS, device=DEVICE),
        pred_mask_ious=torch.rand(NUM_DETECTIONS, device=DEVICE),
        pred_masks=torch.rand(NUM_DETECTIONS, 1, 28, 28, device=DEVICE),
    )
    with torch.no_grad():
        timing = time_in_turn({"calibrator": lambda: calibrator([found])}, 4 * options.rounds)
    share = timing["calibrator"].median / inference.median
    return Part(
        f"A calibrator, for {NUM_DETECTIONS} detections, on {DEVICE}",
        ["", "ms"],
        [
            ["calibrator", 1000 * timing["calibrator"].median],
            ["inference of MS R-CNN, as above", 1000 * inference.median],
        ],
        targets=[Target("calibrator / inference", share, 0.03)],
        data={name: t.as_dict() for name, t in timing.items()},
    )


def _memory_format(head: nn.Module) -> torch.memory_format:
    weight = head.convs[0].weight
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _arithmetic(head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for conv in head.convs:
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
    x = x.flatten(1)
    for layer in (x for x in head.fcs if isinstance(x, nn.Linear)):
        x = layer(x)
    return head.predictor(x)


def _sync_parts(pipelines) -> list[Part]:
    """How often each step waits for the GPU; it can be counted where there is one."""
    if DEVICE != "cuda":
        return []
    counts = {name: _count_synchronizations(pipelines[name]) for name in (PLAIN, SCORING)}
    # "RLE" fetches the detections, which have two fields more
    plain, scoring = (sum(n for s, n in counts[k].items() if s != "RLE") for k in counts)
    return [
        Part(
            "Steps of inference that wait for the GPU (torch.cuda.set_sync_debug_mode)",
            ["step", *counts],
            [[step, *(c.get(step) for c in counts.values())] for step in STEPS[:-1]],
            targets=[Target("synchronisations that mask scoring adds", scoring - plain, 0)],
        )
    ]


def _count_synchronizations(pipeline: Pipeline) -> dict[str, int]:
    counts: dict[str, int] = {}

    def watch(step, function, *args):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = sum("synchroniz" in str(w.message) for w in caught)
        counts[step] = counts.get(step, 0) + found
        return result

    pipeline(watch)
    return counts
