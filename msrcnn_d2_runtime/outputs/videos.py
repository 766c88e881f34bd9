"""Videos with their predictions drawn on them."""

import os
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from ..image_reading import ImageSettings
from ..predictions import PredictedImage, Predictions
from ..video import VideoSource, VideoWriter

if TYPE_CHECKING:
    from ..drawing import LabelStyle

__all__ = ["AnnotatedVideos"]


class AnnotatedVideos:
    """
    Writes an MP4 file for each video, frame by frame as they are predicted. A video of which an
    earlier run has predicted some frames is drawn anew in the end.
    """

    def __init__(
        self,
        folder: str,
        videos: Sequence[VideoSource],
        class_names: Sequence[str],
        labels: "LabelStyle",
        done: Collection[str],
    ):
        """
        Args:
            folder: to write to.
            labels: as in :func:`~msrcnn_d2_runtime.drawing.draw_predictions`.
            done: names of the frames that an earlier run has predicted.
        """
        self._folder, self._class_names, self._labels = folder, class_names, labels
        self._videos = {video.name: video for video in videos}
        self._begun_before = {x.rpartition("/")[0] for x in done} & {*self._videos}
        self._anew = {x for x in self._begun_before if not os.path.exists(self._path(x))}
        self._current: tuple[str, VideoWriter] | None = None

    def video_of(self, name: str) -> VideoSource | None:
        """The video that the frame of this name is of; None if it is an image of its own."""
        return self._videos.get(name.rpartition("/")[0])

    def write(self, frame: PredictedImage) -> None:
        """
        Args:
            frame: of a video. Its frames come in their order, and all before those of another one.
        """
        video = self.video_of(frame.name)
        assert video is not None, frame.name
        if video.name in self._begun_before:
            self._anew.add(video.name)
            return
        if self._current is None or self._current[0] != video.name:
            self._end_current()
            self._current = video.name, VideoWriter(self._path(video.name), video.fps)
        self._draw(self._current[1], frame)

    def finish(self, done: Collection[str], predictions_of: Callable[[str], Predictions]) -> None:
        """
        Complete all files.

        Args:
            done: names of the frames that are predicted.
            predictions_of: from the name of one of them to its predictions.
        """
        self._end_current()
        for name in sorted(self._anew):
            video = self._videos[name]
            writer = VideoWriter(self._path(name), video.fps)
            try:
                for frame_name, read in video.images(ImageSettings()):
                    if frame_name in done:
                        image = read()[:, :, ::-1]
                        found = predictions_of(frame_name)
                        self._draw(writer, PredictedImage(frame_name, "", image, found))
            except BaseException:
                writer.abandon()
                raise
            writer.close()
        self._anew.clear()

    def abandon(self) -> None:
        """Remove what is written of the present video."""
        if self._current is not None:
            self._current[1].abandon()
            self._current = None

    def _end_current(self) -> None:
        if self._current is not None:
            self._current[1].close()
            self._current = None

    def _draw(self, writer: VideoWriter, frame: PredictedImage) -> None:
        from ..drawing import draw_predictions  # needs OpenCV, unlike other outputs

        writer.add(
            draw_predictions(frame.image, frame.predictions, self._class_names, labels=self._labels)
        )

    def _path(self, name: str) -> str:
        if not name.lower().endswith(".mp4"):
            name += ".mp4"
            while name in self._videos:  # such as "clip.avi.mp4" beside "clip.avi"
                name += ".mp4"
        return os.path.join(self._folder, name)
