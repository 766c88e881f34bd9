"""Read the frames of a video, and write a video that browsers play."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .errors import UserError
from .files import INCOMPLETE
from .image_reading import ImageSettings
from .sources import Reader, Source, printable

__all__ = ["VIDEO_SUFFIXES", "VideoSource", "VideoWriter"]

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .webm .wmv".split())
DEFAULT_FPS = 25.0  # of files that do not say it
# Of the frames that a file announces, how many there have to be. Some formats announce an estimate
MIN_SHARE = 0.9
# H.264: nothing to be seen of the compression, at a speed that keeps up with a model
QUALITY = {"crf": "20", "preset": "veryfast"}


@dataclass
class VideoSource(Source):
    """
    A video. Its frames are named by their numbers, such as "clip.mp4/000012".

    Attributes:
        stride: every so many frames are read, from the first on.
    """

    name: str
    location: str
    stride: int = 1

    @functools.cached_property
    def _announced(self) -> tuple[float, int]:
        """Frames per second and number of frames, as the file says; (25, 0) if it does not."""
        cv2 = _opencv()
        video = cv2.VideoCapture(self.location)
        fps, count = video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_FRAME_COUNT)
        video.release()
        return fps if 0 < fps < 1000 else DEFAULT_FPS, max(0, int(count))

    @property
    def fps(self) -> float:
        """Of the frames that are read."""
        return self._announced[0] / self.stride

    @property
    def num_images(self) -> int:
        """How many frames will be read; an estimate for some formats."""
        return max(1, -(-self._announced[1] // self.stride))

    def images(self, settings: ImageSettings) -> Iterator[tuple[str, Reader]]:
        """
        As in the base class. Frames are turned as the file says.

        Raises:
            UserError: it cannot be opened, or ends too early.
        """
        place = printable(self.location)
        cv2 = _opencv()
        video = cv2.VideoCapture(self.location)
        try:
            number, seconds = 0, 0.0
            while video.grab():
                seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if number % self.stride == 0:
                    is_read, frame = video.retrieve()
                    if not is_read:
                        break
                    # Not a copy: the next frame comes into another array
                    yield self.frame_name(number), frame.view
                number += 1
        finally:
            video.release()
        if not number:
            raise UserError(f"'{place}' is not a video that can be read.")
        # Recordings of a screen may have few frames, for which the file announces the highest rate
        fps, announced = self._announced
        if MIN_SHARE * (seconds * fps + 1) <= number < MIN_SHARE * announced:
            raise UserError(
                f"Video '{place}' ends after {number:,} of {announced:,} frames: it is damaged."
            )

    def frame_name(self, number: int) -> str:
        return f"{self.name}/{number:06d}"


class VideoWriter:
    """
    Writes an MP4 file, which gets its name when it is complete: in H.264, which all browsers play,
    if PyAV is installed (`pip install av`), else as OpenCV can.
    """

    def __init__(self, path: str, fps: float):
        """
        Args:
            path: with ".mp4" at the end.
            fps: frames per second.
        """
        self._path, self._fps = path, fps
        self._incomplete = f"{path}{INCOMPLETE}.mp4"  # FFmpeg goes by the suffix
        self._encoder: Any = None

    def add(self, frame: np.ndarray) -> None:
        """
        Args:
            frame: uint8 (H, W, 3), RGB; all of one size.
        """
        height, width = frame.shape[:2]
        if height % 2 or width % 2:  # H.264 has colours of 2 x 2 pixels
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._encoder is None:
            os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
            self._encoder = _encoder(self._incomplete, self._fps, *frame.shape[1::-1])
        self._encoder.add(frame)

    def close(self) -> None:
        """Give the file its name. Without frames there is none."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None
            os.replace(self._incomplete, self._path)

    def abandon(self) -> None:
        """Remove what has been written, also if :meth:`close` was interrupted."""
        if self._encoder is not None:
            self._encoder = None  # not closed: it cannot complete a file twice
            with contextlib.suppress(FileNotFoundError):  # PyAV makes it with its first packet
                os.remove(self._incomplete)


class _H264:
    def __init__(self, path: str, fps: float, width: int, height: int):
        import av

        self._file = av.open(path, "w", options={"movflags": "faststart"})
        rate = Fraction(fps).limit_denominator(1001)
        self._stream = self._file.add_stream("libx264", rate=rate, options=QUALITY)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        self._frame_of = av.VideoFrame.from_ndarray

    def add(self, frame: np.ndarray) -> None:
        frame = self._frame_of(np.ascontiguousarray(frame), format="rgb24")
        self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._file.mux(self._stream.encode(None))
        self._file.close()


class _OpenCV:
    def __init__(self, path: str, fps: float, width: int, height: int):
        cv2 = _opencv()
        for code in ("avc1", "mp4v"):
            fourcc = cv2.VideoWriter_fourcc(*code)
            self._writer = cv2.VideoWriter(path, fourcc, fps, (width, height))
            if self._writer.isOpened():
                break
        if not self._writer.isOpened():
            raise UserError("OpenCV cannot write videos here: run `pip install av`.")
        if code != "avc1":
            _say_that_browsers_play_none()

    def add(self, frame: np.ndarray) -> None:
        self._writer.write(np.ascontiguousarray(frame[:, :, ::-1]))

    def close(self) -> None:
        self._writer.release()


@functools.cache
def _say_that_browsers_play_none() -> None:
    """Once, and not for each video."""
    logger.warning(
        "Videos are in MPEG-4 Part 2, which browsers do not play: for H.264, run `pip install av`."
    )


def _opencv() -> Any:
    """OpenCV, which says nothing about codecs on standard error: errors of ours do."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ModuleNotFoundError as error:
        if error.name != "cv2":
            raise
        raise UserError("Videos need OpenCV: run `pip install opencv-python-headless`.") from None
    if "OPENCV_LOG_LEVEL" not in os.environ:  # it is read by the first import, maybe for pictures
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def _encoder(path: str, fps: float, width: int, height: int) -> _H264 | _OpenCV:
    try:
        return _H264(path, fps, width, height)
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        return _OpenCV(path, fps, width, height)
