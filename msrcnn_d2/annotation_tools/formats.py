"""
Readers of the formats of annotation tools.

Each says what an image contains, in the tool's own words for classes, and what it leaves out.
"""

import base64
import io
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import yaml
from PIL import Image

from msrcnn_d2_runtime.inputs import IMAGE_SUFFIXES
from msrcnn_d2_runtime.text import listed, shown

from ..coco_format import read_json
from ..dataset_check.images import UPLOAD_PREFIX, look_at_images
from ..utils.errors import UserError
from .shapes import Part, Size, ellipse, flat, rectangle, rle_in_place, with_holes

__all__ = ["FORMATS", "AnnotatedImage", "Format", "Source"]

# LabelMe's own names for what is no object
NO_OBJECT = ("__ignore__", "_background_")
# Attributes of VIA that are taken for the class if there are several
CLASS_ATTRIBUTES = ("class", "label", "name", "type", "category")
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
VOID = 255  # the index of pixels at the edges of objects, which belong to none
VOID_COLOR = (224, 224, 192)
# What tools add to the name of an image for that of its masks
MASK_SUFFIX = re.compile("[_-](cp_)?(masks?|labels?|instances?)$", re.IGNORECASE)
Pixels = tuple[np.ndarray, np.ndarray]  # their rows and columns


@dataclass
class AnnotatedImage:
    """
    Attributes:
        file_name: path of its file in the folder of images.
        size: height and width in pixels.
        objects: the class and the parts of each object.
    """

    file_name: str
    size: Size
    objects: list[tuple[str, list[Part]]] = field(default_factory=list)


