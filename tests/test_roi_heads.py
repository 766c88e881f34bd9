import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.export import TracingAdapter
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.layers import ROIAlign
from detectron2.modeling import (
    DatasetMapperTTA,
    GeneralizedRCNNWithTTA,
    build_model,
    detector_postprocess,
)
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances

from msrcnn_d2 import add_mask_calibrator
from msrcnn_d2.modeling import (
    CascadeMaskScoringROIHeads,
    MaskScoringRCNNWithTTA,
    MaskScoringROIHeads,
)
from msrcnn_d2.modeling.roi_heads import DetectedBoxes
from tests.helpers.toy import (
    IMAGE_SIZE,
    NUM_CLASSES,
    tiny_mask_rcnn,
    tiny_mask_scoring_rcnn,
    tiny_yacs_config,
    toy_features,
    toy_inputs,
    toy_instances,
    toy_proposals,
    without_objects,
    without_proposals,
    write_images,
)

FIELDS = {"pred_boxes", "scores", "pred_classes", "pred_masks", "pred_mask_ious", "mask_scores"}


def roi_heads_of(cfg):
    torch.manual_seed(1)
    return instantiate(cfg.model.roi_heads)


@pytest.fixture
def heads():
    return roi_heads_of(tiny_mask_scoring_rcnn())


@pytest.fixture(params=[False, True], ids=["standard", "cascade"])
def cascade(request):
    return request.param


def train(heads, proposals=None, truth=None, features=None):
    """Losses of one step on the two toy images, or on others."""
    torch.manual_seed(2)
    features = toy_features() if features is None else features
    proposals = toy_proposals() if proposals is None else proposals
    truth = toy_instances() if truth is None else truth
    return heads.train()(None, features, proposals, truth)[1]


@torch.no_grad()
def infer(heads, proposals=None):
    torch.manual_seed(2)
    proposals = toy_proposals() if proposals is None else proposals
    return heads.eval()(None, toy_features(), proposals)[0]


def assert_complete(instances):
    """The six fields, of one length, with the right shapes and types, and in the right ranges."""
    assert instances.get_fields().keys() == FIELDS
    count = len(instances)
    assert instances.pred_masks.shape == (count, 1, 28, 28)
    for name in ("scores", "pred_mask_ious", "mask_scores", "pred_masks"):
        values = instances.get(name)
        # Detectron2's own scores are half precision under autocast on a CPU
        assert name == "scores" or values.dtype == torch.float32, name
        assert ((values >= 0) & (values <= 1)).all(), name
    for name in ("scores", "pred_mask_ious", "mask_scores"):
        assert instances.get(name).shape == (count,), name
    assert torch.equal(instances.mask_scores, instances.scores * instances.pred_mask_ious)


