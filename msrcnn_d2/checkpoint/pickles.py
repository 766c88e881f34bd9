"""
Read pickles as data. A pickle is a program, and PyTorch's files contain one. PyTorch's reader and
the unpickler below only run what builds tensors, arrays, numbers and plain containers.
"""

import codecs
import pickle
import pickletools
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

__all__ = ["RefusedError", "SafeUnpickler", "load_torch"]


class RefusedError(Exception):
    """A pickle asks for something that is not data. The message names it."""


class _Ignored:
    """
    Takes the place of objects that describe a training run rather than its weights, such as
    MMEngine's log. Nothing of the object is built or kept.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Ignored":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _ignored(*args: Any) -> _Ignored:
    """Takes the place of the functions that put such objects together."""
    return _Ignored()


# These classes, and the functions that their pickles call. The functions are ignored only in files
# with one of the classes: nothing else in a checkpoint has a use for them.
RUN_CLASSES: dict[str, type] = {
    "mmengine.logging.history_buffer.HistoryBuffer": _Ignored,
    # Read as dicts of this type, because PyTorch lets a file put items into no other
    "mmengine.config.config.ConfigDict": OrderedDict,
    "mmcv.utils.config.ConfigDict": OrderedDict,
    "addict.addict.Dict": OrderedDict,
}
RUN_FUNCTIONS = {"builtins.getattr", "getattr"}


class _Function:
    """Wraps a function that a pickle may call, because it could set attributes of the function."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise RefusedError(f"a change of {self._function.__name__}")


class _DType:
    """
    Takes the place of `numpy.dtype`, for plain numbers and characters. The state of a real one can
    declare that a file's bytes are the addresses of objects.
    """

    def __init__(self, code: Any, align: Any = False, copy: Any = False):
        if not isinstance(code, str) or np.dtype(code).kind not in "biufcSU":
            raise RefusedError(f"numpy.dtype of {code}")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that a file fills once. Filling a real one twice frees memory that is in use."""

    def __new__(cls, *args: Any) -> "_Array":
        raise RefusedError("numpy.ndarray in a way in which NumPy does not save arrays")

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        array = _array(data, dtype, shape, "F" if is_fortran else "C")
        if self.size:
            raise RefusedError("a change of numpy.ndarray")
        state = 1, array.shape, array.dtype, False, array.tobytes()
        super().__setstate__(state)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return np.asarray(self).__reduce_ex__(protocol)  # it is saved as an array of NumPy


def _array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray:
    if type(dtype) is not _DType or not isinstance(data, (bytes, bytearray)):
        raise RefusedError(f"numpy.ndarray of {type(data).__name__}")
    array: np.ndarray = np.ndarray(shape, dtype.value, bytes(data), order=order)
    if array.nbytes != len(data):
        raise ValueError("an array's size is not that of its data")
    return array


@_Function
def _reconstruct(cls: Any, shape: Any, code: Any) -> np.ndarray:
    return np.ndarray.__new__(_Array, (0,), "b")


@_Function
def _scalar(dtype: Any, data: Any) -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data
    return _array(data, dtype, ())[()]


@_Function
def _frombuffer(
    data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None
) -> np.ndarray:
    if axis_order is None:
        return _array(data, dtype, shape, order)
    return _array(data, dtype, shape).transpose(axis_order)


@_Function
def _no_bytes() -> bytes:
    """The data of empty arrays, in pickles that Python 2 can read."""
    return b""


# The names that pickles of NumPy arrays and numbers contain, from NumPy 1 and 2
NUMPY = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in [
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        ]
    },
}


def load_torch(path: str) -> Any:
    """
    The contents of a file of PyTorch.

    Raises:
        RefusedError: it contains something that is not data.
    """
    allowed: list = [(value, ".".join(name)) for name, value in NUMPY.items()]
    try:
        return _load_torch_file(path, allowed)
    except RefusedError as error:
        if str(error) not in RUN_CLASSES:
            raise
    allowed += [(value, name) for name, value in RUN_CLASSES.items()]
    allowed += [(_ignored, name) for name in RUN_FUNCTIONS]
    return _load_torch_file(path, allowed)


def _load_torch_file(path: str, allowed: list) -> Any:
    try:
        # Given an open file, it ignores the suffix. What it warns about is refused or harmless
        with safe_globals(allowed), open(path, "rb") as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(f, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = str(error)
        if operation := re.search(r"Unsupported operand (\d+)", message):
            known = {ord(o.code): o.name for o in pickletools.opcodes}.get(int(operation[1]))
            if known is None:  # the file is damaged
                raise
            raise RefusedError(f"pickle operation {known}") from error
        refused = re.search(
            r"GLOBAL (\S+)|function (.+?)(?: which|$)|<class '(.+?)'", message, re.M
        )
        if refused is None:
            raise
        raise RefusedError(next(filter(None, refused.groups()))) from error


@_Function
def _encode(text: str, encoding: str) -> bytes:
    """Bytes, in pickles of Python 3 that Python 2 can read."""
    if encoding != "latin1":
        raise RefusedError(f"_codecs.encode to {encoding}")
    return codecs.latin_1_encode(text)[0]


class SafeUnpickler(pickle.Unpickler):
    """Unpickler that knows only NumPy arrays and plain containers."""

    ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode,
        **NUMPY,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedError("a reference to something outside of the file")
