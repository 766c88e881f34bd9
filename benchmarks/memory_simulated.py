"""
Memory of a GPU in training, simulated: needs no GPU, only shapes are computed.

A device of :mod:`tests.helpers.simulated_cuda` counts the bytes that a step of training holds.
Feature maps, weights and gradients are meta tensors, which have shapes but no values. Boxes,
classes and masks of the ground truth have values, since the shapes of others depend on them.

What a simulation leaves out: workspaces of cuDNN, and what a run holds beside its steps. So
Detectron2's own models are simulated as well, and compared with the memory that its model zoo
publishes: a published number is larger than its simulation by about the same for all of them.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from benchmarks.memory import NAMES, SIZE
from benchmarks.models import random_boxes
from benchmarks.report import Part
from benchmarks.training import NUM_OBJECTS, polygons_in, proposals_for
from msrcnn_d2 import model_zoo, published_models
from tests.helpers.simulated_cuda import INDEXING, SimulatedCuda, SimulatedTensor, aten

NUM_IMAGES = 2
GB = 2**30
# "train mem (GB)" in MODEL_ZOO.md of Detectron2, of 2 images per GPU
CALIBRATION = {
    "mask_rcnn_R_50_FPN_1x": 3.4,
    "mask_rcnn_R_101_FPN_3x": 4.6,
    "mask_rcnn_X_101_32x8d_FPN_3x": 7.2,
}


class ShapesOnly(SimulatedCuda):
    """
    A simulated device on which a result has values only if all that it is computed from has them.

    A number that has to be fetched without being known is 0, and no element is nonzero.
    """

    def __init__(self):
        super().__init__(track_memory=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, SimulatedTensor)]
        if any(x.value.is_meta for x in tensors):
            x = args[0]
            if func is aten._local_scalar_dense.default:
                return torch.zeros((), dtype=x.dtype).item()
            if func is aten.nonzero.default:
                return SimulatedTensor(torch.zeros(0, x.dim(), dtype=torch.int64))
            if (
                func is aten._to_copy.default
                and torch.device(kwargs.get("device", 0)).type == "cpu"
            ):
                return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
            if func in INDEXING:
                args = (x, _without_masks(args[1]), *args[2:])
            if _is_written(func) and not x.value.is_meta:
                x.value = _without_values(x).value
                self._allocated(x.value)
            args, kwargs = tree_map(_without_values, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _is_cpu(device) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _is_written(func) -> bool:
    first = func._schema.arguments[0].alias_info
    return first is not None and first.is_write


def _without_masks(indices: list) -> list:
    """Boolean masks as the indices of what they select: without values it has no shape."""
    found: list = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found.extend(SimulatedTensor(x) for x in index.value.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


def _without_values(x):
    if isinstance(x, torch.Tensor) and x.dim() == 0 and not isinstance(x, SimulatedTensor):
        return x  # a number
    value = x.value if isinstance(x, SimulatedTensor) else x
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return x
    shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return SimulatedTensor(shape)


def ground_truth(size: tuple[int, int], seed: int) -> Instances:
    """Objects drawn at random, with polygons."""
    boxes = random_boxes(NUM_OBJECTS, size, seed)
    classes = torch.zeros(NUM_OBJECTS, dtype=torch.int64)
    masks = polygons_in(boxes)
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes, gt_masks=masks)


def peak_of_training(
    build: Callable[[], nn.Module],
    amp: bool = False,
    size: tuple[int, int] = SIZE,
    device: SimulatedCuda | None = None,
) -> int:
    """
    Memory of a process of distributed training at its peak: weights, gradients, the buckets in
    which they are averaged, the momentum, and what forward and backward hold.

    Args:
        build: builds the model, on the CPU.
        amp: whether the forward pass runs under autocast.
        size: height and width of the images.
        device: by default one on which weights have shapes only.

    Returns:
        bytes that PyTorch would have allocated in the second step. The first one has no momentum.
    """
    model = build().train()
    truth = [ground_truth(size, seed) for seed in range(NUM_IMAGES)]
    proposals = [proposals_for(x, seed).to("cpu") for seed, x in enumerate(truth)]
    device = device or ShapesOnly()
    with device.running():
        _move(model, device)
        truth, proposals = ([x.to("cuda") for x in part] for part in (truth, proposals))
        _propose(model.proposal_generator, proposals)
        trained = [p for p in model.parameters() if p.requires_grad]
        buckets = [torch.empty_like(p) for p in trained]
        optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)
        for _ in range(2):
            device.peak = device.live
            torch.manual_seed(1)  # of the samples
            with EventStorage(), torch.autocast("cuda", enabled=amp):
                images = [torch.zeros(3, *size, dtype=torch.uint8) for _ in truth]
                inputs = [{"image": x, "instances": y} for x, y in zip(images, truth)]
                loss = sum(model(inputs).values())
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
        del buckets
        return device.peak


def _move(model: nn.Module, device: SimulatedCuda) -> None:
    """To the device; on one for shapes only weights have no values."""
    if isinstance(device, ShapesOnly):
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                weight = device.empty(*p.shape, dtype=p.dtype)
                setattr(module, name, nn.Parameter(weight, p.requires_grad))
    model.to("cuda")


def _propose(generator: nn.Module, proposals: list[Instances]) -> None:
    """Have an RPN propose these: its own proposals have no values. It decodes them all the same."""

    def predict_proposals(anchors, logits, deltas, image_sizes):
        with torch.no_grad():
            generator._decode_proposals(anchors, deltas)
        return [x[:] for x in proposals]

    generator.predict_proposals = predict_proposals


def detectron2_model(name: str) -> nn.Module:
    """A Mask R-CNN of Detectron2's model zoo, without its weights."""
    cfg = detectron2_zoo.get_config(f"COCO-InstanceSegmentation/{name}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def our_model(name: str) -> nn.Module:
    return instantiate(model_zoo.get_config(f"COCO-InstanceSegmentation/{name}.py").model)


def run(options) -> list[Part]:
    calibration = {
        name: [peak_of_training(lambda name=name: detectron2_model(name)) / GB, published]
        for name, published in CALIBRATION.items()
    }
    gaps = [published - simulated for simulated, published in calibration.values()]
    rows = []
    for name in NAMES:
        full, amp = (
            peak_of_training(lambda name=name: our_model(name), amp) / GB for amp in (False, True)
        )
        expected = f"{full + min(gaps):.1f} to {full + max(gaps):.1f}"
        rows.append([name, full, expected, amp, published_models.PUBLISHED[name].memory])
    head = rows[0][1] - calibration["mask_rcnn_R_50_FPN_1x"][0]
    what = f"{NUM_IMAGES} images of {SIZE[0]} x {SIZE[1]} pixels, GB of 2^30 bytes"
    return [
        Part(
            f"Calibration: memory in training of Detectron2's models, {what}",
            ["model", "simulated", "published (Detectron2)", "gap"],
            [[name, a, b, b - a] for name, (a, b) in calibration.items()],
            notes=[
                "The simulation counts tensors alone. What it lacks is the gap: workspaces of "
                "cuDNN, and rounding of what is published."
            ],
            data={name: {"simulated": a, "published": b} for name, (a, b) in calibration.items()},
        ),
        Part(
            f"Simulated peak memory in training, {what}",
            ["config", "simulated", "with the gap", "simulated, AMP", "published (MMDetection)"],
            rows,
            notes=[f"Of it the MaskIoU head: {head:.2f} GB (R-50-FPN, full precision)."],
            data={
                row[0]: {"simulated": row[1], "amp": row[3], "published": row[4]} for row in rows
            },
        ),
    ]
