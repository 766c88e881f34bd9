"""Read a config of either kind, with overrides from the command line that are checked."""

import difflib
import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import detectron2
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.datasets import register_coco_instances

from .. import model_zoo
from ..config import add_msrcnn_config, retrofit, target_of
from ..image_reading import IMAGE_KEYS
from ..modeling import RetrofitRCNN
from ..utils.errors import UserError
from .config_values import check_values
from .inference_loader import build_test_loader
from .loaders import LOADER_OPTIONS, build_resumable_loader
from .override_values import AS_IT_IS, value_of_text

__all__ = ["device_of", "find_config_file", "load_config", "register_dataset"]

# What Detectron2, or we, read from `train` if it is there; Detectron2's configs leave it out
OPTIONAL_TRAIN_KEYS = {
    "seed": -1,
    "cudnn_benchmark": False,
    "float32_precision": "",
    "compile": False,
    "amp.test": False,
    "amp.max_skipped_steps": 50,
    "max_bad_images": 10,
    "max_nonfinite_steps": 0,
    "detect_anomaly": False,
    "check_images": True,
}


def register_dataset(name: str, annotations: str, images: str) -> None:
    """
    Register a dataset in COCO's format under `name`, for configs to refer to.

    Args:
        annotations: path of the json file.
        images: folder of the images.

    Raises:
        UserError: another dataset has this name.
    """
    if name not in DatasetCatalog.list():
        register_coco_instances(name, {}, annotations, images)
    metadata = MetadataCatalog.get(name)
    if (metadata.get("json_file"), metadata.get("image_root")) != (annotations, images):
        raise UserError(f"Another dataset is called '{name}' already: choose another name for it.")


def find_config_file(name: str) -> str:
    """`name` if it is a file, else the config of that name that comes with us or Detectron2."""
    if not name:
        raise UserError(
            "Which model? Give --config-file, such as "
            "configs/COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py."
        )
    if os.path.isfile(name):
        if not name.endswith((".py", ".yaml", ".yml")):
            raise UserError(f"Config file '{name}' is neither a .py nor a .yaml file.")
        return name
    try:
        return model_zoo.get_config_file(name)
    except UserError as error:
        root = _detectron2_configs()
        if (root / name).is_file():
            return str(root / name)
        raise UserError(
            f"Config file '{name}' does not exist. {error}{_near(name, root)}"
        ) from None


def _detectron2_configs() -> Path:
    # Imported here because it needs pkg_resources, which environments of today may lack
    from detectron2 import model_zoo as detectron2_zoo

    # It tells where one of its configs is, not where they are
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    return Path(detectron2_zoo.get_config_file(name)).parents[1]


def _near(name: str, root: Path) -> str:
    names = sorted(str(p.relative_to(root)) for p in root.glob("*/*.*"))
    nearest = difflib.get_close_matches(name, names, n=3)
    return f" Of Detectron2's: {', '.join(nearest)}." if nearest else ""


def load_config(
    path: str,
    overrides: list[str] | tuple[str, ...] = (),
    retrofitted: bool = False,
) -> DictConfig | CfgNode:
    """
    Args:
        path: from :func:`find_config_file`.
        overrides: "key=value" for a LazyConfig; "KEY=VALUE", or "KEY" and "VALUE" in turn, for
            yacs.
        retrofitted: whether :func:`msrcnn_d2.retrofit` makes another config of the file's, before
            it is overridden.

    Returns:
        the config; its device is "cpu" where it asks for a GPU and there is none.

    Raises:
        UserError: the file or an override cannot be read, a key does not exist, a value makes no
            sense, or there is no trained model to retrofit.
    """
    for late in (x for x in overrides if str(x).startswith("--")):
        raise UserError(f"Option '{late}' comes too late: give options before key=value.")
    with _errors_of_file(path):
        is_lazy = _is_lazy(path)
    cfg = (_load_lazy if is_lazy else _load_yacs)(path, overrides, retrofitted)
    check_values(cfg)
    _check_weights_of_retrofit(cfg)
    return _on_available_device(cfg)


