"""Read a config of either kind, with overrides from the command line, and check its values."""

import ast
import difflib
import inspect
import math
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

import detectron2
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import META_ARCH_REGISTRY

from msrcnn_d2_runtime.image_reading import IMAGE_KEYS
from msrcnn_d2_runtime.ranking import SCORE_FIELDS

from .. import model_zoo
from ..config import HEAD_ARGS, add_msrcnn_config, retrofit, target_of
from ..modeling import LEARN_FROM, RetrofitRCNN, is_point_rend
from ..utils.errors import UserError
from .loaders import LOADER_OPTIONS, build_resumable_loader, build_test_loader

__all__ = [
    "SETTINGS",
    "both_keys",
    "builds_a",
    "device_of",
    "find",
    "find_config_file",
    "key_of",
    "line_of_user",
    "load_config",
    "overridden_keys",
    "register_dataset",
    "value_of",
]

ABSENT: Any = object()


class Setting(NamedTuple):
    """
    One thing that a config can say.

    Attributes:
        lazy, yaml: its key in a config of each kind; None where that kind has no such key.
        holds: whether a value makes sense; None if it is not checked here.
        expected: what makes sense, in words.
        required: whether None makes no sense in a LazyConfig. Elsewhere it stands for the default.
        default: for a LazyConfig that lacks the key, as Detectron2's configs do.
    """

    lazy: str | None
    yaml: str | None
    holds: Callable[[Any], bool] | None = None
    expected: str = ""
    required: bool = False
    default: Any = ABSENT


def _whole(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def _number(least: float, most: float = math.inf) -> Callable[[Any], bool]:
    """NaN is in no interval."""
    return lambda x: (
        isinstance(x, (int, float))
        and not isinstance(x, bool)
        and least <= x <= most
        and math.isfinite(x)
    )


def _is_pattern(x: Any) -> bool:
    try:
        return isinstance(x, str) and x != "" and bool(re.compile(x))
    except re.error:
        return False


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, ListConfig))


FROM_1 = (_whole(1), "a whole number from 1 on")
FROM_0 = (_whole(0), "a whole number from 0 on")
NOT_NEGATIVE = (_number(0), "a number from 0 on")
SEED = (_whole(-(2**31), 2**32 - 1), "a whole number below 2^32 (negative: a random one)")
SHARE = (_number(0, 1), "a share of the run, from 0 to 1")
SCORE = (lambda x: x in tuple(SCORE_FIELDS), " or ".join(SCORE_FIELDS))
SOURCE = (lambda x: x in LEARN_FROM, " or ".join(LEARN_FROM))
SWITCH = (lambda x: isinstance(x, bool), "True or False")
METRIC = (lambda x: isinstance(x, str), "the name of a result such as segm/AP, or '' for none")
MODE = (lambda x: x in ("max", "min"), "max or min")
DATASET = (lambda x: isinstance(x, str), "the name of a dataset, or '' for those of the test")
FOLDER = (lambda x: isinstance(x, str) and x != "", "the path of a folder")
FILE = (lambda x: isinstance(x, str), "the path of a file, or '' for none")
FRACTION = (_number(0, 1), "a number from 0 to 1")
DEVICE = (
    lambda x: isinstance(x, str) and (x in ("", "cpu") or x.startswith("cuda")),
    '"cpu" or "cuda", or "" for that of the model',
)
PATTERNS = (
    lambda x: isinstance(x, (list, tuple, ListConfig)) and all(map(_is_pattern, x)),
    "a list of regular expressions for the beginning of parameters' names, such as "
    "['backbone','proposal_generator']",
)
TEXTS = (
    lambda x: x is None or (_is_list(x) and all(isinstance(e, str) for e in x)),
    "a list of names",
)
PAIRS = (
    lambda x: x is None or (_is_list(x) and all(_is_list(e) and len(e) == 2 for e in x)),
    "a list of pairs of names",
)
CALLS = (
    lambda x: (
        isinstance(x, (list, tuple, ListConfig))
        and all(
            "." in e if isinstance(e, str) else isinstance(e, Mapping) and "_target_" in e
            for e in x
        )
    ),
    "a list of dotted names such as my_module.MyClass, or of LazyCalls (yaml: mappings of a name "
    "_target_ and arguments)",
)

