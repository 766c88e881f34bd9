"""Train and evaluate a recipe."""

import errno
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from fvcore.nn.precise_bn import get_bn_modules
from tabulate import tabulate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.engine import (
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm

from ..checkpoint import MaskScoringCheckpointer
from ..checkpoint.compatibility import frozen_class_scores
from ..evaluation import MaskQuality, MaskScoringCOCOEvaluator
from ..modeling import UnpastedMasks
from ..modeling.acceleration import channels_last_on_cpu, compile_dense_parts
from ..published_models import Published
from ..utils.distributed import StepAgreement, job_is_ending, watching_forwards
from ..utils.errors import UserError, agree_on_user_errors
from .bad_images import BadImages
from .checkpoints import PeriodicCheckpoints
from .class_names import check_names_of_weights, evaluators_in, names_of_training, use_names
from .hooks import StopOnSignal
from .loaders import ResumableBatches, StepSeeds
from .quality import log_reliability, write_report_of
from .recipe import Recipe, TestSet
from .trainer import FiniteAMPTrainer, FiniteTrainer, adapt_forward

__all__ = ["evaluate", "evaluate_checkpoint", "train"]

logger = logging.getLogger(__name__)


def train(recipe: Recipe, resume: bool = False) -> dict:
    """
    Args:
        recipe: what to train and how.
        resume: go on from the last complete checkpoint in the output folder, if there is one. The
            run then has the losses of one that was never interrupted.

    Returns:
        results of the evaluation at the end, as :func:`evaluate` returns them.
    """
    model = _build_model(recipe)
    scaled = recipe.amp and recipe.device.startswith("cuda")
    if recipe.amp and not scaled:
        logger.info("Mixed precision on a CPU is bfloat16, which needs no gradient scaling.")
    adapt_forward(model, autocast_on_cpu=recipe.amp and not scaled)
    logger.info("Model:\n%s", model)
    optimizer = recipe.build_optimizer(model)
    seeds = StepSeeds(recipe.seed if recipe.seed >= 0 else comm.shared_random_seed())
    agreement = StepAgreement()
    bad_images = BadImages(recipe.max_bad_images, agreement)
    batches = ResumableBatches(recipe.build_train_loader, seeds, bad_images.found)
    precise_bn_batches = ResumableBatches(recipe.build_train_loader, seeds, bad_images.found)
    model = _distributed(model, recipe)
    trainer_args: dict[str, Any] = {
        "max_nonfinite_steps": recipe.max_nonfinite_steps,
        "agreement": agreement,
        "image_ids": batches.image_ids,
    }
    trainer: SimpleTrainer
    if scaled:
        trainer_args["max_skipped_steps"] = recipe.max_skipped_steps
        trainer = FiniteAMPTrainer(model, batches, optimizer, **trainer_args)
    else:
        trainer = FiniteTrainer(model, batches, optimizer, **trainer_args)
    class_names = names_of_training(recipe)
    checkpointer = MaskScoringCheckpointer(
        model, recipe.output_dir, class_names=class_names, trainer=trainer
    )
    checkpoints = PeriodicCheckpoints(checkpointer, **recipe.checkpointer)
    stop = StopOnSignal(checkpoints.save_now, agreement)

    results: dict = {}

    def evaluate_and_keep():
        results.clear()
        with stop.leaving_at_once():
            results.update(evaluate(recipe, model, None, log_reliability, class_names))
        return results

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            seeds,
            bad_images,
            hooks.LRScheduler(scheduler=recipe.build_lr_scheduler(optimizer)),
            _precise_bn(recipe, model, precise_bn_batches),
            checkpoints,
            stop,
            _EvalHook(recipe.eval_period, evaluate_and_keep),
            _on_main_process(_Writer, recipe),
        ]
    )
    trainer.iter = -1  # what a checkpoint replaces
    with agree_on_user_errors():
        checkpointer.resume_or_load(recipe.init_checkpoint, resume=resume)
        keeps_classes = trainer.iter >= 0 or frozen_class_scores(model)
        check_names_of_weights(checkpointer.loaded_class_names, class_names, keeps_classes)
    batches.first_iter = trainer.iter + 1  # the iteration in the checkpoint is done
    with stop.listening(), closing(batches), closing(precise_bn_batches), watching_forwards():
        with _told_once(), _full_disk_is_a_user_error(recipe.output_dir):
            with torch.autograd.set_detect_anomaly(recipe.detect_anomaly):
                trainer.train(batches.first_iter, recipe.max_iter)
    return _verified(results, recipe)


class _EvalHook(hooks.EvalHook):
    """Detectron2's evaluates after a failed last iteration too, and waits for who has left."""

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter:  # counted on after the last iteration only
            super().after_train()


@contextmanager
def _told_once() -> Iterator[None]:
    """Detectron2 logs all errors of a training with a traceback; ours are shown by the program."""

    def is_new(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, UserError) or _is_full_disk(error) or job_is_ending())

    of_trainer = logging.getLogger(TrainerBase.__module__)
    of_trainer.addFilter(is_new)
    try:
        yield
    finally:
        of_trainer.removeFilter(is_new)


