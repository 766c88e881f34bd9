"""Hooks of a training: checkpoints, signals to stop, evaluation and metrics."""

import datetime
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from ..checkpoint import MaskScoringCheckpointer
from ..checkpoint.checkpointer import numbered_checkpoints
from ..utils.distributed import StepAgreement
from ..utils.errors import agree_on_user_errors

__all__ = [
    "VALIDATION",
    "EvalHook",
    "LossPrinter",
    "MetricsWriter",
    "PeriodicCheckpoints",
    "StopOnSignal",
    "stop_signals_handled",
    "outlive_stop_signals",
    "text_of_losses",
]

VALIDATION = "validation"  # the name of the losses on held-out images, in results and metrics
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)


class PeriodicCheckpoints(hooks.PeriodicCheckpointer):
    """
    `PeriodicCheckpointer` for all processes: the main process writes, and a full disk ends all of
    them. In a resumed training `max_to_keep` counts earlier checkpoints, too.
    """

    def __init__(
        self, checkpointer: MaskScoringCheckpointer, period: int, max_to_keep: int | None = None
    ):
        super().__init__(checkpointer, period, max_to_keep=max_to_keep)
        self._saved_iter = -1

    def before_train(self) -> None:
        super().before_train()
        self._saved_iter = self.trainer.start_iter - 1  # the checkpoint it has resumed, if any
        earlier = numbered_checkpoints(self.checkpointer.save_dir)
        self.recent_checkpoints = [path for k, path in earlier if k < self.trainer.iter]

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if (iteration + 1) % self.period and iteration < self.max_iter - 1:
            return
        with agree_on_user_errors():
            if comm.is_main_process():
                self.step(iteration)
                # It deletes one at most, and a resumed training may have more
                while self.max_to_keep and len(self.recent_checkpoints) > self.max_to_keep:
                    self.path_manager.rm(self.recent_checkpoints.pop(0))
        self._saved_iter = iteration

    def save_now(self) -> int:
        """
        Save the iteration that was done last, unless it has been saved; on the main process.

        Returns:
            its number.
        """
        iteration = min(self.trainer.iter, self.max_iter - 1)  # the first is more at the end
        if self._saved_iter != iteration:
            self.checkpointer.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration)
            self._saved_iter = iteration
        return iteration


class EvalHook(hooks.EvalHook):
    """
    Detectron2's also evaluates after a failed last iteration, and waits for lost processes. If a
    training is interrupted between a checkpoint and the evaluation after it, Detectron2 leaves the
    evaluation out. Here the resumed training begins with it.

    It has to come after :class:`BestCheckpointer`. While the function runs, the trainer's iteration
    is the last one that was done.
    """

    def __init__(
        self, eval_period: int, eval_function: Callable[[], dict], done: Mapping[int, float]
    ):
        """
        Args:
            eval_period, eval_function: as in Detectron2.
            done: its keys are the iterations after which there was an evaluation.
        """
        super().__init__(eval_period, eval_function)
        self._done = done

    def before_train(self) -> None:
        last = self.trainer.start_iter - 1
        is_due = self._period > 0 and (last + 1) % self._period == 0
        if is_due and 0 <= last < self.trainer.max_iter - 1 and last not in self._done:
            logger.info("The evaluation after iteration %d is missing: it comes first.", last)
            self.trainer.storage.iter = last
            with self._as_in(last):
                self._do_eval()

    def after_train(self) -> None:
        trainer = self.trainer
        last = min(trainer.iter, trainer.max_iter) - 1
        # Counted on after the last iteration only
        if trainer.iter >= trainer.max_iter and last not in self._done:
            with self._as_in(last):
                super().after_train()

    @contextmanager
    def _as_in(self, iteration: int) -> Iterator[None]:
        now, self.trainer.iter = self.trainer.iter, iteration
        try:
            yield
        finally:
            self.trainer.iter = now


class LossPrinter(EventWriter):
    """
    Logs how far the training is and the losses since the last line, medians over 20 iterations.

    Detectron2's `CommonMetricPrinter` would repeat the losses of the last validation in each line.
    """

    def __init__(self, max_iter: int):
        self._max_iter = max_iter
        self._last_written = -1

    def write(self) -> None:
        storage = get_event_storage()
        _, iteration = storage.latest().get("total_loss", (0.0, -1))
        if iteration <= self._last_written:  # an evaluation, or the end
            return
        self._last_written = iteration
        histories = storage.histories()
        parts = [f"iter: {iteration} of {self._max_iter}"]
        if "time" in histories:  # not in the first iterations, which are slower
            # Of iterations only: the time of evaluations and checkpoints comes on top
            seconds = histories["time"].median(1000) * (self._max_iter - iteration - 1)
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
            parts.append(f"eta: {datetime.timedelta(seconds=int(seconds))}")
        parts.append(
            text_of_losses({k: h.median(20) for k, h in histories.items() if _is_loss_of_step(k)})
        )
        if "time" in histories:
            parts.append(f"time: {histories['time'].median(20):.4f}")
        parts.append(f"data_time: {histories['data_time'].avg(20):.4f}")
        if "lr" in histories:
            parts.append(f"lr: {histories['lr'].latest():.5g}")
        if torch.cuda.is_available():
            parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        logger.info("  ".join(parts))


