"""Evaluation of predictors, such as exported models."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import draw
from msrcnn_d2 import load_predictor
from msrcnn_d2.engine import (
    build_recipe,
    evaluate_checkpoint,
    evaluate_predictor,
    load_config,
    register_dataset,
)
from msrcnn_d2.export import export_onnx
from msrcnn_d2.prediction.loading import demo_model
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_runtime.image_reading import read_bgr_image
from msrcnn_d2_runtime.onnx_predictor import OnnxPredictor
from tests.helpers.command import exit_code
from tests.helpers.onnx_files import OUTPUTS, metadata, write_onnx

pytestmark = pytest.mark.usefixtures("leave_no_traces")

SIZE = (20, 30)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Finds the same three objects in each image, with masks that fill their boxes."""
    outputs = {**OUTPUTS, "masks": np.ones((3, 4, 4), dtype=np.float32)}
    return write_onnx(tmp_path_factory.mktemp("onnx") / "model.onnx", outputs, metadata())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """
    An image with the first two objects. The third detection is wrong: a dog again, with the best
    class score and the worst mask score.
    """
    folder = tmp_path_factory.mktemp("dataset")
    Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(folder / "1.png")
    # "dog" and "cat" here, and the other way around in the model
    categories = [{"id": 5, "name": "dog"}, {"id": 9, "name": "cat"}, {"id": 12, "name": "cow"}]
    annotations = []
    for k, category in enumerate((5, 9)):
        x0, y0, x1, y1 = OUTPUTS["boxes"][k].astype(int).tolist()
        annotations.append(
            {
                "id": k + 1,
                "image_id": 1,
                "category_id": category,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            }
        )
    images = [{"id": 1, "file_name": "1.png", "height": SIZE[0], "width": SIZE[1]}]
    contents = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(contents))
    return ["pets", str(folder / "annotations.json"), str(folder)]


# With the wrong detection first, half of the dogs above any recall are right; cats are all right
EXPECTED = {"bbox": 75.0, "segm": 100.0, "segm_by_class_score": 75.0}


def test_a_file_is_evaluated_by_names_of_classes_and_by_both_scores(model, dataset):
    register_dataset(*dataset)
    results = evaluate_predictor(OnnxPredictor(model), dataset[0])
    assert {task: results[task]["AP"] for task in EXPECTED} == pytest.approx(EXPECTED)


def test_the_command(model, dataset, tmp_path, capsys):
    arguments = ["evaluate", "--weights", model, "--dataset", *dataset]
    assert exit_code(*arguments, f"train.output_dir={tmp_path}") == 0
    assert "masks by class score" in capsys.readouterr().out
    assert (tmp_path / "report/report.html").is_file()
    written = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    assert [r["category_id"] for r in written] == [5, 9, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--dataset"),
        (["--config-file", "a.py"], "--config-file"),
        (["--resume"], "--resume"),
        (["--num-gpus", "2"], "one process"),
        (["model.roi_heads.num_classes=3"], "num_classes"),
        (["dataloader.test.dataset.names=unknown"], "'unknown' is not known"),
    ],
)
def test_what_an_exported_model_cannot_do(model, arguments, message, capsys):
    assert exit_code("evaluate", "--weights", model, *arguments) == 2
    assert message in capsys.readouterr().err


def test_images_have_the_size_of_their_annotations(model, dataset, tmp_path):
    name, annotations, _ = dataset
    Image.fromarray(np.zeros((30, 20, 3), dtype=np.uint8)).save(tmp_path / "1.png")
    register_dataset("turned", annotations, str(tmp_path))
    with pytest.raises(UserError, match="20 x 30 pixels"):
        evaluate_predictor(OnnxPredictor(model), "turned")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The demo's model, the same one exported, and drawn images with their annotations."""
    folder = tmp_path_factory.mktemp("shapes")
    draw.draw_split(folder, "val", 5, seed=3)
    register_dataset("drawn_shapes", str(folder / "val.json"), str(folder / "val"))
    predict = load_predictor(demo_model(), device="cpu")
    export_onnx(predict, folder / "model.onnx")
    return SimpleNamespace(
        predict=predict,
        exported=OnnxPredictor(folder / "model.onnx"),
        images=sorted((folder / "val").glob("*.png")),
        folder=folder,
    )


