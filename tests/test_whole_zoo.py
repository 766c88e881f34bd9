"""
All mask models of Detectron2's model zoo: with mask scores, and retrofitted, each trains a step and
predicts. docs/your_model.md has the list.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY

from msrcnn_d2 import add_mask_scoring, add_msrcnn_config, retrofit
from msrcnn_d2.config import TWINS
from tests.helpers.toy import IMAGE_SIZE, toy_inputs

CONFIGS = Path(detectron2_zoo.__file__).parent / "configs"
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


def plain_config(name):
    """As Detectron2 has it."""
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
    for path in sorted([*CONFIGS.rglob("*.yaml"), *CONFIGS.rglob("*.py")]):
        name = str(path.relative_to(CONFIGS))
        if path.name.startswith("Base-") or name.startswith(("common/", "quick_schedules/")):
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


@pytest.mark.parametrize("name", sorted(set(zoo().values())))
def test_it_trains_and_predicts(name, event_storage):
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


def test_the_documentation_has_the_list():
    page = (Path(__file__).parents[1] / "docs/your_model.md").read_text()
    rows = re.findall(r"^\| `(.*?)` \| (`.*`) \|$", page, re.MULTILINE)
    listed = [f"{folder}/{name}" for folder, names in rows for name in re.findall("`(.*?)`", names)]
    assert sorted(listed) == sorted(zoo())
    assert f"All {len(zoo())} mask models" in page
    assert f"each of the {len(set(zoo().values()))} different ones" in page
