import itertools

import numpy as np
import pytest
import torch

from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances, RotatedBoxes
from detectron2.utils.visualizer import ColorMode, Visualizer

from msrcnn_d2.prediction.visualizer import MaskScoringVisualizer, mask_score_labels, place_labels

CLASSES = ["person", "baseball glove"]
SCORES, IOUS, MASK_SCORES = [0.934, 0.5], [0.812, 1.0], [0.758, 0.5]
LABELS = ["person 0.93 x IoU 0.81 = 0.76", "baseball glove 0.50 x IoU 1.00 = 0.50"]
# Of the image, height and width
SIZES = [(64, 96), (128, 128), (30, 500), (500, 30), (9, 9), (480, 640), (3000, 4000)]
LEGIBLE, LEGIBLE_IN_A_CROWD = 10, 8  # pixels
METADATA = Metadata(name="test", thing_classes=CLASSES, thing_colors=[(255, 0, 0), (0, 0, 255)])


def predictions(
    image_size, boxes, classes=(0, 1), scores=SCORES, ious=IOUS, mask_scores=MASK_SCORES
):
    """Masks fill their boxes (x0, y0, x1, y1), which are shares of the image."""
    height, width = image_size
    boxes = torch.tensor(boxes).reshape(-1, 4) * torch.tensor([width, height, width, height])
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    return Instances(
        image_size,
        pred_boxes=Boxes(boxes),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
        pred_masks=masks,
        scores=torch.tensor(scores),
        pred_mask_ious=torch.tensor(ious),
        mask_scores=torch.tensor(mask_scores),
    )


def two_objects(image_size=(480, 640)):
    """One in the upper left corner of the image, one in the lower right corner."""
    return predictions(image_size, [[0.0, 0.0, 0.4, 0.5], [0.6, 0.4, 1.0, 1.0]])


def neighbours(image_size, num):
    """So many small objects side by side, the better the mask the farther to the right."""
    boxes = [[0.3 + 0.4 * k / num, 0.4, 0.3 + 0.4 * (k + 1) / num, 0.45] for k in range(num)]
    mask_scores = [(k + 1) / num for k in range(num)]
    return predictions(
        image_size, boxes, [0] * num, [1.0] * num, mask_scores, mask_scores=mask_scores
    )


def visualizer(image_size=(480, 640), metadata=METADATA, **kwargs):
    return MaskScoringVisualizer(np.full((*image_size, 3), 90), metadata, **kwargs)


def drawn(instances, **kwargs):
    """Draws the instances and returns the visualizer."""
    vis = visualizer(instances.image_size, **kwargs)
    vis.draw_instance_predictions(instances)
    return vis


def texts(vis):
    return [text.get_text() for text in vis.output.ax.texts]


def dark_boxes(vis):
    """Of the labels, in pixels of the output (x0, y0, x1, y1), y upwards."""
    for text in vis.output.ax.texts:  # as rendering would, which takes long for a large picture
        text.update_bbox_position_size(vis.output.canvas.get_renderer())
    return [t.get_bbox_patch().get_window_extent().extents for t in vis.output.ax.texts]


def font_sizes(vis):
    """In pixels of the output."""
    return [t.get_fontsize() * vis.output.dpi / 72 for t in vis.output.ax.texts]


def overlap(a, b):
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return max(width, 0) * max(height, 0)


def test_labels_tell_class_score_iou_and_mask_score():
    assert mask_score_labels(two_objects(), CLASSES) == LABELS
    assert sorted(texts(drawn(two_objects()))) == sorted(LABELS)


@pytest.mark.parametrize(
    "scores, ious, mask_scores, expected",
    [
        pytest.param(
            [0.934, 0.5],
            [0.812, 1.0],
            [0.406, 0.5],
            ["person 0.93, IoU 0.81 → 0.41", "baseball glove 0.50, IoU 1.00 → 0.50"],
            id="less than the products, all labels alike",
        ),
        pytest.param(
            [0.934, 0.5],
            [0.812, 0.4],
            [0.934, 0.5],
            ["person 0.93, IoU 0.81 → 0.93", "baseball glove 0.50, IoU 0.40 → 0.50"],
            id="the class scores",
        ),
    ],
)
def test_labels_claim_no_equation_that_is_wrong(scores, ious, mask_scores, expected):
    boxes = [[0.0, 0.0, 0.4, 0.5], [0.6, 0.4, 1.0, 1.0]]
    instances = predictions((480, 640), boxes, (0, 1), scores, ious, mask_scores)
    assert mask_score_labels(instances, CLASSES) == expected
    assert sorted(texts(drawn(instances))) == sorted(expected)


def test_without_names_a_class_is_its_index():
    assert mask_score_labels(two_objects())[1] == "1 0.50 x IoU 1.00 = 0.50"
    assert "1 0.50 x IoU 1.00 = 0.50" in texts(drawn(two_objects(), metadata=None))