def assert_trains_every_parameter(losses, module):
    for name, loss in losses.items():
        assert torch.isfinite(loss), name
    sum(losses.values()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


# ---- beside Detectron2's own heads


def twins(cascade=False):
    """Detectron2's ROI heads and ours, with the same weights in what they share."""
    plain = roi_heads_of(tiny_mask_rcnn(cascade))
    scoring = roi_heads_of(tiny_mask_scoring_rcnn(cascade))
    result = scoring.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    for module in (plain, scoring):
        # Distinct boxes and masks, which the small initial weights do not give
        torch.manual_seed(3)
        for name, parameter in sorted(plain.named_parameters()):
            if "predictor" in name and "bias" not in name:
                noise = torch.randn_like(parameter)
                module.get_parameter(name).data.copy_(noise)
    return plain, scoring


def test_only_the_mask_iou_head_is_new_in_the_state_dict(cascade):
    plain = instantiate(tiny_mask_rcnn(cascade).model).state_dict()
    scoring = instantiate(tiny_mask_scoring_rcnn(cascade).model).state_dict()

    new = scoring.keys() - plain.keys()
    assert not plain.keys() - scoring.keys()
    assert new and all(name.startswith("roi_heads.mask_iou_head.") for name in new)
    assert all(scoring[name].shape == value.shape for name, value in plain.items())


def test_the_other_losses_are_those_of_detectron2(cascade, event_storage):
    plain, scoring = twins(cascade)

    expected, losses = train(plain), train(scoring)

    assert losses.keys() == expected.keys() | {"loss_mask_iou"}
    for name, loss in expected.items():
        assert torch.equal(losses[name], loss), name
    assert losses["loss_mask_iou"] > 0


def test_loss_mask_keeps_its_weight(event_storage):
    cfg = tiny_mask_scoring_rcnn()
    loss = train(roi_heads_of(cfg))["loss_mask"]
    cfg.model.roi_heads.mask_head.loss_weight = 2.5

    assert train(roi_heads_of(cfg))["loss_mask"].item() == pytest.approx(2.5 * loss.item())


def test_boxes_classes_masks_and_scores_are_those_of_detectron2(cascade):
    plain, scoring = twins(cascade)

    for expected, instances in zip(infer(plain), infer(scoring)):
        assert len(instances) > 5
        assert torch.equal(instances.pred_boxes.tensor, expected.pred_boxes.tensor)
        for name in ("scores", "pred_classes", "pred_masks"):
            assert torch.equal(instances.get(name), expected.get(name)), name
        assert_complete(instances)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_masks_are_pooled_predicted_and_rasterised_once(
    mask_format, heads, event_storage, monkeypatch
):
    truth = toy_instances(mask_format)
    calls = []

    def counted(owner, name, counts=lambda *args: True):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            if counts(*args):
                calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    # What any crop to 28 x 28 cells comes down to, of polygons and of bitmasks
    counted(mask_util, "frPyObjects", lambda polygons, *size: size == (28, 28))
    counted(ROIAlign, "__call__", lambda align, *_: align.output_size == (28, 28))
    counted(heads.mask_pooler, "forward")
    counted(heads.mask_head, "layers")

    losses = train(heads, truth=truth)

    assert losses["loss_mask"] > 0 and losses["loss_mask_iou"] > 0
    rasterised = "frPyObjects" if mask_format == "polygon" else "__call__"
    # Each of the two images once
    assert sorted(calls) == sorted([rasterised, rasterised, "forward", "layers"])


def test_the_target_is_that_of_the_probability_threshold(heads, event_storage):
    # Logits of 0.3 are probabilities of 0.57: every cell is predicted, so the IoU of a box that
    # equals its square object is 1. (As probabilities, 0.3 would be an empty mask.)
    nn.init.zeros_(heads.mask_head.predictor.weight)
    nn.init.constant_(heads.mask_head.predictor.bias, 0.3)
    heads.proposal_append_gt = False
    squares = [x[x.gt_classes != 1] for x in toy_instances()]  # without the triangle
    proposals = [
        Instances(IMAGE_SIZE, proposal_boxes=x.gt_boxes, objectness_logits=torch.ones(len(x)))
        for x in squares
    ]

    train(heads, proposals, squares)

    assert event_storage.latest()["mask_iou/mean_target"][0] == pytest.approx(1.0)


def test_each_mask_is_scored_by_its_own_class(heads):
    nn.init.zeros_(heads.mask_iou_head.predictor.weight)
    heads.mask_iou_head.predictor.bias.data = torch.tensor([0.2, 0.4, 0.6])

    for instances in infer(heads):
        assert len(set(instances.pred_classes.tolist())) > 1
        expected = torch.tensor([0.2, 0.4, 0.6])[instances.pred_classes]
        assert torch.equal(instances.pred_mask_ious, expected)


def test_the_head_sees_the_mask_of_the_right_class(heads, event_storage):
    # Class c has the constant mask probability sigmoid(c); the head must be given that of the
    # ground-truth class in training and of the predicted class in inference.
    nn.init.zeros_(heads.mask_head.predictor.weight)
    heads.mask_head.predictor.bias.data = torch.tensor([0.0, 1.0, 2.0])
    seen = []
    heads.mask_iou_head.register_forward_pre_hook(lambda module, args: seen.append(args[1:]))

    train(heads)
    infer(heads)

    for (probs, instances), field in zip(seen, ["gt_classes", "pred_classes"]):
        classes = torch.cat([x.get(field) for x in instances])
        assert len(set(classes.tolist())) > 1
        expected = classes.float().sigmoid()[:, None, None, None].expand(-1, 1, 28, 28)
        torch.testing.assert_close(probs.detach(), expected)


# ---- kinds of ground truth and of heads


def rle_annotations():
    """The toy ground truth as annotations of Detectron2's data sets, masks as run lengths."""
    return [
        [
            {
                "bbox": box.tolist(),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": class_.item(),
                "segmentation": mask_util.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8)),
            }
            for box, class_, mask in zip(truth.gt_boxes, truth.gt_classes, truth.gt_masks)
        ]
        for truth in toy_instances("bitmask")
    ]


