"""Read Ultralytics' segmentation datasets for YOLO: data.yaml, and outlines as text."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from msrcnn_d2_runtime.text import shown

from ..utils.errors import UserError
from .shapes import flat
from .source import AnnotatedImage, Source, images_in, read_text

__all__ = ["read_yolo"]


def read_yolo(source: Source) -> Iterator[AnnotatedImage]:
    """The images of a subset, which is "train" if none was given."""
    file = source.path / "data.yaml" if source.path.is_dir() else source.path
    try:
        config = yaml.safe_load(file.read_text("utf-8"))
        names = config["names"]
        entries = names.items() if isinstance(names, dict) else enumerate(_as_list(names))
        names = {int(k): str(name) for k, name in entries}  # YAML reads 1 and no as other types
    except OSError as error:
        raise UserError(f"'{file}' cannot be read ({error.strerror}): give data.yaml.") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError):
        raise UserError(f"'{file}' is no data.yaml of YOLO with the names of classes.") from None
    source.class_names = source.class_names or [names[k] for k in sorted(names)]
    if "kpt_shape" in config:  # some numbers of keypoints would pass for outlines
        raise UserError(f"'{file}' is of keypoints, without outlines: give a segmentation dataset.")
    subset = source.subset or "train"
    if not config.get(subset):
        raise UserError(f"'{file}' has no '{subset}': name the part with --subset.")
    base = file.parent / str(config.get("path") or "")
    base = base if base.is_dir() else file.parent
    source.root = source.images or base
    images = [path for x in _as_list(config[subset]) for path in _images_of(base, str(x))]
    if not images:
        raise UserError(
            f"There are no images of '{subset}' where '{file}' says they are: correct 'path' or "
            f"'{subset}' in it."
        )
    files = {source.name_of(path): path for path in images}
    labels = {name: _labels_of(path) for name, path in files.items()}
    if not any(path.is_file() for path in labels.values()):
        raise UserError(
            f"There are no labels of '{subset}' such as '{labels[min(labels)]}': put them there."
        )
    for name, size in source.sizes(files).items():
        image = AnnotatedImage(name, size)
        source.reading = place = labels[name]
        lines = read_text(place).splitlines()
        for k, line in enumerate(lines, start=1):
            index, *numbers = line.split() or [""]
            if len(numbers) == 4:
                source.skip(place, f"line {k} is a box without an outline")
            elif len(numbers) >= 6 and len(numbers) % 2 == 0:
                points = np.array(numbers, dtype=float).reshape(-1, 2)
                if abs(points).max() > 2:  # what is a little outside the image is cut off
                    raise UserError(
                        f"Line {k} of '{place}' has coordinates that are no shares of width and "
                        "height, from 0 to 1: divide pixels by them."
                    )
                if int(index) not in names:
                    raise UserError(
                        f"Line {k} of '{place}' has the class {index}: '{file}' has no name for it."
                    )
                outline = flat((points * size[::-1]).tolist())
                image.objects.append((names[int(index)], [outline]))
            elif index:
                raise UserError(
                    f"Line {k} of '{place}' is no class with an outline: {shown(line)}."
                )
        yield image


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _images_of(base: Path, entry: str) -> list[Path]:
    """The images of a folder or of a text file with their paths."""
    # Roboflow writes ../train/images though its data.yaml lies beside train/
    candidates = [base / entry, base / re.sub(r"^(\.\./)+", "", entry)]
    place = next((x for x in candidates if x.exists()), candidates[0])
    if place.suffix != ".txt":
        return images_in(place, "**/*")
    lines = [line.strip().replace("\\", "/") for line in read_text(place).split("\n")]
    found = [(place.parent / line, base / line) for line in lines if line]
    return [next((path for path in paths if path.exists()), paths[0]) for paths in found]


def _labels_of(image: Path) -> Path:
    """The file of an image's labels; the last folder "images" has a sister "labels"."""
    parts = list(image.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")
