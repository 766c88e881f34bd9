"""The file that says which images are done, and with which predictions."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from .records import line_of

__all__ = ["Journal"]


class Journal:
    """
    Lines of JSON, one for each image that is done. A line that a kill has cut off is removed when
    the file is opened again.
    """

    def __init__(self, path: str):
        """
        Args:
            path: of a file that may exist.

        Raises:
            UserError: another process is writing to it.
        """
        self._path = path
        self._file = open(path, "ab", buffering=0)
        try:
            with contextlib.suppress(OSError):  # not all file systems have locks
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    folder = os.path.dirname(path)
                    raise UserError(
                        f"Another process is writing to '{folder}': give another folder, or wait "
                        "until it is done."
                    ) from None
            self._offsets = self._read()
            self._reader = open(path, "rb")
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> dict[str, int]:
        """Where the line of each image begins. What follows the last whole line is removed."""
        offsets, end = {}, 0
        with open(self._path, "rb") as f:
            for line in f:
                try:
                    name = json.loads(line)["image"] if line.endswith(b"\n") else None
                except (ValueError, KeyError, TypeError):  # a loss of power may leave anything
                    name = None
                if not isinstance(name, str):
                    break
                offsets[name] = end
                end += len(line)
        self._file.truncate(end)
        return offsets

    @property
    def names(self) -> list[str]:
        """Of the images, in the order in which they were written."""
        return list(self._offsets)

    def append(self, record: dict[str, Any]) -> None:
        """
        Args:
            record: from :func:`record_of`, of an image that is not in the file.
        """
        offset = self._file.seek(0, os.SEEK_END)
        rest = memoryview(line_of(record))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:  # such as a full disk: the next line must not continue this one
            self._file.truncate(offset)
            raise
        self._offsets[record["image"]] = offset

    def records(self) -> Iterator[dict[str, Any]]:
        """
        The records of all images, sorted by name: the same, whatever the order in which they were
        written. One at a time is in memory.
        """
        for name in sorted(self._offsets):
            yield self.record(name)

    def record(self, name: str) -> dict[str, Any]:
        """The record of an image."""
        self._reader.seek(self._offsets[name])
        return json.loads(self._reader.readline())

    def close(self) -> None:
        self._file.close()
        self._reader.close()
