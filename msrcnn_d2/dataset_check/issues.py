"""What can be wrong with a dataset, and what a check has found."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum

from msrcnn_d2_runtime.text import plural, shown

from ..coco_format import Id

__all__ = ["BAD_IMAGES", "KINDS", "Finding", "Findings", "Fix", "Kind", "Level"]


class Level(str, Enum):
    """
    How much a finding matters.

    ERROR: training or evaluation fails, or gives wrong results. WARNING: Detectron2 ignores the
    entry, or it is probably a mistake. NOTE: good to know.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Fix(str, Enum):
    """What :func:`fix_dataset` does about a finding, in the words of the command's output."""

    NOTHING = "left as it is"
    DROP = "left out"
    DROP_WITH_IMAGE = "left out with their image"
    DROP_POLYGON = "left out the polygon"
    WRAP_POLYGON = "made the numbers a list of one polygon"
    FLATTEN_POLYGONS = "made the points one list of numbers"
    WRITE_UTF8 = "wrote UTF-8 without the mark"
    SET_FILE_NAME = "took the name of the file that is there"
    SET_SIZE = "took height and width from the image file"
    SET_BOX = "computed the box from the mask"
    SET_AREA = "computed the area from the mask"
    TURN_MASK = "turned the mask, and computed the box from it"
    SET_CROWD = "set iscrowd to 0"
    REMOVE_KEYPOINTS = "removed the keypoints"
    RENUMBER = "gave a new id"


@dataclass(frozen=True)
class Kind:
    """
    A kind of finding.

    Attributes:
        of: the list of the file whose entries have it; empty for the file as a whole.
        fix: what is done about it, if that is possible; otherwise the entry is left out.
        title: what is wrong.
        effect: what happens in training and evaluation.
    """

    name: str
    level: Level
    of: str
    fix: Fix
    title: str
    effect: str


ERROR, WARNING, NOTE = Level
FILE, IMAGE, CATEGORY, ANNOTATION = "", "images", "categories", "annotations"
_UNUSABLE = "Detectron2 stops at the image; `msrcnn-d2 train` leaves out a few such images."

