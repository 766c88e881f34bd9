"""Errors that a person can mend, and how a program shows them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm

__all__ = ["UserError", "agree_on_user_errors", "exit_on_user_error"]


class UserError(Exception):
    """
    Something outside of the code is wrong: a file, a setting, a machine.

    Its message is one sentence or two that say what was met, what was expected and what to do.

    Attributes:
        on_all_processes: whether all processes of the job raise it together.
    """

    def __init__(self, message: str, *, on_all_processes: bool = False):
        super().__init__(message)
        self.on_all_processes = on_all_processes


@contextmanager
def agree_on_user_errors() -> Iterator[None]:
    """
    Raise on all processes what was raised on any of them.

    A process that leaves alone lets the others wait for it until they time out: the file that is
    missing may be missing on one machine only. All processes have to enter and leave the block.
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
    """Show a :class:`UserError` without a traceback, and exit with 2."""
    try:
        yield
    except UserError as error:
        if comm.is_main_process() if error.on_all_processes else _is_first_of_machine():
            print(f"error: {error}", file=sys.stderr, flush=True)
        if error.on_all_processes:
            comm.synchronize()  # the first process to leave ends the others
        sys.exit(2)


def _is_first_of_machine() -> bool:
    """Before processes know each other, their launcher has numbered them."""
    return comm.get_world_size() > 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0
