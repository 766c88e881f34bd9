"""How cost grows: with detections per image, masks and objects in training, size of the image."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers import paste_masks_in_image
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import Boxes, Instances, ROIMasks
from detectron2.utils.events import EventStorage

from benchmarks.inference import PLAIN, SCORING, Pipeline
from benchmarks.measuring import peak_memory, time_in_turn, time_steps_in_turn
from benchmarks.models import DEVICE, IMAGE_SIZE, build_models, model_input, random_boxes
from benchmarks.report import Part
from benchmarks.training import polygons_in
from msrcnn_d2.evaluation.mask_encoding import encode_predicted_masks
from msrcnn_d2.modeling.acceleration import channels_last_on_cpu
from msrcnn_d2.modeling.mask_iou_target import crop_gt_masks

NUM_DETECTIONS = (10, 100, 1000)
NUM_MASKS = (16, 64)
NUM_OBJECTS = (8, 64, 512)
SHORT_EDGES = (320, 640)
SCALES = (1, 2, 4)  # of the image that masks are encoded for, 480 x 640 pixels at 1


def run(options) -> list[Part]:
    plain, scoring = build_models()
    return [
        _with_detections(scoring, options.rounds),
        _with_output_size(options.rounds),
        _with_input_size(plain, scoring, options.rounds),
        _with_masks(scoring, options.rounds),
        _with_objects(options.rounds),
    ]


def _with_detections(model, rounds: int) -> Part:
    with torch.no_grad(), channels_last_on_cpu(model.eval()):
        rows = [[count, *_detections_row(model, count, rounds)] for count in NUM_DETECTIONS]
    names = ("MaskIoU head", "RLE", "RLE by Detectron2")
    return Part(
        f"Detections per image, in an image of {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]} pixels, {DEVICE}",
        ["detections", *(f"{name} ({unit})" for unit in ("ms", "MB") for name in names)],
        rows,
    )


def _detections_row(model, count: int, rounds: int) -> list[float]:
    features = torch.randn(count, 256, 14, 14, device=DEVICE).relu()
    found = _detections(count, IMAGE_SIZE)
    masks = found.pred_masks.tensor[:, None].to(DEVICE)
    functions = [partial(model.roi_heads.mask_iou_head.layers, features, masks)]
    return _time_and_memory(functions + _encoders(found), rounds)


def _encoders(found: Instances) -> list[Callable]:
    return [partial(encode_predicted_masks, found), partial(_paste_and_encode, found)]


def _time_and_memory(functions: Sequence[Callable], rounds: int) -> list[float]:
    """Milliseconds of each, timed in turn, and after them its memory in MB."""
    timings = time_in_turn({str(k): f for k, f in enumerate(functions)}, rounds)
    return [1000 * t.median for t in timings.values()] + [peak_memory(f) for f in functions]


def _detections(count: int, size: tuple[int, int]) -> Instances:
    """With round, soft masks, as after `rescale_unpasted`, on the CPU."""
    axis = (torch.arange(28) - 13.5) / 14
    radius = (axis[:, None] ** 2 + axis**2).sqrt()
    sizes = torch.linspace(0.5, 1, count)[:, None, None]
    return Instances(
        size,
        pred_boxes=Boxes(random_boxes(count, size)),
        pred_masks=ROIMasks(torch.sigmoid(8 * (sizes - radius))),
        scores=torch.ones(count),
        pred_classes=torch.zeros(count, dtype=torch.int64),
    )


def _paste_and_encode(found: Instances) -> None:
    masks = found.pred_masks.tensor.to(DEVICE)
    pasted = paste_masks_in_image(masks, found.pred_boxes.to(DEVICE), found.image_size)
    fields = {**found.get_fields(), "pred_masks": pasted.cpu()}
    instances_to_coco_json(Instances(found.image_size, **fields), 0)


def _with_output_size(rounds: int) -> Part:
    rows = []
    for scale in SCALES:
        size = (scale * IMAGE_SIZE[0], scale * IMAGE_SIZE[1])
        encoders = _encoders(_detections(100, size))
        rows.append([f"{size[0]} x {size[1]}", *_time_and_memory(encoders, rounds)])
    headers = [f"{name} ({unit})" for unit in ("ms", "MB") for name in ("RLE", "by Detectron2")]
    return Part("Size of the image that 100 masks are for", ["pixels", *headers], rows)


def _with_input_size(plain, scoring, rounds: int) -> Part:
    rows = []
    for short_edge in SHORT_EDGES:
        inputs = [model_input(short_edge)]
        pipelines = {
            PLAIN: Pipeline(plain, inputs, ours=True).prepare(),
            SCORING: Pipeline(scoring, inputs, ours=True).prepare(),
        }
        timings = time_steps_in_turn(pipelines, rounds, warm_up=False)
        without, total = timings[PLAIN]["total"], timings[SCORING]["total"]
        row = [short_edge, 1000 * without.median, 1000 * total.median, total.ratio_to(without)]
        rows.append(row)
    return Part(
        f"Size of the network's input, 100 detections, inference in all, on {DEVICE}",
        ["short edge (pixels)", f"{PLAIN} (ms)", f"{SCORING} (ms)", "ratio"],
        rows,
    )


def _with_masks(model, rounds: int) -> Part:
    return Part(
        f"Foreground masks in a step of training, forward and backward, on {DEVICE}",
        ["masks", *(f"{x} ({u})" for u in ("ms", "MB") for x in ("mask head", "MaskIoU head"))],
        [[count, *_masks_row(model.train(), count, rounds)] for count in NUM_MASKS],
    )


def _masks_row(model, count: int, rounds: int) -> list[float]:
    heads = model.roi_heads
    features = torch.randn(count, 256, 14, 14, device=DEVICE).relu().requires_grad_()
    foreground = crop_gt_masks([_foreground(count, num_objects=8)], 28)
    classes = foreground[0].gt_classes
    with torch.no_grad():
        logits = heads.mask_head.layers(features)[torch.arange(count, device=DEVICE), classes]

    def mask_step():
        with EventStorage():
            mask_rcnn_loss(heads.mask_head.layers(features), foreground).backward()

    def mask_iou_step():
        with EventStorage():
            masks = logits[:, None].requires_grad_().sigmoid()
            losses = heads.mask_iou_head(features, masks, foreground)
        losses["loss_mask_iou"].backward()

    row = _time_and_memory([mask_step, mask_iou_step], rounds)
    model.zero_grad()
    return row


def _foreground(count: int, num_objects: int) -> Instances:
    """Foreground proposals, each of them one of the objects' boxes, moved a little."""
    size = (1067, 800)
    boxes = random_boxes(num_objects, size)
    which = torch.arange(count) % num_objects
    moved = boxes[which] + torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return Instances(
        size,
        proposal_boxes=Boxes(moved.to(DEVICE)),
        gt_classes=(which % 80).to(DEVICE),
        gt_masks=polygons_in(boxes)[which],
    )


def _with_objects(rounds: int) -> Part:
    rows = []
    for count in NUM_OBJECTS:
        crop = partial(crop_gt_masks, [_foreground(128, count)], 28)
        rows.append([count, *_time_and_memory([crop], rounds)])
    return Part(
        "Objects per image: ground truth of 128 foreground proposals, cropped for both losses",
        ["objects", "ms", "MB"],
        rows,
    )
