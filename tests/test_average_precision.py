import contextlib
import copy
import io
import math
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msrcnn_d2.evaluation import mask_ap
from msrcnn_d2.evaluation.average_precision import ENGINES, AveragePrecision, choose_engine

HEIGHT, WIDTH = 160, 200
CATEGORY_IDS = (90, 3, 17)  # with gaps and in no order; the last one never has an object
IMAGE_IDS = (12, 5, 40, 7)


def build_coco(annotations, image_ids=IMAGE_IDS):
    coco = COCO()
    coco.dataset = {
        "images": [{"id": k, "height": HEIGHT, "width": WIDTH} for k in image_ids],
        "annotations": [{"id": k, **a} for k, a in enumerate(annotations, start=1)],
        "categories": [{"id": k, "name": str(k)} for k in CATEGORY_IDS],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def rle(box):
    x, y, width, height = (round(v) for v in box)
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    return mask_util.encode(mask)


def thing(box, image_id=IMAGE_IDS[0], category_id=CATEGORY_IDS[0], iscrowd=0, **more):
    """An object that fills its box (x, y, width, height)."""
    x, y, width, height = box
    outline = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "area": width * height,
        "iscrowd": iscrowd,
        "segmentation": rle(box) if iscrowd else [outline],
        **more,
    }


def found(box, score, image_id=IMAGE_IDS[0], category_id=CATEGORY_IDS[0]):
    """A detection whose mask fills its box."""
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box),
        "segmentation": rle(box),
        "score": score,
    }


def evaluate(coco_gt, results, task="segm", engine=None, **kwargs):
    return AveragePrecision(coco_gt, results, task, engine, **kwargs).evaluate(
        [r["score"] for r in results]
    )


def numbers_of_coco(coco_gt, results, task, max_dets=(1, 10, 100), img_ids=None):
    """The twelve numbers of COCO's own evaluation, -1 where there are no objects."""
    coco_gt, results = copy.deepcopy((coco_gt, results))
    if task == "segm":
        for result in results:
            del result["bbox"]  # or it would be taken for the area of the mask
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = COCOeval(coco_gt, coco_gt.loadRes(results), task)
        coco_eval.params.maxDets = list(max_dets)
        if img_ids is not None:
            coco_eval.params.imgIds = img_ids
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    stats = coco_eval.stats.tolist()
    if sorted(max_dets)[-1] != 100:  # summarize() knows no other limit for AP
        precision = coco_eval.eval["precision"][..., 0, -1]
        stats[0] = precision[precision > -1].mean()
    return stats


# ---- against COCO's own evaluation


def random_box(rng):
    """Small, medium and large ones alike."""
    width, height = np.exp(rng.uniform(np.log(5), np.log(140), 2))
    x, y = rng.uniform(0, [WIDTH - width, HEIGHT - height])
    return [round(float(v), 2) for v in (x, y, width, height)]


def random_case(seed=0, objects=5, copies=4, crowds=0.0, decimals=6, empty=0.0, ignored=0.0):
    """
    Objects in the images but the last one, and `copies` imperfect detections of each; the second
    image has no detections, the last one no objects.

    Args:
        crowds, empty, ignored: share of crowds among the objects, of empty masks among the
            detections, and of objects with "ignore", which COCO overwrites.
        decimals: of the scores; few give ties.
    """
    rng = np.random.default_rng(seed)
    annotations = [
        thing(
            random_box(rng),
            image_id,
            int(rng.choice(CATEGORY_IDS[:2])),
            int(rng.random() < crowds),
            **({"ignore": 1} if rng.random() < ignored else {}),
        )
        for image_id in IMAGE_IDS[:-1]
        for _ in range(objects)
    ]
    results = [found(random_box(rng), 0.5, IMAGE_IDS[-1], c) for c in CATEGORY_IDS]
    for annotation in annotations * copies:
        if annotation["image_id"] == IMAGE_IDS[1]:
            continue
        x, y, width, height = annotation["bbox"]
        dx, dy = rng.normal(0, 0.1, 2) * [width, height]
        box = [max(0.0, x + float(dx)), max(0.0, y + float(dy)), width, height]
        wrong = rng.random() < 0.2
        class_ = int(rng.choice(CATEGORY_IDS)) if wrong else annotation["category_id"]
        score = round(float(rng.random()), decimals)
        results.append(found(box, score, annotation["image_id"], class_))
        if rng.random() < empty:
            results[-1]["segmentation"] = rle([0, 0, 0, 0])
    return annotations, results


