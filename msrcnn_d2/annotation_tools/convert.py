"""Convert what an annotation tool writes to COCO's format."""

import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from msrcnn_d2_runtime.image_reading import without_pixel_limit
from msrcnn_d2_runtime.text import listed, shown

from ..coco_format import sides_of
from ..utils.errors import UserError
from .formats import FORMATS
from .shapes import Part, box_and_area, joined
from .source import AnnotatedImage, Source

__all__ = ["Converted", "convert_annotations"]

# What Python raises for contents that are not as a tool writes them
WRONG_CONTENTS = (
    *(ArithmeticError, AttributeError, IndexError, KeyError, OSError, SyntaxError, TypeError),
    *(ValueError, zlib.error),
)


@dataclass
class Converted:
    """
    Attributes:
        images: with their objects, in the order of their names.
        class_names: in the order of their numbers.
        root: the folder that the images are in.
        skipped: a sentence for each thing that was left out.
    """

    images: list[AnnotatedImage]
    class_names: list[str]
    root: str
    skipped: list[str]

    def split(self, share: float, seed: int = 0) -> tuple["Converted", "Converted"]:
        """
        Divide the images at random, always in the same way.

        Args:
            share: of the images in the second part, which has at least one, as has the first.

        Raises:
            UserError: there is only one image.
        """
        count = len(self.images)
        if count < 2:
            raise UserError("One image cannot be divided into two parts: leave out --val.")
        order = random.Random(seed).sample(range(count), count)
        chosen = set(order[: min(max(round(share * count), 1), count - 1)])
        parts = (
            [x for k, x in enumerate(self.images) if (k in chosen) == b] for b in (False, True)
        )
        first, second = (Converted(x, self.class_names, self.root, []) for x in parts)
        return first, second

    def as_coco(self, first_image: int = 1, first_annotation: int = 1) -> dict:
        """The contents of a file in COCO's format; the arguments are the lowest ids."""
        numbers = {name: k for k, name in enumerate(self.class_names, start=1)}
        coco: dict[str, list[dict]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": k, "name": name} for name, k in numbers.items()],
        }
        for image_id, image in enumerate(self.images, start=first_image):
            height, width = image.size
            coco["images"].append(
                {"id": image_id, "file_name": image.file_name, "height": height, "width": width}
            )
            for label, parts in image.objects:
                segmentation = joined(parts, image.size)
                box, area = box_and_area(segmentation, image.size)
                entry = {
                    "id": first_annotation + len(coco["annotations"]),
                    "image_id": image_id,
                    "category_id": numbers[label],
                    "segmentation": segmentation,
                    "bbox": box,
                    "area": area,
                    "iscrowd": 0,
                }
                coco["annotations"].append(entry)
        return coco


def convert_annotations(
    format: str,
    path: str,
    images: str | None = None,
    subset: str | None = None,
    class_names: Sequence[str] = (),
    attribute: str | None = None,
    progress: bool = True,
) -> Converted:
    """
    Args:
        format: one of `FORMATS`.
        path: file or folder of the tool.
        images: the folder of the images; by default where the tool puts them.
        subset: the part to read: of YOLO a key of data.yaml ("train" by default), of Pascal VOC a
            list in ImageSets/Segmentation, of Supervisely a dataset; by default all.
        class_names: classes in the order of their numbers; objects of others are left out. By
            default those of the tool, or in alphabetical order those that objects have.
        attribute: of VIA's regions, the one that is the class.
        progress: whether to show a progress bar, if there is a terminal.

    Raises:
        UserError: something cannot be read or is not of this format; nothing of it is in order.
    """
    kind = FORMATS[format]
    if not os.path.exists(path) or kind.is_file not in (None, os.path.isfile(path)):
        noun = "file" if kind.is_file else "folder"
        raise UserError(f"'{path}' is no {noun}: give the {noun} that {kind.tool} has written.")
    if images is not None and not os.path.isdir(images):
        raise UserError(f"There is no folder '{images}': give the folder of the images.")
    class_names = list(dict.fromkeys(class_names))
    source = Source(Path(path), images and Path(images) or None, subset, attribute, class_names)
    try:
        bar = tqdm(kind.read(source), "images", disable=None if progress else True)
        found = []
        with without_pixel_limit():  # of masks
            for image in bar:
                image.objects = [*_with_pixels(image, source)]
                found.append(image)
        found.sort(key=lambda image: image.file_name)
    except WRONG_CONTENTS as error:
        reason = f"{type(error).__name__}: {error}"
        place = source.reading or path
        raise UserError(f"'{place}' is not as {kind.tool} writes it ({reason}).") from error
    counts = Counter(image.file_name for image in found)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise UserError(
            f"'{path}' has annotations of the same image more than once ({listed(repeated)}): "
            "leave those that are right, and see whether different images have one name."
        )
    names = source.class_names or sorted({label for image in found for label, _ in image.objects})
    for image in found:
        image.objects = [*_of_classes(image, names, source)]
    if not any(image.objects for image in found):
        of_classes = f" of the classes {', '.join(class_names)}" if class_names else ""
        raise UserError(
            f"'{path}' has no objects with a mask{of_classes}: see what {kind.tool} has saved."
        )
    return Converted(found, names, str(source.root), source.skipped)


def _with_pixels(image: AnnotatedImage, source: Source) -> Iterator[tuple[str, list[Part]]]:
    """
    Raises:
        ValueError: a size or a class is none.
    """
    if sides_of(dict(zip(("height", "width"), image.size))) is None:
        raise ValueError(f"the height and width of '{image.file_name}' are {image.size}")
    for label, parts in image.objects:
        if not isinstance(label, str):
            raise ValueError(f"the class {shown(label)} is no text")
        if box_and_area(joined(parts, image.size), image.size)[1]:
            yield label, parts
        else:
            source.skip(image.file_name, f"an object of the class '{label}' without a pixel")


def _of_classes(
    image: AnnotatedImage, names: list[str], source: Source
) -> Iterator[tuple[str, list[Part]]]:
    for label, parts in image.objects:
        if label in names:
            yield label, parts
        else:
            source.skip(image.file_name, f"an object of the class '{label}'")
