import contextlib
import copy
import io
import json
import math
import uuid
from collections import Counter

import faster_coco_eval.core.mask as faster_mask_util
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances, ROIMasks

from msrcnn_d2.evaluation import (
    MaskScoringCOCOEvaluator,
    mask_ap,
    measure_mask_quality,
    true_mask_ious,
)
from msrcnn_d2.evaluation.average_precision import ENGINES, AveragePrecision
from msrcnn_d2.report import write_report
from tests.helpers.toy import write_coco_json

IMAGE_SIZE = (120, 160)
# Neither consecutive nor in the order of the classes
CATEGORY_IDS = (7, 3, 90)
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
MASK_TASKS = ["segm", "segm_by_class_score", "mask_quality"]


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def bitmask(x, y, width, height):
    mask = torch.zeros(IMAGE_SIZE, dtype=torch.bool)
    mask[y : y + height, x : x + width] = True
    return mask


def detections(boxes, classes, scores, mask_ious=None, masks=None):
    """Predictions whose masks fill their boxes (x, y, width, height), if no masks are given."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    if masks is None:
        masks = [bitmask(*box) for box in boxes.int().tolist()]
    instances = Instances(
        IMAGE_SIZE,
        pred_boxes=Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)),
        scores=torch.tensor(scores, dtype=torch.float32),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
        pred_masks=torch.stack(masks) if len(masks) else torch.zeros(0, *IMAGE_SIZE).bool(),
    )
    if mask_ious is not None:
        instances.pred_mask_ious = torch.tensor(mask_ious, dtype=torch.float32)
        instances.mask_scores = instances.scores * instances.pred_mask_ious
    return instances


def without_mask_scores(images):
    images = copy.deepcopy(images)
    for instances in images:
        instances.remove("pred_mask_ious")
        instances.remove("mask_scores")
    return images


def dataset_of(json_file, category_ids=CATEGORY_IDS):
    """The name of a new data set with the annotations of `json_file`."""
    name = uuid.uuid4().hex
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        thing_classes=[chr(ord("a") + k) for k in range(len(category_ids))],
        thing_dataset_id_to_contiguous_id={c: k for k, c in enumerate(category_ids)},
    )
    return name


def evaluate(json_file, images, cls=MaskScoringCOCOEvaluator, category_ids=CATEGORY_IDS, **kwargs):
    """Results for the predictions of the images 1, 2, 3, ..., by default the official ones."""
    kwargs = {"use_fast_impl": False, **kwargs}
    evaluator = cls(dataset_of(json_file, category_ids), distributed=False, **kwargs)
    evaluator.reset()
    for k, instances in enumerate(images, start=1):
        evaluator.process([{"image_id": k}], [{"instances": instances}])
    return evaluator.evaluate()


def coco_results(images, score, category_ids=CATEGORY_IDS):
    """The predictions in COCO's format, ranked by one of their fields."""
    results = []
    for image_id, instances in enumerate(images, start=1):
        for k in range(len(instances)):
            x0, y0, x1, y1 = instances.pred_boxes.tensor[k].tolist()
            mask = np.asfortranarray(instances.pred_masks[k].numpy(), dtype=np.uint8)
            rle = mask_util.encode(mask)
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_ids[instances.pred_classes[k]],
                    "score": instances.get(score)[k].item(),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    return results


def coco_metrics(json_file, results, task, max_dets=100):
    """The six numbers of COCO's own evaluation of `results`, in percent."""
    if task == "segm":  # else the area of an object would be that of its box
        results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(json_file))
        coco_eval = COCOeval(truth, truth.loadRes(results), task)
        coco_eval.params.maxDets = [1, 10, max_dets]
        coco_eval.evaluate()
        coco_eval.accumulate()
        if max_dets == 100:
            coco_eval.summarize()
            stats = coco_eval.stats[:6]
        else:
            # summarize() knows no other limit than 100 for AP; mean precision over all
            precision = coco_eval.eval["precision"][..., -1]  # IoU, recall, class, area
            picked = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0]]
            picked += [precision[..., area] for area in (1, 2, 3)]
            stats = [p[p > -1].mean() if (p > -1).any() else -1 for p in picked]
    return {name: 100 * x if x >= 0 else math.nan for name, x in zip(METRICS, stats)}


def coco(json_file):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(json_file))


def only_metrics(results):
    return {name: results[name] for name in METRICS}


def assert_same(results, expected):
    """Exactly equal, NaN to NaN."""
    assert results.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(results[key], value)
        else:
            assert results[key] == value or (math.isnan(results[key]) and math.isnan(value)), key


# ---- what the evaluator is for


