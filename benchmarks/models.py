"""Models with random weights, and what they are given, such that they work as trained ones do."""

import os

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import nn

import detectron2.data.transforms as T
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances

from msrcnn_d2 import model_zoo

IMAGE_SIZE = (640, 480)  # height, width: the most common one in COCO, upright
SHORT_EDGE = 800
NUM_PROPOSALS = 1000
SMALLEST, LARGEST = 16, 600  # sides of boxes, in pixels of an image whose short edge is 800
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def photo() -> np.ndarray:
    """A photograph that comes with Matplotlib, uint8, BGR, cut and resized to IMAGE_SIZE."""
    path = os.path.join(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    height, width = IMAGE_SIZE
    with Image.open(path) as image:
        share = width / height
        left = (image.width - image.height * share) / 2
        cut = image.crop((round(left), 0, round(image.width - left), image.height))
        return np.asarray(cut.convert("RGB").resize((width, height)))[:, :, ::-1]


def model_input(short_edge: int = SHORT_EDGE) -> dict:
    """The photograph as `DatasetMapper` gives it to a model."""
    image = T.ResizeShortestEdge(short_edge, 2 * short_edge).get_transform(photo())
    pixels = image.apply_image(photo()).astype("float32").transpose(2, 0, 1)
    height, width = IMAGE_SIZE
    return {"image": torch.as_tensor(pixels.copy()), "height": height, "width": width}


def build_models() -> tuple[nn.Module, nn.Module]:
    """
    Detectron2's Mask R-CNN and our Mask Scoring R-CNN, R-50-FPN, with the same random weights.
    """
    torch.manual_seed(0)
    name = "COCO-InstanceSegmentation/{}_R_50_FPN_1x.py"
    scoring = instantiate(model_zoo.get_config(name.format("ms_rcnn")).model).to(DEVICE)
    plain = instantiate(detectron2_zoo.get_config(name.format("mask_rcnn")).model).to(DEVICE)
    set_batch_norm(scoring)
    weights = scoring.state_dict()
    plain.load_state_dict({k: v for k, v in weights.items() if "mask_iou_head" not in k})
    return plain, scoring


@torch.no_grad()
def set_batch_norm(model: nn.Module) -> None:
    """
    Give the frozen batch norm the statistics of the photograph, so that activations keep their
    scale from layer to layer, as in a trained network. With random weights alone they grow.
    """

    def measure(layer, inputs):
        layer.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        layer.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))

    layers = [x for x in model.modules() if isinstance(x, FrozenBatchNorm2d)]
    hooks = [x.register_forward_pre_hook(measure) for x in layers]
    model.backbone(model.preprocess_image([model_input()]).tensor)
    for hook in hooks:
        hook.remove()


def random_boxes(count: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """
    Args:
        size: height and width of the image, whose short edge stands for 800 pixels.

    Returns:
        Tensor of shape (count, 4): boxes anywhere in the image; the logarithm of their size is
        uniform, that of their shape normal.
    """
    rng = np.random.default_rng(seed)
    scale = min(size) / SHORT_EDGE
    side = scale * np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST), count))
    shape = np.exp(rng.normal(0, 0.3, count))
    sides = np.stack([side * shape, side / shape], axis=1)
    centers = rng.uniform(0, size[::-1], (count, 2))
    boxes = Boxes(
        torch.as_tensor(np.concatenate([centers - sides / 2, centers + sides / 2], axis=1))
    )
    boxes.clip(size)
    return boxes.tensor.float()


def random_proposals(size: tuple[int, int]) -> list[Instances]:
    """
    What stands in for the proposals of one image: those of an RPN with random weights are all
    small.
    """
    boxes = Boxes(random_boxes(NUM_PROPOSALS, size).to(DEVICE))
    logits = torch.linspace(5, -5, NUM_PROPOSALS, device=DEVICE)
    return [Instances(size, proposal_boxes=boxes, objectness_logits=logits)]


@torch.no_grad()
def set_number_of_detections(model: nn.Module, features, proposals, count: int) -> None:
    """
    Have the box head find exactly `count` objects, as random weights seldom do: with a threshold
    on the class score that ten times as many candidates pass.

    Raises:
        RuntimeError: it finds another number.
    """
    heads = model.roi_heads
    predictor = heads.box_predictor
    boxes = [x.proposal_boxes for x in proposals]
    pooled = heads.box_pooler([features[f] for f in heads.box_in_features], boxes)
    logits, _ = predictor(heads.box_head(pooled))
    scores = logits.softmax(dim=1)[:, :-1].flatten()
    predictor.test_score_thresh = scores.topk(min(10 * count, len(scores))).values[-1].item()
    predictor.test_topk_per_image = count
    found = len(heads._forward_box(features, proposals)[0])
    if found != count:
        raise RuntimeError(f"{found} detections instead of {count}")
