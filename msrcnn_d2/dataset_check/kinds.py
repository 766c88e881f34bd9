"""What can be wrong with a dataset, how bad it is, and what mends it."""

from dataclasses import dataclass
from enum import Enum

__all__ = ["KINDS", "Kind", "Level", "Mend"]


class Level(str, Enum):
    """
    How much a finding matters.

    ERROR: training or evaluation fails, or learns or counts nonsense. WARNING: Detectron2 drops
    it, or it is probably not meant. NOTE: good to know.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Mend(str, Enum):
    """What mending does with a finding; its value is what the command says about it."""

    NOTHING = "left it to whoever knows the data"
    DROP_IMAGE = "dropped the image and its annotations"
    DROP_CATEGORY = "dropped the category"
    DROP_ANNOTATION = "dropped the annotation"
    DROP_WITH_IMAGE = "dropped the annotation with its image"
    DROP_POLYGON = "dropped the polygon"
    WRAP_POLYGON = "made the numbers a list of one polygon"
    FLATTEN_POLYGONS = "made the points one list of numbers"
    SCALE = "multiplied the coordinates by the width and height of the image"
    WRITE_UTF8 = "wrote UTF-8 without the mark"
    SET_SIZE = "took height and width from the file of the image"
    SET_NAME = "gave it its id as a name"
    SET_BOX = "computed the box from the mask"
    SET_AREA = "counted the pixels of the mask"
    SET_CROWD = "set iscrowd to 0 or 1"
    SET_IGNORED = 'made what was ignored a crowd, and "ignore" 0'
    REMOVE_KEYPOINTS = "removed the keypoints"
    RENUMBER = "gave it a new id"


@dataclass(frozen=True)
class Kind:
    """
    Attributes:
        of: the list of the file whose entries have it; empty if it is about the file as a whole.
        title: what is the matter.
        effect: what comes of it if nothing is done.
        mend: what mending does, if it can; else it drops what has it.
    """

    level: Level
    of: str
    title: str
    effect: str
    mend: Mend = Mend.NOTHING


_WHOLE, _IMAGES, _CATEGORIES, _ANNOTATIONS = "", "images", "categories", "annotations"
_UNUSABLE = "Detectron2 stops when it comes to them; train_net.py leaves a few out of training."
_UNSORTED = "Detectron2 sorts the ids and fails"

# By name, in the order in which they are shown
KINDS: dict[str, Kind] = {
    "no-images": Kind(Level.ERROR, _WHOLE, "there are no images", "Training fails."),
    "no-categories": Kind(Level.ERROR, _WHOLE, "there are no categories", "Detectron2 fails."),
    "no-objects": Kind(
        Level.ERROR,
        _WHOLE,
        "no image has an object that is not a crowd",
        "Training fails for want of objects, and an evaluation gives nan only.",
    ),
    # Detectron2 and pycocotools read the file with Python's `json.load`, which refuses the mark
    "byte-order-mark": Kind(
        Level.ERROR,
        _WHOLE,
        "the file starts with a byte order mark",
        "Detectron2 cannot read it.",
        Mend.WRITE_UTF8,
    ),
    "normalised": Kind(
        Level.ERROR,
        _WHOLE,
        "coordinates are from 0 to 1 instead of pixels",
        "Training and evaluation take all objects for less than a pixel. Multiply x by the width "
        "and y by the height of the image.",
        Mend.SCALE,
    ),
    "image-entry": Kind(
        Level.ERROR,
        _IMAGES,
        "entries of the images that are none",
        "Detectron2 fails.",
        Mend.DROP_IMAGE,
    ),
    "image-id": Kind(
        Level.ERROR,
        _IMAGES,
        "image ids that are neither a number nor text",
        "Detectron2 fails, or finds no annotations of the image.",
        Mend.DROP_IMAGE,
    ),
    "image-id-twice": Kind(
        Level.ERROR,
        _IMAGES,
        "images with the id of another one",
        "Only the last of them is used, with the annotations of all.",
        Mend.DROP_IMAGE,
    ),
    "image-id-mixed": Kind(
        Level.ERROR,
        _IMAGES,
        "image ids of which some are numbers and some are text",
        f"{_UNSORTED}.",
        Mend.RENUMBER,
    ),
    "image-file-name": Kind(
        Level.ERROR, _IMAGES, "images without a file name", "Detectron2 fails.", Mend.DROP_IMAGE
    ),
    "image-sides": Kind(
        Level.ERROR,
        _IMAGES,
        "images without a height and a width",
        "Detectron2 fails, or the evaluation.",
        Mend.SET_SIZE,
    ),
    "image-missing": Kind(
        Level.ERROR,
        _IMAGES,
        "images whose file is missing",
        _UNUSABLE,
        Mend.DROP_IMAGE,
    ),
    "image-unreadable": Kind(
        Level.ERROR,
        _IMAGES,
        "images that cannot be read",
        _UNUSABLE,
        Mend.DROP_IMAGE,
    ),
    "image-truncated": Kind(
        Level.ERROR,
        _IMAGES,
        "images that are cut off",
        _UNUSABLE,
        Mend.DROP_IMAGE,
    ),
    "image-size": Kind(
        Level.ERROR,
        _IMAGES,
        "images of another size than the annotations say",
        _UNUSABLE,
        Mend.DROP_IMAGE,
    ),
    # A file of the image says nothing wrong, and neither do the annotations: mending drops nothing
    "image-orientation": Kind(
        Level.ERROR,
        _IMAGES,
        "images whose annotations follow EXIF's orientation in another way than they are read",
        "Objects are elsewhere than their annotations say; Detectron2 stops where sizes differ. "
        "--ignore-exif makes this check read images as they are stored.",
    ),
    "image-pixels": Kind(
        Level.ERROR,
        _IMAGES,
        "images of more pixels than the limit",
        "They are not read. --max-pixels lets this check read them.",
    ),
    # Pillow's conversion to RGB clips them at 255, so that most are white or black all over
    "image-deep": Kind(
        Level.ERROR,
        _IMAGES,
        "images of more than 8 bits per pixel, for which there is no scale",
        "They are not read. --intensity-range or --intensity-percentiles gives this check a scale.",
    ),
    "image-deep-color": Kind(
        Level.ERROR,
        _IMAGES,
        "images of 16 bits per channel, which cannot be scaled",
        "They are not read.",
    ),
    "category-entry": Kind(
        Level.ERROR,
        _CATEGORIES,
        "entries of the categories that are none",
        "Detectron2 fails.",
        Mend.DROP_CATEGORY,
    ),
    "category-id": Kind(
        Level.ERROR,
        _CATEGORIES,
        "category ids that are neither a number nor text",
        "Detectron2 fails, or finds no objects of the category.",
        Mend.DROP_CATEGORY,
    ),
    "category-id-twice": Kind(
        Level.ERROR,
        _CATEGORIES,
        "categories with the id of another one",
        "Detectron2 numbers the classes wrongly.",
        Mend.DROP_CATEGORY,
    ),
    "category-id-mixed": Kind(
        Level.ERROR,
        _CATEGORIES,
        "category ids of which some are numbers and some are text",
        f"{_UNSORTED}.",
        Mend.RENUMBER,
    ),
    "category-name": Kind(
        Level.ERROR, _CATEGORIES, "categories without a name", "Detectron2 fails.", Mend.SET_NAME
    ),
    "annotation-entry": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "entries of the annotations that are none",
        "Detectron2 fails.",
        Mend.DROP_ANNOTATION,
    ),
    "annotation-id": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "annotation ids that are neither a number nor text",
        "Detectron2 fails.",
        Mend.RENUMBER,
    ),
    "annotation-id-twice": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "annotations with the id of another one",
        "Detectron2 fails.",
        Mend.RENUMBER,
    ),
    "image-reference": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "annotations that name no image",
        "Detectron2 fails.",
        Mend.DROP_ANNOTATION,
    ),
    "unknown-category": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "annotations of a category that is not in the file",
        "Detectron2 fails.",
        Mend.DROP_ANNOTATION,
    ),
    "ignore": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        'annotations with an "ignore" that is not 0',
        "Detectron2 fails.",
        Mend.SET_IGNORED,
    ),
    # Detectron2 compares with 0, so that null and "0" are crowds in training, and COCO takes int()
    "iscrowd": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "annotations whose iscrowd is neither 0 nor 1",
        "Training leaves them out as crowds; the evaluation fails or ignores them.",
        Mend.SET_CROWD,
    ),
    # A negative area, and a larger one than COCO's largest size, is in no range of sizes
    "area": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "annotations whose area is missing, or no number from 0 to 10 billion pixels",
        "The evaluation fails, or does not count them.",
        Mend.SET_AREA,
    ),
    "keypoints": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "annotations whose keypoints are no list of numbers",
        "Detectron2 fails.",
        Mend.REMOVE_KEYPOINTS,
    ),
    # PyTorch takes no number that is too large for its types, though the box is cut off later
    "box": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "boxes that are not four numbers, or farther away than a million pixels",
        "Training fails.",
        Mend.SET_BOX,
    ),
    "box-elsewhere": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "boxes that have less than half in common with that of the mask",
        "The model learns wrong boxes, and masks that are cut off.",
        Mend.SET_BOX,
    ),
    # An image of which some objects have a mask and some have none is a KeyError in Detectron2's
    # mapper, one without any has no "gt_masks", and pycocotools fails in the evaluation
    "mask-missing": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "annotations without a mask",
        "Training of masks fails, and so does their evaluation.",
        Mend.DROP_ANNOTATION,
    ),
    "mask-malformed": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "masks that are neither a list of polygons nor RLE",
        "Detectron2 fails, or drops them.",
        Mend.DROP_ANNOTATION,
    ),
    "mask-flat": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "masks that are one list of numbers instead of a list of polygons",
        "Detectron2 fails.",
        Mend.WRAP_POLYGON,
    ),
    # Detectron2 drops what has few points, and takes some of the others
    "polygon-pairs": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "polygons that are lists of points [[x, y], ...] instead of [x, y, x, y, ...]",
        "Training drops them, or some; the evaluation fails.",
        Mend.FLATTEN_POLYGONS,
    ),
    # Detectron2 drops them, but pycocotools takes a first polygon of four numbers for a box and
    # fails at a shorter one
    "polygon-points": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "polygons of under three points, or of an odd number of coordinates",
        "Training drops them; the evaluation fails, or takes four numbers for a box.",
        Mend.DROP_POLYGON,
    ),
    "polygon-numbers": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "polygons with something that is no finite number",
        "Training fails, or learns nonsense.",
        Mend.DROP_POLYGON,
    ),
    "polygon-far": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "polygons farther away than a million pixels",
        "pycocotools walks along them pixel by pixel, for hours or out of memory.",
        Mend.DROP_POLYGON,
    ),
    "rle-counts": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "masks whose counts are no RLE of their size",
        "pycocotools fails, or reads memory that is not its own.",
        Mend.DROP_ANNOTATION,
    ),
    "rle-size": Kind(
        Level.ERROR,
        _ANNOTATIONS,
        "RLE masks of another size than their image",
        "Training fails.",
        Mend.DROP_ANNOTATION,
    ),
    "image-file-twice": Kind(
        Level.WARNING,
        _IMAGES,
        "images with the file of another one",
        "Each is trained on with its own annotations only; the objects of the others are "
        "background.",
    ),
    "image-orientation-unclear": Kind(
        Level.WARNING,
        _IMAGES,
        "images with an orientation in EXIF that leaves their size as it is",
        "Whether annotations are of the turned or the stored image cannot be told. If they are of "
        "the stored one, set dataloader.images.apply_exif=False (yaml: INPUT.APPLY_EXIF False).",
    ),
    "image-16-bits": Kind(
        Level.WARNING,
        _IMAGES,
        "images of 16 bits per channel",
        "Pillow reads the upper 8 bits: images that use the lower ones only are dark, or black.",
    ),
    "category-name-twice": Kind(
        Level.WARNING,
        _CATEGORIES,
        "categories with the name of another one",
        "They are two classes, and only one of them is in the results by class.",
    ),
    "unknown-image": Kind(
        Level.WARNING,
        _ANNOTATIONS,
        "annotations of an image that is not in the file",
        "Detectron2 drops them.",
        Mend.DROP_ANNOTATION,
    ),
    # faster-coco-eval and Detectron2's fast evaluation take integers only, pycocotools keeps ids as
    # floats; all write 0 where a detection matches nothing. Our evaluator numbers objects itself
    "annotation-id-odd": Kind(
        Level.WARNING,
        _ANNOTATIONS,
        "annotation ids that are text, or not whole numbers from 1 to 2^53",
        "train_net.py takes them; other programs' COCO evaluation fails, or counts no match with "
        "the id 0.",
        Mend.RENUMBER,
    ),
    "annotation-copy": Kind(
        Level.WARNING,
        _ANNOTATIONS,
        "annotations with the image, the category and the mask of another one",
        "The object is learnt twice, and one of the two is always missed in the evaluation.",
        Mend.DROP_ANNOTATION,
    ),
    "iscrowd-missing": Kind(
        Level.WARNING,
        _ANNOTATIONS,
        "annotations without iscrowd",
        "train_net.py takes it for 0; pycocotools' own evaluation fails.",
        Mend.SET_CROWD,
    ),
    "box-empty": Kind(
        Level.WARNING,
        _ANNOTATIONS,
        "boxes without a positive width and height",
        "Detectron2 drops them in training.",
        Mend.SET_BOX,
    ),
    "box-differs": Kind(
        Level.WARNING,
        _ANNOTATIONS,
        "boxes that are not those of their masks (by over 2 pixels and 5 % of a side)",
        "The model learns the box as it is, and the mask only inside of it.",
        Mend.SET_BOX,
    ),
    "area-differs": Kind(
        Level.WARNING,
        _ANNOTATIONS,
        "areas that are not those of their masks",
        "APs, APm and APl count the objects in wrong sizes.",
        Mend.SET_AREA,
    ),
    "polygon-flat": Kind(
        Level.WARNING,
        _ANNOTATIONS,
        "polygons without an area",
        "They add nothing to a mask; an object of nothing else can never be found.",
        Mend.DROP_POLYGON,
    ),
    "polygon-outside": Kind(
        Level.WARNING,
        _ANNOTATIONS,
        "polygons outside of their image",
        "They add nothing to a mask; Detectron2 drops an object of nothing else.",
        Mend.DROP_POLYGON,
    ),
    "rle-empty": Kind(
        Level.WARNING,
        _ANNOTATIONS,
        "RLE masks without pixels",
        "Detectron2 drops them in training; in the evaluation they can never be found.",
        Mend.DROP_ANNOTATION,
    ),
    "mask-formats": Kind(
        Level.NOTE,
        _WHOLE,
        "masks are polygons or RLE",
        "train_net.py chooses the mask format; Detectron2's own programs have to be told 'bitmask' "
        "if an object that is not a crowd has RLE.",
    ),
    "image-empty": Kind(
        Level.NOTE,
        _IMAGES,
        "images without objects",
        "Detectron2 leaves them out of training unless told otherwise, and evaluates on them.",
    ),
    "category-ids": Kind(
        Level.NOTE,
        _WHOLE,
        "category ids have gaps, or do not start at 1",
        "Detectron2 maps them to 0, 1, 2, ... in their order, and back in results.",
    ),
    "category-unused": Kind(
        Level.NOTE,
        _CATEGORIES,
        "categories without objects",
        "The model has a class for them that it cannot learn.",
    ),
    "crowd": Kind(
        Level.NOTE,
        _ANNOTATIONS,
        "crowds",
        "Training leaves them out; in the evaluation detections inside of them do not count.",
    ),
    "polygon-over-edge": Kind(
        Level.NOTE,
        _ANNOTATIONS,
        "polygons that reach over the edge of their image by more than a pixel",
        "What is outside is cut off.",
    ),
}
