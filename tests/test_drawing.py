"""Pictures of predictions, drawn without Detectron2: see test_visualizer.py for its Visualizer."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ImageFont, features

from msrcnn_d2_runtime import drawing, labels
from msrcnn_d2_runtime.class_colors import class_color, class_colors
from msrcnn_d2_runtime.drawing import draw_predictions
from msrcnn_d2_runtime.labels import Spot, all_scores, cut_to, label_image, place_labels
from msrcnn_d2_runtime.predictions import CroppedMasks, Predictions

NAMES = ["person", "baseball glove", "car"]
# Of the image, height and width
SIZES = [(64, 96), (128, 128), (30, 500), (500, 30), (9, 9), (480, 640), (1500, 2000)]


def predictions(image_size, boxes, classes=None, scores=None):
    """Masks fill their boxes (x0, y0, x1, y1), which are in pixels."""
    num = len(boxes)
    crops = [(y0, x0, np.ones((y1 - y0, x1 - x0), bool)) for x0, y0, x1, y1 in boxes]
    ranked = np.linspace(0.9, 0.3, num) if scores is None else np.array(scores)
    return Predictions(
        pred_boxes=np.array(boxes, np.float32).reshape(num, 4),
        pred_classes=np.zeros(num, np.int64) if classes is None else np.array(classes, np.int64),
        masks=CroppedMasks(crops, image_size),
        scores={"scores": ranked / 0.9, "pred_mask_ious": np.full(num, 0.9), "mask_scores": ranked},
        ranking="mask_scores",
    )


def two_objects(image_size=(480, 640)):
    """One in the upper left corner of the image, one in the lower right corner."""
    height, width = image_size
    boxes = [
        (0, 0, int(0.4 * width), int(0.5 * height)),
        (int(0.6 * width), int(0.4 * height), width, height),
    ]
    return predictions(image_size, boxes, [0, 1])


def crowd(image_size=(480, 640), num=100, side=12):
    """So many squares of this side, close to each other in the middle of the image."""
    height, width = image_size
    rows = int(num**0.5)
    boxes = [
        (
            width // 2 + (k % rows - rows // 2) * (side + 2),
            height // 2 + (k // rows - rows // 2) * (side + 2),
        )
        for k in range(num)
    ]
    return predictions(image_size, [(x, y, x + side, y + side) for x, y in boxes])


def grey(image_size, value=90):
    return np.full((*image_size, 3), value, np.uint8)


@pytest.fixture
def drawn(monkeypatch):
    """The texts and places of the labels of the last picture, after `place_labels`."""
    found = SimpleNamespace(texts=[], places=[], sizes=[], font_sizes=[])

    def recorded_image(text, font_size, color):
        found.texts.append(text)
        found.font_sizes.append(font_size)
        return label_image(text, font_size, color)

    def recorded_places(spots, sizes, picture):
        places, gaps = place_labels(spots, sizes, picture)
        found.places, found.boxes = places, np.array([spot.box for spot in spots])
        return places, gaps

    monkeypatch.setattr(drawing, "label_image", recorded_image)
    monkeypatch.setattr(drawing, "place_labels", recorded_places)
    return found


def overlap(a, b):
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return max(width, 0) * max(height, 0)


# ---- colours


def test_color_of_a_class_does_not_depend_on_the_number_of_classes():
    many = class_colors(1203)
    for num in (0, 1, 80, 500):
        np.testing.assert_array_equal(class_colors(num), many[:num])
    assert len(np.unique(many, axis=0)) == 1203
    assert class_color(1) == (0xE6, 0x9F, 0x00)
    # In earlier versions and on other machines: users' pictures of today and tomorrow look alike
    later = ["00ffff", "a569ff", "a5d287"]
    assert ["".join(f"{c:02x}" for c in color) for color in many[7:10]] == later


def test_first_colors_differ_for_the_colour_blind_too():
    # Viénot, Brettel and Mollon 1999, another simulation than that which the colours are chosen by
    protan = [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]
    deutan = [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]
    for vision in (np.eye(3), protan, deutan):
        linear = (class_colors(10) / 255) ** 2.2 @ np.transpose(vision)
        xyz = linear @ [
            [0.4339, 0.2126, 0.0178],
            [0.3762, 0.7152, 0.1095],
            [0.1899, 0.0722, 0.8728],
        ]
        x, y, z = np.cbrt(xyz.clip(0)).T
        lab = np.stack([116 * y, 500 * (x - y), 200 * (y - z)], axis=1)
        distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)]
        assert min(distances) > 9  # CIE 1976; 2.3 is a just noticeable difference


# ---- masks


def test_masks_are_translucent_in_the_colours_of_their_classes():
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    before = image.copy()
    found = predictions((480, 640), [(50, 60, 250, 260), (300, 200, 500, 400)], [2, 1])
    picture = draw_predictions(image, found, NAMES, labels="none")
    np.testing.assert_array_equal(image, before)
    changed = (picture != image).any(axis=2)
    for (x0, y0, x1, y1), k in zip(found.pred_boxes.astype(int), (2, 1)):
        inside = np.s_[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4]
        mixed = 0.6 * image[inside] + 0.4 * np.array(class_color(k))
        assert np.abs(picture[inside] - mixed).max() <= 1
        changed[y0 - 4 : y1 + 4, x0 - 4 : x1 + 4] = False
    assert not changed.any()


def test_small_objects_lie_upon_large_ones_and_nothing_is_mixed_twice():
    found = predictions((480, 640), [(200, 200, 260, 260), (20, 20, 460, 460)], [0, 1])
    picture = draw_predictions(grey((480, 640)), found, labels="none")
    for point, k in (((230, 230), 0), ((100, 100), 1)):
        assert np.abs(picture[point] - (54 + 0.4 * np.array(class_color(k)))).max() <= 1


@pytest.mark.parametrize("better", [0, 1])
def test_of_nearly_the_same_masks_the_better_one_is_on_top(better):
    boxes = [(200, 200, 300, 300), (202, 200, 300, 300)]
    found = predictions((480, 640), boxes, [0, 1], [0.4 + 0.5 * (k == better) for k in (0, 1)])
    picture = draw_predictions(grey((480, 640)), found, labels="none")
    expected = 54 + 0.4 * np.array(class_color(better))
    assert np.abs(picture[250, 250] - expected).max() <= 1


@pytest.mark.parametrize("k", [*range(12), 79, 1202])
@pytest.mark.parametrize("value", [0, 255])
def test_outlines_are_visible_on_light_and_dark_pictures(k, value):
    found = predictions((480, 640), [(50, 60, 250, 260)], [k])
    picture = draw_predictions(grey((480, 640), value), found, labels="none")
    edge = picture[160, 45:55].astype(float)  # from the background to the mask
    assert np.abs(edge - value).max(axis=1).max() > 100
    assert np.abs(edge[:, None] - edge).max() > 75  # not only the fill


def test_colors_can_be_given():
    picture = draw_predictions(
        grey((480, 640)), two_objects(), labels="none", colors=[(255, 0, 0), (0, 0, 255)]
    )
    assert picture[100, 100].tolist() == [156, 54, 54]
    assert picture[400, 600].tolist() == [54, 54, 156]


def test_nothing_is_drawn_without_predictions():
    image = grey((480, 640))
    for legend in (False, True):
        picture = draw_predictions(image, predictions((480, 640), []), NAMES, legend=legend)
        np.testing.assert_array_equal(picture, image)
        assert picture is not image


@pytest.mark.parametrize("size", [(0, 0), (20, 0), (20, 20)])
def test_an_empty_mask_has_the_outline_of_its_box(size, drawn):
    found = two_objects()
    found.masks.crops[1] = (0, 0, np.zeros(size, bool))
    picture = draw_predictions(grey((480, 640)), found, NAMES)
    x0, y0, x1, y1 = found.pred_boxes[1].astype(int)
    changed = (picture != 90).any(axis=2)
    assert changed[y0, x0:x1].all() and changed[y0:y1, x0].all()
    assert not changed[y0 + 40 : y1 - 4, x0 + 4 : x1 - 4].any()
    assert len(drawn.texts) == 2 and not np.isnan(drawn.places).any()


def test_masks_are_pasted_once_and_never_as_large_as_the_image(monkeypatch):
    calls = []
    crop = CroppedMasks.crop
    monkeypatch.setattr(CroppedMasks, "crop", lambda self, k: calls.append(k) or crop(self, k))
    monkeypatch.delattr("msrcnn_d2_runtime.predictions.Masks.pasted")
    draw_predictions(grey((480, 640)), two_objects(), NAMES, legend=True)
    assert sorted(calls) == [0, 1]


@pytest.mark.parametrize("scale", [1.0, 1.7, 3.0])
def test_masks_are_enlarged_with_the_picture(scale):
    found = predictions((200, 300), [(50, 60, 150, 160)])
    picture = draw_predictions(grey((200, 300)), found, labels="none", scale=scale)
    assert picture.shape == (int(200 * scale), int(300 * scale), 3)
    rows, columns = np.nonzero((picture != 90).any(axis=2))
    extent = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
    assert np.abs(extent - np.array([50, 60, 150, 160]) * scale).max() <= 4


# ---- labels


def test_labels_tell_the_class_and_the_score_that_ranks(drawn):
    draw_predictions(grey((480, 640)), two_objects(), NAMES)
    assert drawn.texts == ["person 0.90", "baseball glove 0.30"]


def test_full_labels_have_all_scores(drawn):
    draw_predictions(grey((480, 640)), two_objects(), NAMES, labels="full")
    assert drawn.texts == [
        "person 1.00 x IoU 0.90 = 0.90",
        "baseball glove 0.33 x IoU 0.90 = 0.30",
    ]


def test_without_names_a_class_is_its_index(drawn):
    draw_predictions(grey((480, 640)), two_objects())
    assert drawn.texts == ["0 0.90", "1 0.30"]


def test_without_labels_there_are_none(drawn):
    draw_predictions(grey((480, 640)), two_objects(), NAMES, labels="none")
    assert drawn.texts == []


@pytest.mark.parametrize(
    "scores, expected",
    [
        (
            {"scores": 0.934, "pred_mask_ious": 0.812, "mask_scores": 0.758},
            "0.93 x IoU 0.81 = 0.76",
        ),
        ({"scores": 0.934, "pred_mask_ious": 0.812, "mask_scores": 0.406}, "0.93, IoU 0.81 → 0.41"),
        (
            {
                **{"scores": 0.934, "pred_mask_ious": 0.812, "mask_scores": 0.758},
                "quality_scores": 0.758,  # the product by chance
            },
            "0.93, IoU 0.81 → 0.76",
        ),
        ({"scores": 0.934, "quality_scores": 0.758}, "0.93 → 0.76"),
        ({"pred_mask_ious": 0.812}, "IoU 0.81"),
        ({"scores": 0.934}, "0.93"),
    ],
    ids=[
        "product",
        "no product",
        "calibrated",
        "calibrated without IoU",
        "IoU only",
        "class score",
    ],
)
def test_all_scores(scores, expected):
    found = two_objects()[:1]
    found._scores = {name: np.array([value]) for name, value in scores.items()}
    assert all_scores(found) == [expected]


def test_equations_hold_for_all_labels_or_none_has_one():
    found = two_objects()
    found.mask_scores[1] = 0.1
    assert all_scores(found) == ["1.00, IoU 0.90 → 0.90", "0.33, IoU 0.90 → 0.10"]


@pytest.mark.parametrize("style", ["short", "full"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_labels_are_legible_and_inside_the_picture(size, style, drawn):
    picture = draw_predictions(grey(size), two_objects(size), NAMES, labels=style)
    height, width = picture.shape[:2]
    assert min(drawn.font_sizes) >= max(
        10, (height * width) ** 0.5 / 60 if width > height / 2 else 0
    )
    labelled = drawn.places[~np.isnan(drawn.places[:, 0])]
    assert len(labelled) >= (2 if min(height, width) > 100 else 1)
    assert (labelled >= 0).all() and (labelled <= [width, height, width, height]).all()


def test_many_labels_are_smaller_but_legible(drawn):
    for num in (2, 100):
        draw_predictions(grey((1500, 2000)), crowd((1500, 2000), num), NAMES)
    side = (1500 * 2000) ** 0.5
    assert min(drawn.font_sizes[:2]) >= side / 60
    assert side / 100 < max(drawn.font_sizes[2:]) < 0.9 * min(drawn.font_sizes[:2])


@pytest.mark.parametrize("num, expected", [(2, 2), (9, 4), (100, 4)])
def test_labels_do_not_overlap_or_cover_the_picture(num, expected, drawn):
    draw_predictions(grey((480, 640)), crowd(num=num), NAMES)
    labelled = drawn.places[~np.isnan(drawn.places[:, 0])]
    assert len(labelled) >= expected
    assert all(overlap(a, b) == 0 for a, b in itertools.combinations(labelled, 2))
    hidden = sum(overlap(box, label) / 144 for box in drawn.boxes for label in labelled)
    assert hidden <= 0.5 * len(labelled)


def test_many_labels_leave_most_of_the_picture_free(drawn):
    boxes = [(x, y, x + 50, y + 12) for y in range(30, 460, 30) for x in range(10, 600, 60)]
    draw_predictions(grey((480, 640)), predictions((480, 640), boxes), NAMES)
    labelled = drawn.places[~np.isnan(drawn.places[:, 0])]
    cover = (labelled[:, 2:] - labelled[:, :2]).prod(axis=1).sum() / (480 * 640)
    assert 0.1 < cover <= 0.2


def test_the_best_of_equal_objects_are_labelled(drawn):
    found = crowd()
    draw_predictions(grey((480, 640)), found, NAMES)
    labelled = ~np.isnan(drawn.places[:, 0])
    assert labelled[0] and not labelled.all()
    assert drawn.texts[0] == "person 0.90"
    assert drawn.boxes[0].tolist() == found.pred_boxes[0].tolist()


def test_objects_that_are_smaller_than_their_labels_come_last(drawn):
    boxes = [(100, 100, 104, 104), (200, 200, 400, 400)]
    draw_predictions(grey((480, 640)), predictions((480, 640), boxes), NAMES)
    assert drawn.boxes.tolist() == [list(box) for box in boxes[::-1]]
    assert not np.isnan(drawn.places).any()


def spot(box):
    x0, y0, x1, y1 = box
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)
    return Spot(np.array(box, float), (x0 + x1) / 2, corners)


def place(boxes, size=(60.0, 12.0), picture=(300, 300)):
    sizes = np.tile(size, (len(boxes), 1))
    return place_labels([spot(box) for box in boxes], sizes, np.array(picture))


def test_a_lone_label_lies_above_its_object_and_does_not_hide_it():
    (label,), (gap,) = place([[100, 100, 110, 110]])
    assert label[:2] + label[2:] == pytest.approx([210, 183.2])  # its middle, twice
    assert 0 < gap < 4


@pytest.mark.parametrize(
    "others, stays",
    [
        ([[90, 84, 120, 98]], False),  # a small object that would be hidden
        ([[40, 60, 190, 140]] * 3, True),  # larger ones that would be hidden in part
    ],
    ids=["small object above", "large objects around"],
)
def test_a_label_keeps_clear_of_small_objects_but_at_its_own(others, stays):
    boxes = [[100, 100, 110, 110], *others]
    alone, label = place(boxes[:1])[0][0], place(boxes)[0][0]
    assert (label == alone).all() == stays
    assert stays or overlap(label, np.array(others[0])) == 0


def test_no_label_is_far_from_its_object():
    boxes = [[100, 100, 110, 110]] * 30
    places, gaps = place(boxes)
    kept = ~np.isnan(gaps)
    assert 3 < kept.sum() < 30 and gaps[kept].max() <= 12


def test_labels_that_do_not_fit_are_left_out():
    assert np.isnan(place([[10, 10, 20, 20]], size=(301.0, 12.0))[0]).all()


def test_a_line_leads_to_a_label_that_had_to_move_away(drawn):
    found = crowd(num=9)
    picture = draw_predictions(grey((480, 640)), found, NAMES)
    plain = draw_predictions(grey((480, 640)), found, NAMES, labels="none")
    changed = (picture != plain).any(axis=2)
    labelled = drawn.places[~np.isnan(drawn.places[:, 0])].astype(int)
    for x0, y0, x1, y1 in labelled:
        changed[y0 : y1 + 1, x0 : x1 + 1] = False
    assert changed.any()


# ---- texts


def test_long_names_are_cut(drawn):
    names = ["a" * 1000, "b" * 10]
    draw_predictions(grey((480, 640)), two_objects(), names, labels="full")
    assert drawn.texts[0].startswith("aaaa") and "a… 1.00 x IoU" in drawn.texts[0]
    assert drawn.texts[1].startswith("b" * 10 + " ")
    assert label_image("a" * 1000, 13, (0, 0, 0)).shape[1] > 640
    assert cut_to("a" * 1000, 0, 13) == "a…"


def test_names_of_several_lines_are_drawn_in_one(drawn):
    names = ["traffic\nlight\t(red)", " "]
    draw_predictions(grey((480, 640)), two_objects(), names, legend=True)
    one_line = label_image("traffic light (red) 0.90", 20, (0, 0, 0))
    np.testing.assert_array_equal(label_image(f"{names[0]} 0.90", 20, (0, 0, 0)), one_line)


@pytest.mark.parametrize("color, ink", [((255, 255, 0), 0), ((0, 0, 128), 255)])
def test_texts_contrast_with_their_background(color, ink):
    image = label_image("person", 20, color)
    assert (image == color).all(axis=2).mean() > 0.3
    assert (image == ink).all(axis=2).mean() > 0.05


ARABIC = "\u0642\u0637\u0629"


def test_names_from_right_to_left_come_before_the_number(drawn):
    draw_predictions(grey((480, 640)), two_objects(), [ARABIC, "cat"])
    image, number = label_image(drawn.texts[0], 20, (0, 0, 0)), label_image("0.90", 20, (0, 0, 0))
    width = number.shape[1] - 6  # without the padding on its left
    np.testing.assert_array_equal(image[:, -width:], number[:, -width:])


def test_letters_from_right_to_left_keep_their_order_without_raqm(monkeypatch):
    hebrew = "\u05d7\u05ea\u05d5\u05dc"
    truetype, basic = ImageFont.truetype, ImageFont.Layout.BASIC
    monkeypatch.setattr(ImageFont, "truetype", lambda *x: truetype(*x, layout_engine=basic))
    labels._font.cache_clear()
    images = {}
    for has_raqm in (True, False):
        monkeypatch.setattr(features, "check", lambda name, has=has_raqm: has)
        images[has_raqm] = [label_image(name, 20, (0, 0, 0)) for name in (hebrew, hebrew[::-1])]
    labels._font.cache_clear()
    np.testing.assert_array_equal(images[True], images[False][::-1])
    assert (images[True][0] != images[True][1]).any()


# ---- the legend


def test_a_legend_has_a_row_for_each_object(drawn):
    plain = draw_predictions(grey((480, 640)), two_objects(), NAMES, labels="none")
    drawn.texts.clear()
    picture = draw_predictions(grey((480, 640)), two_objects(), NAMES, legend=True)
    full = ["person 1.00 x IoU 0.90 = 0.90", "baseball glove 0.33 x IoU 0.90 = 0.30"]
    assert drawn.texts == ["1", "2", "1", "2", *full]
    assert picture.shape[0] == 480 and 640 + 200 < picture.shape[1] < 640 + 400
    assert (picture[:, :640] != plain).any(axis=2).mean() < 0.005  # numbers only
    rows = (picture[:, 640:] != 255).any(axis=(1, 2))
    assert np.diff(rows.astype(int)).tolist().count(1) == 2


@pytest.mark.parametrize("size", [(480, 640), (30, 500), (9, 9)], ids=str)
def test_a_legend_takes_as_many_columns_as_it_needs(size):
    few, many = (
        draw_predictions(grey(size), predictions(size, [(1, 1, 5, 5)] * num), NAMES, legend=True)
        for num in (2, 100)
    )
    assert few.shape[0] == many.shape[0] and few.shape[1] < many.shape[1]


def test_a_legend_says_how_many_objects_have_no_row(drawn):
    found = predictions((480, 640), [(1, 1, 5, 5)] * 1000)
    picture = draw_predictions(grey((480, 640)), found, NAMES, legend=True)
    assert 3 * 640 < picture.shape[1] <= 5 * 640 + 20
    rows = [text for text in drawn.texts if "IoU" in text]
    assert 100 < len(rows) < 999 and drawn.texts[-1] == f"and {1000 - len(rows)} more"


# ---- mistakes of callers


@pytest.mark.parametrize(
    "change",
    [
        {"image_rgb": np.zeros((480, 640), np.uint8)},
        {"image_rgb": np.zeros((480, 640, 4), np.uint8)},
        {"image_rgb": np.zeros((480, 640, 3))},
        {"image_rgb": np.zeros((640, 480, 3), np.uint8)},
        {"class_names": ["person"]},
        {"colors": [(0, 0, 0)]},
        {"labels": "long"},
    ],
    ids=["grey image", "alpha channel", "float", "other size", "names", "colours", "labels"],
)
def test_wrong_arguments_are_refused(change):
    arguments = {"image_rgb": grey((480, 640)), "predictions": two_objects(), "class_names": NAMES}
    with pytest.raises(ValueError):
        draw_predictions(**arguments | change)
