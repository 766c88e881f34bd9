"""LVIS evaluation, against LVIS's own code and answers worked out by hand."""

import json
import math
import sys
import uuid

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from detectron2.config import LazyCall
from detectron2.data import MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator, LVISEvaluator
from detectron2.structures import Boxes, Instances

from msrcnn_d2 import add_mask_calibrator, add_mask_scoring, model_zoo
from msrcnn_d2.calibration.collect import collect_detections
from msrcnn_d2.engine import build_recipe, find_config_file, load_config
from msrcnn_d2.evaluation import (
    MaskScoringCityscapesEvaluator,
    MaskScoringLVISEvaluator,
)
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_cli import main
from tests.helpers.toy import tiny_mask_rcnn

lvis = pytest.importorskip("lvis", reason="needs the package lvis (extra lvis)")

HEIGHT, WIDTH = 60, 80
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]


def write_lvis_json(path, images, frequencies):
    """
    Args:
        images: for each image its objects (category, box), and the ids of the categories that are
            negative and of those that are not exhaustively annotated.
        frequencies: of the categories 1, 2, ..., as a word of r, c and f.
    """
    annotations, entries = [], []
    for k, (objects, negative, not_exhaustive) in enumerate(images, start=1):
        entries.append(
            {
                "id": k,
                "height": HEIGHT,
                "width": WIDTH,
                "coco_url": f"http://images.cocodataset.org/val2017/{k}.jpg",
                "neg_category_ids": negative,
                "not_exhaustive_category_ids": not_exhaustive,
            }
        )
        for category, (x, y, w, h) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": k,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    categories = [
        {"id": k, "name": f"class {k}", "synonyms": [f"class {k}"], "frequency": frequency}
        for k, frequency in enumerate(frequencies, start=1)
    ]
    contents = {"images": entries, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(contents))
    return str(path)


def predictions(found, calibrated=False):
    """Instances of (category, box, class score, predicted IoU), with masks that fill the boxes."""
    boxes = torch.tensor([box for _, box, *_ in found], dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(found), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (_, (x, y, w, h), *_) in zip(masks, found):
        mask[y : y + h, x : x + w] = True
    instances = Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)),
        pred_classes=torch.tensor([category - 1 for category, *_ in found], dtype=torch.long),
        scores=torch.tensor([score for *_, score, _ in found]),
        pred_mask_ious=torch.tensor([iou for *_, iou in found]),
        pred_masks=masks,
    )
    instances.mask_scores = instances.scores * instances.pred_mask_ious
    if calibrated:
        instances.quality_scores = instances.scores.flip(0)
    return instances


def evaluate(json_file, images, num_classes, cls=MaskScoringLVISEvaluator, **kwargs):
    """The evaluator after the predictions of the images 1, 2, ..., and its results."""
    name = uuid.uuid4().hex
    names = [f"class {k}" for k in range(1, num_classes + 1)]
    MetadataCatalog.get(name).set(json_file=json_file, thing_classes=names)
    evaluator = cls(name, distributed=False, **kwargs)
    evaluator.reset()
    for k, instances in enumerate(images, start=1):
        evaluator.process([{"image_id": k}], [{"instances": instances}])
    return evaluator, evaluator.evaluate()


# An object of each category that is found by a detection of class score 0.5 and IoU 1
A, B, C, D = range(1, 5)
BOXES = {A: (0, 0, 20, 20), B: (30, 0, 20, 20), C: (0, 30, 20, 20), D: (30, 30, 20, 20)}
ELSEWHERE = (55, 0, 20, 20)
TWO_IMAGES = [
    ([(A, BOXES[A]), (D, BOXES[D])], [B], [D]),  # C is neither positive nor negative
    ([(B, BOXES[B]), (C, BOXES[C])], [], []),
]
FOUND = [
    [
        (A, BOXES[A], 0.9, 0.5),  # second by mask score, after a mistake
        (A, ELSEWHERE, 0.8, 0.9),
        (B, ELSEWHERE, 0.9, 1.0),  # a mistake, before the right one in the other image
        (C, ELSEWHERE, 0.9, 1.0),  # nobody knows
        (D, ELSEWHERE, 0.9, 1.0),  # may be an object that was not annotated
        (D, BOXES[D], 0.5, 1.0),
    ],
    [(B, BOXES[B], 0.5, 1.0), (C, BOXES[C], 0.5, 1.0)],
]


