"""`msrcnn-d2 predict`: from files to results, with bad files, interruptions and pipes."""

import csv
import errno
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

import draw
import msrcnn_d2_runtime
from msrcnn_d2.prediction.loading import load_predictor
from msrcnn_d2_cli import parsing
from msrcnn_d2_cli import predict as command
from msrcnn_d2_runtime import drawing, outputs, ranking
from msrcnn_d2_runtime.image_reading import ImageSettings
from msrcnn_d2_runtime.outputs import coco_dataset
from msrcnn_d2_runtime.outputs.journal import Journal
from msrcnn_d2_runtime.predictions import CroppedMasks, Predictions
from msrcnn_d2_runtime.tiling import TiledPredictor
from tests.helpers.command import exit_code

ROOT = Path(__file__).resolve().parents[1]


class Colours:
    """
    A predictor with an object for each colour channel, the whole image. The class score is the
    brightness, and the predicted IoU is 0.5.
    """

    class_names = ("red", "green", "blue")
    rank_by = "mask_score"
    image_settings = ImageSettings()

    def __init__(self, score_threshold=0.0):
        self.score_threshold = score_threshold

    def predictions(self, images):
        return [self.one(image) for image in images]

    def one(self, image):
        height, width = image.shape[:2]
        scores = (image[0, 0, ::-1] / 255).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] / 2 >= self.score_threshold]
        return Predictions(
            pred_boxes=np.tile(np.float32([0, 0, width, height]), (len(order), 1)),
            pred_classes=order,
            masks=CroppedMasks.of(np.ones((len(order), height, width), bool)),
            scores={
                "scores": scores[order],
                "pred_mask_ious": np.full(len(order), 0.5, np.float32),
                "mask_scores": scores[order] / 2,
            },
            ranking="mask_scores",
        )


