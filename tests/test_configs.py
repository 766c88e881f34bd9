"""The shipped configs, add_mask_scoring on Detectron2's own, and where configs are found."""

from pathlib import Path

import pytest
import torch

from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from msrcnn_d2 import add_mask_calibrator, add_mask_scoring, model_zoo, published_models
from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator
from msrcnn_d2.modeling import CascadeMaskScoringROIHeads, MaskScoringROIHeads
from msrcnn_d2.utils.errors import UserError
from tests.helpers.toy import tiny_mask_rcnn

ROOT = Path(__file__).parents[1]
FOLDER = "COCO-InstanceSegmentation"
BACKBONES = ["R_50", "R_101", "X_101_32x4d", "X_101_64x4d"]
NAMES = [f"{FOLDER}/ms_rcnn_{b}_FPN_{s}" for b in BACKBONES for s in ("1x", "2x")]


def build_without_memory(cfg):
    """The model of a config of either kind, its parameters without values."""
    with torch.device("meta"):
        if "MODEL" in cfg:
            cfg.MODEL.DEVICE = "meta"
            return build_model(cfg)
        return instantiate(cfg.model)


def lazy_lrs(cfg, iterations):
    multiplier = instantiate(cfg.lr_multiplier)
    return [cfg.optimizer.lr * multiplier(i / cfg.train.max_iter) for i in iterations]


def yacs_lrs(cfg, iterations):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    lrs = []
    for i in iterations:
        scheduler.last_epoch = i
        lrs.extend(scheduler.get_lr())
    return lrs


