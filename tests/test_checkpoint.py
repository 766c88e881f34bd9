"""Own checkpoints, contents rather than suffixes, strictness, and the converter."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d

from msrcnn_d2.checkpoint import MaskScoringCheckpointer
from msrcnn_d2.utils.errors import UserError
from tests.helpers.command import exit_code
from tests.helpers.toy import NUM_CLASSES, tiny_mask_scoring_rcnn
from tests.helpers.weights import (
    BODY,
    BOXES,
    GOOD,
    HEADS,
    IOUS,
    MASKS,
    MMDETECTION,
    PAPER,
    RPN,
    SCORES,
    arrays,
    assert_has,
    error_of,
    fill,
    load,
    pickled,
    renamed,
    saved,
    slim_model,
    weights_for,
    with_background_first,
)

# ---- own checkpoints


@pytest.mark.parametrize("cascade", [False, True], ids=["standard", "cascade"])
def test_round_trip(cascade, tmp_path):
    model = instantiate(tiny_mask_scoring_rcnn(cascade).model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    MaskScoringCheckpointer(model, str(tmp_path), optimizer=optimizer).save("a", iteration=7)
    expected = {k: v.clone() for k, v in model.state_dict().items()}

    fill(model)
    other = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    checkpointer = MaskScoringCheckpointer(model, str(tmp_path), optimizer=other)
    extras = checkpointer.resume_or_load("nowhere.pth", resume=True)
    assert extras == {"iteration": 7}
    assert_has(model, expected)
    assert other.param_groups[0]["lr"] == 0.25
    state = other.state_dict()["state"]
    assert all(
        torch.equal(state[k]["momentum_buffer"], v["momentum_buffer"])
        for k, v in optimizer.state_dict()["state"].items()
    )

    fill(model)  # the model only
    untouched = torch.optim.SGD(model.parameters(), lr=1.0)
    checkpointer = MaskScoringCheckpointer(model, str(tmp_path), optimizer=untouched)
    extras = checkpointer.resume_or_load(str(tmp_path / "a.pth"), resume=False)
    assert_has(model, expected)
    assert untouched.param_groups[0]["lr"] == 1.0 and extras["iteration"] == 7

    fill(model)
    DetectionCheckpointer(model).load(str(tmp_path / "a.pth"))
    assert_has(model, expected)


def test_resuming_needs_a_complete_checkpoint(tiny, tmp_path):
    checkpointer = MaskScoringCheckpointer(tiny, str(tmp_path))
    state_dict = weights_for(tiny)
    del state_dict[IOUS + "bias"]
    saved({"model": state_dict}, tmp_path / "last.pth")
    checkpointer.tag_last_checkpoint("last.pth")
    with pytest.raises(UserError, match="mask_iou_head.predictor.bias"):
        checkpointer.resume_or_load("", resume=True)
    checkpointer.tag_last_checkpoint("gone.pth")
    with pytest.raises(UserError, match="No checkpoint in .* can be read, of .*gone.pth"):
        checkpointer.resume_or_load("", resume=True)


def test_nothing_to_load(tiny):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    checkpointer = MaskScoringCheckpointer(tiny)
    assert checkpointer.load("") == checkpointer.resume_or_load("", resume=True) == {}
    assert_has(tiny, before)


def test_selected_checkpointables(tiny, tmp_path):
    first, second = (torch.optim.SGD(tiny.parameters(), lr=lr) for lr in (0.5, 0.25))
    MaskScoringCheckpointer(tiny, str(tmp_path), first=first, second=second).save("a")
    first.param_groups[0]["lr"] = second.param_groups[0]["lr"] = 1.0
    checkpointer = MaskScoringCheckpointer(tiny, first=first, second=second)
    extras = checkpointer.load(str(tmp_path / "a.pth"), ["second"])
    assert (first.param_groups[0]["lr"], second.param_groups[0]["lr"]) == (1.0, 0.25)
    assert extras.keys() == {"first"}


# ---- by content, not by file name


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "old pickle", "safetensors", "half"])
def test_content_decides_not_the_suffix(kind, suffix, tiny, tmp_path):
    expected, file = weights_for(tiny), tmp_path / f"weights{suffix}"
    if kind == "half":
        expected = {k: v.half() for k, v in expected.items()}
    if kind in ("safetensors", "half"):
        save_file(expected, file)
    elif kind in ("zip", "legacy"):
        saved({"model": expected}, file, _use_new_zipfile_serialization=kind == "zip")
    else:
        protocol = 0 if kind == "old pickle" else 4
        pickled({"model": arrays(expected), "__author__": "x"}, file, protocol)
    load(tiny, file)
    assert_has(tiny, expected)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_wrappers_and_prefixes_of_parallel_and_compiled_models(wrapper, prefix, tiny, tmp_path):
    expected = weights_for(tiny)
    theirs = {prefix + k: v for k, v in expected.items()}
    load(tiny, saved({wrapper: theirs} if wrapper else theirs, tmp_path / "x.pth"))
    assert_has(tiny, expected)


# Where a file keeps weights, and where averages of them: both as functions of state dicts
NESTED = {
    "averages beside": lambda weights, other: {"model": weights, "ema": {"module": other}},
    "averages beside, nested": lambda weights, other: {
        "state_dict": {"model": prefixed("model.", weights)},
        "ema_state_dict": other,
    },
    "averages among them": lambda weights, other: {
        "state_dict": {**prefixed("ema_model.module.", other), **prefixed("model.", weights)}
    },
    "averages only": lambda weights, other: {"ema_state_dict": prefixed("module.", weights)},
    "counted by PyTorch's AveragedModel": lambda weights, other: {
        "model": {"n_averaged": torch.tensor(3), **prefixed("module.", weights)}
    },
    "averages only, by names": lambda weights, other: prefixed("ema.", weights),
    "inside of names": lambda weights, other: {
        re.sub(r"^(backbone|roi_heads)\.", r"\1._orig_mod.", k): v for k, v in weights.items()
    },
}


def prefixed(prefix, state_dict):
    return {prefix + k: v for k, v in state_dict.items()}


@pytest.mark.parametrize("case", NESTED)
def test_weights_are_taken_from_wrappers_and_what_is_taken_is_said(case, tiny, tmp_path):
    expected = weights_for(tiny)
    other = {k: v + 1 for k, v in expected.items()}
    lines = load(tiny, saved(NESTED[case](expected, other), tmp_path / "x.pth"))
    assert_has(tiny, expected)
    told = [line for line in lines if "averaged weights (EMA)" in line]
    assert len(told) == ("averages" in case)
    assert all(("only" in case) == ("those are taken" in line) for line in told)


def test_an_unknown_prefix_is_refused_by_name(tiny, monkeypatch, capsys, tmp_path):
    file = saved({"model": prefixed("teacher.", weights_for(tiny))}, tmp_path / "x.pth")
    assert "its names begin with 'teacher.'" in error_of(tiny, file, strict=False)
    code, _, err = run_cli(monkeypatch, capsys, file, tmp_path / "out.pth")
    assert code == 2 and "such as teacher.backbone." in err
    assert not (tmp_path / "out.pth").exists()


def test_two_sets_of_weights_are_refused_by_name(tiny, tmp_path):
    name = RPN + "conv.weight"
    state_dict = {**weights_for(tiny), f"module.{name}": torch.ones(1)}
    message = error_of(tiny, saved({"model": state_dict}, tmp_path / "x.pth"))
    assert f"'{name}' and 'module.{name}' are the same parameter" in message


# ---- strictness


def altered(model, path, change):
    state_dict = weights_for(model)
    change(state_dict)
    return saved({"model": state_dict}, path)


def more_classes(state_dict):
    for prefix, rows in [(SCORES, 6), (BOXES, 20), (MASKS, 5), (IOUS, 5)]:
        for leaf in ("weight", "bias"):
            shape = state_dict[prefix + leaf].shape
            state_dict[prefix + leaf] = torch.rand(rows, *shape[1:])


def without(*prefixes):
    def change(state_dict):
        for name in [k for k in state_dict if k.startswith(prefixes)]:
            del state_dict[name]

    return change


def wider(state_dict):
    state_dict[HEADS + "box_head.fc1.bias"] = torch.rand(17)


STRICT = {
    "one missing": (without(RPN + "conv.bias"), f"it does not provide {RPN}conv.bias. The config"),
    "classes": (more_classes, r"5 classes, the model 3. .*num_classes=5 .*NUM_CLASSES 5"),
    "no mask IoU head": (
        without(HEADS + "mask_iou_head."),
        r"plain Mask R-CNN.* mask IoU head has no weights .*mask_iou_head\..*--retrofit",
    ),
    "half a mask IoU head": (without(IOUS), r"mask IoU head has no weights .*predictor\.weight"),
    "shape": (
        wider,
        r"box_head.fc1.bias' has shape \(17,\) in the file and \(16,\) in the model\.",
    ),
    "one too many": (lambda x: x.update(extra=torch.ones(1)), "the model has no extra. The config"),
    "backbone only": (without(RPN, HEADS, "backbone.fpn"), "weights of a backbone only"),
    "another": (lambda x: (x.clear(), x.update(a=torch.ones(1))), "none of the model's parameters"),
}


@pytest.mark.parametrize("case", STRICT)
def test_strict(case, tiny, tmp_path):
    change, message = STRICT[case]
    file = altered(tiny, tmp_path / "x.pth", change)
    found = error_of(tiny, file)
    assert re.search(message, found), found
    assert found.startswith(f"'{file}' (Detectron2) does not fit the model: ")
    assert found.count(". ") <= 2 and "  " not in found


def test_a_mask_rcnn_takes_a_retrofitted_one(plain, slim, tmp_path):
    expected = weights_for(slim)
    lines = load(plain, saved({"model": expected}, tmp_path / "x.pth"))
    assert_has(plain, expected)
    assert "Not used, since the model has none: roi_heads.mask_iou_head." in lines[1]


FRESH = {
    "classes": (
        more_classes,
        [SCORES, BOXES, MASKS, IOUS],
        "box_predictor, roi_heads.mask_head, roi_heads.mask_iou_head.",
    ),
    "no mask IoU head": (
        without(HEADS + "mask_iou_head."),
        [HEADS + "mask_iou_head."],
        "part: roi_heads.mask_iou_head.",
    ),
    "backbone only": (
        without(RPN, HEADS, "backbone.fpn"),
        [RPN, HEADS, "backbone.fpn"],
        "proposal_generator.rpn_head, roi_heads.box_head",
    ),
}


@pytest.mark.parametrize("case", FRESH)
def test_training_starts_heads_fresh_and_says_so(case, tiny, tmp_path):
    change, fresh, message = FRESH[case]
    expected = weights_for(tiny)
    lines = load(tiny, altered(tiny, tmp_path / "x.pth", change), strict=False)
    assert_has(tiny, expected, but=fresh)
    names = [k for k in expected if not k.endswith("num_batches_tracked")]
    count = sum(not k.startswith(tuple(fresh)) for k in names)
    assert f"Loaded {count} of {len(names)} parameters from '" in lines[0]
    assert "Starting fresh, in whole or in part" in lines[0] and message in lines[0]
    assert ("the file has 5 classes, the model 3" in lines[0]) is (case == "classes")


def test_frozen_parameters_do_not_stay_random(tiny, tmp_path):
    file = altered(tiny, tmp_path / "x.pth", without(BODY + "stem"))
    load(tiny, file, strict=False)
    tiny.backbone.bottom_up.stem.requires_grad_(False)
    message = error_of(tiny, file, strict=False)
    assert re.search(r"does not provide backbone\.bottom_up\.stem\.\S+.*stay random", message)


FROZEN_NORM = BODY + "res4.0.conv1.norm."


@pytest.mark.parametrize("absent", [FROZEN_NORM, FROZEN_NORM + "running_var"])
def test_a_frozen_batch_norm_does_not_stay_the_identity(absent, slim, tmp_path):
    """Its numbers are buffers, not parameters: such as of a ResNet of less depth."""
    assert isinstance(slim.backbone.bottom_up.res4[0].conv1.norm, FrozenBatchNorm2d)
    file = altered(slim, tmp_path / "x.pth", without(absent))
    assert f"does not provide {absent}" in error_of(slim, file, strict=False)
    trained = slim_model("MODEL.RESNETS.NORM", "BN")
    load(trained, file, strict=False)


def test_a_backbone_is_not_retrofitted(slim, tmp_path):
    for name, parameter in slim.named_parameters():
        parameter.requires_grad_("mask_iou_head" in name)
    try:
        file = altered(slim, tmp_path / "x.pth", without("backbone.fpn", "proposal", "roi_heads"))
        assert "weights of a backbone only" in error_of(slim, file, strict=False)
    finally:
        slim.requires_grad_(True)


@pytest.mark.parametrize("strict", [True, False])
def test_the_number_of_classes_of_frozen_heads(strict, tiny, tmp_path):
    state_dict = weights_for(tiny)
    for leaf in ("weight", "bias"):
        state_dict[SCORES + leaf] = state_dict[SCORES + leaf][:2]
    tiny.roi_heads.box_predictor.requires_grad_(False)
    message = error_of(tiny, saved({"model": state_dict}, tmp_path / "x.pth"), strict)
    assert f"it has 1 class, the model {NUM_CLASSES}. Set" in message


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integers_are_no_parameters(dtype, strict, tiny, tmp_path):
    """As in quantised files, where they mean something only together with a scale."""
    name = RPN + "conv.weight"
    state_dict = weights_for(tiny)
    state_dict[name] = state_dict[name].to(dtype)
    message = error_of(tiny, saved({"model": state_dict}, tmp_path / "x.pth"), strict)
    assert f"'{name}' is of type {dtype} in the file and torch.float32 in the model" in message


def test_the_optimizer_of_another_training(tiny, tmp_path):
    saved({"model": weights_for(tiny), "optimizer": {"param_groups": []}}, tmp_path / "x.pth")
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.1)
    with pytest.raises(UserError, match="of another training: its optimizer does not fit"):
        MaskScoringCheckpointer(tiny, optimizer=optimizer).load(str(tmp_path / "x.pth"))


def test_nothing_fits_even_for_training(tiny, tmp_path):
    file = saved({"model": {"a.weight": torch.ones(2)}}, tmp_path / "x.pth")
    assert "none of the model's parameters" in error_of(tiny, file, strict=False)


def test_classes_of_a_cascade(tmp_path):
    model = instantiate(tiny_mask_scoring_rcnn(cascade=True).model)
    state_dict = weights_for(model)
    for stage in range(3):
        for leaf in ("weight", "bias"):
            name = f"{HEADS}box_predictor.{stage}.cls_score.{leaf}"
            state_dict[name] = torch.rand(6, *state_dict[name].shape[1:])
    message = error_of(model, saved({"model": state_dict}, tmp_path / "x.pth"))
    assert f"5 classes, the model {NUM_CLASSES}" in message


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("value, kind", [("nan", "NaN"), ("-inf", "infinite")])
def test_weights_that_are_not_finite_are_refused_by_name(value, kind, strict, tiny, tmp_path):
    state_dict = weights_for(tiny)
    state_dict[IOUS + "bias"][0] = float(value)
    message = error_of(tiny, saved({"model": state_dict}, tmp_path / "x.pth"), strict)
    assert f"'{IOUS}bias' has values that are {kind} (1 of {NUM_CLASSES})" in message


def test_a_run_does_not_go_on_from_weights_that_are_not_finite(tiny, tmp_path):
    weights = weights_for(tiny)
    weights[IOUS + "bias"][0] = float("nan")
    tiny.load_state_dict({**tiny.state_dict(), **weights})
    MaskScoringCheckpointer(tiny, str(tmp_path)).save("model_0000001")
    with pytest.raises(UserError, match=re.escape(IOUS + "bias")):
        MaskScoringCheckpointer(tiny, str(tmp_path)).resume_or_load("", resume=True)


# ---- the exponent that version 0.1 saved

EXPONENT = HEADS + "mask_iou_head.score_exponent"


def with_exponent(model, path, exponent):
    value = torch.tensor(exponent, dtype=torch.float32)
    return saved({"model": {**weights_for(model), EXPONENT: value}}, path)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exponent_of_1_changes_nothing(strict, tiny, tmp_path):
    file = with_exponent(tiny, tmp_path / "x.pth", 1 + 5e-7)
    names = [k for k in weights_for(tiny) if not k.endswith("num_batches_tracked")]
    assert load(tiny, file, strict) == [
        f"Loaded {len(names)} of {len(names)} parameters from '{file}' (Detectron2)."
    ]
    assert_has(tiny, weights_for(tiny))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("exponent", [4.0, 0.0, 1 + 5e-6])
def test_another_exponent_is_refused(exponent, strict, tiny, tmp_path):
    message = error_of(tiny, with_exponent(tiny, tmp_path / "x.pth", exponent), strict)
    assert EXPONENT in message and "msrcnn-d2 convert" in message


def test_a_mask_rcnn_has_no_use_for_the_exponent(plain, slim, tmp_path):
    lines = load(plain, with_exponent(slim, tmp_path / "x.pth", 4.0))
    assert "Not used, since the model has none: roi_heads.mask_iou_head." in lines[1]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_convert_leaves_the_exponent_out(suffix, slim, monkeypatch, capsys, tmp_path):
    source, target = with_exponent(slim, tmp_path / "in.pth", 4.0), tmp_path / f"out{suffix}"
    code, out, _ = run_cli(monkeypatch, capsys, source, target)
    assert code == 0 and "exponent" in out
    assert f": {len(weights_for(slim))} parameters, " in out
    load(slim, target)
    assert_has(slim, weights_for(slim))


# ---- msrcnn-d2 convert


def run_cli(monkeypatch, capsys, *args):
    """Exit code and what it printed and complained about."""
    return exit_code("convert", *args), *capsys.readouterr()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_convert(suffix, half, plain, monkeypatch, capsys, tmp_path):
    expected = weights_for(plain)
    big = BODY + "stem.conv1.norm.running_var"
    expected[big] = torch.full_like(expected[big], 1e5)  # too large for float16
    theirs = {"state_dict": renamed(expected, MMDETECTION), "optimizer": {"x": [1]}}
    source, target = saved(theirs, tmp_path / "in.pth"), tmp_path / f"out{suffix}"
    target.write_bytes(b"old")
    code, out, _ = run_cli(monkeypatch, capsys, source, target, *["--half"] * half)

    assert code == 0 and out.count("\n") == 1
    assert f"in.pth (MMDetection): {len(expected)} parameters, {NUM_CLASSES} classes -> " in out
    if half:
        expected = {k: v if k == big else v.half() for k, v in expected.items()}
    found = load_file(target) if suffix == ".safetensors" else torch.load(target)["model"]
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
    load(plain, target)
    assert_has(plain, expected)
    if suffix == ".pth":
        fill(plain)
        DetectionCheckpointer(plain).load(str(target))
        assert_has(plain, expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.pth", target.name])


def test_convert_says_what_differs(slim, monkeypatch, capsys, tmp_path):
    theirs = renamed(with_background_first(weights_for(slim)), PAPER, "backbone.body.")
    source = saved({"model": theirs}, tmp_path / "in.pth")
    code, out, _ = run_cli(monkeypatch, capsys, source, tmp_path / "out.pth")
    assert code == 0 and "Note: It was trained with boxes of inclusive pixel coordinates" in out


def test_convert_parameters_that_share_memory(monkeypatch, capsys, tmp_path):
    shared = torch.arange(6.0)
    source = saved({"model": {"backbone.a": shared, "backbone.b": shared[:2]}}, tmp_path / "in.pth")
    assert run_cli(monkeypatch, capsys, source, tmp_path / "out.safetensors")[0] == 0
    assert load_file(tmp_path / "out.safetensors")["backbone.b"].tolist() == [0, 1]


def caffe2_file(folder):
    return pickled({"conv1_w": np.ones(1, "f4")}, folder / "caffe2.pkl")


def nan_file(folder):
    return saved({"model": {"backbone.a": torch.tensor([1, float("nan")])}}, folder / "nan.pth")


CLI_ERRORS = {
    "same file": (lambda f: (f / "in.pth", f / "in.pth"), "is the input: give another name"),
    "suffix": (
        lambda f: (f / "in.pth", f / "out.pkl"),
        "has to end with one of .pth, .safetensors",
    ),
    "folder": (lambda f: (f / "in.pth", f / "no" / "out.pth"), "The folder of '.*out.pth'"),
    "folder of safetensors": (
        lambda f: (f / "in.pth", f / "no" / "x.safetensors"),
        "The folder of '",
    ),
    "caffe2": (lambda f: (caffe2_file(f), f / "out.pth"), "has no names of its own to convert"),
    "missing": (lambda f: (f / "none.pth", f / "out.pth"), "none.pth' does not exist"),
    "nan": (lambda f: (nan_file(f), f / "out.pth"), "'backbone.a' has values that are NaN"),
    "not weights": (lambda f: (f / "page.pth", f / "out.pth"), "is a web page"),
}


@pytest.mark.parametrize("case", CLI_ERRORS)
def test_convert_fails_without_a_trace(case, monkeypatch, capsys, tmp_path):
    make, message = CLI_ERRORS[case]
    saved(GOOD, tmp_path / "in.pth")
    (tmp_path / "page.pth").write_bytes(b"<html>")
    (tmp_path / "out.pth").write_bytes(b"precious")
    source, target = make(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    code, out, err = run_cli(monkeypatch, capsys, source, target)
    assert code == 2 and not out
    assert re.match(f"error: .*{message}", err) and err.count("\n") == 1, err
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_convert_help(monkeypatch, capsys):
    code, out, _ = run_cli(monkeypatch, capsys, "--help")
    assert code == 0
    for text in ("usage: msrcnn-d2 convert", "IN", "OUT", ".safetensors", "--half"):
        assert text in out
