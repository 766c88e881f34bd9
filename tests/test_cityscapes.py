"""Cityscapes evaluation, against Cityscapes' own command and answers worked out by hand."""

import json
import sys
import uuid

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from msrcnn_d2.engine.launch import launch_processes
from msrcnn_d2.evaluation import MaskScoringCityscapesEvaluator
from msrcnn_d2.utils.errors import UserError
from tests.helpers import forked
from tests.helpers.cityscapes import IDS, SIZE, write_cityscapes

cs = pytest.importorskip(
    "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling",
    reason="needs the package cityscapesScripts (extra cityscapes)",
)

CLASSES = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]


def predictions(found, calibrated=False):
    """Instances of (class, box, class score, predicted IoU), with masks that fill the boxes."""
    masks = torch.zeros(len(found), *SIZE, dtype=torch.bool)
    for mask, (_, (x, y, w, h), *_) in zip(masks, found):
        mask[y : y + h, x : x + w] = True
    instances = Instances(
        SIZE,
        pred_boxes=Boxes(torch.zeros(len(found), 4)),
        pred_classes=torch.tensor([CLASSES.index(name) for name, *_ in found], dtype=torch.long),
        scores=torch.tensor([score for *_, score, _ in found]),
        pred_mask_ious=torch.tensor([iou for *_, iou in found]),
        pred_masks=masks,
    )
    instances.mask_scores = instances.scores * instances.pred_mask_ious
    if calibrated:
        instances.quality_scores = instances.scores.flip(0)
    return instances


def dataset(root):
    name = uuid.uuid4().hex
    MetadataCatalog.get(name).set(
        thing_classes=CLASSES,
        image_dir=f"{root}/leftImg8bit/val",
        gt_dir=f"{root}/gtFine/val",
    )
    return name


def file_names(images):
    cities = ("aachen", "bochum")
    return [f"{cities[k % 2]}_{k:06}_000019_leftImg8bit.png" for k in range(len(images))]


def evaluate(root, images, **kwargs):
    """Results for the predictions of the images in their order."""
    evaluator = MaskScoringCityscapesEvaluator(dataset(root), **kwargs)
    evaluator.reset()
    for name, instances in zip(file_names(images), images):
        evaluator.process([{"file_name": name}], [{"instances": instances}])
    return evaluator.evaluate()


CAR, PERSON, GROUP = (0, 0, 20, 20), (30, 0, 20, 20), (0, 30, 40, 30)
ELSEWHERE, IN_GROUP = (60, 0, 20, 20), (5, 35, 20, 20)


def test_average_precision_by_hand(tmp_path):
    # One of two counting detections is right. Cityscapes' integral of precision over recall: if the
    # right one is second, precision is 1/2 at recall 1 and 0 at recall 0, with half a step each:
    # 1/4. If it is first, AP is 1. The one in the group does not count. Nobody finds the person.
    write_cityscapes(tmp_path, [[("car", CAR), ("person", PERSON), ("cargroup", GROUP)]])
    found = [
        ("car", CAR, 0.9, 0.5),
        ("car", ELSEWHERE, 0.8, 0.9),
        ("car", IN_GROUP, 1.0, 1.0),
    ]

    results = evaluate(tmp_path, [predictions(found)])

    assert results["segm"]["AP-car"] == pytest.approx(25)
    assert results["segm_by_class_score"]["AP-car"] == pytest.approx(100)
    assert results["segm"]["AP-person"] == 0
    assert results["segm"]["AP"] == results["segm"]["AP50"] == pytest.approx(12.5)
    assert np.isnan(results["segm"]["AP-bus"])


def random_case():
    rng = np.random.default_rng(0)
    truth, images = [], []
    for count in (8, 6, 0, 7):
        corners = rng.integers(0, [SIZE[1] - 40, SIZE[0] - 40], (count, 2))
        boxes = np.concatenate([corners, rng.integers(12, 40, (count, 2))], axis=1).tolist()
        labels = rng.choice(["car", "person", "bicycle", "cargroup", "void"], count).tolist()
        truth.append(list(zip(labels, boxes)))
        found = []
        for label, box in 4 * truth[-1]:
            name = label.removesuffix("group") if label != "void" else "rider"
            box = (np.array(box) + rng.integers(-3, 4, 4)).clip(0).tolist()
            found.append((name, box, *rng.uniform(0.05, 1, 2).round(6).tolist()))
        images.append(predictions(found, calibrated=True))
    return truth, images


