"""Mask heads that compute their own losses and masks: a toy one, and those of PointRend."""

import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn

from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from msrcnn_d2 import (
    MaskScoringPredictor,
    add_mask_calibrator,
    add_mask_scoring,
    add_msrcnn_config,
    retrofit,
)
from msrcnn_d2.checkpoint import MaskScoringCheckpointer
from msrcnn_d2.engine.configs import load_config
from msrcnn_d2.export import export_onnx, export_torchscript
from msrcnn_d2.export.checking import FLOAT32, compared
from msrcnn_d2.modeling import MaskScoringRCNNWithTTA, MaskScoringROIHeads, RetrofitRCNN
from msrcnn_d2.modeling.acceleration import compile_dense_parts
from msrcnn_d2.utils.errors import UserError
from tests.helpers import toy_training
from tests.helpers.toy import (
    CHANNELS,
    IMAGE_SIZE,
    NUM_CLASSES,
    built,
    tiny_mask_rcnn,
    tiny_yacs_config,
    toy_features,
    toy_inputs,
    toy_instances,
    with_distinct_masks,
    without_objects,
    without_proposals,
)

FIELDS = {"pred_boxes", "scores", "pred_classes", "pred_masks", "pred_mask_ious", "mask_scores"}
HEAD = {"conv_dim": CHANNELS, "num_conv": 2, "fc_dim": 16}


def exact_proposals():
    """The boxes of the objects."""
    return [
        Instances(
            IMAGE_SIZE, proposal_boxes=x.gt_boxes, objectness_logits=torch.ones(len(x.gt_boxes))
        )
        for x in toy_instances()
    ]


# ---- the seam


class LeftPart(nn.Module):
    """The mask of class k is the left (k + 1) / 4 of its box. `forward` has losses of its own."""

    def __init__(self, side=28):
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs, instances):
        if self.training:
            assert all(type(x.gt_masks).__module__.startswith("detectron2.") for x in instances)
            return {"loss_own": self.weight * 3}
        for x in instances:
            x.pred_masks = torch.full((len(x), 1, 56, 56), 0.25)
        return instances

    def mask_logits(self, inputs, boxes):
        part = torch.arange(self.side) / self.side
        share = (torch.arange(NUM_CLASSES) + 1) / 4
        masks = (part < share[:, None])[None, :, None, :] * 20.0 - 10
        return masks.expand(sum(len(x) for x in boxes), -1, self.side, -1)


def roi_heads_with(mask_head, cascade=False, pools_itself=True, **head):
    cfg = tiny_mask_rcnn(cascade)
    if pools_itself:
        cfg.model.roi_heads.mask_pooler = None
        cfg.model.roi_heads.mask_head = {"_target_": mask_head}
    else:
        shape = cfg.model.roi_heads.mask_head.input_shape
        cfg.model.roi_heads.mask_head = {"_target_": lambda input_shape: mask_head()}
        cfg.model.roi_heads.mask_head.input_shape = shape
    return instantiate(add_mask_scoring(cfg, **{**HEAD, **head}).model.roi_heads)


@pytest.mark.parametrize("cascade", [False, True], ids=["standard", "cascade"])
@pytest.mark.parametrize("pools_itself", [False, True])
def test_a_head_with_mask_logits_keeps_its_losses_and_masks(cascade, pools_itself, event_storage):
    heads = roi_heads_with(LeftPart, cascade, pools_itself)
    exact, truth = exact_proposals(), toy_instances("bitmask")
    _, losses = heads.train()(None, toy_features(), exact, truth)
    assert losses["loss_own"] == 3 and "loss_mask" not in losses
    assert losses["loss_mask_iou"].isfinite()

    with torch.no_grad():
        for x in heads.eval()(None, toy_features(), exact)[0]:
            assert len(x) and x.get_fields().keys() == FIELDS
            assert (x.pred_masks == 0.25).all() and x.pred_masks.shape[-1] == 56


