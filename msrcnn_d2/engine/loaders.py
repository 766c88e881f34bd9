"""Training data in an order, with augmentations and samples, that a resumed run repeats.

Detectron2 resumes a run with newly shuffled data and other random numbers. Here everything random
in a step is a function of the run's seed, the process's rank and the step, so that a run that was
interrupted goes on with the very losses it would have had.
"""

import inspect
import itertools
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from detectron2.data import DatasetFromList
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from ..utils.errors import UserError
from .bad_images import DATA_ERRORS, BadImage, Read, ReadingLoader, read_or_tell, refuse

__all__ = ["LOADER_OPTIONS", "ResumableBatches", "StepSeeds", "build_resumable_loader"]

logger = logging.getLogger(__name__)

# Arguments of PyTorch's DataLoader that say how images are read, not which ones or in what order
LOADER_OPTIONS = [
    name
    for name in inspect.signature(DataLoader).parameters
    if name not in ("dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last")
    and name not in ("num_workers", "collate_fn")
]


class StepSeeds(HookBase):
    """Before each step, seed all random number generators; keep the seed in checkpoints."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self):
        seed_all_rng(self.seed_of_step())

    def seed_of_step(self) -> int:
        """Of this process in the current iteration."""
        return _derived_seed(self.seed, self.trainer.iter)

    def state_dict(self):
        return {"seed": self.seed}

    def load_state_dict(self, state_dict):
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

    def __iter__(self):
        self._iterators.append(self._read())
        return self._iterators[-1]

    def close(self) -> None:
        """
        End the processes that read. Left to the end of this one, they would be killed, and PyTorch
        would take that for an error.
        """
        for iterator in self._iterators:
            iterator.close()

    def image_ids(self) -> list[str]:
        """Of the batch given last, as far as it tells them: it may be of the user's own loader."""
        images = (x for x in self._current if isinstance(x, dict))
        return [str(x.get("image_id", x.get("file_name"))) for x in images]

    def _read(self):
        # Samplers draw their own seed when they are built, and loaders when they start. It happens
        # in the first step of a run, resumed or not, whose numbers it must not change.
        with _temporary_seed(self.seeds.seed):
            loader = self.build_loader(self.seeds.seed, self.first_iter, self.on_bad_images)
            batches = iter(loader)
        for batch in batches:
            self._current = batch
            yield batch


def build_resumable_loader(
    dataset,
    *,
    mapper: Callable | None,
    seed: int,
    first_iter: int,
    total_batch_size: int | None = None,
    single_gpu_batch_size: int | None = None,
    sampler=None,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable | None = None,
    drop_last: bool = True,
    on_bad_images: Callable[[list[BadImage]], object] = refuse,
    **options,
) -> DataLoader:
    """
    :func:`build_detection_train_loader` of a list or a map-style dataset, from a given iteration
    on.

    Args:
        dataset: list of dataset dicts, or what has `len()` and an element for each index.
        mapper: makes a sample of an element; None if the elements are samples.
        seed: of the run: decides on the order of the data and on each sample's augmentation.
        first_iter: number of batches to leave out at the beginning; their images are not read.
        total_batch_size, ...: as in Detectron2; `sampler`, if given, yields the same indices in
            each run.
        single_gpu_batch_size: images per process, in place of `total_batch_size`.
        aspect_ratio_grouping: takes effect if the elements say "width" and "height" before the
            mapper reads images.
        drop_last: has no effect, since a training's data never end.
        on_bad_images: called with the images of a batch that cannot be used, maybe none; by
            default they are an error. In the batch others at random take their place.
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


def outlines(dataset) -> Iterator[dict]:
    """
    The elements of a list or a map-style dataset, as far as they are known without reading images.

    An element that has been read already ("image") ends them: the next ones would cost as much. So
    does one that is no dict. One that cannot be read is empty.
    """
    for k in range(len(dataset)):
        try:
            element = dataset[k]
        except DATA_ERRORS:
            element = {}
        if not isinstance(element, dict) or "image" in element:
            return
        yield element


def _groups(dataset) -> list[int] | None:
    """Of each image 1 if it is wider than high, else 0; None if the dataset does not say."""
    groups = [
        int(d["width"] > d["height"]) if "width" in d and "height" in d else -1
        for d in outlines(dataset)
    ]
    if len(groups) < len(dataset) or -1 in groups:
        logger.warning(
            "Images are not grouped by aspect ratio, since the training set does not say the "
            "width and height of all of them before they are read."
        )
        return None
    return groups


class _BatchSampler:
    """
    Batches of codes, each `position in the run * dataset size + index in the dataset`.

    Images of the same group (upright or not) share a batch, as in `AspectRatioGroupedDataset`.
    Grouping happens here, before images are read, so that skipping a batch costs nothing.
    """

    def __init__(
        self,
        sampler: Iterable[int],
        dataset_size: int,
        batch_size: int,
        groups: Sequence[int] | None,
        first_batch: int,
    ):
        self.sampler = sampler
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.groups = groups
        self.first_batch = first_batch

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._batches(), self.first_batch, None)

    def _batches(self):
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

    A sample that cannot be read, or that the mapper refuses by returning None, is replaced by
    another one at random.
    """

    MAX_TRIES = 100

    def __init__(self, dataset, mapper: Callable | None, seed: int):
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed
        self.rank = comm.get_rank()  # worker processes of the loader do not know it

    def __len__(self):
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


def _derived_seed(seed: int, count: int, rank: int | None = None) -> int:
    rank = comm.get_rank() if rank is None else rank
    return int(np.random.SeedSequence([seed, rank, count]).generate_state(1)[0])


@contextmanager
def _temporary_seed(seed: int):
    """Seed the generators that augmentations draw from; leave those of the caller as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
