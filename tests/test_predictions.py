"""Predictions in NumPy: the same as Detectron2's instances; masks are pasted when needed."""

import pickle

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from detectron2.layers import paste_masks_in_image
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from msrcnn_d2 import MaskScoringPredictor
from msrcnn_d2.modeling import UnpastedMasks
from msrcnn_d2_runtime import mask_encoding
from msrcnn_d2_runtime.predictions import CroppedMasks, Predictions, RoiMasks
from tests.helpers.toy import tiny_yacs_config
from tests.test_predictor import random_image, saved

SIZE = (40, 60)
BOXES = np.array(
    [[3, 4, 20, 30], [-5, -5, 12.5, 9], [50, 30, 60, 40], [8, 8, 8, 8]], dtype=np.float32
)


@pytest.fixture
def bitmaps_and_masks():
    """The same four masks: pasted by Detectron2, in their boxes, and cropped. The last is empty."""
    probs = np.random.default_rng(0).random((4, 7, 7), dtype=np.float32)
    pasted = paste_masks_in_image(torch.tensor(probs), Boxes(torch.tensor(BOXES)), SIZE).numpy()
    return pasted, RoiMasks(probs, BOXES, SIZE), CroppedMasks.of(pasted)


@pytest.mark.parametrize("kind", [1, 2], ids=["in boxes", "cropped"])
def test_masks_are_those_that_detectron2_pastes(bitmaps_and_masks, kind):
    bitmaps, masks = bitmaps_and_masks[0], bitmaps_and_masks[kind]
    assert len(masks) == 4 and masks.image_size == SIZE
    assert np.array_equal(masks.pasted(), bitmaps)
    assert masks.areas().tolist() == bitmaps.sum(axis=(1, 2)).tolist()
    assert masks.areas()[3] == 0 and all(masks.areas()[:3])
    decoded = mask_util.decode(masks.rles())
    assert np.array_equal(decoded.transpose(2, 0, 1), bitmaps)
    for k, bitmap in enumerate(bitmaps):
        top, left, inside = masks.crop(k)
        rest = bitmap.copy()
        part = rest[top : top + inside.shape[0], left : left + inside.shape[1]]
        assert np.array_equal(part, inside)
        part[:] = False
        assert not rest.any()


@pytest.mark.parametrize("kind", [1, 2], ids=["in boxes", "cropped"])
@pytest.mark.parametrize(
    "index", [[2, 0], slice(1, 3), np.array([True, False, False, True]), np.array([], dtype=int)]
)
def test_masks_are_selected_like_arrays(bitmaps_and_masks, kind, index):
    bitmaps, masks = bitmaps_and_masks[0], bitmaps_and_masks[kind]
    assert np.array_equal(masks[index].pasted(), bitmaps[index])
    assert len(masks[index].rles()) == len(bitmaps[index])


def test_a_crop_of_bitmaps_is_no_larger_than_the_mask():
    bitmap = np.zeros((1, *SIZE), dtype=np.uint8)
    bitmap[0, 5:9, 7:17] = 255
    ((top, left, inside),) = CroppedMasks.of(bitmap).crops
    assert (top, left, inside.shape) == (5, 7, (4, 10)) and inside.dtype == bool


@pytest.fixture
def predictions(bitmaps_and_masks):
    scores = np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32)
    return Predictions(
        pred_boxes=BOXES,
        pred_classes=np.array([1, 0, 1, 2]),
        masks=bitmaps_and_masks[1],
        scores={"scores": scores, "mask_scores": scores / 2},
        ranking="mask_scores",
    )


def test_fields(predictions):
    assert len(predictions) == 4 and predictions.image_size == SIZE
    assert np.array_equal(predictions.rank_scores, predictions.mask_scores)
    assert np.array_equal(predictions.get("scores"), predictions.scores)
    fields = ("scores", "mask_scores", "pred_boxes", "pred_classes", "pred_masks")
    assert all(map(predictions.has, fields)) and not predictions.has("quality_scores")
    with pytest.raises(AttributeError, match="quality_scores"):
        predictions.quality_scores  # noqa: B018
    assert set(predictions.get_fields()) == {*fields} - {"pred_masks"}
    kept = predictions[predictions.pred_classes == 1]
    assert kept.scores.tolist() == predictions.scores[[0, 2]].tolist()
    assert np.array_equal(kept.pred_masks, predictions.pred_masks[[0, 2]])
    assert kept.ranking == "mask_scores"
    for k in (1, -1, np.int64(2)):
        assert predictions[k].scores.tolist() == [predictions.scores[k]]
        assert np.array_equal(predictions[k].pred_masks[0], predictions.pred_masks[k])
    assert [one.pred_classes.tolist() for one in predictions] == [[1], [0], [1], [2]]
    copied = pickle.loads(pickle.dumps(predictions))  # between processes
    assert np.array_equal(copied.mask_scores, predictions.mask_scores)


