"""The exponent of the mask scores: which one is fitted, and the way it takes to a model."""

import json
import re
import sys

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from detectron2.config import instantiate

from msrcnn_d2 import MaskScoringPredictor
from msrcnn_d2.checkpoint import MaskScoringCheckpointer
from msrcnn_d2.coco_format import check_fits, read_annotations
from msrcnn_d2.fit_exponent import EXPONENTS, ExponentFit, fit_exponent
from msrcnn_d2.utils.errors import UserError
from tests.helpers.command import exit_code
from tests.helpers.toy import IMAGE_SIZE, tiny_mask_rcnn, tiny_mask_scoring_rcnn, write_coco_json
from tests.helpers.weights import EXPONENT, IOUS, fill, parameters, saved

OBJECT = [8, 8, 40, 8, 40, 40, 8, 40]
ELSEWHERE = [50, 10, 90, 10, 90, 50, 50, 50]


@pytest.fixture
def truth(tmp_path):
    """One image with one object."""
    return read_annotations(write_coco_json(tmp_path / "truth.json", [[(0, OBJECT)]]))


def results(right, wrong):
    """Two detections, each (class score, predicted IoU): of the object, and of nothing."""
    return [
        {
            "image_id": 1,
            "category_id": 1,
            "score": score,
            "pred_mask_iou": iou,
            "segmentation": [polygon],
        }
        for (score, iou), polygon in ((wrong, ELSEWHERE), (right, OBJECT))
    ]


# The right one comes first, so AP is 100, if the exponent is larger than ln 1.6 / ln 1.5 = 1.16;
# else it comes second, and AP is 50
LARGE = results(right=(0.5, 0.9), wrong=(0.8, 0.6))
# It comes first if the exponent is smaller than ln 1.5 / ln 1.8 = 0.69
SMALL = results(right=(0.9, 0.5), wrong=(0.6, 0.9))
ANY = results(right=(0.9, 0.9), wrong=(0.6, 0.5))
NONE = results(right=(0.5, 0.5), wrong=(0.6, 0.9))


@pytest.mark.parametrize("engine", ["faster-coco-eval", "pycocotools"])
def test_the_curve_by_hand(engine, truth):
    fit = fit_exponent(truth, check_fits(LARGE, truth), (1.1, 1.2, 2), engine=engine)

    expected = {0.0: 50, 1.0: 50, 1.1: 50, 1.2: 100, 2.0: 100}
    for metric in ("AP", "AP50", "AP75"):
        assert {k: v[metric] for k, v in fit.curve.items()} == pytest.approx(expected, abs=0.5)
    assert list(fit.curve) == sorted(expected)
    assert fit.exponent == 1.2 and fit.gain == pytest.approx(50, abs=0.5)


@pytest.mark.parametrize(
    "detections, exponents, expected",
    [
        (LARGE, EXPONENTS, 1.5),
        (SMALL, EXPONENTS, 0.5),
        (ANY, EXPONENTS, 1.0),
        (NONE, EXPONENTS, 1.0),  # 50 everywhere
        (SMALL, [2], 0.0),  # the only one that is right
        (SMALL, [1e-9], 1e-9),  # 0 is farther from 1 than any other
        (LARGE, [3, 1.2, 1.3], 1.2),
    ],
)
def test_of_the_best_the_one_nearest_to_the_paper(detections, exponents, expected, truth):
    assert fit_exponent(truth, check_fits(detections, truth), exponents).exponent == expected


def test_only_the_best_detections_count(truth):
    fit = fit_exponent(truth, check_fits(LARGE, truth), max_dets=1)
    assert fit.curve[1.0]["AP"] == 0 and fit.curve[1.5]["AP"] == pytest.approx(100)


def test_nothing_that_is_given_is_modified(truth):
    given = check_fits(LARGE, truth)
    before = json.dumps([given, truth.dataset])
    fit_exponent(truth, given)
    assert json.dumps([given, truth.dataset]) == before


def test_the_paper_is_the_yardstick():
    assert ExponentFit(2.0, {1.0: {"AP": 30.0}, 2.0: {"AP": 31.5}}).gain == 1.5


@pytest.mark.parametrize(
    "detections, exponents, message",
    [
        (LARGE, [-1], "at least 0, not -1"),
        (LARGE, [float("nan")], "at least 0, not nan"),
        ([{**LARGE[0], "pred_mask_iou": None}], EXPONENTS, "from a plain Mask R-CNN"),
        ([{**LARGE[0], "pred_mask_iou": 1.5}], EXPONENTS, "not a number from 0 to 1"),
        ([], EXPONENTS, "no predictions"),
    ],
)
def test_what_cannot_be_fitted(detections, exponents, message, truth):
    with pytest.raises(UserError, match=message):
        fit_exponent(truth, check_fits(detections, truth), exponents)


