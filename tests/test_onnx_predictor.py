"""Predictions from exported files, without PyTorch and Detectron2."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import detectron2.data.transforms as T

from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.exported import resized_size
from msrcnn_d2_runtime.onnx_predictor import OnnxPredictor
from tests.helpers.onnx_files import CALIBRATED, OUTPUTS, metadata, write_onnx

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
MASKS = np.ones((3, 4, 4), dtype=np.float32)
MASKS[:, :, :2] = 0  # the right halves of the boxes


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A model with mask scores and a calibrator, and masks in boxes."""
    table = np.full((10, 99), 2.0)
    table[5, 94] = 0.3  # precision 0.95 at IoU 0.75
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    outputs = {**OUTPUTS, **CALIBRATED, "masks": MASKS}
    return write_onnx(path, outputs, metadata(accept_thresholds=json.dumps(table.tolist())))


@pytest.mark.parametrize(
    ("rank_by", "threshold", "expected"),
    [
        (None, 0.0, [0, 1, 2]),  # what the file ranks by
        ("mask_score", 0.3, [0, 1]),
        ("score", 0.7, [2, 0]),
        ("quality_score", 0.0, [1, 2, 0]),
        # CALIBRATED["mask_iou_probs"][:, 5] is about 0.74, 0.43, 0.12
        ("score", "p95@75", [0, 1]),
    ],
)
def test_ranking_and_threshold(file, rank_by, threshold, expected):
    predict = OnnxPredictor(file, rank_by=rank_by, score_threshold=threshold)
    predictions = predict(IMAGE)["instances"]
    assert predict.rank_by == (rank_by or "mask_score")
    assert predict.class_names == ("cat", "dog")
    for name, values in (OUTPUTS | CALIBRATED).items():
        field = {"boxes": "pred_boxes", "classes": "pred_classes"}.get(name, name)
        np.testing.assert_array_equal(predictions.get(field), values[expected], err_msg=name)
    np.testing.assert_array_equal(predictions.masks.probs, MASKS[expected])


def test_masks_are_those_of_the_image(file):
    predictions = OnnxPredictor(file)(IMAGE)["instances"]
    assert predictions.image_size == (20, 30)
    expected = np.zeros((20, 30), dtype=bool)
    expected[2:12, 5:9] = True
    np.testing.assert_array_equal(predictions.pred_masks[0], expected)


def test_pasted_masks(tmp_path):
    bitmaps = np.random.default_rng(1).random((3, 20, 30)) > 0.5
    outputs = {**OUTPUTS, "masks": bitmaps}
    file = write_onnx(tmp_path / "model.onnx", outputs, metadata(masks="pasted"))
    predictions = OnnxPredictor(file, rank_by="score")(IMAGE)["instances"]
    np.testing.assert_array_equal(predictions.pred_masks, bitmaps[[2, 0, 1]])


def test_a_list_gives_a_list(file):
    one, other = OnnxPredictor(file)([IMAGE, IMAGE[:10]])
    assert one["instances"].image_size == (20, 30)
    assert other["instances"].image_size == (10, 30)
    assert OnnxPredictor(file)([]) == []


def test_predict_all_of_a_folder(file, tmp_path):
    for name, height in (("b", 20), ("a", 10)):
        Image.fromarray(IMAGE[:height]).save(tmp_path / f"{name}.png")
    predict = OnnxPredictor(file, score_threshold=0.3)
    first, second = predict.predict_all(tmp_path, batch_size=2)
    assert (first.name, first.predictions.image_size) == ("a.png", (10, 30))
    assert (second.name, second.predictions.image_size) == ("b.png", (20, 30))
    for image in (first, second):
        np.testing.assert_array_equal(image.predictions.mask_scores, OUTPUTS["mask_scores"][:2])


def what_the_model_gets(folder, image, **changes):
    """The image and the output size that arrive in the file."""
    outputs = {"scores": "image", "mask_scores": "output_size"}
    path = write_onnx(folder / "model.onnx", {**OUTPUTS, "masks": MASKS, **outputs}, metadata())
    predict = OnnxPredictor(path)
    predict.metadata.update(changes)
    found = predict._run
    seen = []
    predict._run = lambda *args: seen.append(found(*args)) or OUTPUTS | {"masks": MASKS}
    predict(image)
    return seen[0]["scores"], seen[0]["mask_scores"]


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (10, 10), (64, 16), (5, 9)])
def test_images_are_resized_as_by_detectron2(tmp_path, shape):
    image = np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)
    transform = T.ResizeShortestEdge(8, 12).get_transform(image)
    pixels, size = what_the_model_gets(tmp_path, image)
    np.testing.assert_array_equal(pixels, transform.apply_image(image)[:, :, ::-1])
    assert size.tolist() == [*shape]


def test_images_of_their_own_size_and_bgr(tmp_path):
    pixels, _ = what_the_model_gets(tmp_path, IMAGE, resize=None, channel_order="BGR")
    np.testing.assert_array_equal(pixels, IMAGE)