def test_the_target_is_the_iou_of_the_mask_of_the_class(event_storage):
    """Objects fill their boxes, so that the left (k + 1) / 4 of a box has this IoU with its own."""
    heads = roi_heads_with(LeftPart).train()
    classes = torch.tensor([0, 1, 2])
    truth = Instances(IMAGE_SIZE, gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]] * 3)))
    mask = torch.zeros(3, *IMAGE_SIZE, dtype=torch.bool)
    mask[:, 8:40, 8:40] = True
    proposals = [
        Instances(
            IMAGE_SIZE,
            proposal_boxes=truth.gt_boxes,
            gt_classes=classes,
            gt_masks=type(toy_instances("bitmask")[0].gt_masks)(mask),
        )
    ]
    features = {k: v[:1] for k, v in toy_features().items()}
    seen = []
    heads.mask_iou_head.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    heads.mask_iou_losses(features, proposals)
    heads._forward_mask(features, proposals)
    for probs in seen:
        assert probs.shape == (3, 1, 28, 28)
        assert (probs > 0.5).float().mean(dim=(1, 2, 3)).tolist() == [0.25, 0.5, 0.75]
    assert len(seen) == 2
    mean = event_storage.latest()["mask_iou/mean_target"][0]
    assert mean == pytest.approx((0.25 + 0.5 + 0.75) / 3)

    found = [Instances(IMAGE_SIZE, pred_boxes=truth.gt_boxes, pred_classes=classes)]
    heads.eval()._forward_mask(features, found)
    assert torch.equal(seen[2], seen[1])
    assert found[0].has("pred_mask_ious") and not found[0].has("mask_scores")


def test_masks_that_the_mask_iou_head_cannot_pool_are_an_error(event_storage):
    heads = roi_heads_with(lambda: LeftPart(side=20))
    proposals, truth = exact_proposals(), toy_instances("bitmask")
    with pytest.raises(ValueError, match=r"20 x 20.*14"):
        heads.train()(None, toy_features(), proposals, truth)


def test_heads_that_pool_need_a_pooler_for_the_mask_iou_head():
    cfg = tiny_mask_rcnn()
    cfg.model.roi_heads.mask_pooler = None
    cfg.model.roi_heads.mask_head = {"_target_": LeftPart}
    cfg = add_mask_scoring(cfg)
    del cfg.model.roi_heads.mask_iou_pooler
    cfg.model.roi_heads.mask_iou_head.input_shape = ShapeSpec(CHANNELS, 14, 14)
    with pytest.raises(ValueError, match="mask_iou_pooler"):
        instantiate(cfg.model.roi_heads)


def test_nothing_is_pooled_for_a_calibrator_alone():
    cfg = tiny_mask_rcnn()
    cfg.model.roi_heads.mask_pooler = None
    cfg.model.roi_heads.mask_head = {"_target_": LeftPart}
    heads = instantiate(add_mask_calibrator(cfg).model.roi_heads).eval()
    with torch.no_grad():
        for x in heads(None, toy_features(), exact_proposals())[0]:
            assert x.has("quality_scores") and not x.has("mask_scores")


# ---- PointRend


@pytest.fixture(params=["PointRend", "ImplicitPointRend"])
def implicit(request):
    pytest.importorskip("detectron2.projects.point_rend", reason="needs PointRend and OpenCV")
    return request.param == "ImplicitPointRend"


@pytest.fixture
def point_rend():
    reason = "needs PointRend and OpenCV"
    return pytest.importorskip("detectron2.projects.point_rend", reason=reason)


# As in the project's yaml files, but small
OPTIONS = {
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.NAME": "PointRendMaskHead",
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "",
    "MODEL.ROI_MASK_HEAD.POINT_HEAD_ON": True,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": CHANNELS,
    "MODEL.ROI_MASK_HEAD.FC_DIM": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.POINT_HEAD.NUM_CLASSES": NUM_CLASSES,
    "MODEL.POINT_HEAD.FC_DIM": 8,
    "INPUT.MASK_FORMAT": "bitmask",
    "TEST.DETECTIONS_PER_IMAGE": 5,
}
IMPLICIT = {
    "MODEL.ROI_MASK_HEAD.NAME": "ImplicitPointRendMaskHead",
    "MODEL.POINT_HEAD.NAME": "ImplicitPointHead",
    "MODEL.POINT_HEAD.NUM_FC": 1,
    "MODEL.POINT_HEAD.SUBDIVISION_STEPS": 3,
}


def options(implicit):
    chosen = {**OPTIONS, **(IMPLICIT if implicit else {})}
    return [x for item in chosen.items() for x in item]


