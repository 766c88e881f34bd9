"""Predictions on tiles: what is cut out, put back and kept; and large images to measure it on."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

import draw_large
from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.image_reading import ImageSettings
from msrcnn_d2_runtime.predictions import CroppedMasks, Predictions, RoiMasks
from msrcnn_d2_runtime.tiling import TiledPredictor, merge_tiles

SIZE = (70, 100)  # height, width


class FindsRectangles:
    """
    A predictor whose model is perfect: it finds each rectangle of one colour, or as much of it as
    it sees. The blue value is the class, the green one the score in percent; black is background.
    """

    class_names, rank_by, image_settings = ("a", "b"), "mask_score", ImageSettings()

    def __init__(self, cropped=False):
        self.cropped, self.batches = cropped, []

    def predictions(self, images):
        self.batches.append([x.shape[:2] for x in images])
        return [self._find(x) for x in images]

    def _find(self, image):
        colors = [c for c in np.unique(image.reshape(-1, 3), axis=0).tolist() if any(c)]
        bitmaps = np.array([(image == c).all(axis=2) for c in colors]).reshape(-1, *image.shape[:2])
        boxes = []
        for bitmap in bitmaps:
            y, x = np.nonzero(bitmap)
            boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
        boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        masks = RoiMasks(np.ones((len(boxes), 7, 7), np.float32), boxes, image.shape[:2])
        scores = np.array([c[1] / 100 for c in colors], dtype=np.float32)
        return Predictions(
            pred_boxes=boxes,
            pred_classes=np.array([c[0] for c in colors], dtype=np.int64),
            masks=CroppedMasks.of(bitmaps) if self.cropped else masks,
            scores={"scores": scores, "mask_scores": scores / 2},
            ranking="mask_scores",
        )[np.argsort(-scores)]


def image_of(*rectangles):
    """An image with rectangles (class, score in percent, x0, y0, x1, y1)."""
    image = np.zeros((*SIZE, 3), dtype=np.uint8)
    for class_, score, x0, y0, x1, y1 in rectangles:
        image[y0:y1, x0:x1] = class_, score, 255
    return image


SCENE = [
    (0, 90, 2, 3, 12, 9),  # in one tile only
    (1, 80, 33, 4, 43, 10),  # in the overlap of two
    (0, 70, 25, 22, 38, 41),  # cut by a border of four tiles, whole in one
    (1, 60, 45, 45, 99, 69),  # larger than a tile
    (0, 50, 0, 64, 5, 70),  # at the border of the image
]


@pytest.mark.parametrize("cropped", [False, True], ids=["in boxes", "cropped"])
def test_each_object_is_found_once_and_whole(cropped):
    image = image_of(*SCENE)
    tiled = TiledPredictor(FindsRectangles(cropped), 40, 0.4, batch_size=4)
    (found,) = tiled.predictions([image])
    (expected,) = FindsRectangles(cropped).predictions([image])
    assert found.image_size == SIZE and found.ranking == "mask_scores"
    for name in ("pred_boxes", "pred_classes", "scores", "mask_scores"):
        assert np.array_equal(found.get(name), expected.get(name)), name
    assert np.array_equal(found.pred_masks, expected.pred_masks)


def test_without_the_whole_image_a_large_object_stays_in_parts():
    image = image_of(SCENE[3])
    (found,) = TiledPredictor(FindsRectangles(), 40, 0.4, whole_image=False).predictions([image])
    assert len(found) > 1
    seen, whole = found.pred_masks.any(axis=0), image.any(axis=2)
    assert 0.5 * whole.sum() < (seen & whole).sum() and not (seen & ~whole).any()


def test_tiles_cover_the_image_and_overlap_by_the_share():
    tiled = TiledPredictor(FindsRectangles(), 40, 0.25, whole_image=False)
    windows = tiled.windows(*SIZE)
    seen = np.zeros(SIZE, dtype=int)
    for top, left, bottom, right in windows:
        assert (bottom - top, right - left) == (40, 40)
        assert top >= 0 and left >= 0 and bottom <= SIZE[0] and right <= SIZE[1]
        seen[top:bottom, left:right] += 1
    assert seen.min() == 1
    assert len(windows) == 2 * 3  # 40 + 30 >= 70, 40 + 2 * 30 >= 100
    for starts in ({x.top for x in windows}, {x.left for x in windows}):
        assert np.diff(sorted(starts)).max() <= 30


@pytest.mark.parametrize("size", [(40, 40), (7, 40), (1, 1)])
def test_an_image_that_is_no_larger_than_a_tile_is_predicted_as_it_is(size):
    predictor = FindsRectangles()
    image = np.full((*size, 3), (0, 50, 9), dtype=np.uint8)
    (found,) = TiledPredictor(predictor, 40).predictions([image])
    assert predictor.batches == [[size]] and found.image_size == size and len(found) == 1


def test_tiles_come_in_batches_and_the_whole_image_last():
    predictor = FindsRectangles()
    TiledPredictor(predictor, 40, 0.25, batch_size=4).predictions([image_of(), image_of()])
    tile = (40, 40)
    assert predictor.batches == [[tile] * 4, [tile, tile, SIZE]] * 2


def test_images_are_read_by_the_settings_and_scaled_as_a_whole(tmp_path):
    path = tmp_path / "deep.png"
    pixels = np.zeros(SIZE, dtype=np.uint16)
    pixels[:, :50], pixels[10:20, 60:70] = 1000, 4000
    Image.fromarray(pixels).save(path)
    seen = []

    class Records(FindsRectangles):
        image_settings = ImageSettings(intensity_percentiles=(0, 100))

        def predictions(self, images):
            seen.extend(x.max() for x in images)
            return super().predictions(images)

    TiledPredictor(Records(), 40, 0, whole_image=False).predictions([path])
    assert min(seen) in (0, 64) and max(seen) == 255  # 1000 of 4000 is 64 in each tile


@pytest.mark.parametrize("arguments", [(0,), (40, 1.0), (40, -0.1)])
def test_tiles_of_no_size_are_refused(arguments):
    with pytest.raises(UserError):
        TiledPredictor(FindsRectangles(), *arguments)


# ---- which of two is kept


def merged(*rectangles, cut=()):
    """Indices of the rectangles (class, score in percent, x0, y0, x1, y1) that are kept."""
    rectangles = np.array(rectangles, dtype=np.float32)
    predictions = Predictions(
        pred_boxes=rectangles[:, 2:],
        pred_classes=rectangles[:, 0].astype(np.int64),
        masks=RoiMasks(np.ones((len(rectangles), 7, 7), np.float32), rectangles[:, 2:], SIZE),
        scores={"scores": rectangles[:, 1], "indices": np.arange(len(rectangles))},
        ranking="scores",
    )
    is_cut = np.isin(np.arange(len(rectangles)), cut)
    kept = merge_tiles(predictions, is_cut)
    assert (np.diff(kept.scores) <= 0).all()
    return sorted(kept.get("indices").tolist())


WHOLE, PART = (0, 50, 10, 10, 30, 30), (0, 90, 10, 10, 15, 30)  # the part has the better score


def test_a_part_loses_to_the_whole_object_whatever_its_score():
    assert merged(WHOLE, PART, cut=[1]) == [0]


def test_a_small_object_in_front_of_a_large_one_is_kept():
    assert merged(WHOLE, PART) == [0, 1]


def test_of_two_parts_the_better_one_is_kept():
    assert merged((0, 50, 10, 10, 19, 30), PART, (0, 10, 16, 10, 30, 30), cut=[0, 1, 2]) == [1, 2]


def test_of_two_duplicates_the_better_one_is_kept():
    assert merged(WHOLE, (0, 60, 11, 10, 30, 30)) == [1]


def test_classes_do_not_meet():
    assert merged(WHOLE, (1, 60, 10, 10, 30, 30), (1, 90, 10, 10, 15, 30), cut=[2]) == [0, 1]


def test_masks_decide_where_boxes_are_equal():
    boxes = np.array([[10, 10, 30, 30]] * 2, dtype=np.float32)
    bitmaps = np.zeros((2, *SIZE), dtype=bool)
    bitmaps[0, 10:30, 10:30], bitmaps[1, 10:30, 10:30] = np.triu(np.ones((20, 20))), 1
    bitmaps[1] &= ~bitmaps[0]
    predictions = Predictions(
        pred_boxes=boxes,
        pred_classes=np.zeros(2, dtype=np.int64),
        masks=CroppedMasks.of(bitmaps),
        scores={"scores": np.array([0.9, 0.8])},
        ranking="scores",
    )
    assert len(merge_tiles(predictions, np.zeros(2, dtype=bool))) == 2


def test_more_detections_than_pycocotools_takes_at_once():
    many = [(0, 50 + k / 100, 2 * (k % 40), 2 * (k // 40), 2 * (k % 40) + 2, 2 * (k // 40) + 2)
            for k in range(300)]  # fmt: skip
    assert merged(*many, *many) == [*range(300)]


def test_nothing_is_found():
    (found,) = TiledPredictor(FindsRectangles(), 40).predictions([image_of()])
    assert len(found) == 0 and found.image_size == SIZE and found.pred_masks.shape == (0, *SIZE)


# ---- drawn large images


def test_large_images_have_small_and_large_objects(tmp_path):
    draw_large.draw_large_dataset(tmp_path, 2, size=256, num_small=20, num_large=1)
    data = json.loads((tmp_path / "large.json").read_text())
    for image in data["images"]:
        with Image.open(tmp_path / "large" / image["file_name"]) as png:
            assert png.size == (256, 256) and png.mode == "RGB"
    masks = mask_util.decode([x["segmentation"] for x in data["annotations"]]).transpose(2, 0, 1)
    assert [x["area"] for x in data["annotations"]] == masks.sum(axis=(1, 2)).tolist()
    for k in (1, 2):
        of_image = [x["image_id"] == k for x in data["annotations"]]
        assert masks[of_image].sum(axis=0).max() == 1
        assert sum(of_image) > 5
    assert masks.sum(axis=(1, 2)).max() > 3000 > 1000 > np.median(masks.sum(axis=(1, 2)))
