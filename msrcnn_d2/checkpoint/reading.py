"""
Read a file of weights as data: nothing in it can run, whoever made it.

Pickles, which PyTorch's files contain as well, are programs. PyTorch's own `weights_only` reader
and the unpickler below execute those few that build tensors, arrays, numbers and plain containers.
"""

import codecs
import pickle
import re
import struct
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.serialization import MAGIC_NUMBER, safe_globals

from ..errors import UserError

__all__ = ["read_file"]

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
# What PyTorch wrote before its files were zip archives
LEGACY_TORCH = pickle.dumps(MAGIC_NUMBER, protocol=2)
HEAD_SIZE = 512  # bytes that are enough to tell formats apart


def read_file(path: str) -> Any:
    """
    Args:
        path: of a file that PyTorch, Detectron2 (.pkl) or safetensors has written. Its content
            decides, not its name.

    Returns:
        what was saved: mostly a dict with tensors or NumPy arrays somewhere in it.

    Raises:
        UserError: it is none of these, it is damaged, or it holds something that could run.
    """
    with open(path, "rb") as f:
        head = f.read(HEAD_SIZE)
    try:
        if head.startswith((ZIP, LEGACY_TORCH)):
            return _read_torch(path)
        if _is_safetensors(head):
            return load_file(path)
        if head.startswith(PICKLE) or (head and path.endswith(".pkl") and not _is_text(head)):
            with open(path, "rb") as f:
                return _SafeUnpickler(f, encoding="latin1").load()
    except _RefusedError as error:
        raise UserError(
            f"'{path}' is refused: it contains '{error}', which is not data and could run any "
            "code. Get the weights from a source that you trust, saved as tensors only."
        ) from error
    except UserError:
        raise
    except Exception as error:  # damaged files raise anything
        raise UserError(
            f"'{path}' is truncated or damaged ({reason(error)}): get the file again."
        ) from error
    raise UserError(f"'{path}' {_what_instead(head)}")


def _what_instead(head: bytes) -> str:
    if not head:
        return "is empty: get the file again."
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return (
            "is a web page (HTML), not weights: the download led to an error or log-in page. "
            "Get the file again, with a browser if need be."
        )
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the weights themselves: run `git lfs pull`."
    return (
        "is not a checkpoint: expected a file of PyTorch (.pth), of Detectron2 (.pkl) or of "
        "safetensors."
    )


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes with the size of a JSON header, then the header."""
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**32


def _is_text(head: bytes) -> bool:
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<", b"version ", b"{"))


class _RefusedError(Exception):
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

    def __setitem__(self, key, value):
        pass


def _ignored(*args):
    """Stands in for what such objects are put together with, without doing it."""
    return _Ignored()


# The classes, and what their pickles call besides. The latter are ignored only together with the
# former: on their own they have no business in a checkpoint.
RUN_CLASSES = {
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "addict.addict.Dict",
}
RUN_FUNCTIONS = {"builtins.getattr", "getattr"}

# What pickles of NumPy arrays and numbers call, by its name in NumPy 1 and 2
ARRAY_FUNCTIONS = {
    (f"numpy.{core}.{module}", name): function
    for core in ("core", "_core")
    for module, name, function in [
        ("multiarray", "_reconstruct", np.ones(1).__reduce__()[0]),
        ("multiarray", "scalar", np.float64(1).__reduce__()[0]),
        ("numeric", "_frombuffer", np.ones(1).__reduce_ex__(5)[0]),
    ]
}


def _read_torch(path: str) -> Any:
    allowed = [
        np.ndarray,
        np.dtype,
        *(type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"),
        *((function, ".".join(name)) for name, function in ARRAY_FUNCTIONS.items()),
    ]
    try:
        return _load_torch(path, allowed)
    except _RefusedError as error:
        if str(error) not in RUN_CLASSES:
            raise
    allowed += [(_Ignored, name) for name in RUN_CLASSES]
    allowed += [(_ignored, name) for name in RUN_FUNCTIONS]
    return _load_torch(path, allowed)


def _load_torch(path: str, allowed: list) -> Any:
    try:
        with safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)|function <?(.+?)>? which|class (\S+)", str(error))
        if refused is None:
            raise
        raise _RefusedError(next(filter(None, refused.groups()))) from error


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 puts bytes into pickles that Python 2 can read."""
    if encoding != "latin1":
        raise _RefusedError(f"_codecs.encode to {encoding}")
    return codecs.latin_1_encode(text)[0]


class _SafeUnpickler(pickle.Unpickler):
    """Unpickler that knows NumPy arrays and plain containers only."""

    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode,
        **ARRAY_FUNCTIONS,
    }

    def find_class(self, module, name):
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid):
        raise _RefusedError("a reference to something outside of the file")


def reason(error: Exception) -> str:
    """First sentence of an error's message; some go on for a page, and advise to run any code."""
    message = str(error).strip().splitlines() or [type(error).__name__]
    return message[0].split(". ")[0].rstrip(".")