@pytest.mark.parametrize("pasted_by_the_model", [False, True])
def test_the_predictor_gives_the_same_in_both_ways(tmp_path, pasted_by_the_model, monkeypatch):
    torch.manual_seed(0)
    cfg = tiny_yacs_config()
    cfg.DATASETS.TEST = ()
    cfg.MODEL.WEIGHTS = saved(build_model(cfg), tmp_path)
    if pasted_by_the_model:  # as one whose postprocessing is its own
        monkeypatch.setattr(UnpastedMasks, "supports", lambda model: False)
    predict = MaskScoringPredictor(cfg)
    assert predict.class_names == tuple(map(str, range(predict.model.roi_heads.num_classes)))
    images = [random_image(), random_image(50, 90, seed=1)]
    assert predict.predictions([]) == []
    for found, output in zip(predict.predictions(images), predict(images)):
        instances = output["instances"]
        assert len(found) == len(instances) > 0 and found.image_size == instances.image_size
        assert np.array_equal(found.pred_boxes, instances.pred_boxes.tensor.numpy())
        # Up to pixels with a probability of 0.5, of which untrained models predict many
        assert (found.pred_masks != instances.pred_masks.numpy()).mean() < 1e-4
        for name in ("scores", "pred_mask_ious", "mask_scores", "pred_classes"):
            assert np.array_equal(found.get(name), instances.get(name).numpy()), name
        assert found.ranking == "mask_scores" and (np.diff(found.rank_scores) <= 0).all()


@pytest.mark.parametrize("kind", [1, 2], ids=["in boxes", "cropped"])
def test_predictions_in_a_part_are_moved_into_the_image(bitmaps_and_masks, kind):
    inside, masks = bitmaps_and_masks[0], bitmaps_and_masks[kind]
    part = Predictions(
        pred_boxes=BOXES,
        pred_classes=np.arange(4),
        masks=masks,
        scores={"scores": np.ones(4, dtype=np.float32)},
        ranking="scores",
    )
    moved = part.moved(3, 16, (50, 80))
    expected = np.zeros((4, 50, 80), dtype=bool)
    expected[:, 3:43, 16:76] = inside
    # Outside of their part, masks whose boxes extend beyond it have pixels that no one has seen
    assert np.array_equal(moved.pred_masks[2:], expected[2:])
    assert np.array_equal(moved.pred_masks[:, 3:43, 16:76], inside)
    assert moved.image_size == (50, 80)
    assert moved.pred_boxes.tolist() == (BOXES + [16, 3, 16, 3]).tolist()
    assert part.pred_boxes.tolist() == BOXES.tolist()


@pytest.mark.parametrize("kinds", [(1, 1), (1, 2), (2, 2)])
def test_predictions_of_an_image_are_concatenated(bitmaps_and_masks, kinds):
    parts = [
        Predictions(
            pred_boxes=BOXES,
            pred_classes=np.arange(4),
            masks=bitmaps_and_masks[kind],
            scores={"scores": np.arange(4) + number, "mask_scores": np.arange(4) * number},
            ranking="mask_scores",
        )
        for number, kind in enumerate(kinds)
    ]
    both = Predictions.concatenated([parts[0], parts[1][1:]])
    assert both.scores.tolist() == [0, 1, 2, 3, 2, 3, 4] and both.ranking == "mask_scores"
    assert both.mask_scores.tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert both.pred_classes.tolist() == [0, 1, 2, 3, 1, 2, 3]
    assert np.array_equal(both.pred_masks, bitmaps_and_masks[0][[0, 1, 2, 3, 1, 2, 3]])
    assert both.pred_boxes.shape == (7, 4)


def test_large_masks_are_pasted_some_rows_at_a_time(bitmaps_and_masks, monkeypatch):
    bitmaps, masks, _ = bitmaps_and_masks
    for pixels in (1, 45, 10**9):  # single rows, a few, all
        monkeypatch.setattr(mask_encoding, "PIXELS_AT_ONCE", pixels)
        assert np.array_equal(masks.pasted(), bitmaps)
