"""The data sets' own libraries of evaluation, which are installed by those who need them."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from ..utils.errors import UserError

__all__ = ["import_library", "with_old_numpy_names"]


def import_library(module: str, dataset: str, extra: str) -> ModuleType:
    """
    Args:
        module: dotted name, such as "lvis.eval".
        dataset: what needs it, for the message.
        extra: ours that installs it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"Data and evaluation of {dataset} need a package that is not installed "
            f"({error.name}): `pip install 'msrcnn-d2[{extra}]'`."
        ) from error


class _OldNumpy:
    """NumPy with names that it once had."""

    float = float
    in1d = staticmethod(np.isin)  # the caller restores the shape, which in1d flattened

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextmanager
def with_old_numpy_names(module: ModuleType) -> Iterator[None]:
    """
    Let a module, and no other one, find the names that NumPy has removed: lvis 0.5.3 calls
    `np.float`, which NumPy had until 1.23, and cityscapesScripts 2.3.0 `np.in1d`, until 2.3. Both
    are the latest on PyPI.
    """
    module.np = _OldNumpy()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.np = np  # type: ignore[attr-defined]
