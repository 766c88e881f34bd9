"""Detectron2's Visualizer in the look of test_drawing.py."""

import numpy as np
import pytest
import torch

from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances, RotatedBoxes
from detectron2.utils.visualizer import ColorMode, Visualizer

from msrcnn_d2.prediction import visualizer as visualizer_module
from msrcnn_d2.prediction.visualizer import MaskScoringVisualizer
from msrcnn_d2_runtime.class_colors import class_color
from msrcnn_d2_runtime.drawing import draw_objects, draw_predictions
from msrcnn_d2_runtime.predictions import CroppedMasks, Predictions

CLASSES = ["person", "baseball glove"]
SCORES, IOUS, MASK_SCORES = [0.934, 0.5], [0.812, 1.0], [0.758, 0.5]
LABELS = ["person 0.76", "baseball glove 0.50"]
FULL_LABELS = ["person 0.93 x IoU 0.81 = 0.76", "baseball glove 0.50 x IoU 1.00 = 0.50"]
METADATA = Metadata(name="test", thing_classes=CLASSES, thing_colors=[(255, 0, 0), (0, 0, 255)])


def two_objects(image_size=(480, 640)):
    """
    One in the upper left corner of the image, one in the lower right corner. Their masks fill
    their boxes.
    """
    height, width = image_size
    boxes = torch.tensor([[0.0, 0.0, 0.4, 0.5], [0.6, 0.4, 1.0, 1.0]])
    boxes = boxes * torch.tensor([width, height, width, height])
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    return Instances(
        image_size,
        pred_boxes=Boxes(boxes),
        pred_classes=torch.tensor([0, 1]),
        pred_masks=masks,
        scores=torch.tensor(SCORES),
        pred_mask_ious=torch.tensor(IOUS),
        mask_scores=torch.tensor(MASK_SCORES),
    )


def without(instances, *names):
    for name in names:
        instances.remove(name)
    return instances


def grey(image_size):
    return np.full((*image_size, 3), 90, np.uint8)


def visualizer(image_size=(480, 640), metadata=METADATA, **kwargs):
    return MaskScoringVisualizer(grey(image_size), metadata, **kwargs)


def drawn(instances, **kwargs):
    """The picture: (H, W, 3)."""
    vis = visualizer(instances.image_size, **kwargs)
    return vis.draw_instance_predictions(instances).get_image()


@pytest.fixture
def calls(monkeypatch):
    """What `draw_objects` has been called with."""
    found = []

    def recorded(canvas, masks, boxes, colors, **kwargs):
        found.append({"masks": masks, "boxes": boxes, "colors": list(colors), **kwargs})
        draw_objects(canvas, masks, boxes, colors, **kwargs)

    monkeypatch.setattr(visualizer_module, "draw_objects", recorded)
    return found


@pytest.mark.parametrize("style", ["short", "full", "none"])
@pytest.mark.parametrize("size", [(64, 96), (480, 640), (427, 500)], ids=str)
def test_pictures_are_those_of_draw_predictions(size, style):
    instances = two_objects(size)
    predictions = Predictions(
        pred_boxes=instances.pred_boxes.tensor.numpy(),
        pred_classes=instances.pred_classes.numpy(),
        masks=CroppedMasks.of(instances.pred_masks.numpy()),
        scores={
            name: instances.get(name).numpy()
            for name in ("scores", "pred_mask_ious", "mask_scores")
        },
        ranking="mask_scores",
    )
    expected = draw_predictions(grey(size), predictions, CLASSES, labels=style)
    np.testing.assert_array_equal(drawn(instances, labels=style), expected)


def test_labels_are_short_by_default(calls):
    drawn(two_objects())
    drawn(two_objects(), labels="full")
    drawn(two_objects(), labels="none")
    assert [call["labels"] for call in calls] == [LABELS, FULL_LABELS, []]
    assert calls[0]["importance"] == pytest.approx(MASK_SCORES)


def test_without_names_a_class_is_its_index(calls):
    drawn(two_objects(), metadata=None)
    assert calls[0]["labels"] == ["0 0.76", "1 0.50"]


@pytest.mark.parametrize(
    "removed, short, full",
    [
        (["scores", "mask_scores"], ["0.81", "1.00"], ["IoU 0.81", "IoU 1.00"]),
        (["pred_mask_ious", "mask_scores"], ["0.93", "0.50"], ["0.93", "0.50"]),
    ],
    ids=["IoU only", "plain Mask R-CNN"],
)
def test_labels_of_models_that_lack_a_score(removed, short, full, calls):
    instances = without(two_objects(), *removed)
    drawn(instances)
    drawn(instances, labels="full")
    for call, scores in zip(calls, (short, full)):
        assert call["labels"] == [f"{name} {x}" for name, x in zip(CLASSES, scores)]


