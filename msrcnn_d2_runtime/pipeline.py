"""Predict any number of images: they are read ahead while the model works, and written behind."""

import logging
import os
import queue
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .errors import UserError
from .filtering import Filter
from .image_reading import ImageLike, ImageSettings
from .inputs import ImageInMemory, find_inputs
from .predictions import PredictedImage, Predictions
from .predictor import Predictor
from .sources import Source, printable
from .text import listed, plural

__all__ = ["Inputs", "predict_all", "write_behind"]

logger = logging.getLogger(__name__)

Inputs = str | os.PathLike | Iterable[str | os.PathLike | Source | ImageLike]
# What is done about an image that cannot be used: its file or URL, and what is wrong with it
OnError = Callable[[str, Exception], None]

MAX_READERS = 4
NUM_BEHIND = 2  # images that wait for being written
POLL = 0.2  # seconds until a waiting thread looks whether it should stop
END: Any = object()


def predict_all(
    predictor: Predictor,
    inputs: Inputs,
    *,
    batch_size: int = 1,
    filter: Filter | None = None,
    skip: Collection[str] = (),
    on_error: str | OnError = "raise",
    num_readers: int | None = None,
) -> Generator[PredictedImage, None, None]:
    """
    Predict images one after the other. Only a few are in memory at a time, however many there are.

    Args:
        inputs: a file, folder, pattern or URL as in :func:`find_inputs`; several of these; or
            images in memory, PIL images or uint8 arrays (H, W, 3) in BGR order, also from a
            generator. Names of images in memory are their numbers: "000000", "000001", ...
        batch_size: how many images the model sees at once, if it can.
        filter: which predictions are kept, besides the threshold of the predictor.
        skip: names of images that are left out.
        on_error: what is done about an image that cannot be read: "raise"; "skip" and log a
            warning; or a function that is called with the file or URL and the error.
        num_readers: how many threads read images; by default one for each core but one, 1 to 4.

    Yields:
        images with their predictions, in the order of the inputs.

    Raises:
        UserError: an input does not exist; an image cannot be read and `on_error` is "raise"; the
            model has none of the classes or scores of the filter; the GPU has too little memory.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, not {batch_size}.")
    if on_error not in ("raise", "skip") and not callable(on_error):
        raise ValueError(f'on_error is "raise", "skip" or a function, not {on_error!r}.')
    filter = filter or Filter()
    filter.class_indices(predictor.class_names)  # before minutes of work
    sources = _sources(inputs)
    if num_readers is None:
        num_readers = min(max((os.cpu_count() or 1) - 1, 1), MAX_READERS)
    return _predicted(predictor, sources, batch_size, filter, skip, on_error, num_readers)


def _sources(inputs: Inputs) -> Iterable[Source]:
    if isinstance(inputs, (str, os.PathLike)):
        return find_inputs([inputs]).sources
    if isinstance(inputs, np.ndarray) or not isinstance(inputs, Iterable):
        raise TypeError(
            "Inputs are paths or several images: give a single image in a list, not as a "
            f"{type(inputs).__name__}."
        )
    items = iter(inputs)
    first = next(items, END)
    if first is END:
        return []
    if isinstance(first, (str, os.PathLike)):  # names depend on all paths
        paths: list[Any] = [first, *items]
        if not all(isinstance(x, (str, os.PathLike)) for x in paths):
            raise TypeError("Inputs are paths, or images in memory, but not both.")
        return find_inputs(paths).sources
    return _in_memory(first, items)


def _in_memory(first: Any, others: Iterator[Any]) -> Iterator[Source]:
    """Images that a generator may make one by one."""
    number = 0
    while first is not END:
        yield first if isinstance(first, Source) else ImageInMemory(f"{number:06d}", first)
        number += 1
        first = next(others, END)


def _predicted(
    predictor: Predictor,
    sources: Iterable[Source],
    batch_size: int,
    filter: Filter,
    skip: Collection[str],
    on_error: str | OnError,
    num_readers: int,
) -> Generator[PredictedImage, None, None]:
    """What :func:`predict_all` yields, when its arguments are checked."""

    def fail(location: str, error: Exception) -> None:
        if callable(on_error):
            on_error(location, error)
        elif on_error == "raise":
            raise error
        else:
            logger.warning("'%s' is skipped: %s", location, error)

    def predict(batch: list[tuple[str, str, np.ndarray]]) -> Iterator[PredictedImage]:
        found = _predictions(predictor, batch, fail)
        for (name, location, image), predictions in zip(batch, found):
            if predictions is not None:
                kept = filter(predictions, predictor.class_names)
                yield PredictedImage(name, location, image[:, :, ::-1], kept)

    batch = []
    images = _read_ahead(sources, predictor.image_settings, skip, num_readers, batch_size)
    try:
        for name, location, reading in images:
            try:
                batch.append((name, location, reading.result()))
            except Exception as error:  # whatever a damaged file makes a decoder raise
                fail(location, error)
            if len(batch) == batch_size:
                yield from predict(batch)
                batch = []
        if batch:
            yield from predict(batch)
    finally:
        images.close()


def _predictions(
    predictor: Predictor, batch: list[tuple[str, str, np.ndarray]], fail: OnError
) -> list[Predictions | None]:
    """Those of each image, or None for one that the predictor refuses, such as a tiny one."""
    try:
        return [*predictor.predictions([image for _, _, image in batch])]
    except (UserError, ValueError) as error:
        if len(batch) > 1:  # which of them is it?
            return [x for one in batch for x in _predictions(predictor, [one], fail)]
        fail(batch[0][1], error)
        return [None]
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which may not be installed
            raise
        sizes = listed([f"{x.shape[1]} x {x.shape[0]}" for _, _, x in batch])
        raise UserError(
            f"The GPU has too little memory for {plural(len(batch), 'image')} at once ({sizes} "
            "pixels): lower the batch size, or use the CPU."
        ) from error


def _read_ahead(
    sources: Iterable[Source],
    settings: ImageSettings,
    skip: Collection[str],
    num_readers: int,
    batch_size: int,
) -> Generator[tuple[str, str, Future], None, None]:
    """
    Read images in threads, while the one before is used.

    Yields:
        name, location and image, in order.
    """
    # As many as the model takes next, so that memory does not depend on the number of images
    ahead: queue.Queue = queue.Queue(batch_size + num_readers - 1)
    stopped = threading.Event()
    failed: list[BaseException] = []

    def put(name: Any, location: str, reading: Future) -> None:
        while not stopped.is_set():
            try:
                return ahead.put((name, location, reading), timeout=POLL)
            except queue.Full:
                continue

    def feed() -> None:
        try:
            for source in sources:
                location = printable(source.location)
                try:
                    for name, read in source.images(settings):
                        if stopped.is_set():
                            return
                        if name not in skip:
                            put(name, location, readers.submit(read))
                except Exception as error:  # a video that cannot be opened, or that ends badly
                    reading: Future = Future()
                    reading.set_exception(error)
                    put(source.name, location, reading)
        except BaseException as error:  # the code that makes the images
            failed.append(error)
        finally:
            put(END, "", Future())

    with ThreadPoolExecutor(num_readers, "reader") as readers:
        feeder = threading.Thread(target=feed, name="feeder", daemon=True)
        feeder.start()
        try:
            while (item := ahead.get())[0] is not END:
                yield item
        finally:
            stopped.set()
            feeder.join()
            readers.shutdown(wait=False, cancel_futures=True)
    if failed:
        raise failed[0]


def write_behind(
    images: Iterable[PredictedImage], write: Callable[[PredictedImage], None]
) -> Generator[PredictedImage, None, None]:
    """
    Write images in a thread, while the next ones are predicted.

    Yields:
        each image, when it is going to be written. All are written when the iteration ends.

    Raises:
        Exception: whatever `write` raises.
    """
    waiting: queue.Queue = queue.Queue(NUM_BEHIND)
    failed: list[BaseException] = []

    def work() -> None:
        while (image := waiting.get()) is not END:
            if not failed:  # else the queue is only emptied
                try:
                    write(image)
                except BaseException as error:
                    failed.append(error)

    writer = threading.Thread(target=work, name="writer")
    writer.start()
    try:
        for image in images:
            waiting.put(image)
            if failed:
                break
            yield image
    finally:
        waiting.put(END)
        writer.join()
    if failed:
        raise failed[0]