SETTINGS = [
    Setting("train.device", "MODEL.DEVICE"),
    Setting("train.seed", "SEED", *SEED, default=-1),
    Setting("train.output_dir", "OUTPUT_DIR", *FOLDER, required=True),
    Setting("train.init_checkpoint", "MODEL.WEIGHTS", *FILE),
    Setting("train.max_iter", "SOLVER.MAX_ITER", *FROM_1, required=True),
    Setting("train.eval_period", "TEST.EVAL_PERIOD", *FROM_0, required=True),
    # As in Detectron2's DefaultTrainer, for which yaml configs have no key
    Setting("train.log_period", None, *FROM_1, required=True, default=20),
    Setting("train.checkpointer.period", "SOLVER.CHECKPOINT_PERIOD", *FROM_1, required=True),
    Setting("train.checkpointer.max_to_keep", None, *FROM_1),
    Setting(
        "train.best_checkpointer.val_metric",
        "SOLVER.BEST_CHECKPOINTER.VAL_METRIC",
        *METRIC,
        default="segm/AP",
    ),
    Setting("train.best_checkpointer.mode", "SOLVER.BEST_CHECKPOINTER.MODE", *MODE, default="max"),
    Setting("train.early_stopping.patience", "SOLVER.EARLY_STOPPING.PATIENCE", *FROM_0, default=0),
    Setting(
        "train.early_stopping.min_delta",
        "SOLVER.EARLY_STOPPING.MIN_DELTA",
        *NOT_NEGATIVE,
        default=0.0,
    ),
    Setting(
        "train.validation_loss.enabled", "TEST.VALIDATION_LOSS.ENABLED", *SWITCH, default=False
    ),
    Setting("train.validation_loss.dataset", "TEST.VALIDATION_LOSS.DATASET", *DATASET, default=""),
    Setting(
        "train.validation_loss.num_images", "TEST.VALIDATION_LOSS.NUM_IMAGES", *FROM_0, default=0
    ),
    Setting("train.amp.enabled", "SOLVER.AMP.ENABLED", *SWITCH),
    Setting("train.amp.test", "TEST.AMP.ENABLED", *SWITCH, default=False),
    Setting("train.amp.max_skipped_steps", "SOLVER.AMP.MAX_SKIPPED_STEPS", default=50),
    Setting("train.compile", "SOLVER.COMPILE", *SWITCH, default=False),
    Setting("train.cudnn_benchmark", "CUDNN_BENCHMARK", default=False),
    Setting("train.float32_precision", None, default=""),
    Setting("train.max_bad_images", "DATALOADER.MAX_BAD_IMAGES", *FROM_0, default=10),
    Setting("train.max_nonfinite_steps", "SOLVER.MAX_NONFINITE_STEPS", *FROM_0, default=0),
    Setting("train.detect_anomaly", "SOLVER.DETECT_ANOMALY", *SWITCH, default=False),
    Setting("train.reference_batch_size", "SOLVER.REFERENCE_BATCH_SIZE", *FROM_0, default=0),
    Setting("train.accumulation_steps", "SOLVER.ACCUMULATION_STEPS", *FROM_1, default=1),
    Setting("train.freeze", "SOLVER.FREEZE", *PATTERNS, default=[]),
    # The keys of detrex and, in yaml, of d2go
    Setting("train.model_ema.enabled", "MODEL_EMA.ENABLED", *SWITCH, default=False),
    Setting("train.model_ema.decay", "MODEL_EMA.DECAY", *FRACTION, default=0.999),
    Setting("train.model_ema.device", "MODEL_EMA.DEVICE", *DEVICE, default=""),
    Setting(
        "train.model_ema.use_ema_weights_for_eval_only",
        "MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY",
        *SWITCH,
        default=True,
    ),
    Setting("train.hooks", "SOLVER.HOOKS", *CALLS, default=[]),
    Setting("train.writers", "SOLVER.WRITERS", *CALLS, default=[]),
    Setting("train.check_images", "DATALOADER.CHECK_IMAGES", *SWITCH, default=True),
    Setting("dataloader.train.dataset.names", "DATASETS.TRAIN"),
    Setting("dataloader.train.total_batch_size", "SOLVER.IMS_PER_BATCH", *FROM_1),
    Setting("dataloader.train.num_workers", "DATALOADER.NUM_WORKERS", *FROM_0),
    Setting("dataloader.test.dataset.names", "DATASETS.TEST"),
    Setting("dataloader.test.num_workers", None, *FROM_0),
    Setting("dataloader.test.batch_size", "DATALOADER.TEST_BATCH_SIZE", *FROM_1),
    Setting("dataloader.evaluator.engine", "TEST.COCO_ENGINE"),
    Setting("dataloader.evaluator.max_dets_per_image", "TEST.MAX_DETS_PER_IMAGE"),
    Setting("dataloader.evaluator.boundary_ap", "TEST.BOUNDARY_AP", *SWITCH),
    Setting("dataloader.evaluator.kpt_oks_sigmas", "TEST.KEYPOINT_OKS_SIGMAS"),
    *(
        Setting(f"dataloader.images.{key}", yaml, default=default)
        for key, (yaml, default) in IMAGE_KEYS.items()
    ),
    Setting("dataloader.keypoints.names", "INPUT.KEYPOINT_NAMES", *TEXTS, default=None),
    Setting("dataloader.keypoints.flip_map", "INPUT.KEYPOINT_FLIP_MAP", *PAIRS, default=None),
    Setting("model.roi_heads.num_classes", "MODEL.ROI_HEADS.NUM_CLASSES", *FROM_1, required=True),
    Setting(
        "model.roi_heads.batch_size_per_image", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", *FROM_1
    ),
    Setting("model.roi_heads.box_predictor.test_topk_per_image", "TEST.DETECTIONS_PER_IMAGE"),
    *(
        Setting(f"model.roi_heads.mask_iou_head.{arg}", f"MODEL.ROI_MASK_IOU_HEAD.{arg.upper()}")
        for arg in HEAD_ARGS
    ),
    Setting("model.sem_seg_head.num_classes", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", *FROM_1),
    Setting("model.combine_rank_by", "MODEL.PANOPTIC_FPN.COMBINE.RANK_BY", *SCORE),
    Setting("model.learn_from", "MODEL.RETROFIT.LEARN_FROM", *SOURCE),
    Setting("optimizer.lr", "SOLVER.BASE_LR", *NOT_NEGATIVE, required=True),
    Setting("optimizer.momentum", "SOLVER.MOMENTUM", *NOT_NEGATIVE),
    Setting("optimizer.weight_decay", "SOLVER.WEIGHT_DECAY", *NOT_NEGATIVE),
    Setting("lr_multiplier.warmup_factor", "SOLVER.WARMUP_FACTOR", *NOT_NEGATIVE),
    Setting("lr_multiplier.warmup_length", None, *SHARE),
    Setting(None, "SOLVER.WARMUP_ITERS", *FROM_0),
    Setting(None, "SOLVER.REFERENCE_WORLD_SIZE", *FROM_0),
    Setting(None, "TEST.PRECISE_BN.NUM_ITER", *FROM_1),
]
YAML_KEYS = {s.lazy: s.yaml for s in SETTINGS if s.lazy}
DEFAULTS = {s.lazy: s.default for s in SETTINGS if s.lazy and s.default is not ABSENT}

# Keys that are paths, also where they have no value yet
PATHS = frozenset(
    {"output_dir", "init_checkpoint", "json_file", "image_root", "OUTPUT_DIR", "WEIGHTS"}
)
# What only yaml configs of PointRend have, in the text of a dict
POINT_REND = re.compile(r"'(POINT_HEAD|(Implicit)?PointRendMaskHead|PointRendROIHeads)'")
# Text that the config's own grammar reads: Hydra's, or Python's literals for yacs
AS_IT_IS = object()


def both_keys(key: str, value: Any = ABSENT) -> str:
    """
    A key of a LazyConfig and of a yaml config, for messages.

    Returns:
        "train.seed (yaml: SEED)", or with a value "train.seed=3 (yaml: SEED 3)".
    """
    lazy, yaml = (key, YAML_KEYS[key])
    if value is not ABSENT:
        lazy, yaml = f"{lazy}={value}", f"{yaml} {value}"
    return f"{lazy} (yaml: {yaml})"


def key_of(cfg: DictConfig | CfgNode, key: str) -> Any:
    """A key of a LazyConfig in the config's own kind; None if that has none."""
    return YAML_KEYS[key] if isinstance(cfg, CfgNode) else key


def value_of(cfg: DictConfig | CfgNode, key: str) -> Any:
    """
    Args:
        cfg: a config of either kind.
        key: of a LazyConfig, in `SETTINGS`.

    Returns:
        what the config says; the default if it says nothing, and None if there is none.
    """
    own_key = key_of(cfg, key)
    found = find(cfg, own_key) if own_key else ABSENT
    return DEFAULTS.get(key) if found is ABSENT else found


def find(cfg: DictConfig | CfgNode, key: str) -> Any:
    """The value under a key of the config's own kind, or `ABSENT`."""
    if not isinstance(cfg, CfgNode):
        return OmegaConf.select(cfg, key, default=ABSENT)
    node: Any = cfg
    for name in key.split("."):
        if not isinstance(node, CfgNode) or name not in node:
            return ABSENT
        node = node[name]
    return node


def device_of(cfg: DictConfig | CfgNode) -> str:
    """The device that a config of either kind runs on."""
    return value_of(cfg, "train.device")


class _ReadForTwo:
    """
    Dataset dicts. The first caller, who wants to know the classes, and the second, a data loader,
    share what is read once. After that nothing is kept.
    """

    def __init__(self, *args: str):
        self._args = args
        self._is_first = True
        self._kept: list[dict] | None = None

    def __call__(self) -> list[dict]:
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return kept
        dataset_dicts = load_coco_json(*self._args)
        if self._is_first:
            self._is_first, self._kept = False, dataset_dicts
        return dataset_dicts


def register_dataset(name: str, annotations: str, images: str) -> None:
    """
    Register a dataset in COCO's format under `name`, for configs to refer to.

    Args:
        annotations: path of the json file.
        images: folder of the images.

    Raises:
        UserError: another dataset has this name.
    """
    metadata = MetadataCatalog.get(name)
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, _ReadForTwo(annotations, images, name))
        metadata.set(json_file=annotations, image_root=images, evaluator_type="coco")
    if (metadata.get("json_file"), metadata.get("image_root")) != (annotations, images):
        raise UserError(f"Another dataset is already called '{name}': choose another name.")