def _is_loss_of_step(name: str) -> bool:
    return "loss" in name and not name.startswith(f"{VALIDATION}/")


def text_of_losses(losses: Mapping[str, float]) -> str:
    """Such as "total_loss: 1.25 (cls 0.75, mask 0.5)", for a line in the log."""
    parts = [f"{k.removeprefix('loss_')} {v:.4g}" for k, v in losses.items() if k != "total_loss"]
    text = f"total_loss: {losses['total_loss']:.4g}"
    return f"{text} ({', '.join(parts)})" if parts else text


class MetricsWriter(hooks.PeriodicWriter):
    """
    Detectron2's writes the last value of each metric every `log_period` iterations, and so loses
    all but the last of the evaluations between two of them.
    """

    def __init__(self, writers: list[EventWriter], log_period: int, eval_period: int):
        super().__init__(writers, period=log_period)
        self._eval_period = eval_period

    def after_step(self) -> None:
        if self._eval_period > 0 and (self.trainer.iter + 1) % self._eval_period == 0:
            for writer in self._writers:
                writer.write()
        else:
            super().after_step()


class _LeftEvaluation(BaseException):
    """Not an Exception, which somebody could catch on its way out."""


class StopOnSignal(HookBase):
    """
    At SIGTERM or SIGINT finish the step, save, and exit with 128 + the number of the signal.

    All processes leave after the same step, whichever of them got the signal. A second SIGINT ends
    the process at once.

    It has to come after the hooks whose state is saved, and before those that may take long.
    """

    def __init__(self, save: Callable[[], int], agreement: StepAgreement):
        """
        Args:
            save: writes a checkpoint of the iteration done last, and returns its number; called on
                the main process.
            agreement: of the processes in each step, settled before the hooks are called.
        """
        self._save = save
        self._any_process_got_signal = agreement.add(lambda: bool(self._signal))
        self._signal = 0
        self._interrupted = False
        self._leaves_at_once = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals in the block. Only the main thread of a program can."""
        with stop_signals_handled(self._receive):
            _is_listening().value = 1
            try:
                yield
            finally:
                _is_listening().value = 0

    def _receive(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self._signal = self._signal or number
        if self._leaves_at_once:
            self._leaves_at_once = False  # later signals must not disturb the saving
            raise _LeftEvaluation
        if comm.is_main_process():
            name = signal.Signals(number).name
            # Neither print nor log: the signal may have come in the midst of theirs
            os.write(2, f"{name}: this step is finished and saved before leaving.\n".encode())

    def after_step(self) -> None:
        if self._any_process_got_signal():
            # A process that got no signal itself leaves with those that did
            self._signal = self._signal or signal.SIGTERM
            with agree_on_user_errors():
                self._save_on_main_process()
            self._exit()

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """
        Around an evaluation, which may take longer than a machine that is taken away allows: a
        signal ends it. Processes do not wait for each other here.
        """
        try:
            self._leaves_at_once = True
            if self._signal:
                raise _LeftEvaluation
            yield
        except _LeftEvaluation:
            self._save_on_main_process()
            self._exit()
        finally:
            self._leaves_at_once = False

    def _save_on_main_process(self) -> None:
        if comm.is_main_process():
            name = signal.Signals(self._signal).name
            logger.warning("%s: iteration %d is saved. Continue with --resume.", name, self._save())

    def _exit(self) -> NoReturn:
        sys.exit(128 + self._signal)


@contextmanager
def stop_signals_handled(handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `handle(number, frame)` at signals to stop, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def handle_here(number: int, frame: Any) -> None:
        if os.getpid() == own:
            handle(number, frame)
        else:  # a fork; a `multiprocessing.Pool`, with which Cityscapes is read, ends its own so
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, handle_here) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.cache
def _is_listening() -> Any:
    """A number that this process shares with the workers of its loaders: 1 in `listening`."""
    return multiprocessing.RawValue("b", 0)


def outlive_stop_signals() -> Callable[[int], None]:
    """
    The `worker_init_fn` of a `DataLoader`. Ctrl-C and `scancel` also reach its workers, and the
    death of a worker makes the step fail. So workers ignore signals and end with their loader.
    """
    return functools.partial(_ignore_while_listening, _is_listening())


def _ignore_while_listening(is_listening: Any, worker: int) -> None:
    def handle(number: int, frame: Any) -> None:
        if not is_listening.value:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)