def test_a_good_mask_with_a_low_class_score_wins_in_segm_and_not_in_bbox(tmp_path):
    # One object, two detections of it with the right box. The one that the classifier prefers has
    # a bad mask, and the head knows it. Ranked by class score the false positive comes first:
    # precision 1/2 at every recall. Ranked by mask score the good mask comes first: precision 1.
    json_file = write_coco_json(
        tmp_path / "gt.json", [[(0, square(20, 20, 60))]], CATEGORY_IDS, IMAGE_SIZE
    )
    box = [20, 20, 60, 60]
    image = detections(
        [box, box],
        [0, 0],
        scores=[0.9, 0.6],
        mask_ious=[0.3, 0.9],  # mask scores 0.27 and 0.54
        masks=[bitmask(20, 20, 20, 60), bitmask(20, 20, 60, 60)],
    )

    results = evaluate(json_file, [image])

    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["segm_by_class_score"]["AP"] == pytest.approx(50)
    # Both boxes are right: the better ranked one matches, the other comes after full recall
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_boxes_are_ranked_by_class_score(tmp_path):
    # The mirror image: the better class score has the right box, the better mask score a wrong one
    json_file = write_coco_json(
        tmp_path / "gt.json", [[(0, square(20, 20, 60))]], CATEGORY_IDS, IMAGE_SIZE
    )
    image = detections(
        [[20, 20, 60, 60], [90, 20, 60, 60]], [0, 0], scores=[0.9, 0.6], mask_ious=[0.3, 0.9]
    )

    results = evaluate(json_file, [image])

    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm_by_class_score"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(50)


# ---- against COCO's own evaluation


def random_boxes(rng, count, classes=3):
    sides = rng.integers(8, 60, (count, 2))
    corners = rng.integers(0, [IMAGE_SIZE[1] - 60, IMAGE_SIZE[0] - 60], (count, 2))
    return np.concatenate([corners, sides], axis=1), rng.integers(0, classes, count)


def random_images(counts, crowds=False, ties=False, seed=0, detections_per_object=4):
    """
    Objects and imperfect detections of them, one image for each of `counts`.

    Returns:
        for each image its objects, and its predictions.
    """
    rng = np.random.default_rng(seed)
    truth, images = [], []
    for count in counts:
        boxes, classes = random_boxes(rng, count)
        corners = [
            [x, y, x + w, y, x + w, y + h, x, y + h] for x, y, w, h in boxes.astype(int).tolist()
        ]
        crowd = [crowds and k % 3 == 0 for k in range(count)]
        truth.append(list(zip(classes.tolist(), corners, crowd)))

        found = np.repeat(boxes, detections_per_object, axis=0)
        found = found + rng.integers(-6, 7, found.shape)
        found[:, :2] = found[:, :2].clip(0)
        found[:, 2:] = found[:, 2:].clip(2)
        found_classes = np.repeat(classes, detections_per_object)
        wrong = rng.random(len(found)) < 0.2
        found_classes = np.where(wrong, (found_classes + 1) % 3, found_classes)
        # Masks that are narrower than their boxes, each by another amount
        masks = [
            bitmask(x, y, max(1, int(w * share)), h)
            for (x, y, w, h), share in zip(found.tolist(), rng.uniform(0.5, 1, len(found)))
        ]
        scores, mask_ious = rng.uniform(0.05, 1, (2, len(found)))
        if ties:
            scores, mask_ious = scores.round(1), np.full(len(found), 0.5)
        images.append(
            detections(found, found_classes.tolist(), scores.tolist(), mask_ious.tolist(), masks)
        )
    return truth, images


def nothing_found(truth_and_images, images_without_detections):
    truth, images = truth_and_images
    images = [x[:0] if k in images_without_detections else x for k, x in enumerate(images, start=1)]
    return truth, images


def without_truth(truth_and_images, images_without_truth):
    truth, images = truth_and_images
    truth = [[] if k in images_without_truth else x for k, x in enumerate(truth, start=1)]
    return truth, images


CASES = {
    "several-classes": random_images([3, 4, 5]),
    "crowds": random_images([4, 5, 6], crowds=True),
    "an-image-without-truth": without_truth(random_images([3, 4, 5]), {2}),
    "an-image-without-detections": nothing_found(random_images([3, 4, 5]), {1}),
    "ties": random_images([4, 5, 3], ties=True),
    "more-than-100-detections": random_images([5, 4], detections_per_object=30),
    "one-object": random_images([1]),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """A file with ground truth, and predictions."""
    truth, images = CASES[request.param]
    path = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)
    return path, copy.deepcopy(images)


def test_equals_coco_run_once_for_each_score(case):
    json_file, images = case

    results = evaluate(json_file, images)

    by_scores = coco_results(images, "scores")
    by_mask_scores = coco_results(images, "mask_scores")
    assert list(results) == ["bbox", *MASK_TASKS]
    assert_same(only_metrics(results["bbox"]), coco_metrics(json_file, by_scores, "bbox"))
    assert_same(only_metrics(results["segm"]), coco_metrics(json_file, by_mask_scores, "segm"))
    assert_same(
        only_metrics(results["segm_by_class_score"]), coco_metrics(json_file, by_scores, "segm")
    )


def test_the_quality_of_masks_is_that_of_the_written_results(case, tmp_path):
    json_file, images = case
    evaluator = MaskScoringCOCOEvaluator(
        dataset_of(json_file), distributed=False, output_dir=str(tmp_path / "out")
    )
    evaluator.reset()
    for k, instances in enumerate(images, start=1):
        evaluator.process([{"image_id": k}], [{"instances": instances}])

    results = evaluator.evaluate()

    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    expected = measure_mask_quality(coco(json_file), written)
    assert evaluator.mask_quality.to_json() == expected.to_json()
    assert_same(results["mask_quality"], expected.headline())
    assert results["mask_quality"]["AP_mask_score"] == results["segm"]["AP"]
    assert results["mask_quality"]["AP_class_score"] == results["segm_by_class_score"]["AP"]
    evaluator.reset()
    assert evaluator.mask_quality is None


