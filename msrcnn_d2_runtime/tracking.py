"""Follow objects through the frames of a video."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .errors import UserError
from .predictions import TRACK_IDS, PredictedImage, Predictions
from .video import VideoSource

__all__ = ["VideoTracker"]

SECONDS_LOST = 1.0  # how long an object may be hidden
UNTRACKED = -1


class VideoTracker:
    """
    Gives the same object the same number in all frames of a video, by ByteTrack (Zhang et al., ECCV
    2022) of Roboflow's package `trackers`. It goes by boxes and class scores.
    """

    def __init__(
        self, videos: Sequence[VideoSource], earlier: Iterable[tuple[str, Predictions]] = ()
    ):
        """
        Args:
            videos: whose frames will come. Other images get no numbers.
            earlier: names and predictions of frames that were tracked before, in order. The next
                frames continue with their numbers.

        Raises:
            UserError: the package is not installed.
        """
        self._videos = {video.name: video for video in videos}
        self._trackers: dict[str, Any] = {}
        self._new_tracker(1.0)  # tells now whether it is installed
        for name, predictions in earlier:
            self._ids(name, predictions)

    def __call__(self, image: PredictedImage) -> PredictedImage:
        """
        Args:
            image: frames of a video have to come in order.

        Returns:
            the image. The predictions of a frame have "track_ids" (N,), the numbers of their
            objects from 0 on, and -1 for those that are not followed: those with a low class score,
            and all when they are seen for the first time.
        """
        ids = self._ids(image.name, image.predictions)
        if ids is None:
            return image
        scores = image.predictions.scores_by_name | {TRACK_IDS: ids}
        return dataclasses.replace(image, predictions=image.predictions.replaced(scores=scores))

    def _ids(self, name: str, predictions: Predictions) -> np.ndarray | None:
        video = self._videos.get(name.rpartition("/")[0])
        if video is None:
            return None
        tracker = self._trackers.get(video.name)
        if tracker is None:
            tracker = self._trackers[video.name] = self._new_tracker(video.fps)
        from supervision import Detections

        detections = Detections(
            xyxy=predictions.pred_boxes.astype(float),
            confidence=predictions.scores,
            data={"place": np.arange(len(predictions))},  # the tracker changes the order
        )
        tracked = tracker.update(detections)
        ids = np.full(len(predictions), UNTRACKED)
        if len(tracked):
            ids[tracked.data["place"]] = tracked.tracker_id
        return ids

    def _new_tracker(self, fps: float) -> Any:
        try:
            from trackers import ByteTrackTracker
        except ModuleNotFoundError as error:
            if error.name != "trackers":
                raise
            raise UserError(
                "Tracking needs the package trackers: run `pip install trackers`."
            ) from None
        return ByteTrackTracker(
            frame_rate=fps,
            lost_track_buffer=max(1, round(30 * SECONDS_LOST)),  # in frames of 30 per second
            minimum_consecutive_frames=1,
        )
