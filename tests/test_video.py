"""Videos: which frames are read, what is written, also after interruptions, and tracking."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from msrcnn_d2_cli import predict as command
from msrcnn_d2_runtime import video as video_module
from msrcnn_d2_runtime.errors import UserError
from msrcnn_d2_runtime.image_reading import ImageSettings
from msrcnn_d2_runtime.inputs import find_inputs
from msrcnn_d2_runtime.predictions import CroppedMasks, Predictions
from msrcnn_d2_runtime.tracking import VideoTracker
from msrcnn_d2_runtime.video import VideoSource, VideoWriter
from tests.helpers.command import exit_code

HEIGHT, WIDTH, FRAMES, FPS = 96, 160, 8, 10
SQUARE = 24


def draw_frame(number):
    """A white square goes to the right, and another one to the left. BGR."""
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    frame[10 : 10 + SQUARE, 8 + 4 * number :][:, :SQUARE] = 255
    frame[60 : 60 + SQUARE, 120 - 4 * number :][:, :SQUARE] = 255
    return frame


@pytest.fixture
def clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter("clip.mp4", code, FPS, (WIDTH, HEIGHT))
    for number in range(FRAMES):
        writer.write(draw_frame(number))
    writer.release()
    return tmp_path / "clip.mp4"


class Squares:
    """A predictor that finds bright squares."""

    class_names = ("square",)
    rank_by = "mask_score"
    image_settings = ImageSettings()

    def predictions(self, images):
        return [self.one(image) for image in images]

    def one(self, image):
        count, labels = cv2.connectedComponents((image[:, :, 0] > 128).astype(np.uint8))
        masks = CroppedMasks.of(labels == np.arange(1, count)[:, None, None])
        corners = [(x, y, x + m.shape[1], y + m.shape[0]) for y, x, m in masks.crops]
        scores = np.full(count - 1, 0.9, np.float32)
        return Predictions(
            pred_boxes=np.array(corners, np.float32).reshape(-1, 4),
            pred_classes=np.zeros(count - 1, np.int64),
            masks=masks,
            scores={"scores": scores, "mask_scores": scores / 2},
            ranking="mask_scores",
        )


@pytest.fixture
def predict(clip, monkeypatch):
    monkeypatch.setattr(command, "predictor_from", lambda *_, **__: Squares())
    return lambda *args: exit_code("predict", *args, "--model", "demo")


def frames_of(path) -> list[np.ndarray]:
    video = cv2.VideoCapture(str(path))
    frames = [frame for _, frame in iter(video.read, (False, None))]
    return frames


def names_in(folder) -> list[str]:
    lines = Path(folder, "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["image"] for line in lines]


@pytest.mark.parametrize("stride, numbers", [(1, range(8)), (3, [0, 3, 6])])
def test_frames(clip, stride, numbers):
    (source,) = find_inputs([clip], stride=stride).sources
    read = [(name, reader()) for name, reader in source.images(ImageSettings())]
    assert [name for name, _ in read] == [f"clip.mp4/{k:06d}" for k in numbers]
    assert source.num_images == len(numbers) and source.fps == FPS / stride
    for k, (_, frame) in zip(numbers, read):  # the video is compressed
        assert np.abs(frame.astype(int) - draw_frame(k)).mean() < 3, k


def test_what_is_no_video(clip, predict):
    Path("clip2.avi").write_bytes(b"no video")
    with pytest.raises(UserError, match="clip2"):
        list(VideoSource("clip2.avi", "clip2.avi").images(ImageSettings()))
    assert predict("clip2.avi", "clip.mp4") == 1
    assert len(names_in("predictions")) == FRAMES  # the other one is done


@pytest.fixture
def matroska(tmp_path):
    """A video of 40 frames, 100 ms each, of which a part can be read, too."""
    code = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(tmp_path / "clip.mkv"), code, FPS, (WIDTH, HEIGHT))
    for number in range(40):
        writer.write(draw_frame(number % FRAMES))
    writer.release()
    return tmp_path / "clip.mkv"


def frames_in(path):
    return sum(1 for _ in VideoSource(path.name, str(path)).images(ImageSettings()))


def test_a_video_that_ends_too_early_is_damaged(matroska):
    assert frames_in(matroska) == 40
    data = matroska.read_bytes()
    matroska.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="of 40 frames"):
        frames_in(matroska)


def test_a_video_with_fewer_frames_than_its_rate_says_is_whole(matroska):
    """As a recording of a screen, of which a frame is stored when something moves."""
    of_a_frame = [(0x23E383840000_0000 + x).to_bytes(8, "big") for x in (100_000_000, 10_000_000)]
    data = matroska.read_bytes()
    assert data.count(of_a_frame[0]) == 1
    matroska.write_bytes(data.replace(*of_a_frame))
    assert VideoSource("clip.mkv", str(matroska)).num_images == 400
    assert frames_in(matroska) == 40


def test_a_url_of_a_video_is_to_be_downloaded():
    with pytest.raises(UserError, match="download"):
        find_inputs(["http://localhost/clip.mp4"])


@pytest.mark.parametrize("odd", [0, 1])
def test_the_fallback_to_opencv_is_said(tmp_path, monkeypatch, caplog, capfd, odd):
    monkeypatch.setitem(sys.modules, "av", None)
    video_module._say_that_browsers_play_none.cache_clear()
    writer = VideoWriter(str(tmp_path / "a" / "x.mp4"), FPS)
    for number in range(3):
        assert not (tmp_path / "a" / "x.mp4").exists()
        writer.add(draw_frame(number)[odd:, odd:])
    writer.close()
    assert [x.name for x in (tmp_path / "a").iterdir()] == ["x.mp4"]
    frames = frames_of(tmp_path / "a" / "x.mp4")
    assert [x.shape for x in frames] == [(HEIGHT, WIDTH, 3)] * 3
    writer = VideoWriter(str(tmp_path / "y.mp4"), FPS)
    writer.add(draw_frame(0))
    writer.abandon()
    assert not list(tmp_path.glob("y*"))
    assert len(caplog.records) == 1 and "pip install av" in caplog.text  # for both videos
    assert "ERROR" not in capfd.readouterr().err  # OpenCV would say which codecs it lacks


def test_of_an_interrupted_end_nothing_is_left(tmp_path, monkeypatch):
    writer = VideoWriter(str(tmp_path / "clip.mp4"), FPS)
    writer.add(draw_frame(0))
    end = writer._encoder.close

    def interrupted():
        end()
        raise KeyboardInterrupt

    monkeypatch.setattr(writer._encoder, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_h264_with_pyav(tmp_path):
    av = pytest.importorskip("av")
    writer = VideoWriter(str(tmp_path / "x.mp4"), 29.97)
    for number in range(5):
        writer.add(draw_frame(number))
    writer.close()
    with av.open(str(tmp_path / "x.mp4")) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == pytest.approx(29.97, abs=0.01)
        assert sum(1 for _ in file.decode(video=0)) == 5


@pytest.mark.parametrize("moment", ["interrupted", "killed"])
def test_an_annotated_video_also_after_an_interruption(predict, monkeypatch, moment):
    assert predict("clip.mp4", "--output", "whole", "--stride", 2) == 0
    expected = frames_of("whole/pictures/clip.mp4")
    assert len(expected) == 4 and not list(Path("whole/pictures").rglob("*.png"))
    assert names_in("whole") == [f"clip.mp4/{k:06d}" for k in range(0, FRAMES, 2)]

    calls = itertools.count()

    def stop(self, images):
        if next(calls) == 2:
            raise KeyboardInterrupt if moment == "interrupted" else SystemError
        return [self.one(image) for image in images]

    part = ("clip.mp4", "--output", "part", "--stride", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Squares, "predictions", stop)
        if moment == "interrupted":
            assert predict(*part) == 130
            assert len(frames_of("part/pictures/clip.mp4")) == 2  # whole, as far as it goes
        else:
            with pytest.raises(SystemError):
                predict(*part)
            assert not list(Path("part/pictures").iterdir())
    assert predict(*part, "--resume") == 0
    found = frames_of("part/pictures/clip.mp4")
    assert len(found) == 4 and all(map(np.array_equal, found, expected))
    assert predict(*part[:3], "--resume", "--stride", 4) == 2  # another run


def test_videos_do_not_overwrite_each_other(predict):
    names = ["clip.avi", "clip.avi.mp4", "clip.avi.mp4.mp4"]
    for name in names:
        shutil.copy("clip.mp4", name)
    assert predict(*names) == 0
    found = sorted(Path("predictions/pictures").iterdir())
    assert [len(frames_of(path)) for path in found] == [FRAMES] * 3


def test_a_video_that_cannot_be_completed_keeps_no_other_file_from_being_written(
    predict, monkeypatch
):
    def fail(self):
        raise UserError("no")

    monkeypatch.setattr(VideoWriter, "close", fail)
    assert predict("clip.mp4", "--save", "pictures,csv,coco") == 2
    assert Path("predictions/predictions.csv").is_file()
    assert Path("predictions/coco_instances_results.json").is_file()


def tracked(folder) -> list[list[int]]:
    lines = Path(folder, "predictions.jsonl").read_text().splitlines()
    return [[x["track_id"] for x in json.loads(line)["predictions"]] for line in lines]


def test_objects_keep_their_numbers(predict, monkeypatch):
    pytest.importorskip("trackers")
    # In every second frame the predictions are in the other order
    turns = itertools.cycle([1, -1])
    monkeypatch.setattr(
        Squares, "predictions", lambda self, images: [self.one(images[0])[:: next(turns)]]
    )
    assert predict("clip.mp4", "--track", "--output", "whole") == 0
    ids = tracked("whole")
    # An object is followed from the second frame on in which it is seen
    assert ids[1][0] != ids[1][1] and min(ids[1]) >= 0
    assert ids[1:] == [ids[1][:: (-1) ** (k - 1)] for k in range(1, FRAMES)]

    # After a kill the numbers go on
    Path("part").mkdir()
    lines = Path("whole/predictions.jsonl").read_bytes().splitlines(keepends=True)
    Path("part/predictions.jsonl").write_bytes(b"".join(lines[:4]))
    Path("part/run.json").write_bytes(Path("whole/run.json").read_bytes())
    assert predict("clip.mp4", "--track", "--output", "part", "--resume") == 0
    assert Path("part/predictions.jsonl").read_bytes() == b"".join(lines)


def test_tracking_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(UserError, match="pip install trackers"):
        VideoTracker([])


def test_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="opencv"):
        video_module._opencv()