def test_the_quality_of_masks_is_left_out_on_request(case):
    json_file, images = case

    results = evaluate(json_file, images, mask_quality=False)

    assert list(results) == ["bbox", "segm", "segm_by_class_score"]
    expected = evaluate(json_file, images)
    del expected["mask_quality"]
    assert_same(results, expected)


def test_the_three_results_differ_in_general(tmp_path):
    truth, images = CASES["several-classes"]
    json_file = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)

    results = evaluate(json_file, images)

    tasks = ("bbox", "segm", "segm_by_class_score")
    assert len({results[task]["AP"] for task in tasks}) == 3
    assert {"AP-a", "AP-b", "AP-c"} <= results["segm"].keys()


@pytest.mark.parametrize("max_dets", [None, 3, 200])
def test_both_engines_give_the_same_results(case, max_dets):
    json_file, images = case
    ours, official = (
        evaluate(json_file, images, use_fast_impl=None, engine=x, max_dets_per_image=max_dets)
        for x in ("faster-coco-eval", "pycocotools")
    )

    assert ours.keys() == official.keys()
    for task in ours:
        assert ours[task] == pytest.approx(official[task], abs=1e-9, nan_ok=True)


def test_official_implementation_on_request(tmp_path, caplog):
    json_file = write_coco_json(
        tmp_path / "gt.json", [[(0, square(20, 20, 60))]], CATEGORY_IDS, IMAGE_SIZE
    )
    image = detections([[20, 20, 60, 60]], [0], [0.9])

    def engine_of(**kwargs):
        caplog.clear()
        with caplog.at_level("INFO", logger="msrcnn_d2"):
            evaluate(json_file, [image], **kwargs)
        (line,) = (x for x in caplog.messages if x.startswith("Evaluating predictions with"))
        return line.split()[3]

    assert engine_of(use_fast_impl=False) == "pycocotools"
    assert engine_of(use_fast_impl=None) == "faster-coco-eval"
    assert engine_of(use_fast_impl=True) == "faster-coco-eval"
    assert engine_of(use_fast_impl=None, engine="pycocotools") == "pycocotools"


@pytest.mark.parametrize(
    "engine, use_fast_impl", [("faster-coco-eval", False), ("pycocotools", True)]
)
def test_contradicting_arguments_are_refused(engine, use_fast_impl):
    with pytest.raises(ValueError, match=f"'{engine}' contradicts use_fast_impl={use_fast_impl}"):
        MaskScoringCOCOEvaluator("any", engine=engine, use_fast_impl=use_fast_impl)


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="no engine 'matlab'; choose .*faster-coco-eval"):
        MaskScoringCOCOEvaluator("any", engine="matlab")


def test_classes_that_the_dataset_does_not_have_are_refused(tmp_path):
    json_file = write_coco_json(
        tmp_path / "gt.json", [[(0, square(20, 20, 60))]], CATEGORY_IDS, IMAGE_SIZE
    )
    image = detections([[20, 20, 60, 60]], [3], [0.9])

    with pytest.raises(ValueError, match="has class 3, but the dataset has 3 classes"):
        evaluate(json_file, [image])


def test_evaluating_twice_gives_the_same(case):
    json_file, images = case
    evaluator = MaskScoringCOCOEvaluator(dataset_of(json_file), distributed=False)
    evaluator.reset()
    for k, instances in enumerate(images, start=1):
        evaluator.process([{"image_id": k}], [{"instances": instances}])

    assert_same(evaluator.evaluate(), evaluator.evaluate())


def test_keypoints_are_evaluated_by_detectron2(tmp_path):
    keypoints = [[30.5, 30.5, 2], [60.5, 60.5, 2]]
    json_file = write_coco_json(
        tmp_path / "gt.json", [[(0, square(20, 20, 60))]], CATEGORY_IDS, IMAGE_SIZE
    )
    dataset = json.loads((tmp_path / "gt.json").read_text())
    dataset["annotations"][0] |= {"keypoints": [30, 30, 2, 60, 60, 2], "num_keypoints": 2}
    (tmp_path / "gt.json").write_text(json.dumps(dataset))

    def results(cls, **kwargs):
        image = detections([[20, 20, 60, 60]], [0], [0.9])
        image.pred_keypoints = torch.tensor([keypoints])
        return evaluate(json_file, [image], cls, kpt_oks_sigmas=[0.05, 0.05], **kwargs)

    ours = results(MaskScoringCOCOEvaluator, mask_quality=False)
    assert ours["keypoints"]["AP"] == pytest.approx(100)
    assert_same(ours, results(COCOEvaluator))


