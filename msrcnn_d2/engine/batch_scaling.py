"""Learning rate and schedule for another number of images per iteration than the config's."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..utils.errors import UserError
from .configs import find, key_of, overridden_keys, value_of

__all__ = ["scale_to_batch"]

BATCH_SIZE = "dataloader.train.total_batch_size"
REFERENCE = "train.reference_batch_size"
LEARNING_RATE = "optimizer.lr"
RATES_BY_NAME = "optimizer.params.overrides"  # of a LazyConfig: {name: {"lr": ...}}
ITERATIONS = ("train.max_iter", "train.eval_period", "train.checkpointer.period")
# In a LazyConfig both are shares of the run
YAML_ONLY = ("SOLVER.STEPS", "SOLVER.WARMUP_ITERS")


def scale_to_batch(
    cfg: DictConfig | CfgNode, overrides: Sequence[str], scale: bool
) -> tuple[DictConfig | CfgNode, str]:
    """
    Linear scaling (Goyal et al. 2017, arXiv:1706.02677, section 2.1): for k times as many images
    per iteration as the config is made for, k times the learning rate and 1/k of the iterations.

    Args:
        cfg: from :func:`load_config`.
        overrides: those that it was given. What they set is not scaled, except the batch.
        scale: whether to do so. If not, a mismatch is only told.

    Returns:
        the config; and one sentence about what was changed, or what does not match, or "". There is
        no mismatch if the overrides have a learning rate: the config is then made for its batch.

    Raises:
        UserError: the config already scales itself by the number of processes, or has no learning
            rate.
    """
    batch, reference = value_of(cfg, BATCH_SIZE), value_of(cfg, REFERENCE)
    by_processes = isinstance(cfg, CfgNode) and cfg.SOLVER.REFERENCE_WORLD_SIZE
    if scale and by_processes:
        raise UserError(
            "--scale-lr and SOLVER.REFERENCE_WORLD_SIZE scale the schedule twice: use one of them."
        )
    if by_processes or not batch or not reference or batch == reference:
        return cfg, ""
    given = overridden_keys(cfg, overrides)
    factor = batch / reference
    lr, max_iter = value_of(cfg, LEARNING_RATE), value_of(cfg, ITERATIONS[0])
    if lr is None:
        if scale:
            raise UserError("--scale-lr finds no learning rate in the config: set optimizer.lr.")
        return cfg, ""
    if not scale:
        if key_of(cfg, LEARNING_RATE) in given:
            _set(cfg, key_of(cfg, REFERENCE), batch)  # so that the saved config is not scaled again
            return cfg, ""
        return cfg, (
            f"The config is made for {reference} images per iteration, and this run has {batch}, "
            f"with the learning rate {lr:g} and {max_iter} iterations: --scale-lr makes them "
            f"{lr * factor:g} and {round(max_iter / factor)}."
        )
    keys = [key_of(cfg, key) for key in (LEARNING_RATE, *ITERATIONS)]
    keys += YAML_ONLY if isinstance(cfg, CfgNode) else _rates_by_name(cfg)
    before = {key: find(cfg, key) for key in keys}
    cfg = _scaled_yaml(cfg, batch, reference) if isinstance(cfg, CfgNode) else _scaled(cfg, factor)
    for key in given & set(keys):
        _set(cfg, key, before[key])
    _set(cfg, key_of(cfg, REFERENCE), batch)
    changes = [
        f"{key} {_text(value)} -> {_text(find(cfg, key))}"
        for key, value in before.items()
        if value != find(cfg, key)
    ]
    return cfg, f"--scale-lr, {reference} -> {batch} images per iteration: {', '.join(changes)}."


def _rates_by_name(cfg: DictConfig) -> list[str]:
    """The keys of learning rates of single parameters that do not refer to another one."""
    groups = OmegaConf.select(cfg, RATES_BY_NAME) or {}
    return [
        f"{RATES_BY_NAME}.{name}.lr"
        for name, group in groups.items()
        if group.get("lr") is not None and not OmegaConf.is_interpolation(group, "lr")
    ]


def _scaled(cfg: DictConfig, factor: float) -> DictConfig:
    for key in (LEARNING_RATE, *_rates_by_name(cfg)):
        _set(cfg, key, find(cfg, key) * factor)
    for key in ITERATIONS:
        value = value_of(cfg, key)
        _set(cfg, key, max(1, round(value / factor)) if value else value)  # 0: at the end only
    return cfg


def _scaled_yaml(cfg: CfgNode, batch: int, reference: int) -> CfgNode:
    """By Detectron2, as if each image had a process of its own."""
    cfg = cfg.clone()
    cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.REFERENCE_WORLD_SIZE = reference
    scaled = DefaultTrainer.auto_scale_workers(cfg, batch)
    scaled.SOLVER.REFERENCE_WORLD_SIZE = 0
    scaled.SOLVER.CHECKPOINT_PERIOD = max(1, scaled.SOLVER.CHECKPOINT_PERIOD)
    if cfg.TEST.EVAL_PERIOD:
        scaled.TEST.EVAL_PERIOD = max(1, scaled.TEST.EVAL_PERIOD)
    return scaled


def _set(cfg: DictConfig | CfgNode, key: str, value: Any) -> None:
    if isinstance(cfg, DictConfig):
        OmegaConf.update(cfg, key, value)
    else:
        cfg.merge_from_list([key, value])


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
