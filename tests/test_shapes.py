"""projects/shapes: the drawn dataset, the config, and what the demo computes from detections."""

import contextlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.events import EventStorage

import demo
import draw
import draw_panoptic
import pictures
from msrcnn_d2.evaluation import measure_mask_quality

SHAPES = Path(__file__).resolve().parents[1] / "projects" / "shapes"
NUM_TRAIN, NUM_VAL = 12, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    draw.draw_dataset(folder, NUM_TRAIN, NUM_VAL, seed=0)
    return folder


@pytest.fixture
def registered(data):
    """The two datasets under the names that the config has."""
    for split in ("train", "val"):
        register_coco_instances(
            f"shapes_{split}", {}, str(data / f"{split}.json"), str(data / split)
        )
    yield
    for split in ("train", "val"):
        DatasetCatalog.remove(f"shapes_{split}")
        MetadataCatalog.remove(f"shapes_{split}")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def load_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def test_same_seed_same_bytes(data, tmp_path):
    draw.draw_dataset(tmp_path, NUM_TRAIN, NUM_VAL, seed=0, num_workers=2)
    assert contents(tmp_path) == contents(data)


def test_other_seed_other_bytes(data, tmp_path):
    draw.draw_dataset(tmp_path, NUM_TRAIN, NUM_VAL, seed=1)
    first, second = contents(data), contents(tmp_path)
    assert first.keys() == second.keys()
    assert not [name for name in first if first[name] == second[name]]


def test_number_of_images_changes_no_image(data, tmp_path):
    draw.draw_dataset(tmp_path, 2, 2, seed=0)
    fewer, more = contents(tmp_path), contents(data)
    pngs = [name for name in fewer if name.endswith(".png")]
    assert len(pngs) == 4
    assert all(fewer[name] == more[name] for name in pngs)


def test_global_random_state_is_left_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    draw.draw_scene(np.random.default_rng(0))
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("split, num_images", [("train", NUM_TRAIN), ("val", NUM_VAL)])
def test_annotations_are_valid_coco(data, split, num_images):
    coco = load_coco(data / f"{split}.json")
    assert len(coco.imgs) == num_images
    assert [c["name"] for c in coco.dataset["categories"]] == list(draw.CLASSES)
    assert len({a["id"] for a in coco.dataset["annotations"]}) == len(coco.anns)
    for image in coco.imgs.values():
        with Image.open(data / split / image["file_name"]) as png:
            assert (png.size, png.mode) == ((image["width"], image["height"]), "RGB")
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        assert annotation["area"] == mask.sum() >= draw.MIN_AREA
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)


def test_visible_masks_do_not_overlap(data):
    coco = load_coco(data / "train.json")
    for annotations in coco.imgToAnns.values():
        assert sum(coco.annToMask(a) for a in annotations).max() == 1


def test_objects_of_all_classes_some_of_them_hidden_in_part(data):
    annotations = load_coco(data / "train.json").dataset["annotations"]
    assert {a["category_id"] for a in annotations} == set(range(1, len(draw.CLASSES) + 1))
    shares = [a["visible_share"] for a in annotations]
    assert draw.MIN_VISIBLE <= min(shares) < 0.9
    assert max(shares) == 1


def test_complete_data_is_kept(tmp_path):
    assert draw.draw_dataset(tmp_path, 2, 1)
    assert not draw.draw_dataset(tmp_path, 2, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "complete.json").unlink(),
        lambda folder: (folder / "train" / "000001.png").unlink(),
        lambda folder: (folder / "val.json").unlink(),
    ],
    ids=["interrupted", "no image", "no annotations"],
)
def test_incomplete_data_is_drawn_again(tmp_path, damage):
    draw.draw_dataset(tmp_path, 2, 1)
    whole = contents(tmp_path)
    damage(tmp_path)
    assert draw.draw_dataset(tmp_path, 2, 1)
    assert contents(tmp_path) == whole