# ---- Boundary AP


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("max_dets", [None, 3, 200])
def test_boundary_ap_has_every_ranking(case, engine, max_dets):
    json_file, images = case
    kwargs = {"engine": engine, "use_fast_impl": None, "max_dets_per_image": max_dets}

    results = evaluate(json_file, images, boundary_ap=True, **kwargs)

    without = evaluate(json_file, images, **kwargs)
    rankings = {"boundary": "mask_scores", "boundary_by_class_score": "scores"}
    assert list(results) == ["bbox", *MASK_TASKS, *rankings]
    assert_same({task: results[task] for task in without}, without)
    for task, score in rankings.items():
        found = coco_results(images, score)
        ranked = AveragePrecision(
            coco(json_file), found, "boundary", "pycocotools", [max(max_dets or 100, 10)]
        )
        numbers = ranked.evaluate([r["score"] for r in found]).numbers
        expected = {name: 100 * numbers[name] for name in METRICS}
        assert only_metrics(results[task]) == pytest.approx(expected, nan_ok=True)
        assert results[task].keys() == results["segm"].keys()


def test_boundary_ap_of_models_with_other_scores(tmp_path):
    truth, images = CASES["several-classes"]
    json_file = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)

    plain = evaluate(json_file, without_mask_scores(images), boundary_ap=True, mask_quality=False)
    calibrated = copy.deepcopy(images)
    for instances in calibrated:
        instances.quality_scores = instances.mask_scores
        instances.mask_scores = instances.scores
    calibrated = evaluate(json_file, calibrated, boundary_ap=True)

    expected = evaluate(json_file, images, boundary_ap=True)
    assert list(plain) == ["bbox", "segm", "boundary"]
    assert_same(plain["boundary"], expected["boundary_by_class_score"])
    assert_same(calibrated["boundary_by_quality_score"], expected["boundary"])
    assert_same(calibrated["boundary"], expected["boundary_by_class_score"])


def test_boundary_ap_needs_masks_that_are_evaluated(tmp_path):
    truth, images = CASES["one-object"]
    json_file = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)

    assert list(evaluate(json_file, images, boundary_ap=True, tasks=["bbox"])) == ["bbox"]
    nothing = evaluate(json_file, [x[:0] for x in images], boundary_ap=True, tasks=["segm"])
    assert list(nothing) == ["segm", "boundary"]
    assert math.isnan(nothing["boundary"]["AP"])


@pytest.mark.parametrize("max_dets", [3, 200])
def test_another_limit_of_detections(max_dets, tmp_path):
    truth, images = random_images([5, 4], detections_per_object=60)
    json_file = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)

    results = evaluate(json_file, images, max_dets_per_image=max_dets)

    for task, kind, score in [
        ("bbox", "bbox", "scores"),
        ("segm", "segm", "mask_scores"),
        ("segm_by_class_score", "segm", "scores"),
    ]:
        expected = coco_metrics(json_file, coco_results(images, score), kind, max_dets)
        if max_dets == 200:
            at_100 = coco_metrics(json_file, coco_results(images, score), kind)
            for metric in ("AP", "AP50", "AP75"):
                assert results[task][f"{metric}@100"] == pytest.approx(at_100[metric], rel=1e-12)
        assert only_metrics(results[task]) == pytest.approx(expected, rel=1e-12, nan_ok=True)
    default = evaluate(json_file, images)
    assert default["segm"]["AP"] != results["segm"]["AP"]  # the limit matters here
    # The quality of masks counts as many detections as AP does, which sorts (1, 10, 3)
    both_scores, counted = results_with_both_scores(images), max(10, max_dets)
    quality = measure_mask_quality(coco(json_file), both_scores, "pycocotools", counted)
    assert_same(results["mask_quality"], quality.headline())


@pytest.mark.parametrize("engine", ["pycocotools", "faster-coco-eval"])
def test_more_than_100_objects_count_and_the_comparable_number_is_there_too(
    engine, tmp_path, caplog
):
    # 120 objects of one class, all found perfectly; the first 100 have a recall of 100 / 120, which
    # reaches the 84 of COCO's 101 recalls up to 0.83
    places = [(3 * (k % 12), 3 * (k // 12)) for k in range(120)]
    truth = [[(0, square(x, y, 2)) for x, y in places]]
    json_file = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)
    boxes = [(x, y, 2, 2) for x, y in places]
    scores = np.linspace(0.9, 0.1, 120).tolist()
    images = [detections(boxes, 120 * [0], scores, 120 * [0.5])]
    options = dict(engine=engine, use_fast_impl=None)
    results = evaluate(json_file, images, max_dets_per_image=130, **options)
    for task in ("bbox", "segm", "segm_by_class_score"):
        assert results[task]["AP"] == pytest.approx(100)
        for metric in ("AP@100", "AP50@100", "AP75@100"):
            assert results[task][metric] == pytest.approx(100 * 84 / 101)
    caplog.clear()
    for limit, warnings in ((100, 0), (None, 1)):
        at_100 = evaluate(json_file, images, max_dets_per_image=limit, **options)
        assert at_100["segm"]["AP"] == pytest.approx(100 * 84 / 101)
        assert "AP@100" not in at_100["segm"]
        assert sum("120 detections" in x.message for x in caplog.records) == warnings


@pytest.mark.parametrize("limit", [0, 1.5, "400", [1, 10, 400], True])
def test_a_limit_that_is_no_number_is_refused(limit):
    with pytest.raises(ValueError, match="max_dets_per_image"):
        MaskScoringCOCOEvaluator("any", max_dets_per_image=limit)


def test_only_some_images_are_evaluated_on_request(tmp_path):
    truth, images = CASES["several-classes"]
    json_file = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)
    only_third = write_coco_json(tmp_path / "3.json", [[], [], truth[2]], CATEGORY_IDS, IMAGE_SIZE)
    evaluator = MaskScoringCOCOEvaluator(
        dataset_of(json_file), distributed=False, use_fast_impl=False
    )
    evaluator.reset()
    for k, instances in enumerate(images, start=1):
        evaluator.process([{"image_id": k}], [{"instances": instances}])

    results = evaluator.evaluate(img_ids=[3])

    assert_same(results, evaluate(only_third, [images[0][:0], images[1][:0], images[2]]))


@pytest.mark.parametrize("tasks", [None, ("bbox", "segm")])
def test_without_any_detection_the_results_are_those_of_detectron2(tasks, tmp_path):
    truth, images = nothing_found(CASES["several-classes"], {1, 2, 3})
    json_file = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)

    results = evaluate(json_file, images, tasks=tasks, output_dir=str(tmp_path / "out"))

    assert_same(results, evaluate(json_file, images, COCOEvaluator, tasks=tasks))
    assert math.isnan(results["bbox"]["AP"])


