"""PEP 517 backend: builds a pure-Python wheel of Detectron2 0.6 from its source distribution.

setuptools writes the wheel, in a temporary directory that holds the mended sources and this
distribution's own pyproject.toml.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A build leaves nothing behind in this tree, not even bytecode. It comes too late for the file
# that says so: Python writes a module's bytecode before it runs the module.
sys.dont_write_bytecode = True
with contextlib.suppress(OSError):
    Path(__spec__.cached).unlink()
    Path(__spec__.cached).parent.rmdir()

from .errors import BuildError  # noqa: E402
from .mends import MENDS, apply_mends  # noqa: E402
from .source import DETECTRON2, arrange, local_copy, obtain, unpack  # noqa: E402

HERE = Path(__file__).resolve().parent.parent

# Seconds since 1970, as the time of every file in the wheel, which so depends on no clock: that
# of 2022-09-29, when the archive was published.
SOURCE_DATE_EPOCH = 1664473234


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Name what the download needs, if there is to be one."""
    return [] if local_copy() else ["pypi-simple>=1.5", "requests>=2.20"]


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: dict | None = None
) -> str:
    """Write the metadata, which pyproject.toml holds: this needs no download."""
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
        # Shows the sentence alone, where an exception would show a traceback.
        raise SystemExit(f"detectron2: {error}") from None


def build_sdist(sdist_directory: str, config_settings: dict | None = None) -> str:
    """Pack this distribution, which is the backend; it fetches Detectron2 when it is built."""
    own = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "backend", "overlay")
    with _build_directory(*own) as directory:
        return _setuptools("build_sdist", directory, sdist_directory)


@contextlib.contextmanager
def _build_directory(*names: str) -> Iterator[Path]:
    """Make a directory with copies of the files and directories of that name in this tree."""
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
    """Call the hook of setuptools in `directory`, which it expects as the working directory."""
    from setuptools import build_meta

    output, cwd = os.path.abspath(output), os.getcwd()
    os.environ["SOURCE_DATE_EPOCH"] = str(SOURCE_DATE_EPOCH)
    os.chdir(directory)
    try:
        return getattr(build_meta, hook)(output)
    finally:
        os.chdir(cwd)