def find_config_file(name: str) -> str:
    """`name` if it is a file, else the config of that name that comes with us or Detectron2."""
    if not name:
        raise UserError(
            "Which model? Give --config-file, such as "
            "COCO-InstanceSegmentation/ms_rcnn_R_50_FPN_1x.py."
        )
    if os.path.isfile(name):
        if not name.endswith((".py", ".yaml", ".yml")):
            raise UserError(f"Config file '{name}' is neither a .py nor a .yaml file.")
        return name
    try:
        return model_zoo.get_config_file(name)
    except UserError as error:
        # Imported here because it needs pkg_resources, which a new environment may lack
        from detectron2 import model_zoo as detectron2_zoo

        # Detectron2 tells where one of its configs is, not where the folder of all is
        example = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
        root = Path(detectron2_zoo.get_config_file(example)).parents[1]
        if (root / name).is_file():
            return str(root / name)
        names = sorted(str(p.relative_to(root)) for p in root.glob("*/*.*"))
        nearest = difflib.get_close_matches(name, names, n=3)
        hint = f" Similar names in Detectron2: {', '.join(nearest)}." if nearest else ""
        raise UserError(f"Config file '{name}' does not exist. {error}{hint}") from None


def load_config(
    path: str,
    overrides: Sequence[str] = (),
    retrofitted: bool = False,
    weights: str | None = None,
) -> DictConfig | CfgNode:
    """
    Args:
        path: from :func:`find_config_file`.
        overrides: "key=value" for a LazyConfig; "KEY=VALUE", or "KEY" and "VALUE" in turn, for
            yacs.
        retrofitted: whether to turn the file's config into that of a retrofit, with
            :func:`retrofit`, before the overrides.
        weights: what to start from, in place of what the config says; `overrides` come after it.

    Returns:
        the config; its device is "cpu" if it asks for a GPU and there is none.

    Raises:
        UserError: the file or an override cannot be read, a key does not exist, a value makes no
            sense, or there is no trained model to retrofit.
    """
    with _errors_of_file(path):
        is_lazy = path.endswith(".py") or _is_saved_lazy_config(Path(path).read_text())
        cfg = LazyConfig.load(path) if is_lazy else _read_yacs(path)
    if is_lazy and "train" not in cfg:
        raise UserError(f"Config file '{path}' describes no training: it has no `train`.")
    _drop_exponent(cfg)
    if retrofitted:
        try:
            cfg = retrofit(cfg)
        except ValueError as error:
            raise UserError(f"Config file '{path}' cannot be retrofitted: {error}") from error
    if not isinstance(cfg, CfgNode):
        _add_defaults(cfg)
    _note_reference_batch(cfg)
    texts = [str(x) for x in overrides]
    if weights is not None:
        texts.insert(0, f"{'train.init_checkpoint' if is_lazy else 'MODEL.WEIGHTS'}={weights}")
    if isinstance(cfg, CfgNode):
        _override_yacs(cfg, texts, path)
    else:
        for text in texts:
            _override_lazy(cfg, text)
        _use_bitmasks_for_point_rend(cfg)
    check_values(cfg)
    if builds_a(RetrofitRCNN, cfg) and not value_of(cfg, "train.init_checkpoint"):
        raise UserError(
            "There is no trained Mask R-CNN to retrofit: give "
            f"{both_keys('train.init_checkpoint', 'FILE')}."
        )
    if device_of(cfg).startswith("cuda") and not torch.cuda.is_available():
        if isinstance(cfg, CfgNode):
            cfg.MODEL.DEVICE = "cpu"
        else:
            cfg.train.device = "cpu"
    return cfg


