"""Images to evaluate on, in batches."""

from collections.abc import Callable

from torch.utils.data import DataLoader, Dataset, IterableDataset

from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.samplers import InferenceSampler

from .bad_images import BadImage, Read, ReadingLoader, map_or_tell, read_or_tell, refuse

__all__ = ["build_test_loader"]


def build_test_loader(
    dataset,
    *,
    mapper: Callable | None = None,
    sampler=None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable | None = None,
    **options,
) -> DataLoader:
    """
    :func:`build_detection_test_loader` with a batch size, which Detectron2 0.6 does not have.

    Images of a batch are padded to a common size, so those of similar shape come together, whatever
    their order in the dataset. Padding changes results a little, near the right and the lower
    border of an image.

    Args:
        dataset: list of dataset dicts; or a torch Dataset, which stays in its order.
        mapper, sampler, num_workers, collate_fn: as in Detectron2.
        batch_size: images per batch and process.
        options: others of `DataLoader`, see LOADER_OPTIONS.

    Returns:
        loader of lists of mapped dataset dicts, each of which comes once in all processes together.
        An image that cannot be read is a :class:`BadImageError`: without it, AP would be wrong.
    """
    if isinstance(dataset, list):
        if batch_size > 1 and sampler is None:
            dataset = sorted(dataset, key=_aspect_ratio)
        dataset = DatasetFromList(dataset, copy=False)
    if not isinstance(dataset, IterableDataset):
        sampler = InferenceSampler(len(dataset)) if sampler is None else sampler
        dataset = _Elements(dataset)
    dataset = MapDataset(dataset, _Reader(mapper))
    return ReadingLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        on_bad_images=refuse,
        **options,
    )


class _Elements(Dataset):
    """Of a map-style dataset, which may read images itself: a bad one is told, not raised."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return read_or_tell(self.dataset, index, mapper=None)


class _Reader:
    """A class, since worker processes may have to be sent it."""

    def __init__(self, mapper: Callable | None):
        self.mapper = mapper

    def __call__(self, element) -> Read | None:
        mapped = element
        if self.mapper is not None and not isinstance(element, BadImage):
            mapped = map_or_tell(self.mapper, element)
        if isinstance(mapped, BadImage):
            return Read(None, [mapped])
        return None if mapped is None else Read(mapped, [])


def _aspect_ratio(image: dict) -> float:
    """Width / height; 0 for images whose size the dataset does not say."""
    return image.get("width", 0) / image.get("height", 1)
