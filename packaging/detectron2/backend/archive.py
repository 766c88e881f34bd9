"""Which archive holds Detectron2's sources, and how a copy of it is verified."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple


class BuildError(Exception):
    """Says in one sentence, meant for the user, why Detectron2 cannot be built."""


class Archive(NamedTuple):
    """A source distribution in a package index."""

    project: str
    filename: str
    sha256: str


# The project called `detectron2` in the public index is not Detectron2. The Python files of this
# archive are the same as those of the official tag v0.6; it lacks the C++ sources.
DETECTRON2 = Archive(
    project="pb1-detectron2",
    filename="pb1-detectron2-0.6.tar.gz",
    sha256="5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29",
)

LOCAL_COPY_VARIABLE = "DETECTRON2_SDIST"


def local_copy() -> Path | None:
    """The user's own copy of the archive, if one is named."""
    path = os.environ.get(LOCAL_COPY_VARIABLE)
    return Path(path).expanduser() if path else None


def mismatch(path: Path, archive: Archive) -> str | None:
    """Say how the file at `path` differs from the archive; None if it is the same."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest == archive.sha256:
        return None
    return f"is damaged or not the expected file (SHA-256 {digest} instead of {archive.sha256})"
