"""The configs that come with this package, and the results published for them."""

import difflib
from pathlib import Path
from typing import NamedTuple, Optional

from omegaconf import DictConfig

from detectron2.config import CfgNode, LazyConfig, get_cfg

from .errors import UserError

__all__ = ["PUBLISHED", "Published", "get_config", "get_config_file"]


class Published(NamedTuple):
    """AP on COCO val2017, in percent; the masks are ranked by mask score."""

    box_ap: float
    mask_ap: float


# MMDetection's table of its Mask Scoring R-CNN models, by the name of our config
PUBLISHED = {
    "ms_rcnn_R_50_FPN_1x": Published(38.2, 36.0),
    "ms_rcnn_R_50_FPN_2x": Published(38.8, 36.3),
    "ms_rcnn_R_101_FPN_1x": Published(40.4, 37.6),
    "ms_rcnn_R_101_FPN_2x": Published(41.1, 38.1),
    # The file is called 1x there, but was trained for 2x
    "ms_rcnn_X_101_32x4d_FPN_2x": Published(41.8, 38.7),
    "ms_rcnn_X_101_64x4d_FPN_1x": Published(43.0, 39.5),
    "ms_rcnn_X_101_64x4d_FPN_2x": Published(42.6, 39.5),
}


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


def get_config(name: str) -> "DictConfig | CfgNode":
    """
    Args:
        name: as in :func:`get_config_file`.

    Returns:
        the LazyConfig of a ".py" file, the yacs config of a ".yaml" file.
    """
    path = get_config_file(name)
    if path.endswith(".py"):
        return LazyConfig.load(path)
    from .config import add_msrcnn_config

    cfg = get_cfg()
    add_msrcnn_config(cfg)
    cfg.merge_from_file(path)
    return cfg


def published_results(config_file: str) -> Optional[Published]:
    """The published results of a config, found by its file name; None where there are none."""
    return PUBLISHED.get(Path(config_file).stem)


def _configs_root() -> Path:
    """`configs/` lies in the package when it was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
