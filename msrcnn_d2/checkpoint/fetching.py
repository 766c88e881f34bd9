"""Find the file behind a path, a URL or a name of a model zoo, and download it if needed."""

import os
import posixpath
import re
import socket
from contextlib import suppress
from hashlib import sha256
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

import torch
from iopath.common.file_io import file_lock, get_cache_dir

from detectron2.utils.file_io import Detectron2Handler, PathManager

from ..published_models import PUBLISHED
from ..utils.errors import UserError
from .reading import NotWeightsError, read_file, reason

__all__ = ["find_file", "path_in_cache"]

SUFFIXES = (".pth", ".pt", ".pkl", ".pyth", ".safetensors")
# Names of published files end with the first digits of their SHA-256; a date looks like that
DIGEST = re.compile(r"-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$")
CONNECTION_TIMEOUT = 30  # seconds
ZOO_FOLDER = "COCO-InstanceSegmentation"


def find_file(path: str) -> str:
    """
    Args:
        path: a file; a URL that begins with "https://", "http://" or Detectron2's
            "detectron2://"; or the name of a config of this model zoo or of Detectron2's, for the
            weights that were published for it.

    Returns:
        path of the file. Downloads are kept in Detectron2's cache, `$FVCORE_CACHE` or
        ~/.torch/iopath_cache.

    Raises:
        UserError: there is no such file, it cannot be downloaded, or the checksum of the download
            is not the one in its name.
    """
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        raise UserError(f"Checkpoint '{path}' is a directory: give one of its files.")
    url = _url(path)
    if urlparse(url).scheme not in ("http", "https"):
        return _other_file(url)
    cached = path_in_cache(url)
    try:
        os.makedirs(os.path.dirname(cached), exist_ok=True)
        with file_lock(cached):  # one process of each machine downloads, the others wait
            if not os.path.isfile(cached):
                _download(url, cached)
    except OSError as error:
        raise UserError(
            f"Cannot write '{cached}' ({error.strerror}): set FVCORE_CACHE to a directory for "
            "downloads that can be written."
        ) from error
    return cached


def path_in_cache(url: str) -> str:
    """
    The path of a download: Detectron2's files are where Detectron2 keeps them, others in a folder
    named after their server. Each query has a folder of its own. ".." in a URL does not lead out of
    the cache.
    """
    theirs, given = urlparse(Detectron2Handler.S3_DETECTRON2_PREFIX), urlparse(url)
    path = given.path if posixpath.basename(given.path) else given.path + "/download"
    folder, name = posixpath.split(posixpath.normpath("/" + path.lstrip("/")))
    query = sha256(given.query.encode()).hexdigest()[:8] if given.query else ""
    path = posixpath.join(folder, query, name)
    if given.netloc != theirs.netloc or not path.startswith(theirs.path):
        server = given.netloc.rpartition("@")[2].replace(":", "_")  # without a user's password
        path = posixpath.normpath(f"/{server}{path}")
    return os.path.join(get_cache_dir(), path.lstrip("/"))


def _url(path: str) -> str:
    if path.startswith(Detectron2Handler.PREFIX):
        return Detectron2Handler.S3_DETECTRON2_PREFIX + path[len(Detectron2Handler.PREFIX) :]
    if "://" in path or path.endswith(SUFFIXES):
        return path
    name = os.path.splitext(path)[0]
    folder, config = os.path.split(name)
    # With any other folder, the user means a file on this machine
    if config in PUBLISHED and os.path.basename(folder) in ("", ZOO_FOLDER):
        return PUBLISHED[config].checkpoint_url
    try:
        # Imported here because it needs pkg_resources, which many environments no longer have
        import detectron2.model_zoo

        return detectron2.model_zoo.get_checkpoint_url(name)
    except (RuntimeError, ImportError):
        return path


def _other_file(path: str) -> str:
    """A file from a storage that the user has registered with Detectron2, or a missing file."""
    try:
        local_path = PathManager.get_local_path(path)
    except Exception as error:  # any library that fetches files may have raised it
        raise UserError(
            f"Checkpoint '{path}' cannot be fetched ({reason(error)}); download it by hand "
            "and give the path of the file."
        ) from error
    if not os.path.isfile(local_path):
        raise UserError(
            f"Checkpoint '{path}' does not exist: give a file, a URL, or one of the model zoo's "
            f"names, {', '.join(PUBLISHED)}."
        )
    return local_path


def _download(url: str, path: str) -> None:
    """Download to `path`, where the file appears only when it is complete."""
    incomplete = f"{path}.incomplete"
    digest = DIGEST.search(path)
    timeout = socket.getdefaulttimeout()
    # Without a timeout, a firewall that drops packets looks like a slow server
    socket.setdefaulttimeout(CONNECTION_TIMEOUT)
    try:
        torch.hub.download_url_to_file(url, incomplete, digest[1] if digest else None)
        read_file(incomplete)  # a web page, or half of a file, is not kept
        os.replace(incomplete, path)
    except (OSError, RuntimeError, ValueError, HTTPException, UserError) as error:
        shown = re.sub("//[^/]*@", "//", url)  # without a user's password
        raise UserError(
            f"Cannot download '{shown}' ({_what_failed(error)}): get the file in another way and "
            f"put it at '{path}', or give its own path."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
        with suppress(FileNotFoundError):
            os.remove(incomplete)


def _what_failed(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, URLError):
        return f"no connection: {error.reason}"
    if "invalid hash value" in str(error):
        return "its SHA-256 is not the one in its name, so it was damaged or changed on the way"
    if isinstance(error, NotWeightsError):
        return f"what comes {error.what}"
    return reason(error)
