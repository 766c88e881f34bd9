"""Names of classes travel with weights; sets with others are evaluated by name, or refused."""

import json
import logging
import os
from types import SimpleNamespace

import pytest
import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from msrcnn_d2 import MaskScoringPredictor
from msrcnn_d2.checkpoint import MaskScoringCheckpointer
from msrcnn_d2.checkpoint.conversion import read_weights
from msrcnn_d2.class_names import difference, match, obstacle, same
from msrcnn_d2.engine import check_recipe, register_dataset
from msrcnn_d2.engine.evaluate import use_names
from msrcnn_d2.engine.preflight import check_names_of_weights
from msrcnn_d2.engine.recipe import TestSet
from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator
from msrcnn_d2.utils.errors import UserError
from tests.helpers.command import exit_code
from tests.helpers.toy import tiny_yacs_config, write_coco_json
from tests.helpers.weights import MMDETECTION, renamed, saved, weights_for
from tests.test_evaluation import CATEGORY_IDS, IMAGE_SIZE, detections, evaluate, square

NAMES = ["a", "b", "c"]


# ---- which names go together


@pytest.mark.parametrize(
    "names, others, words",
    [
        ("abc", "acb", ["another order", "number 2", "(a, b, c)", "(a, c, b)"]),
        ("abc", "abxC", ["'c' and 'C'", "number 3"]),
        (["traffic light"], ["Traffic_Light", "x"], ["'traffic light' and 'Traffic_Light'"]),
        ("abc", "xy", ["no name in common", "has 3 (a, b, c)", "has 2 (x, y)"]),
        ("aab", "ab", ["twice"]),
        ("abcdefghij", "abcdefghji", ["number 9", "has 10 (..., h, i, j)", "(..., h, j, i)"]),
    ],
)
def test_names_that_do_not_go_together(names, others, words):
    for message in (obstacle("A", names, "B", others), difference("A", names, "B", others)):
        assert all(word in message for word in words), message


@pytest.mark.parametrize("others", ["a", "ca", "abcd", "xa"])
def test_names_by_which_classes_are_found(others):
    assert obstacle("A", "abc", "B", others) == ""
    assert "have to be the same" in difference("A", "abc", "B", others)
    assert difference("A", others, "B", others) == ""


def test_another_spelling_of_all_names_in_their_order():
    """Older versions of MMDetection wrote "traffic_light"; the order tells classes apart."""
    names, others = ["Traffic light", "cat"], ["traffic_light", "cat"]
    assert same(names, others) and obstacle("A", names, "B", others) == ""
    assert "'Traffic light' and 'traffic_light'" in difference("A", names, "B", others)
    assert not same(names, others[::-1]) and not same(names, names[:1])


@pytest.mark.parametrize("names", ["aA", "-_", ["x y", "xy", "z"]])
def test_classes_that_only_their_spelling_tells_apart(names):
    """Such as letters; taken for the same, their predictions would be counted for each other."""
    swapped = [names[1], names[0], *names[2:]]
    assert same(names, list(names)) and obstacle("A", names, "B", list(names)) == ""
    assert not same(names, swapped)
    assert "another order" in obstacle("A", names, "B", swapped)


def test_positions_of_names():
    assert match("abc", "cxa") == [2, None, 0]


# ---- datasets of a run


@pytest.fixture
def dataset(tmp_path):
    """Registers datasets with the categories of the given names; forgets them afterwards."""
    registered = []

    def register(name, categories):
        images = tmp_path / name
        images.mkdir()
        (images / "1.png").touch()
        file = tmp_path / f"{name}.json"
        content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 3 * k + 1, "name": x} for k, x in enumerate(categories)],
        }
        file.write_text(json.dumps(content))
        register_dataset(name, str(file), str(images))
        registered.append(name)

    yield register
    for name in registered:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def recipe_on(folder, train, test):
    return SimpleNamespace(
        hooks=[],
        writers=[],
        has_calibrator=False,
        predicts_keypoints=False,
        output_dir=str(folder / "output"),
        train_names=tuple(train),
        test_sets=[SimpleNamespace(names=(name,), batch_size=None) for name in test],
        num_classes=3,
        num_stuff_classes=None,
        total_batch_size=16,
        compile=False,
        accumulation_steps=1,
        val_metric="",
        patience=0,
        validation_set=None,
    )