def _is_saved_lazy_config(text: str) -> bool:
    """
    Whether a yaml file is what a run with a LazyConfig saves. It has `_target_`s, and `model`,
    `train`, ... where a yacs config, which may have `_target_`s of hooks, has capital letters.
    """
    return bool(re.search(r"\b_target_:", text) and re.search(r"^\{?[a-z]\w*:", text, re.M))


@contextmanager
def _errors_of_file(path: str) -> Iterator[None]:
    """The code of a config file can raise anything: show its own message, with the line."""
    try:
        yield
    except Exception as error:
        if os.path.isfile(f"{path}.pkl"):  # Detectron2 writes it then; to read it would run code
            raise UserError(
                f"Config file '{path}' cannot be read, only looked at: it was saved from a config "
                "with functions of its own, which yaml cannot hold. Give that config, the .py "
                "file, in its place (--config-file)."
            ) from error
        reason = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
        message = (str(reason).splitlines() or [""])[0].rstrip(".")
        if isinstance(reason, (SyntaxError, ImportError, OSError, UnicodeError)) or not (
            path.endswith(".py")
        ):
            message = f"Config file '{path}' cannot be read: {_of_other_type(str(reason))}"
            message = message.rstrip(".")
        elif not isinstance(reason, (UserError, ValueError)) or not message:
            message = f"{type(reason).__name__}: {message}"
        line = line_of_user(error)
        raise UserError(f"{message}{f' ({line})' if line else ''}.") from error