@dataclass
class Source:
    """
    What to convert, and what a reader says about it.

    Attributes:
        path: the file or folder.
        images: the folder of images, if it was given.
        subset: name of the part to read, if one was given.
        attribute: of VIA's regions, the one that is the class; see `CLASS_ATTRIBUTES`.
        class_names: those that were given, in the order of their numbers; a reader adds the tool's
            own, if it knows their order and none were given.
        skipped: a sentence for each thing that is left out.
        reading: the file that is read now, for messages about what is wrong with it.
    """

    path: Path
    images: Path | None = None
    subset: str | None = None
    attribute: str | None = None
    class_names: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    reading: Path | None = None

    @property
    def folder(self) -> Path:
        """The path, or of a file its folder."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def root(self) -> Path:
        """The folder that names of images start at."""
        return self.images or self.folder

    def skip(self, place: object, reason: str) -> None:
        self.skipped.append(f"{place}: {reason}")

    def name_of(self, *candidates: Path) -> str:
        """The name, in the folder of images, of the first file that is there, else of the first."""
        found = next((path for path in candidates if path.is_file()), candidates[0])
        return Path(os.path.relpath(found, self.root)).as_posix()

    def sizes(self, names: Iterable[str]) -> dict[str, Size]:
        """Sizes of image files, as they are read; those that cannot be read are left out."""
        files = look_at_images(str(self.root), names, quick=True)
        for name, file in files.items():
            if not file.size:
                self.skip(name, file.message)
        return {name: file.size for name, file in files.items() if file.size}


def labelme(source: Source) -> Iterator[AnnotatedImage]:
    """LabelMe 3 to 6: a JSON file beside each image."""
    for path in _files(source, "*.json"):
        source.reading = path
        contents = read_json(str(path), "give the folder that LabelMe has saved to")
        if not isinstance(contents, dict) or "shapes" not in contents:
            source.skip(path, "it is no file of LabelMe")
            continue
        image = contents["imagePath"].replace("\\", "/")  # of Windows
        base = Path(image).name
        subfolder = path.parent.relative_to(source.folder)  # images may lie in the same one
        name = source.name_of(
            *(path.parent / image, source.root / subfolder / base),
            *(source.root / base, path.parent / base),
        )
        size = contents.get("imageHeight") or 0, contents.get("imageWidth") or 0
        if not all(size):
            size = source.sizes([name]).get(name, (0, 0))
        if not all(size):
            continue
        groups: dict[tuple, list[Part]] = {}
        for k, shape in enumerate(contents["shapes"], start=1):
            label, kind = shape["label"], shape.get("shape_type") or "polygon"
            part = None if label in NO_OBJECT else _labelme_part(kind, shape, size)
            if part is None:
                reason = "" if label in NO_OBJECT else ", which has no area"
                source.skip(path, f"shape {k} is a {kind} {shown(label)}{reason}")
                continue
            group = shape.get("group_id")  # None, or the same number for the parts of an object
            groups.setdefault((label, group, k if group is None else 0), []).append(part)
        yield AnnotatedImage(name, size, [(key[0], parts) for key, parts in groups.items()])


def _labelme_part(kind: str, shape: dict, size: Size) -> Part | None:
    points = shape["points"]
    if kind == "mask":
        with _png(base64.b64decode(shape["mask"])) as image:
            mask = np.asarray(image).astype(bool)
        return rle_in_place(mask, int(points[0][0]), int(points[0][1]), size)
    if kind == "circle":
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return ellipse(x, y, radius, radius)
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        return rectangle(min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0))
    if kind in ("polygon", "rectangle", "oriented_rectangle") and len(points) >= 3:
        return flat(points)
    return None


def via(source: Source) -> Iterator[AnnotatedImage]:
    """VGG Image Annotator 1 and 2: a project, or annotations that were exported as JSON."""
    contents = read_json(str(source.path), "give a project of VIA, or its export as JSON")
    entries = contents.get("_via_img_metadata", contents) if isinstance(contents, dict) else None
    if not entries or not all(isinstance(x, dict) and "filename" in x for x in entries.values()):
        raise UserError(f"'{source.path}' is no project of VIA 1 or 2, and no export as JSON.")
    regions_of: dict[str, list[dict]] = {}
    bytes_of: dict[str, set] = {}
    for entry in entries.values():
        regions = entry["regions"]  # version 1 has numbers as keys
        file = source.root / entry["filename"].replace("\\", "/")
        name = source.name_of(file, source.root / file.name)
        regions = regions.values() if isinstance(regions, dict) else regions
        regions_of.setdefault(name, []).extend(regions)
        bytes_of.setdefault(name, set()).add(entry.get("size", -1))
        if len(bytes_of[name] - {-1}) > 1:  # VIA knows names without folders
            raise UserError(
                f"'{source.path}' has several files '{name}' of different sizes: give them "
                "different names."
            )
    attribute = source.attribute or _via_class_attribute(source.path, regions_of.values())
    for name, size in source.sizes(regions_of).items():
        image = AnnotatedImage(name, size)
        for k, region in enumerate(regions_of[name], start=1):
            label, shape = region["region_attributes"].get(attribute), region["shape_attributes"]
            if isinstance(label, dict):  # of boxes to tick: those that are
                label = next((key for key, is_ticked in label.items() if is_ticked), "")
            part = _via_part(shape)
            if part is None or not label:
                kind = shape["name"]
                reason = f"has no {shown(attribute)}" if part else f"is a {kind} without area"
                source.skip(name, f"region {k} {reason}")
            else:
                image.objects.append((str(label).strip(), [part]))
        yield image


def _via_class_attribute(path: Path, regions: Iterable[list]) -> str:
    names = list(dict.fromkeys(n for x in regions for r in x for n in r["region_attributes"]))
    likely = [n for n in names if n.lower() in CLASS_ATTRIBUTES]
    if not names:
        raise UserError(
            f"The regions in '{path}' have no attributes: add one for the class in VIA."
        )
    if len(likely or names) != 1:
        raise UserError(
            f"The regions in '{path}' have the attributes {listed(names)}: name the one of the "
            "class with --attribute."
        )
    return (likely or names)[0]


def _via_part(shape: dict) -> Part | None:
    kind = shape["name"]
    if kind == "rect":
        return rectangle(shape["x"], shape["y"], shape["width"], shape["height"])
    if kind == "circle":
        return ellipse(shape["cx"], shape["cy"], shape["r"], shape["r"])
    if kind == "ellipse":
        degrees = math.degrees(shape.get("theta", 0))
        return ellipse(shape["cx"], shape["cy"], shape["rx"], shape["ry"], degrees)
    if kind == "polygon" and len(shape["all_points_x"]) >= 3:
        return flat(list(zip(shape["all_points_x"], shape["all_points_y"], strict=True)))
    return None


def label_studio(source: Source) -> Iterator[AnnotatedImage]:
    """Label Studio: an export as JSON (not JSON-MIN)."""
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
            part = _label_studio_part(shape, image.size)
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


def _label_studio_part(shape: dict, size: Size) -> Part | None:
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


def yolo(source: Source) -> Iterator[AnnotatedImage]:
    """Ultralytics' segmentation: data.yaml, and a text file with outlines for each image."""
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
    images = [path for x in _as_list(config[subset]) for path in _yolo_images(base, str(x))]
    if not images:
        raise UserError(
            f"There are no images of '{subset}' where '{file}' says they are: correct 'path' or "
            f"'{subset}' in it."
        )
    files = {source.name_of(path): path for path in images}
    labels = {name: _yolo_labels(path) for name, path in files.items()}
    if not any(path.is_file() for path in labels.values()):
        raise UserError(
            f"There are no labels of '{subset}' such as '{labels[min(labels)]}': put them there."
        )
    for name, size in source.sizes(files).items():
        image = AnnotatedImage(name, size)
        source.reading = place = labels[name]
        lines = _read_text(place).splitlines()
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


