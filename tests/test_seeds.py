"""projects/seeds: tables of several seeds, from runs whose numbers can be worked out by hand."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import compare
import detections
import measures
import tables
from msrcnn_d2.calibration import Samples
from msrcnn_d2.evaluation.average_precision import AveragePrecision
from msrcnn_d2.modeling import CUES, MaskCalibrator
from tests.helpers.filled_boxes import build_coco, dataset_of, found, thing

OBJECT, OTHER, NOWHERE = (0, 0, 20, 20), (40, 0, 20, 20), (80, 60, 20, 20)
NUM_CUES = len(CUES)


def found_in(results, num_images=1):
    """Two objects in each image, and these detections in each; their cues are all 0."""
    ids = list(range(1, num_images + 1))
    truth = [{**thing(box, k)} for k in ids for box in (OBJECT, OTHER)]
    results = [{**r, "bbox": [0, 0, 20, 20], "image_id": k} for k in ids for r in results]
    ranking = AveragePrecision(
        build_coco(dataset_of(truth, image_ids=ids)), results, max_dets=[100]
    )
    scores = torch.tensor([r.get("mask_score", r["score"]) for r in results])
    right = torch.tensor(ranking.overlaps.largest >= 0.5)[:, None].expand(-1, 10)
    samples = Samples(
        cues=torch.zeros(len(results), NUM_CUES),
        score_log_odds=torch.logit(scores),
        right=right,
        counted=torch.ones(len(results), dtype=torch.bool),
        images=torch.tensor([r["image_id"] for r in results]),
    )
    return detections.Found(ranking, samples, ids)


def results(wrong_iou=0.1):
    """Two right masks, and before them by class score a wrong one with this predicted IoU."""
    return [found(OBJECT, 0.8, 0.9), found(OTHER, 0.7, 0.8), found(NOWHERE, 0.9, wrong_iou)]


def of_a_plain_model():
    return [found(OBJECT, 0.8), found(OTHER, 0.7), found(NOWHERE, 0.9)]


def ranked(ap, laece):
    honesty = {f"{kind}{k}": laece for kind in ("ece", "brier") for k in (50, 75)}
    numbers = {"ap": ap, "ap50": ap, "ap75": ap, "gap_closed": 0.5, "laece": laece, **honesty}
    return {**numbers, "laece_iou": laece / 2}


def run_of(model, seed, wrong_iou=0.1, train_ap=34.0):
    """A run whose own ranking has 32.0 mask AP."""
    own = results(wrong_iou) if model == "ms_rcnn" else of_a_plain_model()
    numbers = measures.measure(
        {"val": found_in(own), "holdout": found_in(own), "train": found_in(own)}
    )
    rankings = {"class_score": ranked(32.0, 0.2)}
    if model == "ms_rcnn":
        rankings["mask_score"] = ranked(32.0, 0.2)
    rankings |= {"train": ranked(train_ap, 0.05), "holdout": ranked(33.0, 0.12)}
    rankings["true_iou"] = {"ap": 36.0, "ap50": 36.0, "ap75": 36.0}
    fit = {"images": 200, "detections": 2000, "with_network": True}
    few = {"images": 10, "detections": 100 + seed, "with_network": seed == 0}
    return {
        **{"model": model, "seed": seed, **numbers, "rankings": rankings},
        "fits": {"holdout": fit, "train": {**fit, "images": 1000}},
        "precisions": {
            part: {iou: [50.5, 60.0, 70.0, 80.0, 90.0 + seed, None] for iou in ("0.50", "0.75")}
            for part in ("train", "holdout")
        },
        "cues": {"all cues": 33.0, "class score and predicted IoU": 32.5},
        "amounts": [
            {**few, "part": "holdout", "ap": 32.0 + few["with_network"], "ap_with_network": 31.0},
            {**fit, "part": "train", "ap": 33.5, "ap_with_network": 33.5},
        ],
    }


RUNS = [run_of(m, s) for s in (0, 1) for m in ("mask_rcnn", "ms_rcnn")]


def rows_of(text, title, key=1):
    """{the first cells, joined: other cells} of a table."""
    table = text.split(f"### {title}")[1].split("###")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {", ".join(row[:key]): row[key:] for row in cells}


def test_the_table_has_each_model_under_its_ranking():
    text = tables.tables(RUNS)

    # By class score the wrong one comes first: precision 2/3 at every recall. Else it is last: 1
    expected = ["66.7 ± 0.0", "66.7 ± 0.0", "100.0 ± 0.0", "100.0 ± 0.0"]
    assert rows_of(text, "Results on val")["mask AP"] == expected
    assert rows_of(text, "Results on val")["AP90"] == expected
    assert RUNS[1]["ap"]["class_score"] == pytest.approx(200 / 3)
    json.dumps(RUNS)


def test_claims_hold_if_they_do_for_every_seed():
    # With the second seed the mask scores change nothing
    text = tables.tables([run_of("ms_rcnn", 0), run_of("ms_rcnn", 1, wrong_iou=0.9)])
    claims = rows_of(text, "What the paper claims")
    assert claims["mask scores raise mask AP"] == ["+16.67 ± 23.57", "for 1 of 2 seeds"]
    assert claims["the gain grows from IoU 0.50 to 0.75"][-1] == "no"
    assert "box AP does not change" not in claims  # no plain model to compare with


def test_box_ap_is_compared_with_the_plain_model():
    claims = rows_of(tables.tables(RUNS), "What the paper claims")
    assert claims["box AP does not change"][-1] == "yes, within 2 standard errors"
    claims = rows_of(tables.tables(RUNS[:2]), "What the paper claims")
    assert claims["box AP does not change"][-1] == "one seed cannot tell"


def test_better_heads():
    text = tables.tables([run_of("ms_rcnn", 0, wrong_iou=0.85)])
    aps = {
        k: v[0] for k, v in rows_of(text, "What better predictions of the IoU would bring").items()
    }
    assert aps["class score x predicted IoU"] == "66.7"
    # 0.9 x 0.85 for the wrong one is less than 0.8 x 1 but not than 0.7 x 1
    assert aps["the same, with the true IoU where that is at least 0.5"] == "83.5"
    assert aps["the same, with the true IoU where that is below 0.5"] == "100.0"
    assert aps["class score x true IoU"] == "100.0"


def test_retrofits_have_a_table_of_their_own():
    def retrofit_of(learned_from, seed, ap):
        run = run_of("ms_rcnn", seed)
        run["rankings"]["mask_score"] = {**ranked(ap, 0.2), "gap_closed": (ap - 32) / 4}
        return {**run, "model": f"retrofit_on_{learned_from}"}

    retrofits = [retrofit_of("proposals", 0, 32.5), retrofit_of("detections", 0, 33.0)]
    retrofits += [retrofit_of("proposals", 1, 32.7), retrofit_of("detections", 1, 33.4)]
    text = tables.tables([*RUNS, *retrofits])
    found = rows_of(text, "What a head learns from", key=2)
    assert len(found) == 7
    expected = ["33.20 ± 0.28", "+1.20 ± 0.28", "33.2 ± 0.3", "33.2 ± 0.3", "30 ± 7"]
    assert found["mask score (the paper), from detections"] == expected
    assert found["class score, none"][:2] == ["32.00 ± 0.00", ""]
    assert found["calibrated on training images, none"][1] == "+2.00 ± 0.00"
    assert len(rows_of(text, "What its predictions are worth")) == 2
    assert text.startswith(tables.tables(RUNS))  # nothing else changes


def test_gains_are_paired_per_seed():
    text = tables.tables([run_of("ms_rcnn", 0, train_ap=34.0), run_of("ms_rcnn", 1, train_ap=36.0)])
    rows = rows_of(text, "Calibrated scores", key=2)
    score = "Mask Scoring R-CNN, calibrated on training images"
    # 34 and 36; 2 and 4 more than by mask score
    assert rows[score][:2] == ["35.00 ± 1.41", "+3.00 ± 1.41"]
    assert rows[score][-3:] == ["50 ± 0", "0.050 ± 0.000", "0.025 ± 0.000"]
    assert rows["Mask Scoring R-CNN, true IoU (ceiling)"][-3:] == ["", "", ""]


def test_a_model_that_loses_by_calibration_is_counted():
    runs = [run_of("mask_rcnn", 0, train_ap=31.5), *RUNS[1:]]
    rows = rows_of(tables.tables(runs), "What holds for calibrated scores")
    measured, holds = rows[
        "calibrated on training images: mask AP is higher than by the model's own score"
    ]
    assert measured == "-0.50 to +2.00" and holds == "for 3 of 4 models"
    # 0.05, 0.025, 0.12 and 0.06 of 0.2
    answers = [row[-1] for name, row in rows.items() if "LaECE_0" in name]
    assert answers == ["yes", "yes", "no", "yes"]


def test_thresholds_that_keep_their_word():
    found = rows_of(tables.tables(RUNS), "Do thresholds keep their word?", key=3)
    assert len(found) == 8
    row = found["Mask R-CNN, 0.75, calibrated on training images"]
    assert row == ["50 ± 0", "60 ± 0", "70 ± 0", "80 ± 0", "90 ± 1", ""]


def test_precisions_are_counted_above_the_threshold():
    val = found_in(results())  # two of three are right
    calibrator = MaskCalibrator()  # P = mask score; the wrong one has 0.09
    calibrator.accept_thresholds[0, [49, 79]] = torch.tensor([0.05, 0.1])
    measured = measures.measure_precisions(val, {"train": calibrator})["train"]
    assert measured["0.50"] == [pytest.approx(200 / 3), None, None, 100, None, None]
    assert measured["0.75"] == [None] * 6


def test_few_images_and_all():
    rows = rows_of(tables.tables(RUNS), "How many images a calibrator needs", key=2)
    assert list(rows) == [
        *("held-out images, 10", "held-out images, 200"),
        *("training images, 200", "training images, 1000"),
    ]
    # Only the first seed's models are ranked anew; the others would lose 1
    expected = ["100", "+0.50 ± 0.71", "+0.50 ± 0.71", "+0.00", "2 of 4", "-1.00"]
    assert rows["held-out images, 10"] == expected
    assert rows["training images, 1000"][1] == "+2.00 ± 0.00"


def test_transfer():
    groups = {
        "all": {"class_score": ranked(30.0, 0.2), "train": ranked(31.0, 0.1)},
        "stained": {
            **{"class_score": ranked(20.0, 0.3), "train": ranked(21.0, 0.1)},
            **{"fluorescence": ranked(19.0, 0.4), "true_iou": {"ap": 40.0}},
        },
    }
    runs = [{**run, "transfer": groups} for run in RUNS]
    rows = rows_of(tables.tables(runs), "Calibrators on images of another kind", key=2)
    assert list(rows) == [
        "all, all training images",
        "stained, all training images",
        "stained, fluorescence training images",
    ]
    loss, error = rows["stained, fluorescence training images"][:2]
    assert loss == "-1.00 ± 0.00" and error == "0.400 ± 0.000 (0.300 ± 0.000)"


def test_a_calibrator_that_knows_no_iou_gets_none():
    samples = found_in(results()).samples
    samples.cues[:] = torch.arange(3)[:, None] + 1.0
    names = measures.CUE_SETS["class score"]
    without = measures.with_cues(samples, names)
    assert (without.cues != 0).sum(dim=1).tolist() == [1, 1, 1]
    assert without.score_log_odds.tolist() == [1, 2, 3]  # of the class score
    everything = measures.with_cues(samples, measures.CUE_SETS["all cues"])
    assert torch.equal(everything.cues, samples.cues)
    assert torch.equal(everything.score_log_odds, samples.score_log_odds)


def test_rankings_of_calibrators():
    val = found_in(results(wrong_iou=0.95))
    # The line alone says what the mask score says, and the other way round
    same, reverse = MaskCalibrator(), MaskCalibrator()
    reverse.slope.fill_(-1)
    numbers, quality = measures.measure_rankings(val, {"same": same, "reverse": reverse})
    assert numbers["same"]["ap"] == numbers["mask_score"]["ap"] == pytest.approx(200 / 3)
    assert numbers["reverse"]["ap"] == numbers["true_iou"]["ap"] == pytest.approx(100)
    assert numbers["reverse"]["gap_closed"] == pytest.approx(1)
    # Mask scores 0.72, 0.56 and 0.855 of masks that are right, right and wrong
    assert numbers["same"]["brier50"] == pytest.approx((0.28**2 + 0.44**2 + 0.855**2) / 3)
    assert quality.overall.ap["quality_score"] == pytest.approx(100)  # of the last one


def test_amounts():
    both = [*results(), found((40, 0, 20, 16), 0.3, 0.5)]
    parts = {part: found_in(both, n) for part, n in (("val", 1), ("holdout", 12), ("train", 14))}
    rows = measures.measure_amounts(parts, seed=0)
    assert [(r["part"], r["images"], r["detections"]) for r in rows] == [
        ("holdout", 10, 40),
        ("train", 12, 48),
    ]
    assert all(math.isfinite(r["ap"]) for r in rows)


def test_detections_of_some_images():
    part = found_in(results(), num_images=3).in_images([2])
    assert {r["image_id"] for r in part.results} == {2}
    assert part.image_ids == [2] and len(part.samples) == 3
    assert part.ranking.evaluate([0.8, 0.7, 0.1]).numbers["AP"] == pytest.approx(1)


def test_what_is_measured_is_kept(tmp_path):
    assert compare.kept(tmp_path / "x.json", lambda: {"ap": 1.5}) == {"ap": 1.5}
    assert compare.kept(tmp_path / "x.json", lambda: {"ap": 2.5}) == {"ap": 1.5}


@pytest.mark.parametrize("colours, expected", [((90, 90, 90), False), ((200, 120, 180), True)])
def test_coloured_images_are_stained(tmp_path, colours, expected):
    Image.fromarray(np.full((4, 4, 3), colours, dtype=np.uint8)).save(tmp_path / "x.png")
    assert compare.is_coloured(tmp_path / "x.png") is expected


def test_missing_data_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "nuclei"])
    with pytest.raises(SystemExit) as error:
        compare.main()
    assert error.value.code == 2
    assert "prepare.py" in capsys.readouterr().err
