"""
Predictions and metrics for other libraries, where these are installed: `make test-integrations`.

Here is what they get. That the examples of docs/integrations.md run at all is for test_docs.py.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.cocoeval import COCOeval

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import draw
import msrcnn_d2
from benchmarks import tiles
from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.integrations import to_sahi, to_supervision
from msrcnn_d2_runtime.predictions import CroppedMasks, Predictions
from tests.helpers.pages import blocks_of

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"
NAMES = ("cat", "dog", "cow")
FIELDS = {
    "scores": [0.9, 0.8, 0.7],
    "pred_mask_ious": [0.5, 0.75, 0.5],
    "mask_scores": [0.45, 0.6, 0.35],
    "mask_iou_probs": np.linspace(0, 1, 30).reshape(3, 10),
    "quality_scores": [0.2, 0.3, 0.1],
}
CLASSES = [2, 0, 2]
BOXES = [[1, 2, 4, 6], [0, 0, 8, 6], [5, 5, 6, 6]]


def bitmaps() -> np.ndarray:
    """Three masks in an image of 8 x 6 pixels: one of two parts, a whole image, and none."""
    masks = np.zeros((3, 6, 8), dtype=bool)
    masks[0, 2:5, 1:3] = masks[0, 5, 7] = True
    masks[1] = True
    return masks


def in_numpy(**fields) -> Predictions:
    scores = {k: np.array(x, dtype=np.float32) for k, x in (fields or FIELDS).items()}
    return Predictions(
        pred_boxes=np.array(BOXES, dtype=np.float32),
        pred_classes=np.array(CLASSES),
        masks=CroppedMasks.of(bitmaps()),
        scores=scores,
        ranking="scores",
    )


def in_detectron2() -> Instances:
    fields = {k: torch.tensor(np.array(x, dtype=np.float32)) for k, x in FIELDS.items()}
    return Instances(
        (6, 8),
        pred_boxes=Boxes(torch.tensor(BOXES)),
        pred_classes=torch.tensor(CLASSES),
        pred_masks=torch.tensor(bitmaps()),
        **fields,
    )


@pytest.fixture(scope="module")
def supervision():
    return pytest.importorskip("supervision")


# ---- supervision


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("make", [in_numpy, in_detectron2])
def test_detections_of_supervision_have_what_was_predicted(supervision, make, compact):
    detections = msrcnn_d2.to_supervision(make(), NAMES, compact_masks=compact)
    assert isinstance(detections.mask, np.ndarray) is not compact
    assert np.array_equal(np.asarray(detections.mask), bitmaps())
    assert detections.area.tolist() == bitmaps().sum(axis=(1, 2)).tolist()
    assert detections.xyxy.tolist() == BOXES and detections.class_id.tolist() == CLASSES
    assert detections.confidence == pytest.approx(FIELDS["scores"])
    assert detections.data.pop("class_name").tolist() == ["cow", "cat", "cow"]
    assert set(detections.data) == set(FIELDS)
    for name, values in FIELDS.items():
        assert detections.data[name] == pytest.approx(np.array(values))


@pytest.mark.parametrize(
    "confidence, field", [("mask_score", "mask_scores"), ("quality_score", "quality_scores")]
)
def test_another_score_as_confidence(supervision, confidence, field):
    detections = to_supervision(in_numpy(), confidence=confidence)
    assert detections.confidence == pytest.approx(FIELDS[field])
    assert "class_name" not in detections.data
    # What supervision selects keeps its scores
    (best,) = detections[detections.confidence == detections.confidence.max()].data["scores"]
    assert best == pytest.approx(0.8)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("make", [in_numpy, in_detectron2])
def test_an_image_without_predictions(supervision, make, compact):
    detections = to_supervision(make()[[]], NAMES, compact_masks=compact)
    assert len(detections) == 0 and detections.mask.shape == (0, 6, 8)
    assert detections.data["mask_iou_probs"].shape == (0, 10)
    both = supervision.Detections.merge([detections, to_supervision(make(), NAMES)])
    assert both.data["class_name"].tolist() == ["cow", "cat", "cow"]


def test_boxes_without_masks(supervision):
    instances = in_detectron2()
    for name in ("pred_masks", "mask_scores", "quality_scores"):
        instances.remove(name)
    assert to_supervision(instances).mask is None
    with pytest.raises(UserError, match="have no mask_scores"):
        to_supervision(instances, confidence="mask_score")


@pytest.mark.parametrize(
    "error, arguments",
    [
        (ValueError, {"confidence": "mask_scores"}),
        (UserError, {"class_names": ["cat", "dog"]}),
    ],
)
def test_what_cannot_be_meant_is_refused(supervision, error, arguments):
    with pytest.raises(error):
        to_supervision(in_numpy(), **arguments)


def test_supervision_draws_and_tracks_them(supervision):
    """Its annotators want a certain type of everything."""
    detections = to_supervision(in_numpy(), NAMES, confidence="mask_score", compact_masks=True)
    picture = np.zeros((6, 8, 3), dtype=np.uint8)
    assert supervision.MaskAnnotator().annotate(picture.copy(), detections).any()
    kept = detections.with_nms(threshold=0.5, class_agnostic=True)
    assert len(kept) <= 3 and "mask_scores" in kept.data


@pytest.mark.parametrize(
    "library, convert",
    [("supervision", to_supervision), ("sahi", to_sahi)],
    ids=["supervision", "sahi"],
)
def test_without_the_library_it_says_what_to_install(monkeypatch, library, convert):
    for name in [x for x in sys.modules if x.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {library}"):
        convert(in_numpy())


# ---- sahi


class BluePixels:
    """A predictor that finds the blue pixels of an image, as one mask."""

    class_names = NAMES

    def predictions(self, images):
        masks = [(image == (255, 0, 0)).all(axis=2) for image in images]  # BGR
        return [self._prediction(mask) for mask in masks]

    def _prediction(self, mask):
        scores = {"scores": np.array([0.5]), "mask_scores": np.array([0.25])}
        found = Predictions(
            pred_boxes=np.zeros((1, 4)),
            pred_classes=np.array([1]),
            masks=CroppedMasks.of(mask[None]),
            scores=scores,
            ranking="mask_scores",
        )
        return found


def slices_of(image: np.ndarray, confidence_threshold: float = 0.1, **options):
    """What sahi finds in slices of 50 x 75 pixels, with the predictor of blue pixels."""
    predict = pytest.importorskip("sahi.predict")
    model = msrcnn_d2.to_sahi(BluePixels(), confidence_threshold)
    options = {"slice_height": 50, "slice_width": 75, "overlap_height_ratio": 0} | options
    result = predict.get_sliced_prediction(image, model, verbose=0, **options)
    return result.object_prediction_list


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}], ids=["one by one", "in batches"])
def test_sahi_merges_what_our_predictor_finds_in_slices(options):
    pytest.importorskip("sahi", minversion="0.12" if options else None)  # 0.11 has no batches
    image = np.full((100, 150, 3), 200, dtype=np.uint8)  # RGB
    image[10:30, 5:25] = image[60:90, 100:140] = (0, 0, 255)
    found = slices_of(image, **options)
    assert {x.category.name for x in found} == {"dog"}
    assert {x.score.value for x in found} == {0.25}
    together = np.any([x.mask.bool_mask for x in found], axis=0)
    blue = (image == (0, 0, 255)).all(axis=2)
    # sahi's polygons lose some of the outline
    assert (together & ~blue).sum() <= 0.01 * blue.sum()
    assert (together & blue).sum() > 0.9 * blue.sum()


def test_masks_in_sahi_have_their_holes_and_places():
    image = np.full((100, 150, 3), 200, dtype=np.uint8)
    image[60:90, 100:140] = (0, 0, 255)
    image[70:80, 105:130] = 200
    image[95, 3:9] = (0, 0, 255)  # a line
    (found,) = slices_of(image, perform_standard_pred=False, overlap_width_ratio=0)
    blue = (image == (0, 0, 255)).all(axis=2)
    blue[95] = False
    assert np.array_equal(found.mask.bool_mask, blue)


def test_sahi_leaves_out_scores_below_its_threshold():
    image = np.full((50, 75, 3), (0, 0, 255), dtype=np.uint8)
    assert len(slices_of(image, 0.25)) == 1
    assert not slices_of(image, 0.26)


def test_the_benchmark_compares_tiles_with_all_variants_of_sahi(monkeypatch):
    pytest.importorskip("sahi")
    monkeypatch.setattr(tiles, "SIZE", 160)
    monkeypatch.setattr(tiles, "SETTINGS", [(128, 0.2, 1)])
    (part,) = tiles.run(None)
    assert len(part.rows) == len(tiles.CONFIDENCES) * (1 + len(tiles.VARIANTS))
    assert all(row[2] >= 0 for row in part.rows)
    # Ours and the default of sahi are timed
    assert [row[0] for row in part.rows if row[-1]] == [
        tiles.OURS,
        tiles.THEIRS.format(*tiles.VARIANTS[0]),
    ]
    by_confidence = [row[-2] for row in part.rows if row[0] == tiles.OURS]
    assert by_confidence == sorted(by_confidence, reverse=True) and by_confidence[-1] > 0
    assert len(part.targets) == len(tiles.CONFIDENCES)


def test_the_benchmark_scores_masks_as_sahi_draws_them():
    annotation = pytest.importorskip("sahi.annotation")
    ring = [[4, 2, 40, 3, 39.5, 33, 5, 30], [10, 10, 20, 10, 20, 20.2]]
    at_corner = [[55, 40, 62, 40, 60, 50, 55, 50]]
    for polygons in (ring, at_corner):
        mask = annotation.Mask(polygons, full_shape=[50, 60])
        assert mask.bool_mask.any()
        (drawn,) = CroppedMasks([tiles.crop_of(mask)], (50, 60)).pasted()
        assert np.array_equal(drawn, mask.bool_mask)


# ---- the examples of docs/integrations.md


def example(word: str, **replaced: str) -> dict:
    """
    Run the example with this word in it.

    Args:
        replaced: lines that begin with a key, and what to run instead.

    Returns:
        its names.
    """
    (block,) = [x for x in blocks_of(PAGE) if x.language == "python" and word in x.text]
    lines = block.text.splitlines()
    for start, line in replaced.items():
        (k,) = [k for k, x in enumerate(lines) if x.startswith(f"{start} =")]
        lines[k:] = [line, *lines[k + 1 :]] if line else []
    names: dict = {"__name__": "example"}
    exec(compile("\n".join(lines), str(block), "exec"), names)
    return names


def test_torchmetrics_has_the_ap_of_mask_scores(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.chdir(tmp_path)
    draw.draw_dataset(tmp_path, 1, 6, seed=3)
    (tmp_path / "val").rename("images")
    predictor = msrcnn_d2.load_predictor("demo")
    monkeypatch.setattr(msrcnn_d2, "load_predictor", lambda folder: predictor, raising=False)
    names = example("torchmetrics")

    coco = names["coco"]
    results = []
    for image in coco.dataset["images"]:
        (found,) = predictor.predictions([f"images/{image['file_name']}"])
        results += [
            {"image_id": image["id"], "category_id": int(k) + 1, "segmentation": rle, "score": s}
            for k, rle, s in zip(found.pred_classes, found.masks.rles(), found.mask_scores)
        ]
    evaluation = COCOeval(coco, coco.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    ap = names["metric"].compute()
    assert 0.2 < evaluation.stats[0] < 1
    assert ap["map"].item() == pytest.approx(evaluation.stats[0], abs=1e-6)
    assert ap["map_75"].item() == pytest.approx(evaluation.stats[2], abs=1e-6)


def write_metrics(writer) -> None:
    """Losses of two iterations, and a result of the second."""
    with EventStorage() as storage:
        for storage.iter, loss in enumerate([4.0, 2.0]):
            storage.put_scalar("total_loss", loss)
            if storage.iter == 1:
                storage.put_scalar("segm/AP-a (b)", 12.5, smoothing_hint=False)
            writer.write()
        storage.iter = 2  # nothing is new
        writer.write()


def test_mlflow_has_the_metrics(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its database takes seconds to set up
    mlflow.set_tracking_uri(tmp_path.as_uri())
    writer = example("MLflowWriter")["MLflowWriter"]("my experiment")
    write_metrics(writer)
    writer.close()
    assert mlflow.active_run() is None
    (run,) = mlflow.search_runs(experiment_names=["my experiment"], output_format="list")
    history = {
        name: [
            (x.step, x.value)
            for x in mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
        ]
        for name in run.data.metrics
    }
    # Smoothed by their median, as in the log
    assert history == {"total_loss": [(0, 4), (1, 3)], "segm/AP-a _b_": [(1, 12.5)]}


def test_wandb_has_the_metrics(tmp_path):
    wandb = pytest.importorskip("wandb")
    if not hasattr(wandb, "init"):
        pytest.skip("wandb is a folder of earlier runs")
    arguments = {"project": "shapes", "mode": "offline", "dir": str(tmp_path)}
    writer = example("WandbWriter")["WandbWriter"](**arguments)
    write_metrics(writer)
    summary = dict(writer.run.summary)
    writer.close()
    wandb.teardown()  # it would write the next run of this process beside this one
    assert {k: summary[k] for k in ("total_loss", "segm/AP-a (b)")} == {
        "total_loss": 3,
        "segm/AP-a (b)": 12.5,
    }
    assert [*tmp_path.glob("wandb/offline-run-*/*.wandb")]
