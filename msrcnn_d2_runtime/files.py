"""Write files completely or not at all, even if the process is killed or the disk is full."""

import contextlib
import os
from collections.abc import Iterator
from typing import IO

__all__ = ["INCOMPLETE", "write_whole"]

INCOMPLETE = ".incomplete"


@contextlib.contextmanager
def write_whole(path: str, mode: str = "wb", sync: bool = True) -> Iterator[IO]:
    """
    Open a file for writing. It gets its name, and replaces an older file of that name, only when it
    is complete and on the disk. If writing fails, the older file is still there.

    Args:
        mode: "wb" or "w".
        sync: whether to wait until the disk has the file. Otherwise it survives when the process is
            killed, but may be lost or empty after a loss of power.
    """
    path = os.path.realpath(path)  # a link stays; the file that it leads to is replaced
    incomplete = f"{path}{INCOMPLETE}"
    try:
        with open(incomplete, mode) as f:
            yield f
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(incomplete, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(incomplete)
        raise
    if not sync:
        return
    # The new name, too, should survive a loss of power. Not all file systems support this
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
