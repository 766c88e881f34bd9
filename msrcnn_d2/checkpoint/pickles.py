"""
Pickles as data. They are programs, and PyTorch's files contain them as well; PyTorch's reader and
the unpickler below execute those few that build tensors, arrays, numbers and plain containers.
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
    """A pickle asks for something that is not data; the message is its name."""


class _Ignored:
    """
    Stands in for objects that describe a training run, not its weights.

    MMEngine keeps its log in checkpoints. Nothing of the object is built or kept.
    """

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __setstate__(self, state):
        pass


def _ignored(*args):
    """Stands in for what such objects are put together with, without doing it."""
    return _Ignored()


# The classes, and what their pickles call besides. The latter are ignored only together with the
# former: on their own they have no business in a checkpoint.
RUN_CLASSES: dict[str, type] = {
    "mmengine.logging.history_buffer.HistoryBuffer": _Ignored,
    # The dicts are read as such: PyTorch lets a file put items into nothing else
    "mmengine.config.config.ConfigDict": OrderedDict,
    "mmcv.utils.config.ConfigDict": OrderedDict,
    "addict.addict.Dict": OrderedDict,
}
RUN_FUNCTIONS = {"builtins.getattr", "getattr"}


class _Function:
    """A function that a pickle may call. Of a plain one it could also set the attributes."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        raise RefusedError(f"a change of {self._function.__name__}")


class _DType:
    """
    Stands in for `numpy.dtype`: one of plain numbers or characters.

    The state of the original can declare that a file's bytes are the addresses of objects.
    """

    def __init__(self, code, align=False, copy=False):
        if not isinstance(code, str) or np.dtype(code).kind not in "biufcSU":
            raise RefusedError(f"numpy.dtype of {code}")
        self.value = np.dtype(code)

    def __setstate__(self, state):
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that a file fills once. Refilling the original frees what others may look into."""

    def __new__(cls, *args):
        raise RefusedError("numpy.ndarray in a way in which NumPy does not save arrays")

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        array = _array(data, dtype, shape, "F" if is_fortran else "C")
        if self.size:
            raise RefusedError("a change of numpy.ndarray")
        state = 1, array.shape, array.dtype, False, array.tobytes()
        super().__setstate__(state)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol):
        return np.asarray(self).__reduce_ex__(protocol)  # saved again, it is NumPy's


def _array(data, dtype, shape, order="C") -> np.ndarray:
    if type(dtype) is not _DType or not isinstance(data, (bytes, bytearray)):
        raise RefusedError(f"numpy.ndarray of {type(data).__name__}")
    array: np.ndarray = np.ndarray(shape, dtype.value, bytes(data), order=order)
    if array.nbytes != len(data):
        raise ValueError("an array's size is not that of its data")
    return array


@_Function
def _reconstruct(cls, shape, code):
    return np.ndarray.__new__(_Array, (0,), "b")


@_Function
def _scalar(dtype, data):
    data = data.encode("latin1") if isinstance(data, str) else data
    return _array(data, dtype, ())[()]


@_Function
def _frombuffer(data, dtype, shape, order, axis_order=None):
    if axis_order is None:
        return _array(data, dtype, shape, order)
    return _array(data, dtype, shape).transpose(axis_order)


@_Function
def _no_bytes():
    """How pickles that Python 2 can read write the data of empty arrays."""
    return b""


# What pickles of NumPy arrays and numbers name, in NumPy 1 and 2
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
        # Of an open file it cannot go by the name; what it warns of is refused or does no harm
        with safe_globals(allowed), open(path, "rb") as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(f, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _refused(str(error))
        if refused is None:
            raise
        raise RefusedError(refused) from error


def _refused(message: str) -> str | None:
    """What PyTorch's reader does not allow, from its message."""
    operation = re.search(r"Unsupported operand (\d+)", message)
    if operation:
        known = {ord(o.code): o.name for o in pickletools.opcodes}.get(int(operation[1]))
        return f"pickle operation {known}" if known else None  # none: it is damaged
    name = re.search(r"GLOBAL (\S+)|function (.+?)(?: which|$)|<class '(.+?)'", message, re.M)
    return next(filter(None, name.groups())) if name else None


@_Function
def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 puts bytes into pickles that Python 2 can read."""
    if encoding != "latin1":
        raise RefusedError(f"_codecs.encode to {encoding}")
    return codecs.latin_1_encode(text)[0]


class SafeUnpickler(pickle.Unpickler):
    """Unpickler that knows NumPy arrays and plain containers only."""

    ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode,
        **NUMPY,
    }

    def find_class(self, module, name):
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid):
        raise RefusedError("a reference to something outside of the file")