def test_one_category_with_consecutive_ids(tmp_path):
    truth = [[(0, square(20, 20, 60))]]
    json_file = write_coco_json(tmp_path / "gt.json", truth, (1,), IMAGE_SIZE)
    image = detections([[20, 20, 60, 60]], [0], [0.9], [0.9])

    results = evaluate(json_file, [image], category_ids=(1,))

    assert results["segm"]["AP"] == pytest.approx(100)
    assert list(results["segm"]) == METRICS  # no AP per class


# ---- each IoU is computed once


@pytest.fixture
def compared(monkeypatch):
    """{kind of shape: of how many pairs the IoU has been computed}, counted from now on."""
    pairs = Counter()

    def counting(iou):
        def counted(detections, objects, *args):
            kind = "segm" if isinstance((detections or [{}])[0], dict) else "bbox"
            pairs[kind] += len(detections) * len(objects)
            return iou(detections, objects, *args)

        return counted

    for module in (mask_util, faster_mask_util):
        monkeypatch.setattr(module, "iou", counting(module.iou))
    return pairs


def pairs_of(json_file, results):
    """How many pairs of a detection and an object of its class are in the same image."""
    annotations = json.loads(open(json_file).read())["annotations"]
    objects = Counter((a["image_id"], a["category_id"]) for a in annotations)
    return sum(objects[r["image_id"], r["category_id"]] for r in results)


def results_with_both_scores(images):
    ious = torch.cat([x.pred_mask_ious for x in images]).tolist()
    mask_scores = torch.cat([x.mask_scores for x in images]).tolist()
    return [
        {**result, "mask_score": mask_score, "pred_mask_iou": iou}
        for result, mask_score, iou in zip(coco_results(images, "scores"), mask_scores, ious)
    ]


@pytest.mark.parametrize("max_dets", [None, 200])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_evaluator_computes_each_iou_once(case, compared, engine, max_dets):
    json_file, images = case

    evaluate(json_file, images, use_fast_impl=None, engine=engine, max_dets_per_image=max_dets)

    number = pairs_of(json_file, coco_results(images, "scores"))
    assert compared == {"bbox": number, "segm": number}


@pytest.mark.parametrize("engine", ENGINES)
def test_whatever_ranks_masks_computes_each_iou_once(case, compared, engine):
    json_file, images = case
    results = results_with_both_scores(images)
    truth, number = coco(json_file), pairs_of(json_file, results)

    for function in (
        lambda: measure_mask_quality(truth, results, engine).to_json(),
        lambda: mask_ap(truth, results, [r["mask_score"] for r in results], engine=engine),
        lambda: true_mask_ious(truth, results),
    ):
        compared.clear()
        function()
        assert compared == {"segm": number}


def test_a_report_computes_ious_with_objects_of_other_classes_only(compared, tmp_path, monkeypatch):
    truth, images = CASES["crowds"]
    json_file = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)
    quality = measure_mask_quality(coco(json_file), results_with_both_scores(images))
    compared.clear()

    # Worst annotations are looked for among the objects of other classes, which nothing else needs
    monkeypatch.setattr("msrcnn_d2.report.page.worst_annotations", lambda quality: [])
    write_report(quality, tmp_path / "report")

    assert not compared


# ---- models with a calibrator


def with_calibrated_scores(images, seed=0):
    rng = np.random.default_rng(seed)
    images = copy.deepcopy(images)
    for x in images:
        probs = -np.sort(-rng.random((len(x), 10)), axis=1)
        x.mask_iou_probs = torch.tensor(probs, dtype=torch.float32)
        x.quality_scores = x.mask_iou_probs.mean(dim=1)
    return images