def test_an_exported_model_finds_what_the_model_finds(shapes):
    """On real images, 50 of COCO and 108 of nuclei, this was tried by hand; see docs/deploy.md."""
    assert shapes.exported.class_names == shapes.predict.class_names
    assert shapes.exported.rank_by == shapes.predict.rank_by
    for path in shapes.images:
        (expected,), (found,) = (x.predictions([path]) for x in (shapes.predict, shapes.exported))
        assert len(found) == len(expected) > 5
        assert found.get_fields().keys() == expected.get_fields().keys()
        for name, values in expected.get_fields().items():
            np.testing.assert_allclose(found.get(name), values, atol=2e-4, err_msg=name)
        differ = np.count_nonzero(found.pred_masks != expected.pred_masks)
        assert differ <= 1e-4 * expected.pred_masks.size


def test_openvino_runs_the_file(shapes):
    """At a size that is no multiple of 16, to which images are padded."""
    openvino = pytest.importorskip("openvino")
    image = np.ascontiguousarray(read_bgr_image(shapes.images[0])[:100, :90])
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(shapes.exported.path, "CPU", settings)
    found = model({"image": np.ascontiguousarray(image[:, :, ::-1])})
    expected = shapes.exported(image)["instances"]
    assert len(expected) > 3
    np.testing.assert_allclose(found["boxes"], expected.pred_boxes, atol=2e-3)
    np.testing.assert_allclose(found["mask_scores"], expected.mask_scores, atol=1e-4)


def test_the_results_are_those_of_evaluating_the_model(shapes):
    """The evaluation of a config reads images and handles masks by other code."""
    weights = demo_model()
    cfg = load_config(str(Path(weights).with_suffix(".py")), weights=weights)
    cfg.dataloader.test.dataset.names = cfg.dataloader.evaluator.dataset_name = "drawn_shapes"
    cfg.dataloader.test.num_workers = 0
    cfg.train.output_dir, cfg.train.device = str(shapes.folder), "cpu"
    expected = evaluate_checkpoint(build_recipe(cfg))
    assert expected["segm"]["AP"] > 20
    for predictor in (shapes.predict, shapes.exported):
        found = evaluate_predictor(predictor, "drawn_shapes")
        for task in EXPECTED:
            assert found[task] == pytest.approx(expected[task], abs=0.1, nan_ok=True)


def test_the_export_to_int8_prints_ap_before_and_after(shapes, tmp_path, capsys):
    path = tmp_path / "int8.onnx"
    dataset = ["shapes_of_export", shapes.folder / "val.json", shapes.folder / "val"]
    options = ["--int8", shapes.images[0], "--dataset", *dataset]
    assert exit_code("export", "demo", path, *options) == 0
    lines = re.findall(r"^  (\w+): ([\d.]+), ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    printed = {task: [float(before), float(after)] for task, before, after in lines}
    models = shapes.exported, OnnxPredictor(path)
    results = [evaluate_predictor(x, "drawn_shapes") for x in models]
    for task in EXPECTED:
        assert printed[task] == pytest.approx([x[task]["AP"] for x in results], abs=0.1)


def test_mistakes_in_the_dataset_are_found_before_an_export(shapes, dataset, tmp_path, capsys):
    path = tmp_path / "int8.onnx"
    missing = ["missing", tmp_path / "missing.json", tmp_path]
    for data, words in ((dataset, "no name in common"), (missing, "missing.json")):
        options = ["--int8", shapes.images[0], "--dataset", *data]
        assert exit_code("export", "demo", path, *options) == 2
        assert words in capsys.readouterr().err
    assert not path.exists()
