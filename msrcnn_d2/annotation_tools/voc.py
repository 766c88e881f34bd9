"""Read PNG files in Pascal VOC's folders, which CVAT and Datumaro write, too."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.errors import UserError
from .shapes import objects_in, rle_of
from .source import AnnotatedImage, Source, images_in, read_ids, read_text

__all__ = ["read_voc"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
VOID = 255  # the index of pixels at the edges of objects, which belong to none
VOID_COLOR = (224, 224, 192)


def read_voc(source: Source) -> Iterator[AnnotatedImage]:
    """The images that have files in SegmentationObject and SegmentationClass."""
    folder = source.path / "SegmentationObject"
    paths = sorted(folder.glob("*.png"))
    if source.subset and folder.is_dir():
        list_ = source.path / f"ImageSets/Segmentation/{source.subset}.txt"
        if not list_.is_file():
            raise UserError(f"There is no list '{list_}': give another name to --subset.")
        paths = [folder / f"{name}.png" for name in read_text(list_).split()]
    if not paths:
        raise UserError(f"There are no PNG files in '{folder}': give the folder above it.")
    if not source.images:
        source.root = source.path / "JPEGImages"
    label_map = source.path / "labelmap.txt"  # of CVAT and Datumaro
    has_label_map = label_map.is_file()
    colors = _colors_of_classes(source, label_map)
    images = {path.stem: path for path in images_in(source.root)}
    for path in paths:
        source.reading = path
        instances, _ = read_ids(path)
        classes, palette = read_ids(source.path / "SegmentationClass" / path.name)
        if classes.shape != instances.shape:
            raise UserError(f"'{path}' and its file in SegmentationClass have two sizes.")
        name = source.name_of(images.get(path.stem, source.root / f"{path.stem}.jpg"))
        image = AnnotatedImage(name, instances.shape)
        for id_, pixels in objects_in(instances):
            counts: Counter[str | None] = Counter()
            values, sums = np.unique(classes[pixels], return_counts=True)
            for value, count in zip(values.tolist(), sums.tolist()):
                color = palette.get(value)
                # labelmap.txt gives a class its colour, VOC and --classes an index
                keys = (color, value) if has_label_map else (value, color)
                if value != VOID and color != VOID_COLOR:
                    counts[next((colors[key] for key in keys if key in colors), None)] += count
            label = next((x for x, _ in counts.most_common() if x), None)
            if label:
                image.objects.append((label, [rle_of(pixels, image.size)]))
            elif counts:  # else it is void: the edges of objects
                source.skip(path, f"object {id_} has no class that is known")
        yield image


def _colors_of_classes(source: Source, label_map: Path) -> dict[Any, str]:
    """The class that each index and each colour stands for."""
    if label_map.is_file():
        rows = [x.split(":") for x in read_text(label_map).splitlines() if x and x[0] != "#"]
        colors: dict[Any, str] = {}
        for k, (name, color_text, *_) in enumerate(rows):
            # Datumaro may leave out the colours, which are VOC's then
            color = tuple(map(int, color_text.split(","))) if color_text else _color(k)
            if color not in ((0, 0, 0), VOID_COLOR) and name != "background":
                colors |= {k: name, color: name}
        source.class_names = source.class_names or list(dict.fromkeys(colors.values()))
        return colors
    names = source.class_names or list(VOC_CLASSES)
    return {key: name for k, name in enumerate(names, start=1) for key in (k, _color(k))}


def _color(index: int) -> tuple[int, ...]:
    """The bits of an index, from the lowest on, are the upper bits of red, green, blue, red ..."""
    bits = [index >> k & 1 for k in range(9)]
    return tuple(sum(bit << 7 - k for k, bit in enumerate(bits[c::3])) for c in range(3))
