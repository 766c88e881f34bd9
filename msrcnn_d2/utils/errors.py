"""Errors that users can correct, and how a program reports them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm

__all__ = ["UserError", "agree_on_user_errors", "exit_on_user_error"]


class UserError(Exception):
    """
    Something outside of the code is wrong: a file, a setting, a machine.

    The message says in a sentence or two what was found, what was expected and what to do.

    Attributes:
        on_all_processes: whether all processes of the job raise it together.
    """

    def __init__(self, message: str, *, on_all_processes: bool = False):
        super().__init__(message)
        self.on_all_processes = on_all_processes


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