def plain_lazy(implicit=False):
    """The LazyConfig of a PointRend, without scores."""
    from detectron2.projects import point_rend

    yacs = get_cfg()
    point_rend.add_pointrend_config(yacs)
    yacs.merge_from_list(options(implicit))
    cfg = tiny_mask_rcnn()
    heads = cfg.model.roi_heads
    heads.train_on_pred_boxes = True
    heads.box_predictor.test_topk_per_image = 5
    heads.mask_pooler = None
    shapes = {f"p{k}": ShapeSpec(channels=CHANNELS, stride=2**k) for k in (2, 3, 4, 5)}
    name = yacs.MODEL.ROI_MASK_HEAD.NAME
    heads.mask_head = {"_target_": getattr(point_rend, name), "cfg": yacs, "input_shape": shapes}
    return cfg


def yacs_config(implicit=False):
    from detectron2.projects.point_rend import add_pointrend_config

    cfg = tiny_yacs_config()
    add_pointrend_config(cfg)
    cfg.merge_from_list(options(implicit))
    return cfg


def losses_of(model):
    torch.manual_seed(2)
    return model.train()(toy_inputs("bitmask"))


def test_everything_else_is_as_in_point_rend(implicit, event_storage):
    plain = with_distinct_masks(built(plain_lazy(implicit)))
    scoring = built(add_mask_scoring(plain_lazy(implicit), **HEAD))
    result = scoring.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(x.startswith("roi_heads.mask_iou_head.") for x in result.missing_keys)

    expected, found = losses_of(plain), losses_of(scoring)
    assert found.keys() - expected.keys() == {"loss_mask_iou"}
    assert all(torch.equal(found[name], loss) for name, loss in expected.items())
    found.pop("loss_mask_iou")
    for losses in (expected, found):
        sum(losses.values()).backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(scoring.get_parameter(name).grad, parameter.grad), name

    inputs = toy_inputs()
    with torch.no_grad():
        for one, other in zip(plain.eval()(inputs), scoring.eval()(inputs)):
            one, other = one["instances"], other["instances"]
            assert len(one) > 0 and one.pred_masks.any()
            assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
            for name in ("scores", "pred_classes", "pred_masks"):
                assert torch.equal(one.get(name), other.get(name)), name


@torch.no_grad()
def test_the_scored_mask_is_the_one_that_refinement_starts_from(implicit):
    heads = with_distinct_masks(built(add_mask_scoring(plain_lazy(implicit), **HEAD))).roi_heads
    features = toy_features()
    found = heads.eval()(None, features, exact_proposals())[0]
    logits = heads._mask_logits({f: features[f] for f in heads.mask_in_features}, found)

    heads.mask_head.mask_point_subdivision_steps = 0
    unrefined = [Instances(x.image_size, **x.get_fields()) for x in found]
    heads.mask_head(features, unrefined)
    expected = torch.cat([x.pred_masks for x in unrefined])
    assert expected.shape[-1] == 28 and expected.std() > 0.1
    torch.testing.assert_close(logits.sigmoid(), expected)


@pytest.mark.parametrize("kind", ["yacs", "LazyConfig", "saved LazyConfig"])
def test_whole_models_train_and_predict(kind, implicit, event_storage, tmp_path):
    if kind == "yacs":
        model = build_model(yacs_config(implicit))
    else:
        cfg = add_mask_scoring(plain_lazy(implicit), **HEAD)
        if kind == "saved LazyConfig":
            LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
            cfg = LazyConfig.load(str(tmp_path / "config.yaml"))
        model = built(cfg)
    assert type(model.roi_heads) is MaskScoringROIHeads

    losses = losses_of(model)
    assert "loss_mask_iou" in losses and "loss_mask_point" in losses
    sum(losses.values()).backward()
    for name, parameter in model.roi_heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    with torch.no_grad():
        for output in model.eval()(toy_inputs()):
            instances = output["instances"]
            assert len(instances) > 0
            assert instances.get_fields().keys() == FIELDS
            assert instances.pred_masks.shape[1:] == IMAGE_SIZE
            assert torch.equal(instances.mask_scores, instances.scores * instances.pred_mask_ious)


