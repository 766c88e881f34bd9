"""What values of a config are refused before anything is built from them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detectron2.config import CfgNode

from ..utils.errors import UserError

__all__ = ["check_values"]


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


class Rule(NamedTuple):
    """
    Attributes:
        lazy, yaml: the key in a config of each kind, None if there is none.
        holds: whether a value is sound.
        expected: what is sound, in words.
    """

    lazy: str | None
    yaml: str | None
    holds: Callable[[Any], bool]
    expected: str


FROM_1 = (_whole(1), "a whole number from 1 on")
FROM_0 = (_whole(0), "a whole number from 0 on")
NOT_NEGATIVE = (_number(0), "a number from 0 on")
SEED = (_whole(-(2**31), 2**32 - 1), "a whole number below 2^32 (negative: a random one)")
SWITCH = (lambda x: isinstance(x, bool), "True or False")
FOLDER = (lambda x: isinstance(x, str) and x != "", "the path of a folder")
FILE = (lambda x: isinstance(x, str), "the path of a file, or '' for none")

# Keys of a LazyConfig that are not None; another one is left to its default then
REQUIRED = {
    *("train.max_iter", "train.eval_period", "train.log_period", "train.checkpointer.period"),
    *("train.output_dir", "optimizer.lr", "model.roi_heads.num_classes"),
}
RULES = [
    Rule("train.max_iter", "SOLVER.MAX_ITER", *FROM_1),
    Rule("train.eval_period", "TEST.EVAL_PERIOD", *FROM_0),
    Rule("train.log_period", None, *FROM_1),
    Rule("train.checkpointer.period", "SOLVER.CHECKPOINT_PERIOD", *FROM_1),
    Rule("train.checkpointer.max_to_keep", None, *FROM_1),
    Rule("train.seed", "SEED", *SEED),
    Rule("train.max_bad_images", "DATALOADER.MAX_BAD_IMAGES", *FROM_0),
    Rule("train.max_nonfinite_steps", "SOLVER.MAX_NONFINITE_STEPS", *FROM_0),
    Rule("train.output_dir", "OUTPUT_DIR", *FOLDER),
    Rule("train.init_checkpoint", "MODEL.WEIGHTS", *FILE),
    Rule("train.amp.enabled", "SOLVER.AMP.ENABLED", *SWITCH),
    Rule("train.amp.test", "TEST.AMP.ENABLED", *SWITCH),
    Rule("train.detect_anomaly", "SOLVER.DETECT_ANOMALY", *SWITCH),
    Rule("train.compile", "SOLVER.COMPILE", *SWITCH),
    Rule("train.check_images", "DATALOADER.CHECK_IMAGES", *SWITCH),
    Rule("dataloader.train.total_batch_size", "SOLVER.IMS_PER_BATCH", *FROM_1),
    Rule("dataloader.train.num_workers", "DATALOADER.NUM_WORKERS", *FROM_0),
    Rule("dataloader.test.num_workers", None, *FROM_0),
    Rule("dataloader.test.batch_size", "DATALOADER.TEST_BATCH_SIZE", *FROM_1),
    Rule("model.roi_heads.num_classes", "MODEL.ROI_HEADS.NUM_CLASSES", *FROM_1),
    Rule("model.roi_heads.batch_size_per_image", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", *FROM_1),
    Rule("optimizer.lr", "SOLVER.BASE_LR", *NOT_NEGATIVE),
    Rule("optimizer.momentum", "SOLVER.MOMENTUM", *NOT_NEGATIVE),
    Rule("optimizer.weight_decay", "SOLVER.WEIGHT_DECAY", *NOT_NEGATIVE),
    Rule("lr_multiplier.warmup_length", None, _number(0, 1), "a share of the run, from 0 to 1"),
    Rule("lr_multiplier.warmup_factor", "SOLVER.WARMUP_FACTOR", *NOT_NEGATIVE),
    Rule(None, "SOLVER.WARMUP_ITERS", *FROM_0),
    Rule(None, "SOLVER.REFERENCE_WORLD_SIZE", *FROM_0),
    Rule(None, "TEST.PRECISE_BN.NUM_ITER", *FROM_1),
]


def check_values(cfg: DictConfig | CfgNode) -> None:
    """
    Check the values that only a file, or the command line, can have got wrong.

    Raises:
        UserError: a value makes no training; the message has the key and what it takes.
    """
    is_yaml = isinstance(cfg, CfgNode)
    for rule in RULES:
        key, other = (rule.yaml, rule.lazy) if is_yaml else (rule.lazy, rule.yaml)
        found, value = _find(cfg, key) if key else (False, None)
        if not found or rule.holds(value):
            continue
        advice = ""
        if isinstance(value, float) and value.is_integer() and rule.holds(int(value)):
            advice = f": write {int(value)}"
        named = f" ({'LazyConfig' if is_yaml else 'yaml'}: {other})" if other else ""
        raise UserError(f"{key}{named} is {value!r}, but takes {rule.expected}{advice}.")


def _find(cfg: DictConfig | CfgNode, key: str) -> tuple[bool, Any]:
    if isinstance(cfg, CfgNode):
        node: Any = cfg
        for name in key.split("."):
            if not isinstance(node, CfgNode) or name not in node:
                return False, None
            node = node[name]
        return True, node
    parent, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(cfg, parent)
        if not isinstance(node, DictConfig) or name not in node:
            return False, None
        return node[name] is not None or key in REQUIRED, node[name]
    except OmegaConfBaseException:  # a list on the way, or a reference to a key that is not there
        return False, None
