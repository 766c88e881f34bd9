"""What the mends are for: the installed build works with the installed libraries."""

import copy
import importlib
import inspect
import json
import pickle
import pkgutil
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

try:
    VERSION = metadata.version("detectron2")
except metadata.PackageNotFoundError:
    VERSION = "none"
if "+pure" not in VERSION:
    pytest.skip(
        f"the installed detectron2 ({VERSION}) is not the build of packaging/detectron2",
        allow_module_level=True,
    )

import detectron2  # noqa: E402
from detectron2 import _C, model_zoo  # noqa: E402
from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.common import MapDataset  # noqa: E402
from detectron2.data.datasets import register_coco_instances  # noqa: E402
from detectron2.data.transforms import ExtentTransform  # noqa: E402
from detectron2.engine import SimpleTrainer, hooks  # noqa: E402
from detectron2.evaluation import COCOEvaluator, SemSegEvaluator, coco_evaluation  # noqa: E402
from detectron2.layers import (  # noqa: E402
    DeformConv,
    ModulatedDeformConv,
    ROIAlign,
    batched_nms,
    nms_rotated,
)
from detectron2.layers.mask_ops import paste_mask_in_image_old  # noqa: E402
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator  # noqa: E402
from detectron2.structures import Boxes, Instances, PolygonMasks  # noqa: E402
from detectron2.structures.masks import polygons_to_bitmask  # noqa: E402
from detectron2.utils.collect_env import collect_env_info  # noqa: E402

# Modules whose absence may keep one of Detectron2's from being imported.
OPTIONAL = {"caffe2", "onnx", "cv2", "panopticapi", "psutil", "detectron2._C"}


def test_every_module_can_be_imported() -> None:
    missing = {}
    for module in pkgutil.walk_packages(detectron2.__path__, "detectron2."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            missing[module.name] = (error.name or "").partition(".")[0]
            if error.name == _C.__name__:
                missing[module.name] = error.name
    assert set(missing.values()) <= OPTIONAL, missing
    assert missing["detectron2.evaluation.fast_eval_api"] == "detectron2._C"


# The stand-in for the compiled module.


def test_a_missing_operator_says_so() -> None:
    with pytest.raises(ImportError, match="_C.nms_rotated is a compiled operator.*pure-Python"):
        nms_rotated(torch.zeros(1, 5), torch.zeros(1), 0.5)
    with pytest.raises(ImportError, match="_C.COCOevalAccumulate is a compiled operator"):
        from detectron2._C import COCOevalAccumulate  # noqa: F401


def test_the_stand_in_is_a_plain_module() -> None:
    assert not hasattr(_C, "__path__")
    assert inspect.getmodule(_C.MissingOperatorError) is _C
    assert pickle.loads(pickle.dumps(_C.MissingOperatorError)) is _C.MissingOperatorError
    error = copy.copy(_C.MissingOperatorError("text", name="n"))
    assert (str(error), error.name) == ("text", "n")


def test_environment_report() -> None:
    assert "none (pure-Python build)" in collect_env_info()


# Evaluation.


@pytest.fixture
def dataset(tmp_path: Path):
    """Register a COCO dataset of one 8 x 8 image with one object, and return its name."""
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    polygon = [2, 2, 6, 2, 6, 6, 2, 6]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 16}
    annotation |= {"bbox": [2, 2, 4, 4], "segmentation": [polygon]}
    images = [{"id": 1, "file_name": "1.png", "height": 8, "width": 8}]
    coco = {"info": {}, "images": images, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco | {"annotations": [annotation]}))
    register_coco_instances("one_object", {}, str(tmp_path / "coco.json"), str(tmp_path))
    yield "one_object"
    DatasetCatalog.remove("one_object")
    MetadataCatalog.remove("one_object")


def perfect_prediction() -> Instances:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    return Instances(
        (8, 8),
        pred_boxes=Boxes([[2, 2, 6, 6]]),
        scores=torch.tensor([0.9]),
        pred_classes=torch.tensor([0]),
        pred_masks=mask,
    )