@contextmanager
def _errors_of_file(path: str) -> Iterator[None]:
    """The code of a config file can raise anything: its own words, and the line, help its user."""
    try:
        yield
    except Exception as error:
        reason = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
        message = (str(reason).splitlines() or [""])[0].rstrip(".")
        if isinstance(reason, (SyntaxError, ImportError, OSError, UnicodeError)) or not (
            path.endswith(".py")
        ):
            message = f"Config file '{path}' cannot be read: {str(reason).rstrip('.')}"
        elif not isinstance(reason, (UserError, ValueError)) or not message:
            message = f"{type(reason).__name__}: {message}"
        line = _line_of_user(error)
        raise UserError(f"{message}{f' ({line})' if line else ''}.") from error


def _line_of_user(error: Exception) -> str:
    """Where the error left a config file: the last line that is no library's."""
    libraries = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    libraries += [os.path.dirname(detectron2.__file__), str(Path(__file__).parents[1])]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = os.path.abspath(frame.filename)
        in_library = any(file.startswith(os.path.join(folder, "")) for folder in libraries)
        if not (in_library or frame.filename.startswith("<")):
            return f"'{frame.filename}', line {frame.lineno}"
    return ""


def _is_lazy(path: str) -> bool:
    """A .py file, or the yaml file that a run with a LazyConfig leaves in its output folder."""
    if path.endswith(".py"):
        return True
    with open(path) as f:
        return re.search(r"\b_target_:", f.read()) is not None


def _load_lazy(path, overrides, retrofitted):
    with _errors_of_file(path):
        cfg = LazyConfig.load(path)
    if "train" not in cfg:
        raise UserError(f"Config file '{path}' describes no training: it has no `train`.")
    if retrofitted:
        cfg = _retrofit(cfg, path)
    for key, default in OPTIONAL_TRAIN_KEYS.items():
        if OmegaConf.select(cfg.train, key) is None:
            OmegaConf.update(cfg.train, key, default, force_add=True)
    if "dataloader" in cfg:
        for key, (_, default) in IMAGE_KEYS.items():
            if OmegaConf.select(cfg, f"dataloader.images.{key}") is None:
                OmegaConf.update(cfg, f"dataloader.images.{key}", default, force_add=True)
    for override in map(str, overrides):
        _check_override(cfg, override)
        _apply_override(cfg, override)
    return cfg


def _apply_override(cfg: DictConfig, override: str) -> None:
    """As text where the key is a path or another string, else by Hydra's grammar."""
    key, text = override.split("=", 1)
    key = key.lstrip("+")
    try:
        current = OmegaConf.select(cfg, key)
    except OmegaConfBaseException:  # a reference to a key that is not there
        current = None
    value = value_of_text(key, text, current)
    try:
        if value is AS_IT_IS:
            LazyConfig.apply_overrides(cfg, [override])
        else:
            OmegaConf.update(cfg, key, value, force_add=True)
    except Exception as error:  # hydra's parser has its own exceptions, omegaconf others
        raise UserError(f"Cannot override the config by '{override}': {error}") from error


def _check_override(cfg: DictConfig, override: str) -> None:
    """A key that does not exist would be added silently and never read."""
    if "=" not in override:
        raise UserError(f"Override '{override}' is not of the form key=value.")
    key = override.split("=", 1)[0]
    if key.startswith("+"):  # hydra's sign for a key to add
        return
    node, path = cfg, "the config"
    for name in key.split("."):
        if not isinstance(node, DictConfig):
            return  # a list or a value: omegaconf says itself what it can do with them
        known, open_ended = _known_keys(node)
        if name not in known and not open_ended:
            nearest = difflib.get_close_matches(name, known, n=3) or known
            raise UserError(
                f"Override '{override}': {path} has no key '{name}'; did you mean "
                f"{' or '.join(nearest)}?"
            )
        if name not in node:
            return  # an argument that is left at its default so far
        node, path = node[name], f"'{name}'"