@pytest.mark.parametrize("scores_masks", [True, False])
def test_masks_are_ranked_by_calibrated_score_too(case, scores_masks, tmp_path):
    json_file, images = case
    images = images if scores_masks else without_mask_scores(images)
    expected = evaluate(json_file, images, mask_quality=False)
    images = with_calibrated_scores(images)

    results = evaluate(json_file, images, output_dir=str(tmp_path / "out"))

    assert list(results) == [*expected, "segm_by_quality_score", "mask_quality"]
    assert_same({k: results[k] for k in expected}, expected)
    by_quality_score = coco_metrics(json_file, coco_results(images, "quality_scores"), "segm")
    assert_same(only_metrics(results["segm_by_quality_score"]), by_quality_score)
    assert results["mask_quality"]["AP_quality_score"] == results["segm_by_quality_score"]["AP"]
    file = tmp_path / "out" / "coco_segm_by_quality_score_results.json"
    for_a_server = json.loads(file.read_text())
    assert_same(coco_metrics(json_file, for_a_server, "segm"), by_quality_score)
    assert all(
        x.keys() == {"image_id", "category_id", "score", "segmentation"} for x in for_a_server
    )


def test_the_file_of_instances_has_calibrated_scores(case, tmp_path):
    json_file, images = case
    images = with_calibrated_scores(images)

    evaluate(json_file, images, output_dir=str(tmp_path / "out"))

    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert [x["quality_score"] for x in written] == [
        score for x in images for score in x.quality_scores.tolist()
    ]
    probs = np.array([x["mask_iou_probs"] for x in written])
    np.testing.assert_allclose(probs, torch.cat([x.mask_iou_probs for x in images]), atol=1e-6)
    assert {len(repr(p)) <= 8 for p in probs.ravel().tolist() if p > 1e-4} == {True}


# ---- models that do not score masks


def test_without_mask_scores_it_is_detectron2s_evaluator(case, tmp_path):
    json_file, images = case
    images = without_mask_scores(images)

    results = evaluate(json_file, images)

    assert list(results) == ["bbox", "segm", "mask_quality"]
    del results["mask_quality"]
    assert_same(results, evaluate(json_file, images, COCOEvaluator))


def test_without_masks_it_is_detectron2s_evaluator(case, tmp_path):
    json_file, images = case
    images = without_mask_scores(images)
    for instances in images:
        instances.remove("pred_masks")

    results = evaluate(json_file, images, output_dir=str(tmp_path / "out"))

    assert list(results) == ["bbox"]
    assert_same(results, evaluate(json_file, images, COCOEvaluator))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "coco_bbox_results.json" in written
    assert "coco_segm_results.json" not in written


def test_only_masks_are_evaluated_on_request(case):
    json_file, images = case

    results = evaluate(json_file, images, tasks=("segm",))

    everything = evaluate(json_file, images)
    assert list(results) == MASK_TASKS
    assert_same(results, {task: everything[task] for task in results})


def test_proposals_are_evaluated_as_in_detectron2(tmp_path):
    json_file = write_coco_json(
        tmp_path / "gt.json", [[(0, square(20, 20, 60))]], CATEGORY_IDS, IMAGE_SIZE
    )
    proposals = Instances(
        IMAGE_SIZE,
        proposal_boxes=Boxes(torch.tensor([[20.0, 20, 80, 80]])),
        objectness_logits=torch.ones(1),
    )

    def ars(cls):
        evaluator = cls(dataset_of(json_file), distributed=False)
        evaluator.reset()
        evaluator.process([{"image_id": 1}], [{"proposals": proposals}])
        return evaluator.evaluate()

    assert_same(ars(MaskScoringCOCOEvaluator), ars(COCOEvaluator))


def test_outputs_that_say_nothing_are_skipped(tmp_path):
    truth, images = CASES["several-classes"]
    json_file = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)
    evaluator = MaskScoringCOCOEvaluator(
        dataset_of(json_file), distributed=False, use_fast_impl=False
    )
    evaluator.reset()

    # One batch of four, in which the second output has nothing to evaluate
    inputs = [{"image_id": k} for k in (1, 99, 2, 3)]
    outputs = [{"instances": x} for x in images]
    evaluator.process(inputs, [outputs[0], {"sem_seg": None}, *outputs[1:]])

    assert_same(evaluator.evaluate(), evaluate(json_file, images))


# ---- masks inside their boxes


def with_roi_masks(images, seed=0):
    """Random soft masks for the boxes; and the same ones pasted as Detectron2 does it."""
    generator = torch.Generator().manual_seed(seed)
    unpasted, pasted = [], []
    for image in images:
        masks = torch.rand(len(image), 7, 7, generator=generator)
        unpasted.append(copy.deepcopy(image))
        unpasted[-1].pred_masks = ROIMasks(masks)
        pasted.append(copy.deepcopy(image))
        pasted[-1].pred_masks = paste_masks_in_image(masks, image.pred_boxes, IMAGE_SIZE)
    return unpasted, pasted


def test_masks_need_not_be_pasted(case, tmp_path):
    json_file, images = case
    unpasted, pasted = with_roi_masks(images)

    results = evaluate(json_file, unpasted, output_dir=str(tmp_path / "unpasted"))

    assert_same(results, evaluate(json_file, pasted, output_dir=str(tmp_path / "pasted")))
    for name in ("coco_instances_results.json", "coco_segm_results.json"):
        ours, theirs = ((tmp_path / x / name).read_text() for x in ("unpasted", "pasted"))
        assert ours == theirs