def line_of_user(error: Exception) -> str:
    """The line of a config file that raised: the last one in the traceback outside libraries."""
    libraries = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    libraries += [os.path.dirname(detectron2.__file__), str(Path(__file__).parents[1])]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = os.path.abspath(frame.filename)
        in_library = any(file.startswith(os.path.join(folder, "")) for folder in libraries)
        if not (in_library or frame.filename.startswith("<")):
            return f"'{frame.filename}', line {frame.lineno}"
    return ""


def _use_bitmasks_for_point_rend(cfg: DictConfig) -> None:
    """Its losses take no polygons, which are what Detectron2's mapper reads by default."""
    head: Any = OmegaConf.select(cfg, "model.roi_heads.mask_head") or {}
    mapper: Any = OmegaConf.select(cfg, "dataloader.train.mapper") or {}
    if "_target_" not in head or "_target_" not in mapper:
        return
    if is_point_rend(target_of(head)) and target_of(mapper) is DatasetMapper:
        mapper.instance_mask_format = "bitmask"


def _add_defaults(cfg: DictConfig) -> None:
    """So that the saved config says what Detectron2, and we, read; its parts stay optional."""
    for key, default in DEFAULTS.items():
        if key.split(".")[0] in cfg and OmegaConf.select(cfg, key) is None:
            OmegaConf.update(cfg, key, default, force_add=True)