def test_only_what_is_known_to_be_wrong_is_a_mistake(tmp_path):
    # By mask score A and B have a mistake before the object: precision 1/2 at every recall. C and D
    # have none. By class score A has none either.
    path = write_lvis_json(tmp_path / "gt.json", TWO_IMAGES, "rcff")

    evaluator, results = evaluate(path, [predictions(found) for found in FOUND], 4)

    segm, by_class_score = results["segm"], results["segm_by_class_score"]
    assert [segm[k] for k in ("AP", "APr", "APc", "APf")] == pytest.approx([75, 50, 50, 100])
    assert by_class_score["AP"] == pytest.approx(87.5)
    assert by_class_score["APr"] == pytest.approx(100)
    assert results["bbox"]["AP"] == pytest.approx(87.5)
    assert math.isnan(segm["APl"])  # there are no large objects
    quality = evaluator.mask_quality
    assert quality.num_objects == [1, 1, 1, 1]
    # The three mistakes that are known: two and their objects, and the objects of C and D
    assert int(quality.counted.sum()) == 6
    assert results["mask_quality"]["AP_mask_score"] == pytest.approx(75)


def random_case(seed=0, most=40):
    """Five images of six categories with all kinds of annotations, and imperfect detections."""
    rng = np.random.default_rng(seed)

    def boxes(count):
        sides = rng.integers(6, 45, (count, 2))
        corners = rng.integers(0, [WIDTH - 45, HEIGHT - 45], (count, 2))
        return np.concatenate([corners, sides], axis=1)

    images, found = [], []
    for k, count in enumerate((most, 30, 20, 12, 0)):
        objects = [(int(c), b.tolist()) for c, b in zip(rng.integers(1, 7, 5), boxes(5))]
        objects = [] if k == 3 else objects
        positive = {category for category, _ in objects}
        others = sorted(set(range(1, 7)) - positive)
        images.append((objects, others[::2], sorted(positive)[::2]))
        near = [(c, (np.array(b) + rng.integers(-3, 4, 4)).clip(1)) for c, b in objects * 3]
        far = list(zip(rng.integers(1, 7, count), boxes(count)))
        found.append(
            [
                (int(c), b.tolist(), *rng.uniform(0.05, 1, 2).tolist())
                for c, b in (near + far)[:count]
            ]
        )
    return images, found


def numbers_of_lvis(monkeypatch, path, images, field, task, max_dets=300):
    """LVIS's own numbers of results that are written here."""
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis 0.5.3 is older than NumPy 1.24
    results = []
    for image_id, instances in enumerate(images, start=1):
        for k in range(len(instances)):
            x0, y0, x1, y1 = instances.pred_boxes.tensor[k].tolist()
            rle = mask_util.encode(np.asfortranarray(instances.pred_masks[k].numpy(), np.uint8))
            shape = (
                {"bbox": [x0, y0, x1 - x0, y1 - y0]} if task == "bbox" else {"segmentation": rle}
            )
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(instances.pred_classes[k]) + 1,
                    "score": float(instances.get(field)[k]),
                    **shape,
                }
            )
    truth = lvis.LVIS(path)
    evaluation = lvis.LVISEval(truth, lvis.LVISResults(truth, results, max_dets), task)
    evaluation.run()
    numbers = evaluation.get_results()
    return [100 * numbers[k] if numbers[k] >= 0 else math.nan for k in METRICS]


