"""Keypoints beside masks, on one's own data: five of them, with names, a skeleton and sigmas."""

import contextlib
import copy
import io
import json
import logging
import uuid

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import print_csv_format
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from msrcnn_d2 import MaskScoringPredictor, MaskScoringVisualizer, retrofit
from msrcnn_d2.engine.configs import load_config, register_dataset
from msrcnn_d2.engine.evaluate import summary_table
from msrcnn_d2.engine.keypoints import check_keypoints, complete_keypoints, flip_map_of
from msrcnn_d2.engine.preflight import check_recipe
from msrcnn_d2.engine.recipe import build_recipe
from msrcnn_d2.evaluation import MaskScoringCOCOEvaluator
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_runtime.outputs.records import line_of, predictions_of, record_of
from msrcnn_d2_runtime.predictions import PredictedImage
from tests.helpers.toy import CHANNELS, tiny_yacs_config, toy_inputs
from tests.helpers.toy_training import lazy_config, run, write_dataset

NAMES = ["nose", "left_eye", "right_eye", "tail", "left_ear"]
FLIP_MAP = [("left_eye", "right_eye"), ("tail", "left_ear")]
SKELETON = [[1, 2], [1, 3], [1, 4]]
SIGMAS = [0.03, 0.05, 0.05, 0.1, 0.08]

pytestmark = pytest.mark.usefixtures("leave_no_traces")


# ---- names


@pytest.mark.parametrize(
    "names, pairs",
    [
        (["nose", "tail"], []),
        (["nose", "left_eye", "right_eye"], [("left_eye", "right_eye")]),
        (["Right hip", "Left hip"], [("Right hip", "Left hip")]),
        (["lefteye", "righteye"], [("lefteye", "righteye")]),
        (["eyeLeft", "eyeRight"], [("eyeLeft", "eyeRight")]),
        (["l_eye", "r_eye", "paw-R", "paw-L"], [("l_eye", "r_eye"), ("paw-R", "paw-L")]),
        (["LEye", "REye", "wingL", "wingR"], [("LEye", "REye"), ("wingL", "wingR")]),
        (["left front paw", "right front paw"], [("left front paw", "right front paw")]),
        # Not sides
        (["l", "r"], []),
        (["bright", "cleft", "roof", "LED", "l_eye"], []),
    ],
)
def test_names_that_differ_in_the_side_change_places(names, pairs):
    assert flip_map_of(names) == pairs


@pytest.mark.parametrize("names", [["left_eye", "nose"], ["rightEye"], ["eye Left", "eye Rigth"]])
def test_a_side_without_the_other_is_not_clear(names):
    with pytest.raises(ValueError, match="has no counterpart '(right|left|eye )"):
        flip_map_of(names)


# ---- datasets


def keypoints_of(box, number=5):
    """Points on the diagonal of a box (x, y, width, height); the last one is not labelled."""
    x, y, width, height = box
    points = [[x + width * k / number, y + height * k / number, 2] for k in range(number - 1)]
    return [float(v) for point in [*points, [0, 0, 0]] for v in point]


def with_keypoints(path, number=5, skip=(3,), **category):
    """Give all objects of a file keypoints but those with the ids in `skip`."""
    contents = json.loads(path.read_text())
    for annotation in contents["annotations"]:
        if annotation["id"] not in skip:
            annotation["keypoints"] = keypoints_of(annotation["bbox"], number)
    contents["categories"][0].update(category)
    path.write_text(json.dumps(contents))


@pytest.fixture
def dataset(tmp_path):
    """Writes and registers a dataset with keypoints; returns its name."""

    def write(**kwargs):
        name = f"keypoints_{uuid.uuid4().hex}"
        (tmp_path / name).mkdir()
        _, _, path, images = write_dataset(tmp_path / name, name)
        with_keypoints(tmp_path / name / "annotations.json", **kwargs)
        register_dataset(name, path, images)
        return name

    return write


def test_names_and_skeleton_come_from_the_file(dataset, caplog):
    name = dataset(keypoints=NAMES[:3] + ["tail", "ear"], skeleton=SKELETON)
    with caplog.at_level(logging.INFO, logger="msrcnn_d2"):
        check_keypoints([name], [name], 5)
    metadata = MetadataCatalog.get(name)
    assert metadata.keypoint_names == [*NAMES[:3], "tail", "ear"]
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]
    connected = [(a, b) for a, b, _ in metadata.keypoint_connection_rules]
    assert connected == [("nose", "left_eye"), ("nose", "right_eye"), ("nose", "tail")]
    assert any("left_eye and right_eye" in message for message in caplog.messages)
    check_keypoints([name], [name], 5)  # again, with what is there


