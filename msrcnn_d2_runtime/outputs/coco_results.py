"""Predictions as COCO results, which evaluations read."""

import json
from collections.abc import Iterable, Mapping
from typing import IO, Any

from ..scores import MASK_IOU_PROBS
from .records import SCORE_KEYS

__all__ = ["JsonList", "write_coco_results"]

KEYS = ("category_id", "bbox", *SCORE_KEYS, MASK_IOU_PROBS, "keypoints", "segmentation")


def write_coco_results(
    file: IO[bytes], records: Iterable[dict[str, Any]], image_ids: Mapping[str, int]
) -> None:
    """
    Args:
        file: gets a list of predictions, each with "image_id" and `KEYS`, without the scores that
            the model does not predict.
        records: of images, from :func:`record_of`.
        image_ids: name of an image -> its id.
    """
    results = JsonList(file)
    for record in records:
        image_id = image_ids[record["image"]]
        for entry in record["predictions"]:
            kept = {key: entry[key] for key in KEYS if key in entry}
            results.append({"image_id": image_id, **kept})
    results.end()


class JsonList:
    """A list in a file, of which one entry is in memory."""

    def __init__(self, file: IO[bytes]):
        self._file, self._before = file, b"[\n"

    def append(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
        self._file.write(self._before + text.encode("utf-8", "backslashreplace"))
        self._before = b",\n"

    def end(self) -> None:
        self._file.write(b"[]" if self._before == b"[\n" else b"\n]")
