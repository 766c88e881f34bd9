"""Boundary AP against its definition, written down a second time with full-size masks."""

import contextlib
import copy
import io
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msrcnn_d2.evaluation.average_precision import ENGINES, AveragePrecision
from msrcnn_d2.evaluation.boundaries import boundaries_of, boundary_width
from msrcnn_d2.evaluation.matching import Overlaps


def slow_boundary(mask):
    """As defined: as often as the width says, remove the pixels that have a neighbour outside."""
    height, width = mask.shape
    eroded = np.pad(mask, 1)  # beyond the image is outside
    for _ in range(max(1, round(0.02 * (height**2 + width**2) ** 0.5))):
        before, eroded = eroded, eroded.copy()
        for y in range(height):
            for x in range(width):
                # Pixel (y, x) of the image is (y + 1, x + 1) of the padded mask
                eroded[y + 1, x + 1] = before[y : y + 3, x : x + 3].all()
    return mask & ~eroded[1:-1, 1:-1]


def slow_iou(one, other):
    return (one & other).sum() / (one | other).sum() if (one | other).any() else 0.0


def encode(mask):
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def rectangle(size, x, y, width, height):
    mask = np.zeros(size, dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def random_mask(rng, size):
    """Parts of ellipses that the image may cut, maybe with a hole, single pixels and gaps."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    mask = np.zeros(size, dtype=bool)
    for _ in range(2):
        center = rng.uniform(0, [height, width])
        radii = rng.uniform(0.1, 0.7, 2) * [height, width] + 0.5
        mask |= ((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2 < 1
    if rng.random() < 0.5:
        mask[int(rng.integers(height)), :: int(rng.integers(5, 40))] ^= True
    return mask


# Heights and widths whose boundaries are 1, 1, 1, 2, 2 and 4 pixels wide
SIZES = [(1, 1), (1, 40), (31, 17), (80, 25), (9, 101), (40, 181)]


@pytest.mark.parametrize("size", SIZES)
def test_boundaries_are_those_of_the_definition(size):
    rng = np.random.default_rng(0)
    masks = [random_mask(rng, size) for _ in range(4)]
    masks += [np.zeros(size, dtype=bool), np.ones(size, dtype=bool)]
    rles = [encode(mask) for mask in masks]
    before = copy.deepcopy(rles)

    found = mask_util.decode(boundaries_of(rles)).astype(bool)

    assert rles == before
    for k, mask in enumerate(masks):
        assert np.array_equal(found[..., k], slow_boundary(mask))
    as_bytes = [{**rle, "counts": rle["counts"].encode()} for rle in rles]
    assert boundaries_of(as_bytes) == boundaries_of(rles)
    assert boundaries_of([]) == []


@pytest.mark.parametrize(
    "size, width",
    [
        pytest.param((3, 4), 1, id="0.1-at-least-1"),
        pytest.param((480, 640), 16, id="16.0"),
        pytest.param((426, 640), 15, id="15.4-down"),
        pytest.param((480, 620), 16, id="15.7-up"),
        # NumPy and Python round halves to even numbers
        pytest.param((45, 60), 2, id="1.5-to-2"),
        pytest.param((75, 100), 2, id="2.5-to-2"),
    ],
)
def test_the_width_of_boundaries(size, width):
    assert boundary_width(size) == boundary_width(size[::-1]) == width


# ---- Boundary AP


def build_coco(size, annotations, num_images=1):
    """Of annotations with "mask"."""
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": k, "height": size[0], "width": size[1]} for k in range(1, num_images + 1)
        ],
        "categories": [{"id": 3, "name": "a"}, {"id": 8, "name": "b"}],
        "annotations": [
            {
                **{"id": k, "image_id": 1, "category_id": 3, "iscrowd": 0},
                **{name: value for name, value in a.items() if name != "mask"},
                "bbox": mask_util.toBbox(encode(a["mask"])).tolist(),
                "area": int(a["mask"].sum()),
                "segmentation": encode(a["mask"]),
            }
            for k, a in enumerate(annotations, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def found(mask, score=0.5, image_id=1, category_id=3):
    segmentation = encode(mask)
    ids = {"image_id": image_id, "category_id": category_id}
    return {**ids, "score": score, "segmentation": segmentation}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("corner", [(0, 0), (40, 40), (78, 80)])
def test_a_square_that_is_found_two_pixels_beside_itself(corner, engine):
    # The diagonal is 141.4 pixels, so boundaries are 3 wide. Squares of 20 x 20 have 18 x 20 = 360
    # pixels in common: IoU 360 / 440 = 0.82. Of these, 14 x 14 lie inside the one boundary and
    # 2 x 14 more inside the other: 360 - 196 - 28 = 136 of 2 x 204 - 136. That is 0.5 exactly. It
    # is the same at the border of the image
    size, (x, y) = (100, 100), corner
    coco_gt = build_coco(size, [{"mask": rectangle(size, x, y, 20, 20)}])
    results = [found(rectangle(size, x + 2, y, 20, 20)[:100, :100])]

    by_boundary = AveragePrecision(coco_gt, results, "boundary", engine)

    (place,) = by_boundary.overlaps.places.values()
    assert place.ious.tolist() == [[0.5]]
    numbers = by_boundary.evaluate([0.5]).numbers
    assert [numbers[k] for k in ("AP", "AP50", "AP75")] == pytest.approx([1 / 10, 1, 0])
    of_masks = AveragePrecision(coco_gt, results, "segm", engine).evaluate([0.5]).numbers
    assert of_masks["AP"] == pytest.approx(7 / 10)  # 0.50, ..., 0.80


def test_masks_count_where_their_iou_is_smaller():
    # Each object is thinner than two boundaries, which are the masks themselves. The detection of
    # the second one is its frame: the boundaries agree, the masks do not
    size = (30, 40)
    frame = rectangle(size, 10, 10, 20, 20)
    full = frame.copy()
    frame[11:29, 11:29] = False
    annotations = [{"mask": rectangle(size, 0, 0, 2, 8)}, {"mask": full, "category_id": 8}]
    results = [found(rectangle(size, 1, 0, 2, 8)), found(frame, category_id=8)]

    places = Overlaps(build_coco(size, annotations), results, "boundary").places

    assert places[1, 3].ious.tolist() == [[pytest.approx(1 / 3)]]
    assert places[1, 8].ious.tolist() == [[pytest.approx(76 / 400)]]


def test_crowds_have_the_share_of_the_detection_inside():
    size = (30, 40)
    crowd = {"mask": rectangle(size, 0, 0, 30, 30), "iscrowd": 1}
    inside, half = rectangle(size, 10, 10, 8, 8), rectangle(size, 26, 10, 8, 8)
    coco_gt = build_coco(size, [crowd, {"mask": inside}])

    (place,) = Overlaps(coco_gt, [found(inside), found(half)], "boundary").places.values()

    assert place.ious.tolist() == [[1, 1], [0.5, 0]]


class SlowBoundaryEval(COCOeval):
    """The official evaluation, with IoUs from full-size masks, which annotations have as "mask"."""

    def __init__(self, coco_gt, coco_dt):
        super().__init__(coco_gt, coco_dt, "segm")
        self.masks = {}

    def computeIoU(self, image_id, category_id):
        truth, found = (x[image_id, category_id] for x in (self._gts, self._dts))
        if not (truth and found):
            return []
        found = sorted(found, key=lambda d: -d["score"])[: self.params.maxDets[-1]]
        ious = np.zeros((len(found), len(truth)))
        for row, d in enumerate(found):
            for column, g in enumerate(truth):
                (one, one_boundary), (other, other_boundary) = map(self.dense, (d, g))
                if g["iscrowd"]:
                    ious[row, column] = (one & other).sum() / one.sum()
                else:
                    boundary_iou = slow_iou(one_boundary, other_boundary)
                    ious[row, column] = min(slow_iou(one, other), boundary_iou)
        return ious

    def dense(self, annotation):
        counts = str(annotation["segmentation"]["counts"])
        if counts not in self.masks:
            mask = mask_util.decode(annotation["segmentation"]).astype(bool)
            self.masks[counts] = mask, slow_boundary(mask)
        return self.masks[counts]


@pytest.fixture(scope="module")
def scene():
    """Two images of objects and crowds with imperfect detections, and the official numbers."""
    rng, size = np.random.default_rng(3), (33, 120)  # boundaries are 2 pixels wide
    annotations, results = [], []
    for k in range(14):
        mask = random_mask(rng, size)
        place = {"image_id": 1 + k % 2, "category_id": int(rng.choice([3, 8]))}
        annotations.append({**place, "mask": mask, "iscrowd": int(k % 5 == 4)})
        for shift in [(0, 0), (0, 1), (1, 2)]:
            moved = np.roll(mask, shift, axis=(0, 1))
            results.append(found(moved, round(float(rng.random()), 2), **place))
    coco_gt = build_coco(size, annotations, num_images=2)
    with contextlib.redirect_stdout(io.StringIO()):
        official = SlowBoundaryEval(coco_gt, coco_gt.loadRes(copy.deepcopy(results)))
        official.evaluate()
        official.accumulate()
        official.summarize()
    return coco_gt, results, [x if x >= 0 else math.nan for x in official.stats]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_numbers_are_those_of_the_definition(engine, scene):
    coco_gt, results, expected = scene
    scores = [r["score"] for r in results]

    stats = AveragePrecision(coco_gt, results, "boundary", engine).evaluate(scores).stats

    assert stats == pytest.approx(expected, abs=1e-12, nan_ok=True)
    of_masks = AveragePrecision(coco_gt, results, "segm", engine).evaluate(scores).stats
    assert 0.1 < stats[0] < of_masks[0] - 0.05