def test_crowds_are_no_objects_to_find(tmp_path):
    truth = read_annotations(write_coco_json(tmp_path / "x.json", [[(0, OBJECT, True)]]))
    with pytest.raises(UserError, match="no object to find but crowds"):
        fit_exponent(truth, check_fits(LARGE, truth))


# ---- msrcnn-d2 fit-exponent


@pytest.fixture
def files(tmp_path, truth):
    """The arguments RESULTS.json and ANNOTATIONS.json, beside checkpoints in.pth and plain.pth."""
    (tmp_path / "results.json").write_text(json.dumps(LARGE))
    for name, cfg in (("in", tiny_mask_scoring_rcnn()), ("plain", tiny_mask_rcnn())):
        state_dict = parameters(instantiate(cfg.model))  # without an exponent, like older files
        for leaf, value in (("weight", 0.3 * torch.randn(3, 16)), ("bias", torch.full((3,), 0.5))):
            if IOUS + leaf in state_dict:
                state_dict[IOUS + leaf] = value  # IoUs that differ
        contents = {"model": state_dict, "optimizer": {"x": torch.ones(2)}}
        saved(contents, tmp_path / f"{name}.pth")
    return tmp_path / "results.json", tmp_path / "truth.json"


def run(monkeypatch, capsys, *args):
    """Exit code and what it printed and complained about."""
    return exit_code("fit-exponent", *args), *capsys.readouterr()


def test_the_limit_is_that_of_the_results(files, monkeypatch, capsys):
    wrong, right = results(right=(0.1, 0.9), wrong=(0.8, 0.9))
    files[0].write_text(json.dumps([wrong] * 100 + [right]))
    # The only right one is the last of 101: its precision is 1/101
    rows = []
    for limit in ([], ["--max-dets", 100]):
        code, out, _ = run(monkeypatch, capsys, *files, "--exponents", 1, *limit)
        rows.append((code, re.findall(r"^\| *1 \| *([0-9.]+)", out, re.MULTILINE)))
    assert rows == [(0, ["0.99"]), (0, ["0.00"])]


def test_a_fit_is_shown(files, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, *files, "--exponents", 0.5, 2)

    assert code == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    rows = [row for row in rows if row and row[0][:1].isdigit()]
    assert [(row[0], row[-1]) for row in rows] == [
        ("0", "class score alone"),
        ("0.5", ""),
        ("1", "the paper"),
        ("2", "chosen"),
    ]
    ap = [float(row[1]) for row in rows]
    assert ap == pytest.approx([50, 50, 50, 100], abs=0.5)
    assert "2 predictions in 1 of 1 annotated images" in out
    assert f"Chosen: 2, mask AP +{ap[3] - ap[2]:.2f} compared with the paper's 1." in out
    assert "It is the largest that was tried" in out
    assert "model.roi_heads.mask_iou_head.score_exponent=2 (" in out
    assert "MODEL.ROI_MASK_IOU_HEAD.SCORE_EXPONENT 2.0)" in out


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_from_predictions_to_a_model_that_ranks_by_them(suffix, files, monkeypatch, capsys):
    folder = files[0].parent
    source, target = folder / "in.pth", folder / f"out{suffix}"
    args = ["--checkpoint", source, "--output", target]
    code, out, _ = run(monkeypatch, capsys, *files, *args)

    assert code == 0 and f"Wrote '{target}': models" in out and "IoU ** 1.5" in out
    assert "It is the largest" not in out
    found = load_file(target) if suffix == ".safetensors" else torch.load(target)["model"]
    expected = torch.load(source)["model"]
    assert found.keys() == {*expected, EXPONENT}
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    instances = predict(target)
    ious = instances.pred_mask_ious
    assert len(ious.unique()) > 1 and 0 < ious.mean() < 1
    assert torch.equal(instances.mask_scores, instances.scores * instances.pred_mask_ious**1.5)

    code, out, _ = run(
        *(monkeypatch, capsys),
        *("--exponent", 1, "--checkpoint", target, "--output", folder / "back.pth"),
    )
    assert code == 0 and out.count("\n") == 1
    instances = predict(folder / "back.pth")
    assert torch.equal(instances.mask_scores, instances.scores * instances.pred_mask_ious)


def predict(checkpoint):
    cfg = OmegaConf.create(flags={"allow_objects": True})
    cfg.model = tiny_mask_scoring_rcnn().model
    cfg.train = {"init_checkpoint": str(checkpoint)}
    torch.manual_seed(0)
    image = torch.randint(0, 255, (*IMAGE_SIZE, 3), dtype=torch.uint8).numpy()
    return MaskScoringPredictor(cfg, device="cpu")(image)["instances"]