def test_the_config_says_what_the_file_does_not(dataset):
    name = dataset()
    check_keypoints([name], [name], 5, NAMES, FLIP_MAP)
    metadata = MetadataCatalog.get(name)
    assert (metadata.keypoint_names, metadata.keypoint_flip_map) == (NAMES, FLIP_MAP)
    # An empty flip map is one, too
    name = dataset(keypoints=NAMES)
    check_keypoints([name], [name], 5, flip_map=[])
    assert MetadataCatalog.get(name).keypoint_flip_map == []


def test_what_a_program_has_set_stays(dataset):
    name = dataset()
    rules = [("nose", "tail", (1, 2, 3))]
    MetadataCatalog.get(name).set(
        keypoint_names=NAMES, keypoint_flip_map=FLIP_MAP, keypoint_connection_rules=rules
    )
    check_keypoints([name], [name], 5)
    assert MetadataCatalog.get(name).keypoint_connection_rules == rules
    with pytest.raises(UserError, match="different keypoint_names"):
        check_keypoints([name], [name], 5, NAMES[::-1])


@pytest.mark.parametrize(
    "kwargs, arguments, message",
    [
        ({}, {}, r"no names.*dataloader.keypoints.names"),
        ({"keypoints": NAMES[:3]}, {}, "names of 3 keypoints"),
        ({"number": 7, "keypoints": NAMES}, {}, r"7 keypoints.*num_keypoints=7 .*KEYPOINTS 7"),
        ({"keypoints": NAMES}, {}, r"'left_ear' has no counterpart 'right_ear'.*flip_map"),
        ({"keypoints": ["a", "a", "b", "c", "d"]}, {}, "same name"),
        ({}, {"names": NAMES, "flip_map": [["nose", "chin"]]}, "'chin'"),
        ({"skip": range(100)}, {"names": NAMES, "flip_map": []}, "no object"),
    ],
)
def test_keypoints_that_do_not_fit_are_one_sentence(kwargs, arguments, message, dataset):
    name = dataset(**kwargs)
    with pytest.raises(UserError, match=message):
        check_keypoints([name], [name], 5, **arguments)


def test_objects_with_different_numbers_of_keypoints_are_refused(dataset):
    name = dataset(keypoints=NAMES)
    for number, message in [
        (3, r"have 5 \(annotation 1\) and 3 \(annotation 2\) keypoints"),
        (14 / 3, r"and 4.66667 \(annotation 2\)"),
    ]:
        path = MetadataCatalog.get(name).json_file
        contents = json.loads(open(path).read())
        contents["annotations"][1]["keypoints"] = [1] * round(3 * number)
        open(path, "w").write(json.dumps(contents))
        for num_keypoints in (5, None):
            with pytest.raises(UserError, match=message):
                check_keypoints([name], [name], num_keypoints, flip_map=[])


def test_a_test_set_needs_neither_names_nor_keypoints(dataset):
    check_keypoints([dataset(skip=range(100))], [], 5)
    with pytest.raises(UserError, match="5 keypoints, but the model predicts 17"):
        check_keypoints([dataset()], [], 17)


def test_training_sets_have_the_same_keypoints(dataset):
    one, other = dataset(keypoints=list("abcde")), dataset(keypoints=list("abcdf"))
    with pytest.raises(UserError, match="different names of keypoints"):
        check_keypoints([one, other], [one, other], 5)
    check_keypoints([one, other], [one], 5)


def test_objects_without_keypoints_get_unlabelled_ones(dataset):
    name = dataset(keypoints=NAMES)
    check_keypoints([name], [name], 5, flip_map=FLIP_MAP)
    dicts = DatasetCatalog.get(name)
    mapper = DatasetMapper(True, augmentations=[], image_format="BGR", use_keypoint=True)
    before = copy.deepcopy(dicts)
    complete_keypoints(mapper, dicts, [name])
    for old, new in zip(before, dicts):
        for a, b in zip(old["annotations"], new["annotations"]):
            assert b["keypoints"] == a.get("keypoints", [0] * 15)
    # nose, left_eye, right_eye, tail, left_ear when an image is flipped
    assert mapper.keypoint_hflip_indices == [0, 2, 1, 4, 3]
    (points,) = {mapper(d)["instances"].gt_keypoints.tensor.shape[1:] for d in dicts}
    assert points == (5, 3)