def _note_reference_batch(cfg: DictConfig | CfgNode) -> None:
    """The batch that a file has is the one that its schedule is for, unless it says otherwise."""
    batch = value_of(cfg, "dataloader.train.total_batch_size")
    if value_of(cfg, "train.reference_batch_size") or not _whole(1)(batch):
        return  # a wrong one is refused later
    if isinstance(cfg, CfgNode):
        cfg.SOLVER.REFERENCE_BATCH_SIZE = batch
    else:
        cfg.train.reference_batch_size = batch


def _override_lazy(cfg: DictConfig, override: str) -> None:
    """Paths and other strings are taken as they are; the rest is read by Hydra's grammar."""
    if "=" not in override:
        raise UserError(f"Override '{override}' is not of the form key=value.")
    key, text = override.split("=", 1)
    if not key.startswith("+"):  # Hydra's sign for a key to add
        _check_key(cfg, key, override)
    key = key.lstrip("+")
    try:
        current = OmegaConf.select(cfg, key)
    except OmegaConfBaseException:  # a reference to a key that does not exist
        current = None
    value = value_of_text(key, text, current)
    try:
        if value is AS_IT_IS:
            LazyConfig.apply_overrides(cfg, [override])
        else:
            OmegaConf.update(cfg, key, value, force_add=True)
    except Exception as error:  # Hydra's parser has its own exceptions, OmegaConf others
        raise UserError(f"Cannot override the config by '{override}': {error}") from error


def _check_key(cfg: DictConfig, key: str, override: str) -> None:
    """A key that does not exist would be added silently and never read."""
    node, path = cfg, "the config"
    for name in key.split("."):
        if not isinstance(node, DictConfig):
            return  # a list or a value: OmegaConf says itself what it can do with them
        known, open_ended = _known_keys(node)
        if name not in known and not open_ended:
            nearest = difflib.get_close_matches(name, known, n=3) or known
            raise UserError(
                f"Override '{override}': {path} has no key '{name}'; did you mean "
                f"{' or '.join(nearest)}?"
            )
        if name not in node:
            return  # an argument that still has its default
        node, path = node[name], f"'{name}'"