def test_without_objects_or_detections(implicit, event_storage):
    heads = built(add_mask_scoring(plain_lazy(implicit), **HEAD)).roi_heads
    nothing = [without_proposals(), without_proposals()]
    # PointRend's own losses fail if no image of a batch has an object
    sampled = heads.eval().label_and_sample_proposals(nothing, [without_objects()] * 2)
    heads.mask_iou_head.train()
    losses = heads.mask_iou_losses(toy_features(), sampled)
    assert losses["loss_mask_iou"] == 0
    losses["loss_mask_iou"].backward()
    assert all(x.grad is not None for x in heads.mask_iou_head.parameters())
    with torch.no_grad():
        for x in heads.eval()(None, toy_features(), nothing)[0]:
            assert len(x) == 0 and x.get_fields().keys() == FIELDS


@pytest.mark.parametrize("learn_from", ["proposals", "detections"])
@pytest.mark.parametrize("kind", ["yacs", "LazyConfig", "older yacs"])
def test_retrofit(kind, learn_from, point_rend, event_storage):
    if kind == "LazyConfig":
        model = built(retrofit(plain_lazy(), learn_from, **HEAD))
    else:
        cfg = yacs_config()
        older = kind == "older yacs"
        cfg.MODEL.ROI_HEADS.NAME = "PointRendROIHeads" if older else "StandardROIHeads"
        model = build_model(retrofit(cfg, learn_from))
    assert type(model) is RetrofitRCNN and type(model.roi_heads) is MaskScoringROIHeads
    losses = losses_of(model)
    assert losses.keys() == {"loss_mask_iou"}
    losses["loss_mask_iou"].backward()
    trained = {name for name, x in model.named_parameters() if x.grad is not None}
    assert trained == {
        f"roi_heads.{x}" for x, _ in model.roi_heads.named_parameters() if "mask_iou" in x
    }


def test_a_calibrator_scores_masks(point_rend):
    yacs = yacs_config()
    yacs.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    for model in (built(add_mask_calibrator(plain_lazy())), build_model(add_mask_calibrator(yacs))):
        with torch.no_grad():
            (instances, _) = (x["instances"] for x in model.eval()(toy_inputs()))
        assert instances.has("quality_scores") and not instances.has("pred_mask_ious")


def test_test_time_augmentation(point_rend):
    cfg = yacs_config()
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (IMAGE_SIZE[0],), True
    inputs = toy_inputs()
    for x in inputs:
        x["image"] = x["image"].to(torch.uint8)
    with torch.no_grad():
        for output in MaskScoringRCNNWithTTA(cfg, build_model(cfg).eval())(inputs):
            assert len(output["instances"]) > 0
            assert output["instances"].get_fields().keys() == FIELDS


def test_a_head_without_layers_is_not_compiled(point_rend):
    model = built(add_mask_scoring(plain_lazy(), **HEAD))
    compile_dense_parts(model)
    assert "layers" in vars(model.roi_heads.mask_iou_head)
    assert "layers" not in vars(model.roi_heads.mask_head)


@pytest.mark.parametrize("age", ["before November 2020", "before April 2021", "today"])
def test_weights_of_all_ages_load(age, point_rend, tmp_path):
    weights = built(plain_lazy()).state_dict()
    old = {}
    for name, value in weights.items():
        if age != "today":
            name = name.replace("coarse_head.fc", "coarse_head.coarse_mask_fc")
        if age == "before November 2020":
            name = name.replace("mask_head.coarse_head.", "mask_coarse_head.")
            name = name.replace("mask_head.point_head.", "mask_point_head.")
        old[name] = value
    assert (old.keys() == weights.keys()) is (age == "today")
    torch.save({"model": old}, tmp_path / "model.pth")

    model = instantiate(plain_lazy().model)
    MaskScoringCheckpointer(model).load(str(tmp_path / "model.pth"), strict=True)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


# ---- yaml files


@pytest.fixture
def yaml_file(point_rend, tmp_path):
    """A config as PointRend's own are: without what our package adds."""
    cfg = get_cfg()
    point_rend.add_pointrend_config(cfg)
    before = copy.deepcopy(cfg)
    cfg.merge_from_list([*options(implicit=False), "MODEL.ROI_HEADS.NAME", "StandardROIHeads"])
    path = tmp_path / "point_rend.yaml"
    path.write_text(dump_of_changes(cfg, before).dump())
    return str(path)