# ---- training, evaluation and prediction


def with_keypoint_head(cfg, number=5):
    """The LazyConfig of a tiny model, with Detectron2's keypoint heads beside the others."""
    heads = detectron2_zoo.get_config("common/models/keypoint_rcnn_fpn.py").model.roi_heads
    for key in ("keypoint_in_features", "keypoint_pooler", "keypoint_head"):
        cfg.model.roi_heads[key] = heads[key]
    head = cfg.model.roi_heads.keypoint_head
    head.input_shape = ShapeSpec(channels=CHANNELS, width=14, height=14)
    head.conv_dims, head.num_keypoints = [CHANNELS], number
    return cfg


def yacs_with_keypoint_head(number=5):
    cfg = tiny_yacs_config()
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = number
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (CHANNELS,)
    return cfg


def config_file(kind, folder, number=5):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    if kind == "lazy":
        LazyConfig.save(with_keypoint_head(lazy_config(), number), str(path))
        return path
    cfg = yacs_with_keypoint_head(number)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("toy",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SEED = 2, 4, 1e-3, 1
    path.write_text(cfg.dump())
    return path


OVERRIDES = {
    "lazy": [
        f"dataloader.evaluator.kpt_oks_sigmas={SIGMAS}",
        "dataloader.keypoints.flip_map=[[left_eye,right_eye]]",
        "train.max_iter=4",
        "train.validation_loss.enabled=True",
    ],
    "yacs": [
        f"TEST.KEYPOINT_OKS_SIGMAS={SIGMAS}",
        "INPUT.KEYPOINT_FLIP_MAP=[['left_eye','right_eye']]",
        "TEST.VALIDATION_LOSS.ENABLED=True",
    ],
}


@pytest.mark.parametrize("kind", ["lazy", "yacs"])
def test_models_with_keypoints_are_trained_evaluated_and_retrofitted(kind, tmp_path, capsys):
    path = config_file(kind, tmp_path)
    (tmp_path / "images").mkdir()
    options = write_dataset(tmp_path / "images")
    with_keypoints(tmp_path / "images/annotations.json", keypoints=NAMES, skeleton=SKELETON)
    output = {"lazy": "train.output_dir", "yacs": "OUTPUT_DIR"}[kind]
    arguments = ["--config-file", path, *options, *OVERRIDES[kind]]

    run(*arguments, f"{output}={tmp_path / 'out'}")

    metrics = [json.loads(x) for x in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert any("loss_keypoint" in x and "loss_mask_iou" in x for x in metrics)
    assert "validation/loss_keypoint" in metrics[-1]
    assert "keypoints/AP" in metrics[-1] and "segm_by_class_score/AP" in metrics[-1]
    assert (tmp_path / "out/inference/coco_instances_results.json").exists()
    weights = f"--weights={tmp_path / 'out/model_final.pth'}"

    run(*arguments, "--eval-only", weights, f"{output}={tmp_path / 'eval'}")
    assert (tmp_path / "eval/report/report.html").exists()
    table = (tmp_path / "eval/log.txt").read_text()
    assert "| keypoints " in table

    run(*arguments, "--retrofit", weights, f"{output}={tmp_path / 'retrofit'}")
    trained, retrofitted = (
        torch.load(tmp_path / x / "model_final.pth")["model"] for x in ("out", "retrofit")
    )
    kept = [k for k in trained if "mask_iou_head" not in k]
    assert any("keypoint_head" in k for k in kept)
    assert all(torch.equal(trained[k], retrofitted[k]) for k in kept)


@pytest.mark.parametrize("kind", ["lazy", "yacs"])
def test_a_wrong_number_of_keypoints_is_told_before_training(kind, tmp_path):
    path = config_file(kind, tmp_path, number=17)
    (tmp_path / "images").mkdir()
    _, name, annotations, images = write_dataset(tmp_path / "images")
    with_keypoints(tmp_path / "images/annotations.json", keypoints=NAMES)
    register_dataset(name, annotations, images)
    key = {"lazy": "train.output_dir", "yacs": "OUTPUT_DIR"}[kind]
    cfg = load_config(str(path), [*OVERRIDES[kind], f"{key}={tmp_path}"])
    with pytest.raises(UserError, match="num_keypoints=5 .yaml: MODEL.ROI_KEYPOINT_HEAD.NUM_KEYP"):
        check_recipe(build_recipe(cfg), 1, training=True)


def test_keypoints_and_test_time_augmentation_exclude_each_other(tmp_path):
    path = config_file("yacs", tmp_path)
    with pytest.raises(UserError, match="TEST.AUG.ENABLED=False"):
        build_recipe(load_config(str(path), ["TEST.AUG.ENABLED=True"]))


def test_predictions_pictures_and_files_have_keypoints(tmp_path):
    cfg = yacs_with_keypoint_head()
    MetadataCatalog.get("toy_points").set(
        thing_classes=list("abc"),
        keypoint_names=NAMES,
        keypoint_connection_rules=[("nose", "tail", (255, 0, 0))],
    )
    cfg.DATASETS.TEST = ("toy_points",)
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    predictor = MaskScoringPredictor(cfg)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)

    instances = predictor(image)["instances"]

    assert len(instances) and instances.pred_keypoints.shape == (len(instances), 5, 3)
    (predictions,) = predictor.predictions([image])
    expected = instances.pred_keypoints.numpy()
    assert np.array_equal(predictions.pred_keypoints, expected)
    assert np.array_equal(predictions[1:].pred_keypoints, expected[1:])
    moved = predictions.moved(top=10, left=100, image_size=(300, 400))
    assert np.allclose(moved.pred_keypoints, expected + [100, 10, 0])
    record = record_of(PredictedImage("1.png", "1.png", image, predictions), "abc", (1, 2, 3))
    own = instances_to_coco_json(copy.deepcopy(instances), 1)  # it shifts them in place
    assert len(own) == len(record["predictions"])
    for entry, result in zip(record["predictions"], own):
        assert entry["keypoints"] == pytest.approx(result["keypoints"], abs=6e-4)
    again = predictions_of(json.loads(line_of(record)), (1, 2, 3))
    assert np.allclose(again.pred_keypoints, expected, atol=6e-4)
    first = instances[:1]
    first.pred_keypoints[..., 2] = 1.0  # visible
    vis = MaskScoringVisualizer(image, predictor.metadata)
    vis.draw_instance_predictions(first)
    assert len(vis.output.ax.patches) == 5 and len(vis.output.ax.lines) == 1


@pytest.mark.parametrize("kind", ["lazy", "yacs"])
def test_a_retrofit_predicts_the_keypoints_of_the_model(kind):
    if kind == "lazy":
        cfg = with_keypoint_head(lazy_config())
        plain, other = instantiate(cfg.model), instantiate(retrofit(cfg).model)
    else:
        cfg = yacs_with_keypoint_head()
        plain, other = build_model(cfg), build_model(retrofit(cfg))
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        found, kept = (
            m.eval()([{k: v for k, v in x.items() if k != "instances"} for x in INPUTS])
            for m in (plain, other)
        )
    for a, b in zip(found, kept):
        assert len(a["instances"])
        assert torch.equal(a["instances"].pred_keypoints, b["instances"].pred_keypoints)


INPUTS = toy_inputs()


# ---- AP of keypoints


def write_truth(path, objects):
    """One image of 200 x 200 pixels; each object is (box, keypoints or None)."""
    annotations = []
    for k, ((x, y, w, h), keypoints) in enumerate(objects, start=1):
        annotations.append({"id": k, "image_id": 1, "category_id": 1, "bbox": [x, y, w, h]})
        annotations[-1] |= {"area": w * h, "segmentation": [[x, y, x + w, y, x + w, y + h]]}
        if keypoints is not None:
            annotations[-1]["keypoints"] = [float(v) for v in np.ravel(keypoints)]
    images = [{"id": 1, "width": 200, "height": 200, "file_name": "1.png"}]
    categories = [{"id": 1, "name": "a", "keypoints": NAMES}]
    contents = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(contents))


