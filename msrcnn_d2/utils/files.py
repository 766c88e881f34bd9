"""Write files wholly or not at all: whoever is killed, or out of disk, leaves no half of one."""

import contextlib
import os
from collections.abc import Iterator
from typing import IO

__all__ = ["INCOMPLETE", "os_error_of", "write_whole"]

INCOMPLETE = ".incomplete"


@contextlib.contextmanager
def write_whole(path: str, mode: str = "wb") -> Iterator[IO]:
    """
    Open a file for writing. It takes its name, and the place of what had that name before, only
    when it is complete and on the disk; if writing fails, what was there is still there.

    Args:
        mode: "wb" or "w".
    """
    path = os.path.realpath(path)  # of a link, what it leads to
    incomplete = f"{path}{INCOMPLETE}"
    try:
        with open(incomplete, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(incomplete, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(incomplete)
        raise
    _sync_folder(os.path.dirname(path))


def _sync_folder(path: str) -> None:
    """So that the new name, too, outlives the loss of power. Not all file systems can do it."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def os_error_of(error: BaseException | None) -> OSError | None:
    """The error of the system behind another one: PyTorch's own do not tell a full disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