def test_without_scores_there_is_only_the_iou():
    instances = two_objects()
    instances.remove("scores")
    instances.remove("mask_scores")
    assert sorted(texts(drawn(instances))) == ["baseball glove IoU 1.00", "person IoU 0.81"]


def test_labels_end_with_the_calibrated_score():
    """Also where it happens to be the product, so that all pictures of a model read alike."""
    instances = two_objects()
    instances.quality_scores = torch.tensor([0.758, 0.5])
    labels = ["person 0.93, IoU 0.81 → 0.76", "baseball glove 0.50, IoU 1.00 → 0.50"]
    assert mask_score_labels(instances, CLASSES) == labels
    instances.remove("pred_mask_ious")
    instances.remove("mask_scores")
    labels = ["person 0.93 → 0.76", "baseball glove 0.50 → 0.50"]
    assert mask_score_labels(instances, CLASSES) == labels
    assert sorted(texts(drawn(instances))) == sorted(labels)


def test_plain_mask_rcnn_gets_the_texts_of_detectron2():
    instances = two_objects()
    instances.remove("pred_mask_ious")
    instances.remove("mask_scores")
    vis = drawn(instances)
    assert sorted(texts(vis)) == ["baseball glove 50%", "person 93%"]
    # The same visualizer does not confuse them with those before
    vis.draw_instance_predictions(two_objects())
    vis.draw_instance_predictions(instances)
    assert texts(vis)[-2:] == ["baseball glove 50%", "person 93%"]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_labels_are_legible_and_inside_the_picture(size):
    vis = drawn(two_objects(size))
    assert min(font_sizes(vis)) >= LEGIBLE
    width, height = vis.output.canvas.get_width_height()
    if width > height / 2:  # else the label would not fit
        assert min(font_sizes(vis)) >= (height * width) ** 0.5 / 60
    assert_inside_the_picture(vis)


@pytest.mark.parametrize("size", [(64, 96), (30, 500), (480, 640)], ids=str)
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_labels_are_inside_the_picture_at_any_scale(size, scale):
    vis = drawn(two_objects(size), scale=scale)
    assert vis.output.scale == scale
    assert_inside_the_picture(vis)


def assert_inside_the_picture(vis):
    width, height = vis.output.canvas.get_width_height()
    assert len(dark_boxes(vis)) == 2
    for x0, y0, x1, y1 in dark_boxes(vis):
        assert -1 <= x0 < x1 <= width + 1 and -1 <= y0 < y1 <= height + 1


@pytest.mark.parametrize("size", [(64, 96), (480, 640), (1500, 2000)], ids=str)
@pytest.mark.parametrize("num", [2, 10])
def test_labels_of_neighbours_do_not_overlap(size, num):
    boxes = dark_boxes(drawn(neighbours(size, num)))
    assert len(boxes) == num
    assert all(overlap(a, b) == 0 for a, b in itertools.combinations(boxes, 2))


def test_lone_label_lies_at_its_object_without_hiding_it():
    instances = neighbours((480, 640), 1)
    vis = drawn(instances)
    x0, y0, x1, y1 = instances.pred_boxes.tensor[0].tolist()
    left, lower, right, upper = dark_boxes(vis)[0]
    assert x0 <= left <= x0 + 3
    assert 0 <= lower - (480 - y0) <= 3
    assert not vis.output.ax.lines


# Boxes of objects, and whether a label of 60 x 10 pixels stays upon the first one
@pytest.mark.parametrize(
    "others, upon_it",
    [
        ([], True),
        ([[100, 88, 120, 98]], False),  # a small object that would be hidden
        ([[40, 70, 170, 140]] * 5, True),  # larger ones that would be hidden in part
    ],
    ids=["alone", "small object above", "large objects around"],
)
def test_label_keeps_clear_of_small_objects_but_at_its_own(others, upon_it):
    boxes = np.array([[100.0, 100, 110, 110], *others])
    label = place_labels(boxes, np.tile([60.0, 10.0], (len(boxes), 1)), np.array([300, 300]))[0]
    assert (label.tolist() == [100, 90, 160, 100]) == upon_it
    assert _touches(np.maximum(label[:2], np.minimum(label[2:], [105, 105])), boxes[:1], slack=0.1)
    assert upon_it or overlap(label, boxes[1]) == 0


def test_label_that_had_to_move_away_has_a_line_to_its_object():
    instances = neighbours((480, 640), 10)
    vis = drawn(instances)
    assert vis.output.ax.lines
    boxes = instances.pred_boxes.tensor.numpy()
    for line in vis.output.ax.lines:
        (x0, y0), end = line.get_xydata()
        extents = np.array(dark_boxes(vis))
        labels = (extents[:, [0, 3, 2, 1]] - [0, 480, 0, 480]) * [1, -1, 1, -1]
        assert _touches([x0, y0], labels) and _touches(end, boxes)


def _touches(point, boxes, slack=2.0):
    point = np.array(point)
    inside = (point >= boxes[:, :2] - slack) & (point <= boxes[:, 2:] + slack)
    return inside.all(axis=1).any()