def _yolo_images(base: Path, entry: str) -> list[Path]:
    """The images of a folder or of a text file with their paths."""
    # Roboflow writes ../train/images though its data.yaml lies beside train/
    candidates = [base / entry, base / re.sub(r"^(\.\./)+", "", entry)]
    place = next((x for x in candidates if x.exists()), candidates[0])
    if place.suffix != ".txt":
        return _images_in(place, "**/*")
    lines = [line.strip().replace("\\", "/") for line in _read_text(place).split("\n")]
    found = [(place.parent / line, base / line) for line in lines if line]
    return [next((path for path in paths if path.exists()), paths[0]) for paths in found]


def _yolo_labels(image: Path) -> Path:
    """The file of an image's labels; the last folder "images" has a sister "labels"."""
    parts = list(image.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def voc(source: Source) -> Iterator[AnnotatedImage]:
    """Pascal VOC: PNG files in SegmentationObject and SegmentationClass."""
    folder = source.path / "SegmentationObject"
    paths = sorted(folder.glob("*.png"))
    if source.subset and folder.is_dir():
        list_ = source.path / f"ImageSets/Segmentation/{source.subset}.txt"
        if not list_.is_file():
            raise UserError(f"There is no list '{list_}': give another name to --subset.")
        paths = [folder / f"{name}.png" for name in _read_text(list_).split()]
    if not paths:
        raise UserError(f"There are no PNG files in '{folder}': give the folder above it.")
    if not source.images:
        source.root = source.path / "JPEGImages"
    label_map = source.path / "labelmap.txt"  # of CVAT and Datumaro
    has_label_map = label_map.is_file()
    colors = _voc_colors(source, label_map)
    images = {path.stem: path for path in _images_in(source.root)}
    for path in paths:
        source.reading = path
        instances, _ = _read_ids(path)
        classes, palette = _read_ids(source.path / "SegmentationClass" / path.name)
        if classes.shape != instances.shape:
            raise UserError(f"'{path}' and its file in SegmentationClass have two sizes.")
        name = source.name_of(images.get(path.stem, source.root / f"{path.stem}.jpg"))
        image = AnnotatedImage(name, instances.shape)
        for id_, pixels in _objects_in(instances):
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
                image.objects.append((label, [_rle_of(pixels, image.size)]))
            elif counts:  # else it is void: the edges of objects
                source.skip(path, f"object {id_} has no class that is known")
        yield image


def _voc_colors(source: Source, label_map: Path) -> dict[Any, str]:
    """The class that each index and each colour stands for."""
    if label_map.is_file():
        rows = [x.split(":") for x in _read_text(label_map).splitlines() if x and x[0] != "#"]
        colors: dict[Any, str] = {}
        for k, (name, color_text, *_) in enumerate(rows):
            # Datumaro may leave out the colours, which are VOC's then
            color = tuple(map(int, color_text.split(","))) if color_text else _voc_color(k)
            if color not in ((0, 0, 0), VOID_COLOR) and name != "background":
                colors |= {k: name, color: name}
        source.class_names = source.class_names or list(dict.fromkeys(colors.values()))
        return colors
    names = source.class_names or list(VOC_CLASSES)
    return {key: name for k, name in enumerate(names, start=1) for key in (k, _voc_color(k))}


def _voc_color(index: int) -> tuple[int, ...]:
    """The bits of an index, from the lowest on, are the upper bits of red, green, blue, red ..."""
    bits = [index >> k & 1 for k in range(9)]
    return tuple(sum(bit << 7 - k for k, bit in enumerate(bits[c::3])) for c in range(3))


def masks(source: Source) -> Iterator[AnnotatedImage]:
    """
    PNG or TIFF files with masks, of one class: IMAGE/images/*.png with IMAGE/masks/*.png, one file
    for each object, or one file for each image, with a number for each object.
    """
    label = (source.class_names or ["object"])[0]
    source.class_names = source.class_names or [label]
    folders = sorted(path.parent for path in source.path.rglob("masks") if path.is_dir())
    folders = [path for path in folders if (path / "images").is_dir()]
    if not source.images and folders:
        for folder in folders:
            pictures, files = _images_in(folder / "images"), _images_in(folder / "masks")
            if len(pictures) > 1:
                raise UserError(
                    f"'{folder}' has {len(pictures)} images: for one file with masks for each, "
                    f"give '{folder / 'masks'}' with --images '{folder / 'images'}'."
                )
            if not pictures or not files:
                source.skip(folder, f"it has {len(pictures)} images and {len(files)} masks")
                continue
            read = [_read_ids(path, is_one_object=True)[0] > 0 for path in files]
            image = AnnotatedImage(source.name_of(pictures[0]), read[0].shape)
            for path, mask in zip(files, read):
                if mask.shape != image.size:
                    raise UserError(f"'{path}' has another size than '{files[0]}'.")
                image.objects.append((label, [rle_in_place(mask, 0, 0, image.size)]))
            yield image
        return
    if not source.images:
        raise UserError(
            f"'{source.path}' has no folders with images/ and masks/ in them: for files with a "
            "number for each object, give the folder of the images with --images."
        )
    images = {path.stem: path for path in _images_in(source.images)}
    without_masks = set(images.values())
    for path in _images_in(source.path):
        stems = path.stem, MASK_SUFFIX.sub("", path.stem)
        # Masks may lie beside the images
        picture = next((images[x] for x in stems if x in images and images[x] != path), None)
        if picture is None:
            if path not in images.values():
                source.skip(path, "there is no image of this name")
            continue
        without_masks -= {picture, path}
        ids, colors = _read_ids(path)
        image = AnnotatedImage(source.name_of(picture), ids.shape)
        objects = dict(_objects_in(ids))
        numbers = [*objects]
        if numbers == [VOID] or [colors.get(x) for x in numbers] == [(255, 255, 255)]:
            source.skip(path, "all its pixels have one number, so that they are one object")
        for pixels in objects.values():
            image.objects.append((label, [_rle_of(pixels, image.size)]))
        yield image
    for path in sorted(without_masks):
        source.skip(source.name_of(path), "there are no masks of it")


def supervisely(source: Source) -> Iterator[AnnotatedImage]:
    """Supervisely: a project that was downloaded in its own format, with meta.json."""
    meta = read_json(
        str(source.path / "meta.json"), "give the folder of a project in Supervisely's format"
    )
    source.class_names = source.class_names or [str(x["title"]) for x in meta["classes"]]
    if source.subset and not (source.path / source.subset / "ann").is_dir():
        raise UserError(f"'{source.path}' has no dataset '{source.subset}'.")
    for path in _files(source, "ann/*.json", source.subset or ""):
        source.reading = path
        contents = read_json(str(path), "download the project once more")
        size = contents["size"]["height"], contents["size"]["width"]
        name = source.name_of(path.parent.parent / "img" / path.stem)
        image = AnnotatedImage(name, size)
        for k, shape in enumerate(contents["objects"], start=1):
            part = _supervisely_part(shape, size)
            if part is None:
                source.skip(path, f"object {k} is a {shape['geometryType']}")
            else:
                image.objects.append((shape["classTitle"], [part]))
        yield image


def _supervisely_part(shape: dict, size: Size) -> Part | None:
    kind = shape["geometryType"]
    if kind == "bitmap":
        data = base64.b64decode(shape["bitmap"]["data"])
        with _png(zlib.decompress(data)) as image:
            pixels = np.asarray(image)
        mask = (pixels[:, :, -1] if pixels.ndim == 3 else pixels).astype(bool)
        left, top = shape["bitmap"]["origin"]
        return rle_in_place(mask, int(left), int(top), size)
    outline = shape.get("points", {}).get("exterior", [])
    if kind == "rectangle":
        (x0, y0), (x1, y1) = outline
        return rectangle(min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0))
    if kind == "polygon" and len(outline) >= 3:
        return with_holes(
            flat(outline), [flat(x) for x in shape["points"].get("interior", [])], size
        )
    return None


