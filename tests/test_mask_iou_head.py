import math

import pytest
import torch
from torch import nn

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances

from msrcnn_d2 import add_msrcnn_config
from msrcnn_d2.modeling import (
    ROI_MASK_IOU_HEAD_REGISTRY,
    MaskIoUHead,
    build_mask_iou_head,
    mask_iou_inference,
    mask_iou_loss,
)
from msrcnn_d2.modeling.mask_iou_head import MAX_QUADRATIC_ERROR
from msrcnn_d2.modeling.mask_iou_target import CroppedMasks

NUM_CLASSES = 3


def build_head(channels=8, height=14, width=14, **kwargs):
    kwargs = {"num_classes": NUM_CLASSES, "conv_dim": 8, "fc_dim": 16, **kwargs}
    return MaskIoUHead(ShapeSpec(channels=channels, height=height, width=width), **kwargs)


def linears(head):
    return [m for m in head.modules() if isinstance(m, nn.Linear)]


def convolutions(head):
    return [m for m in head.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(
    "height, width, num_conv, num_fc, flat",
    [
        pytest.param(14, 14, 4, 2, 8 * 7 * 7, id="paper"),
        pytest.param(7, 7, 4, 2, 8 * 4 * 4, id="odd"),
        pytest.param(13, 9, 2, 2, 8 * 7 * 5, id="not-square"),
        pytest.param(14, 14, 1, 2, 8 * 7 * 7, id="one-convolution"),
        pytest.param(14, 14, 4, 1, 8 * 7 * 7, id="one-hidden-layer"),
        pytest.param(14, 14, 4, 0, 8 * 7 * 7, id="no-hidden-layer"),
    ],
)
def test_sizes_follow_the_input_shape(height, width, num_conv, num_fc, flat):
    head = build_head(6, height, width, num_conv=num_conv, num_fc=num_fc)

    assert [c.in_channels for c in convolutions(head)] == [7] + [8] * (num_conv - 1)
    assert [c.stride for c in convolutions(head)] == [(1, 1)] * (num_conv - 1) + [(2, 2)]
    assert [x.in_features for x in linears(head)] == [flat] + [16] * num_fc
    masks = torch.rand(5, 1, 2 * height, 2 * width)
    assert head.layers(torch.randn(5, 6, height, width), masks).shape == (5, NUM_CLASSES)


def test_the_default_sizes_are_those_of_the_paper():
    head = MaskIoUHead(ShapeSpec(channels=256, height=14, width=14), num_classes=80)

    assert [tuple(p.shape) for n, p in head.named_parameters() if n.endswith("weight")] == [
        (256, 257, 3, 3),
        (256, 256, 3, 3),
        (256, 256, 3, 3),
        (256, 256, 3, 3),
        (1024, 256 * 7 * 7),
        (1024, 1024),
        (80, 1024),
    ]
    assert head.loss_weight == 1.0


def test_a_head_without_convolutions_is_an_error():
    with pytest.raises(ValueError, match="num_conv is 0"):
        build_head(num_conv=0)


def test_initialisation():
    head = build_head(channels=31, conv_dim=64, fc_dim=256, num_classes=80)

    for module in [*convolutions(head), *linears(head)]:
        assert module.bias.abs().max() == 0
    for conv in convolutions(head):
        # Kaiming normal for ReLU over the fan out, 9 * 64 numbers
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    for fc in linears(head)[:-1]:
        # Kaiming uniform with a = 1: var(w) = 1 / fan in, so |w| < sqrt(3 / fan in)
        bound = math.sqrt(3 / fc.in_features)
        assert 0.99 * bound < fc.weight.abs().max() <= bound
    assert head.predictor.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_the_mask_is_pooled_by_maximum_and_becomes_the_last_channel():
    head = build_head(channels=2, height=2, width=2, num_conv=1)
    seen = []
    head.convs.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = torch.randn(1, 2, 2, 2)
    probs = torch.tensor([[[[0.1, 0.9, 0.0, 0.2], [0.3, 0.2, 0.0, 0.1]] * 2]])

    head.layers(features, probs)

    pooled = torch.tensor([[[[0.9, 0.2], [0.9, 0.2]]]])
    torch.testing.assert_close(seen[0], torch.cat([features, pooled], dim=1), rtol=0, atol=0)


def test_gradients_reach_features_and_mask_probabilities():
    head = build_head()
    features = torch.randn(2, 8, 14, 14, requires_grad=True)
    probs = torch.rand(2, 1, 28, 28, requires_grad=True)

    head.layers(features, probs).sum().backward()

    for grad in (features.grad, probs.grad):
        assert all(grad_of_mask.abs().sum() > 0 for grad_of_mask in grad)


# ---- loss


def test_loss_is_half_the_mean_squared_error():
    # 0.5 * (0.1^2 + 0.3^2) / 2
    loss = mask_iou_loss(torch.tensor([0.6, 0.5]), torch.tensor([0.5, 0.8]))

    assert loss.item() == pytest.approx(0.025)


def test_predictions_far_from_any_iou_cost_linearly():
    limit = MAX_QUADRATIC_ERROR
    truth = torch.tensor([0.5])

    at_limit, beyond = (mask_iou_loss(truth + e, truth).item() for e in (limit, limit + 3))

    assert at_limit == pytest.approx(0.5 * limit**2)
    assert beyond - at_limit == pytest.approx(3 * limit)  # the slope stays that at the limit


def test_masks_that_miss_their_object_do_not_count():
    predicted = torch.tensor([0.6, 5.0, 0.5], requires_grad=True)

    # The second one would dominate; the mean is over the other two: 0.5 * (0.01 + 0.09) / 2
    loss = mask_iou_loss(predicted, torch.tensor([0.5, 0.0, 0.8]))
    loss.backward()

    assert loss.item() == pytest.approx(0.025)
    # d/dp of 0.5 * (p - t)^2 / 2
    torch.testing.assert_close(predicted.grad, torch.tensor([0.05, 0.0, -0.15]))


@pytest.mark.parametrize("count", [0, 2])
def test_loss_without_any_mask_that_counts_is_a_zero_with_gradients(count):
    predicted = torch.full((count,), 0.7, requires_grad=True)

    loss = mask_iou_loss(predicted, torch.zeros(count))
    loss.backward()

    assert loss.item() == 0
    assert predicted.grad.tolist() == [0.0] * count


def foreground(crops, classes, image_size=(100, 100)):
    """Proposals with boxes of 28 x 28 pixels: a cell is a pixel."""
    return Instances(
        image_size,
        proposal_boxes=Boxes(torch.tensor([[0.0, 0, 28, 28]] * len(crops))),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
        gt_masks=CroppedMasks(crops, crops.sum(dim=(1, 2)).float()),
    )


def constant_head(ious, **kwargs):
    """A head that predicts the same IoUs, one for each class, for every mask."""
    head = build_head(num_conv=1, **kwargs)
    nn.init.zeros_(head.predictor.weight)
    with torch.no_grad():
        head.predictor.bias.copy_(torch.tensor(ious))
    return head


def halves():
    """Mask probabilities of two proposals: the left half at 0.6, the right one at 0.4."""
    probs = torch.full((2, 1, 28, 28), 0.4)
    probs[..., :14] = 0.6
    return probs


def test_training_by_hand(event_storage):
    # The first object fills its box, the second the left half of it, and the left half is
    # predicted: IoUs 0.5 and 1. The head says 0.8 for class 2 and 0.9 for class 1.
    crops = torch.ones(2, 28, 28, dtype=torch.bool)
    crops[1, :, 14:] = False
    head = constant_head([7.0, 0.9, 0.8], loss_weight=3.0)
    proposals = [foreground(crops[:1], [2]), foreground(crops[1:], [1])]

    losses = head(torch.randn(2, 8, 14, 14), halves(), proposals)

    assert losses.keys() == {"loss_mask_iou"}
    # 3 * 0.5 * (0.3^2 + 0.1^2) / 2
    assert losses["loss_mask_iou"].item() == pytest.approx(0.075)
    logged = event_storage.latest()
    assert logged["mask_iou/mean_target"][0] == pytest.approx(0.75)
    assert logged["mask_iou/mean_abs_error"][0] == pytest.approx(0.2)


def test_logged_means_are_over_the_masks_that_count(event_storage):
    # IoUs 0.5 and 0: the second object is in no cell
    crops = torch.ones(2, 28, 28, dtype=torch.bool)
    crops[1] = False
    head = constant_head([0.9, 0.9, 0.9])

    head(torch.randn(2, 8, 14, 14), halves(), [foreground(crops, [0, 0])])

    logged = event_storage.latest()
    assert logged["mask_iou/mean_target"][0] == pytest.approx(0.5)
    assert logged["mask_iou/mean_abs_error"][0] == pytest.approx(0.4)


def test_all_detections_count(event_storage):
    # IoUs 0.5 and 0.5, but the second detection has no object of its class; and one that misses
    crops = torch.ones(3, 28, 28, dtype=torch.bool)
    crops[2, :, :14] = False
    head = constant_head([0.9, 0.2, 0.6])
    detections = foreground(crops, [0, 1, 2])
    detections.has_object = torch.tensor([True, False, True])
    left_halves = halves()[[0, 1, 1]]

    losses = head(torch.randn(3, 8, 14, 14), left_halves, [detections])

    # 0.5 * (0.4^2 + 0.2^2 + 0.6^2) / 3
    assert losses["loss_mask_iou"].item() == pytest.approx(0.28 / 3)
    logged = event_storage.latest()
    assert logged["mask_iou/mean_target"][0] == pytest.approx(0.5 / 3)
    assert logged["mask_iou/mean_abs_error"][0] == pytest.approx(0.4)


@pytest.mark.parametrize("count", [0, 2], ids=["no-foreground", "all-masks-miss"])
def test_a_step_without_masks_that_count_reaches_every_parameter(count, event_storage):
    head = build_head()
    proposals = [foreground(torch.zeros(count, 28, 28, dtype=torch.bool), [0] * count)]

    loss = head(torch.randn(count, 8, 14, 14), halves()[:count], proposals)["loss_mask_iou"]
    loss.backward()

    assert loss.item() == 0
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name
    assert "mask_iou/mean_target" not in event_storage.latest()


def test_images_without_foreground_beside_others(event_storage):
    crops = torch.ones(2, 28, 28, dtype=torch.bool)
    head = constant_head([0.7, 0.7, 0.7])
    empty = foreground(crops[:0], [])
    empty.remove("gt_masks")  # such as Detectron2 gives for images without objects

    proposals = [empty, foreground(crops, [0, 1]), empty]
    loss = head(torch.randn(2, 8, 14, 14), halves(), proposals)["loss_mask_iou"]

    assert loss.item() == pytest.approx(0.5 * 0.2**2)  # both IoUs are 0.5


# ---- inference


def predictions(classes, scores=None):
    instances = Instances((100, 100), pred_classes=torch.tensor(classes, dtype=torch.int64))
    if scores is not None:
        instances.scores = torch.tensor(scores)
    return instances


def test_inference_takes_the_iou_of_the_predicted_class():
    ious = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    images = [predictions([2], [0.5]), predictions([0, 1], [1.0, 0.25])]

    mask_iou_inference(ious, images)

    assert images[0].pred_mask_ious.tolist() == pytest.approx([0.3])
    assert images[0].mask_scores.tolist() == pytest.approx([0.15])
    assert images[1].pred_mask_ious.tolist() == pytest.approx([0.4, 0.8])
    assert images[1].mask_scores.tolist() == pytest.approx([0.4, 0.2])
    assert images[1].scores.tolist() == [1.0, 0.25]  # untouched


def test_ious_are_clamped_to_the_unit_interval():
    ious = torch.tensor([[-0.2], [0.0], [0.5], [1.0], [1.3]])
    image = predictions([0] * 5, [0.5] * 5)

    mask_iou_inference(ious, [image])

    assert image.pred_mask_ious.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert image.mask_scores.tolist() == [0.0, 0.0, 0.25, 0.5, 0.5]


def test_instances_without_scores_get_no_mask_scores():
    images = [predictions([1]), predictions([0], [0.5])]

    mask_iou_inference(torch.full((2, 2), 0.5), images)

    assert not images[0].has("mask_scores") and images[0].has("pred_mask_ious")
    assert images[1].mask_scores.tolist() == [0.25]


@pytest.mark.parametrize("counts", [[0], [0, 0], [0, 2, 0]])
def test_images_without_predictions_get_empty_fields(counts):
    images = [predictions([0] * n, [0.5] * n) for n in counts]

    mask_iou_inference(torch.full((sum(counts), 2), 0.5), images)

    for count, image in zip(counts, images):
        for field in (image.pred_mask_ious, image.mask_scores):
            assert field.shape == (count,) and field.dtype == torch.float32


def test_in_evaluation_the_head_returns_the_instances_with_scores():
    head = constant_head([0.2, 0.4, 0.6]).eval()
    images = [predictions([2], [0.5]), predictions([1], [0.5])]

    returned = head(torch.randn(2, 8, 14, 14), torch.rand(2, 1, 28, 28), images)

    assert returned is images
    assert [x.mask_scores.item() for x in images] == pytest.approx([0.3, 0.2])


# ---- registry


def test_a_head_is_built_from_yacs_keys():
    cfg = get_cfg()
    add_msrcnn_config(cfg)
    keys = cfg.MODEL.ROI_MASK_IOU_HEAD
    keys.NUM_CONV, keys.CONV_DIM, keys.NUM_FC, keys.FC_DIM, keys.LOSS_WEIGHT = 2, 5, 3, 11, 0.25
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7

    head = build_mask_iou_head(cfg, ShapeSpec(channels=4, height=14, width=14))

    assert type(head) is MaskIoUHead
    assert [(c.in_channels, c.out_channels) for c in convolutions(head)] == [(5, 5), (5, 5)]
    assert [x.out_features for x in linears(head)] == [11, 11, 11, 7]
    assert head.loss_weight == 0.25


def test_the_default_keys_are_the_default_arguments():
    cfg = get_cfg()
    add_msrcnn_config(cfg)
    shape = ShapeSpec(channels=256, height=14, width=14)

    from_keys = build_mask_iou_head(cfg, shape)
    from_arguments = MaskIoUHead(shape, num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES)

    assert str(from_keys) == str(from_arguments)
    assert from_keys.loss_weight == from_arguments.loss_weight


@ROI_MASK_IOU_HEAD_REGISTRY.register()
class HeadOfAUser(nn.Module):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.input_shape = input_shape


def test_another_registered_head_is_built_by_its_name():
    cfg = get_cfg()
    add_msrcnn_config(cfg)
    cfg.MODEL.ROI_MASK_IOU_HEAD.NAME = "HeadOfAUser"
    shape = ShapeSpec(channels=4, height=14, width=14)

    head = build_mask_iou_head(cfg, shape)

    assert type(head) is HeadOfAUser
    assert head.input_shape == shape


def test_a_box_that_is_not_finite_is_refused(event_storage):
    head = MaskIoUHead(ShapeSpec(channels=2, height=14, width=14), num_classes=1, conv_dim=2)
    boxes = torch.tensor([[0.0, 0, 28, float("inf")]])
    instances = Instances((28, 28), proposal_boxes=Boxes(boxes), gt_classes=torch.zeros(1).long())
    instances.gt_masks = CroppedMasks(torch.ones(1, 28, 28, dtype=torch.bool), torch.ones(1))
    with pytest.raises(FloatingPointError, match="not finite"):
        head(torch.rand(1, 2, 14, 14), torch.rand(1, 1, 28, 28), [instances])
