"""
What happens in a job of several processes when the forward pass fails in some of them only.

The others may be waiting in a collective of theirs, such as that of a synchronised batch norm. A
process that leaves its forward pass then lets them wait for ever, or meets them in a collective
that is another one. So it stays until all others have left theirs, and if they do not, one sentence
ends the job.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from detectron2.utils import comm

__all__ = ["forward_is_done", "job_is_ending", "wait_for_other_forwards", "watching_forwards"]

POLL_SECONDS = 0.5
# How long the others may take to finish their forward pass: the first one of a compiled model takes
# minutes. It is waited for only after an error.
PATIENCE_SECONDS = 300.0
EXIT_SECONDS = 10.0  # for all processes to have read why the job ends
EXIT_CODE = 2  # as of a UserError


class _Watch:
    """
    A thread that tells the others of failures how far this process is, and ends this process
    where it waits in a collective, which no exception can reach.

    Attributes:
        num_done: forward passes of this process that have ended. All processes have the same
            number of them.
        ending: whether the job is being ended.
    """

    def __init__(self):
        self.num_done = 0
        self.ending = False
        self._store = dist.PrefixStore("failed_forward", _get_default_store())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        told: set[int] = set()
        while not self._stopped.wait(POLL_SECONDS):
            if self._store.check(["end"]):
                self._end(self._store.get("end").decode())
            failures = [
                int(self._store.get(f"failure {k}")) for k in range(self._store.add("failures", 0))
            ]
            for number in set(failures) - told:
                if self.num_done > number:
                    self._store.add(f"done {number}", 1)
                    told.add(number)

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
        """Return when all processes have done this forward pass; else end the job."""
        number, self.num_done = self.num_done, self.num_done + 1
        # The number is there before the count that leads to it
        index = self._store.add("announced", 1) - 1
        self._store.set(f"failure {index}", str(number))
        while self._store.add("failures", 0) != index:
            time.sleep(POLL_SECONDS)
        self._store.add("failures", 1)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._store.add(f"done {number}", 0) < comm.get_world_size():
            if time.monotonic() > deadline:
                self._store.set("end", message)
                time.sleep(10 * EXIT_SECONDS)  # the thread ends this process
            time.sleep(POLL_SECONDS)


_watch: _Watch | None = None


@contextmanager
def watching_forwards() -> Iterator[None]:
    """Around a training; all processes enter it together."""
    global _watch
    if comm.get_world_size() == 1:
        yield
        return
    _watch = _Watch()
    try:
        yield
    except Exception:
        if _watch.ending:  # this is the connection to a process that has ended already
            time.sleep(10 * EXIT_SECONDS)
        raise
    finally:
        _watch.stop()
        _watch = None


def forward_is_done() -> None:
    """To be called after each forward pass that has not failed."""
    if _watch is not None:
        _watch.num_done += 1


def wait_for_other_forwards(message: str) -> None:
    """
    To be called where a forward pass has failed, before it is left.

    Args:
        message: one sentence on what has failed, for the case that the job has to end.
    """
    if _watch is not None:
        _watch.wait_for_others(message)


def job_is_ending() -> bool:
    """Whether errors are only those of processes that have lost each other."""
    return _watch is not None and _watch.ending
