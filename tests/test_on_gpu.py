"""
All that uses a GPU, on one: PyTorch's where there is one, else the simulated one.

On the simulated device values are the CPU's bit for bit; a real one rounds in its own way.
"""

import contextlib
from collections import Counter

import pytest
import torch

from detectron2.config import instantiate
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from msrcnn_d2 import MaskScoringPredictor, MaskScoringVisualizer, retrofit
from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator
from msrcnn_d2.evaluation.mask_encoding import encode_predicted_masks
from msrcnn_d2.modeling import MaskScoringRCNNWithTTA, UnpastedMasks
from tests.helpers.simulated_cuda import SimulatedCuda
from tests.helpers.toy import (
    tiny_mask_rcnn,
    tiny_mask_scoring_rcnn,
    tiny_yacs_config,
    toy_inputs,
    write_coco_json,
)

REAL = torch.cuda.is_available()
FORMATS = ("polygon", "bitmask")


@pytest.fixture
def gpu():
    device = SimulatedCuda()
    with contextlib.nullcontext() if REAL else device.running():
        yield device


def build(cfg=None):
    torch.manual_seed(0)
    return instantiate((cfg or tiny_mask_scoring_rcnn()).model)


def inputs(mask_format="polygon"):
    torch.manual_seed(1)
    return toy_inputs(mask_format)


def images():
    return [{k: v for k, v in x.items() if k != "instances"} for x in inputs()]


def train(model, mask_format, amp=False):
    """The losses and gradients of a step, on the CPU."""
    torch.manual_seed(2)
    with EventStorage(), torch.autocast("cuda", enabled=amp):
        losses = model.train()(inputs(mask_format))
    sum(losses.values()).backward()
    assert all(x.dtype == torch.float32 for x in losses.values())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach().cpu() for k, v in {**losses, **gradients}.items()}


def fields(outputs):
    """The fields of all images' instances by name."""
    instances = [x["instances"].get_fields() for x in outputs]
    return {
        f"{k}.{n}": getattr(v, "tensor", v) for k, x in enumerate(instances) for n, v in x.items()
    }


def assert_same(expected, got):
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        if REAL:
            torch.testing.assert_close(got[name].cpu(), value, rtol=1e-3, atol=1e-4, msg=name)
        else:
            assert torch.equal(got[name].cpu(), value), name


@pytest.mark.parametrize("cascade", [False, True], ids=["standard", "cascade"])
@pytest.mark.parametrize("mask_format", FORMATS)
def test_a_step_of_training(gpu, mask_format, cascade):
    cfg = tiny_mask_scoring_rcnn(cascade)
    expected = train(build(cfg), mask_format)
    assert any("mask_iou_head" in name for name in expected)
    assert_same(expected, train(build(cfg).to("cuda"), mask_format))


def test_a_step_of_a_retrofit(gpu):
    cfg = retrofit(tiny_mask_scoring_rcnn())
    assert_same(train(build(cfg), "bitmask"), train(build(cfg).to("cuda"), "bitmask"))


@pytest.mark.parametrize("mask_format", FORMATS)
def test_a_step_with_mixed_precision(gpu, mask_format):
    full = train(build().to("cuda"), mask_format)
    mixed = train(build().to("cuda"), mask_format, amp=True)
    assert full.keys() == mixed.keys()
    assert all(x.isfinite().all() for x in mixed.values())
    assert any(not torch.equal(full[k], mixed[k]) for k in full)  # it was in half precision


def test_masks_and_their_ious_are_at_full_precision_in_mixed_training(gpu, monkeypatch):
    model = build().to("cuda")
    head = model.roi_heads.mask_iou_head
    taken, predicted, layers = [], [], head.layers
    head.register_forward_pre_hook(lambda module, args: taken.extend(x.dtype for x in args[:2]))

    def recorded(*args):
        ious = layers(*args)
        predicted.append(ious.dtype)
        return ious

    monkeypatch.setattr(head, "layers", recorded)
    train(model, "bitmask", amp=True)
    assert taken == [torch.float16, torch.float32]  # the features of the regions, and their masks
    assert predicted == [torch.float32]


@pytest.mark.parametrize("amp", [False, True], ids=["full", "mixed"])
def test_inference_and_encoding(gpu, amp):
    model = build().to("cuda").eval()
    with torch.no_grad(), torch.autocast("cuda", enabled=amp):
        pasted, unpasted = model(images()), UnpastedMasks(model)(images())
    for name, value in [*fields(pasted).items(), *fields(unpasted).items()]:
        assert value.is_cuda or name.endswith("kept"), name
        assert value.dtype in (torch.float32, torch.int64, torch.bool), name
    if not amp:
        with torch.no_grad():
            assert_same(fields(build().eval()(images())), fields(pasted))
        encoded = [
            [encode_predicted_masks(x["instances"]) for x in outputs]
            for outputs in (unpasted, pasted)
        ]
        assert encoded[0] == encoded[1]


def test_time_augmentation(gpu):
    cfg = tiny_yacs_config()
    cfg.merge_from_list(["TEST.AUG.MIN_SIZES", (64, 96), "TEST.AUG.MAX_SIZE", 200])
    torch.manual_seed(0)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    with torch.no_grad():
        expected = fields(MaskScoringRCNNWithTTA(cfg, model)(images()[:1]))
        got = MaskScoringRCNNWithTTA(cfg, model.to("cuda"))(images()[:1])
    assert_same(expected, fields(got))


def test_predictor_visualizer_and_evaluator(gpu, tmp_path, leave_no_traces):
    cfg = tiny_mask_scoring_rcnn()
    torch.save({"model": build().state_dict()}, tmp_path / "model.pth")
    cfg.train = {"init_checkpoint": str(tmp_path / "model.pth"), "device": "cuda"}
    image = torch.randint(256, (64, 96, 3), dtype=torch.uint8).numpy()
    predictor = MaskScoringPredictor(cfg)
    found = predictor([image])[0]["instances"]
    assert found.mask_scores.is_cuda
    MaskScoringVisualizer(image, predictor.metadata).draw_instance_predictions(found)

    register_coco_instances("on_gpu", {}, write_coco_json(tmp_path / "a.json"), str(tmp_path))
    evaluator = MaskScoringCOCOEvaluator("on_gpu")
    batch = [{**x, "image_id": k + 1} for k, x in enumerate(images())]
    model = build().to("cuda").eval()
    for tested in (model, UnpastedMasks(model)):
        evaluator.reset()
        with torch.no_grad():
            evaluator.process(batch, tested(batch))
        assert "segm" in evaluator.evaluate()


def waits_in_inference(cfg, gpu, pasted):
    model = build(cfg).to("cuda").eval()
    if not pasted:
        model = UnpastedMasks(model)
    gpu.events.clear()
    with torch.no_grad():
        model(images())
    return Counter(x.place for x in gpu.events)


@pytest.mark.skipif(REAL, reason="a real GPU does not say when it is waited for")
@pytest.mark.parametrize("pasted", [True, False])
def test_inference_waits_as_often_as_mask_rcnn(gpu, pasted):
    plain = waits_in_inference(tiny_mask_rcnn(), gpu, pasted)
    ours = waits_in_inference(tiny_mask_scoring_rcnn(), gpu, pasted)
    assert ours.total() <= plain.total(), ours - plain
    own = sum(n for place, n in ours.items() if place.startswith("msrcnn_d2/"))
    assert own <= 2, ours  # the boxes of each image that are not empty
