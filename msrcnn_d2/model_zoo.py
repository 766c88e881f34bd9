"""The configs of this package, and models with published weights."""

import difflib
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model

from .checkpoint import MaskScoringCheckpointer
from .config import add_msrcnn_config
from .published_models import PUBLISHED, published_results
from .utils.errors import UserError

__all__ = [
    "config_names",
    "get",
    "get_checkpoint_url",
    "get_config",
    "get_config_file",
]


# In the package if it was installed, beside it in a checkout
PACKAGE = Path(__file__).resolve().parent
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"


def config_names() -> list[str]:
    """The configs of this package, as :func:`get_config_file` takes them."""
    files = (p for p in CONFIGS.glob("*/*") if p.suffix in (".py", ".yaml"))
    return sorted(str(p.relative_to(CONFIGS)) for p in files)


def get_config_file(name: str) -> str:
    """
    Args:
        name: a config relative to `configs/`, such as
            "COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py", or its yaml twin.

    Returns:
        the path of the file.

    Raises:
        UserError: there is no such config; the message lists the nearest names.
    """
    path = CONFIGS / name
    if path.is_file() and path.suffix in (".py", ".yaml"):
        return str(path)
    names = config_names()
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    raise UserError(f"No config '{name}' comes with msrcnn_d2; near it: {', '.join(nearest)}.")


def get_config(name: str, trained: bool = False) -> DictConfig | CfgNode:
    """
    Args:
        name: as in :func:`get_config_file`.
        trained: whether the config starts from the weights that were published for it rather
            than from those of its backbone. They have MMDetection's names: `msrcnn-d2 convert`
            converts them for programs that only know Detectron2's.

    Returns:
        a LazyConfig for a ".py" file, a yacs config for a ".yaml" file.

    Raises:
        UserError: there is no such config, or nothing was published for it.
    """
    path = get_config_file(name)
    if path.endswith(".py"):
        cfg = LazyConfig.load(path)
    else:
        cfg = get_cfg()
        add_msrcnn_config(cfg)
        cfg.merge_from_file(path)
    if trained and isinstance(cfg, CfgNode):
        cfg.MODEL.WEIGHTS = get_checkpoint_url(name)
    elif trained:
        cfg.train.init_checkpoint = get_checkpoint_url(name)
    return cfg


def get_checkpoint_url(name: str) -> str:
    """
    Args:
        name: as in :func:`get_config_file`, with or without the folder and the suffix.

    Returns:
        URL of the weights that were published for the config.

    Raises:
        UserError: none were published for it; the message lists the configs that have some.
    """
    published = published_results(name)
    if published is None:
        raise UserError(
            f"No weights are published for '{name}'; there are some for {', '.join(PUBLISHED)}."
        )
    return published.checkpoint_url


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """
    Args:
        name, trained: as in :func:`get_config`.
        device: by default "cuda" if there is a GPU, else "cpu".

    Returns:
        the model in evaluation mode, with the weights that its config starts from.

    Raises:
        UserError: as for :func:`get_config`, or the weights cannot be loaded.
    """
    cfg = get_config(name, trained)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        model, weights = instantiate(cfg.model).to(device), cfg.train.init_checkpoint
    MaskScoringCheckpointer(model).load(weights, strict=trained)
    return model.eval()