@pytest.fixture
def world(tmp_path, monkeypatch):
    """
    Two folders with images of the same names, and a predictor. Of 1.png the channels have class
    scores of 1.0, 0.8 and 0.2, and of 2.png none.
    """
    for folder in ("a", "b c"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        Image.new("RGB", (6, 4), (255, 204, 51)).save(tmp_path / "in" / folder / "1.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "a" / "2.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "predictor_from", lambda args, threshold, **_: Colours(threshold))
    return tmp_path


def run(*args) -> int:
    return exit_code("predict", *args, "--model", "demo")


def journal(folder="predictions") -> dict[str, list[dict]]:
    """{image: its objects}, in the order of the names."""
    lines = map(json.loads, Path(folder, "predictions.jsonl").read_text().splitlines())
    return {x["image"]: x["predictions"] for x in sorted(lines, key=lambda x: x["image"])}


def classes(folder="predictions") -> dict[str, list[str]]:
    return {name: [x["class"] for x in objects] for name, objects in journal(folder).items()}


def test_choices_are_those_of_the_library():
    assert command.KINDS == tuple(outputs.KINDS)
    assert command.SEGMENTATIONS == coco_dataset.SEGMENTATIONS
    assert get_args(drawing.LabelStyle) == command.LABELS
    assert set(parsing.RANK_BY) == set(ranking.SCORE_FIELDS)


def test_a_folder(world, capsys):
    assert run("in") == 0
    assert classes() == {"a/1.png": ["red", "green"], "a/2.png": [], "b c/1.png": ["red", "green"]}
    found = {str(p.relative_to("predictions")) for p in Path("predictions").rglob("*.png")}
    assert found == {"pictures/a/1.png", "pictures/a/2.png", "pictures/b c/1.png"}
    with open("predictions/predictions.csv") as f:
        assert len(list(csv.DictReader(f))) == 4
    said = capsys.readouterr().out
    assert re.match(r"3 images in .*; 4 objects \(red 2, green 2\); 1 without objects\n", said)
    assert "predictions/" in said


@pytest.mark.parametrize(
    "options, kept",
    [
        (["--score-threshold", "0"], "red green blue"),
        (["--score-threshold", "0.45"], "red"),
        (["--min-score", "0.5"], "red green"),
        (["--min-mask-score", "0.09"], "red green blue"),
        (["--min-mask-score", "0"], "red green blue"),
        (["--min-iou", "0.6"], ""),
        (["--classes", "Green,blue"], "green"),
        (["--classes", "green, blue", "--min-score", "0.1"], "green blue"),
        (["--top-k", "1"], "red"),
    ],
)
def test_what_is_kept(world, options, kept):
    """In all outputs alike."""
    assert run("in/a/1.png", *options, "--save", "coco,csv,masks,label-maps") == 0
    assert classes() == {"1.png": kept.split()}
    results = json.loads(Path("predictions/coco_instances_results.json").read_text())
    with open("predictions/predictions.csv") as f:
        rows = list(csv.DictReader(f))
    masks = list(Path("predictions/masks").rglob("0*.png"))
    assert len(results) == len(rows) == len(masks) == len(kept.split())


@pytest.mark.parametrize("segmentation, kind", [("polygons", list), ("rle", dict)])
def test_masks_of_the_dataset(world, segmentation, kind):
    assert run("in", "--save", "dataset", "--segmentation", segmentation) == 0
    dataset = json.loads(Path("predictions/annotations/instances_predictions.json").read_text())
    masks = [annotation["segmentation"] for annotation in dataset["annotations"]]
    assert len(masks) == 4 and all(isinstance(mask, kind) for mask in masks)


def test_bad_files_are_named_and_skipped(world, capsys):
    Path("in/a/0.png").write_text("nonsense")
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save("in/a/deep.tif")
    Path("in/notes.txt").touch()
    assert run("in", "--batch-size", 2) == 1
    assert list(journal()) == ["a/1.png", "a/2.png", "b c/1.png"]
    printed = capsys.readouterr()
    assert "2 skipped" in printed.out
    skipped = [x for x in printed.err.splitlines() if x.startswith("skipped")]
    assert len(skipped) == 2 and "in/a/deep.tif" in skipped[1]
    assert skipped[0].count("in/a/0.png") == 1
    assert "--intensity-range" in skipped[1] and "yaml" not in skipped[1]
    assert "1 other file" in printed.err


def test_a_list_on_standard_input_and_lines_on_standard_output(world, monkeypatch, capsysbinary):
    listed = SimpleNamespace(buffer=io.BytesIO(b"in/a/1.png\nin/b c/1.png\n"))
    monkeypatch.setattr(sys, "stdin", listed)
    assert run("-", "--output", "-") == 0
    printed = capsysbinary.readouterr()
    lines = [json.loads(x) for x in printed.out.splitlines()]
    assert [x["image"] for x in lines] == ["a/1.png", "b c/1.png"]
    assert all(len(x["predictions"]) == 2 for x in lines)
    assert b"2 images" in printed.err
    assert not Path("-").exists()


@pytest.mark.parametrize("moment", ["while it predicts", "while it writes"])
def test_after_an_interruption_it_continues(world, moment, monkeypatch, capsys):
    kinds = ["--save", "pictures,coco,csv,masks,label-maps", "--score-threshold", "0"]
    assert run("in", *kinds, "--output", "whole") == 0

    calls = itertools.count(1)

    def interrupt(self, images):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return [self.one(image) for image in images]

    def interrupt_bar(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "while it predicts":
            patch.setattr(Colours, "predictions", interrupt)
        else:
            patch.setattr(command.Progress, "add", interrupt_bar)
        capsys.readouterr()
        assert run("in", *kinds, "--output", "parts") == 130
    assert "--resume" in capsys.readouterr().err
    # What there is can be used
    assert len(json.loads(Path("parts/coco_instances_results.json").read_text())) in (3, 6)

    assert run("in", *kinds, "--output", "parts") == 2
    assert "--resume" in capsys.readouterr().err
    assert run("in", *kinds, "--output", "parts", "--resume", "--top-k", 1) == 2
    assert "top_k" in capsys.readouterr().err
    assert run("in", *kinds, "--output", "parts", "--resume") == 0
    assert "done before" in capsys.readouterr().err
    assert files_of("parts") == files_of("whole")


def files_of(folder) -> dict[str, bytes]:
    """The lines of the journal may have another order."""
    paths = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    return {
        str(p.relative_to(folder)): b"\n".join(sorted(p.read_bytes().splitlines())) for p in paths
    }


def test_a_run_that_continues_with_other_inputs_says_so(world, capsys):
    """Also if the same images have other names, since now there are others with the same ones."""
    assert run("in/a") == run("in/a", "--resume") == 0
    said = capsys.readouterr().err
    assert "2 images done before" in said and "lack" not in said
    assert run("in/a", "in/b c", "--resume") == 0
    assert "2 images that these inputs lack" in capsys.readouterr().err
    assert list(journal()) == ["1.png", "2.png", "a/1.png", "a/2.png", "b c/1.png"]


def test_images_that_were_too_large_are_read_when_the_run_continues(world, monkeypatch, capsys):
    def predictor_from(args, threshold, **_):
        predictor = Colours(threshold)
        predictor.image_settings = parsing.settings_from(args)
        return predictor

    monkeypatch.setattr(command, "predictor_from", predictor_from)
    assert run("in", "--max-pixels", 24, "--output", "parts") == 1
    said = capsys.readouterr().err
    assert "--max-pixels" in said and "5 x 5 pixels" in said
    assert list(journal("parts")) == ["a/1.png", "b c/1.png"]
    assert run("in", "--max-pixels", 25, "--output", "parts", "--resume") == 0
    assert run("in", "--output", "whole") == 0
    assert files_of("parts") == files_of("whole")


def test_a_full_disk(world, monkeypatch, capsys):
    calls = itertools.count(1)
    write_line = Journal.append

    def fail(self, record):
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_line(self, record)

    monkeypatch.setattr(Journal, "append", fail)
    assert run("in") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and os.strerror(errno.ENOSPC) in said and "--resume" in said
    assert run("in", "--resume") == 0
    assert len(journal()) == 3

    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=full))
        assert run("in", "--output", "-") == 2
    assert os.strerror(errno.ENOSPC) in capsys.readouterr().err