# fmt: off
# They are shown in this order. A comment says why if the effect does not.
_TABLE = (
    # Errors
    Kind("no-images", ERROR, FILE, Fix.NOTHING, "there are no images", "Training fails."),
    Kind("no-categories", ERROR, FILE, Fix.NOTHING, "there are no categories",
         "Detectron2 fails."),
    Kind("no-objects", ERROR, FILE, Fix.NOTHING, "no image has an object that is not a crowd",
         "Training fails, and all results of an evaluation are nan."),
    # Detectron2 and pycocotools read the file with Python's `json.load`, which refuses the mark
    Kind("byte-order-mark", ERROR, FILE, Fix.WRITE_UTF8, "the file starts with a byte order mark",
         "Detectron2 cannot read the file."),
    Kind("normalised", ERROR, FILE, Fix.NOTHING, "coordinates are from 0 to 1, not in pixels",
         "All objects are smaller than a pixel. Multiply x by the width and y by the height of the "
         "image."),
    Kind("image-entry", ERROR, IMAGE, Fix.DROP, "the entry is not a JSON object",
         "Detectron2 fails."),
    Kind("image-id", ERROR, IMAGE, Fix.DROP, "the id is neither a number nor text",
         "Detectron2 fails, or does not find the annotations of the image."),
    Kind("image-id-twice", ERROR, IMAGE, Fix.DROP, "the id is used twice",
         "Detectron2 uses only the last image with the id, with the annotations of all of them."),
    Kind("image-id-mixed", ERROR, IMAGE, Fix.NOTHING, "the id is text, and others are numbers",
         "Detectron2 sorts the ids and fails."),
    Kind("image-file-name", ERROR, IMAGE, Fix.DROP, "there is no file name", "Detectron2 fails."),
    Kind("image-sides", ERROR, IMAGE, Fix.SET_SIZE, "the height or the width is not a valid number",
         "Detectron2 or the evaluation fails."),
    Kind("image-missing", ERROR, IMAGE, Fix.DROP, "the image file is missing", _UNUSABLE),
    # Of Label Studio, which puts a folder and eight characters before names, and of full paths
    Kind("image-renamed", ERROR, IMAGE, Fix.SET_FILE_NAME,
         "the image file has another name in the folder", _UNUSABLE),
    Kind("image-unreadable", ERROR, IMAGE, Fix.DROP, "the image file cannot be read", _UNUSABLE),
    Kind("image-truncated", ERROR, IMAGE, Fix.DROP, "the image file is cut off", _UNUSABLE),
    Kind("image-size", ERROR, IMAGE, Fix.DROP,
         "the image file has another size than the annotations say", _UNUSABLE),
    # Neither the file nor the annotations are wrong, so that nothing is left out
    Kind("image-orientation", ERROR, IMAGE, Fix.NOTHING,
         "annotations and image reading treat the orientation in EXIF differently",
         "Objects are not where their annotations say; Detectron2 stops if the sizes differ. "
         "--ignore-exif makes this check read images as they are stored."),
    Kind("image-pixels", ERROR, IMAGE, Fix.NOTHING, "the image has more pixels than the limit",
         "The image is not read. --max-pixels lets this check read it."),
    # Pillow's conversion to RGB clips them at 255, so that most are white or black all over
    Kind("image-deep", ERROR, IMAGE, Fix.NOTHING,
         "the image has more than 8 bits per pixel, and there is no scale for them",
         "The image is not read. --intensity-range or --intensity-percentiles gives this check a "
         "scale."),
    Kind("image-deep-color", ERROR, IMAGE, Fix.NOTHING,
         "the image has 16 bits per channel, which cannot be scaled", "The image is not read."),
    Kind("category-entry", ERROR, CATEGORY, Fix.DROP, "the entry is not a JSON object",
         "Detectron2 fails."),
    Kind("category-id", ERROR, CATEGORY, Fix.DROP, "the id is neither a number nor text",
         "Detectron2 fails, or does not find the objects of the category."),
    Kind("category-id-twice", ERROR, CATEGORY, Fix.NOTHING, "the id is used twice",
         "Detectron2 numbers the classes wrongly."),
    Kind("category-id-mixed", ERROR, CATEGORY, Fix.NOTHING,
         "the id is text, and others are numbers", "Detectron2 sorts the ids and fails."),
    Kind("category-name", ERROR, CATEGORY, Fix.NOTHING, "there is no name", "Detectron2 fails."),
    Kind("annotation-entry", ERROR, ANNOTATION, Fix.DROP, "the entry is not a JSON object",
         "Detectron2 fails."),
    Kind("annotation-id", ERROR, ANNOTATION, Fix.RENUMBER, "the id is neither a number nor text",
         "Detectron2 fails."),
    Kind("annotation-id-twice", ERROR, ANNOTATION, Fix.RENUMBER, "the id is used twice",
         "Detectron2 fails."),
    Kind("image-reference", ERROR, ANNOTATION, Fix.DROP, "there is no valid image_id",
         "Detectron2 fails."),
    Kind("category-reference", ERROR, ANNOTATION, Fix.DROP, "there is no valid category_id",
         "Detectron2 fails."),
    Kind("unknown-category", ERROR, ANNOTATION, Fix.DROP,
         "the annotation refers to a category that does not exist", "Detectron2 fails."),
    Kind("ignore", ERROR, ANNOTATION, Fix.DROP, '"ignore" is not 0', "Detectron2 fails."),
    # Detectron2 compares with 0, so that null and "0" are crowds in training, and COCO takes int()
    Kind("iscrowd", ERROR, ANNOTATION, Fix.DROP, "iscrowd is neither 0 nor 1",
         "Training leaves out the object as a crowd; the evaluation fails or ignores it."),
    # A negative area, or one above COCO's largest size, is in no range of sizes
    Kind("area", ERROR, ANNOTATION, Fix.SET_AREA,
         "the area is missing, or is not a number from 0 to 10 billion pixels",
         "The evaluation fails, or does not count the object."),
    Kind("keypoints", ERROR, ANNOTATION, Fix.REMOVE_KEYPOINTS,
         "the keypoints are not a list of numbers", "Detectron2 fails."),
    # PyTorch refuses numbers that are too large for its types, though the box is cut off later
    Kind("box", ERROR, ANNOTATION, Fix.SET_BOX,
         "the box is not four numbers within a million pixels", "Training fails."),
    Kind("box-elsewhere", ERROR, ANNOTATION, Fix.SET_BOX,
         "the box and the box of the mask have an IoU below 0.5",
         "The model learns a wrong box, and a mask that is cut off."),
    # If only some objects of an image have a mask, Detectron2's mapper fails with a KeyError; if
    # none has one, there are no "gt_masks"
    Kind("mask-missing", ERROR, ANNOTATION, Fix.DROP, "there is no mask",
         "Training of masks and their evaluation fail."),
    Kind("mask-malformed", ERROR, ANNOTATION, Fix.DROP,
         "the mask is neither a list of polygons nor RLE",
         "Detectron2 fails, or ignores the annotation."),
    Kind("mask-flat", ERROR, ANNOTATION, Fix.WRAP_POLYGON,
         "the mask is one list of numbers, not a list of polygons", "Detectron2 fails."),
    # Detectron2 ignores those with few points, and takes some of the others
    Kind("polygon-pairs", ERROR, ANNOTATION, Fix.FLATTEN_POLYGONS,
         "a polygon is a list of points [[x, y], ...], not [x, y, x, y, ...]",
         "Training ignores all or some of them; the evaluation fails."),
    # pycocotools takes a first polygon of four numbers for a box, and fails at a shorter one
    Kind("polygon-points", ERROR, ANNOTATION, Fix.DROP_POLYGON,
         "the polygon has fewer than three points, or an odd number of coordinates",
         "Training ignores it; the evaluation fails, or takes four numbers for a box."),
    Kind("polygon-numbers", ERROR, ANNOTATION, Fix.DROP_POLYGON,
         "the polygon has a value that is not a finite number",
         "Training fails, or learns wrong masks."),
    Kind("polygon-far", ERROR, ANNOTATION, Fix.DROP_POLYGON,
         "the polygon is more than a million pixels away",
         "pycocotools needs hours, or more memory than there is."),
    Kind("rle-counts", ERROR, ANNOTATION, Fix.DROP, "the counts are not RLE of the mask's size",
         "pycocotools fails, or reads beyond the counts."),
    Kind("rle-size", ERROR, ANNOTATION, Fix.DROP, "the RLE mask has another size than its image",
         "Training fails."),
    # Warnings
    Kind("image-file-twice", WARNING, IMAGE, Fix.NOTHING, "another image has the same file",
         "Each is trained on with its own annotations only; the objects of the other are "
         "background."),
    Kind("image-orientation-unclear", WARNING, IMAGE, Fix.NOTHING,
         "the image has an orientation in EXIF that does not change its size",
         "The annotations may be of the turned or of the stored image. If they are of the stored "
         "one, set dataloader.images.apply_exif=False (yaml: INPUT.APPLY_EXIF False)."),
    Kind("image-16-bits", WARNING, IMAGE, Fix.NOTHING, "the image has 16 bits per channel",
         "Pillow reads the upper 8 bits: an image that uses only the lower ones is black."),
    Kind("category-name-twice", WARNING, CATEGORY, Fix.NOTHING, "the name is used twice",
         "There are two classes, and results by class show only one of them."),
    # Roboflow's: a dataset "fish" has the category 0, "fish", of which all others are kinds
    Kind("category-root", WARNING, CATEGORY, Fix.DROP,
         "the category has no annotations, and is only the supercategory of others",
         "The model has a class that it cannot learn."),
    Kind("unknown-image", WARNING, ANNOTATION, Fix.DROP,
         "the annotation refers to an image that does not exist", "Detectron2 ignores it."),
    # faster-coco-eval and Detectron2's fast evaluation take integers only, pycocotools keeps ids as
    # floats, and all write 0 where a detection matches nothing. Our evaluator numbers objects anew
    Kind("annotation-id-odd", WARNING, ANNOTATION, Fix.RENUMBER,
         "the id is text, or not a whole number from 1 to 2^53",
         "`msrcnn-d2` takes it; the COCO evaluation of other programs fails, or never matches the "
         "object with the id 0."),
    Kind("annotation-copy", WARNING, ANNOTATION, Fix.DROP,
         "another annotation has the same image, category and mask",
         "The object is learnt twice, and the evaluation always misses one of the two."),
    Kind("iscrowd-missing", WARNING, ANNOTATION, Fix.SET_CROWD, "there is no iscrowd",
         "`msrcnn-d2` takes it for 0; the evaluation of pycocotools fails."),
    # Whether a single object or a real crowd was meant is for the user to say
    Kind("crowd-mask", WARNING, ANNOTATION, Fix.NOTHING,
         "the mask is a crowd, perhaps only because CVAT and Datumaro write iscrowd 1 for all RLE",
         "Training leaves it out, and detections inside it do not count. If each is one object, "
         "`msrcnn-d2 check-data` with --fix OUT.json --crowds-to-objects makes it one."),
    Kind("box-rotated", WARNING, ANNOTATION, Fix.TURN_MASK,
         "the rectangle is turned, as CVAT's rotation says, but mask and box are not",
         "The model learns a wrong mask and a wrong box."),
    Kind("box-empty", WARNING, ANNOTATION, Fix.SET_BOX, "the box has no positive width and height",
         "Training ignores the object."),
    Kind("box-differs", WARNING, ANNOTATION, Fix.SET_BOX,
         "the box does not match the mask (by over 2 pixels and 5 % of a side)",
         "The model learns the box, and only the part of the mask inside it."),
    Kind("area-differs", WARNING, ANNOTATION, Fix.SET_AREA, "the area does not match the mask",
         "APs, APm and APl may count the object in the wrong size."),
    Kind("polygon-flat", WARNING, ANNOTATION, Fix.DROP_POLYGON, "the polygon has no area",
         "It adds nothing to the mask; a mask without any other polygon can never be found."),
    Kind("polygon-outside", WARNING, ANNOTATION, Fix.DROP_POLYGON,
         "the polygon is outside the image",
         "It adds nothing to the mask; Detectron2 ignores a mask without any other polygon."),
    Kind("rle-empty", WARNING, ANNOTATION, Fix.DROP, "the RLE mask has no pixels",
         "Training ignores the object; the evaluation can never find it."),
    # Notes
    Kind("mask-formats", NOTE, FILE, Fix.NOTHING, "masks are polygons or RLE",
         "`msrcnn-d2` chooses the mask format. Detectron2's own programs need 'bitmask' if an "
         "object that is not a crowd has RLE."),
    Kind("image-empty", NOTE, IMAGE, Fix.NOTHING, "the image has no annotations",
         "Detectron2 leaves it out of training by default, and evaluates on it."),
    Kind("category-ids", NOTE, FILE, Fix.NOTHING,
         "category ids have gaps, or do not start at 1",
         "Detectron2 maps them to 0, 1, 2, ... in their order, and back in results."),
    Kind("category-unused", NOTE, CATEGORY, Fix.NOTHING, "the category has no annotations",
         "The model has a class that it cannot learn."),
    Kind("crowd", NOTE, ANNOTATION, Fix.NOTHING, "the object is a crowd",
         "Training leaves it out; in the evaluation, detections inside it do not count."),
    Kind("polygon-over-edge", NOTE, ANNOTATION, Fix.NOTHING,
         "the polygon extends beyond the image by more than a pixel",
         "What is outside is cut off."),
)
# fmt: on
KINDS = {kind.name: kind for kind in _TABLE}
# Kinds of errors that make an image file unusable
BAD_IMAGES = (
    "image-missing",
    "image-renamed",
    "image-unreadable",
    "image-truncated",
    "image-size",
)