def evaluate(path, boxes, keypoints, scores, **kwargs):
    """Results for predictions in the image; keypoints are in COCO's coordinates."""
    name = uuid.uuid4().hex
    MetadataCatalog.get(name).set(
        json_file=str(path), thing_classes=["a"], thing_dataset_id_to_contiguous_id={1: 0}
    )
    boxes = torch.tensor(boxes, dtype=torch.float32)
    points = torch.tensor(np.array(keypoints), dtype=torch.float32)
    points[..., :2] += 0.5  # Detectron2 has coordinates, COCO indices of pixels
    instances = Instances(
        (200, 200),
        pred_boxes=Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)),
        scores=torch.tensor(scores),
        pred_classes=torch.zeros(len(boxes), dtype=torch.int64),
        pred_keypoints=points,
    )
    evaluator = MaskScoringCOCOEvaluator(name, distributed=False, **kwargs)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    return evaluator.evaluate()


def test_keypoint_ap_worked_out_by_hand(tmp_path):
    # One object of 40 x 40 = 1600 pixels. All sigmas are 0.1, so that a keypoint at distance d has
    # a similarity of exp(-d^2 / (2 * 1600 * (2 * 0.1)^2)) = exp(-d^2 / 128). Of four labelled
    # keypoints two are found exactly, two at a distance of 8: exp(-0.5) = 0.607. The mean, OKS, is
    # 0.803, which counts at 0.50, ..., 0.80
    truth = np.array([[20, 20, 2], [30, 20, 2], [40, 20, 1], [50, 20, 2], [0, 0, 0]], dtype=float)
    write_truth(tmp_path / "gt.json", [([20, 20, 40, 40], truth)])
    found = truth + [[0, 0, 0], [0, 0, 0], [0, 8, 0], [0, -8, 0], [99, 99, 0]]

    results = evaluate(
        *(tmp_path / "gt.json", [[20, 20, 40, 40]], [found], [0.9]), kpt_oks_sigmas=[0.1] * 5
    )

    assert [results["keypoints"][k] for k in ("AP", "AP50", "AP75")] == pytest.approx(
        [70, 100, 100]
    )
    assert summary_table(results).splitlines()[-1].split()[1:4] == ["keypoints", "|", "70.00"]
    print_csv_format(results)


