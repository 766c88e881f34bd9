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
    lr_key, given = key_of(cfg, LEARNING_RATE), overridden_keys(cfg, overrides)
    if value_of(cfg, LEARNING_RATE) is None:
        if scale:
            raise UserError(f"--scale-lr finds no learning rate in the config: set {lr_key}.")
        return cfg, ""
    if lr_key in given and not scale:
        _set(cfg, key_of(cfg, REFERENCE), batch)  # so that the saved config is not scaled again
        return cfg, ""
    of_kind = _scaled_yaml if isinstance(cfg, CfgNode) else _scaled
    scaled = {
        key: value
        for key, value in of_kind(cfg, batch, reference).items()
        if key not in given and value != find(cfg, key)
    }
    changes = [f"{key} {_text(find(cfg, key))} -> {_text(value)}" for key, value in scaled.items()]
    text = ", ".join(changes) or "nothing, since all is set by KEY=VALUE"
    if not scale:
        return cfg, (
            f"The config is made for {reference} images per iteration, but this run has {batch}, "
            f"with the same learning rate and schedule. --scale-lr would change {text}."
        )
    for key, value in {**scaled, key_of(cfg, REFERENCE): batch}.items():
        _set(cfg, key, value)
    return cfg, f"--scale-lr, {reference} -> {batch} images per iteration: {text}."


def _scaled(cfg: DictConfig, batch: int, reference: int) -> dict[str, Any]:
    """The learning rates and what is in iterations, by key."""
    factor = batch / reference
    scaled = {LEARNING_RATE: value_of(cfg, LEARNING_RATE) * factor}
    for name, group in (OmegaConf.select(cfg, RATES_BY_NAME) or {}).items():
        # One that refers to another rate follows it
        if group.get("lr") is not None and not OmegaConf.is_interpolation(group, "lr"):
            scaled[f"{RATES_BY_NAME}.{name}.lr"] = group.lr * factor
    for key in ITERATIONS:
        if value := value_of(cfg, key):  # 0 is for the end only
            scaled[key] = max(1, round(value / factor))
    return scaled


def _scaled_yaml(cfg: CfgNode, batch: int, reference: int) -> dict[str, Any]:
    """The same by Detectron2, as if each image had a process of its own."""
    as_processes = cfg.clone()
    as_processes.SOLVER.IMS_PER_BATCH = as_processes.SOLVER.REFERENCE_WORLD_SIZE = reference
    scaled = DefaultTrainer.auto_scale_workers(as_processes, batch)
    scaled.SOLVER.CHECKPOINT_PERIOD = max(1, scaled.SOLVER.CHECKPOINT_PERIOD)
    if cfg.TEST.EVAL_PERIOD:
        scaled.TEST.EVAL_PERIOD = max(1, scaled.TEST.EVAL_PERIOD)
    keys = (*(key_of(cfg, key) for key in (LEARNING_RATE, *ITERATIONS)), *YAML_ONLY)
    return {key: find(scaled, key) for key in keys}


def _set(cfg: DictConfig | CfgNode, key: str, value: Any) -> None:
    if isinstance(cfg, DictConfig):
        OmegaConf.update(cfg, key, value)
    else:
        cfg.merge_from_list([key, value])


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
