"""Predictors: both kinds of config, ranking, batches, and what a person may take for an image."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import detectron2.data.transforms as T
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from msrcnn_d2 import MaskScoringPredictor, add_mask_calibrator
from msrcnn_d2.modeling import MaskScoringRCNNWithTTA, ScaledTTAMapper
from msrcnn_d2.modeling.acceleration import use_channels_last_on_cpu
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_runtime.image_reading import read_bgr_image
from tests.helpers.toy import IMAGE_SIZE, tiny_mask_rcnn, tiny_mask_scoring_rcnn, tiny_yacs_config

FIELDS = ["scores", "pred_mask_ious", "mask_scores", "pred_classes", "pred_masks"]


def random_image(height=IMAGE_SIZE[0], width=IMAGE_SIZE[1], seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(model, folder, name="model") -> str:
    DetectionCheckpointer(model, str(folder)).save(name)
    return f"{folder}/{name}.pth"


@pytest.fixture(scope="module")
def yacs_config(tmp_path_factory):
    torch.manual_seed(0)
    cfg = tiny_yacs_config()
    cfg.DATASETS.TEST = ()  # COCO has other classes
    cfg.MODEL.WEIGHTS = saved(build_model(cfg), tmp_path_factory.mktemp("yacs"))
    return cfg


@pytest.fixture(scope="module")
def lazy_config(tmp_path_factory):
    """A LazyConfig with another size and channel order than the defaults."""
    torch.manual_seed(0)
    cfg = OmegaConf.create(flags={"allow_objects": True})
    cfg.model = tiny_mask_scoring_rcnn().model
    cfg.dataloader = {"test": {"dataset": {"names": "predictor_toy"}}}
    cfg.dataloader.test.mapper = L(DatasetMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=48, max_size=200)],
        image_format="RGB",
    )
    weights = saved(instantiate(cfg.model), tmp_path_factory.mktemp("lazy"))
    cfg.train = {"device": "cpu", "init_checkpoint": weights}
    return cfg


def assert_same(first, second):
    assert len(first) == len(second) > 0
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)
    for field in FIELDS:
        assert torch.equal(first.get(field), second.get(field)), field


def test_the_same_instances_as_default_predictor(yacs_config):
    image = random_image()
    default = DefaultPredictor(yacs_config)
    rounded_otherwise = default(image)["instances"]
    use_channels_last_on_cpu(default.model)
    expected = default(image)["instances"]
    found = MaskScoringPredictor(yacs_config, rank_by="score")(image)["instances"]
    order = expected.scores.argsort(descending=True, stable=True)
    assert_same(found, expected[order])
    assert found.image_size == IMAGE_SIZE
    torch.testing.assert_close(expected.pred_boxes.tensor, rounded_otherwise.pred_boxes.tensor)
    for field in ("scores", "pred_mask_ious", "mask_scores"):
        torch.testing.assert_close(expected.get(field), rounded_otherwise.get(field))


def test_a_lazy_config_decides_on_size_and_channels(lazy_config):
    """Red and blue change places, and 64 x 96 pixels become 48 x 72."""
    predict = MaskScoringPredictor(lazy_config)
    image = random_image()
    given = predict._model_input(image)
    assert given["image"].shape == (3, 48, 72)
    assert (given["height"], given["width"]) == IMAGE_SIZE
    resized = T.ResizeTransform(64, 96, 48, 72).apply_image(image[:, :, ::-1])
    assert np.array_equal(given["image"].permute(1, 2, 0).numpy(), resized)


def test_a_lazy_config_without_data_or_training(lazy_config):
    """Such as those in Detectron2's common/models: its usual size, the model's channel order."""
    cfg = OmegaConf.create({"model": lazy_config.model}, flags={"allow_objects": True})
    with pytest.raises(UserError, match="no weights"):
        MaskScoringPredictor(cfg)
    cfg.train = {"init_checkpoint": lazy_config.train.init_checkpoint}
    predict = MaskScoringPredictor(cfg, device="cpu")
    assert predict._model_input(random_image())["image"].shape == (3, 800, 1200)
    assert predict.input_format == lazy_config.model.input_format == "BGR"


@pytest.mark.parametrize("rank_by, field", [("mask_score", "mask_scores"), ("score", "scores")])
def test_ranking_and_threshold(yacs_config, rank_by, field):
    image = random_image()
    everything = MaskScoringPredictor(yacs_config, rank_by=rank_by)(image)["instances"]
    scores = everything.get(field)
    assert torch.equal(scores, scores.sort(descending=True).values)
    assert torch.equal(everything.mask_scores, everything.scores * everything.pred_mask_ious)
    threshold = scores[len(scores) // 2].item()
    some = MaskScoringPredictor(yacs_config, rank_by=rank_by, score_threshold=threshold)(image)
    assert_same(some["instances"], everything[scores >= threshold])
    assert len(some["instances"]) < len(everything)


@pytest.mark.parametrize("device", ["cuda:99", "cdua"])
def test_a_device_that_is_not_there(yacs_config, device):
    with pytest.raises(UserError, match=device) as error:
        MaskScoringPredictor(yacs_config, device=device)
    assert "\n" not in str(error.value)


def test_a_batch_has_the_instances_of_each_image(lazy_config):
    predict = MaskScoringPredictor(lazy_config, rank_by="score")
    images = [random_image(), random_image(seed=1)]
    for image, output in zip(images, predict(images)):
        alone, together = predict(image)["instances"], output["instances"]
        assert len(alone) == len(together) > 0
        for field in ("scores", "pred_mask_ious"):
            assert torch.allclose(alone.get(field), together.get(field), atol=1e-5)
    different_sizes = predict([random_image(96, 64), random_image(50, 50)])
    assert [x["instances"].image_size for x in different_sizes] == [(96, 64), (50, 50)]
    assert predict([]) == []


def test_many_images(lazy_config, tmp_path):
    predict = MaskScoringPredictor(lazy_config)
    for k in range(3):
        Image.fromarray(random_image(seed=k)).save(tmp_path / f"{k}.png")
    found = [*predict.predict_all(tmp_path, batch_size=2)]
    assert [x.name for x in found] == ["0.png", "1.png", "2.png"]
    for image in found:
        (alone,) = predict.predictions([image.source])
        np.testing.assert_allclose(image.predictions.rank_scores, alone.rank_scores, atol=1e-5)


def test_the_config_and_the_image_stay_as_they_were(lazy_config, yacs_config):
    for cfg in (lazy_config, yacs_config):
        before, image = str(cfg), random_image()
        MaskScoringPredictor(cfg)(image)
        assert str(cfg) == before
        assert np.array_equal(image, random_image())


def test_a_frozen_config(yacs_config):
    """As Detectron2's demo.py and train_net.py make it."""
    frozen = yacs_config.clone()
    frozen.freeze()
    assert len(MaskScoringPredictor(frozen)(random_image())["instances"]) > 0
    assert frozen.is_frozen()
    with pytest.raises(TypeError, match="not a str"):
        MaskScoringPredictor("config.yaml")