def test_keypoint_ap_is_that_of_coco(tmp_path):
    """Run by itself on complete annotations: ours leave out "num_keypoints", one object all."""
    rng = np.random.default_rng(0)
    objects, boxes, found = [], [], []
    for k in range(8):
        x, y, w, h = box = [float(v) for v in rng.integers(20, 100, 4)]
        points = np.stack(
            [x + w * rng.random(5), y + h * rng.random(5), rng.integers(0, 3, 5)], axis=1
        ).round()
        points[points[:, 2] == 0] = 0
        objects.append((box, None if k == 1 else points))
        for size in (1.0, 6.0):
            boxes.append(box)
            found.append(points + np.append(rng.normal(0, size, (5, 2)), np.ones((5, 1)), axis=1))
    scores = np.float32(rng.random(len(found))).tolist()
    write_truth(tmp_path / "gt.json", objects)

    results = evaluate(tmp_path / "gt.json", boxes, found, scores, kpt_oks_sigmas=SIGMAS)

    contents = json.loads((tmp_path / "gt.json").read_text())
    for annotation in contents["annotations"]:
        annotation.setdefault("keypoints", [0] * 15)
        annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
        annotation["iscrowd"] = 0
    (tmp_path / "complete.json").write_text(json.dumps(contents))
    entries = [
        {"image_id": 1, "category_id": 1, "score": s, "keypoints": np.ravel(p).tolist(), "bbox": b}
        for s, p, b in zip(scores, found, boxes)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "complete.json"))
        official = COCOeval(truth, truth.loadRes(entries), "keypoints")
        official.params.kpt_oks_sigmas = np.array(SIGMAS)
        official.evaluate()
        official.accumulate()
        official.summarize()
    names = ["AP", "AP50", "AP75", "APm", "APl"]
    expected = {k: 100 * v if v >= 0 else np.nan for k, v in zip(names, official.stats)}
    assert {k: results["keypoints"][k] for k in names} == pytest.approx(
        expected, abs=1e-9, nan_ok=True
    )
    assert 10 < expected["AP"] < 90


def test_data_without_keypoints_are_evaluated_without_them(tmp_path):
    write_truth(tmp_path / "gt.json", [([20, 20, 40, 40], None)])
    results = evaluate(tmp_path / "gt.json", [[20, 20, 40, 40]], [np.ones((5, 3))], [0.9])
    assert list(results) == ["bbox"]