@pytest.mark.parametrize(
    "train, test, words",
    [
        (["names_abc"], ["names_acb"], ["another order", "(a, b, c)", "(a, c, b)"]),
        (["names_abc"], ["names_ab", "names_acb"], ["'names_acb'", "another order"]),
        (["names_abc", "names_abd"], ["names_abc"], ["have to be the same", "(..., b, d)"]),
        (["names_abc", "names_acb"], [], ["another order"]),
        (["names_abc"], ["names_xyz"], ["no name in common"]),
        (["names_abc"], ["names_Ab"], ["'a' and 'A'", "has 3", "has 2"]),
    ],
)
def test_datasets_that_do_not_go_together_stop_a_run(train, test, words, dataset, tmp_path):
    for name in dict.fromkeys(train + test):
        dataset(name, name.removeprefix("names_"))
    with pytest.raises(UserError) as error:
        check_recipe(recipe_on(tmp_path, train, test), 1, training=True)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("test", ["names_ab", "names_c", "names_ca", "names_abcd"])
def test_a_test_set_may_have_other_classes(test, dataset, tmp_path):
    for name in ("names_abc", test):
        dataset(name, name.removeprefix("names_"))
    check_recipe(recipe_on(tmp_path, ["names_abc"], [test]), 1, training=True)
    check_recipe(recipe_on(tmp_path, ["not_there"], [test]), 1, training=False)


def test_test_sets_in_different_orders_stop_an_evaluation(dataset, tmp_path):
    dataset("names_abc", "abc")
    dataset("names_acb", "acb")
    with pytest.raises(UserError, match="another order"):
        check_recipe(recipe_on(tmp_path, [], ["names_abc", "names_acb"]), 1, training=False)


def test_weights_that_a_training_starts_from(caplog):
    for found in (None, NAMES):
        check_names_of_weights(found, NAMES, keeps_classes=True)
    check_names_of_weights(["x"], NAMES, keeps_classes=False)  # other class scores start fresh
    with pytest.raises(UserError, match="another order"):
        check_names_of_weights(["b", "a", "c"], NAMES, keeps_classes=False)
    with pytest.raises(UserError, match="the weights has 3"):
        check_names_of_weights(["a", "b", "x"], NAMES, keeps_classes=True)
    assert not caplog.records
    check_names_of_weights(["a", "b", "x"], NAMES, keeps_classes=False)
    assert "(a, b, x)" in caplog.text


# ---- evaluation


BOXES = [[10, 10, 40, 40], [60, 10, 50, 50], [20, 60, 50, 50]]


def one_object_of_each(folder):
    objects = [(k, square(x, y, side)) for k, (x, y, side, _) in enumerate(BOXES)]
    return write_coco_json(folder / "gt.json", [objects], CATEGORY_IDS, IMAGE_SIZE)


def test_classes_are_found_by_name(tmp_path):
    """The same predictions by a model that counts the classes in another way."""
    truth = one_object_of_each(tmp_path)
    classes, scores, ious = [0, 1, 2, 0], [0.9, 0.8, 0.7, 0.6], [0.5, 0.9, 0.8, 0.3]
    boxes = [*BOXES, [5, 5, 30, 30]]
    own = detections(boxes, classes, scores, ious)
    expected = evaluate(truth, [own], output_dir=str(tmp_path / "own"))

    names = ["c", "x", "b", "y", "a"]
    theirs = [{0: 4, 1: 2, 2: 0}[k] for k in classes]
    others = [1, 3, 3]  # no class of the dataset
    model = detections(
        [*boxes, *BOXES], theirs + others, [*scores, 0.95, 0.95, 0.5], [*ious, 1.0, 1.0, 1.0]
    )
    before = model.pred_classes.clone()
    found = evaluate(truth, [model], class_names=names, output_dir=str(tmp_path / "named"))

    assert str(found) == str(expected)  # nan is nan
    assert torch.equal(model.pred_classes, before) and len(model) == 7
    for file in ("coco_instances_results", "coco_bbox_results", "coco_segm_results"):
        texts = [(tmp_path / k / f"{file}.json").read_text() for k in ("own", "named")]
        assert texts[0] == texts[1]
        assert {r["category_id"] for r in json.loads(texts[0])} == set(CATEGORY_IDS)


def test_objects_of_unknown_classes_are_missed(tmp_path, caplog):
    """Perfect predictions of a and b, and none of c: a mean of 100, 100 and 0."""
    truth = one_object_of_each(tmp_path)
    model = detections(BOXES[:2], [1, 0], [0.9, 0.8], [0.9, 0.9])
    with caplog.at_level(logging.INFO, logger="msrcnn_d2"):
        found = evaluate(truth, [model], class_names=["b", "a", "x", "y"])
    for task in ("bbox", "segm", "segm_by_class_score"):
        assert found[task]["AP"] == pytest.approx(200 / 3)
        assert found[task]["AP-c"] == 0
    told = [r.getMessage() for r in caplog.records if "count as missed" in r.getMessage()]
    assert len(told) == 1 and told[0].endswith(": c.")
    assert any(r.getMessage().endswith("left out: x, y.") for r in caplog.records)


