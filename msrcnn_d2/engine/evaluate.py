"""Evaluate a model on the test sets of a recipe, and show the results."""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tabulate import tabulate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from msrcnn_d2_runtime.scores import RANKINGS, TITLES

from ..checkpoint import MaskScoringCheckpointer
from ..class_names import difference, same
from ..evaluation import MaskQuality
from ..evaluation.instance_results import ClassesByName, InstanceResults
from ..modeling import UnpastedMasks
from ..modeling.acceleration import channels_last_on_cpu, compile_dense_parts
from ..published_models import Published
from ..report import write_report
from ..report.figures import reliability_charts
from ..utils.errors import UserError, agree_on_user_errors
from .preflight import check_number, names_of_dataset
from .recipe import Recipe, TestSet

__all__ = [
    "build_model",
    "evaluate",
    "evaluate_checkpoint",
    "log_reliability",
    "own_model",
    "run_inference",
    "share_buffers",
    "summary_table",
    "test_precision",
    "use_names",
    "write_report_of",
]

logger = logging.getLogger(__name__)

# Evaluators that take the classes of a model for those of the dataset
OF_CLASSES = (COCOEvaluator, LVISEvaluator, CityscapesInstanceEvaluator, COCOPanopticEvaluator)


def build_model(recipe: Recipe) -> nn.Module:
    """
    The model of a recipe with new weights, on its device, compiled if the recipe says so.

    Raises:
        UserError: a part of the model needs a package that is not installed, as transformers of
            Detectron2's main branch need timm.
    """
    try:
        model = recipe.build_model().to(recipe.device)
    except ImportError as error:
        raise UserError(f"The model cannot be built: {error}. Install what is missing.") from error
    if recipe.compile:
        logger.info("torch.compile: the first iteration and the first evaluation take minutes.")
        compile_dense_parts(model)
    return model


def evaluate_checkpoint(
    recipe: Recipe, resume: bool = False, published: Published | None = None
) -> dict:
    """
    Evaluate `recipe.init_checkpoint`, or with `resume` the last checkpoint in the output folder if
    there is one. Write a report for each test set.

    Returns:
        results as :func:`evaluate` returns them.

    Raises:
        UserError: there is no checkpoint, or it does not fit the model.
    """
    model = build_model(recipe)
    checkpointer = MaskScoringCheckpointer(
        model, recipe.output_dir, takes_averages=recipe.evaluates_ema
    )
    with agree_on_user_errors():
        if not (recipe.init_checkpoint or (resume and checkpointer.has_checkpoint())):
            raise UserError(
                "There is no checkpoint to evaluate: give train.init_checkpoint=FILE (yaml: "
                "MODEL.WEIGHTS FILE)."
            )
        checkpointer.resume_or_load(recipe.init_checkpoint, resume=resume, strict=True)
    class_names = checkpointer.loaded_class_names
    results = evaluate(recipe, model.eval(), published, write_report_of, class_names)
    if comm.is_main_process():
        recipe.verify_results(results)
    return results


def evaluate(
    recipe: Recipe,
    model: nn.Module,
    published: Published | None = None,
    use_quality: Callable[[MaskQuality, TestSet, Recipe, dict], object] = lambda *_: None,
    class_names: Sequence[str] | None = None,
) -> dict:
    """
    Evaluate on each test set and log the results.

    Args:
        published: results to show beside the measured ones on COCO val2017.
        use_quality: called on the main process for each test set whose evaluator has measured the
            quality of masks, after the results were logged; with them as the last argument.
        class_names: of the model, in the order of its classes. They match its classes with those
            of a test set in another order. None if they are not known; then the numbers of classes
            have to agree.

    Returns:
        {task: {metric: value}} on the main process, as evaluators return it; with several test
        sets {name of the test set: {task: {metric: value}}}. Empty on other processes.
    """
    all_results: dict[str, dict] = OrderedDict()
    for test_set in recipe.test_sets:
        evaluator = test_set.build_evaluator()
        with agree_on_user_errors():
            use_names(evaluator, test_set, class_names, recipe)
        results = run_inference(recipe, model, test_set, evaluator)
        all_results[str(test_set)] = results
        if not comm.is_main_process():
            continue
        print_csv_format(results)
        if any(task in results for task in ("bbox", "segm")):
            comparable = published if test_set.names == ("coco_2017_val",) else None
            logger.info("Results on %s:\n%s", test_set, summary_table(results, comparable))
        measured = (getattr(e, "mask_quality", None) for e in evaluators_in(evaluator))
        quality = next((q for q in measured if isinstance(q, MaskQuality)), None)
        if quality is None:
            continue
        try:
            use_quality(quality, test_set, recipe, results)
        except Exception:  # it must not cost a training, or the other test sets
            logger.exception(
                "The quality of masks was measured, but cannot be shown. The results are complete: "
                "`msrcnn-d2 report` makes the report from them."
            )
    return next(iter(all_results.values())) if len(all_results) == 1 else all_results


