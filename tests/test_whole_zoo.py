"""
All mask models of Detectron2's model zoo: with mask scores, and retrofitted, each trains a step and
predicts. docs/your_model.md has the list. The projects of the main branch, ViTDet and MViTv2, are
tested where that is installed from a checkout, which has them beside the package.
"""

import re
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import detectron2
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY

from msrcnn_d2 import add_mask_scoring, add_msrcnn_config, retrofit
from msrcnn_d2.config import TWINS, target_of
from tests.helpers.toy import IMAGE_SIZE, toy_inputs

CONFIGS = Path(detectron2_zoo.__file__).parent / "configs"
CHECKOUT = Path(detectron2.__file__).parents[1]
PROJECTS = ["projects/MViTv2/configs", "projects/ViTDet/configs"]
# A side of the square that some models pad images to; Swin's windows have 7 cells of 4 pixels
SQUARE = 112
# Group normalisation has 32 groups
CHANNELS = 32
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": CHANNELS,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": CHANNELS,
    "MODEL.FPN.OUT_CHANNELS": CHANNELS,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": CHANNELS,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": CHANNELS,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": CHANNELS,
    "MODEL.ROI_MASK_IOU_HEAD.CONV_DIM": 8,
    "MODEL.ROI_MASK_IOU_HEAD.FC_DIM": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
}
# Synchronised batch norm is for GPUs
NORMS = ["RESNETS", "FPN", "SEM_SEG_HEAD", "ROI_BOX_HEAD", "ROI_MASK_HEAD"]
FIELDS = {"pred_boxes", "scores", "pred_classes", "pred_masks", "pred_mask_ious", "mask_scores"}
# Transformers in the same form, with few layers: the arguments by the class
SMALL_TRANSFORMERS = {
    "ViT": {
        **{"embed_dim": 16, "depth": 2, "num_heads": 2, "window_block_indexes": [0]},
        **{"img_size": SQUARE, "use_act_checkpoint": False},
    },
    "MViT": {
        **{"embed_dim": 8, "depth": 4, "num_heads": 1, "last_block_indexes": [0, 1, 2, 3]},
        **{"img_size": SQUARE, "use_act_checkpoint": False},
    },
    "SwinTransformer": {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
}


def plain_config(name):
    """As Detectron2 has it."""
    if name.startswith("projects/"):
        return LazyConfig.load(str(CHECKOUT / name))
    if name.endswith(".py"):
        return detectron2_zoo.get_config(name)
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    return cfg


def has_masks(cfg):
    if isinstance(cfg, CfgNode):
        return cfg.MODEL.MASK_ON
    return OmegaConf.select(cfg, "model.roi_heads.mask_head") is not None


def model_of(cfg):
    """What distinguishes the models of two configs, as text."""
    if isinstance(cfg, CfgNode):
        cfg = cfg.clone()
        cfg.MODEL.WEIGHTS = ""
        return cfg.MODEL.dump()
    return re.sub(" at 0x[0-9a-f]+", "", str(cfg.model))


@cache
def zoo():
    """{name of a config: the first one that has the same model}."""
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    paths = [p for suffix in ("yaml", "py") for p in CONFIGS.rglob(f"*.{suffix}")]
    found = [str(p.relative_to(CONFIGS)) for p in paths]
    for folder in PROJECTS:
        found += [str(p.relative_to(CHECKOUT)) for p in (CHECKOUT / folder).rglob("*.py")]
    for name in sorted(found):
        path = Path(name)
        if path.name.startswith("Base-") or path.parts[0] == "quick_schedules":
            continue
        if "common" in path.parts:
            continue
        cfg = plain_config(name)
        if "model" in cfg or isinstance(cfg, CfgNode):
            if has_masks(cfg):
                names[name] = first.setdefault(model_of(cfg), name)
    return names


def with_scores(cfg):
    if not isinstance(cfg, CfgNode):
        return add_mask_scoring(cfg, conv_dim=8, fc_dim=16)
    add_msrcnn_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME = TWINS[ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)].__name__
    return cfg


def built(cfg):
    """A small model, if the config is yaml. LazyConfigs have the size that they say."""
    torch.manual_seed(0)
    if not isinstance(cfg, CfgNode):
        model = cfg.model
        for key in ("backbone.norm", "backbone.bottom_up.norm", "backbone.bottom_up.stages.norm"):
            if OmegaConf.select(model, key) == "SyncBN":
                OmegaConf.update(model, key, "BN")
        model.proposal_generator.post_nms_topk = (50, 20)
        model.roi_heads.batch_size_per_image = 16
        for key in ("net", "bottom_up"):
            transformer = OmegaConf.select(model.backbone, key)
            name = getattr(transformer and target_of(transformer), "__name__", "")
            if name in SMALL_TRANSFORMERS:
                transformer.update(SMALL_TRANSFORMERS[name])
        if model.backbone.get("square_pad"):
            model.backbone.square_pad = SQUARE
        heads = model.roi_heads
        for predictor in heads.get("box_predictors") or [heads.box_predictor]:
            predictor.test_topk_per_image = 10  # LVIS: 300, each with 1203 masks
        return instantiate(model)
    for key, value in SMALL.items():
        cfg.merge_from_list([key, value])
    cfg.MODEL.RESNETS.NUM_GROUPS = min(cfg.MODEL.RESNETS.NUM_GROUPS, 2)
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = CHANNELS // cfg.MODEL.RESNETS.NUM_GROUPS
    for name in NORMS:
        if cfg.MODEL[name].NORM == "SyncBN":
            cfg.MODEL[name].NORM = "BN"
    return build_model(cfg)