CASES = {
    "several-classes-and-sizes": random_case(),
    "crowds": random_case(crowds=0.5, copies=8),
    "only-crowds": random_case(crowds=1.0),
    "ties": random_case(decimals=1, copies=10),
    "all-scores-equal": random_case(decimals=0),
    "more-than-100-detections": random_case(objects=6, copies=60),
    "more-than-255-detections-of-a-class": random_case(objects=8, copies=150),
    "empty-masks": random_case(empty=0.3),
    "objects-with-ignore": random_case(ignored=0.5, crowds=0.3),
    "no-objects": ([], random_case()[1]),
    "one-detection": (random_case()[0], random_case()[1][:1]),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("case", CASES)
def test_twelve_numbers_are_those_of_coco(case, task, engine):
    annotations, results = CASES[case]
    coco_gt = build_coco(annotations)

    stats = evaluate(coco_gt, results, task, engine).stats

    assert np.nan_to_num(stats, nan=-1).tolist() == pytest.approx(
        numbers_of_coco(coco_gt, results, task), abs=1e-12
    )


# The same objects under other ids; each is a function of an id, and keeps their order
OTHER_IDS = {
    "from-0": lambda k: k - 1,
    "negative": lambda k: k - 1000,
    # As floats all of them are the same number
    "beyond-2^53": lambda k: 2**60 + k,
    # No type of NumPy but the float holds both
    "of-both-signs-beyond-64-bits": lambda k: 2**63 + k if k > 5 else k - 1000,
    "text": lambda k: f"9f1c-{k:04d}",
    "with-a-point": lambda k: k + 0.5,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["id", "image_id", "category_id"])
@pytest.mark.parametrize("ids", OTHER_IDS)
def test_any_ids_give_the_same_numbers(ids, kind, engine):
    annotations, results = random_case(crowds=0.2)
    annotations = [{"id": k, **a} for k, a in enumerate(annotations, start=1)]
    expected = evaluate(build_coco(annotations), results, engine=engine).stats
    changed = OTHER_IDS[ids]
    coco_gt = build_coco([{**a, kind: changed(a[kind])} for a in annotations])
    entries = {"image_id": "images", "category_id": "categories"}.get(kind)
    if entries:
        for entry in coco_gt.dataset[entries]:
            entry["id"] = changed(entry["id"])
        results = [{**r, kind: changed(r[kind])} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt.createIndex()

    assert expected[0] > 0.1
    assert evaluate(coco_gt, results, engine=engine).stats == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_a_missing_iscrowd_is_0(task, engine):
    annotations, results = random_case()
    expected = evaluate(build_coco(annotations), results, task, engine).stats
    for annotation in annotations:
        assert annotation.pop("iscrowd") == 0

    stats = evaluate(build_coco(annotations), results, task, engine).stats

    assert stats == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("max_dets", [(1, 2, 3), (1, 10, 3), (5, 50, 500)])
def test_other_limits_of_detections(max_dets, engine):
    annotations, results = CASES["more-than-100-detections"]
    coco_gt = build_coco(annotations)

    numbers = evaluate(coco_gt, results, engine=engine, max_dets=max_dets).numbers

    largest = max(max_dets)
    expected = numbers_of_coco(coco_gt, results, "segm", max_dets)
    assert list(numbers.values()) == pytest.approx(expected, abs=1e-12)
    assert list(numbers)[6:9] == [f"AR@{k}" for k in sorted(max_dets)]
    alone = evaluate(coco_gt, results, engine=engine, max_dets=[largest]).numbers
    assert alone == pytest.approx({k: numbers[k] for k in alone})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("img_ids", [[7, 12], [12], [5], [5, 40, 5]])
def test_only_some_images(img_ids, task, engine):
    annotations, results = CASES["crowds"]
    coco_gt = build_coco(annotations)

    stats = evaluate(coco_gt, results, task, engine, img_ids=img_ids).stats

    expected = numbers_of_coco(coco_gt, results, task, img_ids=img_ids)
    assert np.nan_to_num(stats, nan=-1).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_a_second_ranking_equals_one_that_was_evaluated_alone(task):
    annotations, results = CASES["more-than-100-detections"]
    coco_gt = build_coco(annotations)
    others = [(7 * k % 101) / 101 for k in range(len(results))]  # with ties

    engine = AveragePrecision(coco_gt, results, task, "faster-coco-eval")
    engine.evaluate([r["score"] for r in results])
    again = engine.evaluate(others).stats

    alone = [{**r, "score": s} for r, s in zip(results, others)]
    expected = numbers_of_coco(coco_gt, alone, task)
    assert again == pytest.approx(expected, abs=1e-12)
    assert expected != numbers_of_coco(coco_gt, results, task)


def test_image_ids_may_be_strings():
    annotations, results = copy.deepcopy(CASES["ties"])
    for entry in annotations + results:
        entry["image_id"] = f"image-{entry['image_id']}"
    coco_gt = build_coco(annotations, [f"image-{k}" for k in IMAGE_IDS])

    ours, official = (evaluate(coco_gt, results, engine=x).stats for x in ENGINES)

    assert ours == pytest.approx(official, abs=1e-12)


# ---- answers worked out by hand

OBJECT, ELSEWHERE = [20, 20, 60, 60], [100, 80, 60, 60]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize(
    "boxes, expected",
    [
        pytest.param([OBJECT, ELSEWHERE], 1, id="right-one-first"),
        # One of two is right where the only object is found
        pytest.param([ELSEWHERE, OBJECT], 1 / 2, id="wrong-one-first"),
        pytest.param([ELSEWHERE, ELSEWHERE, OBJECT], 1 / 3, id="two-wrong-ones-first"),
    ],
)
def test_equal_scores_in_an_image_keep_the_order_of_the_results(boxes, expected, task, engine):
    coco_gt = build_coco([thing(OBJECT)])
    results = [found(box, 0.5) for box in boxes]

    assert evaluate(coco_gt, results, task, engine).numbers["AP"] == pytest.approx(expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "right, wrong, expected",
    [
        pytest.param(5, 40, 1, id="smaller-id-is-right"),
        pytest.param(40, 5, 1 / 2, id="smaller-id-is-wrong"),
    ],
)
def test_equal_scores_in_two_images_are_in_the_order_of_their_ids(
    right, wrong, expected, reverse, task, engine
):
    # Neither the order in the file, 12, 5, 40, 7 or its reverse, nor that of the results counts
    image_ids = IMAGE_IDS[::-1] if reverse else IMAGE_IDS
    coco_gt = build_coco([thing(OBJECT, right)], image_ids)
    results = [found(OBJECT, 0.5, right), found(ELSEWHERE, 0.5, wrong)][:: -1 if reverse else 1]

    assert evaluate(coco_gt, results, task, engine).numbers["AP"] == pytest.approx(expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_scores_that_are_no_numbers_come_last(task, engine):
    coco_gt = build_coco([thing(OBJECT)])
    results = [found(ELSEWHERE, math.nan), found(OBJECT, 0.0)]

    assert evaluate(coco_gt, results, task, engine).numbers["AP"] == pytest.approx(1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_detections_on_a_crowd_do_not_count(task, engine):
    coco_gt = build_coco([thing(ELSEWHERE, iscrowd=1), thing(OBJECT)])
    inside = [[100, 80, 30, 30], [120, 100, 30, 30], [100, 80, 60, 60]]
    results = [found(box, 0.9) for box in inside] + [found(OBJECT, 0.1)]

    assert evaluate(coco_gt, results, task, engine).numbers["AP"] == pytest.approx(1)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_size_of_a_mask_is_its_own_area(engine):
    # A large box with a small mask inside, which finds nothing: for small objects a mistake
    coco_gt = build_coco([thing([20, 20, 20, 20])])
    wrong = {**found([60, 20, 120, 120], 0.9), "segmentation": rle([100, 100, 20, 20])}
    results = [wrong, found([20, 20, 20, 20], 0.5)]

    assert evaluate(coco_gt, results, "segm", engine).numbers["APs"] == pytest.approx(1 / 2)
    assert evaluate(coco_gt, results, "bbox", engine).numbers["APs"] == pytest.approx(1)


@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_of_a_found_and_a_missed_object(engine):
    # The small object is found; the large one is not; none is of medium size
    coco_gt = build_coco([thing([20, 20, 20, 20]), thing([50, 30, 100, 100])])

    numbers = evaluate(coco_gt, [found([20, 20, 20, 20], 0.9)], engine=engine).numbers

    precise = 51 / 101  # precision is 1 at the recalls 0, 0.01, ..., 0.5, and 0 at the others
    expected = {"AP": precise, "AP50": precise, "AP75": precise}
    expected |= {"APs": 1, "APm": float("nan"), "APl": 0}
    expected |= {"AR@1": 1 / 2, "AR@10": 1 / 2, "AR@100": 1 / 2}
    expected |= {"ARs": 1, "ARm": float("nan"), "ARl": 0}
    assert numbers == pytest.approx(expected, nan_ok=True)
    assert list(numbers) == list(expected)


# ---- inputs


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_inputs_are_not_modified(task, engine):
    annotations, results = CASES["crowds"]
    coco_gt, results = build_coco(annotations), copy.deepcopy(results)
    before = copy.deepcopy((coco_gt.dataset, coco_gt.anns, coco_gt.imgToAnns, results))

    evaluate(coco_gt, results, task, engine)

    assert (coco_gt.dataset, coco_gt.anns, coco_gt.imgToAnns, results) == before


@pytest.mark.parametrize("engine", ENGINES)
def test_results_for_other_images_are_refused(engine):
    with pytest.raises(ValueError, match="results for 1 images .* one of them '99'"):
        AveragePrecision(build_coco([thing(OBJECT)]), [found(OBJECT, 0.5, 99)], "segm", engine)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="no task 'masks'; choose .*bbox, segm, boundary"):
        AveragePrecision(build_coco([thing(OBJECT)]), [found(OBJECT, 0.5)], "masks")


# ---- choice of the engine


@pytest.fixture
def without_faster_coco_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # importing it now fails


def test_the_faster_engine_is_the_default():
    assert choose_engine() == "faster-coco-eval"
    assert [choose_engine(x) for x in ENGINES] == list(ENGINES)


def test_pycocotools_is_the_default_where_the_other_is_missing(without_faster_coco_eval):
    assert choose_engine() == "pycocotools"
    coco_gt = build_coco([thing(OBJECT)])
    assert mask_ap(coco_gt, [found(OBJECT, 0.5)], [0.5])["AP"] == pytest.approx(100)


def test_a_missing_engine_is_an_error_that_says_what_to_do(without_faster_coco_eval):
    with pytest.raises(ValueError, match="pip install faster-coco-eval.*engine='pycocotools'"):
        choose_engine("faster-coco-eval")


def test_an_unknown_engine_is_an_error_that_names_the_others():
    with pytest.raises(ValueError, match="'matlab'; choose one of faster-coco-eval, pycocotools"):
        mask_ap(build_coco([thing(OBJECT)]), [found(OBJECT, 0.5)], [0.5], engine="matlab")


# ---- ids of objects


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("ids", [(-1, -2), (2**63, 2**70), (7, 7), ("a", "b"), (1.5, True)])
def test_ids_of_objects_may_be_anything(ids, task, engine):
    # Of different images, so that objects of the same id are not neighbours
    coco_gt = build_coco([thing(OBJECT, 5, id=ids[0]), thing(ELSEWHERE, 40, id=ids[1])])
    results = [found(OBJECT, 0.5, 5), found(ELSEWHERE, 0.5, 40)]

    assert evaluate(coco_gt, results, task, engine).numbers["AP"] == pytest.approx(1)


@pytest.mark.parametrize("engine", ENGINES)
def test_results_may_have_more_than_coco_knows(engine):
    results = [{**found(OBJECT, 0.5), "caption": "x", "keypoints": [], "id": "x"}]

    numbers = evaluate(build_coco([thing(OBJECT)]), results, engine=engine).numbers

    assert numbers["AP"] == pytest.approx(1)