@pytest.mark.parametrize("arguments", [{}, {"use_fast_impl": True}, {"use_fast_impl": False}])
def test_coco_evaluator_falls_back_to_pycocotools(dataset: str, arguments: dict) -> None:
    assert coco_evaluation.COCOeval_opt is coco_evaluation.COCOeval
    DatasetCatalog.get(dataset)
    evaluator = COCOEvaluator(dataset, **arguments)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": perfect_prediction()}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_semantic_segmentation_evaluator(tmp_path: Path) -> None:
    Image.fromarray(np.eye(2, dtype=np.uint8)).save(tmp_path / "truth.png")
    MetadataCatalog.get("stuff").set(stuff_classes=["a", "b"], ignore_label=255)
    DatasetCatalog.register(
        "stuff", lambda: [{"file_name": "i", "sem_seg_file_name": str(tmp_path / "truth.png")}]
    )
    evaluator = SemSegEvaluator("stuff", distributed=False)
    evaluator.reset()
    logits = torch.stack([1 - torch.eye(2), torch.eye(2)])
    evaluator.process([{"file_name": "i"}], [{"sem_seg": logits}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)
    DatasetCatalog.remove("stuff")
    MetadataCatalog.remove("stuff")


# The model zoo.


def test_model_zoo_has_all_its_configs() -> None:
    configs = Path(model_zoo.__file__).parent / "configs"
    assert len(list(configs.rglob("*.yaml"))) == 92
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
    assert model_zoo.get_config_file(name + ".yaml") == str(configs / f"{name}.yaml")
    assert model_zoo.get_config(name + ".yaml").MODEL.MASK_ON
    assert model_zoo.get_config(name + ".py").model.roi_heads.num_classes == 80


# Data, layers and structures.


def test_roi_align_and_nms() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2.1], [4, 4, 6, 6]])
    keep = batched_nms(boxes, torch.tensor([0.5, 0.9, 0.1]), torch.zeros(3), 0.5)
    assert keep.tolist() == [1, 2]
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    pooled = ROIAlign((2, 2), 1.0, 1)(image, torch.tensor([[0.0, 0, 0, 4, 4]]))
    assert pooled.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def sample(channel: np.ndarray, y: float, x: float) -> float:
    """The value of a channel (H, W) between its pixels; around them there are zeros."""
    rows, columns = (np.arange(n) for n in channel.shape)
    return np.maximum(0, 1 - abs(y - rows)) @ channel @ np.maximum(0, 1 - abs(x - columns))


def slow_deform_conv(layer: nn.Module, image, offset, mask) -> np.ndarray:
    """What a layer gives for one image (C, H, W): a sum over taps, one channel after the other."""
    weight = layer.weight.detach().numpy()
    channels_out, channels_of_group, kernel_height, kernel_width = weight.shape
    step, pad, spread = (x[0] for x in (layer.stride, layer.padding, layer.dilation))
    taps = kernel_height * kernel_width
    out = np.zeros((channels_out, *offset.shape[1:]))
    for k in range(channels_out):
        group = k // (channels_out // layer.groups)
        for channel in range(channels_of_group):
            c = group * channels_of_group + channel
            first = c // (len(image) // layer.deformable_groups) * taps
            for tap in range(taps):
                i, j = divmod(tap, kernel_width)
                for y, x in np.ndindex(*offset.shape[1:]):
                    dy, dx = offset[2 * (first + tap) : 2 * (first + tap) + 2, y, x]
                    at = y * step - pad + i * spread + dy, x * step - pad + j * spread + dx
                    value = sample(image[c], *at) * mask[first + tap, y, x]
                    out[k, y, x] += weight[k, channel, i, j] * value
    return out