def rle_instances():
    return [
        annotations_to_instances(x, IMAGE_SIZE, mask_format="bitmask") for x in rle_annotations()
    ]


@pytest.mark.parametrize("class_agnostic", [False, True], ids=["specific", "agnostic"])
@pytest.mark.parametrize(
    "truth",
    [toy_instances, lambda: toy_instances("bitmask"), rle_instances],
    ids=["polygon", "bitmask", "rle"],
)
def test_trains_on_every_form_of_ground_truth(truth, class_agnostic, event_storage):
    cfg = tiny_mask_scoring_rcnn()
    if class_agnostic:
        cfg.model.roi_heads.mask_head.num_classes = 1
    heads = roi_heads_of(cfg)

    losses = train(heads, truth=truth())

    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_mask", "loss_mask_iou"}
    assert losses["loss_mask_iou"] > 0
    assert_trains_every_parameter(losses, heads)


def test_the_forms_of_ground_truth_give_the_same_losses(heads, event_storage):
    polygon, bitmask, rle = (
        train(heads, truth=x)["loss_mask_iou"].item()
        for x in (toy_instances(), toy_instances("bitmask"), rle_instances())
    )

    assert rle == bitmask
    assert bitmask == pytest.approx(polygon, rel=0.05)  # they differ at the triangle's edge


def test_a_class_agnostic_mask_head_still_has_one_iou_for_each_class():
    cfg = tiny_mask_scoring_rcnn()
    cfg.model.roi_heads.mask_head.num_classes = 1
    heads = roi_heads_of(cfg)
    nn.init.zeros_(heads.mask_iou_head.predictor.weight)
    heads.mask_iou_head.predictor.bias.data = torch.tensor([0.2, 0.4, 0.6])

    for instances in infer(heads):
        assert_complete(instances)
        expected = torch.tensor([0.2, 0.4, 0.6])[instances.pred_classes]
        assert torch.equal(instances.pred_mask_ious, expected)


# ---- images in which something is missing


def background_only():
    """Proposals that touch no object."""
    return [x[-2:] for x in toy_proposals()]


