"""Detectron2's sources: which archive holds them, how it is verified and unpacked."""

import hashlib
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from .errors import BuildError


class Archive(NamedTuple):
    """A source distribution in a package index."""

    project: str
    filename: str
    sha256: str


# The name `detectron2` in the public index is not Detectron2's. The Python files of this archive
# equal those of the official tag v0.6; the C++ sources are missing.
DETECTRON2 = Archive(
    project="pb1-detectron2",
    filename="pb1-detectron2-0.6.tar.gz",
    sha256="5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29",
)

LOCAL_COPY_VARIABLE = "DETECTRON2_SDIST"

# Which directories of the archive are built, and where Detectron2 expects them as packages.
LAYOUT = {
    "detectron2": "detectron2",
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}


def local_copy() -> Path | None:
    """The user's own copy of the archive, if one is named."""
    path = os.environ.get(LOCAL_COPY_VARIABLE)
    return Path(path).expanduser() if path else None


def obtain(archive: Archive, directory: Path) -> Path:
    """Return the verified archive: the user's copy, or one downloaded into `directory`."""
    path = local_copy()
    if path is None:
        from .download import download
        from .indexes import configured_indexes

        return download(archive, configured_indexes(), directory)
    if not path.is_file():
        raise BuildError(
            f"{LOCAL_COPY_VARIABLE} names {path}, which is not a file; "
            f"set it to the absolute path of {archive.filename}."
        )
    if problem := mismatch(path, archive):
        raise BuildError(
            f"{path}, named by {LOCAL_COPY_VARIABLE}, {problem}; get {archive.filename} again."
        )
    return path


def mismatch(path: Path, archive: Archive) -> str | None:
    """Say how the file at `path` differs from the archive, or None if it is the same."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest == archive.sha256:
        return None
    return f"is damaged or not the expected file (SHA-256 {digest} instead of {archive.sha256})"


def unpack(path: Path, directory: Path) -> None:
    """Write the files of the archive at `path`, less its topmost directory, to `directory`.

    One by one, and not with `extractall`, whose safe `filter` Python 3.10.0 lacks: this way no
    link, mode or owner in the archive has an effect.
    """
    with tarfile.open(path) as tar:
        for member in tar:
            target = _target(member, directory.resolve())
            if member.isfile():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())


def _target(member: tarfile.TarInfo, directory: Path) -> Path:
    target = (directory / member.name.partition("/")[2]).resolve()
    if not (member.isfile() or member.isdir()) or not target.is_relative_to(directory):
        raise BuildError(
            f"the archive holds {member.name!r}, which is not a plain file inside it; "
            "nothing was built."
        )
    return target


def arrange(unpacked: Path, directory: Path) -> None:
    """Move the packages of the unpacked archive to where setuptools finds them."""
    for origin, destination in LAYOUT.items():
        (unpacked / origin).rename(directory / destination)
