"""The report's section "Which threshold?": its numbers, and its script in a browser."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from msrcnn_d2.evaluation import measure_mask_quality
from msrcnn_d2.report import write_report
from msrcnn_d2.report.thresholds import readable_thresholds, thresholded_scores
from msrcnn_d2.utils.errors import UserError
from tests.helpers.command import exit_code
from tests.helpers.filled_boxes import build_coco, dataset_of, found, thing

IMAGES = range(1, 41)
OBJECT = (10, 10, 20, 20)


def one_object_per_image(score_of):
    """
    In each of 40 images an object and a detection, in every fourth image one with an IoU of 0.6
    and in the others one with an IoU of 1.

    Args:
        score_of: gives the scores in a result, by the index of the image and the true IoU.
    """
    results = []
    for k, image in enumerate(IMAGES):
        height, iou = (12, 0.6) if k % 4 == 0 else (20, 1.0)
        result = found((10, 10, 20, height), 0.5, image_id=image)
        results.append({**result, **score_of(k, iou)})
    dataset = dataset_of([thing(OBJECT, image) for image in IMAGES], IMAGES)
    return measure_mask_quality(build_coco(dataset), results)


@pytest.fixture(scope="module")
def quality():
    """The class score says little; the mask score tells the two kinds of masks apart."""
    return one_object_per_image(
        lambda k, iou: {
            "score": 0.3 + k / 100,
            "pred_mask_iou": iou,
            "mask_score": iou * (0.3 + k / 100),
            "mask_iou_probs": [0.9] * 5 + [0.8 if iou == 1 else 0.1] * 5,
        }
    )


# ---- the numbers


def test_every_score_has_its_thresholds(quality):
    scores = {s.name: s for s in thresholded_scores(quality, precision=0.95, iou=0.75)}
    assert [*scores] == ["class_score", "mask_score", "mask_iou_prob"]
    assert "0.75" in scores["mask_iou_prob"].title
    assert scores["class_score"].point.accept is None
    # In each group of four images, the last three are right
    assert scores["class_score"].point.highest == pytest.approx(18 / 23)  # images 17 to 39
    point = scores["mask_iou_prob"].point
    assert (point.accepted.count, point.accepted.right, point.accept) == (30, 30, 0.105)
    assert point.accepted.of_objects == 30 / 40 and point.dropped.count == 0  # 10 do not tell
    assert scores["mask_iou_prob"].curves["0.50"].operating_point().accepted.count == 40


def test_thresholds_have_few_digits():
    thresholds = readable_thresholds(np.array([0.0, 0.3]))
    assert (np.diff(thresholds) > 0).all() and thresholds[0] == 0 and thresholds[-1] == 1
    assert {0.87, 0.995, 0.9999, 0.001} < {*thresholds.tolist()} and len(thresholds) < 250
    others = readable_thresholds(np.array([-5.0, 7.0, 1.0]))
    assert (others[0], others[-1], len(others)) == (-5, 7, 201)


def test_numbers_in_json(quality, tmp_path):
    write_report(quality, tmp_path, precision=0.9, iou=0.5)
    numbers = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    thresholds = numbers["thresholds"]
    assert (thresholds["precision"], thresholds["iou"]) == (0.9, 0.5)
    by_class_score = thresholds["scores"]["class_score"]
    assert by_class_score["accepted"]["of_objects"] == 1  # all masks have an IoU of at least 0.5
    (row,) = (r for r in by_class_score["thresholds"] if r["threshold"] == 0.6)
    assert row["detections"] == 10
    assert row["precision"] == {"0.50": 1, "0.75": 0.8, "0.90": 0.8}  # not images 32 and 36
    assert row["found"] == {"0.50": 10 / 40, "0.75": 8 / 40, "0.90": 8 / 40}


@pytest.mark.parametrize("iou", [0.52, 0.45, 1.0, float("nan")])
def test_an_iou_that_is_none_of_cocos(iou, quality, tmp_path):
    with pytest.raises(UserError, match=rf"{iou} is none .* choose 0\.50, 0\.55"):
        write_report(quality, tmp_path, iou=iou)


@pytest.mark.parametrize(
    "precision, goal, count",
    [
        (0.9995, "99.95", "2,000"),
        (0.99999, "99.999", "100,000"),
        (0.005, "0.5", "20"),
        (0.57, "57", "20"),
    ],
)
def test_the_page_tells_the_precision_exactly(precision, goal, count, quality, tmp_path):
    text = write_report(quality, tmp_path, precision=precision).read_text()
    assert f"a precision of {goal} % at an IoU of 0.75" in text and f'value="{goal}"' in text
    assert f"at least {count} detections on its side" in text


def test_the_page_says_where_there_are_too_few_detections(quality, tmp_path):
    page = write_report(quality, tmp_path, precision=0.99)
    assert page.read_text().count("<td>never</td><td>too few to tell</td>") == 3
    page = write_report(quality, tmp_path, precision=0.95)
    assert "too few to tell</td>" not in page.read_text()


def test_scores_that_are_no_probabilities(tmp_path):
    quality = one_object_per_image(lambda k, iou: {"score": 10.0 * iou - k / 100})
    (score,) = thresholded_scores(quality)
    # 30 of 31 are 97 %
    assert (score.point.accepted.right, score.point.accepted.count) == (30, 31)
    assert len(score.rows()) == 11
    assert "class score" in write_report(quality, tmp_path).read_text()


def test_the_command_refuses_what_cannot_be_reached(capsys):
    for wrong in (["--precision", "95"], ["--precision", "x"], ["--iou", "0.72"]):
        assert exit_code("report", "results.json", "annotations.json", *wrong) == 2
        assert wrong[0] in capsys.readouterr().err


def test_the_command_passes_them_on(quality, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("msrcnn_d2.report.write_report", lambda *args: asked.append(args[-2:]))
    paths = tmp_path / "results.json", tmp_path / "annotations.json"
    for path, contents in zip(paths, (quality.results, quality.coco_gt.dataset)):
        path.write_text(json.dumps(contents))
    assert exit_code("report", *paths, "--precision", "0.9", "--iou", "0.55") == 0
    assert asked == [(0.9, 0.55)]


# ---- the script


def rows_after(page, script, tmp_path):
    """
    Opens a page in a browser, runs a script in it, and returns the cells of the three groups and
    of the table that the slider fills.
    """
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    ran = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
        + [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = ran.stdout[ran.stdout.index('id="try-thresholds"') :]
    assert 'hidden=""' not in dom[:40]

    def cells(name):
        table = re.search(rf'class="{name}".*?<tbody>(.*?)</tbody>', dom, re.DOTALL)[1]
        rows = table.split("</tr>")[:-1]
        return [re.findall(r"<td>(.*?)</td>", row) for row in rows]

    return cells("groups"), cells("readout")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_the_script_follows_the_same_rules(quality, tmp_path):
    page = write_report(quality, tmp_path)
    groups, readout = rows_after(page, "", tmp_path)
    assert groups == [
        ["≥ 0.105", "30", "100.0 %", "75.0 %"],
        ["between", "10", "0.0 %", "0.0 %"],
        ["never", "0", "–", "0.0 %"],
    ]
    assert [row[0] for row in readout] == ["100.0 %"] * 3

    script = """
        const set = (name, value) => {
          const input = document.querySelector(`[name=${name}]`);
          input.value = value;
          input.dispatchEvent(new Event("input"));
        };
        set("score", 0); set("precision", 78); set("iou", "0.90");
    """
    groups, readout = rows_after(page, script, tmp_path)
    score = thresholded_scores(quality, 0.78, 0.9)[0]
    point = score.point
    assert groups[0][:2] == [f"≥ {point.accept:g}", f"{point.accepted.count}"]
    assert groups[2][1] == f"{point.dropped.count}"
    low, high = point.accepted.interval
    shares = point.accepted.precision, point.accepted.of_objects
    assert [readout[2][0], readout[2][2]] == [f"{100 * x:.1f} %" for x in shares]
    assert readout[2][1] == f"{100 * low:.1f} % to {100 * high:.1f} %"

    groups, readout = rows_after(page, script + 'set("threshold", 0);', tmp_path)
    assert [row[0] for row in readout] == ["100.0 %", "75.0 %", "75.0 %"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize(
    "precision, accept, drop",
    [
        (0.9995, ["never", "0"], ["never", "0"]),  # it takes 2,000
        (0.99999, ["never", "0"], ["never", "0"]),
        (0.005, ["≥ 0", "40"], ["never", "0"]),  # nothing is below 0
    ],
)
def test_the_script_starts_with_any_precision(precision, accept, drop, quality, tmp_path):
    page = write_report(quality, tmp_path, precision=precision)
    groups, readout = rows_after(page, "", tmp_path)
    assert [groups[0][:2], groups[2][:2]] == [accept, drop]
    assert len(readout) == 3