def _files(source: Source, pattern: str, under: str = "") -> list[Path]:
    folder = source.path / under
    found = [folder]
    if folder.is_dir():
        found = sorted(x for x in folder.rglob(pattern) if not x.name.startswith("."))
    if not found:
        raise UserError(f"There are no files {pattern} in '{folder}'.")
    return found


def _images_in(folder: Path, pattern: str = "*") -> list[Path]:
    found = (x for x in folder.glob(pattern) if x.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(x for x in found if not x.name.startswith("."))


def _read_text(path: Path) -> str:
    """Empty if there is no such file: an image without objects may have none."""
    return path.read_text("utf-8-sig") if path.is_file() else ""


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _is_image(value: Any) -> bool:
    return isinstance(value, str) and _path_of(value).suffix.lower() in IMAGE_SUFFIXES


def _path_of(url: str) -> Path:
    """The path in a URL, also of local files, which Label Studio writes as ...?d=path."""
    parts = urlsplit(url)
    path = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]
    return Path(path.replace("\\", "/").lstrip("/"))


def _png(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def _read_ids(
    path: Path, is_one_object: bool = False
) -> tuple[np.ndarray, dict[int, tuple[int, ...]]]:
    """
    The number of each pixel, (H, W), 0 for none, black or transparent; and the colours of numbers,
    if any. Numbers of pixels with a colour of their own are larger than all indices.
    """
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError("it has several pages")
            if image.format == "JPEG":
                if not is_one_object:
                    raise ValueError("JPEG changes numbers of objects, save it as PNG or TIFF")
                return (np.asarray(image.convert("L")) >= 128).astype(np.int64), {}
            if image.mode in ("1", "F", "I", "L", "P") or image.mode.startswith("I;"):
                palette = np.reshape((image.mode == "P" and image.getpalette()) or [], (-1, 3))
                return np.asarray(image).astype(np.int64), dict(
                    enumerate(map(tuple, palette.tolist()))
                )
            rgba = np.asarray(image.convert("RGBA")).astype(np.int64)
            codes = (rgba[..., 0] << 16) + (rgba[..., 1] << 8) + rgba[..., 2]
            codes = np.where((codes > 0) & (rgba[..., 3] > 0), codes + (1 << 24), 0)
            found = np.unique(codes).tolist()
            return codes, {x: (x >> 16 & 255, x >> 8 & 255, x & 255) for x in found}
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{path}' cannot be read as a mask: {reason}.") from None


def _objects_in(ids: np.ndarray) -> Iterator[tuple[int, Pixels]]:
    """Each number but 0, ascending, and its pixels; one pass, as there may be thousands."""
    rows, columns = np.nonzero(ids)
    numbers = ids[rows, columns]
    order = np.argsort(numbers, kind="stable")
    found, starts = np.unique(numbers[order], return_index=True)
    for number, places in zip(found.tolist(), np.split(order, starts[1:])):
        yield number, (rows[places], columns[places])


def _rle_of(pixels: Pixels, size: Size) -> dict:
    rows, columns = pixels
    top, left = int(rows.min()), int(columns.min())
    inside = np.zeros((rows.max() + 1 - top, columns.max() + 1 - left), dtype=bool)
    inside[rows - top, columns - left] = True
    return rle_in_place(inside, left, top, size)


@dataclass(frozen=True)
class Format:
    """
    Attributes:
        read: what it says about a source is in order; it raises what wrong contents lead to.
        tool: name of the tool.
        is_file: whether the source is a file; None if it may be either.
    """

    read: Callable[[Source], Iterator[AnnotatedImage]]
    tool: str
    is_file: bool | None = False


FORMATS = {
    "labelme": Format(labelme, "LabelMe", None),
    "via": Format(via, "VIA", True),
    "label-studio": Format(label_studio, "Label Studio", True),
    "supervisely": Format(supervisely, "Supervisely"),
    "yolo": Format(yolo, "YOLO", None),
    "voc": Format(voc, "Pascal VOC"),
    "masks": Format(masks, "a program for masks"),
}