def _known_keys(node: DictConfig) -> tuple[list[str], bool]:
    """The keys that make sense in a node, and whether others do too: **kwargs take any."""
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


def _arguments(target: Callable) -> tuple[list[str], bool]:
    """
    The arguments of a callable, and whether there may be others: what a class takes as **kwargs
    it hands to the next `__init__` of its bases.
    """
    functions: list[Callable] = [target]
    if isinstance(target, type):
        functions = [vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c)]
    names: list[str] = []
    for function in functions:
        parameters = list(inspect.signature(function).parameters.values())
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names, False
    return names, True


def _read_yacs(path: str) -> CfgNode:
    cfg = get_cfg()
    add_msrcnn_config(cfg)
    # Files that version 0.1 saved have it: see _drop_exponent
    cfg.MODEL.ROI_MASK_IOU_HEAD.SCORE_EXPONENT = None
    if POINT_REND.search(str(CfgNode.load_yaml_with_base(path, allow_unsafe=True))):
        _add_point_rend_config(cfg, path)
    cfg.merge_from_file(path)
    return cfg


def _add_point_rend_config(cfg: CfgNode, path: str) -> None:
    try:
        # It needs OpenCV
        from detectron2.projects.point_rend import add_pointrend_config
    except ImportError as error:
        needed = (
            "OpenCV: run `pip install opencv-python-headless`"
            if error.name == "cv2"
            else "detectron2.projects.point_rend, which this installation of Detectron2 lacks"
        )
        raise UserError(
            f"Config file '{path}' is one of PointRend, which needs {needed}."
        ) from error
    add_pointrend_config(cfg)
    cfg.INPUT.MASK_FORMAT = "bitmask"  # the only one that it learns from


def _drop_exponent(cfg: DictConfig | CfgNode) -> None:
    """Remove the exponent of the predicted IoU, which version 0.1 had, if it changes nothing."""
    if isinstance(cfg, CfgNode):
        exponent = cfg.MODEL.ROI_MASK_IOU_HEAD.pop("SCORE_EXPONENT")
    else:
        head = OmegaConf.select(cfg, "model.roi_heads.mask_iou_head") or {}
        exponent = head.pop("score_exponent", None)
    if exponent not in (None, 1):
        raise UserError(
            f"The mask IoU head's score_exponent is {exponent}, and masks are ranked by class "
            "score x predicted IoU, which is no longer raised to an exponent: remove it from the "
            "config."
        )