def run_inference(recipe: Recipe, model: nn.Module, test_set: TestSet, evaluator: Any) -> dict:
    """What an evaluator makes of the predictions on a test set; all processes call this."""
    share_buffers(model)
    tested = own_model(recipe.wrap_for_test(model))
    if _takes_unpasted_masks(evaluator) and UnpastedMasks.supports(tested):
        tested = UnpastedMasks(tested)
    with channels_last_on_cpu(model), test_precision(recipe):
        return inference_on_dataset(tested, test_set.build_loader(), evaluator)


def share_buffers(model: nn.Module) -> None:
    """Batch norms have other statistics in each process; those of the main process are saved."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def own_model(model: nn.Module) -> nn.Module:
    """The model in which a process with more images does not wait for the others."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _takes_unpasted_masks(evaluator: Any) -> bool:
    """A `process` of the user's own may expect masks of the image's size."""
    kind = type(evaluator)
    if getattr(kind, "process", None) is InstanceResults.process:
        return True
    return vars(kind).get("takes_unpasted_masks", False)  # of this class itself


def test_precision(recipe: Recipe) -> AbstractContextManager:
    if recipe.test_amp and recipe.device.startswith("cuda"):
        return torch.autocast("cuda")
    if recipe.test_amp:
        logger.warning(
            "Evaluation is at full precision: on a CPU mixed precision is bfloat16, which rounds "
            "class scores to 1/256. train.amp.test (yaml: TEST.AMP) is for GPUs."
        )
    return nullcontext()


def summary_table(results: dict, published: Published | None = None) -> str:
    """
    Args:
        results: of one test set, {task: {metric: percent}}.
        published: AP to show in a further column.

    Returns:
        a table of AP, AP50 and AP75 of boxes, of masks and boundaries under each ranking, and of
        keypoints. If more than 100 detections of an image count, it also has AP@100, which compares
        with published results.
    """
    main = "mask_score" if "segm_by_class_score" in results else "class_score"
    titles = {"bbox": "boxes"}
    for kind, noun in (("segm", "masks"), ("boundary", "boundaries")):
        for name in RANKINGS:
            titles[kind if name == main else f"{kind}_by_{name}"] = f"{noun} by {TITLES[name]}"
        if not any(task.startswith(f"{kind}_by_") for task in results):  # a plain Mask R-CNN
            titles[kind] = noun
    titles["keypoints"] = "keypoints"
    comparable_ap = {"bbox": published.box_ap} if published else {}
    if published and main == "mask_score":
        comparable_ap["segm"] = published.mask_ap
    at_100 = ["AP@100"] if any("AP@100" in result for result in results.values()) else []
    shown = [result for task, result in results.items() if task in titles]
    # Cityscapes has no AP75
    metrics = [m for m in ("AP", "AP50", "AP75", *at_100) if any(m in result for result in shown)]
    table = [
        [
            title,
            *(results[task].get(m) for m in metrics),
            *([comparable_ap.get(task)] if published else []),
        ]
        for task, title in titles.items()
        if task in results
    ]
    comparable = (at_100 or ["AP"])[0]
    headers = ["", *metrics, *([f"published {comparable} (COCO val2017)"] if published else [])]
    return tabulate(table, headers=headers, floatfmt=".2f", tablefmt="github")


def log_reliability(quality: MaskQuality, test_set: TestSet, recipe: Recipe, results: dict) -> None:
    """Show the reliability diagrams in TensorBoard. Training logs the numbers by itself."""
    for chart in reliability_charts(quality):
        canvas = FigureCanvasAgg(chart.figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        name = f"mask_quality/{chart.name}"
        if len(recipe.test_sets) > 1:
            name = f"{test_set}/{name}"
        get_event_storage().put_image(name, pixels.transpose(2, 0, 1))


def write_report_of(quality: MaskQuality, test_set: TestSet, recipe: Recipe, results: dict) -> None:
    """Write the report into "report/" in the output folder, or a folder in it for each test set."""
    folder = os.path.join(recipe.output_dir, "report")
    if len(recipe.test_sets) > 1:
        folder = os.path.join(folder, str(test_set))
    roots = [MetadataCatalog.get(name).get("image_root") for name in test_set.names]
    title, root = f"Masks on {test_set}", roots[0] if roots else None
    page = write_report(quality, folder, title, root, recipe.images, results=results)
    logger.info("Report on the quality of masks: %s", page)


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
            names = names_of_dataset(dataset)
            if recipe.num_classes is not None and names is not None:
                check_number(dataset, names, recipe.num_classes)
        return
    for one in evaluators_in(evaluator):
        if isinstance(one, ClassesByName):
            one.use_class_names(class_names)
        elif isinstance(one, OF_CLASSES):
            for dataset in test_set.names:
                names = names_of_dataset(dataset)
                if names is None or same(class_names, names):
                    continue
                why_not = difference("the model", class_names, f"dataset '{dataset}'", names)
                raise UserError(
                    f"{why_not} Our evaluators, such as MaskScoringCOCOEvaluator, evaluate by "
                    f"name; {type(one).__name__} does not."
                )


def evaluators_in(evaluator: Any) -> list:
    """One evaluator, or several."""
    if isinstance(evaluator, DatasetEvaluators):
        evaluator = evaluator._evaluators
    return evaluator if isinstance(evaluator, list) else [evaluator]
