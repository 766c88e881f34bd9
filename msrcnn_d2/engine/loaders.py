"""
Loaders of training and test data.

Detectron2 resumes a training with newly shuffled data and other random numbers. Here everything
random in a step is a function of the run's seed, the process's rank and the step. So a resumed
training has the same order of images, augmentations, samples and losses as an uninterrupted one.
"""

import inspect
import itertools
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from detectron2.data import DatasetFromList, MapDataset, build_detection_train_loader
from detectron2.data.samplers import InferenceSampler, TrainingSampler
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from msrcnn_d2_runtime.image_reading import ImageSettings

from ..image_reading import read_with
from ..utils.errors import UserError
from .bad_images import (
    DATA_ERRORS,
    BadImage,
    Read,
    ReadingLoader,
    map_or_tell,
    read_or_tell,
    refuse,
)

__all__ = [
    "LOADER_OPTIONS",
    "ResumableBatches",
    "StepSeeds",
    "build_resumable_loader",
    "build_test_loader",
    "build_train_loader",
    "fit_mask_format",
    "leaving_generators",
    "outlines",
    "reading_by",
    "warn_of_other_loader",
]

logger = logging.getLogger(__name__)

# Arguments of PyTorch's DataLoader that say how images are read, not which ones or in what order
LOADER_OPTIONS = [
    name
    for name in inspect.signature(DataLoader).parameters
    if name not in ("dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last")
    and name not in ("num_workers", "collate_fn")
]


class StepSeeds(HookBase):
    """Seeds all random number generators before each step, and keeps the seed in checkpoints."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self) -> None:
        seed_all_rng(_derived_seed(self.seed, self.trainer.iter, comm.get_rank()))

    def state_dict(self) -> dict:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict) -> None:
        self.seed = state_dict["seed"]


class ResumableBatches:
    """
    Iterable over the batches of a run, from the iteration `first_iter` on.

    The loader is built when iteration starts: a resumed run knows its seed and its iteration only
    after the checkpoint was read.
    """

    def __init__(
        self,
        build_loader: Callable[[int, int, Callable], Iterable],
        seeds: StepSeeds,
        on_bad_images: Callable[[list[BadImage]], object] = refuse,
    ):
        """
        Args:
            build_loader: called with (seed, first iteration, on_bad_images).
            seeds: owner of the run's seed.
            on_bad_images: called with images that cannot be used, if there are any in a batch.
        """
        self.build_loader = build_loader
        self.seeds = seeds
        self.on_bad_images = on_bad_images
        self.first_iter = 0
        self._current: Any = []
        self._iterators: list[Generator] = []

    def __iter__(self) -> Iterator:
        self._iterators.append(self._read())
        return self._iterators[-1]

    def image_ids(self) -> list[str]:
        """Of the last batch. A loader of the user's own may give elements without an id."""
        images = (x for x in self._current if isinstance(x, dict))
        return [str(x.get("image_id", x.get("file_name"))) for x in images]

    def close(self) -> None:
        """End the loader's processes. PyTorch reports an error if they end with this one."""
        for iterator in self._iterators:
            iterator.close()

    def _read(self) -> Generator:
        # Samplers draw their own seed when they are built, and loaders when they start. It happens
        # in the first step of a run, resumed or not, whose numbers it must not change.
        with _temporary_seed(self.seeds.seed):
            loader = self.build_loader(self.seeds.seed, self.first_iter, self.on_bad_images)
            batches = iter(loader)
        for batch in batches:
            self._current = batch
            yield batch


