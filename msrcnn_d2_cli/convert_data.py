"""
Convert the annotations of a tool to COCO's format.

FORMAT and INPUT:
  labelme       the folder with LabelMe's JSON files
  via           a project of VGG Image Annotator 1 or 2, or its export as JSON
  label-studio  an export of Label Studio as JSON; --images says where the images are
  supervisely   the folder of a project that was downloaded in Supervisely's format
  yolo          data.yaml of a YOLO segmentation dataset
  voc           the folder of a Pascal VOC dataset, with SegmentationObject/
  masks         a folder with IMAGE/images/ and IMAGE/masks/, a file for each object; or with a file
                for each image and a number for each object; --images says where the images are
CVAT and Roboflow export COCO's format themselves, which `msrcnn-d2 check-data` mends.

Exit codes: 0 if the output can be used, 1 if the check of the output finds errors, 2 if there is no
output.
"""

import argparse
import contextlib
import json
import os
import shlex

from .check_data import output
from .parsing import UsageError, names_in_list, share

USAGE = "FORMAT INPUT OUT.json [options]"
EXAMPLES = """
  a folder of LabelMe, a fifth of whose images are for validation:
    {prog} labelme pictures/ train.json --val val.json
  the validation part of a YOLO dataset:
    {prog} yolo data.yaml val.json --subset val
  masks of nuclei, one file for each of them:
    {prog} masks stage1_train/ train.json --classes nucleus
"""

# Those of msrcnn_d2.annotation_tools, which takes too long to import for --help
FORMATS = ("labelme", "via", "label-studio", "supervisely", "yolo", "voc", "masks")
NUM_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help="see above")
    parser.add_argument("input", metavar="INPUT", help="file or folder of the tool, see above")
    parser.add_argument("output", metavar="OUT.json", help="file to write, in COCO's format")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the images (default: where the tool puts them)"
    )
    parser.add_argument(
        "--subset",
        metavar="NAME",
        help="the part to convert: a key of data.yaml (default: train), a list in VOC's "
        "ImageSets/Segmentation, or a dataset of Supervisely's project",
    )
    parser.add_argument(
        "--classes",
        type=names_in_list,
        default=[],
        metavar="NAME,...",
        help="classes in the order of their numbers; objects of others are left out (default: "
        "those of the tool, or all in alphabetical order)",
    )
    parser.add_argument(
        "--attribute", metavar="NAME", help="of VIA's regions, the one that is the class"
    )
    parser.add_argument(
        "--val",
        metavar="VAL.json",
        help="write a random part of the images there, always the same ones, and not to OUT.json",
    )
    parser.add_argument(
        "--val-share", type=share, metavar="X", help="share of the images in it (default: 0.2)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--all", action="store_true", help="list all that is left out")


def check_arguments(args: argparse.Namespace) -> None:
    if args.val_share and not args.val:
        raise UsageError("--val-share is that of a second file: it needs --val VAL.json.")
    if args.val and os.path.realpath(args.val) == os.path.realpath(args.output):
        raise UsageError("OUT.json and --val need two files.")
    if args.attribute and args.format != "via":
        raise UsageError("--attribute is for VIA only.")
    if args.subset and args.format not in ("yolo", "voc", "supervisely"):
        raise UsageError(f"--subset is not for {args.format}: give another INPUT.")


def run(args: argparse.Namespace) -> int:
    """1 if there are errors in what was written."""
    from msrcnn_d2.annotation_tools import convert_annotations
    from msrcnn_d2.utils.errors import UserError
    from msrcnn_d2_runtime.text import listed, plural

    outputs = [args.output, *([args.val] if args.val else [])]
    there = [path for path in outputs if os.path.exists(path)]
    if there and not args.overwrite:
        raise UserError(f"'{there[0]}' is there already: give another name, or --overwrite.")
    with contextlib.ExitStack() as stack:
        # Opened first, so that it is known before the long part that they can be written
        files = [stack.enter_context(output(path, args.input)) for path in outputs]
        converted = convert_annotations(
            args.format, args.input, args.images, args.subset, args.classes, args.attribute
        )
        parts = converted.split(args.val_share or 0.2) if args.val else (converted,)
        next_ids = 1, 1
        for part, file in zip(parts, files):
            contents = part.as_coco(*next_ids)
            next_ids = (
                next_ids[0] + len(contents["images"]),
                next_ids[1] + len(contents["annotations"]),
            )
            json.dump(contents, file)
    if converted.skipped:
        shown = converted.skipped if args.all else converted.skipped[:NUM_SHOWN]
        more = len(converted.skipped) - len(shown)
        print(f"Left out ({len(converted.skipped):,}):")
        lines = [f"  - {x}" for x in shown]
        lines += [f"  - ... and {more:,} more (--all shows all)"] if more else []
        print(*lines, "", sep="\n")
    for part, path in zip(parts, outputs):
        count = sum(len(image.objects) for image in part.images)
        print(f"Wrote {path}: {plural(len(part.images), 'image')}, {plural(count, 'object')}.")
    names = converted.class_names
    print(f"{plural(len(names), 'class', 'classes')}: {listed(names, 20)}.")
    return int(any([_has_errors(path, converted.root) for path in outputs]))


def _has_errors(path: str, images: str) -> bool:
    """Check what was written, and print what is wrong with it."""
    from msrcnn_d2.dataset_check import Level, check_dataset

    findings = check_dataset(path, images, quick=True)
    serious = findings.of(Level.ERROR) + findings.of(Level.WARNING)
    if serious:
        findings.all = serious
        print(f"\nCheck of {path}: {findings.totals()}.\n{findings.summary(NUM_SHOWN)}")
    print(
        f"To check it again, and to mend it:\n  msrcnn-d2 check-data {shlex.join([path, images])}"
    )
    return bool(findings.of(Level.ERROR))