def test_metadata_is_that_of_the_test_data(lazy_config):
    MetadataCatalog.get("predictor_toy").thing_classes = ["a", "b", "c"]
    try:
        assert MaskScoringPredictor(lazy_config).metadata.thing_classes == ["a", "b", "c"]
    finally:
        MetadataCatalog.remove("predictor_toy")


def test_without_a_gpu_it_runs_on_the_cpu(yacs_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = yacs_config.clone()
    cfg.MODEL.DEVICE = "cuda"
    assert MaskScoringPredictor(cfg).model.device.type == "cpu"


def test_a_plain_mask_rcnn_is_ranked_by_class_score(tmp_path, caplog):
    cfg = OmegaConf.create({"model": tiny_mask_rcnn().model}, flags={"allow_objects": True})
    weights = saved(instantiate(cfg.model), tmp_path)
    cfg.train = {"device": "cpu", "init_checkpoint": weights}
    with pytest.raises(UserError, match='rank_by="score"'):
        MaskScoringPredictor(cfg, rank_by="mask_score")
    asked = MaskScoringPredictor(cfg, rank_by="score")
    assert not [x for x in caplog.records if x.levelname == "WARNING"]
    predict = MaskScoringPredictor(cfg)
    assert len([x for x in caplog.records if x.levelname == "WARNING"]) == 1
    assert predict.rank_by == asked.rank_by == "score"
    instances = predict(random_image())["instances"]
    assert len(instances) and not instances.has("mask_scores")


# Calibrated models


@pytest.fixture(scope="module")
def calibrated_config(tmp_path_factory):
    """
    A Mask R-CNN without a MaskIoU head, but with a calibrator for which masks are the better the
    lower their class score. At IoU 0.75 it knows thresholds for precisions up to 90 %.
    """
    cfg = OmegaConf.create({"model": tiny_mask_rcnn().model}, flags={"allow_objects": True})
    cfg = add_mask_calibrator(cfg)
    cfg.dataloader = {"test": {"mapper": {"augmentations": []}}}
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    calibrator = model.roi_heads.mask_calibrator
    calibrator.slope.fill_(-1)
    calibrator.offset.copy_(torch.linspace(1, -1, 10))
    folder = tmp_path_factory.mktemp("calibrated")
    cfg.train = {"device": "cpu", "init_checkpoint": saved(model, folder)}
    probs = MaskScoringPredictor(cfg)(random_image())["instances"].mask_iou_probs[:, 5]
    low, middle = probs.min().item(), probs.median().item()
    calibrator.accept_thresholds[5, :90] = torch.linspace(low, 2 * middle - low, 90)
    cfg.train.init_checkpoint = saved(model, folder)
    return cfg


def test_calibrated_models_are_ranked_by_calibrated_score(calibrated_config):
    found = MaskScoringPredictor(calibrated_config)(random_image())["instances"]
    scores = found.quality_scores
    assert len(found) > 5 and torch.equal(scores, scores.sort(descending=True).values)
    threshold = scores[3].item()
    predict = MaskScoringPredictor(calibrated_config, score_threshold=threshold)
    assert torch.equal(predict(random_image())["instances"].quality_scores, scores[:4])


def test_instances_of_a_precision(calibrated_config):
    """Whatever they are ranked by."""
    everything = MaskScoringPredictor(calibrated_config, rank_by="score")(random_image())
    everything = everything["instances"]
    predict = MaskScoringPredictor(calibrated_config, rank_by="score", score_threshold="p40@75")
    thresholds = predict.model.roi_heads.mask_calibrator.accept_thresholds
    some = predict(random_image())["instances"]
    kept = everything.mask_iou_probs[:, 5] >= thresholds[5, 39]
    assert torch.equal(some.scores, everything.scores[kept])
    assert 0 < len(some) < len(everything)


def test_precisions_that_are_not_reached(calibrated_config):
    with pytest.raises(UserError, match="the highest is 90 %"):
        MaskScoringPredictor(calibrated_config, score_threshold="p91@75")
    with pytest.raises(UserError, match="nor was 1 %"):
        MaskScoringPredictor(calibrated_config, score_threshold="p1@80")
    with pytest.raises(UserError, match="operating point"):
        MaskScoringPredictor(calibrated_config, score_threshold="0.5")


def test_models_without_a_calibrator(lazy_config):
    for asked in ({"score_threshold": "p95@75"}, {"rank_by": "quality_score"}):
        with pytest.raises(UserError, match="msrcnn-d2 calibrate"):
            MaskScoringPredictor(lazy_config, **asked)
    assert MaskScoringPredictor(lazy_config).rank_by == "mask_score"


def test_weights_have_to_be_complete(lazy_config, tmp_path):
    cfg = lazy_config.copy()
    cfg.train.init_checkpoint = saved(instantiate(tiny_mask_rcnn().model), tmp_path)
    with pytest.raises(UserError, match="mask IoU head has no weights.*--retrofit"):
        MaskScoringPredictor(cfg)
    with pytest.raises(ValueError, match="rank_by"):
        MaskScoringPredictor(lazy_config, rank_by="IoU")


# Images


def test_arrays_that_are_images():
    image = random_image()
    grey = image[:, :, 0]
    assert np.array_equal(read_bgr_image(image), image)
    for alike in (grey, grey[:, :, None]):
        assert np.array_equal(read_bgr_image(alike), np.dstack([grey] * 3))
    assert np.array_equal(read_bgr_image(np.dstack([image, grey])), image)
    assert read_bgr_image(image[:1, :1]).shape == (1, 1, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
@pytest.mark.parametrize("as_file", [True, False])
def test_pil_images_and_files(tmp_path, mode, as_file):
    image = Image.fromarray(random_image()[:, :, ::-1]).convert(mode)
    expected = np.asarray(image.convert("RGB"))[:, :, ::-1]
    image.save(tmp_path / "image.png")
    given = tmp_path / "image.png" if as_file else image
    assert np.array_equal(read_bgr_image(given), expected)
    assert as_file or np.array_equal(read_bgr_image(image.copy()), expected)


def test_a_camera_held_upright(tmp_path):
    """Orientation 6: turn the stored image by 90 degrees to the right."""
    image = random_image()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image[:, :, ::-1]).save(tmp_path / "image.png", exif=exif)
    assert np.array_equal(read_bgr_image(str(tmp_path / "image.png")), np.rot90(image, -1))


@pytest.mark.parametrize(
    "image, error, words",
    [
        (random_image() / 255, ValueError, "not float64: multiply it by 255"),
        (random_image().astype(np.uint16), ValueError, "not uint16: bring it to that range"),
        (random_image() > 9, ValueError, "not bool"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, "empty"),
        (np.zeros((0, 0), np.uint8), ValueError, "empty"),
        (random_image().transpose(2, 0, 1), ValueError, r"image.transpose\(1, 2, 0\)"),
        (random_image()[None], ValueError, "as a list"),
        (random_image()[:, :, :2], ValueError, r"not \(64, 96, 2\)"),
        (np.zeros(7, np.uint8), ValueError, r"not \(7,\)"),
        (torch.zeros(64, 96, 3), TypeError, "not a torch.Tensor"),
        (None, TypeError, "cv2.imread returns for files it cannot read"),
        (Image.fromarray(np.zeros((4, 4), np.uint16)), ValueError, "more than 8 bits"),
        ("no_such_file.jpg", UserError, "'no_such_file.jpg' does not exist"),
        (__file__, UserError, "not an image"),
        ("/", UserError, "cannot be read"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(image, error, words):
    with pytest.raises(error, match=words) as raised:
        read_bgr_image(image)
    assert "\n" not in str(raised.value)


def test_half_of_a_file(tmp_path):
    Image.fromarray(random_image()).save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    (tmp_path / "image.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="image.png' cannot be read"):
        read_bgr_image(tmp_path / "image.png")


# ---- mixed precision and test-time augmentation


def test_mixed_precision_finds_nearly_the_same(lazy_config):
    image = random_image()
    full = MaskScoringPredictor(lazy_config)(image)["instances"]
    predict = MaskScoringPredictor(lazy_config, amp=True)
    seen = []
    predict.model.backbone.bottom_up.stem.conv1.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    mixed = predict.predictions([image])[0]
    assert seen == [torch.bfloat16]
    assert mixed.scores.dtype == np.float32 and len(mixed) > 0
    assert abs(mixed.mask_scores[0] - full.mask_scores[0].item()) < 0.05


def test_augmentation_is_that_of_an_evaluation(yacs_config):
    cfg = yacs_config.clone()
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP = (64, 96), 200, True
    image = random_image()
    predict = MaskScoringPredictor(cfg, tta=True)
    found = predict(image)["instances"]
    with torch.no_grad():
        tta = MaskScoringRCNNWithTTA(cfg, predict.model, batch_size=1)
        expected = tta([predict._model_input(image)])[0]["instances"]
    expected = expected[expected.mask_scores.argsort(descending=True, stable=True)]
    assert len(found) > 0
    for name in ("scores", "mask_scores", "pred_masks"):
        assert torch.equal(found.get(name), expected.get(name)), name
    assert np.array_equal(predict.predictions([image])[0].pred_masks, found.pred_masks.numpy())


def test_augmentation_of_a_lazy_config_is_relative_to_its_size(lazy_config, monkeypatch):
    monkeypatch.setattr(ScaledTTAMapper, "SCALES", (0.5, 1.0))
    predict = MaskScoringPredictor(lazy_config, tta=True)
    sizes = []
    predict.model.backbone.register_forward_pre_hook(
        lambda module, args: sizes.append(min(args[0].shape[2:]))
    )
    (found,) = predict.predictions([random_image()])
    # The short edge of 48 pixels, padded to multiples of 32; twice, for boxes and for masks
    assert sizes == [32, 32, 64, 64] * 2
    assert len(found) > 0 and (np.diff(found.mask_scores) <= 0).all()