def test_results_inside_the_folder_of_the_images(world):
    """They are no inputs of the next run, whether it continues or writes to another folder."""
    for output in ("in/found", "in/found", "in/again"):
        assert run("in", "--output", output, "--resume") == 0
        assert list(journal(output)) == ["a/1.png", "a/2.png", "b c/1.png"]
    assert run("in/found", "--output", "of the results") == 0
    assert len(journal("of the results")) == 3


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "Give images"),
        (["no.png"], "'no.png'"),
        (["in", "--save", "coco,pictres"], "'pictres'"),
        (["in", "--save", "coco,"], "commas"),
        (["in", "--min-iou", "50"], "from 0 to 1"),
        (["in", "--score-threshold", "nan"], "from 0 to 1"),
        (["in", "--classes", "rde"], "did you mean red?"),
        (["in", "--output", "-", "--resume"], "--resume"),
        (["in", "--output", "-", "--save", "csv"], "--save"),
        (["in", "--output", "in"], "'in'"),
        (["in", "--top-k", "0"], "at least 1"),
        (["in", "--tile", "0"], "at least 1"),
        (["in", "--tile", "9", "--overlap", "1"], "below 1"),
        (["in", "--classes", 'red,"a, b"'], "'a, b'"),
        (["in", "--classes", ""], "commas"),
        (["-x.png"], "./-x.png"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(world, args, said, capsys):
    Path("-x.png").touch()
    assert run(*args) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and said in printed.err
    assert not Path("predictions").exists()


def test_without_a_model(world, capsys):
    assert exit_code("predict", "in") == 2
    assert "--model" in capsys.readouterr().err


def test_values_are_checked_before_the_model_is_loaded(world, monkeypatch, capsys):
    monkeypatch.undo()
    assert exit_code("predict", world, "--model", "no.onnx", "--intensity-range", 5, 3) == 2
    assert "lower one first" in capsys.readouterr().err


def test_where_there_is_no_terminal_progress_is_a_line_now_and_then(world, monkeypatch, capsys):
    assert run("in", "--output", "quiet") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(command, "LOG_PERIOD", 0.0)
    assert run("in") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"1 of 3 images, [\d.]+ images/s, \d\d:\d\d left", lines[0])