def test_data_of_other_parameters_is_drawn_again(tmp_path):
    draw.draw_dataset(tmp_path, 3, 1)
    assert draw.draw_dataset(tmp_path, 2, 1)
    assert len(list((tmp_path / "train").iterdir())) == 2


def test_draw_command(tmp_path):
    arguments = ["--num-train", "2", "--num-val", "1", "--seed", "3"]
    command = [sys.executable, str(SHAPES / "draw.py"), str(tmp_path), *arguments]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads((tmp_path / "complete.json").read_text())["seed"] == 3


def test_one_training_step_and_inference(registered):
    torch.manual_seed(0)
    cfg = LazyConfig.load(str(SHAPES / "ms_rcnn_shapes.py"))
    cfg.dataloader.train.num_workers = 0
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    batch = next(iter(instantiate(cfg.dataloader.train)))
    before = [p.detach().clone() for p in model.parameters()]
    with EventStorage():
        losses = model(batch)
    assert "loss_mask_iou" in losses
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    optimizer.step()
    assert any((p != b).any() for p, b in zip(model.parameters(), before))

    model.eval()
    with torch.no_grad():
        predictions = model(batch[:1])[0]["instances"]
    assert {"scores", "pred_mask_ious", "mask_scores"} <= predictions.get_fields().keys()


def test_mask_scoring_only_adds_to_the_mask_rcnn():
    weights = {}
    for name in ("mask_rcnn_shapes", "ms_rcnn_shapes"):
        torch.manual_seed(0)
        weights[name] = instantiate(LazyConfig.load(f"{SHAPES}/{name}.py").model).state_dict()
    plain, scoring = weights.values()
    assert all(torch.equal(plain[k], scoring[k]) for k in plain)
    added = set(scoring) - set(plain)
    assert added and all(k.startswith("roi_heads.mask_iou_head.") for k in added)


@pytest.fixture
def detections(data):
    """The objects of val, found perfectly, with scores that say otherwise."""
    results = []
    for i, annotation in enumerate(load_coco(data / "val.json").dataset["annotations"]):
        iou = 0.5 + 0.4 * (i % 2)
        kept = {k: annotation[k] for k in ("image_id", "category_id", "bbox", "segmentation")}
        score = (0.6, 0.7, 0.95)[i % 3]
        scored = {"score": score, "pred_mask_iou": iou, "mask_score": score * iou}
        results.append(
            {**kept, **scored, "quality_score": iou / 2, "mask_iou_probs": [iou / 2] * 10}
        )
    return results


def test_perfect_masks_have_perfect_metrics(data, detections, tmp_path):
    (tmp_path / "inference").mkdir()
    results = tmp_path / "inference" / "coco_instances_results.json"
    results.write_text(json.dumps(detections))
    loaded = demo.load_detections(tmp_path)
    quality = measure_mask_quality(load_coco(data / "val.json"), loaded)
    metrics = demo.compute_metrics(quality)
    assert metrics["box_ap"] == pytest.approx(100)
    assert list(metrics["mask_ap"]) == ["class_score", "mask_score", "quality_score", "true_iou"]
    for ap in metrics["mask_ap"].values():
        assert ap == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100, "AP90": 100})
    assert np.isnan(metrics["correlation_with_true_iou"]["mask_score"])  # all are 1
    assert "100.0" in demo.summary(metrics)


@pytest.mark.parametrize("found", ["all", "none"])
@pytest.mark.parametrize("name", ["draw_predictions", "draw_ranking"])
def test_pictures_are_drawn(data, detections, tmp_path, name, found):
    chosen = [{**d, "true_iou": d["pred_mask_iou"]} for d in detections if found == "all"]
    path = tmp_path / "picture.png"
    getattr(pictures, name)(path, load_coco(data / "val.json"), data / "val", chosen)
    assert min(Image.open(path).size) > 300


