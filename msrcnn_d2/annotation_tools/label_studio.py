"""Read Label Studio's export as JSON (not JSON-MIN)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from msrcnn_d2_runtime.inputs import IMAGE_SUFFIXES
from msrcnn_d2_runtime.text import listed

from ..coco_format import read_json
from ..dataset_check.images import UPLOAD_PREFIX
from ..utils.errors import UserError
from .shapes import Part, Size, ellipse, flat, rectangle, rle_in_place
from .source import AnnotatedImage, Source

__all__ = ["read_label_studio"]


def read_label_studio(source: Source) -> Iterator[AnnotatedImage]:
    """The images of tasks, each with the first annotation that was not cancelled."""
    advice = "give an export of Label Studio as JSON, not as JSON-MIN"
    tasks = read_json(str(source.path), advice)
    if not isinstance(tasks, list) or not all(
        isinstance(x, dict) and {"data", "annotations"} <= set(x) for x in tasks
    ):
        raise UserError(f"'{source.path}' is no list of tasks with annotations: {advice}.")
    for task in tasks:
        valid = [x for x in task["annotations"] if not x.get("was_cancelled")]
        results = [x for x in (valid[0]["result"] if valid else []) if "original_width" in x]
        url = next((x for x in task["data"].values() if _is_image(x)), None)
        if url is None or not valid:
            reason = "it has no image" if url is None else "it has no annotation"
            source.skip(f"task {task.get('id')}", reason)
            continue
        file = _path_of(url)
        name = source.name_of(
            *(source.root / file, source.root / "images" / file.name, source.root / file.name),
            source.root / UPLOAD_PREFIX.sub("", file.name, count=1),
        )
        if len({x.get("to_name") for x in results}) > 1:
            source.skip(name, "the task has shapes in several images")
            continue
        if len(valid) > 1:
            source.skip(
                name, f"{len(valid) - 1} of its {len(valid)} annotations, all but the first"
            )
        sizes = [(x["original_height"], x["original_width"]) for x in results]
        sizes = sizes or list(source.sizes([name]).values())
        if not sizes:
            continue
        image = AnnotatedImage(name, sizes[0])
        shapes: dict[str, dict] = {}
        for result in results:  # the outline and the label of a shape may be two results
            shapes.setdefault(result["id"], {}).update(result["value"])
        for shape in shapes.values():
            labels: list = next((x for key, x in shape.items() if key.endswith("labels")), [])
            part = _part_of(shape, image.size)
            if part is None or not labels:
                keys = listed([*shape])
                source.skip(
                    name, f"a shape {'of another kind' if labels else 'without label'}: {keys}"
                )
            else:
                image.objects.append((labels[0], [part]))
                if len(labels) > 1:
                    source.skip(name, f"of a shape's labels {listed(labels)}, all but the first")
        yield image


def _is_image(value: Any) -> bool:
    return isinstance(value, str) and _path_of(value).suffix.lower() in IMAGE_SUFFIXES


def _path_of(url: str) -> Path:
    """The path in a URL, also of local files, which Label Studio writes as ...?d=path."""
    parts = urlsplit(url)
    path = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]
    return Path(path.replace("\\", "/").lstrip("/"))


def _part_of(shape: dict, size: Size) -> Part | None:
    height, width = size
    if shape.get("format") == "rle":
        pixels = _unpack_brush(bytes(shape["rle"])).reshape(height, width, 4)
        return rle_in_place(pixels[:, :, 3] > 0, 0, 0, size)
    # All lengths are in percent of the image
    if len(shape.get("points", [])) >= 3:
        return flat((np.array(shape["points"]) * [width / 100, height / 100]).tolist())
    for sides, draw in ((("width", "height"), rectangle), (("radiusX", "radiusY"), ellipse)):
        if "x" in shape and set(sides) <= set(shape):
            x, y, across, down = (
                shape[key] / 100 * side
                for key, side in zip(("x", "y", *sides), (width, height, width, height))
            )
            return draw(x, y, across, down, shape.get("rotation") or 0)
    return None


def _unpack_brush(data: bytes) -> np.ndarray:
    """
    Decode the run-length encoding of Label Studio, which is that of the package rle-pack.

    A stream of bits says the number of values, the bits of a value and those of four kinds of run
    lengths. Then come runs: whether all values are equal, the kind of the length, the length, and
    one value or all of them.
    """
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int("".join(map(str, bits[place - count : place])), 2)

    total, depth = read(32), read(5) + 1
    lengths = [read(4) + 1 for _ in range(4)]
    dtype = np.uint8 if depth <= 8 else np.uint32
    runs: list[np.ndarray] = []
    done = 0
    while done < total:
        is_equal = read(1)
        length = read(lengths[read(2)]) + 1
        values = [read(depth) for _ in range(1 if is_equal else length)]
        runs.append(np.repeat(np.array(values, dtype), length if is_equal else 1))
        done += length
    return np.concatenate(runs)
