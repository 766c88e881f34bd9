"""Train and evaluate a recipe."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Optional

import torch
from fvcore.nn.precise_bn import get_bn_modules
from tabulate import tabulate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.engine import AMPTrainer, SimpleTrainer, create_ddp_model, default_writers, hooks
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset, print_csv_format
from detectron2.utils import comm

from ..checkpoint import MaskScoringCheckpointer
from ..errors import UserError, agree_on_user_errors
from ..evaluation import MaskQuality, MaskScoringCOCOEvaluator
from ..model_zoo import Published
from ..modeling import UnpastedMasks
from ..modeling.acceleration import channels_last_on_cpu, compile_dense_parts
from .data_order import ResumableBatches, StepSeeds
from .quality import log_reliability, write_report_of
from .recipe import Recipe, TestSet

__all__ = ["evaluate", "evaluate_checkpoint", "train"]

logger = logging.getLogger(__name__)


def train(recipe: Recipe, resume: bool = False) -> dict:
    """
    Args:
        recipe: what to train and how.
        resume: go on from the last checkpoint in the output folder, if there is one. The run then
            has the losses of one that was never interrupted.

    Returns:
        results of the evaluation at the end, as :func:`evaluate` returns them.
    """
    model = _build_model(recipe)
    logger.info("Model:\n%s", model)
    optimizer = recipe.build_optimizer(model)
    seeds = StepSeeds(recipe.seed if recipe.seed >= 0 else comm.shared_random_seed())
    batches = ResumableBatches(recipe.build_train_loader, seeds)
    model = _distributed(model, recipe)
    trainer = _build_trainer(model, batches, optimizer, recipe)
    checkpointer = MaskScoringCheckpointer(model, recipe.output_dir, trainer=trainer)

    results: dict = {}

    def evaluate_and_keep():
        results.clear()
        results.update(evaluate(recipe, model, use_quality=log_reliability))
        return results

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            seeds,
            hooks.LRScheduler(scheduler=recipe.build_lr_scheduler(optimizer)),
            _precise_bn(recipe, model, seeds),
            _on_main_process(hooks.PeriodicCheckpointer, checkpointer, **recipe.checkpointer),
            hooks.EvalHook(recipe.eval_period, evaluate_and_keep),
            _on_main_process(_periodic_writer, recipe),
        ]
    )
    with agree_on_user_errors():
        checkpointer.resume_or_load(recipe.init_checkpoint, resume=resume)
    if resume and checkpointer.has_checkpoint():
        batches.first_iter = trainer.iter + 1  # the iteration in the checkpoint is done
    trainer.train(batches.first_iter, recipe.max_iter)
    return _verified(results, recipe)


def _build_model(recipe: Recipe) -> nn.Module:
    model = recipe.build_model().to(recipe.device)
    if recipe.compile:
        logger.info("torch.compile: the first iteration and the first evaluation take minutes.")
        compile_dense_parts(model)
    return model


def _verified(results: dict, recipe: Recipe) -> dict:
    if comm.is_main_process():
        recipe.verify_results(results)
    return results


def _distributed(model: nn.Module, recipe: Recipe) -> nn.Module:
    on_cpu = not recipe.device.startswith("cuda")
    return create_ddp_model(model, **recipe.ddp, **({"device_ids": None} if on_cpu else {}))


def _build_trainer(model, batches, optimizer, recipe: Recipe) -> SimpleTrainer:
    if recipe.amp and recipe.device.startswith("cuda"):
        return AMPTrainer(model, batches, optimizer)
    if recipe.amp:
        logger.info("Mixed precision on a CPU is bfloat16, which needs no gradient scaling.")
        _autocast_in_training(model)
    return SimpleTrainer(model, batches, optimizer)


def _autocast_in_training(model: nn.Module) -> None:
    """As `AMPTrainer` does on a GPU, which leaves evaluation at full precision."""
    forward = model.forward

    def autocast_forward(inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.training):
            return forward(inputs)

    model.forward = autocast_forward  # type: ignore[method-assign]


def _precise_bn(recipe: Recipe, model, seeds: StepSeeds) -> Optional[hooks.PreciseBN]:
    if not (recipe.precise_bn_iters and get_bn_modules(model)):
        return None
    loader = ResumableBatches(recipe.build_train_loader, seeds)  # leaves that of training alone
    return hooks.PreciseBN(recipe.eval_period, model, loader, recipe.precise_bn_iters)


def _on_main_process(build_hook, *args, **kwargs):
    return build_hook(*args, **kwargs) if comm.is_main_process() else None


def _periodic_writer(recipe: Recipe) -> hooks.PeriodicWriter:
    writers = default_writers(recipe.output_dir, recipe.max_iter)
    return hooks.PeriodicWriter(writers, period=recipe.log_period)


def evaluate(
    recipe: Recipe,
    model: nn.Module,
    published: Optional[Published] = None,
    use_quality: Callable[[MaskQuality, TestSet, Recipe], object] = lambda *_: None,
) -> dict:
    """
    Evaluate on each test set; log the results.

    Args:
        published: results to show beside the measured ones, if those are on COCO val2017 too.
        use_quality: called on the main process for each test set whose evaluator has measured the
            quality of masks, after the results were logged.

    Returns:
        {task: {metric: value}}, as evaluators return it, on the main process; a level more, the
        names of the test sets, where there are several. Empty on other processes.
    """
    all_results = OrderedDict()
    for test_set in recipe.test_sets:
        evaluator = test_set.build_evaluator()
        results = _inference(recipe, model, test_set, evaluator)
        if comm.is_main_process():
            print_csv_format(results)
            if "bbox" in results:
                comparable = published if test_set.names == ("coco_2017_val",) else None
                logger.info("Results on %s:\n%s", test_set, summary_table(results, comparable))
            _use(use_quality, _mask_quality(evaluator), test_set, recipe)
        all_results[str(test_set)] = results
    return next(iter(all_results.values())) if len(all_results) == 1 else all_results


def _use(use_quality: Callable, quality: Optional[MaskQuality], *args) -> None:
    """A report or a figure that fails must not cost a training, or the other test sets."""
    if quality is None:
        return
    try:
        use_quality(quality, *args)
    except Exception:
        logger.exception(
            "The quality of masks was measured, but cannot be shown; the results are complete. "
            "`python -m msrcnn_d2.report` makes the report from them."
        )


def _mask_quality(evaluator) -> Optional[MaskQuality]:
    """What an evaluator, or the first one of several, has measured of it."""
    if isinstance(evaluator, DatasetEvaluators):
        evaluator = evaluator._evaluators
    evaluators = evaluator if isinstance(evaluator, list) else [evaluator]
    found = (getattr(e, "mask_quality", None) for e in evaluators)
    return next((q for q in found if isinstance(q, MaskQuality)), None)


def _inference(recipe: Recipe, model: nn.Module, test_set: TestSet, evaluator) -> dict:
    tested = recipe.wrap_for_test(model)
    if isinstance(tested, DistributedDataParallel):
        tested = tested.module  # a process with more images must not wait for the others
    if _takes_unpasted_masks(evaluator) and UnpastedMasks.supports(tested):
        tested = UnpastedMasks(tested)
    with channels_last_on_cpu(model), _test_precision(recipe):
        return inference_on_dataset(tested, test_set.build_loader(), evaluator)


def _takes_unpasted_masks(evaluator) -> bool:
    """A `process` of the user's own may expect masks of the image's size."""
    process = getattr(type(evaluator), "process", None)
    return process is MaskScoringCOCOEvaluator.process


def _test_precision(recipe: Recipe) -> AbstractContextManager:
    if recipe.test_amp and recipe.device.startswith("cuda"):
        return torch.autocast("cuda")
    if recipe.test_amp:
        logger.warning(
            "Evaluation is at full precision: on a CPU mixed precision is bfloat16, which rounds "
            "class scores to 1/256. train.amp.test (yaml: TEST.AMP) is for GPUs."
        )
    return nullcontext()


def evaluate_checkpoint(
    recipe: Recipe, resume: bool = False, published: Optional[Published] = None
) -> dict:
    """
    Evaluate `recipe.init_checkpoint`, or with `resume` the last one in the output folder if there
    is one, and write a report for each test set; arguments and results as in :func:`evaluate`.
    """
    model = _build_model(recipe)
    checkpointer = MaskScoringCheckpointer(model, recipe.output_dir)
    with agree_on_user_errors():
        if not (recipe.init_checkpoint or (resume and checkpointer.has_checkpoint())):
            raise UserError(
                "There is no checkpoint to evaluate: give train.init_checkpoint=FILE (yaml: "
                "MODEL.WEIGHTS FILE)."
            )
        checkpointer.resume_or_load(recipe.init_checkpoint, resume=resume, strict=True)
    return _verified(evaluate(recipe, model.eval(), published, write_report_of), recipe)


def summary_table(results: dict, published: Optional[Published] = None) -> str:
    """
    Args:
        results: of one test set, {task: {metric: percent}}.
        published: AP to show in a further column.

    Returns:
        a table of AP, AP50 and AP75 of boxes and of masks under each ranking.
    """
    rows = [
        ("bbox", "boxes", published and published.box_ap),
        ("segm_by_class_score", "masks by class score", None),
        ("segm", "masks by mask score", published and published.mask_ap),
    ]
    if "segm_by_class_score" not in results:  # a plain Mask R-CNN
        rows[1:] = [("segm", "masks", None)]
    metrics = ("AP", "AP50", "AP75")
    table = [
        [title, *(results[task].get(m) for m in metrics), *([ap] if published else [])]
        for task, title, ap in rows
        if task in results
    ]
    headers = ["", *metrics, *(["published AP (COCO val2017)"] if published else [])]
    return tabulate(table, headers=headers, floatfmt=".2f", tablefmt="github")
