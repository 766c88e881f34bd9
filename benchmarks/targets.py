"""Mask IoU targets: time, memory and error, beside Detectron2's crops and the ports' targets."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pycocotools.mask as mask_util
import torch
from matplotlib.path import Path as Outline

from detectron2.structures import BitMasks, Boxes, Instances

from benchmarks.measuring import Timing, one_thread, peak_memory, time_in_turn
from benchmarks.models import DEVICE, random_boxes
from benchmarks.report import Part, Target
from benchmarks.training import polygons_in
from msrcnn_d2.modeling import mask_iou_targets
from msrcnn_d2.modeling.indexed_masks import IndexedMasks
from msrcnn_d2.modeling.mask_iou_target import CroppedMasks, crop_gt_masks

IMAGE_SIZE = (800, 1067)  # height, width
MASK_SIZE = 28
NUM_OBJECTS = 8
NUM_PROPOSALS, NUM_VERTICES = 128, 40  # where the other one varies
POLYGONS, BITMASKS = "polygons", "bitmasks"
SIZES = (  # kind of masks, foreground proposals, vertices of each object
    *((POLYGONS, n, NUM_VERTICES) for n in (32, 128, 512, 2048)),
    *((POLYGONS, NUM_PROPOSALS, v) for v in (10, 200, 1000)),
    *((BITMASKS, n, NUM_VERTICES) for n in (32, 128, 512)),
)
IN_MEMORY = ((POLYGONS, 2048), (BITMASKS, 128))
NUM_ERRORS = 300
HERE, ARITHMETIC, DETECTRON2 = "crops and targets here", "targets alone", "Detectron2's crops"
PORTS = "as in the ports"


def run(options) -> list[Part]:
    with one_thread():
        return [_time_part(options.rounds), _memory_part(), _error_part()]


# ---- What is measured


def proposals_around_objects(kind: str, num_proposals: int, num_vertices: int) -> Instances:
    """Foreground proposals, with the ground-truth mask of each, as our ROI heads sample them."""
    objects = random_boxes(NUM_OBJECTS, IMAGE_SIZE)
    masks = polygons_in(objects, num_vertices)
    if kind == BITMASKS:
        masks = BitMasks.from_polygon_masks(masks, *IMAGE_SIZE).to(DEVICE)
    owners = torch.arange(num_proposals) % NUM_OBJECTS
    boxes = Boxes(jittered(objects[owners]).to(DEVICE))
    return Instances(
        IMAGE_SIZE, proposal_boxes=boxes, gt_masks=IndexedMasks(masks, owners.to(masks.device))
    )


def as_in_detectron2(proposals: Instances) -> Instances:
    """The same proposals, with a copy of its mask for each of them."""
    masks = proposals.gt_masks.materialize()
    return Instances(proposals.image_size, proposal_boxes=proposals.proposal_boxes, gt_masks=masks)


def jittered(boxes: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    jittered = Boxes(boxes + 0.08 * sides * torch.randn(boxes.shape, generator=generator))
    jittered.clip(IMAGE_SIZE)
    return jittered.tensor


def random_masks(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(count, MASK_SIZE, MASK_SIZE, generator=generator) > 0.5
    return masks.to(DEVICE)


def crops_here(proposals: Instances) -> CroppedMasks:
    return crop_gt_masks([proposals], MASK_SIZE)[0].gt_masks


def targets_here(proposals: Instances, pred_masks: torch.Tensor) -> torch.Tensor:
    gt = crops_here(proposals)
    return mask_iou_targets(pred_masks, gt.crops, gt.areas, proposals.proposal_boxes.tensor)


def detectron2_crops(proposals: Instances) -> torch.Tensor:
    return proposals.gt_masks.crop_and_resize(proposals.proposal_boxes.tensor, MASK_SIZE)


def targets_as_in_the_ports(proposals: Instances, pred_masks: torch.Tensor) -> torch.Tensor:
    """
    They divide the cells of an object in its box by the share of it that lies there, for which
    they rasterise the whole object again for each proposal.
    """
    crops, boxes = detectron2_crops(proposals), proposals.proposal_boxes.tensor
    shares = torch.tensor(
        [
            share_in_box(polygons, box)
            for polygons, box in zip(proposals.gt_masks, boxes.cpu().numpy())
        ]
    ).to(boxes.device)
    intersection = (pred_masks & crops).sum(dim=(1, 2))
    whole = crops.sum(dim=(1, 2)) / shares
    return intersection / (pred_masks.sum(dim=(1, 2)) + whole - intersection)


def share_in_box(polygons: list[np.ndarray], box: np.ndarray) -> float:
    mask = mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, *IMAGE_SIZE)))
    x0, y0 = box[:2].astype(int)
    x1, y1 = box[2:].astype(int) + 1
    return (mask[y0:y1, x0:x1].sum() + 1e-10) / (mask.sum() + 1e-10)


# ---- Time


def _time_part(rounds: int) -> Part:
    timings = {size: _time(*size, rounds) for size in SIZES}
    usual = timings[POLYGONS, NUM_PROPOSALS, NUM_VERTICES]
    return Part(
        f"Time of the targets (ms; image of {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]}, masks on the "
        f"{'GPU where they are bitmasks' if DEVICE == 'cuda' else 'CPU'})",
        ["masks", "proposals", "vertices", HERE, ARITHMETIC, DETECTRON2, "ratio", PORTS],
        [_time_row(size, found) for size, found in timings.items()],
        targets=[
            Target(
                f"crops and targets / Detectron2's crops, {NUM_PROPOSALS} polygons",
                usual[HERE].ratio_to(usual[DETECTRON2]),
                1,
            )
        ],
        notes=[
            "The ratio is that of crops and targets here to the crops alone in Detectron2, which "
            "needs them for its mask loss, and before has made the copies of bitmasks (not timed). "
            "The ports rasterise each object twice: its crop and, "
            "for the share of it that is in the box, all of it. PyTorch runs on one thread."
        ],
        data={
            f"{kind}, {proposals} proposals, {vertices} vertices": {
                name: timing.as_dict() for name, timing in found.items()
            }
            for (kind, proposals, vertices), found in timings.items()
        },
    )


def _time(kind: str, num_proposals: int, num_vertices: int, rounds: int) -> dict[str, Timing]:
    proposals = proposals_around_objects(kind, num_proposals, num_vertices)
    pred_masks = random_masks(num_proposals)
    boxes, gt = proposals.proposal_boxes.tensor, crops_here(proposals)
    copied = as_in_detectron2(proposals)
    functions: dict[str, Callable] = {
        HERE: lambda: targets_here(proposals, pred_masks),
        ARITHMETIC: lambda: mask_iou_targets(pred_masks, gt.crops, gt.areas, boxes),
        DETECTRON2: lambda: detectron2_crops(copied),
    }
    if (kind, num_proposals, num_vertices) == (POLYGONS, NUM_PROPOSALS, NUM_VERTICES):
        functions[PORTS] = lambda: targets_as_in_the_ports(copied, pred_masks)
    return time_in_turn(functions, rounds)


def _time_row(size, found: dict[str, Timing]) -> list:
    ms = {name: 1e3 * timing.median for name, timing in found.items()}
    ratio = found[HERE].ratio_to(found[DETECTRON2])
    return [*size, ms[HERE], ms[ARITHMETIC], ms[DETECTRON2], ratio, ms.get(PORTS)]


# ---- Memory


def _memory_part() -> Part:
    rows = []
    for kind, num_proposals in IN_MEMORY:
        proposals = proposals_around_objects(kind, num_proposals, NUM_VERTICES)
        pred_masks = random_masks(num_proposals)
        peaks = [
            2**10 * peak_memory(partial(targets_here, proposals, pred_masks)),
            2**10 * peak_memory(partial(detectron2_crops, as_in_detectron2(proposals))),
        ]
        per_proposal = [peak / num_proposals for peak in peaks]
        rows.append([kind, num_proposals, *per_proposal, peaks[0] / max(peaks[1], 1)])
    return Part(
        "Peak memory of the targets beyond their inputs (kB per proposal)",
        ["masks", "proposals", HERE, DETECTRON2, "ratio"],
        rows,
        data={f"{r[0]}, {r[1]} proposals": dict(zip((HERE, DETECTRON2), r[2:])) for r in rows},
    )


# ---- Error


def _error_part() -> Part:
    proposals, pred_masks = _cases()
    truth = torch.tensor(
        [
            iou_at_full_resolution(polygons[0].reshape(-1, 2), box, mask)
            for polygons, box, mask in zip(
                proposals.gt_masks, proposals.proposal_boxes.tensor.numpy(), pred_masks.numpy()
            )
        ]
    )
    bitmasks = BitMasks.from_polygon_masks(proposals.gt_masks, *IMAGE_SIZE)
    from_bitmasks = Instances(
        IMAGE_SIZE, proposal_boxes=proposals.proposal_boxes, gt_masks=bitmasks
    )
    targets = {
        f"here, {POLYGONS}": targets_here(proposals, pred_masks),
        f"here, {BITMASKS}": targets_here(from_bitmasks, pred_masks),
        f"{PORTS}, {POLYGONS}": targets_as_in_the_ports(proposals, pred_masks),
    }
    errors = {name: (found - truth).double() for name, found in targets.items()}
    return Part(
        f"Error of the targets against counting at full resolution ({NUM_ERRORS} objects)",
        ["targets", "mean abs error", "largest abs error", "mean error"],
        [[name, *_summary(e).values()] for name, e in errors.items()],
        targets=[
            Target(
                f"mean error of {POLYGONS}", errors[f"here, {POLYGONS}"].abs().mean().item(), 0.01
            )
        ],
        notes=[
            f"Objects of {NUM_VERTICES} vertices and COCO-like sizes, boxes off by 8 percent of a "
            f"side; true IoU {truth.mean():.2f} on average, from {truth.min():.2f} to "
            f"{truth.max():.2f}. The truth counts points a pixel apart, or less."
        ],
        data={name: _summary(e) for name, e in errors.items()},
    )


def _summary(errors: torch.Tensor) -> dict[str, float]:
    return {
        "mean_abs": errors.abs().mean().item(),
        "max_abs": errors.abs().max().item(),
        "mean": errors.mean().item(),
    }


def _cases() -> tuple[Instances, torch.Tensor]:
    """Objects in jittered boxes on the CPU, and for each a mask that is the object, displaced."""
    rng = np.random.default_rng(0)
    objects = random_boxes(NUM_ERRORS, IMAGE_SIZE, seed=1)
    masks, boxes = polygons_in(objects, NUM_VERTICES), jittered(objects)
    pred_masks = []
    for polygons, box in zip(masks, boxes.numpy()):
        size = box[2:] - box[:2]
        displaced = polygons[0].reshape(-1, 2) + rng.uniform(-0.25, 0.25, 2) * size
        centers = (np.indices((MASK_SIZE, MASK_SIZE))[::-1].reshape(2, -1).T + 0.5) / MASK_SIZE
        inside = Outline(displaced).contains_points(box[:2] + centers * size)
        pred_masks.append(inside.reshape(MASK_SIZE, MASK_SIZE))
    proposals = Instances(IMAGE_SIZE, proposal_boxes=Boxes(boxes), gt_masks=masks)
    return proposals, torch.from_numpy(np.array(pred_masks))


def iou_at_full_resolution(polygon: np.ndarray, box: np.ndarray, pred_mask: np.ndarray) -> float:
    """IoU of a mask pasted into its box with the whole object, counted point by point."""
    low = np.floor(np.minimum(polygon.min(axis=0), box[:2]))
    high = np.ceil(np.maximum(polygon.max(axis=0), box[2:]))
    step = 1 / np.clip(256 // (high - low).max(), 1, 4)  # small objects need finer points
    xs, ys = (np.arange(start, stop, step) + step / 2 for start, stop in zip(low, high))
    points = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    cells = np.floor((points - box[:2]) / (box[2:] - box[:2]) * MASK_SIZE).astype(int)
    inside = ((cells >= 0) & (cells < MASK_SIZE)).all(axis=1)
    x, y = cells.clip(0, MASK_SIZE - 1).T
    predicted = pred_mask[y, x] & inside
    truth = Outline(polygon).contains_points(points)
    return (predicted & truth).sum() / (predicted | truth).sum()