def build_train_loader(
    arguments: dict[str, Any],
    images: ImageSettings,
    seed: int,
    first_iter: int,
    on_bad_images: Callable[[list[BadImage]], object],
) -> Iterable:
    """
    The loader for arguments of Detectron2's :func:`build_detection_train_loader`.

    Args:
        arguments: of Detectron2's loader, and a "seed" for this loader alone.
        images: how images are read.
        seed, first_iter, on_bad_images: as in :func:`build_resumable_loader`.

    Returns:
        a resumable loader; Detectron2's for a stream, which has no element for each index.

    Raises:
        UserError: an argument is not known.
    """
    dataset = arguments["dataset"]
    own_seed = arguments.pop("seed", None)
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, IterableDataset):
        warn_of_other_loader("The training set is a stream, without an element for each index")
        # Version 0.6 lacks some arguments of later ones
        accepted = inspect.signature(build_detection_train_loader).parameters
        left_out = sorted(set(arguments) - set(accepted))
        if left_out and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            logger.warning("This Detectron2 ignores dataloader.train.%s.", ", ".join(left_out))
            arguments = {k: v for k, v in arguments.items() if k in accepted}
        return build_detection_train_loader(**reading_by(images, arguments))
    if isinstance(dataset, MapDataset) and arguments["mapper"] is None:
        dataset, arguments["mapper"] = dataset.__getnewargs__()  # what it was made of
        arguments["dataset"] = dataset
    known = set(inspect.signature(build_resumable_loader).parameters) | set(LOADER_OPTIONS)
    known -= {"seed", "first_iter", "on_bad_images", "options"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise UserError(
            f"dataloader.train has no argument '{unknown[0]}'; it has "
            f"{', '.join(sorted(known | {'seed'}))}."
        )
    fit_mask_format(arguments["mapper"], outlines(dataset))
    return build_resumable_loader(
        seed=seed if own_seed is None else own_seed,
        first_iter=first_iter,
        on_bad_images=on_bad_images,
        **reading_by(images, arguments),
    )


def reading_by(images: ImageSettings, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a loader, whose mapper, if there is one, then reads images by the settings."""
    if arguments.get("mapper") is None:
        return arguments
    return {**arguments, "mapper": read_with(images, arguments["mapper"])}


def warn_of_other_loader(reason: str) -> None:
    """Say what a training loses that is not read by :func:`build_resumable_loader`."""
    logger.warning(
        "%s: a run that is resumed gets other images than one that was not interrupted, an image "
        "that cannot be read ends the training, and masks in run-length encoding need "
        "instance_mask_format='bitmask' in the mapper.",
        reason,
    )


def fit_mask_format(mapper: Callable, dataset: Iterable[dict]) -> None:
    """
    Set `instance_mask_format` of a `DatasetMapper` to "bitmask" if the mask of an object is RLE,
    which its default, "polygon", cannot read. Other mappers stay as they are.

    Args:
        dataset: dataset dicts. Crowds do not count, since training leaves them out.
    """
    wrapped: Any = getattr(mapper, "_obj", mapper)  # inside Detectron2's PicklableWrapper
    if getattr(wrapped, "instance_mask_format", None) != "polygon":
        return
    annotations = (a for d in dataset for a in d.get("annotations", ()) if not a.get("iscrowd"))
    if any(isinstance(a.get("segmentation"), dict) for a in annotations):
        wrapped.instance_mask_format = "bitmask"
        logger.info("There are masks in run-length encoding: all are trained on as bitmasks.")


def build_resumable_loader(
    dataset: Any,
    *,
    mapper: Callable | None,
    seed: int,
    first_iter: int,
    total_batch_size: int | None = None,
    single_gpu_batch_size: int | None = None,
    sampler: Any = None,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable | None = None,
    drop_last: bool = True,
    on_bad_images: Callable[[list[BadImage]], object] = refuse,
    **options: Any,
) -> DataLoader:
    """
    :func:`build_detection_train_loader` of a list or a map-style dataset, from a given iteration
    on.

    Args:
        dataset: list of dataset dicts, or what has `len()` and an element for each index.
        mapper: makes a sample of an element; None if the elements are samples.
        seed: of the run. It decides the order of the data and each sample's augmentation.
        first_iter: number of batches to skip at the beginning. Their images are not read.
        total_batch_size, ...: as in Detectron2; `sampler`, if given, yields the same indices in
            each run.
        single_gpu_batch_size: images per process, in place of `total_batch_size`.
        aspect_ratio_grouping: takes effect if the elements have "width" and "height" before the
            mapper reads images.
        drop_last: has no effect, since a training's data never end.
        on_bad_images: called with the images of each batch that cannot be used, maybe none; random
            other images replace them. By default a bad image is an error.
        options: others of `DataLoader`, see LOADER_OPTIONS.

    Returns:
        loader of `total_batch_size / number of processes` mapped dataset dicts, forever.

    Raises:
        UserError: `DataLoader` refuses an option.
    """
    batch_size = single_gpu_batch_size or (total_batch_size or 0) // comm.get_world_size()
    sampler = sampler if sampler is not None else TrainingSampler(len(dataset), seed=seed)
    groups = _groups(dataset) if aspect_ratio_grouping else None
    batches = _BatchSampler(sampler, len(dataset), batch_size, groups, first_iter)
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    try:
        return ReadingLoader(
            _SeededSamples(dataset, mapper, seed),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate_fn,
            on_bad_images=on_bad_images,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"dataloader.train (yaml: DATALOADER) does not fit PyTorch's DataLoader: {error}"
        ) from error


def outlines(dataset: Any) -> Iterator[dict]:
    """
    Yield the elements of a list or a map-style dataset before the mapper reads their images; {} for
    one that cannot be read.

    Stops at an element that is not a dict, or whose image is read already ("image"): the next ones
    would cost as much.
    """
    for k in range(len(dataset)):
        try:
            element = dataset[k]
        except DATA_ERRORS:
            element = {}
        if not isinstance(element, dict) or "image" in element:
            return
        yield element


def _groups(dataset: Any) -> list[int] | None:
    """Of each image 1 if it is wider than high, else 0; None if the dataset does not say."""
    groups = [
        int(d["width"] > d["height"]) if "width" in d and "height" in d else -1
        for d in outlines(dataset)
    ]
    if len(groups) < len(dataset) or -1 in groups:
        logger.warning(
            "Images are not grouped by aspect ratio, since the training set does not give the "
            "width and height of all of them before they are read."
        )
        return None
    return groups


@dataclass
class _BatchSampler:
    """
    Batches of codes, each `position in the run * dataset size + index in the dataset`.

    Images of the same group (upright or not) share a batch, as in `AspectRatioGroupedDataset`.
    Grouping happens here, before images are read, so that skipping a batch costs nothing.
    """

    sampler: Iterable[int]
    dataset_size: int
    batch_size: int
    groups: Sequence[int] | None
    first_batch: int

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._batches(), self.first_batch, None)

    def _batches(self) -> Iterator[list[int]]:
        waiting: dict[int, list[int]] = defaultdict(list)
        for position, index in enumerate(self.sampler):
            batch = waiting[self.groups[index] if self.groups else 0]
            batch.append(position * self.dataset_size + index)
            if len(batch) == self.batch_size:
                yield batch[:]
                batch.clear()


class _SeededSamples(Dataset):
    """
    Mapped samples by the codes of :class:`_BatchSampler`; a code fixes the augmentation.

    A random other sample replaces one that cannot be read, or that the mapper refuses by returning
    None.
    """

    MAX_TRIES = 100

    def __init__(self, dataset: Any, mapper: Callable | None, seed: int):
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed
        self.rank = comm.get_rank()  # worker processes of the loader do not know it

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, code: int) -> Read:
        position, index = divmod(code, len(self.dataset))
        bad_images: list[BadImage] = []
        with _temporary_seed(_derived_seed(self.seed, position, self.rank)):
            for _ in range(self.MAX_TRIES):
                sample = read_or_tell(self.dataset, index, self.mapper)
                if isinstance(sample, BadImage):
                    bad_images.append(sample)
                elif sample is not None:
                    return Read(sample, bad_images)
                index = random.randrange(len(self.dataset))
        if bad_images:
            return Read(None, bad_images)
        raise RuntimeError(f"The mapper refused {self.MAX_TRIES} samples one after another.")


def _derived_seed(seed: int, count: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, rank, count]).generate_state(1)[0])


@contextmanager
def _temporary_seed(seed: int) -> Iterator[None]:
    """Seed the generators that augmentations draw from; leave those of the caller as they were."""
    with leaving_generators([]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def leaving_generators(devices: Sequence[int] | None = None) -> Iterator[None]:
    """
    Leave the generators of random numbers of Python, NumPy and PyTorch as they were.

    Args:
        devices: the GPUs whose generators are meant, too; by default the current one.
    """
    if devices is None:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def build_test_loader(
    dataset: Any,
    *,
    mapper: Callable | None = None,
    sampler: Any = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable | None = None,
    **options: Any,
) -> DataLoader:
    """
    :func:`build_detection_test_loader` with a batch size, which Detectron2 0.6 does not have.

    The images of a batch are padded to a common size, so a list is sorted to put similar shapes
    into the same batch. Padding changes results a little near the right and lower border.

    Args:
        dataset: list of dataset dicts, or a torch Dataset, which keeps its order.
        mapper, sampler, num_workers, collate_fn: as in Detectron2.
        batch_size: images per batch and process.
        options: others of `DataLoader`, see LOADER_OPTIONS.

    Returns:
        loader of lists of mapped dataset dicts. All processes together read each image once. An
        image that cannot be read raises a :class:`BadImageError`: without it, AP would be wrong.
    """
    if isinstance(dataset, list):
        if batch_size > 1 and sampler is None:
            # An unknown size counts as 0
            dataset = sorted(dataset, key=lambda d: d.get("width", 0) / d.get("height", 1))
        dataset = DatasetFromList(dataset, copy=False)
    # No closures, since worker processes may have to be sent them
    if isinstance(dataset, IterableDataset):
        samples = MapDataset(dataset, partial(_test_sample_of, mapper))
    else:
        sampler = InferenceSampler(len(dataset)) if sampler is None else sampler
        samples = MapDataset(range(len(dataset)), partial(_test_sample_at, dataset, mapper))
    return ReadingLoader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        on_bad_images=refuse,
        **options,
    )


def _test_sample_of(mapper: Callable | None, element: Any) -> Read | None:
    return _as_read(element if mapper is None else map_or_tell(mapper, element))


def _test_sample_at(dataset: Any, mapper: Callable | None, index: int) -> Read | None:
    return _as_read(read_or_tell(dataset, index, mapper))


def _as_read(sample: Any) -> Read | None:
    """None is what the mapper refuses; `MapDataset` knows it."""
    if isinstance(sample, BadImage):
        return Read(None, [sample])
    return None if sample is None else Read(sample, [])
