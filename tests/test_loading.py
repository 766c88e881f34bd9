"""Which config and which weights a model's name stands for."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from detectron2.config import LazyConfig, instantiate

from msrcnn_d2 import load_predictor
from msrcnn_d2.prediction import loading
from msrcnn_d2.utils.errors import UserError
from tests.helpers.toy_training import lazy_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run_folder(tmp_path):
    """As a training leaves it: a config, and two checkpoints with the names of their classes."""
    cfg = lazy_config()
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    model = instantiate(cfg.model)
    for name, bias in (("model_0000002", 0.0), ("model_final", 1.0)):
        model.roi_heads.mask_iou_head.predictor.bias.data.fill_(bias)
        contents = {"model": model.state_dict(), "class_names": ["a", "b", "c"]}
        torch.save(contents, tmp_path / f"{name}.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    return tmp_path


def bias_of(predict) -> float:
    return predict.model.roi_heads.mask_iou_head.predictor.bias[0].item()


@pytest.mark.parametrize("model, bias", [("model_0000002.pth", 0), ("model_final.pth", 1), ("", 1)])
def test_a_checkpoint_or_the_folder_of_a_training(run_folder, model, bias):
    predict = load_predictor(run_folder / model)
    assert bias_of(predict) == bias
    assert predict.class_names == ("a", "b", "c")


def test_the_config_of_the_same_name_comes_first(run_folder):
    own = run_folder / "model_final.yaml"
    cfg = lazy_config()
    cfg.model.roi_heads.box_predictor.test_score_thresh = 0.75
    LazyConfig.save(cfg, str(own))
    predict = load_predictor(run_folder / "model_final.pth", rank_by="score")
    assert predict.model.roi_heads.box_predictor.test_score_thresh == 0.75
    assert predict.rank_by == "score"
    (run_folder / "model_final.py").write_text("")
    with pytest.raises(UserError, match="model_final.py.*model_final.yaml"):
        load_predictor(run_folder / "model_final.pth")
    # What is given comes before what lies beside it
    for given in (
        {"model": run_folder / "model_final.pth"},
        {"weights": run_folder / "model_final.pth"},
    ):
        predict = load_predictor(
            **given,
            config_file=run_folder / "config.yaml",
            opts=["model.roi_heads.box_predictor.test_score_thresh=0.25"],
        )
        assert predict.model.roi_heads.box_predictor.test_score_thresh == 0.25
        assert bias_of(predict) == 1


def test_a_config_that_names_its_weights(run_folder):
    cfg = lazy_config()
    cfg.train.init_checkpoint = str(run_folder / "model_final.pth")
    LazyConfig.save(cfg, str(run_folder / "other.yaml"))
    assert bias_of(load_predictor(run_folder / "other.yaml")) == 1
    assert bias_of(load_predictor(config_file=run_folder / "other.yaml")) == 1
    with pytest.raises(UserError, match="no weights"):
        load_predictor(run_folder / "config.yaml")


def test_a_checkpoint_without_its_config(run_folder, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone") / "model.pth"
    alone.write_bytes((run_folder / "model_final.pth").read_bytes())
    with pytest.raises(UserError, match="--config-file"):
        load_predictor(alone)
    with pytest.raises(UserError, match="--config-file"):
        load_predictor("https://example.org/model.pth")


def test_a_config_inside_the_weights_is_not_read(run_folder):
    """Anybody can put one there, and instantiating it runs what it names."""
    weights = torch.load(run_folder / "model_final.pth", weights_only=True)
    weights["cfg"] = weights["config"] = "model: {_target_: os.abort}"
    torch.save(weights, run_folder / "model_final.pth")
    assert bias_of(load_predictor(run_folder / "model_final.pth")) == 1


def test_folders_of_which_it_is_unclear_what_is_meant(run_folder, tmp_path_factory):
    (run_folder / "last_checkpoint").unlink()
    with pytest.raises(UserError, match="several"):
        load_predictor(run_folder)
    (run_folder / "model_0000002.pth").unlink()
    assert bias_of(load_predictor(run_folder)) == 1
    with pytest.raises(UserError, match="no checkpoint"):
        load_predictor(tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize(
    "model, config, weights",
    [
        ("ms_rcnn_R_50_FPN_1x", "ms_rcnn_R_50_FPN_1x.py", "ms_rcnn_R_50_FPN_1x"),
        ("COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x", "ms_rcnn_R_50_FPN_1x.py", None),
        ("COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.yaml", "ms_rcnn_R_50_FPN_1x.yaml", None),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x", "mask_rcnn_R_50_FPN_3x.yaml", None),
        ("demo", "ms_rcnn_shapes.py", "ms_rcnn_shapes.safetensors"),
    ],
)
def test_names(model, config, weights, monkeypatch):
    """The weights are not downloaded here."""
    loaded = {}
    monkeypatch.setattr(loading, "MaskScoringPredictor", lambda cfg, **kwargs: cfg)
    monkeypatch.setattr(
        loading,
        "load_config",
        lambda path, opts, weights: loaded.update(path=path, weights=weights),
    )
    load_predictor(model)
    assert Path(loaded["path"]).name == config and Path(loaded["path"]).is_file()
    expected = weights or Path(model.removesuffix(".yaml")).name
    assert Path(loaded["weights"]).name == expected


@pytest.mark.parametrize(
    "model, said",
    [
        ("ms_rcnn_R_50_FPN_1", "did you mean ms_rcnn_R_50_FPN_1x"),
        ("no_such_model", "neither a file nor a model"),
        ("no_such_file.pth", "does not exist"),
        ("COCO-InstanceSegmentation/no_such_config.yaml", "does not exist"),
        ("COCO-InstanceSegmentation/ms_rcnn_X_101_32x4d_FPN_1x.py", "No weights are published"),
        (None, "Which model"),
    ],
)
def test_names_of_nothing(model, said):
    with pytest.raises(UserError, match=said) as error:
        load_predictor(model)
    assert "\n" not in str(error.value)


def test_weights_are_given_once():
    with pytest.raises(UserError, match="not both"):
        load_predictor("a.pth", weights="b.pth")


def test_the_demo_names_its_classes():
    predict = load_predictor("demo", device="cpu")
    assert predict.class_names == ("star", "moon", "heart", "ring")


def test_an_exported_model(monkeypatch):
    stand_in = SimpleNamespace(OnnxPredictor=lambda path, **kwargs: (path, kwargs))
    monkeypatch.setitem(sys.modules, "msrcnn_d2_runtime.onnx_predictor", stand_in)
    path, options = load_predictor("model.onnx", score_threshold=0.5)
    assert path == "model.onnx"
    assert options == {"rank_by": None, "score_threshold": 0.5}
    for refused in ({"config_file": "a.py"}, {"opts": ["a=1"]}, {"device": "cuda"}):
        with pytest.raises(UserError, match="exported"):
            load_predictor("model.onnx", **refused)