def test_the_calibrated_score_is_that_which_ranks(calls):
    instances = two_objects()
    instances.quality_scores = torch.tensor([0.3, 0.6])
    drawn(instances)
    drawn(instances, labels="full")
    assert calls[0]["labels"] == ["person 0.30", "baseball glove 0.60"]
    assert calls[1]["labels"][0] == "person 0.93, IoU 0.81 → 0.30"
    assert calls[0]["importance"] == pytest.approx([0.3, 0.6])


def test_instances_with_neither_scores_nor_classes_are_drawn(calls):
    """Annotations that have been made Instances, for example."""
    instances = without(two_objects(), "scores", "mask_scores", "pred_mask_ious")
    assert (drawn(instances)[100, 100] != 90).any()
    assert calls[0]["labels"] == CLASSES
    instances.remove("pred_classes")
    drawn(instances)
    assert list(calls[1]["labels"]) == []
    assert calls[1]["colors"] == [class_color(0), class_color(1)]


def test_colors_are_those_of_the_classes_or_of_the_metadata(calls):
    drawn(two_objects()[[1]])
    drawn(two_objects()[[1]], instance_mode=ColorMode.SEGMENTATION)
    assert [call["colors"] for call in calls] == [[class_color(1)], [(0, 0, 255)]]


def test_only_objects_keep_their_colours_with_image_bw():
    image = np.zeros((480, 640, 3), np.uint8)
    image[..., 0] = 240
    vis = MaskScoringVisualizer(image, METADATA, instance_mode=ColorMode.IMAGE_BW, labels="none")
    picture = vis.draw_instance_predictions(two_objects()).get_image()
    assert picture[10, 600].tolist() == [80, 80, 80]
    assert picture[100, 100].astype(int) == pytest.approx(
        0.7 * image[0, 0] + 0.3 * np.array(class_color(0)), abs=1
    )


@pytest.mark.parametrize("mode", ColorMode)
def test_no_instances_leave_the_image_as_it_is(mode):
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    image[..., :] = image[..., :1]  # grey, because ColorMode.IMAGE_BW makes it so
    vis = MaskScoringVisualizer(image, METADATA, scale=1.0, instance_mode=mode)
    # Not the image itself: older versions of Matplotlib resample it
    blank = Visualizer(image, METADATA).output.get_image()
    instances = two_objects((40, 50))[[]]
    np.testing.assert_array_equal(vis.draw_instance_predictions(instances).get_image(), blank)


@pytest.mark.parametrize("mode", ColorMode)
def test_predictions_are_not_modified(mode):
    instances, before = two_objects(), two_objects()
    drawn(instances, instance_mode=mode)
    assert instances.get_fields().keys() == before.get_fields().keys()
    for name, value in before.get_fields().items():
        value, now = (getattr(x, "tensor", x) for x in (value, instances.get(name)))
        assert torch.equal(now, value), name


def test_predictions_may_be_on_another_device(calls):
    class OnAnotherDevice:
        def __init__(self, tensor):
            self.tensor = tensor

        def __len__(self):
            return len(self.tensor)

        def to(self, device):
            assert device == "cpu"
            return self.tensor

    there = {k: OnAnotherDevice(v) for k, v in two_objects().get_fields().items()}
    drawn(Instances((480, 640), **there))
    assert calls[0]["labels"] == LABELS


def test_masks_without_boxes_are_drawn_if_they_are_not_empty(calls):
    instances = without(two_objects((64, 96)), "pred_boxes")
    expected = drawn(two_objects((64, 96)))
    np.testing.assert_array_equal(drawn(instances), expected)
    instances.pred_masks = instances.pred_masks.clone()
    instances.pred_masks[0] = False
    picture = drawn(instances)
    assert (picture[: 192 - 20, :200] == 90).all() and (picture[300, 500] != 90).any()


def test_boxes_without_masks_have_outlines():
    picture = drawn(without(two_objects(), "pred_masks"))
    changed = (picture != 90).any(axis=2)
    assert changed[192:480, 384].all() and changed[479, 384:640].all()
    assert not changed[400:470, 400:630].any()


def test_rotated_boxes_are_left_to_detectron2():
    instances = Instances(
        (480, 640),
        pred_boxes=RotatedBoxes(torch.tensor([[300.0, 200, 100, 50, 30]])),
        pred_classes=torch.tensor([0]),
        scores=torch.tensor([0.9]),
    )
    vis = visualizer()
    vis.draw_instance_predictions(instances)
    (text,) = vis.output.ax.texts
    assert text.get_text() == "person 90%" and text.get_rotation() == 30