def layer_and_inputs(modulated: bool, **options) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A layer, and the arguments of its call for two images of 4 x 6 x 5."""
    torch.manual_seed(0)
    layer_type = ModulatedDeformConv if modulated else DeformConv
    layer = layer_type(4, 6, (3, 3), padding=1, **options).double()
    layer.stride, layer.padding, layer.dilation = (
        (x, x) if isinstance(x, int) else x for x in (layer.stride, layer.padding, layer.dilation)
    )
    step = layer.stride[0]
    size = (
        (6 - 2 * layer.dilation[0] + 1) // step + 1,
        (5 - 2 * layer.dilation[0] + 1) // step + 1,
    )
    num_masks = 9 * layer.deformable_groups
    image = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    offset = 2 * torch.randn(2, 2 * num_masks, *size, dtype=torch.float64)
    mask = torch.rand(2, num_masks, *size, dtype=torch.float64)
    return layer, (image, offset, mask) if modulated else (image, offset)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2}, {"deformable_groups": 2, "groups": 2}],
    ids=str,
)
def test_deformable_convolution(modulated: bool, options: dict) -> None:
    layer, inputs = layer_and_inputs(modulated, **options)
    found = layer(*inputs).detach()
    for k in range(2):
        image, offset = (x[k].numpy() for x in inputs[:2])
        mask = inputs[2][k].numpy() if modulated else np.ones((len(offset) // 2, *offset.shape[1:]))
        assert np.allclose(found[k], slow_deform_conv(layer, image, offset, mask), atol=1e-12)


@pytest.mark.parametrize("modulated", [False, True])
def test_gradients_of_deformable_convolution(modulated: bool) -> None:
    layer, inputs = layer_and_inputs(modulated, deformable_groups=2, groups=2, stride=2)
    layer.requires_grad_(False)

    def output(weight: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, inputs)

    weight = layer.weight.detach().clone()
    assert torch.autograd.gradcheck(output, [x.requires_grad_() for x in (weight, *inputs)])


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution_in_mixed_precision(modulated: bool) -> None:
    layer, inputs = layer_and_inputs(modulated)
    expected = layer(*inputs)
    inputs = [x.bfloat16() for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.float()(*inputs)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), expected, atol=0.1)
    found.sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_deformable_convolution_of_no_images() -> None:
    layer, (image, offset) = layer_and_inputs(False)
    assert layer(image[:0], offset[:0]).shape == (0, 6, 6, 5)


def test_masks() -> None:
    polygons = [[np.array([0.0, 0, 2, 0, 2, 2, 0, 2])], []]
    assert polygons_to_bitmask(polygons[0], 4, 4).sum() == 4
    assert PolygonMasks(polygons).nonempty().tolist() == [True, False]
    box = torch.tensor([0.0, 0, 2, 2])
    assert paste_mask_in_image_old(torch.ones(1, 1), box, 4, 4, 0.5)[0, 0]


def test_extent_transform_interpolates() -> None:
    image = np.array([[0, 0], [200, 200]], dtype=np.uint8)
    assert 0 < ExtentTransform((0, 0, 2, 2), (4, 4)).apply_image(image)[1, 0] < 100


def test_dataset_replaces_an_image_that_cannot_be_used() -> None:
    assert MapDataset([None, 1, 1], lambda item: item)[0] == 1


def test_anchors_raise_no_warning() -> None:
    generator = DefaultAnchorGenerator(sizes=[[8]], aspect_ratios=[[1.0]], strides=[4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (anchors,) = generator([torch.zeros(1, 1, 2, 3)])
    assert anchors.tensor[:, 0].tolist() == [-2, 2, 6, -2, 2, 6]


# Training.


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(inputs).square().sum()}


def trainer_of(directory: Path) -> tuple[SimpleTrainer, DetectionCheckpointer]:
    """A trainer that halves its learning rate of 0.1 every second iteration."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    trainer = SimpleTrainer(model, [torch.ones(1, 1)] * 9, optimizer)
    checkpointer = DetectionCheckpointer(model, str(directory), trainer=trainer)
    trainer.register_hooks(
        [hooks.LRScheduler(scheduler=scheduler), hooks.PeriodicCheckpointer(checkpointer, 3)]
    )
    return trainer, checkpointer


def test_training_resumes_with_optimizer_and_schedule(tmp_path: Path) -> None:
    first, _ = trainer_of(tmp_path)
    first.train(0, 3)
    second, checkpointer = trainer_of(tmp_path)
    checkpointer.resume_or_load("", resume=True)
    assert second.iter == 2
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert second._hooks[0].scheduler.last_epoch == 3
    for new, old in zip(second.model.parameters(), first.model.parameters()):
        assert torch.equal(new, old)
        state, old_state = second.optimizer.state[new], first.optimizer.state[old]
        assert torch.equal(state["exp_avg"], old_state["exp_avg"])


# Pictures.


def test_visualizer_draws_masks(dataset: str) -> None:
    pytest.importorskip("cv2", reason="Detectron2's Visualizer needs OpenCV")
    from detectron2.utils.visualizer import Visualizer

    DatasetCatalog.get(dataset)
    image = np.full((8, 8, 3), 128, dtype=np.uint8)
    visualizer = Visualizer(image, MetadataCatalog.get(dataset), scale=8)
    drawn = visualizer.draw_instance_predictions(perfect_prediction()).get_image()
    assert drawn.shape == (64, 64, 3) and (drawn != 128).any()


def test_visualizer_keeps_colours_in_range() -> None:
    pytest.importorskip("cv2", reason="Detectron2's Visualizer needs OpenCV")
    from detectron2.utils.visualizer import Visualizer

    visualizer = Visualizer(np.zeros((8, 8, 3), dtype=np.uint8))
    for red in np.linspace(0, 1, 50):
        colour = visualizer._change_color_brightness((red, 0.3, 0.7), brightness_factor=0.7)
        assert min(colour) >= 0 and max(colour) <= 1
