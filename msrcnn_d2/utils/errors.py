"""How a program reports errors that users can correct, on all processes of a job."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm

from msrcnn_d2_runtime.errors import UserError

__all__ = ["UserError", "agree_on_user_errors", "exit_on_user_error"]


@contextmanager
def agree_on_user_errors() -> Iterator[None]:
    """
    Raise a :class:`UserError` of any process in all processes.

    For example, a file may be missing on one machine only. If just one process stopped, the others
    would wait for it until they time out. All processes have to enter and leave the block.
    """
    message = None
    try:
        yield
    except UserError as error:
        if comm.get_world_size() == 1:
            raise
        message = str(error)
    message = next(filter(None, comm.all_gather(message)), None)
    if message:
        raise UserError(message, on_all_processes=True)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a :class:`UserError` without a traceback, and exit with code 2."""
    try:
        yield
    except UserError as error:
        # Before the processes are connected, only their launcher has numbered them
        connected = comm.get_world_size() > 1
        is_first_of_machine = connected or int(os.environ.get("LOCAL_RANK", 0)) == 0
        if comm.is_main_process() if error.on_all_processes else is_first_of_machine:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if error.on_all_processes:
            comm.synchronize()  # the launcher ends all processes as soon as one has ended
        sys.exit(2)
