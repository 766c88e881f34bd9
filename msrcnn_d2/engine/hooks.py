"""Save before leaving, when a machine is taken away or somebody presses Ctrl-C."""

import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..utils.distributed import StepAgreement
from ..utils.errors import agree_on_user_errors

__all__ = ["STOP_SIGNALS", "StopOnSignal", "stop_signals_handled", "worker_init_fn"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)


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
            agreement: of the processes in each step, before its hooks are called.
        """
        self._save = save
        self._any_process_got_signal = agreement.add(lambda: bool(self._signal))
        self._signal = 0
        self._interrupted = False
        self._leaves_at_once = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside of the block, as the main thread of a program can."""
        with stop_signals_handled(self._receive):
            _is_listening().value = 1
            try:
                yield
            finally:
                _is_listening().value = 0

    def _receive(self, number, frame):
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self._signal = self._signal or number
        if self._leaves_at_once:
            self._leaves_at_once = False  # whatever comes while it leaves
            raise _LeftEvaluation
        if comm.is_main_process():
            name = signal.Signals(number).name
            # Neither print nor log: the signal may have come in the midst of theirs
            os.write(2, f"{name}: this step is finished and saved before leaving.\n".encode())

    def after_step(self):
        if self._any_process_got_signal():
            # A process that got no signal itself leaves with those that did
            self._signal = self._signal or signal.SIGTERM
            with agree_on_user_errors():
                self._save_on_main_process()
            self._exit()

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """
        Around an evaluation, which may take longer than a machine that is taken away gives: leave
        it as it is. Processes do not wait for each other here.
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
            logger.warning("%s: iteration %d is saved. Go on with --resume.", name, self._save())

    def _exit(self):
        sys.exit(128 + self._signal)


class _LeftEvaluation(BaseException):
    """Not an Exception, which somebody could catch on its way out."""


@contextmanager
def stop_signals_handled(handle: Callable) -> Iterator[None]:
    """Call `handle(number, frame)` at signals to stop, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.cache
def _is_listening() -> Any:
    """A number that this process shares with the workers of its loaders: 1 in `listening`."""
    return multiprocessing.RawValue("b", 0)


def worker_init_fn() -> Callable[[int], None]:
    """
    What a `DataLoader` calls in its worker processes: Ctrl-C and `scancel` reach them, too, and one
    that dies would take the step with it. They end with their loader.
    """
    return functools.partial(_outlive_stop_signals, _is_listening())


def _outlive_stop_signals(is_listening, worker: int) -> None:
    def handle(number, frame):
        if not is_listening.value:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)
