"""
What `msrcnn-d2 train` and `msrcnn-d2 evaluate` do, for both kinds of config.

Data flow::

    configs      a file, with the changes from the command line -> a config
    recipe       a config of either kind                        -> a Recipe, with one meaning
    launch       start a process for each GPU
    preflight    what would fail later fails now
    loop         the training: trainer (steps), loaders (images), hooks (checkpoints, signals)
    evaluate     results, and what to do with them; validation: losses on held-out images
    best_checkpoint     keep the best one, and stop when nothing gets better
    evaluate_predictor  the same for a predictor, such as an exported model

Nothing else in the package needs it: Detectron2's `DefaultTrainer` trains our ROI heads, too.
"""

from .batch_scaling import scale_to_batch
from .best_checkpoint import check_metric
from .configs import device_of, find_config_file, load_config, register_dataset
from .evaluate import evaluate_checkpoint
from .evaluate_predictor import evaluate_predictor
from .loop import train
from .preflight import check_data, check_recipe, keep_config_of_training, refuse_other_run
from .recipe import Recipe, build_recipe

__all__ = [
    "Recipe",
    "build_recipe",
    "check_data",
    "check_metric",
    "check_recipe",
    "device_of",
    "evaluate_checkpoint",
    "evaluate_predictor",
    "find_config_file",
    "keep_config_of_training",
    "load_config",
    "refuse_other_run",
    "register_dataset",
    "scale_to_batch",
    "train",
]
