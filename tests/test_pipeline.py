"""Many images in a row: order, batches, bad files, memory, and threads that end."""

import itertools
import logging
import threading
import time

import numpy as np
import pytest
from PIL import Image

from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.filtering import Filter
from msrcnn_d2_runtime.image_reading import ImageSettings
from msrcnn_d2_runtime.inputs import Source
from msrcnn_d2_runtime.pipeline import predict_all, write_behind
from msrcnn_d2_runtime.predictions import CroppedMasks, Predictions


class Brightness:
    """A predictor whose only object is the whole image, with its brightness as the score."""

    class_names = ("image",)
    rank_by = "score"

    def __init__(self, image_settings=None):
        self.image_settings = image_settings or ImageSettings()
        self.batches = []

    def predictions(self, images):
        self.batches.append(len(images))
        if any(image.shape[0] == 1 for image in images):
            raise ValueError("this is too small")
        return [self.one(image) for image in images]

    def one(self, image):
        height, width = image.shape[:2]
        return Predictions(
            pred_boxes=np.float32([[0, 0, width, height]]),
            pred_classes=np.zeros(1, dtype=np.int64),
            masks=CroppedMasks([(0, 0, np.ones((height, width), bool))], (height, width)),
            scores={"scores": np.float32([image[0, 0, 0] / 255])},
            ranking="scores",
        )


@pytest.fixture
def folder(tmp_path):
    """Images 0.png to 6.png, of which the blue channel says which."""
    for k in range(7):
        Image.new("RGB", (6, 4), (0, 100, 10 * k)).save(tmp_path / f"{k}.png")
    return tmp_path


@pytest.fixture(autouse=True)
def all_threads_end():
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, "a thread goes on"
        time.sleep(0.01)


@pytest.mark.parametrize("batch_size, batches", [(1, [1] * 7), (3, [3, 3, 1]), (50, [7])])
@pytest.mark.parametrize("num_readers", [1, 4])
def test_images_in_order_and_in_batches(folder, batch_size, batches, num_readers):
    predictor = Brightness()
    found = [*predict_all(predictor, folder, batch_size=batch_size, num_readers=num_readers)]
    assert [x.name for x in found] == [f"{k}.png" for k in range(7)]
    assert [x.source for x in found] == [str(folder / x.name) for x in found]
    assert [x.image[0, 0].tolist() for x in found] == [[0, 100, 10 * k] for k in range(7)]
    scores = [x.predictions.scores[0] for x in found]
    assert scores == pytest.approx([10 * k / 255 for k in range(7)])
    assert predictor.batches == batches


def test_filter_and_images_that_are_done(folder):
    wanted = Filter(min_score=25 / 255)
    found = [*predict_all(Brightness(), [folder], filter=wanted, skip={"2.png", "4.png"})]
    assert [(x.name, len(x.predictions)) for x in found] == [
        *[("0.png", 0), ("1.png", 0), ("3.png", 1), ("5.png", 1), ("6.png", 1)]
    ]
    with pytest.raises(UserError, match="no class"):
        predict_all(Brightness(), folder, filter=Filter(classes=["cat"]))