def test_the_demo_from_start_to_end(tmp_path):
    sizes = ["--num-train", "16", "--num-val", "4", "--max-iter", "3"]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", SHAPES / "demo.py", "--output", tmp_path, *sizes],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "calibrate" not in metrics["seconds"]  # there is nothing to fit to
    assert set(metrics["mask_ap"]) == {"class_score", "mask_score", "true_iou"}
    assert metrics["seed"] == 0 and "torch" in metrics["versions"]
    for name in ("predictions.png", "ranking.png"):
        assert str(tmp_path / name) in ran.stdout and (tmp_path / name).is_file()
    assert "masks by true IoU" in ran.stdout
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["overall"]["ap"]["mask_score"] == metrics["mask_ap"]["mask_score"]["AP"]
    assert str(tmp_path / "report" / "report.html") in ran.stdout


@pytest.mark.parametrize("mask_ap", [{"segm/AP50": math.nan}, {}])
def test_a_model_that_finds_nothing_has_no_ap(mask_ap, tmp_path):
    """In a folder where another run has written before."""
    lines = {"bbox/AP50": 77.2, "segm/AP50": 66.1}, {"bbox/AP50": math.nan, **mask_ap}
    (tmp_path / "metrics.json").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    assert math.isnan(demo.mask_ap50(tmp_path))


def test_a_calibration_that_fails_ends_the_demo(tmp_path, monkeypatch):
    (tmp_path / "training").mkdir()
    evaluated = json.dumps({"bbox/AP50": 77.2, "segm/AP50": 66.1})
    (tmp_path / "training" / "metrics.json").write_text(f'{evaluated}\n{{"lr": 0.1}}\n')
    ran = []

    def run(command, env):
        ran.append(command[-1])
        return SimpleNamespace(returncode=7 if "calibrate" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="7"):
        demo.main()
    assert ran[-1] == str(tmp_path / "calibrated")


def test_drawn_objects_and_stuff_agree(tmp_path):
    draw_panoptic.draw_split(tmp_path, "val", 3, seed=0)
    objects = load_coco(tmp_path / "val.json")
    panoptic = json.loads((tmp_path / "panoptic_val.json").read_text())
    category = {c["id"]: c for c in panoptic["categories"]}
    kinds = list(draw_panoptic.STUFF)
    for image in panoptic["annotations"]:
        ids = np.array(Image.open(tmp_path / "panoptic_val" / image["file_name"])) @ [1, 256, 65536]
        stuff = np.array(Image.open(tmp_path / "stuff_val" / image["file_name"]))
        infos = image["segments_info"]
        assert set(np.unique(ids)) == {x["id"] for x in infos}  # no pixel is left out
        things = [x for x in infos if category[x["category_id"]]["isthing"]]
        annotations = objects.imgToAnns[image["image_id"]]
        assert len(things) == len(annotations) > 0
        for info, annotation in zip(things, annotations):
            assert info["category_id"] == annotation["category_id"]
            assert np.array_equal(ids == info["id"], objects.annToMask(annotation))
            assert not stuff[ids == info["id"]].any()
        for info in infos:
            assert info["area"] == (ids == info["id"]).sum()
            if info not in things:
                kind = kinds.index(category[info["category_id"]]["name"]) + 1
                assert (stuff[ids == info["id"]] == kind).all()


def test_the_panoptic_config_knows_what_is_drawn(leave_no_traces):
    cfg = LazyConfig.load(str(SHAPES / "panoptic_fpn_shapes.py"))
    metadata = MetadataCatalog.get(cfg.dataloader.test.dataset.names)
    assert metadata.thing_classes == list(draw.CLASSES)
    assert metadata.stuff_classes == ["things", *draw_panoptic.STUFF]
    ids = [c["id"] for c in draw_panoptic.CATEGORIES]
    assert [*metadata.thing_dataset_id_to_contiguous_id] == ids[:4]
    assert [*metadata.stuff_dataset_id_to_contiguous_id] == [0, *ids[4:]]
    assert instantiate(cfg.model).sem_seg_head.predictor.out_channels == 4