# ---- files


def test_files_for_a_server_give_the_same_ap(case, tmp_path):
    json_file, images = case

    results = evaluate(json_file, images, output_dir=str(tmp_path / "out"))

    for task, score in [("bbox", "scores"), ("segm", "mask_scores")]:
        written = json.loads((tmp_path / "out" / f"coco_{task}_results.json").read_text())
        part = "bbox" if task == "bbox" else "segmentation"
        expected = coco_results(images, score)
        assert all(x.keys() == {"image_id", "category_id", "score", part} for x in written)
        assert written == [{key: x[key] for key in written[0]} for x in expected]
        assert_same(only_metrics(results[task]), coco_metrics(json_file, written, task))


def test_the_file_of_instances_has_both_scores(case, tmp_path):
    json_file, images = case

    evaluate(json_file, images, output_dir=str(tmp_path / "out"))

    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    by_scores = coco_results(images, "scores")
    ious = torch.cat([x.pred_mask_ious for x in images]).tolist()
    mask_scores = torch.cat([x.mask_scores for x in images]).tolist()
    assert [x.pop("mask_score") for x in written] == mask_scores
    assert [x.pop("pred_mask_iou") for x in written] == ious
    assert written == by_scores  # what remains is the file of Detectron2
    assert (tmp_path / "out" / "instances_predictions.pth").exists()


def test_without_mask_scores_the_file_of_instances_is_that_of_detectron2(case, tmp_path):
    json_file, images = case
    images = without_mask_scores(images)

    evaluate(json_file, images, output_dir=str(tmp_path / "ours"))
    evaluate(json_file, images, COCOEvaluator, output_dir=str(tmp_path / "theirs"))

    ours, theirs = (
        (tmp_path / name / "coco_instances_results.json").read_text() for name in ("ours", "theirs")
    )
    assert ours == theirs


