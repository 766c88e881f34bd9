"""A traced model works on images of other sizes and with other numbers of detections, none too."""

import io

import pytest
import torch

from detectron2.config import instantiate
from detectron2.export import TracingAdapter

from msrcnn_d2 import add_mask_calibrator, add_mask_scoring
from tests.helpers.toy import CHANNELS, tiny_c4_mask_rcnn, tiny_mask_rcnn
from tests.test_mask_calibrator import randomised

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

CONFIGS = {
    "standard": tiny_mask_rcnn,
    "cascade": lambda: tiny_mask_rcnn(cascade=True),
    "C4": tiny_c4_mask_rcnn,
}
SIZES = [(64, 96), (80, 64), (33, 47), (128, 200)]


def toy_model(kind, scoring, calibrator):
    """A model that finds nothing in a grey image."""
    cfg = CONFIGS[kind]()
    if scoring:
        cfg = add_mask_scoring(cfg, conv_dim=CHANNELS, num_conv=2, fc_dim=16)
    if calibrator:
        cfg = add_mask_calibrator(cfg)
    torch.manual_seed(0)
    model = instantiate(cfg.model).eval()
    if calibrator:
        randomised(model.roi_heads.mask_calibrator)
    found = detections(model, grey_image())
    predictors = model.roi_heads.box_predictor
    for predictor in predictors if kind == "cascade" else [predictors]:
        predictor.test_score_thresh = found.scores.max().item()
    return model


def grey_image():
    return torch.full((3, 64, 96), 128.0)


def noise(size, seed=0):
    return 255 * torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))


def detections(model, image):
    return model.inference([{"image": image}], do_postprocess=False)[0]


def inference(model, images):
    """As in Detectron2's tools/deploy/export_model.py."""
    return [{"instances": model.inference(images, do_postprocess=False)[0]}]


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("scoring", "calibrator"), [(True, False), (False, True), (True, True)])
def test_a_traced_model_finds_what_the_model_finds(kind, scoring, calibrator):
    model = toy_model(kind, scoring, calibrator)
    adapter = TracingAdapter(model, [{"image": noise(SIZES[0])}], inference)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False), file)
    traced = torch.jit.load(io.BytesIO(file.getvalue()))
    counts = set()
    for image in [grey_image(), *map(noise, SIZES)]:
        for found, expected in zip(traced(image), adapter(image), strict=True):
            assert torch.equal(found, expected)
        counts.add(len(detections(model, image)))
    assert 0 in counts and len(counts) > 2


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_onnx_by_detectron2s_way(kind):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = toy_model(kind, scoring=True, calibrator=True)
    adapter = TracingAdapter(model, [{"image": noise(SIZES[0])}], inference).eval()
    file = io.BytesIO()
    torch.onnx.export(
        adapter,
        adapter.flattened_inputs,
        file,
        opset_version=17,
        dynamo=False,
        input_names=["image"],
        dynamic_axes={"image": {1: "height", 2: "width"}},
    )
    session = onnxruntime.InferenceSession(file.getvalue())
    for image in [grey_image(), *map(noise, SIZES)]:
        outputs = session.run(None, {"image": image.numpy()})
        for found, expected in zip(outputs, adapter(image), strict=True):
            # A cell's probability may be on the other side of a level that the cues count at
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-3)