@pytest.mark.parametrize(
    "proposals, truth",
    [
        pytest.param(
            toy_proposals, lambda: [without_objects(), without_objects()], id="no-objects"
        ),
        pytest.param(
            toy_proposals, lambda: [toy_instances()[0], without_objects()], id="one-without-objects"
        ),
        pytest.param(background_only, toy_instances, id="no-foreground"),
        pytest.param(
            lambda: [background_only()[0], toy_proposals()[1]],
            toy_instances,
            id="one-without-foreground",
        ),
        pytest.param(
            lambda: [background_only()[0], toy_proposals()[1]],
            lambda: [toy_instances()[0], without_objects()],
            id="one-without-foreground-one-without-objects",
        ),
        pytest.param(
            lambda: [without_proposals(), toy_proposals()[1]], toy_instances, id="one-no-proposals"
        ),
    ],
)
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_training_with_missing_objects(proposals, truth, mask_format, cascade, event_storage):
    heads = roi_heads_of(tiny_mask_scoring_rcnn(cascade))
    heads.proposal_append_gt = False
    truth = truth()
    if mask_format == "bitmask":
        for x in truth:
            if x.has("gt_masks"):
                x.gt_masks = BitMasks.from_polygon_masks(x.gt_masks, *IMAGE_SIZE)

    losses = train(heads, proposals(), truth)

    assert "loss_mask_iou" in losses
    assert_trains_every_parameter(losses, heads)


def test_training_with_objects_that_augmentation_emptied(heads, event_storage):
    truth = toy_instances("bitmask")
    truth[0].gt_masks.tensor[:] = False
    truth[1].gt_masks.tensor[0] = False

    assert_trains_every_parameter(train(heads, truth=truth), heads)


@pytest.mark.parametrize(
    "proposals, counts",
    [
        (lambda: [without_proposals(), without_proposals()], [0, 0]),
        (lambda: [without_proposals(), toy_proposals()[1]], [0, None]),
        (lambda: [toy_proposals()[0], without_proposals()], [None, 0]),
    ],
    ids=["both", "first", "second"],
)
def test_images_without_detections_have_the_same_fields(proposals, counts, cascade):
    heads = roi_heads_of(tiny_mask_scoring_rcnn(cascade))

    for instances, count in zip(infer(heads, proposals()), counts):
        assert_complete(instances)
        assert len(instances) == 0 if count == 0 else len(instances) > 0


# ---- precision


@pytest.fixture(
    params=[
        pytest.param(("cpu", torch.bfloat16), id="cpu-bfloat16"),
        pytest.param(
            ("cuda", torch.float16),
            id="cuda-float16",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use"
            ),
        ),
    ]
)
def autocast(request):
    return request.param


def test_autocast_trains_and_predicts(autocast, event_storage):
    device, dtype = autocast
    model = instantiate(tiny_mask_scoring_rcnn().model).to(device)

    with torch.autocast(device, dtype=dtype):
        losses = model(toy_inputs())
    assert losses["loss_mask_iou"] > 0
    assert_trains_every_parameter(losses, model.roi_heads)

    with torch.autocast(device, dtype=dtype), torch.no_grad():
        outputs = model.eval().inference(toy_inputs(), do_postprocess=False)
    for instances in outputs:
        assert len(instances) > 0
        assert_complete(instances.to("cpu"))


# ---- boxes that the user gives


