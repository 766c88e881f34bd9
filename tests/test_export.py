"""Exported models find what Detectron2 finds, in images of any size, and say what they are."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import detectron2.data.transforms as T
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from detectron2.layers import batched_nms

from msrcnn_d2 import MaskScoringPredictor, add_mask_calibrator, add_mask_scoring
from msrcnn_d2.export import export_onnx, export_torchscript
from msrcnn_d2.export.onnx_file import Session, onnx_operators
from msrcnn_d2.export.resizing import ResizeRule, resized, resized_size
from msrcnn_d2.utils.errors import UserError
from tests.helpers.toy import CHANNELS, tiny_mask_rcnn
from tests.test_mask_calibrator import OF_CALIBRATOR, randomised

onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")

SHORT_EDGE, MAX_SIZE = 64, 120
NAMES = ["a", "b", "ü"]


def toy_predictor(folder, cascade, scoring, calibrator, **kwargs):
    """Of a model whose class scores differ enough for rounding not to decide on detections."""
    cfg = tiny_mask_rcnn(cascade)
    cfg.model.pixel_mean = [100.0, 110.0, 120.0]
    if scoring:
        cfg = add_mask_scoring(cfg, conv_dim=CHANNELS, num_conv=2, fc_dim=16)
    if calibrator:
        cfg = add_mask_calibrator(cfg)
    cfg.dataloader = {"test": {"dataset": {"names": ()}}}
    cfg.dataloader.test.mapper = L(DatasetMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=SHORT_EDGE, max_size=MAX_SIZE)],
        image_format="BGR",
    )
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    with torch.no_grad():
        predictors = model.roi_heads.box_predictor
        for predictor in predictors if cascade else [predictors]:
            predictor.cls_score.weight.mul_(50)
        if scoring:
            model.roi_heads.mask_iou_head.predictor.weight.mul_(20)
            model.roi_heads.mask_iou_head.predictor.bias.fill_(0.5)
        if calibrator:
            randomised(model.roi_heads.mask_calibrator)
            model.roi_heads.mask_calibrator.accept_thresholds[:, :95] = 0.25
    DetectionCheckpointer(model, str(folder)).save("model")
    cfg.train = {"device": "cpu", "init_checkpoint": f"{folder}/model.pth"}
    return MaskScoringPredictor(cfg, class_names=NAMES, **kwargs)


def image_of(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


class OnnxFile(Session):
    def __init__(self, path):
        super().__init__(path.read_bytes())
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def resized(self, image, output_size):
        values = self.session.run(None, {"image": image, "output_size": output_size})
        return dict(zip(self.names, values))


class TorchScriptFile:
    def __init__(self, path):
        extra_files = {"metadata.json": ""}
        self.model = torch.jit.load(path, _extra_files=extra_files)
        self.metadata = json.loads(extra_files["metadata.json"])
        self.names = [*self(image_of(80, 60))]

    def __call__(self, image, *score_threshold):
        return self._values(torch.tensor(image), None, *score_threshold)

    def resized(self, image, output_size):
        return self._values(torch.tensor(image), torch.from_numpy(output_size))

    def _values(self, *args):
        return {name: value.numpy() for name, value in self.model(*args).items()}


class Case:
    """A model, its file, and what the model was like before."""

    def __init__(self, folder, file_type, masks, **kwargs):
        self.predict = toy_predictor(folder, **kwargs)
        model = self.predict.model
        model.backbone.train()  # such as to measure something
        before = self.state()
        export, name = {
            OnnxFile: (export_onnx, "model.onnx"),
            TorchScriptFile: (export_torchscript, "model.ts"),
        }[file_type]
        self.path = folder / name
        self.exported = export(self.predict, self.path, masks=masks)
        self.is_unchanged = self.state() == before
        model.eval()
        self.session = file_type(self.path)
        self.metadata = self.session.metadata

    def state(self):
        modules = [(name, x.training) for name, x in self.predict.model.named_modules()]
        values = [(x.dtype, x.stride(), x.sum().item()) for x in self.predict.model.parameters()]
        predictors = self.predict.model.roi_heads.box_predictor
        predictors = predictors if isinstance(predictors, torch.nn.ModuleList) else [predictors]
        return modules, values, [x.test_score_thresh for x in predictors]

    def expected(self, image, height=None, width=None):
        """What the predictor finds, under the names in the file."""
        (found,) = self.predict.predictions([image[:, :, ::-1]])
        names = {"pred_boxes": "boxes", "pred_classes": "classes"}
        fields = {k: v for k, v in found.get_fields().items() if k not in ("masks", "pred_masks")}
        outputs = {names.get(k, k): v for k, v in fields.items()}
        pasted = self.metadata["masks"] == "pasted"
        return outputs | {"masks": found.masks.pasted() if pasted else found.masks.probs}


@pytest.fixture(scope="module", params=["calibrated", "cascade", "torchscript"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "cascade":
        return Case(folder, OnnxFile, "pasted", cascade=True, scoring=True, calibrator=False)
    file_type = TorchScriptFile if request.param == "torchscript" else OnnxFile
    return Case(folder, file_type, "unpasted", cascade=False, scoring=True, calibrator=True)


def test_a_plain_cascade_as_torchscript(tmp_path):
    options = {"cascade": True, "scoring": False, "calibrator": False}
    case = Case(tmp_path, TorchScriptFile, "pasted", **options)
    for size in SIZES[:2]:
        assert_same(case.session(image_of(*size)), case.expected(image_of(*size)))
    assert not len(case.session(image_of(80, 60), 0.99)["boxes"])


def assert_same(found, expected):
    """Where two ranking scores are equal up to rounding, either may be the first."""
    assert found.keys() == expected.keys()
    assert len(found["boxes"]) == len(expected["boxes"])
    distances = np.abs(found["boxes"] - expected["boxes"][:, None]).sum(axis=2)
    distances += 1000 * (found["classes"] != expected["classes"][:, None])
    order = distances.argmin(axis=1)
    assert len({*order}) == len(order)
    found = {name: value[order] for name, value in found.items()}
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if value.dtype == bool:
            assert (found[name] != value).mean() < 1e-4, name
        else:
            # A cell's probability may be on the other side of a level that the cues count at
            atol = 1e-2 if name in OF_CALIBRATOR else 1e-3
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=atol, err_msg=name)


SIZES = [(96, 64), (50, 97), (150, 31), (230, 301), (64, 64)]  # width, height


@pytest.mark.parametrize("size", SIZES)
def test_the_same_detections_as_the_model(case, size):
    image = image_of(*size)
    found = case.session(image)
    assert len(found["boxes"]) > 10
    assert_same(found, case.expected(image))
    ranked = found[case.metadata["ranking"]]
    assert (ranked[:-1] >= ranked[1:]).all()


def test_no_detections(case):
    found = case.session(image_of(80, 60), 0.99)
    expected = case.session(image_of(80, 60))
    for name, value in found.items():
        assert value.shape == (0, *expected[name].shape[1:]), name
        assert value.dtype == expected[name].dtype


def test_the_threshold_can_be_another_one(case):
    found = case.session(image_of(80, 60))
    threshold = float(np.median(found["scores"]))
    above = case.session(image_of(80, 60), threshold)
    assert_same(above, {k: v[found["scores"] > threshold] for k, v in found.items()})


def test_an_image_that_is_resized_already(case):
    image = image_of(301, 123)
    smaller = np.asarray(Image.fromarray(image).resize((120, 49), Image.Resampling.BILINEAR))
    size = np.array(image.shape[:2])
    assert_same(case.session.resized(smaller, size), case.session(image))


def test_the_model_is_left_as_it_was(case):
    assert case.is_unchanged


def test_it_says_what_was_compared(case):
    other, none = case.exported.comparisons
    assert other.num_expected == other.num_found == other.num_same > 2
    assert none.num_expected == none.num_found == 0
    assert other.image_size != image_of(*SIZES[0]).shape[:2]
    assert case.exported.num_bytes == case.path.stat().st_size


def test_onnx_runtime_warns_only_of_inputs_with_defaults(case, capfd):
    if not isinstance(case.session, OnnxFile):
        pytest.skip("a TorchScript file")
    onnxruntime.InferenceSession(case.path, providers=["CPUExecutionProvider"])
    warnings = [line for line in capfd.readouterr().err.splitlines() if "W:onnxruntime" in line]
    assert len(warnings) == 2
    assert "output_size" in warnings[0] and "score_threshold" in warnings[1]


def test_metadata(case):
    has_calibrator = "quality_scores" in case.session.names
    values = case.metadata
    assert (values["format"], values["format_version"]) == ("msrcnn_d2", "1")
    assert values["channel_order"] == "RGB"
    assert values["ranking"] == ("quality_scores" if has_calibrator else "mask_scores")
    assert values["masks"] == ("unpasted" if has_calibrator else "pasted")
    assert json.loads(values["class_names"]) == NAMES
    assert json.loads(values["resize"]) == {"short_edge": SHORT_EDGE, "max_size": MAX_SIZE}
    assert json.loads(values["pixel_mean"]) == [120.0, 110.0, 100.0]  # of R, G, B
    assert json.loads(values["image_settings"])["apply_exif"] is True
    assert json.loads(values["score_threshold"]) == 0.0
    if has_calibrator:
        table = np.array(json.loads(values["accept_thresholds"]))
        assert table.shape == (10, 99) and table[3, 94] == 0.25 and table[3, 95] == 2
    else:
        assert "accept_thresholds" not in values


def int8_layers(path):
    import onnx

    types = [x.op_type for x in onnx.load(path).graph.node]
    return types.count("DequantizeLinear")


def test_int8_finds_about_the_same(plain, tmp_path):
    images = [image_of(96, 64, seed)[:, :, ::-1] for seed in range(4)]
    exported = export_onnx(plain, tmp_path / "model.onnx", calibration_images=images)
    session = OnnxFile(tmp_path / "model.onnx")
    assert session.metadata["precision"] == "int8"
    assert json.loads(session.metadata["class_names"]) == NAMES
    assert int8_layers(tmp_path / "model.onnx") > 10
    other, none = exported.comparisons
    assert other.num_same >= other.num_expected / 2 > 1 and none.num_found == 0
    assert other.image_size == (64, 96)
    assert any(other.differences.values())


def test_int8_needs_images_with_objects(plain, tmp_path, monkeypatch):
    run = Session.__call__
    # Without a threshold, as for the images, it finds nothing
    monkeypatch.setattr(Session, "__call__", lambda self, x, t=2.0: run(self, x, t))
    with pytest.raises(UserError, match="images with objects"):
        export_onnx(plain, tmp_path / "model.onnx", calibration_images=[image_of(96, 64)])
    assert not [*tmp_path.iterdir()]


# ---- parts


def test_resizing_is_pillows():
    # Newer versions of Pillow make images that are tall, or change shape, smaller along y first
    sizes = [(48, 64, 80, 107), (160, 90, 33, 17), (99, 7, 640, 45), (20, 20, 20, 20), (3, 1, 9, 4)]
    for seed, (width, height, new_width, new_height) in enumerate(sizes):
        image = image_of(width, height, seed)
        found = resized(torch.tensor(image), torch.tensor([new_height, new_width]))
        expected = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_sizes_are_detectron2s():
    random = np.random.default_rng(0)
    cases = [(1230, 4100, 1474, 2815), (2961, 896, 320, 2914)]  # halves, where rounding decides
    cases += [
        (
            *random.integers(1, 3000, 2),
            int(random.integers(1, 900)),
            int(random.integers(900, 2000)),
        )
        for _ in range(500)
    ]
    for height, width, short, longest in cases:
        found = resized_size(torch.tensor([height, width]), ResizeRule(short, longest))
        expected = T.ResizeShortestEdge.get_output_shape(height, width, short, longest)
        assert tuple(found.tolist()) == expected


@pytest.mark.parametrize("count", [0, 1, 300, 1000, 1001, 1500])
def test_non_maximum_suppression_is_detectron2s(count):
    generator = torch.Generator().manual_seed(count)
    boxes = 200 * torch.rand(count, 4, generator=generator)
    boxes[:, 2:] = boxes[:, :2] + 5 + 50 * torch.rand(count, 2, generator=generator)
    scores = torch.rand(count, generator=generator) - 0.5
    classes = torch.randint(0, 4, (count,), generator=generator)
    expected = batched_nms(boxes, scores, classes, 0.5)
    assert torch.equal(onnx_operators(5).nms(boxes, scores, classes, 0.5), expected)


# ---- what cannot be


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return toy_predictor(folder, cascade=False, scoring=False, calibrator=False, rank_by="score")


@pytest.mark.parametrize(
    ("target", "words"),
    [(".", "is a folder"), ("model.pb", "end with .onnx"), ("nowhere/m.onnx", "does not exist")],
)
def test_targets_that_cannot_be_written(plain, tmp_path, target, words):
    with pytest.raises(UserError, match=words):
        export_onnx(plain, tmp_path / target)
    with pytest.raises(UserError, match="end with .ts"):
        export_torchscript(plain, tmp_path / "model.pt")


@pytest.mark.parametrize("export, name", [(export_onnx, "m.onnx"), (export_torchscript, "m.ts")])
def test_masks_of_an_unknown_kind(plain, tmp_path, export, name):
    with pytest.raises(ValueError, match="unpasted, pasted"):
        export(plain, tmp_path / name, masks="Pasted")


def test_augmentations_that_a_file_cannot_have(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "augmentations", T.AugmentationList([T.Resize((64, 64))]))
    with pytest.raises(UserError, match="ResizeShortestEdge"):
        export_onnx(plain, tmp_path / "model.onnx")


def test_without_onnx_it_says_what_to_install(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"\[export\]"):
        export_onnx(plain, tmp_path / "model.onnx")


def test_a_file_that_finds_something_else_is_not_written(plain, tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_text("the older one")
    run = Session.__call__

    def moved(self, image, threshold):
        outputs = run(self, image, threshold)
        return outputs | {"boxes": outputs["boxes"] + 5}

    monkeypatch.setattr(Session, "__call__", moved)
    with pytest.raises(UserError, match="not written"):
        export_onnx(plain, tmp_path / "model.onnx")
    assert [x.name for x in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "the older one"