def _override_yacs(cfg: CfgNode, overrides: Sequence[str], path: str) -> None:
    pairs = _pairs(overrides)
    try:
        for key, text in zip(pairs[::2], pairs[1::2]):
            current = find(cfg, key)
            if current is ABSENT:  # yacs would ignore one that existed in the past
                raise KeyError(f"Non-existent key: {key}")
            value = value_of_text(key, text, current)
            # yacs reads any text as a literal of Python, also '3' and '1e5' where it is a path
            cfg.merge_from_list([key, text if value is AS_IT_IS else repr(value)])
        cfg.merge_from_list(pairs[len(pairs) // 2 * 2 :])  # a key without a value, if any
    except (KeyError, ValueError, AssertionError) as error:
        message = _of_other_type(str(error.args[0] if error.args else type(error).__name__))
        raise UserError(f"Config '{path}' with overrides {list(overrides)}: {message}.") from error


def _of_other_type(message: str) -> str:
    """What a key takes, in place of yacs's message about a value of another type."""
    key = re.match(r"(?s)Type mismatch .* for config key: ([\w.]+)$", message)
    expected = next((s.expected for s in SETTINGS if key and s.yaml == key[1]), "")
    return f"{key[1]} takes {expected}" if key and expected else message


def _pairs(overrides: Sequence[str]) -> list[str]:
    """["A.B=1", "C", "2"] -> ["A.B", "1", "C", "2"]"""
    pairs: list[str] = []
    for text in overrides:
        is_key = len(pairs) % 2 == 0
        pairs += text.split("=", 1) if is_key else [text]
    return pairs


def overridden_keys(cfg: DictConfig | CfgNode, overrides: Sequence[str]) -> set[str]:
    """The keys that overrides of a config set, of its own kind."""
    if isinstance(cfg, CfgNode):
        return set(_pairs([str(x) for x in overrides])[::2])
    return {text.split("=", 1)[0].lstrip("+") for text in overrides}


def value_of_text(key: str, text: str, current: Any) -> Any:
    """
    The value of `key=text` from the command line, of the type that the key has in the config.

    Args:
        current: the key's value so far, None if it has none.

    Returns:
        for a path or another string, `text` without quotes around it; for a number, a number; else
        `AS_IT_IS`.

    Raises:
        UserError: the key takes a number, or True or False, and `text` is something else.
    """
    is_path = key.rsplit(".", 1)[-1] in PATHS
    is_null = text in ("null", "None")
    if is_path or isinstance(current, str):
        if is_null or (text[:1] in ("[", "{") and not is_path):
            return AS_IT_IS  # such as a list of datasets where there was one
        return _without_quotes(text)
    if isinstance(current, bool):
        values = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() in values:
            return values[text.lower()]
        if is_null or text.startswith("$"):
            return AS_IT_IS
        raise UserError(f"'{key}={text}': {key} takes True or False (now {current}).")
    if isinstance(current, (int, float)):
        # Other forms: a list where there was one number, a reference, Hydra's functions
        if is_null or text[:1] in ("[", "{", "(", "$") or text.endswith(")"):
            return AS_IT_IS
        return _number_of_text(key, text, current)
    return AS_IT_IS


def _without_quotes(text: str) -> str:
    """A shell removes its own quotes; Hydra's grammar and yacs wanted others inside of them."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return text
        return value if isinstance(value, str) else text
    return text


def _number_of_text(key: str, text: str, current: int | float) -> int | float:
    try:
        value = int(text)
        return value if isinstance(current, int) else float(value)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        advice = ""
        if text.count(",") == 1 and text.replace(",", "").lstrip("+-").isdigit():
            advice = f": for a fraction write '{key}={text.replace(',', '.')}'"
        raise UserError(f"'{key}={text}': {key} takes a number (now {current}){advice}.")
    if isinstance(current, int) and number.is_integer():
        raise UserError(f"'{key}={text}': {key} takes a whole number; write '{key}={int(number)}'.")
    return number  # a fraction where a whole number was: 0 may be the default of any number


def check_values(cfg: DictConfig | CfgNode) -> None:
    """
    Raises:
        UserError: a value makes no sense, whether a file or the command line has it; the message
            has the key and what it takes.
    """
    is_yaml = isinstance(cfg, CfgNode)
    for setting in SETTINGS:
        key, other = setting.lazy, setting.yaml
        if is_yaml:
            key, other = other, key
        if setting.holds is None or key is None:
            continue
        try:
            value = find(cfg, key)
        except OmegaConfBaseException:  # a list on the way, or a reference that leads nowhere
            continue
        is_left_out = value is None and not (is_yaml or setting.required)
        if value is ABSENT or is_left_out or setting.holds(value):
            continue
        advice = ""
        if isinstance(value, float) and value.is_integer() and setting.holds(int(value)):
            advice = f": write {int(value)}"
        named = f" ({'LazyConfig' if is_yaml else 'yaml'}: {other})" if other else ""
        raise UserError(f"{key}{named} is {value!r}, but takes {setting.expected}{advice}.")


def builds_a(kind: type[nn.Module], cfg: DictConfig | CfgNode) -> bool:
    """Whether the model of a config of either kind is of this class, or of a derived one."""
    if isinstance(cfg, CfgNode):
        found = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    else:
        model = cfg.get("model", {})
        found = target_of(model) if "_target_" in model else None
    return isinstance(found, type) and issubclass(found, kind)
