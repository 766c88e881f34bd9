"""Gets the archive of Detectron2's sources, unpacks it and arranges its packages."""

import tarfile
from pathlib import Path

from .archive import LOCAL_COPY_VARIABLE, Archive, BuildError, local_copy, mismatch

# The directories of the archive that are built, and where Detectron2 expects each as a package.
LAYOUT = {
    "detectron2": "detectron2",
    "projects/PointRend/point_rend": "detectron2/projects/point_rend",
    "projects/DeepLab/deeplab": "detectron2/projects/deeplab",
    "projects/Panoptic-DeepLab/panoptic_deeplab": "detectron2/projects/panoptic_deeplab",
}


def obtain(archive: Archive, directory: Path) -> Path:
    """Return the verified archive: the user's copy, or one downloaded into `directory`."""
    path = local_copy()
    if path is None:
        # Imported here, because a build from a local copy does without the libraries they need.
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


def unpack(path: Path, directory: Path) -> None:
    """Write the files of the archive at `path`, less its topmost directory, to `directory`.

    The safe `filter` of `extractall` is missing in Python 3.10.0. Writing the files one by one is
    as safe: links, modes and owners in the archive have no effect.
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