@pytest.mark.parametrize("most, limit", [(40, None), (400, None), (40, 7)])
def test_equals_lvis_run_once_for_each_score(most, limit, tmp_path, monkeypatch):
    truth, found = random_case(most=most)
    path = write_lvis_json(tmp_path / "gt.json", truth, "rcffrc")
    images = [predictions(x, calibrated=True) for x in found]
    for instances in images:  # else the AP of boxes would be that of masks
        instances.pred_boxes.tensor[:, 2] += 4
    evaluator, results = evaluate(path, images, 6, max_dets_per_image=limit)
    ours = {task: [results[task][k] for k in METRICS] for task in results if "quality" != task[5:]}

    expected = {
        task: numbers_of_lvis(monkeypatch, path, images, field, task[:4], limit or 300)
        for task, field in {
            "bbox": "scores",
            "segm": "mask_scores",
            "segm_by_class_score": "scores",
            "segm_by_quality_score": "quality_scores",
        }.items()
    }
    for task, numbers in expected.items():
        np.testing.assert_array_equal(ours[task], numbers, err_msg=task)
    assert len({tuple(x) for x in expected.values()}) == 4
    if most < 300 and limit is None:
        # Its rules are COCO's with crowds, and the code shares nothing with LVIS's
        quality = evaluator.mask_quality
        for score, task in (("mask_score", "segm"), ("class_score", "segm_by_class_score")):
            assert results["mask_quality"][f"AP_{score}"] == pytest.approx(results[task]["AP"])
        assert [p.ap["mask_score"] for p in quality.by_size.values()] == pytest.approx(
            ours["segm"][3:6], nan_ok=True
        )


def test_files_for_the_server_have_the_score_that_ranks(tmp_path):
    path = write_lvis_json(tmp_path / "gt.json", TWO_IMAGES, "rcff")
    images = [predictions(found, calibrated=True) for found in FOUND]
    evaluate(path, images, 4, output_dir=str(tmp_path / "out"))

    def entries(name):
        return json.loads((tmp_path / "out" / f"lvis_{name}_results.json").read_text())

    fields = {
        "segm": ("segmentation", "mask_scores"),
        "segm_by_quality_score": ("segmentation", "quality_scores"),
        "bbox": ("bbox", "scores"),
    }
    for name, (shape, field) in fields.items():
        found = entries(name)
        assert {frozenset(x) for x in found} == {
            frozenset(("image_id", "category_id", shape, "score"))
        }
        expected = [x for instances in images for x in instances.get(field).tolist()]
        assert [x["score"] for x in found] == expected
        assert [x["category_id"] for x in found] == [A, A, B, C, D, D, B, C]
    assert entries("instances")[0]["mask_score"] == pytest.approx(0.45)
    # A test set has no annotations: files, but no numbers
    contents = json.loads((tmp_path / "gt.json").read_text())
    (tmp_path / "gt.json").write_text(json.dumps({**contents, "annotations": []}))
    (tmp_path / "out" / "lvis_segm_results.json").unlink()
    assert evaluate(path, images, 4, output_dir=str(tmp_path / "out"))[1] == {}
    assert len(entries("segm")) == 8


def test_a_model_without_mask_scores_has_detectron2s_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "float", float, raising=False)
    truth, found = random_case(most=20)
    path = write_lvis_json(tmp_path / "gt.json", truth, "rcffrc")
    images = [predictions(x) for x in found]
    for instances in images:
        instances.remove("mask_scores")
        instances.remove("pred_mask_ious")
    _, ours = evaluate(path, images, 6, mask_quality=False)
    _, theirs = evaluate(path, images, 6, cls=LVISEvaluator)
    assert ours.keys() == theirs.keys() == {"bbox", "segm"}
    for task, numbers in theirs.items():
        expected = [v if v >= 0 else math.nan for v in numbers.values()]
        np.testing.assert_array_equal(list(ours[task].values()), expected)