def test_keypoints_are_left_to_detectron2():
    instances = two_objects()
    points = torch.tensor([[[100.0, 100, 1]], [[500, 400, 1]]])
    instances.pred_keypoints = points
    vis = visualizer()
    vis.draw_instance_predictions(instances)
    assert [patch.center for patch in vis.output.ax.patches] == [(100, 100), (500, 400)]
    only_points = without(instances, "pred_masks", "pred_boxes")
    vis = visualizer()
    vis.draw_instance_predictions(only_points)
    assert len(vis.output.ax.patches) == 2


def test_what_was_drawn_before_lies_below_and_what_is_drawn_after_on_top():
    vis = visualizer(labels="none")
    vis.draw_circle((100, 100), color=(1, 0, 0), radius=20)
    vis.draw_instance_predictions(two_objects())
    mixed = 0.6 * np.array([255, 0, 0]) + 0.4 * np.array(class_color(0))
    assert vis.output.get_image()[100, 100].astype(int) == pytest.approx(mixed, abs=1)
    vis.draw_circle((500, 400), color=(1, 0, 0), radius=20)
    picture = vis.output.get_image()
    assert picture[400, 500].tolist() == [255, 0, 0]
    assert picture[100, 100].astype(int) == pytest.approx(mixed, abs=1)  # once, not twice


def test_a_second_drawing_lies_upon_the_first():
    vis = visualizer(labels="none")
    first, second = (two_objects()[[k]] for k in (0, 1))
    vis.draw_instance_predictions(first)
    picture = vis.draw_instance_predictions(second).get_image()
    np.testing.assert_array_equal(picture, drawn(two_objects(), labels="none"))


@pytest.mark.parametrize("size", [(64, 96), (30, 500), (480, 640)], ids=str)
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_pictures_have_the_scale_that_is_given(size, scale):
    vis = visualizer(size, scale=scale)
    assert vis.output.scale == scale
    picture = vis.draw_instance_predictions(two_objects(size)).get_image()
    assert picture.shape == Visualizer(grey(size), METADATA, scale).output.get_image().shape
    inside = np.array([0.8, 0.8]) * picture.shape[:2]
    assert (picture[tuple(inside.astype(int))] != 90).any()


def test_default_scale_enlarges_small_images_only():
    assert visualizer((480, 640)).output.get_image().shape == (480, 640, 3)
    assert visualizer((64, 96)).output.get_image().shape == (384, 576, 3)
    assert visualizer((9000, 10)).output.get_image().shape == (9000, 10, 3)
    assert visualizer((64, 96), scale=1.0).output.get_image().shape == (64, 96, 3)


def test_instances_of_users_have_the_colours_and_labels_that_they_give(calls):
    vis = MaskScoringVisualizer(np.zeros((480, 640, 3)), METADATA, 1.5, ColorMode.SEGMENTATION)
    assert isinstance(vis, Visualizer) and vis.output.scale == 1.5
    boxes = two_objects().pred_boxes
    vis.overlay_instances(boxes=boxes, labels=["a", "b"], assigned_colors=["navy", (1, 0.5, 0)])
    assert calls[0]["labels"] == ["a", "b"]
    assert calls[0]["colors"] == [(0, 0, 128), (255, 128, 0)]


def test_annotations_have_the_colours_of_predictions(calls):
    annotations = [
        {"bbox": [10, 10, 99, 99], "bbox_mode": 0, "category_id": 1, "iscrowd": 1},
        {"bbox": [200, 10, 250, 99], "bbox_mode": 0, "category_id": 0},
    ]
    visualizer().draw_dataset_dict({"annotations": annotations})
    assert calls[0]["labels"] == ["baseball glove|crowd", "person"]
    assert calls[0]["colors"] == [class_color(1), class_color(0)]
    polygon = [10.0, 10, 99, 10, 99, 99]
    visualizer().draw_dataset_dict({"annotations": [annotations[0] | {"segmentation": [polygon]}]})
    assert 0.4 < calls[1]["masks"].areas()[0] / 89**2 < 0.6
    visualizer().draw_dataset_dict({"annotations": []})


def test_a_visualizer_does_not_confuse_what_it_draws(calls):
    vis = visualizer()
    vis.draw_instance_predictions(two_objects())
    vis.overlay_instances(boxes=two_objects().pred_boxes, labels=["a", "b"])
    vis.draw_instance_predictions(two_objects()[[1]])
    assert [call["labels"] for call in calls] == [LABELS, ["a", "b"], LABELS[1:]]