@pytest.mark.parametrize("with_scores", [True, False], ids=["scores", "no-scores"])
def test_masks_of_given_boxes(heads, with_scores):
    given = []
    for truth in toy_instances():
        given.append(
            Instances(IMAGE_SIZE, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
        )
        if with_scores:
            given[-1].scores = torch.tensor([0.9, 0.5])

    with torch.no_grad():
        outputs = heads.eval().forward_with_given_boxes(toy_features(), given)

    for instances in outputs:
        assert instances.pred_masks.shape == (2, 1, 28, 28)
        assert instances.pred_mask_ious.shape == (2,)
        assert instances.has("mask_scores") == with_scores
        if with_scores:
            assert_complete(instances)


def test_masks_can_be_switched_off(heads, event_storage):
    heads.mask_on = False  # as test-time augmentation does, to find boxes first

    assert train(heads).keys() == {"loss_cls", "loss_box_reg"}
    for instances in infer(heads):
        assert instances.get_fields().keys() == {"pred_boxes", "scores", "pred_classes"}


# ---- test-time augmentation


@pytest.fixture
def tta_config():
    cfg = tiny_yacs_config()
    cfg.TEST.AUG.MIN_SIZES = (64, 96)
    cfg.TEST.AUG.MAX_SIZE = 200
    cfg.TEST.AUG.FLIP = True
    return cfg


def tta_input():
    return {key: toy_inputs()[0][key] for key in ("image", "height", "width")}


def scoring_model(test_score_thresh=0.0):
    cfg = tiny_mask_scoring_rcnn()
    cfg.model.roi_heads.box_predictor.test_score_thresh = test_score_thresh
    torch.manual_seed(1)
    model = instantiate(cfg.model).eval()
    # IoUs that differ from one image and object to the other
    nn.init.normal_(model.roi_heads.mask_iou_head.predictor.weight, std=0.3)
    nn.init.constant_(model.roi_heads.mask_iou_head.predictor.bias, 0.5)
    return model


@torch.no_grad()
def test_tta_of_detectron2_runs(tta_config):
    instances = GeneralizedRCNNWithTTA(tta_config, scoring_model())([tta_input()])[0]["instances"]

    assert len(instances) > 0
    assert instances.pred_masks.shape == (len(instances), *IMAGE_SIZE)


@torch.no_grad()
def test_tta_averages_the_mask_ious_of_the_augmented_images(tta_config):
    model, image = scoring_model(), tta_input()

    # One image at a time: in a batch, padding to the largest one alters the smaller ones a little
    tta = MaskScoringRCNNWithTTA(tta_config, model, batch_size=1)
    merged = tta([copy.copy(image)])[0]["instances"]

    ious = []
    for augmented in DatasetMapperTTA(tta_config)(image):
        boxes = augmented.pop("transforms").apply_box(merged.pred_boxes.tensor.numpy())
        given = Instances(
            tuple(augmented["image"].shape[1:]),
            pred_boxes=Boxes(torch.from_numpy(boxes)),
            pred_classes=merged.pred_classes,
        )
        output = model.inference([augmented], [given], do_postprocess=False)[0]
        ious.append(output.pred_mask_ious)
    assert len(ious) == 4  # two sizes, flipped or not
    spread = torch.stack(ious).max(dim=0).values - torch.stack(ious).min(dim=0).values
    assert spread.max() > 0.01  # the mean is not one of them
    torch.testing.assert_close(
        merged.pred_mask_ious, torch.stack(ious).mean(dim=0), rtol=0, atol=1e-4
    )
    assert torch.equal(merged.mask_scores, merged.scores * merged.pred_mask_ious)
    assert merged.pred_masks.shape == (len(merged), *IMAGE_SIZE)


@torch.no_grad()
def test_tta_without_detections(tta_config):
    model = scoring_model(test_score_thresh=2.0)

    instances = MaskScoringRCNNWithTTA(tta_config, model)([tta_input()])[0]["instances"]

    assert len(instances) == 0
    assert instances.get_fields().keys() == FIELDS
    for name in ("pred_mask_ious", "mask_scores"):
        assert instances.get(name).shape == (0,) and instances.get(name).dtype == torch.float32


# ---- building


@pytest.mark.parametrize(
    "cascade, expected",
    [(False, MaskScoringROIHeads), (True, CascadeMaskScoringROIHeads)],
    ids=["standard", "cascade"],
)
@pytest.mark.parametrize("kind", ["yacs", "LazyConfig"])
def test_whole_models_train_and_predict(kind, cascade, expected, event_storage):
    if kind == "yacs":
        model = build_model(tiny_yacs_config(cascade))
    else:
        model = instantiate(tiny_mask_scoring_rcnn(cascade).model)
    assert type(model.roi_heads) is expected

    losses = model(toy_inputs())
    stages = {f"_stage{k}" for k in range(3)} if cascade else {""}
    boxes = {f"{name}{stage}" for name in ("loss_cls", "loss_box_reg") for stage in stages}
    assert losses.keys() == boxes | {"loss_rpn_cls", "loss_rpn_loc", "loss_mask", "loss_mask_iou"}
    assert_trains_every_parameter(losses, model.roi_heads)

    with torch.no_grad():
        for output in model.eval()(toy_inputs()):
            assert len(output["instances"]) > 0
            assert output["instances"].get_fields().keys() == FIELDS
            assert output["instances"].pred_masks.shape[1:] == IMAGE_SIZE


def test_yacs_sizes_reach_the_mask_iou_head():
    cfg = tiny_yacs_config()
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 10
    cfg.MODEL.ROI_MASK_IOU_HEAD.LOSS_WEIGHT = 0.3

    head = build_model(cfg).roi_heads.mask_iou_head

    # The last convolution halves the 10 x 10 cells
    assert head.fcs.fc1.in_features == cfg.MODEL.ROI_MASK_IOU_HEAD.CONV_DIM * 5 * 5
    assert head.convs[0].in_channels == cfg.MODEL.FPN.OUT_CHANNELS + 1
    assert head.predictor.out_features == NUM_CLASSES
    assert head.loss_weight == 0.3


def test_a_yacs_config_without_masks_is_an_error_that_says_what_to_do():
    cfg = tiny_yacs_config()
    cfg.MODEL.MASK_ON = False

    with pytest.raises(ValueError, match=r"MODEL\.MASK_ON.*StandardROIHeads"):
        build_model(cfg)


def test_heads_without_masks_are_an_error_that_says_what_to_do():
    cfg = tiny_mask_scoring_rcnn()
    heads = cfg.model.roi_heads
    heads.mask_iou_head.input_shape = heads.mask_head.input_shape
    for key in ("mask_in_features", "mask_pooler", "mask_head"):
        del heads[key]

    with pytest.raises(ValueError, match="mask_in_features, mask_pooler and mask_head"):
        instantiate(heads)


class ForwardOnly(nn.Module):
    """A mask head without `layers()` and `mask_logits()`."""

    def __init__(self, input_shape):
        super().__init__()


@pytest.mark.parametrize("cascade", [False, True], ids=["standard", "cascade"])
def test_a_mask_head_without_logits_is_an_error_that_names_it(cascade):
    cfg = tiny_mask_scoring_rcnn(cascade)
    shape = cfg.model.roi_heads.mask_head.input_shape
    cfg.model.roi_heads.mask_head = {"_target_": ForwardOnly, "input_shape": shape}

    with pytest.raises(ValueError, match=r"`layers\(\)`.*`mask_logits\(\)`.*ForwardOnly"):
        instantiate(cfg.model.roi_heads)


def test_heads_without_a_mask_pooler_are_an_error():
    cfg = tiny_mask_scoring_rcnn()
    cfg.model.roi_heads.mask_pooler = None

    with pytest.raises(ValueError, match="mask.pooler"):
        instantiate(cfg.model.roi_heads)


# ---- augmentation that cuts objects away


@pytest.mark.parametrize("side, expected_counts", [(32, {1, 2}), (20, {0, 1})])
def test_trains_on_crops_that_cut_objects_away(side, expected_counts, tmp_path, event_storage):
    write_images(tmp_path)
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.FixedSizeCrop((side, side))],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        recompute_boxes=True,
    )
    height, width = IMAGE_SIZE
    images = [
        {
            "file_name": str(tmp_path / f"{k}.png"),
            "height": height,
            "width": width,
            "annotations": x,
        }
        for k, x in enumerate(rle_annotations(), start=1)
    ]
    model = instantiate(tiny_mask_scoring_rcnn().model)
    np.random.seed(0)

    counts = set()
    for _ in range(6):
        batch = [mapper(image) for image in images]
        counts |= {len(x["instances"]) for x in batch}
        losses = model(batch)
        model.zero_grad()
        assert_trains_every_parameter(losses, model.roi_heads)
    assert counts == expected_counts  # of the two objects, what is left in the crops


