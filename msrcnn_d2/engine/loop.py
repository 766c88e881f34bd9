"""Train a recipe."""

import errno
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from typing import Any

import torch
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from detectron2.engine import TrainerBase, create_ddp_model, default_writers, hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter

from ..checkpoint import MaskScoringCheckpointer
from ..checkpoint.compatibility import frozen_class_scores
from ..checkpoint.conversion import EMA_STATE
from ..utils.distributed import StepAgreement, job_is_ending, watching_forwards
from ..utils.errors import UserError, agree_on_user_errors
from .bad_images import BadImages
from .best_checkpoint import BestCheckpointer, StoppedEarly
from .evaluate import build_model, evaluate, log_reliability
from .freezing import freeze
from .hooks import (
    VALIDATION,
    EvalHook,
    LossPrinter,
    MetricsWriter,
    PeriodicCheckpoints,
    StopOnSignal,
)
from .loaders import ResumableBatches, StepSeeds
from .preflight import check_names_of_weights, names_of_training
from .recipe import Recipe
from .trainer import FiniteAMPTrainer, FiniteTrainer, adapt_forward
from .user_hooks import build_hooks, build_writers
from .validation import validation_losses
from .weight_averages import PreciseBNOfAverages, WeightAverages

__all__ = ["train"]

logger = logging.getLogger(__name__)


