"""Panoptic FPN with mask scores: the merge of its instances, its training and its evaluation."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, SemSegEvaluator
from detectron2.modeling import PanopticFPN, build_model
from detectron2.structures import Boxes, Instances

from msrcnn_d2 import (
    MaskScoringPredictor,
    MaskScoringVisualizer,
    add_mask_calibrator,
    add_mask_scoring,
    retrofit,
)
from msrcnn_d2.engine import load_config
from msrcnn_d2.engine.recipe import build_recipe
from msrcnn_d2.evaluation import PanopticQualityEvaluator
from msrcnn_d2.export import export_torchscript
from msrcnn_d2.modeling import (
    MaskScoringPanopticFPN,
    MaskScoringRCNNWithTTA,
    RetrofitPanopticFPN,
)
from msrcnn_d2.utils.errors import UserError
from tests.helpers.command import exit_code
from tests.helpers.toy import IMAGE_SIZE, toy_inputs, write_coco_json, write_images
from tests.helpers.toy_panoptic import (
    NUM_IMAGES,
    tiny_panoptic_fpn,
    tiny_panoptic_yacs,
    write_panoptic_dataset,
)
from tests.helpers.toy_training import lazy_config, run

SMALL = dict(conv_dim=8, num_conv=2, fc_dim=16)


def scoring_model(**arguments):
    cfg = add_mask_scoring(tiny_panoptic_fpn(), **SMALL)
    cfg.model.update(arguments)
    return instantiate(cfg.model).eval()


# ---- the merge


def detected(boxes, scores, mask_ious):
    """Detections that fill their boxes."""
    scores, mask_ious = torch.tensor(scores), torch.tensor(mask_ious)
    return Instances(
        IMAGE_SIZE,
        pred_boxes=Boxes(torch.tensor(boxes)),
        scores=scores,
        pred_classes=torch.arange(len(boxes)),
        pred_masks=torch.ones(len(boxes), 1, 28, 28),
        pred_mask_ious=mask_ious,
        mask_scores=scores * mask_ious,
    )


# Half of A and of B overlap; the class score of C does not reach the threshold, its mask score
# would be the best
OVERLAPPING = detected(
    [[0.0, 0, 40, 40], [20.0, 0, 60, 40], [70.0, 0, 90, 40]], [0.9, 0.8, 0.75], [0.5, 0.9, 1.0]
)
SEA = 2.0 * torch.eye(3)[2].reshape(3, 1, 1).expand(3, *IMAGE_SIZE)


def merged(monkeypatch, rank_by):
    """What becomes of `OVERLAPPING` on the sea: {instance: pixels}, and the infos."""
    monkeypatch.setattr(
        PanopticFPN, "inference", lambda self, inputs, do_postprocess: ([OVERLAPPING], [SEA])
    )
    model = scoring_model(combine_rank_by=rank_by, combine_instances_score_thresh=0.78)
    (output,) = model(toy_inputs()[:1])
    segments, infos = output["panoptic_seg"]
    pixels = {x.get("instance_id", "sea"): (segments == x["id"]).nonzero() for x in infos}
    return pixels, infos


@pytest.mark.parametrize(
    "rank_by, order, columns",
    [
        ("score", [0, 1], {0: (0, 39), 1: (40, 59)}),
        ("mask_score", [1, 0], {1: (20, 59), 0: (0, 19)}),
    ],
)
def test_the_better_of_two_overlapping_instances_gets_the_pixels(
    monkeypatch, rank_by, order, columns
):
    pixels, infos = merged(monkeypatch, rank_by)
    assert [x["instance_id"] for x in infos if x["isthing"]] == order
    assert {k: (p[:, 1].min(), p[:, 1].max()) for k, p in pixels.items() if k != "sea"} == columns
    assert len(pixels["sea"]) == IMAGE_SIZE[0] * IMAGE_SIZE[1] - 60 * 40


def test_segments_tell_all_scores(monkeypatch):
    _, infos = merged(monkeypatch, "mask_score")
    scores = {x["instance_id"]: x for x in infos if x["isthing"]}
    for k, (score, iou) in enumerate([(0.9, 0.5), (0.8, 0.9)]):
        assert scores[k]["score"] == pytest.approx(score)
        assert scores[k]["pred_mask_iou"] == pytest.approx(iou)
        assert scores[k]["mask_score"] == pytest.approx(score * iou)
        assert scores[k]["category_id"] == k


@pytest.mark.parametrize("threshold", [0.2, 1.1])  # the second leaves no instances
def test_by_class_score_it_is_the_panoptic_fpn_of_detectron2(threshold):
    model = scoring_model(combine_rank_by="score", combine_instances_score_thresh=threshold)
    inputs = toy_inputs()
    inputs[0].update(height=48, width=72)
    with torch.no_grad():
        outputs, expected = model(inputs), PanopticFPN.inference(model, inputs)
    for output, other in zip(outputs, expected, strict=True):
        assert torch.equal(output["sem_seg"], other["sem_seg"])
        assert torch.equal(output["instances"].pred_masks, other["instances"].pred_masks)
        (segments, infos), (other_segments, other_infos) = (
            x["panoptic_seg"] for x in (output, other)
        )
        assert torch.equal(segments, other_segments)
        assert any(x["isthing"] for x in infos) == (threshold < 1)
        assert [{k: x[k] for k in y} for x, y in zip(infos, other_infos, strict=True)] == (
            other_infos
        )


def test_an_image_without_detections():
    model = scoring_model()
    model.roi_heads.box_predictor.test_score_thresh = 1.1
    with torch.no_grad():
        outputs = model(toy_inputs())
    for output in outputs:
        assert len(output["instances"]) == 0 and output["instances"].has("mask_scores")
        assert not any(x["isthing"] for x in output["panoptic_seg"][1])


# ---- configs


def test_both_kinds_of_config_choose_the_order():
    cfg = add_mask_scoring(tiny_panoptic_fpn(), **SMALL)
    assert instantiate(cfg.model).combine_rank_by == "mask_score"
    cfg = tiny_panoptic_yacs()
    assert build_model(cfg).combine_rank_by == "mask_score"
    cfg.MODEL.PANOPTIC_FPN.COMBINE.RANK_BY = "score"
    assert build_model(cfg).combine_rank_by == "score"


def test_a_score_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="quality_score"):
        scoring_model(combine_rank_by="quality_score")
    with pytest.raises(ValueError, match="'class'"):
        scoring_model(combine_rank_by="class")
    plain = tiny_panoptic_fpn()
    plain.model._target_ = MaskScoringPanopticFPN
    with pytest.raises(ValueError, match="mask_iou_head"):
        instantiate(plain.model)


def yacs_of_detectron2():
    cfg = tiny_panoptic_yacs()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME = "PanopticFPN", "StandardROIHeads"
    return cfg


def test_a_retrofit_merges_as_before_and_can_do_otherwise():
    cfg = retrofit(tiny_panoptic_fpn(), **SMALL)
    model = instantiate(cfg.model)
    assert type(model) is RetrofitPanopticFPN and model.combine_rank_by == "score"
    cfg.model.combine_rank_by = "mask_score"
    assert instantiate(cfg.model).combine_rank_by == "mask_score"
    assert build_model(retrofit(yacs_of_detectron2())).combine_rank_by == "score"
    # One with mask scores keeps its own order
    cfg = add_mask_scoring(tiny_panoptic_fpn(), **SMALL)
    assert instantiate(retrofit(cfg).model).combine_rank_by == "mask_score"


def test_a_calibrated_model_merges_as_before_and_can_do_otherwise():
    cfg = add_mask_calibrator(tiny_panoptic_fpn())
    assert instantiate(cfg.model).combine_rank_by == "score"
    cfg.model.combine_rank_by = "quality_score"
    with torch.no_grad():
        (output, _) = instantiate(cfg.model).eval()(toy_inputs())
    things = [x for x in output["panoptic_seg"][1] if x["isthing"]]
    scores = [x["quality_score"] for x in things]
    assert scores and scores == sorted(scores, reverse=True)
    assert build_model(add_mask_calibrator(yacs_of_detectron2())).combine_rank_by == "score"


def test_weights_of_a_panoptic_fpn_fit():
    plain = instantiate(tiny_panoptic_fpn().model)
    missing, unexpected = scoring_model().load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("roi_heads.mask_iou_head.") for name in missing)


# ---- panoptic quality


THING, STUFF = 1, 2


@pytest.fixture
def quadrants(tmp_path, leave_no_traces):
    """Two images of 4 x 4 pixels: a thing in the upper half, stuff in the lower."""
    ids = np.repeat([1, 2], 2)[:, None].repeat(4, axis=1)
    for k in (1, 2):
        Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], -1).astype(np.uint8)).save(
            tmp_path / f"{k}.png"
        )
    infos = [
        {"id": 1, "category_id": THING, "area": 8, "iscrowd": 0},
        {"id": 2, "category_id": STUFF, "area": 8, "iscrowd": 0},
    ]
    content = {
        "images": [{"id": k, "file_name": f"{k}.jpg", "height": 4, "width": 4} for k in (1, 2)],
        "annotations": [
            {"image_id": k, "file_name": f"{k}.png", "segments_info": infos} for k in (1, 2)
        ],
        "categories": [
            {"id": THING, "name": "thing", "isthing": 1},
            {"id": STUFF, "name": "stuff", "isthing": 0},
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    DatasetCatalog.register("quadrants", lambda: [])
    MetadataCatalog.get("quadrants").set(
        panoptic_json=str(tmp_path / "truth.json"),
        panoptic_root=str(tmp_path),
        thing_dataset_id_to_contiguous_id={THING: 0},
        stuff_dataset_id_to_contiguous_id={0: 0, STUFF: 1},
    )
    return "quadrants"


def test_panoptic_quality_by_hand(quadrants, tmp_path):
    first = torch.full((4, 4), 2, dtype=torch.int32)
    first[0], first[1, :2] = 1, 1
    thing = {"id": 1, "isthing": True, "category_id": 0, "score": 0.9, "instance_id": 0}
    stuff = {"id": 2, "isthing": False, "category_id": 1, "area": 10}
    second = torch.full((4, 4), 1, dtype=torch.int32)
    found = [(first, [thing, stuff]), (second, [{**stuff, "id": 1}])]
    evaluator = PanopticQualityEvaluator(quadrants, str(tmp_path / "out"))
    evaluator.reset()
    for k, panoptic_seg in enumerate(found, start=1):
        image = {"file_name": f"a/{k}.jpg", "image_id": k}
        evaluator.process([image], [{"panoptic_seg": panoptic_seg}])
    numbers = evaluator.evaluate()["panoptic_seg"]
    # Thing: IoU 6 / 8, and one is missed. Stuff: IoU 8 / 10; in the second image it is 8 / 16,
    # which is no match, so one is missed and one is wrong
    expected = {"SQ_th": 75, "RQ_th": 100 / 1.5, "PQ_th": 50, "SQ_st": 80, "RQ_st": 50, "PQ_st": 40}
    assert {k: numbers[k] for k in expected} == pytest.approx(expected)
    assert numbers["PQ"] == pytest.approx(45)
    assert found[0][1][0] == thing  # others see what the model gave
    written = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [x["category_id"] for x in written["annotations"][0]["segments_info"]] == [THING, STUFF]
    png = np.array(Image.open(tmp_path / "out/predictions/1.png"))
    assert np.array_equal(png[..., 0], first) and not png[..., 1:].any()


def test_ids_beyond_a_byte_are_colours_of_coco(quadrants):
    evaluator = PanopticQualityEvaluator(quadrants)
    evaluator.reset()
    ids = torch.tensor([[0, 255], [256, 65536 + 2 * 256 + 3]], dtype=torch.int32)
    image = {"file_name": "1.jpg", "image_id": 1}
    evaluator.process([image], [{"panoptic_seg": (ids, [])}])
    png = Image.open(io.BytesIO(evaluator._predictions[0]["png_string"]))
    assert np.array(png).tolist() == [[[0, 0, 0], [255, 0, 0]], [[0, 1, 0], [3, 2, 1]]]


def test_nothing_to_evaluate_is_nan(quadrants, tmp_path):
    content = json.loads((tmp_path / "truth.json").read_text())
    content["categories"][1]["isthing"] = 1
    (tmp_path / "truth.json").write_text(json.dumps(content))
    evaluator = PanopticQualityEvaluator(quadrants)
    evaluator.reset()
    nothing = torch.zeros(4, 4, dtype=torch.int32), []
    for k in (1, 2):
        image = {"file_name": f"{k}.jpg", "image_id": k}
        evaluator.process([image], [{"panoptic_seg": nothing}])
    numbers = evaluator.evaluate()["panoptic_seg"]
    assert numbers["PQ"] == 0 and np.isnan(numbers["PQ_st"])


def test_what_is_missing_is_said(quadrants, tmp_path, monkeypatch):
    (tmp_path / "truth.json").unlink()
    with pytest.raises(ValueError, match="truth.json"):
        PanopticQualityEvaluator(quadrants)
    monkeypatch.setitem(sys.modules, "hotcoco.panoptic", None)
    with pytest.raises(UserError, match=r"msrcnn-d2\[panoptic\]"):
        PanopticQualityEvaluator(quadrants)


# ---- the command


@pytest.fixture
def dataset(tmp_path, leave_no_traces):
    return write_panoptic_dataset(tmp_path / "data")


def write_lazy(folder, name):
    cfg = lazy_config(name)
    cfg.model = tiny_panoptic_fpn().model
    cfg.dataloader.train.dataset.filter_empty = False
    cfg.dataloader.evaluator = [
        L(evaluator)(dataset_name=name)
        for evaluator in (COCOEvaluator, SemSegEvaluator, COCOPanopticEvaluator)
    ]
    cfg = add_mask_scoring(cfg, **SMALL)
    cfg.train.update(max_iter=2, output_dir=str(folder / "run"))
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    return folder / "config.yaml"


def write_yacs(folder, name):
    cfg = tiny_panoptic_yacs()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.update(IMS_PER_BATCH=2, MAX_ITER=2, BASE_LR=1e-3, STEPS=())
    cfg.SEED = 1
    cfg.OUTPUT_DIR = str(folder / "run")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder / "config.yaml"


ORDER = {write_lazy: "model.combine_rank_by", write_yacs: "MODEL.PANOPTIC_FPN.COMBINE.RANK_BY"}


@pytest.mark.parametrize("write", [write_lazy, write_yacs])
def test_it_trains_and_evaluates(write, dataset, tmp_path):
    config = write(tmp_path, dataset)
    run("--config-file", config)
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    metrics = {k: v for line in lines for k, v in json.loads(line).items()}
    for name in ("loss_sem_seg", "loss_mask_iou"):
        assert metrics[name] > 0
    for name in ("bbox/AP", "segm/AP", "segm_by_class_score/AP", "sem_seg/mIoU", "panoptic_seg/PQ"):
        assert 0 <= metrics[name] <= 100, name
    written = {x.name for x in (tmp_path / "run/inference").iterdir()}
    assert written >= {
        "coco_segm_results.json",
        "sem_seg_predictions.json",
        "predictions.json",
        "predictions",
    }
    pngs = {x.name for x in (tmp_path / "run/inference/predictions").iterdir()}
    assert pngs == {f"{k}.png" for k in range(1, NUM_IMAGES + 1)}

    run("--eval-only", "--config-file", config, "--resume", f"{ORDER[write]}=score")
    report = json.loads((tmp_path / "run/report/report.json").read_text())
    results = report["other_results"]
    assert results["sem_seg"]["mIoU"] == pytest.approx(metrics["sem_seg/mIoU"])
    assert results["panoptic_seg"]["PQ_st"] is not None
    assert "panoptic quality: PQ" in (tmp_path / "run/report/report.html").read_text()


def test_an_interrupted_training_goes_on(dataset, tmp_path):
    options = "dataloader.evaluator=null", "lr_multiplier.warmup_length=0"
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
        write_lazy(tmp_path / part, dataset)
    run("--config-file", tmp_path / "whole/config.yaml", *options)
    config = tmp_path / "parts/config.yaml"
    run("--config-file", config, *options, "train.max_iter=1")
    run("--config-file", config, *options, "--resume")
    weights = [
        torch.load(tmp_path / part / "run/model_final.pth", weights_only=False)["model"]
        for part in ("whole", "parts")
    ]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def refused(capsys, *args):
    assert exit_code("train", *args) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_mistakes_are_said_before_the_training(dataset, tmp_path, capsys):
    config = write_lazy(tmp_path, dataset)
    said = refused(capsys, "--config-file", config, "model.sem_seg_head.num_classes=54")
    assert "model.sem_seg_head.num_classes=3" in said
    said = refused(capsys, "--config-file", config, "model.combine_rank_by=iou")
    assert "model.combine_rank_by" in said and "mask_score" in said
    write_images(tmp_path)
    objects = ["--dataset", "objects", write_coco_json(tmp_path / "objects.json"), str(tmp_path)]
    said = refused(
        capsys, "--config-file", config, *objects, "dataloader.train.dataset.names=objects"
    )
    assert "register_coco_panoptic_separated" in said
    (tmp_path / "data/stuff").rename(tmp_path / "elsewhere")
    assert "data/stuff" in refused(capsys, "--config-file", config)


def test_detectron2s_own_evaluator_needs_a_package(dataset, tmp_path):
    pytest.importorskip("hotcoco")
    config = write_lazy(tmp_path, dataset)
    cfg = LazyConfig.load(str(config))
    cfg.dataloader.evaluator[2]._target_ = COCOPanopticEvaluator
    (test_set,) = build_recipe(cfg).test_sets
    if "panopticapi" not in sys.modules:
        with pytest.raises(UserError, match="panopticapi"):
            test_set.build_evaluator()


def test_predictions_and_pictures(tmp_path):
    cfg = add_mask_scoring(tiny_panoptic_fpn(), **SMALL)
    torch.save({"model": scoring_model().state_dict()}, tmp_path / "model.pth")
    cfg.train = {"init_checkpoint": str(tmp_path / "model.pth"), "device": "cpu"}
    image = np.random.default_rng(0).integers(0, 256, (*IMAGE_SIZE, 3), dtype=np.uint8)
    predict = MaskScoringPredictor(cfg, class_names=list("abc"))
    scores = [x["mask_score"] for x in predict(image)["panoptic_seg"][1] if x["isthing"]]
    assert scores[-1] < scores[0]
    for threshold in (0.0, scores[0]):
        predict = MaskScoringPredictor(cfg, score_threshold=threshold, class_names=list("abc"))
        output = predict(image)
        instances, (segments, infos) = output["instances"], output["panoptic_seg"]
        things = [x for x in infos if x["isthing"]]
        assert len(things) == len(scores)
        for x in things:
            assert (x["instance_id"] is None) == (x["mask_score"] < threshold)
        for x in (x for x in things if x["mask_score"] >= threshold):
            assert instances.mask_scores[x["instance_id"]].item() == x["mask_score"]
            own = segments == x["id"]
            assert torch.equal(own & instances.pred_masks[x["instance_id"]], own)
        assert output["sem_seg"].shape == (3, *IMAGE_SIZE)
    metadata = Metadata(thing_classes=list("abc"), stuff_classes=["things", "sky", "sea"])
    picture = MaskScoringVisualizer(image, metadata, scale=1).draw_panoptic_seg(segments, infos)
    assert picture.get_image().shape == image.shape
    assert not np.array_equal(picture.get_image(), image)
    with pytest.raises(UserError, match="MaskScoringPanopticFPN"):
        export_torchscript(predict, tmp_path / "model.ts")


def test_test_time_augmentation_is_refused(dataset, tmp_path):
    cfg = load_config(str(write_yacs(tmp_path, dataset)), ["TEST.AUG.ENABLED", "True"])
    with pytest.raises(UserError, match="TEST.AUG.ENABLED"):
        build_recipe(cfg)
    with pytest.raises(UserError, match="Panoptic FPN"):
        MaskScoringRCNNWithTTA(None, scoring_model())