def _known_keys(node: DictConfig) -> "tuple[list[str], bool]":
    """The keys that make sense in a node, and whether others may: **kwargs take any."""
    keys = [str(k) for k in node if k != "_target_"]
    if "_target_" not in node:
        return keys, False
    target = target_of(node)
    # Ours take the place of Detectron2's, and have more arguments than those of 0.6
    if target is build_detection_test_loader:
        names, open_ended = [*_arguments(build_test_loader)[0], *LOADER_OPTIONS], False
    elif target is build_detection_train_loader:
        names, open_ended = [*_arguments(build_resumable_loader)[0], *LOADER_OPTIONS], False
        names = [n for n in names if n not in ("first_iter", "on_bad_images")]
    else:
        names, open_ended = _arguments(target)
    return ["_target_", *dict.fromkeys(keys + names)], open_ended


def _arguments(target) -> "tuple[list[str], bool]":
    """
    The arguments of a callable, and whether there may be others: what a class takes as **kwargs
    it hands to the next `__init__` of its bases.
    """
    functions = [target]
    if isinstance(target, type):
        functions = [vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c)]
    names: list[str] = []
    for function in functions:
        parameters = list(inspect.signature(function).parameters.values())
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names, False
    return names, True


def _load_yacs(path, overrides, retrofitted):
    cfg = get_cfg()
    add_msrcnn_config(cfg)
    with _errors_of_file(path):
        cfg.merge_from_file(path)
    if retrofitted:
        cfg = _retrofit(cfg, path)
    pairs = _key_value_pairs(map(str, overrides))
    try:
        for key, text in zip(pairs[::2], pairs[1::2]):
            value = value_of_text(key, text, _yacs_value(cfg, key))
            # yacs reads all text as a literal of Python, also '3' and '1e5' where it is a path
            text = text if value is AS_IT_IS else repr(value)
            cfg.merge_from_list([key, text])
        cfg.merge_from_list(pairs[len(pairs) // 2 * 2 :])  # a key without a value, if any
    except (KeyError, ValueError, AssertionError) as error:
        message = error.args[0] if error.args else type(error).__name__
        raise UserError(f"Config '{path}' with overrides {list(overrides)}: {message}.") from error
    return cfg


def _yacs_value(cfg: CfgNode, key: str):
    """None if there is no such key; yacs itself says so."""
    node = cfg
    for name in key.split("."):
        if not (isinstance(node, CfgNode) and name in node):
            return None
        node = node[name]
    return node


def _key_value_pairs(overrides) -> list[str]:
    """["A.B=1", "C", "2"] -> ["A.B", "1", "C", "2"]"""
    pairs: list[str] = []
    for item in overrides:
        expects_key = len(pairs) % 2 == 0
        if expects_key and "=" in item:
            pairs.extend(item.split("=", 1))
        else:
            pairs.append(item)
    return pairs


def _retrofit(cfg, path):
    try:
        return retrofit(cfg)
    except ValueError as error:
        raise UserError(f"Config file '{path}' cannot be retrofitted: {error}") from error


def _check_weights_of_retrofit(cfg: DictConfig | CfgNode) -> None:
    if isinstance(cfg, CfgNode):
        is_retrofit = cfg.MODEL.META_ARCHITECTURE == RetrofitRCNN.__name__
        weights = cfg.MODEL.WEIGHTS
    else:
        model = cfg.get("model", {})
        is_retrofit = "_target_" in model and target_of(model) is RetrofitRCNN
        weights = cfg.train.get("init_checkpoint")
    if is_retrofit and not weights:
        raise UserError(
            "There is no trained Mask R-CNN to retrofit: give train.init_checkpoint=FILE (yaml: "
            "MODEL.WEIGHTS FILE)."
        )


def _on_available_device(cfg):
    if device_of(cfg).startswith("cuda") and not torch.cuda.is_available():
        if isinstance(cfg, CfgNode):
            cfg.MODEL.DEVICE = "cpu"
        else:
            cfg.train.device = "cpu"
    return cfg


def device_of(cfg: DictConfig | CfgNode) -> str:
    """The device that a config of either kind runs on."""
    return cfg.MODEL.DEVICE if isinstance(cfg, CfgNode) else cfg.train.device