def test_sizes_are_rounded_as_in_detectron2():
    rng = np.random.default_rng(3)
    for height, width in rng.integers(1, 4000, (2000, 2)).tolist():
        expected = T.ResizeShortestEdge.get_output_shape(height, width, 800, 1333)
        assert resized_size((height, width), 800, 1333) == expected


def test_files_are_read_as_the_metadata_say(tmp_path):
    Image.fromarray(np.full((20, 30), 4095, dtype=np.uint16)).save(tmp_path / "deep.png")
    settings = json.dumps({"intensity_range": [0, 4095]})
    outputs = {**OUTPUTS, "masks": MASKS}
    plain = write_onnx(tmp_path / "plain.onnx", outputs, metadata())
    scaled = write_onnx(tmp_path / "scaled.onnx", outputs, metadata(image_settings=settings))
    assert OnnxPredictor(scaled).image_settings.intensity_range == (0, 4095)
    assert len(OnnxPredictor(scaled)(str(tmp_path / "deep.png"))["instances"]) == 3
    with pytest.raises(UserError, match="8 bits"):
        OnnxPredictor(plain)(str(tmp_path / "deep.png"))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        OnnxPredictor(tmp_path / "missing.onnx")
    with pytest.raises(UserError, match="is a folder"):
        OnnxPredictor(tmp_path)
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(UserError, match="not an ONNX file"):
        OnnxPredictor(tmp_path / "text.onnx")
    foreign = write_onnx(tmp_path / "foreign.onnx", OUTPUTS)
    with pytest.raises(UserError, match="msrcnn-d2 export"):
        OnnxPredictor(foreign)
    newer = metadata(format_version="2", msrcnn_d2_version="0.7.0")
    with pytest.raises(UserError, match=r"0\.7\.0"):
        OnnxPredictor(write_onnx(tmp_path / "newer.onnx", OUTPUTS, newer))
    damaged = metadata(class_names=None)
    with pytest.raises(UserError, match="class_names"):
        OnnxPredictor(write_onnx(tmp_path / "damaged.onnx", OUTPUTS, damaged))


def test_scores_that_the_model_lacks_are_refused(tmp_path):
    names = ("boxes", "classes", "scores")
    outputs = {**{name: OUTPUTS[name] for name in names}, "masks": MASKS}
    plain = write_onnx(tmp_path / "plain.onnx", outputs, metadata(ranking="scores"))
    assert OnnxPredictor(plain).rank_by == "score"
    with pytest.raises(UserError, match="does not score its masks"):
        OnnxPredictor(plain, rank_by="mask_score")
    with pytest.raises(UserError, match="no calibrated scores"):
        OnnxPredictor(plain, score_threshold="p95@75")
    with pytest.raises(ValueError, match="rank_by"):
        OnnxPredictor(plain, rank_by="iou")
    with pytest.raises(ValueError, match="threads"):
        OnnxPredictor(plain, threads=0)


def run_without(modules, code):
    blocked = f"import sys; sys.modules.update({dict.fromkeys(modules)})\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", blocked + code], capture_output=True, text=True
    )


def test_only_onnx_runtime_numpy_and_pillow_are_needed(file, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    ran = run_without(
        ["torch", "detectron2", "msrcnn_d2", "cv2", "pycocotools", "matplotlib", "tqdm", "onnx"],
        "from msrcnn_d2_runtime.onnx_predictor import OnnxPredictor\n"
        f"predictions = OnnxPredictor({file!r})({str(tmp_path / 'image.png')!r})['instances']\n"
        "print(predictions.scores.tolist(), predictions.pred_masks.sum(axis=(1, 2)).tolist())",
    )
    assert ran.returncode == 0, ran.stderr
    expected = OnnxPredictor(file)(IMAGE)["instances"]
    areas = expected.pred_masks.sum(axis=(1, 2)).tolist()
    assert ran.stdout.strip() == f"{expected.scores.tolist()} {areas}"


def test_the_command_predict_needs_no_pytorch(file, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    arguments = ["predict", str(tmp_path / "image.png"), "--model", file, "--score-threshold", "0"]
    arguments += ["--output", str(tmp_path / "results"), "--save", "pictures,csv,coco,masks"]
    code = f"from msrcnn_d2_cli import main\nsys.exit(main({arguments}))"
    ran = run_without(["torch", "detectron2", "msrcnn_d2"], code)
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "results/coco_instances_results.json").read_text())
    expected = OnnxPredictor(file)(IMAGE)["instances"]
    assert [x["mask_score"] for x in results] == pytest.approx(expected.mask_scores)
    assert (tmp_path / "results/pictures/image.png").is_file()

    shutil.rmtree(tmp_path / "results")
    for package in ("tqdm", "pycocotools", "matplotlib"):
        ran = run_without([package], code)
        assert ran.returncode == 2
        assert f"pip install {package}" in ran.stderr.splitlines()[-1]


def test_without_onnx_runtime_it_says_what_to_install(file):
    ran = run_without(
        ["onnxruntime"],
        f"from msrcnn_d2_runtime.onnx_predictor import OnnxPredictor\nOnnxPredictor({file!r})",
    )
    last_line = ran.stderr.strip().splitlines()[-1]
    assert "UserError" in last_line
    assert "pip install onnxruntime" in last_line