def test_all_pairs_are_there():
    found = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").glob("*/*.*")}
    assert {Path(f"{name}{suffix}") for name in NAMES for suffix in (".py", ".yaml")} == found


@pytest.mark.parametrize("name", NAMES)
def test_py_and_yaml_build_the_same_parameters(name):
    models = [build_without_memory(model_zoo.get_config(name + s)) for s in (".py", ".yaml")]
    lazy, yacs = [
        {k: (v.shape, v.dtype, v.requires_grad) for k, v in m.named_parameters()} for m in models
    ]
    assert lazy == yacs
    buffers = [{k: v.shape for k, v in m.named_buffers()} for m in models]
    assert buffers[0] == buffers[1]


@pytest.mark.parametrize("name", NAMES)
def test_py_and_yaml_mean_the_same_training(name):
    lazy, yacs = (model_zoo.get_config(name + suffix) for suffix in (".py", ".yaml"))
    assert lazy.train.max_iter == yacs.SOLVER.MAX_ITER == (180000 if name.endswith("2x") else 90000)
    assert lazy.train.init_checkpoint == yacs.MODEL.WEIGHTS
    assert lazy.dataloader.train.total_batch_size == yacs.SOLVER.IMS_PER_BATCH == 16
    assert lazy.model.input_format == yacs.INPUT.FORMAT
    assert lazy.dataloader.train.mapper.image_format == yacs.INPUT.FORMAT
    assert lazy.dataloader.test.mapper.image_format == yacs.INPUT.FORMAT
    assert list(lazy.model.pixel_mean) == yacs.MODEL.PIXEL_MEAN
    assert list(lazy.model.pixel_std) == yacs.MODEL.PIXEL_STD
    assert lazy.optimizer.weight_decay == yacs.SOLVER.WEIGHT_DECAY


@pytest.mark.parametrize("name", NAMES)
def test_learning_rate(name):
    length = 180000 if name.endswith("2x") else 90000
    drops = [length * 2 // 3, length * 11 // 12]
    iterations = [0, 500, 1000, drops[0] - 1, drops[0] + 1, drops[1] - 1, drops[1] + 1, length - 1]
    # Linear warm-up from a thousandth over 1000 iterations, then two drops by ten
    expected = [2e-5, 0.01001, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002]
    assert lazy_lrs(model_zoo.get_config(f"{name}.py"), iterations) == pytest.approx(expected)
    assert yacs_lrs(model_zoo.get_config(f"{name}.yaml"), iterations) == pytest.approx(expected)


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
@pytest.mark.parametrize(
    "backbone, style, blocks, groups, bottleneck",
    [
        ("R_50", "caffe", 6, 1, 64),
        ("R_101", "caffe", 23, 1, 64),
        ("X_101_32x4d", "pytorch", 23, 32, 128),
        ("X_101_64x4d", "pytorch", 23, 64, 256),
    ],
)
def test_backbone_follows_its_initial_weights(backbone, style, blocks, groups, bottleneck, suffix):
    model = build_without_memory(
        model_zoo.get_config(f"{FOLDER}/ms_rcnn_{backbone}_FPN_1x{suffix}")
    )
    body = model.backbone.bottom_up
    conv1, conv2 = body.res3[0].conv1, body.res3[0].conv2
    assert len(body.res4) == blocks
    assert body.res2[0].conv2.groups == groups
    assert body.res2[0].conv2.out_channels == bottleneck
    if style == "caffe":
        assert model.input_format == "BGR"
        assert (conv1.stride, conv2.stride) == ((2, 2), (1, 1))
    else:
        assert model.input_format == "RGB"
        assert (conv1.stride, conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize(
    "backbone, mean, std",
    [
        ("R_101", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]),  # of B, G, R
        ("X_101_64x4d", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),  # of R, G, B
    ],
)
def test_pixels_are_normalised_as_the_initial_weights_expect(backbone, mean, std):
    cfg = model_zoo.get_config(f"{FOLDER}/ms_rcnn_{backbone}_FPN_2x.py")
    assert list(cfg.model.pixel_mean) == pytest.approx(mean)
    assert list(cfg.model.pixel_std) == pytest.approx(std)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("R_50_FPN_2x", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"),
        ("R_101_FPN_2x", "detectron2://ImageNetPretrained/MSRA/R-101.pkl"),
        ("X_101_32x4d_FPN_1x", "resnext101_32x4d-a5af3160.pth"),
        ("X_101_64x4d_FPN_2x", "resnext101_64x4d-ee2c6f71.pth"),
    ],
)
def test_initial_weights(name, expected):
    cfg = model_zoo.get_config(f"{FOLDER}/ms_rcnn_{name}.py")
    assert cfg.train.init_checkpoint.endswith(expected)


DETECTRON2_CONFIGS = [
    ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py", MaskScoringROIHeads),
    ("COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py", MaskScoringROIHeads),
    ("common/models/cascade_rcnn.py", CascadeMaskScoringROIHeads),
    ("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py", MaskScoringROIHeads),
    ("new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py", MaskScoringROIHeads),
]


@pytest.mark.parametrize("name, roi_heads", DETECTRON2_CONFIGS)
def test_add_mask_scoring_to_a_config_of_detectron2(name, roi_heads):
    cfg = detectron2_zoo.get_config(name)
    before = str(cfg)
    twin = add_mask_scoring(cfg)
    assert str(cfg) == before  # the argument is left as it was

    plain, scoring = build_without_memory(cfg), build_without_memory(twin)
    assert type(scoring.roi_heads) is roi_heads
    added = set(scoring.state_dict()) - set(plain.state_dict())
    assert added and all(k.startswith("roi_heads.mask_iou_head.") for k in added)
    assert set(plain.state_dict()) < set(scoring.state_dict())
    assert scoring.roi_heads.mask_iou_head.predictor.out_features == 80
    assert scoring.roi_heads.mask_iou_head.convs.conv1.in_channels == 257


def test_add_mask_scoring_to_vitdet():
    try:
        cfg = detectron2_zoo.get_config("common/models/mask_rcnn_vitdet.py")
    except RuntimeError:
        pytest.skip("the installed Detectron2 has no ViTDet; its main branch has")
    pytest.importorskip("timm", reason="Detectron2's ViT needs timm")
    cfg.model.backbone.net.update(depth=1, embed_dim=24, window_block_indexes=[], img_size=64)
    model = instantiate(add_mask_scoring(cfg).model)  # it computes values when it is built
    assert type(model.roi_heads) is MaskScoringROIHeads
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    model.backbone.square_pad = 64
    instances = model.eval()([{"image": torch.zeros(3, 64, 64)}])[0]["instances"]
    assert len(instances.mask_scores) == len(instances)


def test_add_mask_scoring_sets_arguments_of_the_head_and_the_evaluator():
    cfg = detectron2_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
    twin = add_mask_scoring(cfg, conv_dim=16, num_fc=1, fc_dim=32)
    head = build_without_memory(twin).roi_heads.mask_iou_head
    assert (head.convs.conv4.out_channels, head.predictor.in_features) == (16, 32)
    assert twin.dataloader.evaluator._target_ is MaskScoringCOCOEvaluator
    assert cfg.dataloader.evaluator._target_ is COCOEvaluator


def test_add_mask_scoring_to_a_saved_config(tmp_path):
    cfg = tiny_mask_rcnn()
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    twin = add_mask_scoring(LazyConfig.load(str(tmp_path / "config.yaml")))
    assert isinstance(build_without_memory(twin).roi_heads, MaskScoringROIHeads)


@pytest.mark.parametrize(
    "name, message",
    [
        ("common/models/retinanet.py", "model.roi_heads"),
        ("common/models/keypoint_rcnn_fpn.py", "mask branch"),
        ("common/train.py", "model.roi_heads"),
    ],
)
def test_add_mask_scoring_refuses_what_it_cannot_turn(name, message):
    with pytest.raises(ValueError, match=message):
        add_mask_scoring(detectron2_zoo.get_config(name))


def test_add_mask_scoring_refuses_a_calibrated_model_without_predicted_ious():
    cfg = detectron2_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
    with pytest.raises(ValueError, match="^The model has a calibrator, .* calibrate the new model"):
        add_mask_scoring(add_mask_calibrator(cfg))
    # One that has them needs no second head
    with pytest.raises(ValueError, match="not MaskScoringROIHeads"):
        add_mask_scoring(add_mask_calibrator(add_mask_scoring(cfg)))


def test_add_mask_scoring_refuses_boxes_only():
    cfg = tiny_mask_rcnn()
    del cfg.model.roi_heads.mask_head
    with pytest.raises(ValueError, match="no mask_head"):
        add_mask_scoring(cfg)


def test_unknown_config_names_the_nearest():
    with pytest.raises(UserError, match="ms_rcnn_R_50_FPN_1x.py"):
        model_zoo.get_config_file(f"{FOLDER}/ms_rcnn_R50_FPN_1x.py")


def test_published_results_belong_to_shipped_configs():
    assert {f"{FOLDER}/{name}" for name in published_models.PUBLISHED} < set(NAMES)
    published = published_models.published_results("anywhere/ms_rcnn_R_101_FPN_2x.yaml")
    assert (published.box_ap, published.mask_ap) == (41.1, 38.1)
    assert published_models.published_results("ms_rcnn_X_101_32x4d_FPN_1x.py") is None
