"""Let all processes of a job act on what only one of them knows."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from detectron2.utils import comm

__all__ = [
    "StepAgreement",
    "forward_is_done",
    "job_is_ending",
    "wait_for_other_forwards",
    "watching_forwards",
]

POLL_SECONDS = 0.5
# How long a process whose forward pass has failed waits for the others to finish theirs. The first
# one of a compiled model takes minutes
PATIENCE_SECONDS = 300.0
EXIT_SECONDS = 10.0  # for all processes to read why the job ends
EXIT_CODE = 2  # the same as for a UserError


class StepAgreement:
    """
    Questions that any process may answer with yes, asked in each step of a training.

    The processes of a job reduce all answers at once, with numbers on the CPU: for each question
    `comm.all_gather` would pickle and wait twice.
    """

    def __init__(self) -> None:
        self._questions: list[Callable[[], bool]] = []
        self._answers: list[bool] = []

    def add(self, question: Callable[[], bool]) -> Callable[[], bool]:
        """
        Args:
            question: called in each process by :meth:`settle`.

        Returns:
            function that says whether any process has answered yes in this step. A single process
            is asked again, so that it does not wait for the next step.
        """
        index = len(self._questions)
        self._questions.append(question)

        def answer() -> bool:
            return question() if comm.get_world_size() == 1 else self._answers[index]

        return answer

    def settle(self) -> None:
        """Ask all questions; all processes have to call it together, once in each step."""
        if comm.get_world_size() == 1:
            return
        answers = torch.tensor([question() for question in self._questions], dtype=torch.int32)
        dist.all_reduce(answers, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
        self._answers = [bool(x) for x in answers.tolist()]


class _ForwardWatch:
    """
    Handles a forward pass that fails in one process of a job while the others wait for it in a
    collective, such as that of a synchronised batch norm.

    If the failed process continued, the others would wait forever, or meet it in a different
    collective. So it waits until all others have finished their forward pass. If they do not, it
    ends the job with one sentence. An exception cannot reach a process in a collective, so each
    process has a thread that shares its progress and ends it if necessary.

    Attributes:
        num_done: forward passes of this process that have ended. All processes have the same
            number of them.
        ending: whether the job is being ended.
    """

    def __init__(self) -> None:
        self.num_done = 0
        self.ending = False
        self._store = dist.PrefixStore("forward_watch", _get_default_store())
        self._tell()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _tell(self) -> None:
        self._store.set(f"done {comm.get_rank()}", str(self.num_done))

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self._tell()
            if self._store.check(["end"]):
                self._end(self._store.get("end").decode())

    def _end(self, message: str) -> None:
        self.ending = True
        if comm.is_main_process():
            print(f"error: {message}", file=sys.stderr, flush=True)
        try:
            self._store.add("ended", 1)
            deadline = time.monotonic() + EXIT_SECONDS
            # A process that leaves before the others know breaks their connections
            while self._store.add("ended", 0) < comm.get_world_size():
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        finally:  # the process of the store may be gone by now
            os._exit(EXIT_CODE)

    def wait_for_others(self, message: str) -> None:
        """Return when all processes have finished this forward pass, or else end the job."""
        self.num_done += 1
        deadline = time.monotonic() + PATIENCE_SECONDS
        for rank in range(comm.get_world_size()):
            while int(self._store.get(f"done {rank}")) < self.num_done:
                if time.monotonic() > deadline:
                    self._store.set("end", message)
                    time.sleep(10 * EXIT_SECONDS)  # the thread ends this process
                time.sleep(POLL_SECONDS)


_watch: _ForwardWatch | None = None


@contextmanager
def watching_forwards() -> Iterator[None]:
    """Use this around a training; all processes have to enter it together."""
    global _watch
    if comm.get_world_size() == 1:
        yield
        return
    _watch = _ForwardWatch()
    try:
        yield
    except Exception:
        if _watch.ending:  # the error is a lost connection to a process that has ended already
            time.sleep(10 * EXIT_SECONDS)
        raise
    finally:
        _watch.stop()
        _watch = None


def forward_is_done() -> None:
    """Call this after each forward pass that has not failed."""
    if _watch is not None:
        _watch.num_done += 1


def wait_for_other_forwards(message: str) -> None:
    """
    Call this if a forward pass has failed, before leaving it.

    Args:
        message: one sentence on what has failed, in case the job has to end.
    """
    if _watch is not None:
        _watch.wait_for_others(message)


def job_is_ending() -> bool:
    """Whether errors only mean that processes have lost each other."""
    return _watch is not None and _watch.ending
