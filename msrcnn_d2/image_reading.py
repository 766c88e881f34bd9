"""How a config says that images are read, and mappers of Detectron2 that read them so."""

import io
import threading
from collections.abc import Callable
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image, UnidentifiedImageError

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.utils.file_io import PathHandler, PathManager

from msrcnn_d2_runtime.image_reading import (
    IMAGE_KEYS,
    TURNS,
    ImageSettings,
    NeedsSetting,
    is_deep,
    open_image,
    orientation_of,
    refuse_unless_readable,
    to_rgb,
    without_pixel_limit,
)

from .utils.errors import UserError

__all__ = ["image_settings", "read_with"]

PREFIX = "msrcnn-decoded://"


def image_settings(cfg: DictConfig | CfgNode) -> ImageSettings:
    """
    The settings of a config of either kind.

    Raises:
        UserError: a value is wrong, or a key is unknown.
    """
    if isinstance(cfg, CfgNode):
        values = {
            key: cfg.INPUT.get(name.split(".")[1], default)
            for key, (name, default) in IMAGE_KEYS.items()
        }
        # A yaml key has no other way to say that it is not set
        unset = {k: None for k, v in values.items() if k != "apply_exif" and v in ((), [], 0)}
        return ImageSettings(**{**values, **unset})
    given = OmegaConf.select(cfg, "dataloader.images")
    if given is None:
        return ImageSettings()
    if not isinstance(given, DictConfig):
        raise UserError(f"dataloader.images is {given!r}, but must have {', '.join(IMAGE_KEYS)}.")
    for key in map(str, given):
        if key not in IMAGE_KEYS:
            raise UserError(f"dataloader.images has no key '{key}', only {', '.join(IMAGE_KEYS)}.")
    return ImageSettings(**{str(k): v for k, v in given.items()})


class _Decoded(threading.local):
    """The images that a mapper reads instead of files, by path, for each thread."""

    def __init__(self) -> None:
        self.images: dict[str, bytes] = {}


_decoded = _Decoded()


class _DecodedHandler(PathHandler):
    """Opens images that have been decoded already."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[bytes]:
        return io.BytesIO(_decoded.images[path])

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return path in _decoded.images

    _isfile = _exists


PathManager.register_handler(_DecodedHandler())


class _ReadingMapper:
    """
    A mapper that reads images by the settings, also in the processes of a loader.

    The mapper itself opens the images that Detectron2 reads in the same way. Others are decoded
    here, and the mapper finds them under another name in PathManager, so that its code need not
    change.
    """

    def __init__(self, mapper: Callable, settings: ImageSettings):
        self.mapper = mapper
        self.settings = settings
        # One with a `__call__` of its own may read what Detectron2 cannot
        self.is_detectron2s = (
            isinstance(mapper, DatasetMapper) and type(mapper).__call__ is DatasetMapper.__call__
        )

    def __getattr__(self, name: str) -> Any:
        if name == "mapper":  # not there yet, while it is unpickled
            raise AttributeError(name)
        return getattr(self.mapper, name)

    def __call__(self, dataset_dict: dict) -> Any:
        name = dataset_dict.get("file_name")
        if not isinstance(name, str):
            return self.mapper(dataset_dict)
        with without_pixel_limit():
            image = self._read(name)
            if image is None:
                return self.mapper(dataset_dict)
            return self._map_decoded(dataset_dict, name, image)

    def _read(self, name: str) -> Image.Image | None:
        """The decoded image; None if the mapper reads it in the same way."""
        try:
            with PathManager.open(name, "rb") as f, open_image(f, self.settings) as image:
                refuse_unless_readable(image, self.settings)
                is_turned = not self.settings.apply_exif and orientation_of(image) in TURNS
                return to_rgb(image, self.settings) if is_deep(image) or is_turned else None
        except (FileNotFoundError, UnidentifiedImageError):
            return None  # the mapper raises an error, or reads it by other means
        except NeedsSetting as error:
            if self.is_detectron2s or error.kind == "image-pixels":
                raise
            return None

    def _map_decoded(self, dataset_dict: dict, name: str, image: Image.Image) -> Any:
        path, buffer = PREFIX + name, io.BytesIO()
        image.save(buffer, "BMP")
        _decoded.images[path] = buffer.getvalue()
        try:
            mapped = self.mapper({**dataset_dict, "file_name": path})
        except Exception as error:  # such as that the size is another one
            error.args = tuple(
                x.replace(PREFIX, "") if isinstance(x, str) else x for x in error.args
            )
            raise
        finally:
            del _decoded.images[path]
        if isinstance(mapped, dict) and mapped.get("file_name") == path:
            mapped["file_name"] = name
        return mapped


def read_with(settings: ImageSettings, mapper: Callable | None) -> Callable | None:
    """
    Make a mapper read images by the settings.

    Without settings, a mapper that is not derived from Detectron2's stays as it is: it may read
    images in its own way.
    """
    if mapper is None or isinstance(mapper, _ReadingMapper):
        return mapper
    if settings == ImageSettings() and not isinstance(mapper, DatasetMapper):
        return mapper
    return _ReadingMapper(mapper, settings)