def test_options_about_images_change_those_of_the_model(world, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(world)
    pixels = np.full((64, 64), 1000, np.uint16)
    Image.fromarray(pixels).save("deep.tif")
    assert run("deep.tif", "--score-threshold", "0", "--save", "jsonl") == 1
    options = ["--intensity-range", "0", "2000", "--output", "other", "--save", "jsonl"]
    assert run("deep.tif", "--score-threshold", "0", *options) == 0
    assert list(journal("other")) == ["deep.tif"]


def test_the_demo_finds_shapes(world, monkeypatch):
    """The whole of it, with a real model: the best object of a scene is a true one."""
    monkeypatch.undo()
    monkeypatch.chdir(world)
    scene = draw.draw_scene(np.random.default_rng(3))
    Image.fromarray(scene.image).save("scene.png")
    assert run("scene.png", "--top-k", 1) == 0
    ((found,),) = journal().values()
    mask = mask_util.decode(found["segmentation"]) > 0
    ious = [(mask & x).sum() / (mask | x).sum() for x in scene.masks]
    assert max(ious) > 0.7 and found["class"] == scene.categories[np.argmax(ious)]


def test_an_exported_model_needs_neither_pytorch_nor_detectron2(world):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from tests.helpers.onnx_files import OUTPUTS, metadata, write_onnx

    masks = {"masks": np.ones((3, 4, 4), np.float32)}
    write_onnx("model.onnx", OUTPUTS | masks, metadata())
    code = "import sys; sys.modules.update(torch=None, detectron2=None, msrcnn_d2=None)\n"
    code += "from msrcnn_d2_cli import main; sys.exit(main(sys.argv[1:]))"
    ran = subprocess.run(
        [sys.executable, "-c", code, "predict", "in", "--model", "model.onnx"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert ran.returncode == 0, ran.stderr
    assert [len(x) for x in classes().values()] == [2, 2, 2]
    assert exit_code("predict", "in", "--model", "model.onnx", "--device", "cuda") == 2


def test_tiles_of_large_images(world, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(world)
    scene = draw.draw_scene(np.random.default_rng(0)).image
    Image.fromarray(np.tile(scene, (2, 2, 1))).save("large.png")
    tiles = ["--tile", "128", "--overlap", "0", "--batch-size", "3", "--save", "jsonl"]
    assert run("large.png", *tiles) == 0
    predictor = load_predictor("demo", score_threshold=command.DEFAULT_THRESHOLD)
    (expected,) = TiledPredictor(predictor, 128, 0, batch_size=3).predictions(["large.png"])
    (plain,) = predictor.predictions(["large.png"])
    found = [x["mask_score"] for x in journal()["large.png"]]
    assert found == pytest.approx(expected.mask_scores.tolist(), abs=1e-3)
    assert found != pytest.approx(plain.mask_scores.tolist(), abs=1e-3)
    assert run("large.png", "--overlap", "0.3", "--output", "other") == 2
    assert "--tile" in capsys.readouterr().err
    assert run("large.png", *tiles, "--resume") == 0
    assert run("large.png", *tiles, "--tile", "100", "--resume") == 2
    assert "tiles" in capsys.readouterr().err


def test_without_opencv_pictures_are_refused_before_any_work(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.delitem(sys.modules, "msrcnn_d2_runtime.drawing", raising=False)
    monkeypatch.delattr(msrcnn_d2_runtime, "drawing", raising=False)
    assert run("in") == 2
    assert "pip install" in capsys.readouterr().err
    assert not (world / "predictions").exists()
    assert run("in", "--save", "coco,csv,masks") == 0
