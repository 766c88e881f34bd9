"""Errors that a person can mend, and how a program shows them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "exit_on_user_error"]


class UserError(Exception):
    """
    Something outside of the code is wrong: a file, a setting, a machine.

    Its message is one sentence or two that say what was met, what was expected and what to do.
    """


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Show a :class:`UserError` without a traceback, once per job, and exit with 2."""
    try:
        yield
    except UserError as error:
        if _rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _rank() -> int:
    """Of this process; launchers set it before the processes know each other."""
    from detectron2.utils import comm

    return comm.get_rank() or int(os.environ.get("RANK", 0))