def test_a_config_has_the_last_word(files, monkeypatch, capsys):
    target = files[0].parent / "out.pth"
    args = ["--checkpoint", files[0].parent / "in.pth", "--output", target]
    assert run(monkeypatch, capsys, "--exponent", 4, *args)[0] == 0
    for configured, expected in ((None, 4.0), (1.0, 1.0), (2.0, 2.0)):
        cfg = tiny_mask_scoring_rcnn()
        cfg.model.roi_heads.mask_iou_head.score_exponent = configured
        model = instantiate(cfg.model)
        fill(model)
        MaskScoringCheckpointer(model).load(str(target), strict=True)
        assert model.roi_heads.mask_iou_head.score_exponent == expected


def with_results(contents):
    return lambda f: (f / "results.json").write_text(json.dumps(contents))


def nothing(folder):
    pass


# What is changed before, the arguments, and what is wrong
WRITE = ["--checkpoint", "in.pth", "--output", "out.pth"]
FIT = ["results.json", "truth.json"]
CLI_ERRORS = {
    "no arguments": (nothing, [], "Give RESULTS.json and ANNOTATIONS.json"),
    "no annotations": (nothing, FIT[:1], "Give RESULTS.json and ANNOTATIONS.json"),
    "no output": (nothing, [*FIT, *WRITE[:2]], "--checkpoint IN and --output OUT together"),
    "no checkpoint": (nothing, [*FIT, *WRITE[2:]], "--checkpoint IN and --output OUT together"),
    "exponent to nowhere": (nothing, ["--exponent", "2"], "give --checkpoint and --output"),
    "exponent and fit": (nothing, [*FIT, *WRITE, "--exponent", "2"], "replaces a fit"),
    "negative": (nothing, ["--exponent", "-2", *WRITE], "at least 0, not -2"),
    "infinite": (nothing, [*FIT, "--exponents", "1", "inf"], "at least 0, not inf"),
    "no detections": (nothing, [*FIT, "--max-dets", "0"], "at least 1, not '0'"),
    "missing results": (nothing, ["none.json", FIT[1]], "none.json' does not exist"),
    "missing annotations": (nothing, [FIT[0], "none.json"], "none.json' does not exist"),
    "pickle": (nothing, ["in.pth", FIT[1]], "in.pth' is not JSON"),
    "empty results": (with_results([]), FIT, "has no predictions"),
    "annotations as results": (nothing, [FIT[1], FIT[1]], "is not a list of predictions"),
    "results as annotations": (nothing, [FIT[0], FIT[0]], "no list of annotations"),
    "plain Mask R-CNN": (
        with_results([{k: v for k, v in LARGE[0].items() if k != "pred_mask_iou"}]),
        [*FIT, *WRITE],
        "come from a plain Mask R-CNN",
    ),
    "other images": (with_results([{**LARGE[0], "image_id": 7}]), FIT, "1 image id"),
    "plain checkpoint": (
        nothing,
        [*FIT, "--checkpoint", "plain.pth", *WRITE[2:]],
        "plain.pth' (.*) has no mask IoU head",
    ),
    "missing checkpoint": (nothing, [*FIT, "--checkpoint", "no.pth", *WRITE[2:]], "does not exist"),
    "same file": (nothing, [*FIT, *WRITE[:2], "--output", "in.pth"], "is the input"),
    "no folder": (nothing, [*FIT, *WRITE[:2], "--output", "no/out.pth"], "The folder of"),
    "suffix": (nothing, [*FIT, *WRITE[:2], "--output", "out.pkl"], "has to end with one of"),
}


@pytest.mark.parametrize("case", CLI_ERRORS)
def test_it_fails_in_one_sentence_and_writes_nothing(case, files, monkeypatch, capsys):
    change, args, message = CLI_ERRORS[case]
    folder = files[0].parent
    monkeypatch.chdir(folder)
    change(folder)
    (folder / "out.pth").write_bytes(b"precious")
    before = {p: p.read_bytes() for p in folder.iterdir()}

    code, out, err = run(monkeypatch, capsys, *args)

    assert code == 2 and not out
    assert re.search(f"^error: .*{message}", err) and err.count("\n") == 1, err
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_an_engine_that_is_not_installed(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    code, _, err = run(monkeypatch, capsys, *files, "--engine", "faster-coco-eval")
    assert code == 2 and "pip install faster-coco-eval" in err
    assert run(monkeypatch, capsys, *files)[0] == 0  # by default the other one


def test_help(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--help")
    assert code == 0
    assert "Never fit on the images that you report results of" in out
    for text in ("msrcnn-d2 train", "msrcnn-d2 evaluate", "msrcnn-d2 fit-exponent", "%"):
        assert (text in out) is (text != "%")