def test_an_evaluation_without_detections(tmp_path):
    path = write_lvis_json(tmp_path / "gt.json", TWO_IMAGES, "rcff")
    evaluator, results = evaluate(path, [predictions([]), predictions([])], 4)
    assert all(math.isnan(x) for x in results["bbox"].values())
    assert evaluator.mask_quality is None
    # Only of a category that nobody knows about
    evaluator, results = evaluate(path, [predictions([FOUND[0][3]]), predictions([])], 4)
    assert results["segm"]["AP"] == 0
    assert evaluator.mask_quality is None and "mask_quality" not in results


def test_classes_are_found_by_name(tmp_path):
    path = write_lvis_json(tmp_path / "gt.json", TWO_IMAGES, "rcff")
    name = uuid.uuid4().hex
    MetadataCatalog.get(name).set(json_file=path, thing_classes=[f"class {k}" for k in range(1, 5)])
    evaluator = MaskScoringLVISEvaluator(
        name, distributed=False, class_names=["another", "class 4", "class 1"]
    )
    evaluator.reset()
    found = predictions([(2, BOXES[D], 0.9, 0.9), (3, BOXES[A], 0.9, 0.9), (1, BOXES[B], 0.9, 0.9)])
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    assert [x["category_id"] for x in evaluator._predictions[0]["instances"]] == [3, 0]
    with pytest.raises(ValueError, match="max_dets_per_image"):
        MaskScoringLVISEvaluator(name, max_dets_per_image=0)


@pytest.mark.parametrize(
    "found, expected",
    [
        (LVISEvaluator, MaskScoringLVISEvaluator),
        (CityscapesInstanceEvaluator, MaskScoringCityscapesEvaluator),
    ],
)
@pytest.mark.parametrize("change", [add_mask_scoring, add_mask_calibrator])
def test_lazy_configs_get_our_evaluators(found, expected, change):
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py")
    cfg.model = tiny_mask_rcnn().model
    cfg.dataloader.evaluator = [LazyCall(found)(dataset_name="a"), cfg.dataloader.evaluator]
    assert change(cfg).dataloader.evaluator[0]._target_ is expected


def test_the_report_command_follows_lvis(tmp_path, capsys, leave_no_traces):
    path = write_lvis_json(tmp_path / "gt.json", TWO_IMAGES, "rcff")
    images = [predictions(found) for found in FOUND]
    _, results = evaluate(path, images, 4, output_dir=str(tmp_path / "out"))
    file = str(tmp_path / "out" / "lvis_instances_results.json")
    assert main(["report", file, path, "--output", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["detections"] == 6
    assert report["overall"]["ap"]["mask_score"] == pytest.approx(75)
    only_unknown = [x for x in json.loads(open(file).read()) if x["category_id"] == C][:1]
    (tmp_path / "unknown.json").write_text(json.dumps(only_unknown))
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "unknown.json"), path])
    assert "categor" in capsys.readouterr().err


def test_a_yaml_config_evaluates_lvis_as_such():
    path = find_config_file("COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.yaml")
    options = ["DATASETS.TEST", "('lvis_v1_val',)"]
    assert build_recipe(load_config(path, options)).test_sets[0].names == ("lvis_v1_val",)
    with pytest.raises(UserError, match="BOUNDARY_AP.*lvis_v1_val"):
        build_recipe(load_config(path, [*options, "TEST.BOUNDARY_AP", "True"]))


@pytest.mark.parametrize("config", ["py", "yaml"])
def test_a_calibrator_does_not_learn_from_federated_annotations(config):
    name = f"COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.{config}"
    cfg = load_config(find_config_file(name))
    with pytest.raises(UserError, match="lvis_v1_val.*COCO"):
        collect_detections(cfg, "lvis_v1_val")


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lvis.eval", None)
    with pytest.raises(UserError, match="lvis"):
        MaskScoringLVISEvaluator("lvis_v1_val")
