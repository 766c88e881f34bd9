"""What `train_net.py` does: reads a config, checks it, trains and evaluates, on any machine."""

from .configs import device_of, find_config_file, load_config, register_dataset
from .data_check import check_data
from .launch import launch
from .loop import evaluate, evaluate_checkpoint, train
from .preflight import check_recipe, keep_config_of_training, refuse_other_run
from .recipe import Recipe, build_recipe

__all__ = [
    "Recipe",
    "build_recipe",
    "check_data",
    "check_recipe",
    "device_of",
    "evaluate",
    "evaluate_checkpoint",
    "find_config_file",
    "keep_config_of_training",
    "launch",
    "load_config",
    "refuse_other_run",
    "register_dataset",
    "train",
]