def test_images_in_memory(folder):
    first = np.full((2, 3, 3), 51, np.uint8)
    images = [first, Image.open(folder / "1.png"), str(folder / "2.png")]
    found = [*predict_all(Brightness(), images[:2])]
    assert [x.name for x in found] == ["000000", "000001"]
    assert found[0].predictions.scores[0] == pytest.approx(0.2)
    assert found[1].predictions.scores[0] == pytest.approx(10 / 255)
    assert [*predict_all(Brightness(), [])] == []
    failed = []
    wrong = np.zeros((2, 3, 3))
    found = predict_all(
        Brightness(), [first, wrong, first], on_error=lambda place, _: failed.append(place)
    )
    assert [x.name for x in found] == ["000000", "000002"]
    assert len(failed) == 1 and "000001" in failed[0]
    with pytest.raises(TypeError, match="not both"):
        predict_all(Brightness(), images[::-1])
    with pytest.raises(TypeError, match="in a list"):
        predict_all(Brightness(), first)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bad_images(folder, batch_size, caplog):
    (folder / "1.png").write_bytes(b"nonsense")
    (folder / "4.png").write_bytes((folder / "5.png").read_bytes()[:40])
    Image.new("RGB", (5, 1)).save(folder / "6.png")  # which the predictor refuses
    failed = []
    found = predict_all(
        Brightness(),
        folder,
        batch_size=batch_size,
        on_error=lambda place, error: failed.append((place, str(error))),
    )
    good = ["0.png", "2.png", "3.png", "5.png"]
    assert [x.name for x in found] == good
    assert [place for place, _ in failed] == [str(folder / f"{k}.png") for k in (1, 4, 6)]
    assert "too small" in failed[2][1]

    caplog.set_level(logging.WARNING)
    found = predict_all(Brightness(), folder, batch_size=batch_size, on_error="skip")
    assert [x.name for x in found] == good
    assert len(caplog.records) == 3
    with pytest.raises(UserError, match="1.png"):
        [*predict_all(Brightness(), folder, batch_size=batch_size)]


def test_images_are_read_as_the_predictor_says(tmp_path):
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "deep.tif")
    settings = ImageSettings(intensity_range=(0, 2000))
    (found,) = predict_all(Brightness(settings), tmp_path)
    assert np.array_equal(found.image, np.full((4, 4, 3), 128))


def test_only_a_few_images_are_in_memory():
    """However many there are: a generator is asked for the next ones when they are needed."""
    made = itertools.count()
    images = (np.full((4, 6, 3), k % 256, np.uint8) for k in made)
    found = predict_all(Brightness(), images, batch_size=2, num_readers=2)
    for k, image in enumerate(itertools.islice(found, 100)):
        assert image.image[0, 0, 0] == k % 256
    found.close()
    assert next(made) < 100 + 12


class Frames(Source):
    """As a video: many images, the last of which cannot be read."""

    name = location = "video.mp4"

    def images(self, settings):
        for k in range(3):
            yield f"video.mp4/{k}", lambda k=k: np.full((4, 6, 3), k, np.uint8)
        raise OSError("the file ends")


def test_a_source_with_many_images():
    failed = []
    found = predict_all(
        Brightness(),
        [Frames()],
        batch_size=2,
        skip={"video.mp4/1"},
        on_error=lambda *what: failed.append(what),
    )
    assert [(x.name, x.image[0, 0, 0]) for x in found] == [("video.mp4/0", 0), ("video.mp4/2", 2)]
    assert [place for place, _ in failed] == ["video.mp4"]


def test_errors_of_the_code_that_makes_images():
    def images():
        yield np.zeros((4, 4, 3), np.uint8)
        raise KeyError("mine")

    found = predict_all(Brightness(), images(), on_error="skip")
    next(found)
    with pytest.raises(KeyError, match="mine"):
        next(found)


def test_too_little_memory(folder, monkeypatch):
    class OutOfMemoryError(RuntimeError):
        pass

    def fail(self, images):
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(Brightness, "predictions", fail)
    with pytest.raises(UserError, match="lower the batch size"):
        [*predict_all(Brightness(), folder, batch_size=2, on_error="skip")]


def test_writing_behind():
    """While an image is written, the next ones are made; all are written at the end."""
    written, may_write = [], threading.Event()

    def write(image):
        may_write.wait()
        written.append(image)

    images = write_behind(iter(range(5)), write)
    assert next(images) == 0 and next(images) == 1 and written == []
    may_write.set()
    assert [*images] == [2, 3, 4]
    assert written == [0, 1, 2, 3, 4]


def test_what_is_made_is_written_also_after_an_interruption():
    written = []

    def images():
        yield from range(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for _ in write_behind(images(), written.append):
            pass
    assert written == [0, 1, 2]


def test_an_error_of_the_writer_ends_the_work():
    made = itertools.count()

    def write(image):
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="full"):
        for _ in write_behind(made, write):
            time.sleep(0.001)
    assert next(made) < 1000
