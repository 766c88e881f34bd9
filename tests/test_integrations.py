"""Predictions for supervision, sahi and torchmetrics, where they are installed."""

import sys

import numpy as np
import pytest
import torch

from detectron2.structures import Boxes, Instances

import msrcnn_d2
from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.integrations import to_supervision
from msrcnn_d2_runtime.predictions import CroppedMasks, Predictions

NAMES = ("cat", "dog", "cow")
FIELDS = {
    "scores": [0.9, 0.8, 0.7],
    "pred_mask_ious": [0.5, 0.75, 0.5],
    "mask_scores": [0.45, 0.6, 0.35],
    "mask_iou_probs": np.linspace(0, 1, 30).reshape(3, 10),
    "quality_scores": [0.2, 0.3, 0.1],
}
CLASSES = [2, 0, 2]
BOXES = [[1, 2, 4, 6], [0, 0, 8, 6], [5, 5, 6, 6]]


def bitmaps() -> np.ndarray:
    """Three masks in an image of 8 x 6 pixels: one of two parts, a whole image, and none."""
    masks = np.zeros((3, 6, 8), dtype=bool)
    masks[0, 2:5, 1:3] = masks[0, 5, 7] = True
    masks[1] = True
    return masks


def in_numpy(**fields) -> Predictions:
    scores = {k: np.array(x, dtype=np.float32) for k, x in (fields or FIELDS).items()}
    return Predictions(
        pred_boxes=np.array(BOXES, dtype=np.float32),
        pred_classes=np.array(CLASSES),
        masks=CroppedMasks.of(bitmaps()),
        scores=scores,
        ranking="scores",
    )


def in_detectron2() -> Instances:
    fields = {k: torch.tensor(np.array(x, dtype=np.float32)) for k, x in FIELDS.items()}
    return Instances(
        (6, 8),
        pred_boxes=Boxes(torch.tensor(BOXES)),
        pred_classes=torch.tensor(CLASSES),
        pred_masks=torch.tensor(bitmaps()),
        **fields,
    )


@pytest.fixture(scope="module")
def supervision():
    return pytest.importorskip("supervision")


# ---- supervision


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("make", [in_numpy, in_detectron2])
def test_detections_of_supervision_have_what_was_predicted(supervision, make, compact):
    detections = msrcnn_d2.to_supervision(make(), NAMES, compact_masks=compact)
    assert isinstance(detections.mask, np.ndarray) is not compact
    assert np.array_equal(np.asarray(detections.mask), bitmaps())
    assert detections.area.tolist() == bitmaps().sum(axis=(1, 2)).tolist()
    assert detections.xyxy.tolist() == BOXES and detections.class_id.tolist() == CLASSES
    assert detections.confidence == pytest.approx(FIELDS["scores"])
    assert detections.data.pop("class_name").tolist() == ["cow", "cat", "cow"]
    assert set(detections.data) == set(FIELDS)
    for name, values in FIELDS.items():
        assert detections.data[name] == pytest.approx(np.array(values))


@pytest.mark.parametrize(
    "confidence, field", [("mask_score", "mask_scores"), ("quality_score", "quality_scores")]
)
def test_another_score_as_confidence(supervision, confidence, field):
    detections = to_supervision(in_numpy(), confidence=confidence)
    assert detections.confidence == pytest.approx(FIELDS[field])
    assert "class_name" not in detections.data
    # What supervision selects keeps its scores
    (best,) = detections[detections.confidence == detections.confidence.max()].data["scores"]
    assert best == pytest.approx(0.8)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("make", [in_numpy, in_detectron2])
def test_an_image_without_predictions(supervision, make, compact):
    detections = to_supervision(make()[[]], NAMES, compact_masks=compact)
    assert len(detections) == 0 and detections.mask.shape == (0, 6, 8)
    assert detections.data["mask_iou_probs"].shape == (0, 10)
    both = supervision.Detections.merge([detections, to_supervision(make(), NAMES)])
    assert both.data["class_name"].tolist() == ["cow", "cat", "cow"]


def test_boxes_without_masks(supervision):
    instances = in_detectron2()
    for name in ("pred_masks", "mask_scores", "quality_scores"):
        instances.remove(name)
    assert to_supervision(instances).mask is None
    with pytest.raises(UserError, match="have no mask_scores"):
        to_supervision(instances, confidence="mask_score")


@pytest.mark.parametrize(
    "error, arguments",
    [
        (ValueError, {"confidence": "mask_scores"}),
        (UserError, {"class_names": ["cat", "dog"]}),
    ],
)
def test_what_cannot_be_meant_is_refused(supervision, error, arguments):
    with pytest.raises(error):
        to_supervision(in_numpy(), **arguments)


def test_supervision_draws_and_tracks_them(supervision):
    """Its annotators want a certain type of everything."""
    detections = to_supervision(in_numpy(), NAMES, confidence="mask_score", compact_masks=True)
    picture = np.zeros((6, 8, 3), dtype=np.uint8)
    assert supervision.MaskAnnotator().annotate(picture.copy(), detections).any()
    kept = detections.with_nms(threshold=0.5, class_agnostic=True)
    assert len(kept) <= 3 and "mask_scores" in kept.data


def test_without_supervision_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match="pip install supervision"):
        to_supervision(in_numpy())
