"""Published weights: found by the name of a config, fetched or put there by hand, and loaded."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from detectron2.config import instantiate

from msrcnn_d2 import model_zoo, published_models
from msrcnn_d2.modeling import MaskScoringROIHeads
from msrcnn_d2.utils.errors import UserError
from tests.helpers.toy import tiny_mask_scoring_rcnn, tiny_yacs_config

FOLDER = "COCO-InstanceSegmentation"
NAME = f"{FOLDER}/ms_rcnn_R_101_FPN_2x"
URL = (
    "https://download.openmmlab.com/mmdetection/v2.0/ms_rcnn/ms_rcnn_r101_caffe_fpn_2x_coco/"
    "ms_rcnn_r101_caffe_fpn_2x_coco_bbox_mAP-0.411__segm_mAP-0.381_20200506_011134-5f3cc74f.pth"
)
PLACE = URL.removeprefix("https://")  # in the cache
BACKBONE_URL = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"


def tiny_config(name, weights):
    """A small model instead of the one of the config `name`, with the same initial weights."""
    if name.endswith(".yaml"):
        cfg = tiny_yacs_config()
        cfg.MODEL.WEIGHTS = weights
        return cfg
    cfg = tiny_mask_scoring_rcnn()
    cfg.train = OmegaConf.create({"init_checkpoint": weights})
    return cfg


def initial_weights(cfg):
    return cfg.MODEL.WEIGHTS if "MODEL" in cfg else cfg.train.init_checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache on a machine without a network, and small models."""

    def offline(url, *args):
        raise OSError("no network")

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    get_config = model_zoo.get_config

    def get_tiny_config(name, trained=False):
        return tiny_config(name, initial_weights(get_config(name, trained)))

    monkeypatch.setattr(model_zoo, "get_config", get_tiny_config)
    return tmp_path


def put(contents, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(contents, file)


def random_weights(model):
    return {k: torch.rand(v.shape).to(v.dtype) for k, v in model.state_dict().items()}


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_configs_start_from_the_published_weights(suffix):
    assert initial_weights(model_zoo.get_config(NAME + suffix)) == BACKBONE_URL
    assert initial_weights(model_zoo.get_config(NAME + suffix, trained=True)) == URL


@pytest.mark.parametrize("prefix", [f"{FOLDER}/", ""])
@pytest.mark.parametrize("suffix", [".py", ".yaml", ""])
def test_checkpoint_url(prefix, suffix):
    assert model_zoo.get_checkpoint_url(f"{prefix}ms_rcnn_R_101_FPN_2x{suffix}") == URL


def test_published_files_carry_their_digest():
    for name, published in published_models.PUBLISHED.items():
        url = model_zoo.get_checkpoint_url(name)
        assert url == published.checkpoint_url
        assert re.fullmatch(r"https://\S+/ms_rcnn_[rx]\w+/ms_rcnn_\S+-[0-9a-f]{8}\.pth", url)
    urls = {x.checkpoint_url for x in published_models.PUBLISHED.values()}
    assert len(urls) == len(published_models.PUBLISHED) == 7


def test_what_was_not_published():
    name = f"{FOLDER}/ms_rcnn_X_101_32x4d_FPN_1x.py"
    for ask in (model_zoo.get_checkpoint_url, lambda x: model_zoo.get_config(x, trained=True)):
        with pytest.raises(UserError) as caught:
            ask(name)
        message = str(caught.value)
        assert f"No weights are published for '{name}'; there are some for" in message
        assert all(x in message for x in published_models.PUBLISHED)


def test_path_of_a_config():
    path = Path(model_zoo.get_config_file(f"{NAME}.yaml"))
    assert path.is_file() and path.parts[-2:] == (FOLDER, "ms_rcnn_R_101_FPN_2x.yaml")
    for name in (FOLDER, "", "../setup.cfg", NAME):  # a folder, another file, no suffix
        with pytest.raises(UserError, match="No config '.*' comes with msrcnn_d2; near it: "):
            model_zoo.get_config_file(name)


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_get_trained(suffix, cache):
    """With the file in the place that the message names."""
    with pytest.raises(UserError) as caught:
        model_zoo.get(NAME + suffix, trained=True, device="cpu")
    message = str(caught.value)
    place = Path(re.search(r"put it at '(\S+)', or give its own path\.$", message)[1])
    assert message.startswith(f"Cannot download '{URL}' (no network): ") and "\n" not in message
    assert place == cache / PLACE

    expected = random_weights(instantiate_tiny(suffix))
    put({"model": expected}, place)
    model = model_zoo.get(NAME + suffix, trained=True, device="cpu")
    assert not model.training and isinstance(model.roi_heads, MaskScoringROIHeads)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def instantiate_tiny(suffix):
    from detectron2.modeling import build_model

    cfg = tiny_config(suffix, "")
    return build_model(cfg) if suffix == ".yaml" else instantiate(cfg.model)


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_get_trained_needs_all_parameters_and_get_the_backbone(suffix, cache):
    expected = random_weights(instantiate_tiny(suffix))
    body = {k: v for k, v in expected.items() if k.startswith("backbone.bottom_up.")}
    put({"model": body}, cache / PLACE)
    with pytest.raises(UserError, match="weights of a backbone only"):
        model_zoo.get(NAME + suffix, trained=True, device="cpu")

    put({"model": body}, cache / "detectron2" / BACKBONE_URL.removeprefix("detectron2://"))
    model = model_zoo.get(NAME + suffix, device="cpu")
    assert not model.training
    for name, value in body.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_device(cache):
    expected = random_weights(instantiate_tiny(".py"))
    put({"model": expected}, cache / PLACE)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_zoo.get(f"{NAME}.py", trained=True)
    assert {p.device.type for p in model.parameters()} == {kind}


def test_published_table():
    head, rule, *rows = published_models.published_table().splitlines()
    assert len(rows) == len(published_models.PUBLISHED)
    assert {row.count("|") for row in (head, rule, *rows)} == {7}
    row = next(row for row in rows if "ms_rcnn_X_101_32x4d_FPN_2x" in row)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["`ms_rcnn_X_101_32x4d_FPN_2x`", "41.8", "38.7", "7.9", "11.0"]
    assert re.fullmatch(r"\[MMDetection 2\.0\]\(https://\S+81fd1740\.pth\)", cells[5])
    row = next(row for row in rows if "ms_rcnn_R_50_FPN_2x" in row)
    assert "|  |  | [" in row  # what was not measured is left empty


def test_readme_has_the_table():
    readme = Path(__file__).parents[1] / "README.md"
    assert published_models.published_table() in readme.read_text()