@contextmanager
def _full_disk_is_a_user_error(output_dir: str) -> Iterator[None]:
    """Checkpoints say it themselves; this is for logs, metrics and results."""
    try:
        yield
    except OSError as error:
        if not _is_full_disk(error):
            raise
        raise UserError(
            f"Cannot write to '{output_dir}' ({error.strerror}). The checkpoints are complete: "
            "make room, and go on with --resume."
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


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
    # Not the process's number on its machine, Detectron2's default: it may see its own GPU only
    on_gpu = recipe.device.startswith("cuda")
    device_ids = [torch.cuda.current_device()] if on_gpu else None
    return create_ddp_model(model, **{**recipe.ddp, "device_ids": device_ids})


def _precise_bn(recipe: Recipe, model, batches: ResumableBatches) -> hooks.PreciseBN | None:
    if not (recipe.precise_bn_iters and get_bn_modules(model)):
        return None
    return hooks.PreciseBN(recipe.eval_period, model, batches, recipe.precise_bn_iters)


def _on_main_process(build_hook, *args, **kwargs):
    return build_hook(*args, **kwargs) if comm.is_main_process() else None


class _Writer(hooks.PeriodicWriter):
    """
    Detectron2's writes the last value of each metric, each `log_period` iterations. Of several
    evaluations between two of them it would write one.
    """

    def __init__(self, recipe: Recipe):
        writers = default_writers(recipe.output_dir, recipe.max_iter)
        super().__init__(writers, period=recipe.log_period)
        self._eval_period = recipe.eval_period

    def after_step(self):
        if self._eval_period > 0 and (self.trainer.iter + 1) % self._eval_period == 0:
            for writer in self._writers:
                writer.write()
        else:
            super().after_step()


def evaluate(
    recipe: Recipe,
    model: nn.Module,
    published: Published | None = None,
    use_quality: Callable[[MaskQuality, TestSet, Recipe], object] = lambda *_: None,
    class_names: Sequence[str] | None = None,
) -> dict:
    """
    Evaluate on each test set; log the results.

    Args:
        published: results to show beside the measured ones, if those are on COCO val2017 too.
        use_quality: called on the main process for each test set whose evaluator has measured the
            quality of masks, after the results were logged.
        class_names: of the model, in the order of its classes, by which they are found in test
            sets with other ones; None if they are not known, and then their numbers have to agree.

    Returns:
        {task: {metric: value}}, as evaluators return it, on the main process; a level more, the
        names of the test sets, where there are several. Empty on other processes.
    """
    all_results = OrderedDict()
    for test_set in recipe.test_sets:
        evaluator = test_set.build_evaluator()
        with agree_on_user_errors():
            use_names(evaluator, test_set, class_names, recipe)
        results = _inference(recipe, model, test_set, evaluator)
        if comm.is_main_process():
            print_csv_format(results)
            if "bbox" in results:
                comparable = published if test_set.names == ("coco_2017_val",) else None
                logger.info("Results on %s:\n%s", test_set, summary_table(results, comparable))
            _use(use_quality, _mask_quality(evaluator), test_set, recipe)
        all_results[str(test_set)] = results
    return next(iter(all_results.values())) if len(all_results) == 1 else all_results


def _use(use_quality: Callable, quality: MaskQuality | None, *args) -> None:
    """A report or a figure that fails must not cost a training, or the other test sets."""
    if quality is None:
        return
    try:
        use_quality(quality, *args)
    except Exception:
        logger.exception(
            "The quality of masks was measured, but cannot be shown; the results are complete. "
            "`msrcnn-d2 report` makes the report from them."
        )


def _mask_quality(evaluator) -> MaskQuality | None:
    """What an evaluator, or the first one of several, has measured of it."""
    found = (getattr(e, "mask_quality", None) for e in evaluators_in(evaluator))
    return next((q for q in found if isinstance(q, MaskQuality)), None)


def _inference(recipe: Recipe, model: nn.Module, test_set: TestSet, evaluator) -> dict:
    _use_buffers_of_main_process(model)
    tested = recipe.wrap_for_test(model)
    if isinstance(tested, DistributedDataParallel):
        tested = tested.module  # a process with more images must not wait for the others
    if _takes_unpasted_masks(evaluator) and UnpastedMasks.supports(tested):
        tested = UnpastedMasks(tested)
    with channels_last_on_cpu(model), _test_precision(recipe):
        return inference_on_dataset(tested, test_set.build_loader(), evaluator)


def _use_buffers_of_main_process(model: nn.Module) -> None:
    """What is evaluated is what is saved: batch norms have other statistics in each process."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


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
    recipe: Recipe, resume: bool = False, published: Published | None = None
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
    names = checkpointer.loaded_class_names
    return _verified(evaluate(recipe, model.eval(), published, write_report_of, names), recipe)


def summary_table(results: dict, published: Published | None = None) -> str:
    """
    Args:
        results: of one test set, {task: {metric: percent}}.
        published: AP to show in a further column.

    Returns:
        a table of AP, AP50 and AP75 of boxes and of masks under each ranking; and of AP@100, which
        compares with published results, if more than 100 detections of an image count.
    """
    rows = [
        ("bbox", "boxes", published and published.box_ap),
        ("segm_by_class_score", "masks by class score", None),
        ("segm", "masks by mask score", published and published.mask_ap),
    ]
    if "segm_by_class_score" not in results:  # a plain Mask R-CNN
        rows[1:] = [("segm", "masks", None)]
    at_100 = ["AP@100"] if any("AP@100" in result for result in results.values()) else []
    metrics = ("AP", "AP50", "AP75", *at_100)
    table = [
        [title, *(results[task].get(m) for m in metrics), *([ap] if published else [])]
        for task, title, ap in rows
        if task in results
    ]
    comparable = (at_100 or ["AP"])[0]
    headers = ["", *metrics, *([f"published {comparable} (COCO val2017)"] if published else [])]
    return tabulate(table, headers=headers, floatfmt=".2f", tablefmt="github")