# ---- what the mask branch converts, and what postprocessing waits for


class Converted(TorchDispatchMode):
    """Remembers the shapes of tensors that are converted to float32."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype != torch.float32:
            if result.dtype == torch.float32:
                self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("mode", ["train", "infer", "retrofit"])
def test_under_autocast_only_the_masks_of_one_class_become_float32(mode, heads, event_storage):
    with torch.autocast("cpu", dtype=torch.bfloat16), Converted() as converted:
        if mode == "train":
            losses = train(heads)
        elif mode == "infer":
            infer(heads)
        else:
            sampled = heads.train().label_and_sample_proposals(toy_proposals(), toy_instances())
            heads.mask_iou_losses(toy_features(), sampled)
    masks = [shape for shape in converted.shapes if shape[1:] == (1, 28, 28)]
    assert masks  # of the class of each region
    assert not [shape for shape in converted.shapes if shape[1:] == (NUM_CLASSES, 28, 28)]
    if mode == "train":
        expected = train(heads)
        assert losses["loss_mask"].dtype == torch.float32
        torch.testing.assert_close(losses["loss_mask"], expected["loss_mask"], rtol=0.02, atol=0)


def test_gradients_of_loss_mask_are_those_of_detectron2(cascade, event_storage):
    gradients = []
    for heads in twins(cascade):
        train(heads)["loss_mask"].backward()
        gradients.append([x.grad for x in heads.mask_head.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_postprocessing_asks_once_which_boxes_are_left():
    boxes = torch.tensor([[0.0, 0, 8, 8], [5, 5, 5, 9], [90, 2, 96, 60], [200, 0, 300, 9]])
    plain = Instances(
        IMAGE_SIZE, pred_boxes=Boxes(boxes), scores=torch.rand(4), pred_masks=torch.rand(4, 1, 9, 9)
    )
    ours = Instances(IMAGE_SIZE, **plain.get_fields())
    ours.pred_boxes = DetectedBoxes(boxes.clone())
    assert DetectedBoxes(boxes).nonempty().tolist() == [0, 2, 3]
    assert DetectedBoxes(boxes).nonempty(7.0).tolist() == [0, 3]
    for kept in (ours[:3], ours.to("cpu")):
        assert type(kept.pred_boxes) is Boxes

    expected, found = (detector_postprocess(x, 128, 192) for x in (plain, ours))

    assert len(found) == len(expected) == 2  # the last one is outside of the image
    assert type(found.pred_boxes) is Boxes
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_masks, expected.pred_masks)


def test_boxes_of_predictions_are_detected_boxes(cascade):
    assert all(type(x.pred_boxes) is DetectedBoxes for x in infer(twins(cascade)[1]))


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of what is constant in a trace
@pytest.mark.parametrize("with_calibrator", [False, True])
def test_a_traced_model_finds_any_number_of_objects(with_calibrator):
    """As docs/first_prediction.md says."""
    cfg = tiny_mask_scoring_rcnn()
    cfg.model.roi_heads.box_predictor.test_score_thresh = 0.26
    model = instantiate((add_mask_calibrator(cfg) if with_calibrator else cfg).model).eval()
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.02)
    images = [s * torch.rand(3, 64, 96) for s in (255, 60, 0)]

    def find(model, inputs):
        return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]

    adapter = TracingAdapter(model, [{"image": images[0]}], find)
    modules = ("roi_heads", "mask_iou_head", "mask_calibrator", "mask_cues")
    with torch.no_grad(), patch_builtin_len([f"msrcnn_d2.modeling.{x}" for x in modules]):
        traced = torch.jit.trace(adapter, images[0])
    numbers = []
    for image in images:
        found, expected = traced(image), adapter(image)
        numbers.append(len(expected[0]))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert len(set(numbers)) > 1 and min(numbers) > 0
