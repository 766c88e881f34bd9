"""The folder that a run writes its predictions to."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, Literal

from ..errors import UserError
from ..files import INCOMPLETE, write_whole
from ..predictions import CroppedMasks, PredictedImage, Predictions
from ..text import listed, shown
from ..video import VideoSource
from .coco_dataset import SEGMENTATIONS, write_coco_dataset
from .coco_ids import CocoIds
from .coco_results import write_coco_results
from .csv_table import write_csv
from .journal import Journal
from .pictures import picture_name, write_picture
from .png_masks import write_label_map, write_object_masks
from .records import predictions_of, record_of
from .videos import AnnotatedVideos

__all__ = ["KINDS", "OutputFolder"]

KINDS = {
    "pictures": "pictures/: the images with masks and labels drawn on them, and an MP4 file for "
    "each video",
    "coco": "coco_instances_results.json: COCO results, for evaluations",
    "dataset": "annotations/instances_predictions.json: a COCO dataset, for annotation tools and "
    "training",
    "csv": "predictions.csv: a line for each object, for spreadsheets and pandas",
    "label-maps": "label_maps/: a 16-bit PNG for each image, in which the pixels of its k-th "
    "object are k, and legend.csv",
    "masks": "masks/: a black and white PNG for each object",
    "jsonl": "predictions.jsonl: a line of JSON for each image; it is always written, since "
    "a run resumes from it",
}
RUN = "run.json"
JOURNAL = "predictions.jsonl"
MAX_PASTED = 2**26  # bytes of an image's masks that are kept while its files are written


class OutputFolder:
    """
    Writes the predictions of a run, as a context manager: the files about all images are written
    when it is left without an error. A run may be killed at any time and be resumed, and then ends
    with the same files as if it had not been killed.

    The files of an image are written first, then its line of "predictions.jsonl", which says that
    the image is done. All other files are made from these lines. The names of the images' files
    mirror the names of the images.

    Attributes:
        done: names of the images that are written.
    """

    def __init__(
        self,
        folder: str,
        kinds: Sequence[str],
        *,
        class_names: Sequence[str],
        settings: Mapping[str, Any],
        resume: bool = False,
        labels: Literal["short", "full", "none"] = "short",
        legend: bool = False,
        segmentation: str = "polygons",
        annotations: str | None = None,
        videos: Sequence[VideoSource] = (),
    ):
        """
        Args:
            folder: which is made. It must not exist, or be empty, or be left by a run that ended
                before its first image was done.
            kinds: keys of `KINDS`, what to write.
            class_names: index of a class -> its name.
            settings: what else decides about the predictions, such as the model and the
                thresholds. They have to be the same when the run is resumed; JSON can hold them.
            resume: continue the run in this folder, if there is one. Kinds may be added, but
                pictures only before the first image is done.
            labels, legend: of pictures, as in :func:`~msrcnn_d2_runtime.drawing.draw_predictions`.
            segmentation: of the dataset, "polygons" or "rle".
            annotations: path of a JSON file in COCO's format with the same images and classes,
                whose ids the predictions get, so that they can be evaluated.
            videos: whose frames will come. Videos have no legend.

        Raises:
            UserError: the folder has something else or is in use, the run there had other settings,
                or the annotations cannot be used.
            ModuleNotFoundError: pictures are to be drawn, and OpenCV is not installed.
        """
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"Outputs are {', '.join(KINDS)}; not {listed(unknown)}.")
        if segmentation not in SEGMENTATIONS:
            raise ValueError(f"segmentation is {' or '.join(SEGMENTATIONS)}, not {segmentation}.")
        if "pictures" in kinds:
            from .. import drawing  # noqa: F401  fails now, before any work, without OpenCV
        self.folder = folder
        self.class_names = list(class_names)
        self._labels, self._legend, self._segmentation = labels, legend, segmentation
        self._ids = CocoIds(class_names, annotations)
        run = {
            "class_names": self.class_names,
            "labels": labels,
            "legend": legend,
            "segmentation": segmentation,
            "annotations": annotations,
            "settings": dict(settings),
        }
        earlier = _earlier_run(folder, resume)
        if earlier is not None:
            _refuse_unless_same(folder, earlier, run)

        self._journal = Journal(self._path(JOURNAL))
        try:
            self.done = set(self._journal.names)
            self._videos = AnnotatedVideos(
                self._path("pictures"), videos, self.class_names, labels, self.done
            )
            self._pictures: set[str] = set()
            for name in self._journal.names:
                self._ids.check(name)
                self._pictures.add(picture_name(name, self._pictures))
            kinds_before = earlier["kinds"] if earlier else []
            added = [kind for kind in KINDS if kind in kinds and kind not in kinds_before]
            if self.done and "pictures" in added:
                raise UserError(
                    f"'{folder}' has predictions without pictures, which cannot be added: give a "
                    "new folder."
                )
            for record in self._journal.records() if {"label-maps", "masks"} & {*added} else ():
                self._write_pngs(record, added)
            self.kinds = [kind for kind in KINDS if kind in kinds or kind in kinds_before]
            with write_whole(self._path(RUN)) as f:
                f.write(json.dumps({"kinds": self.kinds} | run, indent=1).encode())
        except BaseException:
            self._journal.close()
            raise

    def write(self, image: PredictedImage) -> None:
        """
        Write the files of an image. The image is done when this returns.

        Raises:
            UserError: the annotations do not have this image.
        """
        path = PurePosixPath(image.name)
        assert path.parts and not path.is_absolute() and ".." not in path.parts, image.name
        assert image.name not in self.done, f"'{image.name}' is written already"
        self._ids.check(image.name)
        if "pictures" in self.kinds:
            image = _pasted_once(image)
        record = record_of(image, self.class_names, self._ids.category_ids)
        picture = picture_name(image.name, self._pictures)
        if "pictures" in self.kinds and self._videos.video_of(image.name):
            self._videos.write(image)
        elif "pictures" in self.kinds:
            to = self._path("pictures", picture)
            write_picture(to, image, self.class_names, self._labels, self._legend)
        self._write_pngs(record, self.kinds)
        self._journal.append(record)
        self.done.add(image.name)
        self._pictures.add(picture)

    def _write_pngs(self, record: dict[str, Any], kinds: Sequence[str]) -> None:
        if "label-maps" in kinds:
            write_label_map(self._path("label_maps", f"{record['image']}.png"), record)
        if "masks" in kinds:
            write_object_masks(self._path("masks", record["image"]), record)

    def predictions(self, name: str) -> Predictions:
        """
        Args:
            name: of an image that is done.
        """
        return predictions_of(self._journal.record(name), self._ids.category_ids)

    def finish(self) -> None:
        """Write the files about all images that are done, and complete videos."""
        records, kinds = self._journal.records, self.kinds
        image_ids = self._ids.image_ids(self._journal.names)
        if "coco" in kinds:
            with write_whole(self._path("coco_instances_results.json")) as f:
                write_coco_results(f, records(), image_ids)
        if "dataset" in kinds:
            os.makedirs(self._path("annotations"), exist_ok=True)
            with write_whole(self._path("annotations", "instances_predictions.json")) as f:
                write_coco_dataset(
                    f,
                    records,
                    image_ids=image_ids,
                    categories=dict(zip(self._ids.category_ids, self.class_names)),
                    segmentation=self._segmentation,
                )
        if "csv" in kinds:
            with write_whole(self._path("predictions.csv")) as f:
                write_csv(f, records)
        if "label-maps" in kinds:
            os.makedirs(self._path("label_maps"), exist_ok=True)  # there may be no images
            with write_whole(self._path("label_maps", "legend.csv")) as f:
                write_csv(f, records)
        if "pictures" in kinds:  # last: it may draw thousands of frames, and needs the video
            self._videos.finish(self.done, self.predictions)

    def close(self) -> None:
        """Let go of the folder, so that another process can resume the run."""
        self._videos.abandon()
        self._journal.close()

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def _path(self, *parts: str) -> str:
        return os.path.join(self.folder, *parts)


def _pasted_once(image: PredictedImage) -> PredictedImage:
    """The image with pasted masks, which lines and pictures both need, if they fit into memory."""
    predictions = image.predictions
    sides = predictions.pred_boxes[:, 2:] - predictions.pred_boxes[:, :2]
    if sides.prod(axis=1).sum() > MAX_PASTED:
        return image
    crops = [predictions.masks.crop(k) for k in range(len(predictions))]
    masks = CroppedMasks(crops, predictions.image_size)
    return dataclasses.replace(image, predictions=predictions.replaced(masks=masks))


def _earlier_run(folder: str, resume: bool) -> dict[str, Any] | None:
    """
    Returns:
        what "run.json" in the folder says, or None if the folder is new.

    Raises:
        UserError: the folder cannot be used.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        found = [name for name in os.listdir(folder) if not name.endswith(INCOMPLETE)]
    except OSError as error:
        raise UserError(
            f"'{folder}' cannot be a folder for predictions: {error.strerror}."
        ) from None
    journal = os.path.join(folder, JOURNAL)
    if {*found} <= {RUN, JOURNAL} and not (JOURNAL in found and os.path.getsize(journal)):
        return None  # it is empty, or of a run that ended before its first image was done
    if RUN not in found:
        raise UserError(
            f"'{folder}' is not empty and has no predictions of an earlier run: give a new or an "
            "empty folder."
        )
    if not resume:
        raise UserError(
            f"'{folder}' has the predictions of another run: give a new folder, or continue that "
            "run with --resume."
        )
    path = os.path.join(folder, RUN)
    try:
        with open(path, "rb") as f:
            run = json.load(f)
        assert isinstance(run["kinds"], list)
        return run
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"'{path}' cannot be read: give a new folder.") from None


def _refuse_unless_same(folder: str, earlier: dict[str, Any], run: dict[str, Any]) -> None:
    run = json.loads(json.dumps(run))  # tuples become lists, as in the file

    def flat(described: dict[str, Any]) -> dict[str, Any]:
        settings = described.get("settings")
        return described | (settings if isinstance(settings, dict) else {})

    there, here = flat(earlier), flat(run)
    names = {*there, *here} - {"settings", "kinds"}
    different = sorted(name for name in names if there.get(name) != here.get(name))
    if different:
        what = [f"{x}: {shown(there.get(x))}, not {shown(here.get(x))}" for x in different]
        raise UserError(
            f"'{folder}' has predictions with other settings ({listed(what)}): repeat them, or "
            "give a new folder."
        )
