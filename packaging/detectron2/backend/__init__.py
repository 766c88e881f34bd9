"""PEP 517 backend: builds a pure-Python wheel of Detectron2 0.6 from its source distribution.

setuptools builds the wheel in a temporary directory with the mended sources and the pyproject.toml
of this distribution.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A build leaves nothing behind in this tree, not even bytecode. Python has already written that of
# this file, since it does so before it runs a module.
sys.dont_write_bytecode = True
with contextlib.suppress(OSError):
    Path(__spec__.cached).unlink()
    Path(__spec__.cached).parent.rmdir()

from .archive import DETECTRON2, BuildError, local_copy  # noqa: E402
from .mends import MENDS, apply_mends  # noqa: E402
from .source import arrange, obtain, unpack  # noqa: E402

HERE = Path(__file__).resolve().parent.parent

# The time of every file in the wheel, so that all builds give the same bytes: that of 2022-09-29,
# when the archive was published, in seconds since 1970.
SOURCE_DATE_EPOCH = 1664473234


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Name the libraries that the download needs; none for a local copy."""
    return [] if local_copy() else ["pypi-simple>=1.5", "requests>=2.20"]


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: dict | None = None
) -> str:
    """Write the metadata, which needs no download: all of it is in pyproject.toml."""
    with _build_directory("pyproject.toml", "README.md", "LICENSE") as directory:
        return _setuptools("prepare_metadata_for_build_wheel", directory, metadata_directory)


def build_wheel(
    wheel_directory: str,
    config_settings: dict | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Fetch, verify, unpack and mend Detectron2, and return the file name of its wheel."""
    try:
        with _build_directory("pyproject.toml", "README.md", "LICENSE") as directory:
            unpacked = directory.parent / "unpacked"
            unpack(obtain(DETECTRON2, directory.parent), unpacked)
            arrange(unpacked, directory)
            apply_mends(MENDS, directory)
            shutil.copytree(HERE / "overlay", directory, dirs_exist_ok=True)
            return _setuptools("build_wheel", directory, wheel_directory)
    except BuildError as error:
        # This shows the sentence alone; another exception would show a traceback.
        raise SystemExit(f"detectron2: {error}") from None


def build_sdist(sdist_directory: str, config_settings: dict | None = None) -> str:
    """Pack this distribution: the backend, which fetches Detectron2 when it builds a wheel."""
    own = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "backend", "overlay")
    with _build_directory(*own) as directory:
        return _setuptools("build_sdist", directory, sdist_directory)


@contextlib.contextmanager
def _build_directory(*names: str) -> Iterator[Path]:
    """Make a temporary directory with copies of these files and directories of this tree."""
    umask = os.umask(0o022)  # the wheel records the mode of each file
    try:
        with tempfile.TemporaryDirectory(prefix="detectron2-") as temporary:
            directory = Path(temporary, "build")
            directory.mkdir()
            for name in names:
                copy = shutil.copytree if (HERE / name).is_dir() else shutil.copyfile
                copy(HERE / name, directory / name)
            yield directory
    finally:
        os.umask(umask)


def _setuptools(hook: str, directory: Path, output: str) -> str:
    """Call a hook of setuptools with `directory` as the working directory, as it expects."""
    from setuptools import build_meta

    output, cwd = os.path.abspath(output), os.getcwd()
    os.environ["SOURCE_DATE_EPOCH"] = str(SOURCE_DATE_EPOCH)
    os.chdir(directory)
    try:
        return getattr(build_meta, hook)(output)
    finally:
        os.chdir(cwd)
