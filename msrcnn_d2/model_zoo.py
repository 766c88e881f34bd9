"""The configs that come with this package, and the results published for them."""

import difflib
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from omegaconf import DictConfig
from torch import nn

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model

from .errors import UserError

__all__ = [
    "PUBLISHED",
    "Published",
    "get",
    "get_checkpoint_url",
    "get_config",
    "get_config_file",
    "published_table",
]


class Published(NamedTuple):
    """
    A model that others have trained and published.

    Attributes:
        box_ap, mask_ap: AP on COCO val2017, in percent; the masks are ranked by mask score.
        checkpoint: path of the weights below `SOURCE_URL`.
        memory: of a GPU, in GB, while it trains 2 images per iteration.
        speed: of inference on a V100, in images per second.
    """

    box_ap: float
    mask_ap: float
    checkpoint: str
    memory: Optional[float] = None
    speed: Optional[float] = None

    @property
    def checkpoint_url(self) -> str:
        return f"{SOURCE_URL}/{self.checkpoint}"


# MMDetection's Mask Scoring R-CNN models, by the name of our config
SOURCE = "MMDetection 2.0"
SOURCE_URL = "https://download.openmmlab.com/mmdetection/v2.0/ms_rcnn"
# fmt: off
PUBLISHED = {
    "ms_rcnn_R_50_FPN_1x": Published(
        38.2, 36.0,
        "ms_rcnn_r50_caffe_fpn_1x_coco/"
        "ms_rcnn_r50_caffe_fpn_1x_coco_20200702_180848-61c9355e.pth",
        memory=4.5,
    ),
    "ms_rcnn_R_50_FPN_2x": Published(
        38.8, 36.3,
        "ms_rcnn_r50_caffe_fpn_2x_coco/"
        "ms_rcnn_r50_caffe_fpn_2x_coco_bbox_mAP-0.388__segm_mAP-0.363_20200506_004738-ee87b137.pth",
    ),
    "ms_rcnn_R_101_FPN_1x": Published(
        40.4, 37.6,
        "ms_rcnn_r101_caffe_fpn_1x_coco/"
        "ms_rcnn_r101_caffe_fpn_1x_coco_bbox_mAP-0.404__segm_mAP-0.376_20200506_004755-b9b12a37.pth",
        memory=6.5,
    ),
    "ms_rcnn_R_101_FPN_2x": Published(
        41.1, 38.1,
        "ms_rcnn_r101_caffe_fpn_2x_coco/"
        "ms_rcnn_r101_caffe_fpn_2x_coco_bbox_mAP-0.411__segm_mAP-0.381_20200506_011134-5f3cc74f.pth",
    ),
    # The file is called 1x there, but was trained for 2x
    "ms_rcnn_X_101_32x4d_FPN_2x": Published(
        41.8, 38.7,
        "ms_rcnn_x101_32x4d_fpn_1x_coco/ms_rcnn_x101_32x4d_fpn_1x_coco_20200206-81fd1740.pth",
        memory=7.9, speed=11.0,
    ),
    "ms_rcnn_X_101_64x4d_FPN_1x": Published(
        43.0, 39.5,
        "ms_rcnn_x101_64x4d_fpn_1x_coco/ms_rcnn_x101_64x4d_fpn_1x_coco_20200206-86ba88d2.pth",
        memory=11.0, speed=8.0,
    ),
    "ms_rcnn_X_101_64x4d_FPN_2x": Published(
        42.6, 39.5,
        "ms_rcnn_x101_64x4d_fpn_2x_coco/ms_rcnn_x101_64x4d_fpn_2x_coco_20200308-02a445e2.pth",
        memory=11.0, speed=8.0,
    ),
}
# fmt: on


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
    root = _configs_root()
    path = root / name
    if path.is_file() and path.suffix in (".py", ".yaml"):
        return str(path)
    names = sorted(str(p.relative_to(root)) for p in root.glob("*/*") if p.suffix != ".pyc")
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    raise UserError(f"No config '{name}' comes with msrcnn_d2; near it: {', '.join(nearest)}.")


def get_config(name: str, trained: bool = False) -> "DictConfig | CfgNode":
    """
    Args:
        name: as in :func:`get_config_file`.
        trained: whether the config is to start from the weights that were published for it,
            rather than from those of its backbone. They have MMDetection's names, so programs
            that only know Detectron2 need them converted: `python -m msrcnn_d2.checkpoint`.

    Returns:
        the LazyConfig of a ".py" file, the yacs config of a ".yaml" file.

    Raises:
        UserError: there is no such config, or nothing was published for it.
    """
    path = get_config_file(name)
    if path.endswith(".py"):
        cfg = LazyConfig.load(path)
    else:
        from .config import add_msrcnn_config

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
        URL of the weights that were published for a config.

    Raises:
        UserError: nothing was published for it; the message lists what was.
    """
    published = published_results(name)
    if published is None:
        raise UserError(
            f"No weights are published for '{name}'; there are some for {', '.join(PUBLISHED)}."
        )
    return published.checkpoint_url


def get(name: str, trained: bool = False, device: Optional[str] = None) -> nn.Module:
    """
    Args:
        name, trained: as in :func:`get_config`.
        device: "cuda" if there is a GPU, else "cpu", by default.

    Returns:
        the model in evaluation mode, with the weights that its config starts from.

    Raises:
        UserError: see :func:`get_config`; or the weights cannot be had.
    """
    from .checkpoint import MaskScoringCheckpointer

    cfg = get_config(name, trained)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        model, weights = instantiate(cfg.model).to(device), cfg.train.init_checkpoint
    MaskScoringCheckpointer(model).load(weights, strict=trained)
    return model.eval()


def published_table() -> str:
    """What was published, as a table in Markdown; README.md has it."""
    rows: list[tuple] = [
        ("config (`.py` or `.yaml`)", "box AP", "mask AP", "memory (GB)", "images / s", "weights"),
        ("---",) * 6,
    ]
    for name, x in PUBLISHED.items():
        weights = f"[{SOURCE}]({x.checkpoint_url})"
        rows.append((f"`{name}`", x.box_ap, x.mask_ap, x.memory or "", x.speed or "", weights))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def published_results(config_file: str) -> Optional[Published]:
    """What was published for a config, found by its file name; None where there is nothing."""
    return PUBLISHED.get(Path(config_file).stem)


def _configs_root() -> Path:
    """`configs/` lies in the package when it was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


if __name__ == "__main__":
    print(published_table())