@dataclass(frozen=True)
class Finding:
    """
    One thing that is wrong with a dataset, or good to know.

    Attributes:
        kind: one of `KINDS`, which says what it leads to.
        message: what was found.
        image_id, annotation_id, file_name: where; None if they are not known.
        index: place in the list of the file that the kind is about, from 0 on; -1 for the file as
            a whole.
        part: place of a polygon in its mask, from 0 on.
    """

    kind: str
    level: Level
    message: str
    image_id: Id | None = None
    annotation_id: Id | None = None
    file_name: str | None = None
    index: int = -1
    part: int | None = None

    @property
    def place(self) -> str:
        """Such as "image 12 'a.jpg', annotation 345"; empty if nothing is known."""
        places = []
        image = [] if self.image_id is None else [shown(self.image_id)]
        image += [] if self.file_name is None else [repr(self.file_name)]
        if image:
            places.append(f"image {' '.join(image)}")
        if self.annotation_id is not None:
            places.append(f"annotation {shown(self.annotation_id)}")
        return ", ".join(places)

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


@dataclass
class Findings:
    """
    What :func:`check_dataset` has found.

    Attributes:
        all: in the order of the check.
        num_images, num_annotations, num_categories: entries of the file.
        num_files: image files that were read; None if they were left out.
        has_annotations: whether the file has a list of annotations, empty or not.
        objects_per_image: numbers of objects that are not crowds, by image id; without zeros.
        mask_format: the mask format that Detectron2 needs for training: "bitmask" if an object
            that is not a crowd has RLE, "polygon" otherwise.
    """

    all: list[Finding] = field(default_factory=list)
    num_images: int = 0
    num_annotations: int = 0
    num_categories: int = 0
    num_files: int | None = None
    has_annotations: bool = True
    objects_per_image: dict[Id, int] = field(default_factory=dict)
    mask_format: str = "polygon"

    def of(self, level: Level) -> list[Finding]:
        return [f for f in self.all if f.level == level]

    @property
    def bad_images(self) -> list[Finding]:
        """Files that are missing or renamed, cannot be read, are cut off or have another size."""
        return [f for f in self.all if f.kind in BAD_IMAGES]

    def by_kind(self) -> dict[str, list[Finding]]:
        """In the order of `KINDS`, from errors to notes."""
        found = defaultdict(list)
        for finding in self.all:
            found[finding.kind].append(finding)
        return {kind: found[kind] for kind in KINDS if kind in found}

    def summary(self, max_shown: int | None = 5) -> str:
        """
        The kinds of each level as text, with counts and examples.

        Args:
            max_shown: examples of each kind; None for all.
        """
        lines = []
        for level in Level:
            found = {k: v for k, v in self.by_kind().items() if KINDS[k].level == level}
            if found:
                lines.append(f"{level.value.upper()}S: {sum(map(len, found.values())):,}")
            for name, findings in found.items():
                kind, count = KINDS[name], f"{len(findings):,}"
                if name == "area-differs":  # the share tells noise from another way to compute
                    count += f" of {self.num_annotations:,}"
                if kind.of:
                    lines += [f"  {name} ({count}): {kind.title}", f"      {kind.effect}"]
                    lines += first_lines(findings, max_shown)
                else:  # there is only one, and its message says all
                    lines += [f"  {name}: {findings[0].message}", f"      {kind.effect}"]
        return "\n".join(lines)

    def totals(self) -> str:
        """Such as "2 errors, 1 warning, 3 notes"."""
        return ", ".join(plural(len(self.of(level)), level.value) for level in Level)

    def as_data(self) -> dict:
        """The findings as plain data, for JSON."""
        return {
            "num_images": self.num_images,
            "num_annotations": self.num_annotations,
            "num_categories": self.num_categories,
            "num_files": self.num_files,
            "mask_format": self.mask_format,
            "counts": {kind: len(findings) for kind, findings in self.by_kind().items()},
            "findings": [asdict(f) for f in self.all],
        }


def first_lines(items: list, max_shown: int | None) -> Iterable[str]:
    """The first items as lines of a list, and the number of the others."""
    shown_items = items[:max_shown]
    yield from (f"    - {item}" for item in shown_items)
    more = len(items) - len(shown_items)
    if more:
        yield f"    - ... and {more:,} more"