def inputs():
    stuff = torch.zeros(IMAGE_SIZE, dtype=torch.long)
    return [{**x, "sem_seg": stuff} for x in toy_inputs()]


# Detectron2's own needs a GPU to train; the one of our build does not
NO_DEFORMABLE_TRAINING = find_spec("detectron2.layers.torchvision_deform_conv") is None


@pytest.mark.parametrize("name", sorted(set(zoo().values())))
def test_it_trains_and_predicts(name, event_storage):
    if "dconv" in name and NO_DEFORMABLE_TRAINING:
        pytest.skip("this Detectron2 trains deformable convolutions on GPUs only")
    model = built(with_scores(plain_config(name)))
    losses = model(inputs())
    assert "loss_mask_iou" in losses
    assert all(x.isfinite() for x in losses.values()), losses
    sum(losses.values()).backward()
    head = model.roi_heads.mask_iou_head
    assert all(x.grad is not None and x.grad.isfinite().all() for x in head.parameters())
    with torch.no_grad():
        for output in model.eval()(inputs()):
            assert output["instances"].get_fields().keys() == FIELDS
            assert ("panoptic_seg" in output) == ("panoptic" in name)


@pytest.mark.parametrize("name", sorted(set(zoo().values())))
def test_it_can_be_retrofitted(name, event_storage):
    options = {"conv_dim": 8, "fc_dim": 16}
    cfg = retrofit(plain_config(name), "detections", **options)
    model = built(cfg)
    before = {k: x.clone() for k, x in model.state_dict().items()}
    losses = model(inputs())
    assert losses.keys() == {"loss_mask_iou"} and losses["loss_mask_iou"].isfinite()
    losses["loss_mask_iou"].backward()
    trained = {k for k, x in model.named_parameters() if x.grad is not None}
    assert trained and all(k.startswith("roi_heads.mask_iou_head.") for k in trained)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    with torch.no_grad():
        for output in model.eval()(inputs()):
            assert output["instances"].get_fields().keys() == FIELDS
            assert ("panoptic_seg" in output) == ("panoptic" in name)


@pytest.mark.parametrize("name", [x for x in zoo() if x.startswith("projects/")])
def test_in_full_size_it_differs_in_the_mask_iou_head_only(name, monkeypatch):
    # Detectron2's transformers read values of this tensor when they are built
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    plain = plain_config(name)
    if "bottom_up" in plain.model.backbone:  # checkpoints of activations need fairscale
        plain.model.backbone.bottom_up.pop("use_act_checkpoint", None)
    with torch.device("meta"):
        model, scored = instantiate(plain.model), instantiate(add_mask_scoring(plain).model)
    shapes = {k: x.shape for k, x in model.state_dict().items()}
    found = {k: x.shape for k, x in scored.state_dict().items()}
    head = {k for k in found if k.startswith("roi_heads.mask_iou_head.")}
    assert {k: x for k, x in found.items() if k not in head} == shapes
    assert found["roi_heads.mask_iou_head.convs.conv1.weight"] == (256, 257, 3, 3)
    classes = 1203 if "/LVIS/" in name else 80
    assert found["roi_heads.mask_iou_head.predictor.weight"] == (classes, 1024)


# Mask models that the page lists as not working, and what the error says about them
OTHERS = {"Misc/mmdet_mask_rcnn_R_50_FPN_1x.py": "model.roi_heads.*MMDetDetector"}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("change", [add_mask_scoring, retrofit])
def test_what_cannot_says_why(name, change):
    with pytest.raises(ValueError, match=OTHERS[name]):
        change(plain_config(name))


def test_the_documentation_has_the_list():
    page = (Path(__file__).parents[1] / "docs/your_model.md").read_text()
    rows = re.findall(r"^\| `(.*?)` \| (`.*`) \|$", page, re.MULTILINE)
    listed = [f"{folder}/{name}" for folder, names in rows for name in re.findall("`(.*?)`", names)]
    if not (CHECKOUT / PROJECTS[0]).is_dir():
        listed = [x for x in listed if not x.startswith("projects/")]
    assert sorted(listed) == sorted(zoo())
    without = page[page.index("These do not work") :]
    assert all(f"`{name}`" in without for name in OTHERS)
    for of_projects, words in {False: "each of", True: "includes"}.items():
        names = {k: v for k, v in zoo().items() if k.startswith("projects/") == of_projects}
        if names:
            assert re.search(f"[Aa]ll {len(names)} mask models", page)
            assert f"{words} the {len(set(names.values()))} different ones" in page
