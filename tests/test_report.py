"""The report: what is written, what it shows, and what it refuses."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils.events import EventStorage

from msrcnn_d2.engine import evaluate as evaluate_module
from msrcnn_d2.engine import recipe as engine_recipe
from msrcnn_d2.engine.evaluate import log_reliability
from msrcnn_d2.evaluation import measure_mask_quality
from msrcnn_d2.report import write_report
from msrcnn_d2.report.figures import NUM_CLASSES, charts
from msrcnn_d2.report.gallery import draw_detection, largest_moves
from msrcnn_d2.utils.errors import UserError
from msrcnn_d2_cli.report import warn_of_more_than
from tests.helpers.command import exit_code
from tests.helpers.filled_boxes import (
    HEIGHT,
    WIDTH,
    build_coco,
    calibrated,
    dataset_of,
    found,
    thing,
)

CLASSES = ((3, "a"), (7, "b <i>"))
CHARTS = [
    "iou_class_score",
    "iou_predicted_iou",
    "iou_mask_score",
    "reliability",
    "reliability_of_scores",
    "ap_by_threshold",
    "precision_recall_050",
    "precision_recall_075",
    "precision_recall_090",
    "ap_by_class",
]


def truth(*boxes, category_id=3):
    """One object of a class in each image."""
    return dataset_of(
        [thing(box, image, category_id) for image, box in enumerate(boxes, start=1)],
        image_ids=range(1, len(boxes) + 1),
        categories=CLASSES,
    )


def detected(image, box, score, iou, category_id=3):
    return found(box, score, iou, image, category_id)


def quality_of(dataset, results):
    return measure_mask_quality(build_coco(dataset), results)


OBJECT = (10, 10, 20, 20)
DATASET = truth(OBJECT, OBJECT, OBJECT, OBJECT)
RESULTS = [
    detected(1, (10, 10, 20, 20), 0.6, 0.9),  # right, and predicted to be so: it moves up
    detected(2, (10, 10, 20, 12), 0.9, 0.5),  # IoU 0.6, and predicted to be bad: it moves down
    detected(3, (10, 10, 20, 15), 0.8, 0.7),
    detected(4, (50, 10, 20, 20), 0.7, 0.2),  # no object there
]


@pytest.fixture(scope="module")
def quality():
    return quality_of(DATASET, RESULTS)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for k in range(1, 5):
        pixels = np.full((HEIGHT, WIDTH, 3), (200, 40 * k, 0), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def report(quality, images, tmp_path_factory):
    """The path of a page."""
    folder = tmp_path_factory.mktemp("report") / "new"
    return write_report(quality, folder, "Mine & yours", str(images))


class Page(HTMLParser):
    """Text, sources of images and whatever else a page refers to."""

    def __init__(self, path):
        super().__init__()
        self.text, self.images, self.links, self.tags = "", [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        elif {"src", "href"} & attributes.keys():
            self.links.append(attributes)

    def handle_data(self, data):
        self.text += data


def pixels_of(image):
    data = image["src"].removeprefix("data:image/png;base64,")
    return base64.b64decode(data)


# ---- the page


def test_the_page_needs_no_other_file_and_no_network(report):
    page = Page(report)
    assert not page.links and "link" not in page.tags
    assert "url(" not in report.read_text() and "http" not in report.read_text()
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.images)
    assert all(image["alt"] for image in page.images)


def test_figures_are_there_as_png_too(report):
    written = {p.stem: p.read_bytes() for p in report.parent.glob("*.png")}
    assert set(written) == set(CHARTS)
    shown = [pixels_of(image) for image in Page(report).images]
    assert shown[: len(CHARTS)] == [written[name] for name in CHARTS]
    for name in CHARTS:
        with Image.open(report.parent / f"{name}.png") as image:
            assert image.width == 690  # what a phone can show, at double density


def test_numbers_are_those_of_the_evaluation(quality, report):
    text = (report.parent / "report.json").read_text()
    numbers = json.loads(text, parse_constant=pytest.fail)
    thresholds = numbers.pop("thresholds")
    assert numbers == {"title": "Mine & yours", **quality.to_json()}
    assert [*thresholds["scores"]] == ["class_score", "mask_score"]


def test_the_page_shows_the_numbers(quality, report):
    page, overall = Page(report), quality.overall
    assert "Mine & yours" in page.text
    assert "4 images, 4 objects, 4 detections, of which 3 are matched" in page.text
    for value in overall.ap.values():
        assert f"{value:.1f}" in page.text
    for errors in quality.calibration.values():
        for value in (errors.laece, errors.laace, *errors.brier.values(), *errors.ece.values()):
            assert f"{value:.3f}" in page.text
    assert f"{overall.matched.mae:.2f}" in page.text
    assert f"{overall.matched.pearson['class_score']:.2f} → ".replace("-", "−") in page.text


def test_names_of_classes_are_text(tmp_path):
    dataset = truth(OBJECT, category_id=7)
    page = Page(
        write_report(quality_of(dataset, [detected(1, OBJECT, 0.9, 0.9, category_id=7)]), tmp_path)
    )
    assert "b <i>" in page.text and "i" not in page.tags


def test_the_same_numbers_give_the_same_page(quality, images, report, tmp_path):
    again = write_report(quality, tmp_path, "Mine & yours", str(images))
    assert again.read_bytes() == report.read_bytes()


def test_a_model_without_mask_scores(tmp_path):
    plain = [{k: r[k] for k in r if k not in ("pred_mask_iou", "mask_score")} for r in RESULTS]

    page = Page(write_report(quality_of(DATASET, plain), tmp_path))

    names = {p.stem for p in tmp_path.glob("*.png")}
    assert names == set(CHARTS) - {"iou_predicted_iou", "iou_mask_score", "reliability"}
    assert "mask score" not in page.text and "Largest changes" not in page.text
    assert "ceiling" in page.text


@pytest.mark.parametrize("has_mask_scores", [True, False])
def test_a_model_with_calibrated_scores(has_mask_scores, tmp_path):
    results = [calibrated(r, 10 * [p]) for r, p in zip(RESULTS, (0.9, 0.3, 0.5, 0.1))]
    dropped = () if has_mask_scores else ("pred_mask_iou", "mask_score")
    results = [{k: r[k] for k in r if k not in dropped} for r in results]

    page = Page(write_report(quality_of(DATASET, results), tmp_path))

    assert (tmp_path / "iou_quality_score.png").is_file()
    assert (tmp_path / "reliability_of_probs.png").is_file()
    assert "mask AP by calibrated score" in page.text
    assert "calibrated score 0.90" in page.text  # in the gallery
    assert ("mask score" in page.text) is has_mask_scores


def test_results_of_which_none_is_right(tmp_path):
    page = Page(
        write_report(quality_of(DATASET, [detected(1, (50, 30, 9, 9), 0.9, 0.4)]), tmp_path)
    )
    assert "of which 0 are matched" in page.text and "nan" not in page.text


def test_of_many_classes_those_that_change_most_have_a_bar():
    count = NUM_CLASSES + 20
    dataset = truth(OBJECT)
    dataset["categories"] = [{"id": k, "name": f"class {k}"} for k in range(count)]
    dataset["annotations"] = [
        {**dataset["annotations"][0], "id": k + 1, "category_id": k} for k in range(count)
    ]
    # Of the first and the last class a second mask, wrong, that mask scores put last and first
    results = [detected(1, OBJECT, 0.5, 0.5, k) for k in range(count)]
    results.append(detected(1, (50, 30, 9, 9), 0.9, 0.1, 0))
    results.append(detected(1, (50, 30, 9, 9), 0.4, 0.9, count - 1))
    *_, bars = charts(quality_of(dataset, results))
    labels = [text.get_text() for text in bars.figure.axes[0].get_yticklabels()]
    assert len(labels) == NUM_CLASSES
    assert (labels[-1], labels[0]) == ("class 0", f"class {count - 1}")


def test_a_folder_that_cannot_be_written_is_named(quality, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/report"):
        write_report(quality, tmp_path / "file" / "report")


# ---- the gallery


def test_what_moves_most_is_shown(quality):
    # By class score: images 2, 3, 4, 1. By mask score, 0.54, 0.45, 0.56, 0.14: images 3, 1, 2, 4
    up, down = largest_moves(quality, "mask_score", 8)

    def moves(chosen):
        return [(RESULTS[m.index]["image_id"], m.before, m.after) for m in chosen]

    assert moves(up) == [(1, 4, 2), (3, 2, 1)]
    assert moves(down) == [(2, 1, 3), (4, 3, 4)]
    assert {(m.num_ranked, m.num_objects) for m in up + down} == {(4, 4)}
    assert moves(largest_moves(quality, "mask_score", 1)[0]) == [(1, 4, 2)]


def test_only_the_first_ranks_count_and_of_an_image_one_detection():
    # One object, so only the first rank of each ranking is of interest
    results = [
        detected(1, OBJECT, 0.9, 0.1),
        detected(1, (11, 10, 20, 20), 0.8, 0.9),
        detected(1, (12, 10, 20, 20), 0.7, 0.5),
        detected(1, (50, 10, 20, 20), 0.6, 0.9),
    ]
    up, down = largest_moves(quality_of(truth(OBJECT), results), "mask_score", 8)
    assert [(m.index, m.before, m.after) for m in up] == [(1, 2, 1)]
    assert [(m.index, m.before, m.after) for m in down] == [(0, 1, 4)]


def drawn(quality, index, images):
    """With the outline of the object that it overlaps most."""
    nearest = quality.average_precision.overlaps.nearest_object(index)
    return draw_detection(quality, index, nearest, images)


def test_a_thumbnail_has_image_mask_and_outline(quality, images):
    figure = drawn(quality, 1, str(images))
    figure.canvas.draw()
    (axes,) = figure.axes
    image, overlay = (shown.get_array() for shown in axes.images)
    assert tuple(image[0, 0]) == (200, 80, 0)
    assert (overlay[..., 3] > 0).sum() == 20 * 12
    assert axes.get_xlim()[0] < 10 and axes.get_xlim()[1] > 29  # the whole object is seen
    assert axes.get_ylim()[0] > 29 and axes.get_ylim()[1] < 10


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_an_image_that_cannot_be_read_leaves_the_mask(quality, tmp_path, caplog, damage):
    if damage == "broken":
        (tmp_path / "1.png").write_bytes(b"no image")
    image, overlay = drawn(quality, 0, str(tmp_path)).axes[0].images
    assert len(np.unique(image.get_array())) == 1
    assert overlay.get_array()[..., 3].any()
    assert "without its image" in caplog.text and "1.png" in caplog.text


def test_an_image_of_another_size_is_not_shown(quality, tmp_path, caplog):
    Image.new("RGB", (WIDTH // 2, HEIGHT)).save(tmp_path / "1.png")
    image, _ = drawn(quality, 0, str(tmp_path)).axes[0].images
    assert len(np.unique(image.get_array())) == 1 and image.get_array().max() > 0
    assert "1.png' has 120 x 80 pixels, its annotation says 120 x 160" in caplog.text


def test_of_a_large_image_only_a_part_is_drawn(quality):
    image, overlay = drawn(quality, 0, None).axes[0].images
    assert max(image.get_array().shape[:2]) < 50 and max(overlay.get_array().shape[:2]) < 50


def test_ids_of_images_can_be_names():
    dataset = dataset_of([thing(OBJECT, "im-a")], image_ids=["im-a"])
    quality = quality_of(dataset, [found(OBJECT, 0.9, 0.9, "im-a")])
    _, overlay = drawn(quality, 0, None).axes[0].images
    assert (overlay.get_array()[..., 3] > 0).sum() == 400


def test_names_of_classes_are_no_formulas(tmp_path):
    dataset = truth(OBJECT)
    dataset["categories"] = [{"id": 3, "name": "$\\foo$ a_b"}]
    page = Page(write_report(quality_of(dataset, [detected(1, OBJECT, 0.9, 0.9)]), tmp_path))
    assert "$\\foo$ a_b" in page.text


# ---- what train_net.py does with it


class Trained:
    """A recipe of two test sets whose evaluators have measured something."""

    num_classes = None

    def __init__(self, quality, wrap=lambda evaluator: evaluator):
        class Evaluator(DatasetEvaluator):
            mask_quality = quality

        self.test_sets = [
            engine_recipe.TestSet((name,), None, lambda: wrap(Evaluator())) for name in "ab"
        ]


@pytest.mark.parametrize(
    "wrap",
    [lambda e: e, lambda e: [e], lambda e: DatasetEvaluators([e])],
    ids=["one", "list", "several"],
)
def test_a_report_that_fails_costs_no_results(quality, monkeypatch, caplog, wrap):
    monkeypatch.setattr(evaluate_module, "run_inference", lambda *args: {"segm": {"AP": 1.0}})
    shown = []

    def fail(quality, test_set, recipe, results):
        shown.append(str(test_set))
        raise ZeroDivisionError

    results = evaluate_module.evaluate(Trained(quality, wrap), None, use_quality=fail)

    assert shown == ["a", "b"] and list(results) == ["a", "b"]
    assert "msrcnn-d2 report" in caplog.text and "ZeroDivisionError" in caplog.text


# ---- TensorBoard


@pytest.mark.parametrize("has_calibrator", [False, True])
def test_training_logs_the_reliability_diagrams(has_calibrator):
    names = ["reliability", "reliability_of_scores"]
    results = RESULTS
    if has_calibrator:
        names.append("reliability_of_probs")
        results = [calibrated(r, 10 * [0.5]) for r in RESULTS]
    quality = quality_of(DATASET, results)
    recipe = Trained(quality)
    del recipe.test_sets[1:]
    with EventStorage(12) as storage:
        log_reliability(quality, recipe.test_sets[0], recipe, {})
        logged = list(storage._vis_data)
    assert [(name, k) for name, _, k in logged] == [(f"mask_quality/{x}", 12) for x in names]
    for _, image, _ in logged:
        assert image.shape[0] == 3 and image.dtype == np.uint8 and len(np.unique(image)) > 50


# ---- the command


def write(folder, dataset, results):
    paths = folder / "annotations.json", folder / "results.json"
    for path, content in zip(paths, (dataset, results)):
        path.write_text(json.dumps(content))
    return paths


def test_the_command(images, tmp_path):
    annotations, results = write(tmp_path, DATASET, RESULTS)

    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "msrcnn_d2_cli", "report", results, annotations]
        + ["--images", images, "--output", tmp_path / "out", "--title", "Title"],
        capture_output=True,
        text=True,
    )

    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path / "out" / "report.html") in ran.stdout
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    del numbers["thresholds"]
    assert numbers == {"title": "Title", **quality_of(DATASET, RESULTS).to_json()}
    expected = quality_of(DATASET, RESULTS).overall.ap
    for name in ("class score", "mask score", r"true IoU \(ceiling\)"):
        key = name.split(r" \(")[0].lower().replace(" ", "_")
        assert re.search(rf"{name} +\| +{expected[key]:.2f}", ran.stdout)


def run_command(monkeypatch, *arguments):
    return exit_code("report", *arguments)


def test_what_is_wrong_is_said(monkeypatch, tmp_path, capsys):
    annotations, results = write(tmp_path, DATASET, RESULTS)

    assert run_command(monkeypatch, tmp_path / "none.json", annotations) == 2
    assert "none.json' does not exist" in capsys.readouterr().err
    assert run_command(monkeypatch, results, annotations, "--images", tmp_path / "none") == 2
    assert "There is no folder" in capsys.readouterr().err
    assert run_command(monkeypatch, annotations, annotations) == 2
    assert "not a list of predictions" in capsys.readouterr().err
    assert run_command(monkeypatch, results, annotations, "--max-dets", "0") == 2
    assert "at least 1" in capsys.readouterr().err


def test_the_limit_is_that_of_the_results(monkeypatch, tmp_path):
    elsewhere = [detected(1, (40, 10, 10, 10), 0.9, 0.5)] * 100
    # The only right one is the last of 101: its precision is 1/101
    annotations, results = write(tmp_path, truth(OBJECT), [*elsewhere, detected(1, OBJECT, 0.1, 1)])
    measured = []
    monkeypatch.setattr(
        "msrcnn_d2.report.write_report", lambda quality, *args: measured.append(quality)
    )
    for limit in ([], ["--max-dets", "100"]):
        assert exit_code("report", results, annotations, *limit) == 0
    assert [x.overall.ap["class_score"] for x in measured] == [pytest.approx(100 / 101), 0]


def test_more_detections_than_count_are_mentioned(capsys):
    warn_of_more_than(2, [detected(1, OBJECT, 0.5, 0.5)] * 3 + [detected(2, OBJECT, 0.5, 0.5)])
    assert "3 predictions of one class" in capsys.readouterr().out
    warn_of_more_than(3, [detected(1, OBJECT, 0.5, 0.5)] * 3)
    assert not capsys.readouterr().out