def train(recipe: Recipe, resume: bool = False) -> dict:
    """
    Args:
        recipe: what to train and how.
        resume: continue from the last complete checkpoint in the output folder, if there is one.
            The losses are then those of a run that was never interrupted.

    Returns:
        results of the evaluation at the end, as :func:`evaluate` returns them. Empty if the
        training that is resumed has stopped early.
    """
    model = build_model(recipe)
    with agree_on_user_errors():
        freeze(model, recipe.freeze)
    scaled = recipe.amp and recipe.device.startswith("cuda")
    if recipe.amp and not scaled:
        logger.info("Mixed precision on a CPU is bfloat16, which needs no gradient scaling.")
    adapt_forward(model, autocast_on_cpu=recipe.amp and not scaled)
    logger.info("Model:\n%s", model)
    with agree_on_user_errors():
        optimizer = recipe.build_optimizer(model)

    # Whatever is random in a step follows from the seed
    seeds = StepSeeds(recipe.seed if recipe.seed >= 0 else comm.shared_random_seed())
    agreement = StepAgreement()
    bad_images = BadImages(recipe.max_bad_images, agreement)
    batches = ResumableBatches(recipe.build_train_loader, seeds, bad_images.found)
    precise_bn_batches = ResumableBatches(recipe.build_train_loader, seeds, bad_images.found)

    averages = averaging = None
    if recipe.ema:
        on_gpu = recipe.device.startswith("cuda")
        averages = WeightAverages(model, recipe.ema_decay, recipe.ema_device if on_gpu else "")
        averaging = hooks.CallbackHook(
            before_train=lambda trainer: averages.start(),
            after_step=lambda trainer: averages.update(),
        )
    model = _distributed(model, recipe)
    parts = (model, batches, optimizer)
    trainer_args: dict[str, Any] = {
        "max_nonfinite_steps": recipe.max_nonfinite_steps,
        "agreement": agreement,
        "image_ids": batches.image_ids,
        "accumulation_steps": recipe.accumulation_steps,
    }
    trainer: FiniteTrainer
    if scaled:
        trainer_args["max_skipped_steps"] = recipe.max_skipped_steps
        trainer = FiniteAMPTrainer(*parts, **trainer_args)
    else:
        trainer = FiniteTrainer(*parts, **trainer_args)
    class_names = names_of_training(recipe)
    resumable: dict[str, Any] = {"trainer": trainer}
    if averages:
        resumable[EMA_STATE] = averages
    checkpointer = MaskScoringCheckpointer(
        model, recipe.output_dir, class_names=class_names, **resumable
    )
    checkpoints = PeriodicCheckpoints(checkpointer, **recipe.checkpointer)

    def save_now() -> int:
        if averages:
            averages.restore()  # a signal can end the evaluation of the averages
        return checkpoints.save_now()

    stop = StopOnSignal(save_now, agreement)

    best = BestCheckpointer(
        checkpointer,
        # After a single evaluation it would be a copy of the last one
        recipe.val_metric if recipe.evaluates_on_its_way else "",
        *(recipe.val_mode, recipe.patience, recipe.min_delta),
    )
    results: dict = {}

    def evaluate_and_keep() -> dict:
        results.clear()
        if averages:
            logger.info("Evaluating the moving averages of the weights (EMA).")
        with averages.applied() if averages else nullcontext(), stop.leaving_at_once():
            results.update(evaluate(recipe, model, None, log_reliability, class_names))
            losses = validation_losses(recipe, model)
        found = {**results, VALIDATION: losses} if losses else results
        best.update(found)
        return found

    precise_bn = writer = None
    if recipe.precise_bn_iters and get_bn_modules(model):
        args = (recipe.eval_period, model, precise_bn_batches, recipe.precise_bn_iters)
        precise_bn = PreciseBNOfAverages(averages, *args) if averages else hooks.PreciseBN(*args)
    if comm.is_main_process():
        writers = default_writers(recipe.output_dir)
        writers = [w for w in writers if not isinstance(w, CommonMetricPrinter)]
        writers.insert(0, LossPrinter(recipe.max_iter))
        writer = MetricsWriter(writers, recipe.log_period, recipe.eval_period)
    with agree_on_user_errors():
        user_hooks = build_hooks(recipe)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            seeds,
            bad_images,
            hooks.LRScheduler(scheduler=recipe.build_lr_scheduler(optimizer)),
            averaging,
            precise_bn,
            checkpoints,
            stop,
            best,
            EvalHook(recipe.eval_period, evaluate_and_keep, best.history),
            *user_hooks,  # they see the results
        ]
    )

    trainer.iter = -1  # a checkpoint replaces it
    with agree_on_user_errors():
        checkpointer.resume_or_load(recipe.init_checkpoint, resume=resume)
        keeps_classes = trainer.iter >= 0 or frozen_class_scores(model)
        check_names_of_weights(checkpointer.loaded_class_names, class_names, keeps_classes)
    # Writers come last, since they write what hooks log. Those of the user are built as late as
    # this, since they may open a connection, which the end of the training closes
    with agree_on_user_errors():
        user_writers = build_writers(recipe) if comm.is_main_process() else None
    trainer.register_hooks([user_writers, writer])
    batches.first_iter = trainer.iter + 1  # the iteration in the checkpoint is done
    with (
        stop.listening(),
        closing(batches),
        closing(precise_bn_batches),
        watching_forwards(),
        _user_errors_in_one_sentence(recipe.output_dir),
        torch.autograd.set_detect_anomaly(recipe.detect_anomaly),
    ):
        with suppress(StoppedEarly):
            trainer.train(batches.first_iter, recipe.max_iter)
    if comm.is_main_process():
        best.log_summary()
        if results:
            recipe.verify_results(results)
    return results


def _distributed(model: nn.Module, recipe: Recipe) -> nn.Module:
    # Not the process's number on its machine, Detectron2's default: it may see its own GPU only
    on_gpu = recipe.device.startswith("cuda")
    device_ids = [torch.cuda.current_device()] if on_gpu else None
    return create_ddp_model(model, **{**recipe.ddp, "device_ids": device_ids})


@contextmanager
def _user_errors_in_one_sentence(output_dir: str) -> Iterator[None]:
    """
    Keep Detectron2 from logging user errors with a traceback, since the program shows them; and
    make a user error of a full disk. Checkpoints do that themselves, logs and metrics do not.
    """

    def is_new(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, UserError) or _is_full_disk(error) or job_is_ending())

    logger_of_trainer = logging.getLogger(TrainerBase.__module__)
    logger_of_trainer.addFilter(is_new)
    try:
        yield
    except OSError as error:
        if not _is_full_disk(error):
            raise
        raise UserError(
            f"Cannot write to '{output_dir}' ({error.strerror}). The checkpoints are complete: "
            "make room and continue with --resume."
        ) from error
    finally:
        logger_of_trainer.removeFilter(is_new)


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
