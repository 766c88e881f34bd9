"""Which confident masks are listed as probable mistakes of the annotations."""

import csv

import pytest

from msrcnn_d2.report import write_report
from msrcnn_d2.report.worst_annotations import worst_annotations
from tests.helpers.filled_boxes import calibrated, found, measure, thing

BOX = (10, 10, 20, 20)
TWICE = (10, 10, 20, 18)  # IoU 0.9 with BOX
PART = (10, 10, 20, 8)  # IoU 0.4
EDGE = (10, 28, 20, 20)  # IoU 1/19
ELSEWHERE = (80, 60, 20, 20)


def listed(annotations, results, **kwargs):
    quality = measure(annotations, results, **kwargs)
    return [
        (x.index, x.kind, x.annotation and x.annotation["id"], pytest.approx(x.iou))
        for x in worst_annotations(quality)
    ]


@pytest.mark.parametrize(
    "annotation, kind, id_, iou",
    [
        pytest.param(thing(BOX, category_id=2), "class", 1, 1.0, id="of another class"),
        pytest.param(thing(TWICE, category_id=2), "class", 1, 0.9, id="nearly so"),
        pytest.param(thing(PART), "shape", 1, 0.4, id="another outline"),
        pytest.param(thing(PART, category_id=2), "missing", None, 0, id="a part is another class"),
        pytest.param(thing(EDGE), "missing", None, 0, id="a neighbour"),
        pytest.param(thing(BOX, image_id=2), "missing", None, 0, id="in another image"),
    ],
)
def test_kinds(annotation, kind, id_, iou):
    assert listed([annotation], [found(BOX, 0.9)]) == [(0, kind, id_, pytest.approx(iou))]


@pytest.mark.parametrize("iscrowd", [False, True])
def test_what_annotations_agree_with_is_not_listed(iscrowd):
    assert listed([thing(TWICE, iscrowd=iscrowd)], [found(BOX, 0.9)]) == []


@pytest.mark.parametrize("score, explained", [(0.95, True), (0.85, False)])
@pytest.mark.parametrize(
    "annotation, kind",
    [(thing(BOX, category_id=2), "class"), (thing((10, 10, 20, 50)), "shape")],
    ids=["class", "shape"],
)
def test_an_object_that_a_better_mask_has_found_explains_it(annotation, kind, score, explained):
    x, y, width, height = annotation["bbox"]
    finder = found((x, y, width, height - 4), score, category_id=annotation["category_id"])
    expected = [] if explained else [(0, kind, 1, pytest.approx(20 / (height)))]
    assert listed([annotation], [found(BOX, 0.9), finder]) == expected


def test_an_object_that_is_missing_is_listed_once():
    results = [found(TWICE, 0.7), found(BOX, 0.9), found(BOX, 0.8, category_id=2)]
    assert listed([thing(ELSEWHERE)], results) == [(1, "missing", None, 0)]


def test_empty_masks_are_not_listed():
    empty = found((0, 0, 0, 0), 0.9)
    assert listed([thing(ELSEWHERE)], [empty, empty, found(BOX, 0.8)]) == [(2, "missing", None, 0)]


def test_the_order_is_that_of_the_best_score():
    by_mask_score = [found(BOX, 0.9, iou=0.3), found(ELSEWHERE, 0.6, iou=0.9)]
    assert [x[0] for x in listed([thing(BOX, 2)], by_mask_score)] == [1, 0]
    by_quality = [calibrated(r, [p] * 10) for r, p in zip(by_mask_score, (0.7, 0.2), strict=True)]
    assert [x[0] for x in listed([thing(BOX, 2)], by_quality)] == [0, 1]


def test_page_and_csv(tmp_path):
    annotations = [thing(BOX, 1, category_id=2), thing(PART, 2)]
    results = [found(BOX, 0.9, image_id=k) for k in (1, 2)] + [found(ELSEWHERE, 0.95)]
    quality = measure(annotations, results)
    text = write_report(quality, tmp_path).read_text()
    for says in ("annotated as b", "annotated differently", "not annotated"):
        assert f"<b>{says}</b>" in text
    with (tmp_path / "worst_annotations.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["image"], r["annotation_id"], r["class"], r["kind"]) for r in rows] == [
        ("1.png", "", "", "missing"),
        ("1.png", "1", "b", "class"),
        ("2.png", "2", "a", "shape"),
    ]
    assert all(r["predicted_class"] == "a" for r in rows)
    assert [float(r["score"]) for r in rows] == [0.95, 0.9, 0.9]
    assert [float(r["iou"]) for r in rows] == [0, 1, 0.4]
    assert [float(rows[0][k]) for k in ("x", "y", "width", "height")] == list(ELSEWHERE)


def test_no_more_than_asked_for():
    results = [found((5 * k, 5 * k, 4, 4), 0.5 + k / 100) for k in range(5)]
    assert [x.index for x in worst_annotations(measure([thing(ELSEWHERE)], results), 2)] == [4, 3]
