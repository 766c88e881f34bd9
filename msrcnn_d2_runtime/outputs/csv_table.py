"""Predictions as a table for spreadsheets and pandas."""

import csv
import io
from collections.abc import Callable, Iterable
from typing import IO, Any

from .records import SCORE_KEYS

__all__ = ["write_csv"]


def write_csv(file: IO[bytes], records: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """
    Args:
        file: gets a line for each object. It begins with a byte order mark, without which Excel
            takes UTF-8 for another encoding. The columns are "image", "instance" (1 for the first
            object of an image), "class", the scores that the model predicts, the corners of the box
            in pixels, and "area", the number of pixels of the mask.
        records: iterates over the records of images, from :func:`record_of`.
    """
    first: dict[str, Any] = next((r["predictions"][0] for r in records() if r["predictions"]), {})
    scores = [key for key in SCORE_KEYS if key in first] or ["score"]
    text = io.TextIOWrapper(file, "utf-8-sig", "backslashreplace", newline="", write_through=True)
    table = csv.writer(text)
    box = ("x_min", "y_min", "x_max", "y_max")
    table.writerow(["image", "instance", "class", *scores, *box, "area"])
    for record in records():
        for k, entry in enumerate(record["predictions"], start=1):
            x, y, width, height = entry["bbox"]
            corners = (x, y, round(x + width, 3), round(y + height, 3))
            values = [entry[key] for key in scores]
            table.writerow([record["image"], k, entry["class"], *values, *corners, entry["area"]])
    text.detach()  # the file stays open