def dump_of_changes(cfg, before):
    changed = type(cfg)()
    for key, value in cfg.items():
        if isinstance(value, type(cfg)):
            value = dump_of_changes(value, before[key])
            if not value:
                continue
        elif value == before[key]:
            continue
        changed[key] = value
    return changed


def test_yaml_files_of_point_rend_are_read(yaml_file):
    cfg = load_config(yaml_file, ["MODEL.ROI_HEADS.NAME=MaskScoringROIHeads"])
    assert cfg.MODEL.POINT_HEAD.FC_DIM == 8 and cfg.MODEL.POINT_HEAD.SUBDIVISION_STEPS == 5
    cfg = load_config(yaml_file, retrofitted=True, weights="model.pkl")
    assert cfg.MODEL.ROI_HEADS.NAME == "MaskScoringROIHeads"
    assert cfg.INPUT.MASK_FORMAT == "bitmask"

    with open(yaml_file, "w") as f:
        f.write(cfg.dump())  # what a run saves
    again = load_config(yaml_file).MODEL
    assert again.META_ARCHITECTURE == "RetrofitRCNN" and again.POINT_HEAD.FC_DIM == 8


def test_a_lazy_config_of_point_rend_reads_bitmasks(point_rend, tmp_path):
    cfg = toy_training.lazy_config()
    assert "instance_mask_format" not in cfg.dataloader.train.mapper
    path = str(tmp_path / "config.yaml")
    for model, expected in ((plain_lazy().model, "bitmask"), (tiny_mask_rcnn().model, None)):
        cfg.model = model
        LazyConfig.save(cfg, path)
        mapper = load_config(path).dataloader.train.mapper
        assert mapper.get("instance_mask_format") == expected


class Missing:
    """A finder that fails to find a module, as if one that it needs were not installed."""

    def __init__(self, needed):
        self.needed = needed

    def find_spec(self, name, path=None, target=None):
        if name == "detectron2.projects.point_rend":
            raise ModuleNotFoundError(f"No module named '{self.needed}'", name=self.needed)


@pytest.mark.parametrize(
    "needed, advice",
    [("cv2", "pip install opencv"), ("detectron2.projects", "this installation of Detectron2")],
)
def test_without_what_it_needs_a_yaml_file_says_so(needed, advice, yaml_file, monkeypatch):
    monkeypatch.delitem(sys.modules, "detectron2.projects.point_rend")
    monkeypatch.setattr(sys, "meta_path", [Missing(needed), *sys.meta_path])
    with pytest.raises(UserError, match=advice):
        load_config(yaml_file)


def test_other_yaml_files_get_no_keys_of_point_rend(tmp_path):
    path = tmp_path / "plain.yaml"
    cfg = get_cfg()
    add_msrcnn_config(cfg)
    path.write_text(cfg.dump())  # ROI_KEYPOINT_HEAD is in it
    assert "POINT_HEAD" not in load_config(str(path)).MODEL


# ---- export


def test_masks_of_another_resolution_do_not_agree():
    found = {"boxes": np.zeros((1, 4)), "scores": np.ones(1), "classes": np.zeros(1, int)}
    model, file = ({**found, "masks": np.zeros((1, side, side))} for side in (28, 224))
    with pytest.raises(UserError, match="224, 224.*28, 28"):
        compared(model, file, IMAGE_SIZE, FLOAT32)


def test_export(point_rend, tmp_path):
    cfg = yacs_config()
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "x.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "x.pth")
    predict = MaskScoringPredictor(cfg, class_names=["a", "b", "c"])
    with pytest.raises(UserError, match="torchscript"):
        export_onnx(predict, tmp_path / "x.onnx")

    export_torchscript(predict, tmp_path / "x.ts")
    image = torch.randint(256, (*IMAGE_SIZE, 3), dtype=torch.uint8)
    found = torch.jit.load(tmp_path / "x.ts")(image)
    expected = predict(image.flip(-1).numpy())["instances"]
    assert len(expected) and found["masks"].shape[1:] == (224, 224)
    torch.testing.assert_close(found["mask_scores"].sort()[0], expected.mask_scores.sort()[0])