def test_best_mask_has_the_best_place_and_is_on_top():
    vis = drawn(neighbours((480, 640), 100))
    assert len(texts(vis)) == 100
    assert texts(vis)[-1].endswith("= 1.00") and texts(vis)[0].endswith("= 0.01")
    x0, y0, x1, y1 = neighbours((480, 640), 100).pred_boxes.tensor[-1].tolist()
    assert _touches(
        [x0, y0], (dark_boxes(vis)[-1][[0, 3, 2, 1]] * [1, -1, 1, -1] + [0, 480, 0, 480])[None]
    )


def test_best_is_the_best_by_calibrated_score():
    instances = neighbours((480, 640), 2)  # by mask score the second is the best
    instances.quality_scores = torch.tensor([0.9, 0.1])
    assert texts(drawn(instances))[-1].endswith("→ 0.90")


def test_many_labels_are_smaller_but_legible():
    few, many = drawn(neighbours((1500, 2000), 2)), drawn(neighbours((1500, 2000), 60))
    assert LEGIBLE < max(font_sizes(many)) < 0.8 * min(font_sizes(few))
    assert min(font_sizes(drawn(neighbours((480, 640), 100)))) >= LEGIBLE_IN_A_CROWD


def test_label_has_a_light_tone_of_the_colour_of_its_mask():
    vis = visualizer()
    vis.overlay_instances(
        boxes=two_objects().pred_boxes, labels=["a", "b"], assigned_colors=["navy", "red"]
    )
    colors = {t.get_text(): np.array(t.get_color()) for t in vis.output.ax.texts}
    assert colors["a"].argmax() == 2 and colors["b"].argmax() == 0
    assert min(c.min() for c in colors.values()) >= 0.5


@pytest.mark.parametrize("mode", ColorMode)
def test_no_instances_leave_the_image_as_it_is(mode):
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    image[..., :] = image[..., :1]  # grey, because ColorMode.IMAGE_BW makes it so
    instances = predictions((40, 50), [], (), (), (), ())
    vis = MaskScoringVisualizer(image, METADATA, scale=1.0, instance_mode=mode)
    # Not the image itself: older versions of Matplotlib resample it
    blank = Visualizer(image, METADATA).output.get_image()
    np.testing.assert_array_equal(vis.draw_instance_predictions(instances).get_image(), blank)


@pytest.mark.parametrize("mode", ColorMode)
def test_predictions_are_not_modified(mode):
    instances, before = two_objects(), two_objects()
    drawn(instances, instance_mode=mode)
    assert instances.get_fields().keys() == before.get_fields().keys()
    for name, value in before.get_fields().items():
        value, now = (getattr(x, "tensor", x) for x in (value, instances.get(name)))
        assert torch.equal(now, value), name


def test_predictions_may_be_on_another_device():
    class OnAnotherDevice:
        def __init__(self, tensor):
            self.tensor = tensor

        def __len__(self):
            return len(self.tensor)

        def to(self, device):
            assert device == "cpu"
            return self.tensor

    there = {k: OnAnotherDevice(v) for k, v in two_objects().get_fields().items()}
    assert sorted(texts(drawn(Instances((480, 640), **there)))) == sorted(LABELS)


def test_masks_without_boxes_are_labelled_if_they_are_not_empty():
    instances = two_objects((64, 96))
    instances.remove("pred_boxes")
    vis = drawn(instances)
    assert len(texts(vis)) == 2
    assert_inside_the_picture(vis)
    instances.pred_masks = instances.pred_masks.clone()
    instances.pred_masks[0] = False
    assert texts(drawn(instances)) == LABELS[1:]
    assert texts(drawn(instances[:1])) == []


def test_rotated_boxes_are_left_to_detectron2():
    instances = Instances(
        (480, 640),
        pred_boxes=RotatedBoxes(torch.tensor([[300.0, 200, 100, 50, 30]])),
        pred_classes=torch.tensor([0]),
        scores=torch.tensor([0.9]),
    )
    vis = drawn(instances)
    assert texts(vis) == ["person 90%"]
    assert vis.output.ax.texts[0].get_rotation() == 30


def test_default_scale_enlarges_small_images_only():
    assert visualizer((480, 640)).output.get_image().shape == (480, 640, 3)
    assert visualizer((64, 96)).output.get_image().shape == (384, 576, 3)
    assert visualizer((9000, 10)).output.get_image().shape == (9000, 10, 3)
    assert visualizer((64, 96), scale=1.0).output.get_image().shape == (64, 96, 3)


def test_is_a_visualizer_of_detectron2():
    vis = MaskScoringVisualizer(np.zeros((480, 640, 3)), METADATA, 1.5, ColorMode.SEGMENTATION)
    assert isinstance(vis, Visualizer) and vis.output.scale == 1.5
    dataset_dict = {
        "annotations": [
            {"bbox": [10, 10, 99, 99], "bbox_mode": 0, "category_id": 0, "iscrowd": 1},
        ]
    }
    vis.draw_dataset_dict(dataset_dict)
    assert texts(vis) == ["person|crowd"]
