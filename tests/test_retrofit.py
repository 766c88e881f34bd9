"""Retrofit: mask scores for a trained Mask R-CNN, which stays the same bit for bit."""

import json
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import detectron2.data.transforms as T
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import RetinaNet, build_model
from detectron2.modeling.roi_heads import RROIHeads
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.solver.build import get_default_optimizer_params
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from msrcnn_d2 import add_mask_scoring, retrofit
from msrcnn_d2.engine import find_config_file, load_config
from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator
from msrcnn_d2.modeling import CascadeMaskScoringROIHeads, MaskScoringROIHeads, RetrofitRCNN
from msrcnn_d2.modeling.mask_iou_target import crop_gt_masks
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_cli import main
from tests.helpers.toy import (
    tiny_mask_rcnn,
    tiny_yacs_config,
    toy_features,
    toy_inputs,
    toy_proposals,
    without_objects,
    write_coco_json,
    write_images,
)

HEAD = "roi_heads.mask_iou_head."
SMALL = dict(conv_dim=8, num_conv=2, fc_dim=16)
FOLDER = "COCO-InstanceSegmentation"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x"
KINDS = ["lazy", "lazy cascade", "yacs", "yacs cascade"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def plain_config(kind):
    """A tiny Mask R-CNN without mask scoring."""
    cascade = kind.endswith("cascade")
    if kind.startswith("lazy"):
        return tiny_mask_rcnn(cascade)
    cfg = tiny_yacs_config(cascade)
    cfg.MODEL.ROI_HEADS.NAME = "CascadeROIHeads" if cascade else "StandardROIHeads"
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return cfg


def build(cfg):
    return instantiate(cfg.model) if "model" in cfg else build_model(cfg)


def optimizer_of(cfg, model):
    if "model" in cfg:
        return torch.optim.AdamW(get_default_optimizer_params(model), lr=1e-3)
    return build_optimizer(cfg, model)


def train_plain(cfg):
    """A Mask R-CNN that is not quite as it was built, nor are its batch norms."""
    torch.manual_seed(0)
    model = build(cfg).train()
    with EventStorage():
        loss = sum(model(toy_inputs()).values())
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    return model.eval()


def retrofitted(cfg, plain):
    """The model to train, with the weights of the trained one, and its optimizer."""
    cfg = retrofit(cfg, **SMALL)
    model = build(cfg)
    keys = model.load_state_dict(plain.state_dict(), strict=False)
    assert keys.missing_keys and all(k.startswith(HEAD) for k in keys.missing_keys)
    assert not keys.unexpected_keys
    return model.train(), optimizer_of(cfg, model)


def loss_of(model, inputs=None):
    with EventStorage():
        losses = model(inputs or toy_inputs())
    assert set(losses) == {"loss_mask_iou"}
    return losses["loss_mask_iou"]


def train_steps(model, optimizer, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


@pytest.fixture
def trained(kind):
    """(plain Mask R-CNN, model after some steps of retrofitting, optimizer)"""
    plain = train_plain(plain_config(kind))
    model, optimizer = retrofitted(plain_config(kind), plain)
    train_steps(model, optimizer)
    return plain, model, optimizer


def test_nothing_but_the_head_changes(trained):
    plain, model, _ = trained
    before, after = plain.state_dict(), model.state_dict()
    assert "backbone.bottom_up.res2.0.conv1.norm.running_mean" in before
    assert set(after) - set(before) == {
        HEAD + k for k in model.roi_heads.mask_iou_head.state_dict()
    }
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert changed == []


def test_the_head_learns(kind):
    plain = train_plain(plain_config(kind))
    model, optimizer = retrofitted(plain_config(kind), plain)
    before = {k: v.clone() for k, v in model.roi_heads.mask_iou_head.named_parameters()}
    train_steps(model, optimizer)
    after = dict(model.roi_heads.mask_iou_head.named_parameters())
    assert all(not torch.equal(after[k], before[k]) for k in before)


def test_all_outputs_of_the_mask_rcnn_stay(trained):
    plain, model, _ = trained
    inputs = toy_inputs()
    with torch.no_grad():
        before = plain.inference(inputs, do_postprocess=False)  # masks as probabilities
        after = model.eval().inference(inputs, do_postprocess=False)
    assert sum(map(len, before)) > 10
    for a, b in zip(before, after):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        for field in ("pred_classes", "pred_masks", "scores"):
            assert torch.equal(a.get(field), b.get(field))
        assert torch.equal(b.mask_scores, b.scores * b.pred_mask_ious)


def test_frozen_parameters_have_neither_gradients_nor_optimizer_state(trained):
    _, model, optimizer = trained
    head = {id(p) for p in model.roi_heads.mask_iou_head.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == head
    assert {id(p) for p in model.parameters() if p.grad is not None} == head
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == head
    assert {id(p) for p in optimizer.state} == head


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(retrofit(tiny_mask_rcnn(), **SMALL))


def test_everything_but_the_head_is_always_in_evaluation_mode(model):
    head = set(model.roi_heads.mask_iou_head.modules())
    for step in (lambda: model, model.train, model.eval, lambda: model.train(True)):
        step()
        assert all(m.training is model.training for m in head)
        assert not any(m.training for m in model.modules() if m not in head | {model})
    assert model.training  # the engine asserts it


def test_autograd_sees_the_head_only(model):
    model.requires_grad_(True)  # so that not being frozen is no excuse
    seen = []
    parts = [model.backbone, model.proposal_generator.rpn_head, model.roi_heads.mask_head.deconv]
    for part in parts:
        part.register_forward_hook(lambda module, args, out: seen.append(out))
    loss_of(model).backward()
    features, (logits, deltas), masks = seen
    tensors = [*features.values(), *logits, *deltas, masks]
    assert not any(t.requires_grad for t in tensors)
    others = [k for k, p in model.named_parameters() if p.grad is not None]
    assert others and all(k.startswith(HEAD) for k in others)


def test_what_the_head_does_not_need_is_not_computed(model, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("computed in vain")

    for owner, name in [
        (model.proposal_generator, "losses"),
        (model.proposal_generator, "label_and_sample_anchors"),
        (model.roi_heads, "_forward_box"),
        (model.roi_heads, "_forward_keypoint"),
    ]:
        monkeypatch.setattr(owner, name, fail)
    assert loss_of(model) > 0


# Learning from detections


def learner_from_detections(kind="lazy"):
    """A model in training that was trained a little, and the same one without retrofit."""
    plain = train_plain(plain_config(kind))
    cfg = retrofit(plain_config(kind), learn_from="detections", **SMALL)
    model = build(cfg)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model.train(), plain


def test_the_head_learns_from_the_detections_of_inference(kind, monkeypatch):
    model, plain = learner_from_detections(kind)
    learnt = []
    monkeypatch.setattr(
        model.roi_heads,
        "mask_iou_losses",
        lambda features, instances: learnt.extend(instances) or {"loss_mask_iou": torch.zeros(())},
    )
    inputs = toy_inputs()
    loss_of(model, inputs)
    with torch.no_grad():
        found = plain.inference(inputs, do_postprocess=False)
    assert len(learnt) == len(found) == 2 and min(map(len, found)) > 10
    for a, b in zip(learnt, found):
        assert torch.equal(a.proposal_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.gt_classes, b.pred_classes)


def test_only_the_head_learns_from_detections(kind):
    model, plain = learner_from_detections(kind)
    head = model.roi_heads.mask_iou_head
    before = {k: v.clone() for k, v in head.named_parameters()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    train_steps(model, optimizer)
    assert all(not torch.equal(v, before[k]) for k, v in head.named_parameters())
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in plain.state_dict().items())


def test_a_head_that_learns_from_mistakes_predicts_lower_ious():
    """Where no image has an object, every detection is a mistake: the predictions approach 0."""
    model, _ = learner_from_detections()
    nn.init.constant_(model.roi_heads.mask_iou_head.predictor.bias, 0.7)
    inputs = [{**x, "instances": without_objects()} for x in toy_inputs()]
    optimizer = torch.optim.SGD(model.roi_heads.mask_iou_head.predictor.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        loss = loss_of(model, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # half the mean squared error of predictions near 0.7, then of ones near 0
    assert losses[0] == pytest.approx(0.5 * 0.7**2, rel=0.3) and losses[-1] < 0.1 * losses[0]


def test_objects_of_detections():
    boxes = [
        [8, 8, 40, 38],  # finds the square of class 0
        [8, 8, 24, 40],  # finds it again
        [70, 20, 96, 60],  # nearest to the triangle of class 1, but called 0
        [50, 10, 90, 48],  # finds the triangle
        [50, 10, 90, 48],  # class 2, of which there is no object
    ]
    detections = Instances(
        (64, 96),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
        pred_classes=torch.tensor([0, 0, 0, 1, 2]),
    )
    heads = build(retrofit(tiny_mask_rcnn(), **SMALL)).roi_heads
    truths = [toy_inputs()[0]["instances"], without_objects()]
    some, none = heads.label_detections([detections, detections], truths)

    assert some.gt_masks.indices[:4].tolist() == [0, 0, 0, 1]
    assert some.has_object.tolist() == [True] * 4 + [False]
    assert none.has_object.tolist() == [False] * 5
    (empty,) = crop_gt_masks([none], 28)
    assert not empty.gt_masks.crops.any() and not empty.gt_masks.areas.any()
    for labeled in (some, none):
        assert torch.equal(labeled.proposal_boxes.tensor, detections.pred_boxes.tensor)
        assert torch.equal(labeled.gt_classes, detections.pred_classes)
    (nothing,) = heads.label_detections([detections[:0]], truths[:1])
    assert len(nothing) == 0


@pytest.mark.parametrize("what", ["no objects", "no detections", "one image without detections"])
def test_a_step_without_detections_has_a_gradient_for_each_parameter(what, monkeypatch):
    model, _ = learner_from_detections()
    inputs = toy_inputs()
    if what == "no objects":
        inputs = [{**x, "instances": without_objects()} for x in inputs]
    else:
        find = model.roi_heads._forward_box
        kept = 0 if what == "no detections" else 1

        def find_less(*args):
            return [x if n < kept else x[:0] for n, x in enumerate(find(*args))]

        monkeypatch.setattr(model.roi_heads, "_forward_box", find_less)
    loss = loss_of(model, inputs)
    loss.backward()
    assert all(p.grad is not None for p in model.roi_heads.mask_iou_head.parameters())
    assert (loss == 0) if what == "no detections" else (loss > 0)


def test_the_loss_is_that_of_full_training():
    torch.manual_seed(0)
    heads = instantiate(add_mask_scoring(tiny_mask_rcnn(), **SMALL).model).roi_heads.train()
    features = toy_features()
    targets = [x["instances"] for x in toy_inputs()]
    with EventStorage():
        proposals = heads.label_and_sample_proposals(toy_proposals(), targets)
        full = heads._forward_mask(features, proposals)["loss_mask_iou"]
        alone = heads.mask_iou_losses(features, proposals)["loss_mask_iou"]
    assert torch.equal(full, alone) and full > 0


@pytest.mark.parametrize("what", ["no objects", "no foreground", "one image without objects"])
def test_a_step_without_masks_has_a_gradient_for_each_parameter(model, what):
    inputs = toy_inputs()
    if what == "no foreground":
        model.roi_heads.positive_fraction = 0.0
    for x in inputs if what == "no objects" else inputs[:1]:
        x["instances"] = without_objects() if "objects" in what else x["instances"]
    loss = loss_of(model, inputs)
    loss.backward()
    assert all(p.grad is not None for p in model.roi_heads.mask_iou_head.parameters())
    assert (loss > 0) if what == "one image without objects" else (loss == 0)


def test_given_proposals(model):
    """Fast R-CNN style: a model without RPN reads proposals from its inputs."""
    model.proposal_generator = None
    inputs = [{**x, "proposals": p} for x, p in zip(toy_inputs(), toy_proposals())]
    assert loss_of(model, inputs) > 0


def test_bfloat16(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    grads = [p.grad for p in model.roi_heads.mask_iou_head.parameters()]
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads)
    assert any((g != 0).any() for g in grads)


def test_distributed_training_waits_for_no_frozen_parameter(model, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model).train()
        empty = [{**x, "instances": without_objects()} for x in toy_inputs()]
        for inputs in (empty, toy_inputs(), toy_inputs()):  # a missing gradient fails in the next
            loss_of(parallel, inputs).backward()
        parallel.eval()
        assert isinstance(parallel(toy_inputs())[0]["instances"], Instances)
    finally:
        dist.destroy_process_group()


def test_a_model_without_mask_scores_is_refused():
    cfg = tiny_mask_rcnn()
    cfg.model._target_ = RetrofitRCNN
    with pytest.raises(ValueError, match="StandardROIHeads has none: use msrcnn_d2.retrofit"):
        instantiate(cfg.model)


# Configs


@pytest.mark.parametrize("name", ["mask_rcnn_R_50_FPN_1x", "mask_rcnn_R_50_FPN_3x"])
def test_retrofit_of_detectron2s_configs(name):
    cfgs = [
        detectron2_zoo.get_config(f"{FOLDER}/{n}") for n in (f"{name[:-2]}1x.py", name + ".yaml")
    ]
    before = [str(c) for c in cfgs]
    lazy, yacs = map(retrofit, cfgs)
    assert [str(c) for c in cfgs] == before
    assert lazy.model._target_ is RetrofitRCNN
    assert lazy.model.roi_heads._target_ is MaskScoringROIHeads
    assert lazy.dataloader.evaluator._target_ is MaskScoringCOCOEvaluator
    assert yacs.MODEL.META_ARCHITECTURE == "RetrofitRCNN"
    assert yacs.MODEL.ROI_HEADS.NAME == "MaskScoringROIHeads"
    assert lazy.train.max_iter == yacs.SOLVER.MAX_ITER == 10_000
    assert lazy.train.init_checkpoint == yacs.MODEL.WEIGHTS == ""  # were those of a ResNet
    assert lazy.train.output_dir == yacs.OUTPUT_DIR == "./output/retrofit"


def test_learning_rate_of_both_kinds():
    lazy = retrofit(detectron2_zoo.get_config(f"{FOLDER}/mask_rcnn_R_50_FPN_1x.py"))
    yacs = retrofit(detectron2_zoo.get_config(f"{FOLDER}/mask_rcnn_R_50_FPN_3x.yaml"))
    multiplier = instantiate(lazy.lr_multiplier)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=yacs.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(yacs, optimizer)
    lrs = []
    for step in (0, 250, 500, 5250, 9999):
        scheduler.last_epoch = step
        lrs.append((lazy.optimizer.lr * multiplier(step / 10_000), scheduler.get_lr()[0]))
    assert all(a == pytest.approx(b) for a, b in lrs)
    assert [a for a, _ in lrs] == pytest.approx([2e-5, 0.01, 0.02, 0.01, 0], abs=1e-3)


@pytest.mark.parametrize(
    "batch, max_iter, expected",
    [(16, 90_000, 10_000), (2, 720_000, 80_000), (64, 184_375, 2_500), (16, 1_000, 1_000)],
)
def test_length_counts_images(batch, max_iter, expected):
    lazy = detectron2_zoo.get_config(f"{FOLDER}/mask_rcnn_R_50_FPN_1x.py")
    lazy.dataloader.train.total_batch_size, lazy.train.max_iter = batch, max_iter
    yacs = detectron2_zoo.get_config(f"{FOLDER}/mask_rcnn_R_50_FPN_3x.yaml")
    yacs.SOLVER.IMS_PER_BATCH, yacs.SOLVER.MAX_ITER = batch, max_iter
    assert retrofit(lazy).train.max_iter == retrofit(yacs).SOLVER.MAX_ITER == expected
    assert retrofit(yacs).SOLVER.WARMUP_ITERS == expected // 20


def test_weights_of_the_users_own_stay():
    lazy = detectron2_zoo.get_config(f"{FOLDER}/mask_rcnn_R_50_FPN_1x.py")
    yacs = detectron2_zoo.get_config(f"{FOLDER}/mask_rcnn_R_50_FPN_3x.yaml")
    lazy.train.init_checkpoint = yacs.MODEL.WEIGHTS = "mask_rcnn.pth"
    assert retrofit(lazy).train.init_checkpoint == "mask_rcnn.pth"
    assert retrofit(yacs).MODEL.WEIGHTS == "mask_rcnn.pth"


def test_configs_with_mask_scoring_keep_their_heads(kind):
    cascade = kind.endswith("cascade")
    expected = CascadeMaskScoringROIHeads if cascade else MaskScoringROIHeads
    cfg = plain_config(kind)
    if kind.startswith("lazy"):
        cfg = add_mask_scoring(cfg, **SMALL)
    else:
        cfg.MODEL.ROI_HEADS.NAME = expected.__name__
    once = retrofit(cfg, fc_dim=12)
    assert type(build(once).roi_heads) is expected
    head = build(once).roi_heads.mask_iou_head
    assert (head.predictor.in_features, head.convs.conv1.out_channels) == (12, SMALL["conv_dim"])
    assert retrofit(once) == once  # the output folder, too


def test_retrofit_of_a_yacs_config_that_knows_no_mask_scoring():
    cfg = get_cfg()
    cfg.merge_from_file(detectron2_zoo.get_config_file("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"))
    cfg.freeze()
    after = retrofit(cfg, conv_dim=32)
    assert after.MODEL.ROI_HEADS.NAME == "CascadeMaskScoringROIHeads"
    assert after.MODEL.ROI_MASK_IOU_HEAD.CONV_DIM == 32


def dense():
    cfg = tiny_mask_rcnn()
    cfg.model._target_ = RetinaNet
    return cfg


def rotated():
    cfg = tiny_mask_rcnn()
    cfg.model.roi_heads._target_ = RROIHeads
    return cfg


def yacs(**keys):
    cfg = tiny_yacs_config()
    for name, value in keys.items():
        cfg.merge_from_list([f"MODEL.{name}".replace("__", "."), value])
    return cfg


@pytest.mark.parametrize(
    "cfg, message",
    [
        (lambda: detectron2_zoo.get_config("common/models/retinanet.py"), "model.roi_heads"),
        (rotated, "not RROIHeads"),
        (dense, "expects a .*GeneralizedRCNN.*, not a RetinaNet"),
        (lambda: yacs(META_ARCHITECTURE="RetinaNet"), "not a RetinaNet"),
        (lambda: yacs(ROI_HEADS__NAME="RROIHeads"), "not RROIHeads"),
        (lambda: yacs(MASK_ON=False), "MODEL.MASK_ON is False"),
    ],
)
def test_other_models_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        retrofit(cfg())


def test_what_the_head_learns_from_is_part_of_the_config(kind):
    cfg = plain_config(kind)
    assert build(retrofit(cfg)).learn_from == "proposals"
    once = retrofit(cfg, learn_from="detections")
    assert build(once).learn_from == "detections"
    assert retrofit(once) == once
    assert build(retrofit(once, learn_from="proposals")).learn_from == "proposals"
    with pytest.raises(ValueError, match="'boxes', not proposals or detections"):
        retrofit(cfg, learn_from="boxes")


@pytest.mark.parametrize(
    "suffix, weights, key",
    [
        ("1x.py", "train.init_checkpoint", "model.learn_from"),
        ("3x.yaml", "MODEL.WEIGHTS", "MODEL.RETROFIT.LEARN_FROM"),
    ],
)
def test_overrides_say_what_the_head_learns_from(suffix, weights, key):
    path = find_config_file(f"{FOLDER}/mask_rcnn_R_50_FPN_{suffix}")
    cfg = load_config(path, [f"{weights}=m.pth", f"{key}=detections"], retrofitted=True)
    assert build(cfg).learn_from == "detections"
    with pytest.raises(UserError, match=f"{key} .* takes proposals or detections"):
        load_config(path, [f"{weights}=m.pth", f"{key}=boxes"], retrofitted=True)


def test_an_argument_that_the_head_does_not_have_is_refused():
    with pytest.raises(ValueError, match="no 'conv_dims'"):
        retrofit(tiny_yacs_config(), conv_dims=3)
    for turn in (retrofit, add_mask_scoring):
        with pytest.raises(ValueError, match="no 'conv_dims'"):
            turn(tiny_mask_rcnn(), conv_dims=3)


@pytest.mark.parametrize(
    "name",
    [
        f"{FOLDER}/mask_rcnn_R_50_FPN_1x.py",
        f"{FOLDER}/mask_rcnn_regnety_4gf_dds_fpn_1x.py",
        "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml",
        f"{FOLDER}/ms_rcnn_X_101_32x4d_FPN_1x.py",
        f"{FOLDER}/ms_rcnn_X_101_32x4d_FPN_1x.yaml",
    ],
)
def test_weights_of_a_backbone_are_no_model_to_retrofit(name):
    with pytest.raises(UserError, match="no trained Mask R-CNN to retrofit"):
        load_config(find_config_file(name), retrofitted=True)


@pytest.mark.parametrize("suffix", ["py", "yaml"])
def test_configs_of_detectron2_are_found_by_name(suffix):
    path = find_config_file(f"{FOLDER}/mask_rcnn_R_50_FPN_1x.{suffix}")
    assert path == detectron2_zoo.get_config_file(f"{FOLDER}/mask_rcnn_R_50_FPN_1x.{suffix}")
    with pytest.raises(UserError, match="ms_rcnn_R_50_FPN_1x.*mask_rcnn_R_50"):
        find_config_file(f"{FOLDER}/mask_rcnn_R_50_FPN.{suffix}")


@pytest.mark.parametrize(
    "name, overrides, head",
    [
        (
            "mask_rcnn_R_50_FPN_1x.py",
            ["train.init_checkpoint=m.pth", "model.roi_heads.mask_iou_head.conv_dim=32"],
            lambda cfg: (cfg.train.max_iter, cfg.model.roi_heads.mask_iou_head.conv_dim),
        ),
        (
            "mask_rcnn_R_50_FPN_3x.yaml",
            ["MODEL.WEIGHTS", "m.pth", "MODEL.ROI_MASK_IOU_HEAD.CONV_DIM", "32"],
            lambda cfg: (cfg.SOLVER.MAX_ITER, cfg.MODEL.ROI_MASK_IOU_HEAD.CONV_DIM),
        ),
    ],
)
def test_overrides_come_after_the_retrofit(name, overrides, head):
    path = find_config_file(f"{FOLDER}/{name}")
    assert head(load_config(path, overrides, retrofitted=True)) == (10_000, 32)
    length = "train.max_iter=7" if name.endswith(".py") else "SOLVER.MAX_ITER=7"
    assert head(load_config(path, [*overrides, length], retrofitted=True)) == (7, 32)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            f"{FOLDER}/mask_rcnn_R_50_FPN_1x.py",
            "no trained Mask R-CNN to retrofit: give train.init",
        ),
        (f"{FOLDER}/mask_rcnn_R_50_FPN_1x.yaml", "MODEL.WEIGHTS FILE"),
        (f"{RETINANET}.py", "cannot be retrofitted: .*model.roi_heads"),
        (f"{RETINANET}.yaml", "cannot be retrofitted: .* RetinaNet"),
    ],
)
def test_what_cannot_be_retrofitted_is_one_sentence(name, message):
    with pytest.raises(UserError, match=message):
        load_config(find_config_file(name), retrofitted=True)


# The command


@pytest.fixture
def toy_dataset(tmp_path):
    """Options that register the toy images as "toy"; forgotten afterwards, like the log files."""
    write_images(tmp_path)
    yield ["--dataset", "toy", write_coco_json(tmp_path / "annotations.json"), str(tmp_path)]
    DatasetCatalog.remove("toy")
    MetadataCatalog.remove("toy")
    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "msrcnn_d2"):
        for handler in logging.getLogger(name).handlers[:]:
            logging.getLogger(name).removeHandler(handler)
            handler.close()


def run(*args):
    main(["train", *args])


@pytest.fixture
def config_files(tmp_path):
    """{kind: file} of plain Mask R-CNNs for the toy images."""
    lazy = detectron2_zoo.get_config(f"{FOLDER}/mask_rcnn_R_50_FPN_1x.py")
    lazy.model = tiny_mask_rcnn().model
    lazy.dataloader.train.dataset.names = lazy.dataloader.test.dataset.names = "toy"
    lazy.dataloader.evaluator = L(COCOEvaluator)(dataset_name="toy")
    lazy.dataloader.train.total_batch_size = 2
    lazy.dataloader.train.num_workers = lazy.dataloader.test.num_workers = 0
    resize = L(T.ResizeShortestEdge)(short_edge_length=(64,), sample_style="choice")
    lazy.dataloader.train.mapper.augmentations[0] = resize
    lazy.dataloader.test.mapper.augmentations = []
    lazy.train.update(init_checkpoint="", max_iter=2, device="cpu", seed=1)
    lazy.train.output_dir = str(tmp_path / "output")
    LazyConfig.save(lazy, str(tmp_path / "lazy.yaml"))

    yacs = plain_config("yacs")
    yacs.DATASETS.TRAIN = yacs.DATASETS.TEST = ("toy",)
    yacs.SOLVER.IMS_PER_BATCH, yacs.SOLVER.MAX_ITER, yacs.SOLVER.BASE_LR = 2, 2, 1e-3
    yacs.DATALOADER.NUM_WORKERS = 0
    yacs.SEED = 1
    yacs.OUTPUT_DIR = str(tmp_path / "output")
    (tmp_path / "yacs.yaml").write_text(yacs.dump())
    return {name: str(tmp_path / f"{name}.yaml") for name in ("lazy", "yacs")}


def weights_in(folder):
    return torch.load(folder / "model_final.pth", weights_only=False)["model"]


def detections_in(folder):
    detections = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    return [
        {k: v for k, v in d.items() if not k.startswith(("mask_s", "pred_"))} for d in detections
    ]


@pytest.mark.parametrize("kind", ["lazy", "yacs"])
def test_the_command(kind, config_files, toy_dataset, tmp_path, capsys):
    command = ["--config-file", config_files[kind], *toy_dataset]
    run(*command)
    plain = tmp_path / "output"
    key, width = {
        "lazy": ("train.init_checkpoint", "model.roi_heads.mask_iou_head.conv_dim"),
        "yacs": ("MODEL.WEIGHTS", "MODEL.ROI_MASK_IOU_HEAD.CONV_DIM"),
    }[kind]
    weights = f"{key}={plain}/model_final.pth"
    before, found_before = weights_in(plain), detections_in(plain)

    run("--retrofit", *command, weights, f"{width}=4")
    after = weights_in(plain / "retrofit")
    assert after[f"{HEAD}convs.conv1.weight"].shape[0] == 4
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(k in before or k.startswith(HEAD) for k in after)
    assert detections_in(plain / "retrofit") == found_before != []
    assert "masks by mask score" in capsys.readouterr().out
    assert weights_in(plain).keys() == before.keys()  # it is still the user's

    with pytest.raises(SystemExit):
        run("--retrofit", *command)
    assert "no trained Mask R-CNN to retrofit" in capsys.readouterr().err


def test_the_saved_config_of_a_retrofit(config_files, tmp_path):
    """What --resume and --eval-only are given afterwards, with --retrofit or without."""
    path = str(tmp_path / "config.yaml")
    weights = ["train.init_checkpoint=m.pth"]
    cfg = load_config(config_files["lazy"], weights, retrofitted=True)
    LazyConfig.save(cfg, path)
    for again in (load_config(path), load_config(path, retrofitted=True)):
        assert again.train == cfg.train
        assert isinstance(build(again), RetrofitRCNN)
