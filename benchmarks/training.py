"""A step of training: Mask Scoring R-CNN against Detectron2's Mask R-CNN, on the same samples."""

from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from detectron2.modeling.roi_heads import select_foreground_proposals
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from benchmarks.measuring import Stopwatch, Timing, time_in_turn, time_steps_in_turn
from benchmarks.models import DEVICE, build_models, model_input, random_boxes
from benchmarks.report import Part, Target
from msrcnn_d2.modeling import mask_iou_targets
from msrcnn_d2.modeling.mask_iou_target import crop_gt_masks

PLAIN, SCORING = "Mask R-CNN, Detectron2", "MS R-CNN, here"
NUM_IMAGES = 2 if DEVICE == "cuda" else 1
NUM_OBJECTS = 8  # per image; 7.3 in COCO
NUM_VERTICES = 40
BOXES_PER_OBJECT = 40  # near enough to it to be foreground


def polygons_in(boxes: torch.Tensor, num_vertices: int = NUM_VERTICES) -> PolygonMasks:
    """For each box an outline with random radii that just fits into it."""
    rng = np.random.default_rng(0)
    polygons = []
    for x0, y0, x1, y1 in boxes.tolist():
        angles = np.sort(rng.uniform(0, 2 * np.pi, num_vertices))
        outline = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        outline *= rng.uniform(0.7, 1, (num_vertices, 1))
        low, high = outline.min(axis=0), outline.max(axis=0)
        unit = (outline - low) / (high - low)
        polygons.append([(unit * [x1 - x0, y1 - y0] + [x0, y0]).ravel()])
    return PolygonMasks(polygons)


def training_input(seed: int, size: tuple[int, int] | None = None) -> dict:
    """
    The photograph with objects drawn at random.

    Args:
        size: height and width that the photograph is resized to; by default its shape is kept.
    """
    inputs = model_input()
    if size is not None:
        inputs["image"] = functional.interpolate(inputs["image"][None], size)[0]
    size = tuple(inputs["image"].shape[1:])
    boxes = random_boxes(NUM_OBJECTS, size, seed)
    classes = torch.arange(NUM_OBJECTS) * 10
    inputs["instances"] = Instances(
        size, gt_boxes=Boxes(boxes), gt_classes=classes, gt_masks=polygons_in(boxes)
    )
    return inputs


def proposals_for(instances: Instances, seed: int) -> Instances:
    """What an RPN in the midst of training proposes: boxes around the objects, and elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    boxes = instances.gt_boxes.tensor.repeat(BOXES_PER_OBJECT, 1)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + 0.08 * sides * torch.randn(boxes.shape, generator=generator)
    elsewhere = random_boxes(1000 - len(boxes), instances.image_size, seed + 100)
    boxes = Boxes(torch.cat([boxes, elsewhere]).to(DEVICE))
    boxes.clip(instances.image_size)
    logits = torch.zeros(len(boxes), device=DEVICE)
    return Instances(instances.image_size, proposal_boxes=boxes, objectness_logits=logits)


class Training:
    """Steps of a model's training, timed; the learning rate is 0, so that each is the same."""

    def __init__(self, model: nn.Module, inputs: list[dict]):
        self.model = model.train()
        self.inputs = inputs
        self.truth = [x["instances"].to(DEVICE) for x in inputs]
        self.proposals = [proposals_for(x["instances"], k) for k, x in enumerate(inputs)]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def __call__(self, watch: Stopwatch) -> None:
        torch.manual_seed(1)  # of the samples
        with EventStorage():
            loss = watch("forward", self.loss)
        self.optimizer.zero_grad()
        watch("backward", loss.backward)
        watch("optimizer", self.optimizer.step)

    def loss(self) -> torch.Tensor:
        model = self.model
        images = model.preprocess_image(self.inputs)
        features = model.backbone(images.tensor)
        _, rpn_losses = model.proposal_generator(images, features, self.truth)
        proposals = [x[:] for x in self.proposals]
        _, losses = model.roi_heads(images, features, proposals, self.truth)
        return sum({**rpn_losses, **losses}.values())

    def foreground(self) -> list[Instances]:
        """The proposals that masks are learned for."""
        torch.manual_seed(1)
        heads = self.model.roi_heads
        with EventStorage():
            sampled = heads.label_and_sample_proposals([x[:] for x in self.proposals], self.truth)
        return select_foreground_proposals(sampled, heads.num_classes)[0]


def run(options) -> list[Part]:
    plain, scoring = build_models()
    inputs = [training_input(k) for k in range(NUM_IMAGES)]
    trainings = {
        PLAIN: Training(plain, inputs),
        SCORING: Training(scoring, inputs),
    }
    targets = target_timings(trainings, options.rounds)
    timings = time_steps_in_turn(trainings, options.rounds, warm_up=DEVICE == "cuda")
    num_masks = sum(map(len, trainings[SCORING].foreground()))
    return [_part(timings, targets, num_masks, inputs)]


def target_timings(trainings: dict[str, Training], rounds: int) -> dict[str, Timing]:
    """What the ground truth costs: for Detectron2's mask loss alone, and for both losses."""
    functions = {
        "crops, Detectron2": partial(_detectron2_crops, trainings[PLAIN].foreground()),
        "crops and targets, here": partial(_crops_and_targets, trainings[SCORING].foreground()),
    }
    return time_in_turn(functions, rounds)


def _detectron2_crops(foreground: list[Instances]) -> None:
    for x in foreground:
        x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, 28).to(DEVICE)


def _crops_and_targets(foreground: list[Instances]) -> None:
    cropped = [x for x in crop_gt_masks(foreground, 28) if len(x)]
    crops = torch.cat([x.gt_masks.crops for x in cropped])
    mask_iou_targets(
        crops,  # as good as a prediction, for the time that it takes
        crops,
        torch.cat([x.gt_masks.areas for x in cropped]),
        torch.cat([x.proposal_boxes.tensor for x in cropped]),
    )


def _part(timings, targets, num_masks, inputs) -> Part:
    height, width = inputs[0]["image"].shape[1:]
    rows = [
        [step, *(1000 * t[step].median for t in timings.values()), _ratio(timings, step)]
        for step in timings[SCORING]
    ]
    crops, ours = targets.values()
    rows.append(["ground-truth crops (and targets)", 1000 * crops.median, 1000 * ours.median, None])
    total = timings[SCORING]["total"]
    share = 100 * ours.median / total.median
    return Part(
        f"A step of training: R-50-FPN, {len(inputs)} image(s) of {height} x {width} pixels, "
        f"{num_masks} masks, on {DEVICE}",
        ["step (ms)", *timings, "ratio"],
        rows,
        targets=[
            Target("MS R-CNN / Mask R-CNN, step", _ratio(timings, "total"), 1.12),
            Target("crops and targets, share of a step in percent", share, 2),
        ],
        notes=["Crops belong to the forward pass; they are shown once more, measured apart."],
        data={
            **{n: {s: t.as_dict() for s, t in steps.items()} for n, steps in timings.items()},
            **{name: t.as_dict() for name, t in targets.items()},
        },
    )


def _ratio(timings, step: str) -> float:
    return timings[SCORING][step].ratio_to(timings[PLAIN][step])
