"""What holds for AP and for the quality of masks, whatever was found."""

import copy
import json
import math
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from hypothesis import strategies as st

from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator, mask_ap, measure_mask_quality
from msrcnn_d2.evaluation.average_precision import ENGINES, AveragePrecision
from tests.helpers.filled_boxes import build_coco, rle
from tests.helpers.strategies import Untouched, holds, same, seeds

pytestmark = pytest.mark.filterwarnings("ignore:Found annotation id 0")

HEIGHT, WIDTH = 24, 32
CATEGORIES = (9, 2, 5)  # neither consecutive nor in order
ODD_IDS = st.sampled_from([0, 1, 2, 3, 4, 5, -1, -7, 2**40, 2**63, 1.5, "a", "2"])
LIMITS = st.sampled_from([1, 2, 3, 100])


@st.composite
def masks(draw):
    """A small mask: rectangles of all sizes, one pixel, noise, nothing."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    kind = draw(st.sampled_from(["rectangle", "rectangle", "pixel", "noise", "empty"]))
    x, y = draw(st.integers(0, WIDTH - 1)), draw(st.integers(0, HEIGHT - 1))
    if kind == "rectangle":
        mask[y : y + draw(st.integers(1, HEIGHT)), x : x + draw(st.integers(1, WIDTH))] = True
    if kind == "pixel":
        mask[y, x] = True
    if kind == "noise":
        mask = np.random.default_rng(draw(seeds())).random((HEIGHT, WIDTH)) < 0.3
    return mask


def near(mask, seed):
    """The mask moved by a pixel or two, with some pixels more or less."""
    rng = np.random.default_rng(seed)
    return np.roll(mask, rng.integers(-2, 3, 2), axis=(0, 1)) ^ (rng.random(mask.shape) < 0.02)


def box_of(mask):
    return mask_util.toBbox(mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))).tolist()


@st.composite
def scenes(draw, crowds=True, odd_ids=False):
    """
    Ground truth in COCO's format, with the ids of the images in no order, and detections.

    Scores and IoUs have few values, so that many are equal. Images may have no object, no
    detection, or neither; there are masks of no pixel on both sides.

    Args:
        crowds: whether there may be some.
        odd_ids: whether ids of objects may be equal, 0, negative or text.
    """
    ids = draw(st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True))
    annotations, results = [], []
    for image_id in ids:
        shapes = draw(st.lists(masks(), max_size=3))
        for mask in shapes:
            annotations.append(
                {
                    "id": draw(ODD_IDS) if odd_ids else len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": draw(st.sampled_from(CATEGORIES)),
                    "bbox": box_of(mask),
                    "area": float(mask.sum()),
                    "iscrowd": int(crowds and draw(st.integers(0, 4)) == 0),
                    "segmentation": rle(mask),
                }
            )
        classes = [a["category_id"] for a in annotations if a["image_id"] == image_id]
        for _ in range(draw(st.integers(0, 5))):
            k = draw(st.integers(0, len(shapes)))  # the last one is none
            mask = near(shapes[k], draw(seeds())) if k < len(shapes) else draw(masks())
            right = k < len(shapes) and draw(st.integers(0, 5)) > 0
            score, iou = (draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])) for _ in range(2))
            results.append(
                {
                    "image_id": image_id,
                    "category_id": classes[k] if right else draw(st.sampled_from(CATEGORIES)),
                    "bbox": box_of(mask),
                    "segmentation": rle(mask),
                    "score": score,
                    "pred_mask_iou": iou,
                    "mask_score": score * iou,
                }
            )
    return {
        "info": {},
        "images": [
            {"id": k, "file_name": f"{k}.png", "height": HEIGHT, "width": WIDTH} for k in ids
        ],
        "annotations": annotations,
        "categories": [{"id": k, "name": str(k)} for k in CATEGORIES],
    }, results


@holds(40, scene=scenes(odd_ids=True), task=st.sampled_from(["bbox", "segm"]), max_dets=LIMITS)
def test_both_engines_agree(scene, task, max_dets):
    dataset, results = scene
    if not results:
        return
    coco_gt = build_coco(dataset)
    untouched = Untouched(dataset, results)
    scores = [r["score"] for r in results]

    ours, official = (
        AveragePrecision(coco_gt, results, task, engine, [1, max_dets]).evaluate(scores)
        for engine in ENGINES
    )

    untouched.check()
    assert ours.numbers == pytest.approx(official.numbers, abs=1e-12, nan_ok=True)
    for name in ("precision", "recall"):
        np.testing.assert_allclose(ours.eval[name], official.eval[name], rtol=0, atol=1e-12)
    for value in ours.stats:
        assert math.isnan(value) or 0 <= value <= 1 + 1e-12
    if not any(not a["iscrowd"] for a in dataset["annotations"]):
        assert all(map(math.isnan, ours.stats))


# ---- the evaluator


def evaluated(dataset, results, order, **kwargs):
    """The evaluator's results and itself, for images in some order, by detections as a model's."""
    name = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "truth.json"
        file.write_text(json.dumps(dataset))
        MetadataCatalog.get(name).set(
            json_file=str(file),
            thing_classes=[str(k) for k in CATEGORIES],
            thing_dataset_id_to_contiguous_id={k: i for i, k in enumerate(CATEGORIES)},
        )
        evaluator = MaskScoringCOCOEvaluator(
            name, ("bbox", "segm"), distributed=False, max_dets_per_image=100, **kwargs
        )
    MetadataCatalog.remove(name)
    evaluator.reset()
    given = [(dataset["images"][k]["id"], instances_of(dataset, results, k)) for k in order]
    untouched = Untouched(given)
    for image_id, instances in given:
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    found = evaluator.evaluate()
    untouched.check()
    return found, evaluator


def instances_of(dataset, results, image):
    results = [r for r in results if r["image_id"] == dataset["images"][image]["id"]]
    pixels = [mask_util.decode(r["segmentation"]).astype(bool) for r in results]
    boxes = torch.tensor([r["bbox"] for r in results]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(boxes))
    instances.pred_classes = torch.tensor([CATEGORIES.index(r["category_id"]) for r in results])
    instances.pred_classes = instances.pred_classes.long()
    for name, key in (
        ("scores", "score"),
        ("pred_mask_ious", "pred_mask_iou"),
        ("mask_scores", "mask_score"),
    ):
        instances.set(name, torch.tensor([r[key] for r in results]).float())
    masks = np.stack(pixels) if pixels else np.zeros((0, HEIGHT, WIDTH), bool)
    instances.pred_masks = torch.from_numpy(masks)
    return instances


AP = ("bbox", "segm", "segm_by_class_score")


@holds(15, scene=scenes(), data=st.data())
def test_the_order_of_the_images_does_not_change_ap(scene, data):
    """
    Bit for bit, also where scores are equal: COCO then goes by the id of the image, whatever comes
    first, and within an image by the order of its detections, which is the model's.

    What is averaged over detections is equal up to the rounding of their sum.
    """
    dataset, results = scene
    count = len(dataset["images"])
    found, evaluator = evaluated(dataset, results, range(count))
    order = data.draw(st.permutations(range(count)))

    again, other = evaluated(dataset, results, order)

    assert again.keys() == found.keys()
    for task in found:
        if task in AP:
            assert repr(again[task]) == repr(found[task]), task
        else:
            assert again[task] == pytest.approx(found[task], abs=1e-9, nan_ok=True)
    if results:
        assert_close(other.mask_quality.to_json(), evaluator.mask_quality.to_json())


def assert_close(first, second):
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        first, second = list(first.values()), list(second.values())
    if isinstance(first, list):
        assert len(first) == len(second)
        for x, y in zip(first, second):
            assert_close(x, y)
    else:
        assert first == pytest.approx(second, abs=1e-9)


@holds(12, scene=scenes(), engine=st.sampled_from(ENGINES))
def test_ap_is_a_percentage_or_nan(scene, engine):
    dataset, results = scene
    found, _ = evaluated(dataset, results, range(len(dataset["images"])), engine=engine)

    has_objects = any(not a["iscrowd"] for a in dataset["annotations"])
    for task in AP if results else ():
        for name, value in found[task].items():
            assert math.isnan(value) or 0 <= value <= 100 + 1e-9, (task, name)
        assert math.isnan(found[task]["AP"]) is not has_objects


@holds(12, scene=scenes(), engine=st.sampled_from(ENGINES))
def test_mask_scores_that_are_class_scores_give_their_ap(scene, engine):
    dataset, results = scene
    results = [{**r, "mask_score": r["score"], "pred_mask_iou": 1.0} for r in results]
    found, _ = evaluated(dataset, results, range(len(dataset["images"])), engine=engine)

    if results:
        assert repr(found["segm"]) == repr(found["segm_by_class_score"])
        quality = found["mask_quality"]
        assert quality["AP_mask_score"] == pytest.approx(quality["AP_class_score"], nan_ok=True)


# ---- the quality of masks


@holds(30, scene=scenes(), max_dets=LIMITS, engine=st.sampled_from(ENGINES))
def test_the_quality_of_masks_is_finite_or_nan_and_in_its_range(scene, max_dets, engine):
    dataset, results = scene
    if not results:
        return
    untouched = Untouched(dataset, results)
    quality = measure_mask_quality(build_coco(dataset), results, engine, max_dets)

    parts = [quality.overall, *quality.by_class.values(), *quality.by_size.values()]
    for part in [*parts, *quality.by_threshold.values()]:
        for agreement in filter(None, (part.matched, part.all)):
            check_agreement(agreement, len(results))
        for value in part.ap.values():
            assert math.isnan(value) or 0 <= value <= 100 + 1e-9
        assert not any(map(math.isinf, part.gap_closed.values()))
    for errors in quality.calibration.values():
        for value in (errors.laece, errors.laace, *errors.brier.values(), *errors.ece.values()):
            assert math.isnan(value) or 0 <= value <= 1 + 1e-9
        assert math.isnan(errors.laece) or errors.laece <= errors.laace + 1e-9
    assert (quality.true_ious >= 0).all() and (quality.true_ious <= 1).all()
    assert sum(x.all.count for x in quality.by_class.values()) == quality.overall.all.count
    assert quality.overall.matched.count <= quality.overall.all.count <= len(results)
    json.loads(json.dumps(quality.to_json(), allow_nan=False))
    assert isinstance(quality.table(), str)
    untouched.check()


def check_agreement(agreement, most):
    assert 0 <= agreement.count <= most
    for value in (*agreement.pearson.values(), *agreement.spearman.values()):
        assert math.isnan(value) or -1 - 1e-9 <= value <= 1 + 1e-9
    for value, low in (
        (agreement.true_iou, 0),
        (agreement.mae, 0),
        (agreement.ece, 0),
        (agreement.bias, -1),
    ):
        assert math.isnan(value) is (agreement.count == 0)
        assert math.isnan(value) or low <= value <= 1 + 1e-9
    if agreement.count:
        assert abs(agreement.bias) <= agreement.mae + 1e-9
        assert agreement.ece <= agreement.mae + 1e-9  # a mean is never larger than that of sizes


@st.composite
def one_to_one(draw):
    """Objects, of each at most one detection, which meets no other object; no crowds."""
    dataset, results = draw(scenes(crowds=False))
    for image in dataset["images"]:
        own = [a for a in dataset["annotations"] if a["image_id"] == image["id"]]
        for k, annotation in enumerate(own):
            x, height = 10 * k, draw(st.integers(1, HEIGHT))
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[:height, x : x + 9] = True
            annotation.update(segmentation=rle(mask), area=float(mask.sum()), bbox=box_of(mask))
        found = [r for r in results if r["image_id"] == image["id"]]
        for k, result in enumerate(found):
            mask = np.zeros((HEIGHT, WIDTH), bool)
            if k < len(own):
                mask[
                    draw(st.integers(0, 9)) : draw(st.integers(10, HEIGHT)), 10 * k : 10 * k + 9
                ] = 1
                result["category_id"] = own[k]["category_id"]
            else:
                mask[:, 30:] = True  # where no object is
            result["segmentation"] = rle(mask)
    return dataset, results


@holds(25, scene=one_to_one(), engine=st.sampled_from(ENGINES), seed=seeds())
def test_no_ranking_is_above_the_ceiling_where_no_object_has_two_candidates(scene, engine, seed):
    """
    Whom a detection matches does not depend on the ranking then: at each threshold those that are
    right are those with a true IoU from there on, and the ranking by true IoU has all of them
    before all others, which is the best there is. With two candidates it is not: the second one of
    a good mask comes before the first one of another object, and is a mistake.
    """
    dataset, results = scene
    if not results:
        return
    coco_gt = build_coco(dataset)
    quality = measure_mask_quality(coco_gt, results, engine)
    others = mask_ap(
        coco_gt, results, np.random.default_rng(seed).random(len(results)), 100, engine
    )

    ap = quality.overall.ap
    if not math.isnan(ap["true_iou"]):
        best = ap["true_iou"] + 1e-9
        assert ap["class_score"] <= best and ap["mask_score"] <= best and others["AP"] <= best


@holds(25, scene=scenes(), factor=st.sampled_from([0.5, 0.25, 2.0]), power=st.integers(1, 3))
def test_only_the_order_of_scores_counts_for_ap(scene, factor, power):
    dataset, results = scene
    if not results:
        return
    coco_gt, before = build_coco(dataset), copy.deepcopy(results)
    engine = AveragePrecision(coco_gt, results, "segm")
    scores = [r["score"] for r in results]

    first = engine.evaluate(scores)
    engine.evaluate([-s for s in scores])
    again = engine.evaluate([factor * s**power - 3 for s in scores])

    assert repr(again.numbers) == repr(first.numbers)
    assert same(results, before)