def test_the_same_names_change_nothing(tmp_path):
    truth = one_object_of_each(tmp_path)
    model = detections(BOXES, [0, 1, 1], [0.9, 0.8, 0.7], [0.9, 0.9, 0.5])
    named = evaluate(truth, [model], class_names=NAMES)
    assert str(named) == str(evaluate(truth, [model]))  # nan is nan
    with pytest.raises(UserError, match="another order"):
        evaluate(truth, [model], class_names=["b", "a", "c"])


def test_evaluators_are_told_the_names(dataset):
    dataset("names_abc", "abc")
    test_set = TestSet(("names_abc",), lambda: None, lambda: None)
    recipe = SimpleNamespace(num_classes=4)
    DatasetCatalog.get("names_abc")
    ours = MaskScoringCOCOEvaluator("names_abc", distributed=False)
    use_names([ours], test_set, ["b", "x", "c"], recipe)
    assert ours._class_in_dataset.tolist() == [1, -1, 2]
    theirs = COCOEvaluator("names_abc", distributed=False)
    use_names(theirs, test_set, NAMES, recipe)
    with pytest.raises(UserError, match="COCOEvaluator does not"):
        use_names(theirs, test_set, ["b", "x", "c"], recipe)
    # Without names, the numbers have to agree
    with pytest.raises(UserError, match="has 3 categories .* but the model predicts 4"):
        use_names(ours, test_set, None, recipe)


# ---- weights


def test_names_are_saved_and_loaded(tiny, tmp_path):
    MaskScoringCheckpointer(tiny, str(tmp_path), class_names=NAMES).save("model")
    file = tmp_path / "model.pth"
    assert torch.load(file, weights_only=True)["class_names"] == NAMES
    DetectionCheckpointer(tiny).load(str(file))
    checkpointer = MaskScoringCheckpointer(tiny, str(tmp_path))
    checkpointer.load(str(file), strict=True)
    assert checkpointer.loaded_class_names == NAMES
    checkpointer.save("again")
    assert torch.load(tmp_path / "again.pth", weights_only=True)["class_names"] == NAMES


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_programs_keep_the_names(suffix, slim, tmp_path):
    MaskScoringCheckpointer(slim, str(tmp_path), class_names=NAMES).save("in")
    source, copy = tmp_path / "in.pth", tmp_path / f"a{suffix}"
    assert exit_code("convert", source, copy) == 0
    assert read_weights(str(copy)).class_names == NAMES


@pytest.mark.parametrize(
    "meta, expected",
    [
        ({"CLASSES": ("a", "b", "c")}, NAMES),
        ({"dataset_meta": {"classes": ["a", "b", "c"], "palette": [1]}}, NAMES),
        ({"dataset_meta": {"CLASSES": ("a", "b", "c")}}, NAMES),
        ({"CLASSES": ("a", "b")}, None),  # of something else
        ({"CLASSES": (1, 2, 3)}, None),
        ({}, None),
    ],
)
def test_names_in_files_of_mmdetection(meta, expected, slim, tmp_path):
    weights = {"meta": meta, "state_dict": renamed(weights_for(slim), MMDETECTION)}
    assert read_weights(str(saved(weights, tmp_path / "x.pth"))).class_names == expected


# ---- prediction


def predictor_config(model, folder, test=(), **names):
    cfg = tiny_yacs_config()
    cfg.merge_from_list(["MODEL.ROI_MASK_HEAD.NUM_CONV", 4, "MODEL.ROI_MASK_IOU_HEAD.NUM_CONV", 4])
    MaskScoringCheckpointer(model, str(folder), **names).save("model")
    cfg.MODEL.WEIGHTS = os.path.join(folder, "model.pth")
    cfg.DATASETS.TEST = test
    return cfg


@pytest.mark.parametrize("test", [(), ("coco_2017_val",)])
def test_a_predictor_has_the_names_of_the_weights(test, slim, tmp_path):
    cfg = predictor_config(slim, tmp_path, test, class_names=NAMES)
    assert MaskScoringPredictor(cfg).metadata.thing_classes == NAMES
    given = MaskScoringPredictor(cfg, class_names=["x", "y", "z"])
    assert given.metadata.thing_classes == ["x", "y", "z"]
    assert MetadataCatalog.get("coco_2017_val").thing_classes[1] == "bicycle"


def test_three_classes_are_not_those_of_coco(slim, tmp_path):
    cfg = predictor_config(slim, tmp_path, ("coco_2017_val",))
    with pytest.raises(UserError, match="3 classes, but the 80 names"):
        MaskScoringPredictor(cfg)
    with pytest.raises(UserError, match="3 classes, but the 2 names"):
        MaskScoringPredictor(cfg, class_names=["x", "y"])
    assert MaskScoringPredictor(cfg, class_names=NAMES).metadata.thing_classes == NAMES