def numbers_of_cityscapes(monkeypatch, folder, root, images, field):
    """The averages of Cityscapes' own command on files that are written here."""
    for name, instances in zip(file_names(images), images):
        base = name.removesuffix("_leftImg8bit.png")
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        lines = []
        for k in range(len(instances)):
            Image.fromarray(instances.pred_masks[k].numpy()).save(folder / f"masks/{base}{k}.png")
            label = IDS[CLASSES[instances.pred_classes[k]]]
            lines.append(f"masks/{base}{k}.png {label} {float(instances.get(field)[k])!r}")
        (folder / f"{base}.txt").write_text("\n".join(lines) + "\n" * bool(lines))
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # which NumPy had until 2.3
    monkeypatch.setattr(sys, "argv", ["evaluate"])
    monkeypatch.setenv("CITYSCAPES_RESULTS", str(folder))
    write = cs.writeDict2JSON

    def write_results(contents, path):
        if path != "matches.json":  # which it cannot write with NumPy 2, and nobody reads
            write(contents, path)

    monkeypatch.setattr(cs, "writeDict2JSON", write_results)
    settings = {
        "groundTruthSearch": f"{root}/gtFine/val/*/*_gtFine_instanceIds.png",
        "exportFile": f"{folder}/results.json",
        "gtInstancesFile": f"{folder}/gtInstances.json",
        "predictionPath": None,
        "predictionWalk": None,
    }
    for key, value in settings.items():
        monkeypatch.setattr(cs.args, key, value)
    cs.main()
    return json.loads((folder / "results.json").read_text())["averages"]


def test_equals_cityscapes_own_command_for_each_score(tmp_path, monkeypatch):
    truth, images = random_case()
    write_cityscapes(tmp_path, truth)
    out = tmp_path / "out"

    results = evaluate(tmp_path, images, output_dir=str(out))

    assert list(results) == ["segm", "segm_by_class_score", "segm_by_quality_score"]
    seen = set()
    fields = ("mask_scores", "scores", "quality_scores")
    for (task, numbers), field in zip(results.items(), fields):
        theirs = numbers_of_cityscapes(monkeypatch, tmp_path / task, tmp_path, images, field)
        expected = {"AP": theirs["allAp"], "AP50": theirs["allAp50%"]}
        expected |= {f"AP-{name}": x["ap"] for name, x in theirs["classes"].items()}
        assert numbers.keys() == expected.keys()
        np.testing.assert_array_equal(
            list(numbers.values()), [100 * expected[name] for name in numbers], err_msg=task
        )
        seen.add(numbers["AP"])
    assert len(seen) == 3
    # The folders for the server give the same numbers to the command
    folders = ("cityscapes_segm_results", "cityscapes_segm_by_quality_score_results")
    for folder, task in zip(folders, ("segm", "segm_by_quality_score")):
        theirs = numbers_of_cityscapes(monkeypatch, out / folder, tmp_path, [], "scores")
        assert 100 * theirs["allAp"] == results[task]["AP"]


def _evaluate_every_second_image(root, images, out):
    evaluator = MaskScoringCityscapesEvaluator(dataset(root), output_dir=str(out))
    evaluator.reset()
    for k in range(comm.get_rank(), len(images), comm.get_world_size()):
        evaluator.process([{"file_name": file_names(images)[k]}], [{"instances": images[k]}])
    results = evaluator.evaluate()
    (out / f"rank_{comm.get_rank()}.json").write_text(json.dumps(results))


def _launch_two(*args):
    launch_processes(_evaluate_every_second_image, 2, device="cpu", args=args)


def test_two_processes_share_the_images(tmp_path):
    truth, images = random_case()
    write_cityscapes(tmp_path, truth)
    expected = evaluate(tmp_path, images)
    out = tmp_path / "out"
    out.mkdir()
    process = forked.start(_launch_two, tmp_path, images, out, log=tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    first, second = (json.loads((out / f"rank_{k}.json").read_text()) for k in range(2))
    assert second is None and first.keys() == expected.keys()
    for task, numbers in expected.items():
        np.testing.assert_array_equal(list(first[task].values()), list(numbers.values()))


def test_masks_of_an_earlier_evaluation_are_removed(tmp_path):
    truth, images = random_case()
    write_cityscapes(tmp_path, truth)
    folder = tmp_path / "out" / "cityscapes_segm_results"
    evaluate(tmp_path, images, output_dir=str(tmp_path / "out"))
    assert len(list(folder.glob("*.png"))) == sum(map(len, images))
    results = evaluate(tmp_path, [x[:0] for x in images], output_dir=str(tmp_path / "out"))
    assert sorted(x.suffix for x in folder.iterdir()) == [".txt"] * len(images)
    assert results["segm"]["AP"] == 0


def test_classes_are_found_by_name(tmp_path):
    write_cityscapes(tmp_path, [[("car", CAR)]])
    found = predictions([("person", CAR, 0.9, 0.9), ("rider", ELSEWHERE, 0.9, 0.9)])
    results = evaluate(tmp_path, [found], class_names=["car", "tree"])
    assert results["segm"]["AP"] == pytest.approx(100)


def test_annotations_without_their_image_are_refused(tmp_path):
    write_cityscapes(tmp_path, [[("car", CAR)]])
    for image in tmp_path.glob("leftImg8bit/*/*/*.png"):
        image.unlink()
    with pytest.raises(UserError, match="aachen_000000_000019_leftImg8bit.png"):
        MaskScoringCityscapesEvaluator(dataset(tmp_path))


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, cs.__name__, None)
    with pytest.raises(UserError, match="cityscapes"):
        MaskScoringCityscapesEvaluator("cityscapes_fine_instance_seg_val")
