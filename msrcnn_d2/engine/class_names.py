"""Names of classes in a run: those of its datasets, of its weights and of its evaluations."""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators

from ..class_names import difference, obstacle, same
from ..evaluation import MaskScoringCOCOEvaluator
from ..utils.errors import UserError
from ..utils.text import listed
from .recipe import Recipe, TestSet

__all__ = [
    "check_names_of_datasets",
    "check_names_of_weights",
    "check_number",
    "evaluators_in",
    "names_of_training",
    "use_names",
]

logger = logging.getLogger(__name__)

ADVICE = "Give the categories of all annotation files the same names and the same order of ids."


def names_of_training(recipe: Recipe) -> list[str] | None:
    """Of the classes that the model learns; None where the training data do not say."""
    return _names(recipe.train_names[0]) if recipe.train_names else None


def _names(dataset: str) -> list[str] | None:
    metadata = MetadataCatalog.get(dataset)
    if not hasattr(metadata, "thing_classes") and dataset in DatasetCatalog.list():
        DatasetCatalog.get(dataset)  # the json has the categories
    return list(metadata.get("thing_classes") or []) or None


def check_names_of_datasets(recipe: Recipe, training: bool) -> None:
    """
    Training sets have the same names in the same order. A test set may lack some, or have others
    besides: it is evaluated by name.

    Raises:
        UserError: a dataset does not go together with the first one.
    """
    train_names = recipe.train_names if training else ()
    test_names = [name for test_set in recipe.test_sets for name in test_set.names]
    first: tuple[str, list[str]] | None = None
    for dataset in dict.fromkeys([*train_names, *test_names]):
        names = _names(dataset)
        if names is None:
            continue
        if first is None:
            first = f"dataset '{dataset}'", names
            continue
        compare = difference if dataset in train_names else obstacle
        why_not = compare(*first, f"dataset '{dataset}'", names)
        # Test sets without a training set may have nothing to do with each other
        if why_not and (training or sorted(names) == sorted(first[1])):
            raise UserError(f"{why_not} {ADVICE}")


def check_number(dataset: str, names: Sequence[str], num_classes: int) -> None:
    """
    Raises:
        UserError: a dataset has another number of classes than the model.
    """
    if len(names) != num_classes:
        raise UserError(
            f"Dataset '{dataset}' has {len(names)} categories ({listed(names)}), but the "
            f"model predicts {num_classes}: set model.roi_heads.num_classes={len(names)} "
            f"(yaml: MODEL.ROI_HEADS.NUM_CLASSES {len(names)})."
        )


def check_names_of_weights(
    found: Sequence[str] | None, expected: Sequence[str] | None, keeps_classes: bool
) -> None:
    """
    Args:
        found: names of classes in the weights that a training starts from, if there are any.
        expected: those that it trains.
        keeps_classes: whether it goes on with the class scores in the weights as they are, since
            it resumes or since they are frozen.

    Raises:
        UserError: the weights are of other classes, or have them in another order.
    """
    if found is None or expected is None or same(found, expected):
        return
    if keeps_classes or sorted(found) == sorted(expected):
        why_not = difference("the weights", found, "the training data", expected)
        raise UserError(
            f"{why_not} Train on the names and the order of the weights, or start from others."
        )
    if len(found) == len(expected):
        logger.warning(
            "The weights were trained for other classes (%s): the class scores of %s start from "
            "theirs.",
            *(listed(found), listed(expected)),
        )


def use_names(
    evaluator: Any, test_set: TestSet, class_names: Sequence[str] | None, recipe: Recipe
) -> None:
    """
    Tell evaluators the names of the model's classes.

    Raises:
        UserError: the test set has other classes, and the evaluator or the names do not allow to
            find them by name.
    """
    if class_names is None:
        for dataset in test_set.names:
            names = _names(dataset)
            if recipe.num_classes is not None and names is not None:
                check_number(dataset, names, recipe.num_classes)
        return
    for one in evaluators_in(evaluator):
        if isinstance(one, MaskScoringCOCOEvaluator):
            one.use_class_names(class_names)
        elif isinstance(one, COCOEvaluator):
            for dataset in test_set.names:
                names = _names(dataset)
                if names is None or same(class_names, names):
                    continue
                why_not = difference("the model", class_names, f"dataset '{dataset}'", names)
                raise UserError(
                    f"{why_not} MaskScoringCOCOEvaluator evaluates by name; {type(one).__name__} "
                    "does not."
                )


def evaluators_in(evaluator: Any) -> list:
    """One evaluator, or several."""
    if isinstance(evaluator, DatasetEvaluators):
        evaluator = evaluator._evaluators
    return evaluator if isinstance(evaluator, list) else [evaluator]
