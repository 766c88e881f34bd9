"""Images that cannot be read: named, counted, left out in training up to a limit."""

import logging
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import DataLoader

from detectron2.data.build import trivial_batch_collator
from detectron2.engine import HookBase
from detectron2.utils import comm

from msrcnn_d2_runtime.text import plural

from ..utils.distributed import StepAgreement
from ..utils.errors import UserError
from .hooks import outlive_stop_signals

__all__ = [
    "BadImage",
    "BadImageError",
    "BadImages",
    "ReadingLoader",
    "map_or_tell",
    "read_or_tell",
    "refuse",
]

logger = logging.getLogger(__name__)

ADVICE = (
    "`msrcnn-d2 check-data ANNOTATIONS IMAGES` finds all such images, and with --fix "
    "writes annotations without them."
)

# What reading an image, or masks that do not fit it, raises; mistakes in the code of a mapper
# raise others
DATA_ERRORS = (
    AssertionError,
    EOFError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,  # Pillow, for a broken PNG
    ValueError,  # also what Detectron2 raises for an image of another size than it should have
    struct.error,
    zlib.error,
)


class BadImage(NamedTuple):
    """An image of a dataset that cannot be used, and why."""

    name: str
    reason: str


class BadImageError(UserError):
    """There are images that cannot be used, and more of them than may be left out."""


class Read(NamedTuple):
    """What a loader's process has read: a sample, or None if there is nothing but bad images."""

    sample: Any
    bad_images: list[BadImage]


def map_or_tell(mapper: Callable, dataset_dict: dict) -> Any | BadImage | None:
    """The mapped dataset dict, or which image cannot be read; None if the mapper refuses it."""
    try:
        return mapper(dataset_dict)
    except DATA_ERRORS as error:
        name = dataset_dict.get("file_name", f"image {dataset_dict.get('image_id')}")
        return BadImage(name, _reason(error))


def read_or_tell(dataset: Any, index: int, mapper: Callable | None) -> Any | BadImage | None:
    """
    :func:`map_or_tell` of an element of a map-style dataset, which may read images itself. Without
    a mapper, the element.
    """
    try:
        element = dataset[index]
    except DATA_ERRORS as error:
        return BadImage(f"element {index} of the dataset", _reason(error))
    return element if mapper is None else map_or_tell(mapper, element)


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")


def refuse(images: list[BadImage]) -> None:
    """
    Raises:
        BadImageError: if there are any.
    """
    if images:
        raise BadImageError(
            f"Image '{images[0].name}' cannot be used ({images[0].reason}): repair it, or remove "
            f"it from the annotations. {ADVICE}"
        )


class ReadingLoader(DataLoader):
    """
    `DataLoader` of a dataset of :class:`Read`. It gives batches of the samples, and calls a
    function in this process with the bad images: an error in a worker would come with its whole
    traceback.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        collate_fn: Callable | None,
        on_bad_images: Callable[[list[BadImage]], object],
        worker_init_fn: Callable[[int], object] | None = None,
        **kwargs: Any,
    ):
        init_fns = [outlive_stop_signals(), *([worker_init_fn] if worker_init_fn else [])]
        # No closures, since worker processes may have to be sent them
        super().__init__(
            dataset,
            collate_fn=partial(_collate, collate_fn or trivial_batch_collator),
            worker_init_fn=partial(_init_worker, init_fns),
            **kwargs,
        )
        self._on_bad_images = on_bad_images

    def __iter__(self) -> Iterator:  # type: ignore[override]
        # Started now, not with the first batch: it draws a seed from the caller's generator
        return self._read(super().__iter__())

    def _read(self, batches: Iterator[tuple[Any, list[BadImage]]]) -> Iterator:
        for batch, bad_images in batches:
            self._on_bad_images(bad_images)
            if batch is None:
                refuse(bad_images)
            yield batch


def _init_worker(functions: list[Callable[[int], object]], worker: int) -> None:
    for function in functions:
        function(worker)


def _collate(collate_fn: Callable, items: list[Read]) -> tuple[Any, list[BadImage]]:
    bad_images = [image for item in items for image in item.bad_images]
    if any(item.sample is None for item in items):
        return None, bad_images
    return collate_fn([item.sample for item in items]), bad_images


class BadImages(HookBase):
    """
    Counts the images that a training has left out. All processes stop after the step in which
    there are too many.
    """

    def __init__(self, limit: int, agreement: StepAgreement):
        """
        Args:
            limit: how many may be left out.
            agreement: of the processes in each step, settled before the hooks are called.
        """
        self.limit = limit
        self._any_process_has_new = agreement.add(lambda: bool(self._new))
        self._known: dict[str, str] = {}
        self._new: dict[str, str] = {}

    def state_dict(self) -> dict:
        return {"known": self._known}

    def load_state_dict(self, state_dict: dict) -> None:
        self._known = dict(state_dict["known"])

    def found(self, images: list[BadImage]) -> None:
        """To be called with the bad images of each batch; each image counts once."""
        self._new.update((i.name, i.reason) for i in images if i.name not in self._known)

    def after_step(self) -> None:
        if not self._any_process_has_new():
            return
        new = {k: v for found in comm.all_gather(self._new) for k, v in found.items()}
        self._new = {}
        for name, reason in new.items():
            self._known[name] = reason
            logger.warning(
                "Image '%s' is left out (%s). That makes %d of at most %d.",
                *(name, reason, len(self._known), self.limit),
            )
        if len(self._known) > self.limit:
            raise BadImageError(
                f"Iteration {self.trainer.iter}: {plural(len(self._known), 'image')} cannot be "
                f"used, the last one '{name}' ({reason}), but at most {self.limit} may be left "
                "out: repair them, or raise train.max_bad_images (yaml: "
                "DATALOADER.MAX_BAD_IMAGES). "
                f"{ADVICE}",
                on_all_processes=True,
            )
