"""Which predictions a filter keeps."""

import numpy as np
import pytest

from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.filtering import Filter
from msrcnn_d2_runtime.predictions import CroppedMasks, Predictions

NAMES = ("Star", "moon", "heart")
SCORES = {
    "scores": [0.5, 0.9, 0.8, 0.4],
    "pred_mask_ious": [0.9, 0.4, 0.25, 0.5],
    "mask_scores": [0.45, 0.36, 0.2, 0.2],
}
CLASSES = [0, 1, 2, 0]


def predictions(*fields):
    scores = {name: np.float32(SCORES[name]) for name in fields or SCORES}
    return Predictions(
        pred_boxes=np.arange(16, dtype=np.float32).reshape(4, 4),
        pred_classes=np.array(CLASSES),
        masks=CroppedMasks.of(np.ones((4, 2, 2), dtype=bool)),
        scores=scores,
        ranking=next(reversed(scores)),
    )


@pytest.mark.parametrize(
    "wanted, kept",
    [
        ({}, [0, 1, 2, 3]),
        ({"min_score": 0.5}, [0, 1, 2]),
        ({"min_mask_score": 0.36}, [0, 1]),
        ({"min_iou": 0.4}, [0, 1, 3]),
        ({"min_score": 0.45, "min_iou": 0.4}, [0, 1]),
        ({"classes": ["star"]}, [0, 3]),
        ({"classes": ["heart", "MOON"]}, [1, 2]),
        ({"classes": []}, []),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 0}, []),
        ({"min_score": 0.6, "top_k": 1}, [1]),
    ],
)
def test_what_is_kept(wanted, kept):
    some = Filter(**wanted)(predictions(), NAMES)
    assert some.pred_boxes[:, 0].tolist() == [4 * k for k in kept]
    assert len(some.masks) == len(kept)
    assert np.array_equal(some.pred_classes, np.array(CLASSES)[kept])


def test_names_that_differ_in_their_case_only():
    letters = ("a", "A", "b", "b")
    for wanted, indices in ((["a"], [0]), (["A"], [1]), (["B"], [2, 3]), (None, [0, 1, 2, 3])):
        assert Filter(classes=wanted).class_indices(letters) == indices


def test_scores_and_classes_that_there_are_not():
    for wanted in ({"min_mask_score": 0.1}, {"min_iou": 0.1}):
        with pytest.raises(UserError, match="only class score"):
            Filter(**wanted)(predictions("scores"), NAMES)
    assert len(Filter(min_score=0.5)(predictions("scores"), NAMES)) == 3
    with pytest.raises(UserError, match="no class 'hart'; did you mean heart?"):
        Filter(classes=["hart"])(predictions(), NAMES)
    with pytest.raises(UserError, match="Star, moon, heart"):
        Filter(classes=["xyz"]).class_indices(NAMES)