def test_sets_without_annotations_give_files_and_no_results(tmp_path):
    truth, images = CASES["several-classes"]
    json_file = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)
    dataset = json.loads((tmp_path / "gt.json").read_text())
    del dataset["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(dataset))

    assert evaluate(tmp_path / "test.json", images, output_dir=str(tmp_path / "test")) == {}

    evaluate(json_file, images, output_dir=str(tmp_path / "val"))
    for name in ("coco_bbox", "coco_segm", "coco_instances"):
        with_truth, without = (
            (tmp_path / x / f"{name}_results.json").read_text() for x in ("val", "test")
        )
        assert with_truth == without


def test_predictions_of_the_model_are_not_modified(case, tmp_path):
    json_file, images = case
    before = copy.deepcopy(images)
    inputs = [{"image_id": k} for k in range(1, len(images) + 1)]
    outputs = [{"instances": x} for x in images]
    evaluator = MaskScoringCOCOEvaluator(dataset_of(json_file), distributed=False)
    evaluator.reset()

    evaluator.process(inputs, outputs)
    evaluator.evaluate()

    assert inputs == [{"image_id": k} for k in range(1, len(images) + 1)]
    for output, instances, old in zip(outputs, images, before):
        assert output == {"instances": instances}
        assert instances.get_fields().keys() == old.get_fields().keys()
        assert torch.equal(instances.pred_boxes.tensor, old.pred_boxes.tensor)
        for name in ("scores", "mask_scores", "pred_mask_ious", "pred_classes", "pred_masks"):
            assert torch.equal(instances.get(name), old.get(name)), name


# ---- several processes


def evaluate_a_share(rank, world_size, folder):
    """Evaluate the images as one of several processes, and write the results it returns."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    _, images = CASES["several-classes"]
    evaluator = MaskScoringCOCOEvaluator(dataset_of(f"{folder}/gt.json"), use_fast_impl=False)
    evaluator.reset()
    share = np.array_split(np.arange(len(images)), world_size)[rank]  # like InferenceSampler
    for k in share.tolist():
        evaluator.process([{"image_id": k + 1}], [{"instances": images[k]}])
    with open(f"{folder}/results_{rank}.json", "w") as f:
        json.dump(evaluator.evaluate(), f)
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_results_of_one(tmp_path):
    truth, images = CASES["several-classes"]
    assert len(images) == 3  # two in one process, one in the other
    json_file = write_coco_json(tmp_path / "gt.json", truth, CATEGORY_IDS, IMAGE_SIZE)

    torch.multiprocessing.start_processes(
        evaluate_a_share,
        (2, str(tmp_path)),
        nprocs=2,
        start_method="fork",  # spawned processes would take long to import everything
    )

    first, second = (json.loads((tmp_path / f"results_{k}.json").read_text()) for k in (0, 1))
    assert second == {}
    assert list(first) == ["bbox", *MASK_TASKS]
    assert_same(first, evaluate(json_file, images))


# ---- true IoUs and AP under a ranking


@pytest.fixture
def squares(tmp_path):
    """Two squares of class 0, one of class 1, and a crowd of class 2 in image 1; image 2 empty."""
    objects = [
        (0, square(0, 0, 20)),
        (0, square(40, 0, 20)),
        (1, square(80, 0, 20)),
        (2, square(0, 60, 40), True),
    ]
    path = write_coco_json(tmp_path / "gt.json", [objects, []], CATEGORY_IDS, IMAGE_SIZE)
    return coco(path)


def result(box, class_, image_id=1):
    return coco_results([detections([box], [class_], [0.5])], "scores")[0] | {"image_id": image_id}


@pytest.mark.parametrize(
    "box, class_, image_id, expected",
    [
        pytest.param([0, 0, 20, 20], 0, 1, 1.0, id="equal"),
        pytest.param([40, 0, 10, 20], 0, 1, 1 / 2, id="half-of-the-second-object"),
        # 10 x 20 in common; 400 + 400 - 200 in the union
        pytest.param([10, 0, 20, 20], 0, 1, 1 / 3, id="shifted-by-half"),
        # In common with the first 5 x 20, with the second 15 x 20, which is 700 px in the union
        pytest.param([15, 0, 40, 20], 0, 1, 300 / 900, id="best-of-two"),
        pytest.param([20, 30, 20, 20], 0, 1, 0.0, id="disjoint"),
        pytest.param([0, 0, 20, 20], 1, 1, 0.0, id="object-of-another-class"),
        pytest.param([0, 0, 20, 20], 0, 2, 0.0, id="image-without-objects"),
        # A crowd is no object, though COCO compares with the share that lies in it
        pytest.param([0, 60, 20, 20], 2, 1, 0.0, id="inside-a-crowd"),
    ],
)
def test_true_mask_iou_of_squares(squares, box, class_, image_id, expected):
    assert true_mask_ious(squares, [result(box, class_, image_id)]) == [pytest.approx(expected)]


def test_true_mask_ious_keep_the_order_of_the_results(squares):
    results = [
        result([80, 0, 20, 20], 1),
        result([40, 0, 10, 20], 0),
        result([0, 0, 20, 20], 0, image_id=2),
        result([0, 0, 20, 20], 0),
    ]
    before = copy.deepcopy(results)

    assert true_mask_ious(squares, results) == [1.0, 0.5, 0.0, 1.0]
    assert results == before
    assert true_mask_ious(squares, []) == []


def test_mask_ap_of_a_ranking_is_that_of_the_evaluator(case):
    json_file, images = case
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
    results = coco_results(images, "scores")
    before = copy.deepcopy(results)
    mask_scores = torch.cat([x.mask_scores for x in images]).tolist()

    by_mask_score = mask_ap(truth, results, mask_scores, engine="pycocotools")
    class_scores = [r["score"] for r in results]
    by_class_score = mask_ap(truth, results, class_scores, engine="pycocotools")

    expected = evaluate(json_file, images)
    assert by_mask_score == {k: expected["segm"][k] for k in ("AP", "AP50", "AP75")}
    assert by_class_score == {k: expected["segm_by_class_score"][k] for k in ("AP", "AP50", "AP75")}
    assert results == before


def test_mask_ap_of_perfect_masks_is_100(squares):
    results = [result([0, 0, 20, 20], 0), result([40, 0, 20, 20], 0), result([80, 0, 20, 20], 1)]

    assert mask_ap(squares, results, [0.1, 0.2, 0.3]) == pytest.approx(
        {"AP": 100, "AP50": 100, "AP75": 100}
    )


def test_the_true_iou_is_a_better_ranking_than_a_reversed_one(squares):
    results = [result([0, 0, 20, 20], 0), result([40, 0, 20, 20], 0), result([20, 30, 20, 20], 0)]
    ious = true_mask_ious(squares, results)

    assert ious == [1.0, 1.0, 0.0]
    # The false positive first: at most 2 of 3 are right at full recall
    reversed_ap = mask_ap(squares, results, [-x for x in ious])["AP"]
    assert mask_ap(squares, results, ious)["AP"] > reversed_ap


def test_mask_ap_of_fewer_detections(squares):
    """The best one of class 0 is wrong; the second finds one of the two objects."""
    results = [result([20, 30, 20, 20], 0), result([0, 0, 20, 20], 0), result([80, 0, 20, 20], 1)]
    scores = [0.9, 0.8, 0.7]

    assert mask_ap(squares, results, scores, max_dets=1)["AP"] == pytest.approx(100 / 2)
    # Precision 1/2 at the 51 of 101 recalls up to 1/2; class 1 is perfect
    both = mask_ap(squares, results, scores, max_dets=2)["AP"]
    assert both == pytest.approx(100 * (0.5 * 51 / 101 + 1) / 2)


def test_mask_ap_is_nan_where_it_is_not_defined(squares, tmp_path):
    nothing = mask_ap(squares, [], [])
    path = write_coco_json(tmp_path / "empty.json", [[]], CATEGORY_IDS, IMAGE_SIZE)
    with contextlib.redirect_stdout(io.StringIO()):
        no_objects = COCO(path)

    for numbers in (nothing, mask_ap(no_objects, [result([0, 0, 20, 20], 0)], [0.5])):
        assert numbers.keys() == {"AP", "AP50", "AP75"}
        assert all(math.isnan(x) for x in numbers.values())
