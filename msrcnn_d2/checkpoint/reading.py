"""Read a file of weights as data: no code in it can run, whoever wrote it."""

import json
import pickle
import re
import struct
import zipfile
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch.serialization import MAGIC_NUMBER

from ..utils.errors import UserError
from .pickles import RefusedError, SafeUnpickler, load_torch

__all__ = ["NotWeightsError", "check_whole", "read_file", "reason"]

ZIP = b"PK\x03\x04"
# How PyTorch's files began before they were zip archives
LEGACY_TORCH = pickle.dumps(MAGIC_NUMBER, protocol=2)
# Protocols since 2 begin with their number, older ones with a dict, a list or a global's name
PICKLE = re.compile(rb"\x80|\(d|\(l|[}\]]|c\w[\w.]*\n\w+\n")
HEAD_SIZE = 512  # bytes that are enough to tell formats apart


class NotWeightsError(UserError):
    """
    A file does not contain weights that can be read.

    Attributes:
        what: what it is instead: the message without the file's name and the advice.
    """

    def __init__(self, path: str, what: str, advice: str):
        super().__init__(f"'{path}' {what}: {advice}.")
        self.what = what


def read_file(path: str) -> Any:
    """
    Args:
        path: of a file that PyTorch, Detectron2 (.pkl) or safetensors wrote. Its content decides
            which format it has, not its name.

    Returns:
        what was saved: usually a dict with tensors or NumPy arrays somewhere in it.

    Raises:
        NotWeightsError: the file is none of these, is damaged, or contains code.
    """
    try:
        with open(path, "rb") as f:
            head = f.read(HEAD_SIZE)
        if head.startswith((ZIP, LEGACY_TORCH)):
            return load_torch(path)
        # Eight bytes with the size of a JSON header, then the header
        if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**32:
            return _read_safetensors(path)
        if PICKLE.match(head):
            with open(path, "rb") as f:
                return SafeUnpickler(f, encoding="latin1").load()
    except RefusedError as error:
        raise NotWeightsError(
            path,
            f"is refused, since it contains '{error}', which is not data and could run any code",
            "get the weights from a source that you trust, saved as tensors only",
        ) from error
    except OSError as error:
        raise NotWeightsError(
            path, f"cannot be read ({error.strerror or reason(error)})", "check the path"
        ) from error
    except Exception as error:  # damaged files raise anything
        if "TorchScript" in str(error):
            raise NotWeightsError(
                path,
                "is a TorchScript archive, a program rather than weights",
                "save the state_dict() of its module with torch.save",
            ) from error
        raise NotWeightsError(
            path, f"is truncated or damaged ({reason(error)})", "get the file again"
        ) from error
    raise NotWeightsError(path, *_what_instead(head))


def _read_safetensors(path: str) -> dict[str, Any]:
    """The tensors, and the names of classes if this package wrote the file."""
    tensors = load_file(path)
    with safe_open(path, "pt") as f:
        text = (f.metadata() or {}).get("class_names")
    try:
        names = json.loads(text) if text else None
    except ValueError:  # another program's metadata
        names = None
    return tensors if names is None else {"model": tensors, "class_names": names}


def check_whole(path: str) -> None:
    """
    Read a file of PyTorch and compare its checksums, which PyTorch itself does not do.

    Raises:
        NotWeightsError: it is cut off, damaged, or something else.
    """
    try:
        with open(path, "rb") as f:
            is_zip = f.read(HEAD_SIZE).startswith(ZIP)
        if not is_zip:
            read_file(path)  # such a file has no checksums
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except NotWeightsError:
        raise
    except Exception as error:  # damaged files raise anything
        raise NotWeightsError(
            path, f"is truncated or damaged ({reason(error)})", "get the file again"
        ) from error
    if damaged:
        raise NotWeightsError(
            path, f"is damaged (the checksum of '{damaged}' is wrong)", "get the file again"
        )


def _what_instead(head: bytes) -> tuple[str, str]:
    """What a file without weights is, and what to do."""
    if not head:
        return "is empty", "get the file again"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return (
            "is a web page (HTML), not weights",
            "the download led to an error or log-in page, so get the file with a browser",
        )
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the weights themselves", "run `git lfs pull`"
    return (
        "is not a checkpoint",
        "expected a file of PyTorch (.pth), of Detectron2 (.pkl) or of safetensors",
    )


def reason(error: Exception) -> str:
    """The first sentence of an error's message. Some fill a page, and advise running any code."""
    unnamed = "it ends too early" if isinstance(error, EOFError) else type(error).__name__
    text = re.sub(r"^\[enforce fail at .*?\][ .]*", "", str(error).strip())  # PyTorch's source line
    message = text.splitlines() or [unnamed]
    return message[0].split(". ")[0].rstrip(".")
