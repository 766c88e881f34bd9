"""
Check a dataset in COCO's format before you train on it: its annotations and its images.

Errors make a training or an evaluation fail, or teach nonsense. Warnings are about what Detectron2
drops, or what was probably not meant. With --fix it writes a copy in which what can be fixed is
fixed.

Exit codes: 0 without errors (with --strict: nor warnings; with --fix: in the fixed copy), 1 with
errors, 2 if the files cannot be read at all.
"""

import argparse
import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .parsing import UsageError, add_image_arguments, at_least, image_arguments, settings_from

if TYPE_CHECKING:
    from msrcnn_d2.dataset_check import Findings, Fixed

USAGE = "ANNOTATIONS.json IMAGES/ [options]"
EXAMPLES = """
  check all annotations and images:
    {prog} annotations/train.json images/
  check a large dataset in a hurry; of the image files it reads only beginning and end:
    {prog} annotations/train.json images/ --quick
  fix what can be fixed:
    {prog} train.json images/ --fix train_fixed.json
  make objects of the brush masks of CVAT, which it writes as crowds:
    {prog} train.json images/ --fix train_fixed.json --crowds-to-objects
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "annotations", metavar="ANNOTATIONS.json", help="annotations in COCO's format"
    )
    parser.add_argument(
        "images", type=Path, nargs="?", metavar="IMAGES/", help="folder of the images"
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--quick",
        action="store_true",
        help="do not decode images: read their headers, and check that JPEG and PNG files are "
        "complete (files that are not are decoded)",
    )
    depth.add_argument("--no-images", action="store_true", help="check the annotations only")
    parser.add_argument(
        "--fix", metavar="OUT.json", help="write a fixed copy of the annotations, and list changes"
    )
    parser.add_argument(
        "--crowds-to-objects",
        action="store_true",
        help="with --fix: take each crowd for a single object, as CVAT and Datumaro write masks "
        "with iscrowd 1; not for COCO's own files, which have real crowds",
    )
    parser.add_argument("--strict", action="store_true", help="count warnings as errors")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--show",
        type=at_least(0),
        default=5,
        metavar="N",
        help="examples to show of each kind (default: 5)",
    )
    shown.add_argument("--all", action="store_true", help="show all")
    parser.add_argument("--json", metavar="FILE", help="write all findings as data")
    parser.add_argument(
        "--workers",
        type=at_least(1),
        metavar="N",
        help="threads that read images (default: one for each core)",
    )
    add_image_arguments(parser)


def check_arguments(args: argparse.Namespace) -> None:
    if args.images is None and not args.no_images:
        raise UsageError("Give the folder of the images, or --no-images.")
    if args.crowds_to_objects and not args.fix:
        raise UsageError("--crowds-to-objects changes the copy: it needs --fix OUT.json.")
    if args.fix and args.json and os.path.realpath(args.fix) == os.path.realpath(args.json):
        raise UsageError("--fix and --json need two files.")


def run(args: argparse.Namespace) -> int:
    """1 if there are errors, in the file or, if one is written, in the fixed copy."""
    from msrcnn_d2.dataset_check import Level, check_dataset, fix_dataset

    images = None if args.no_images else str(args.images)
    settings = settings_from(args)
    print(f"Reading {args.annotations} ...", flush=True)
    with contextlib.ExitStack() as stack:
        # Opened first, so that it is known before the long part that they can be written
        out = args.fix and stack.enter_context(output(args.fix, args.annotations))
        data = args.json and stack.enter_context(output(args.json, args.annotations))
        source = args.annotations, images
        how: dict = {"quick": args.quick, "num_workers": args.workers, "settings": settings}
        crowds = args.crowds_to_objects
        fixed = fix_dataset(*source, out, crowds_to_objects=crowds, **how) if out else None
        findings = fixed.found if fixed else check_dataset(*source, **how)
        if data:
            found = {"annotations": args.annotations, "images": images, **findings.as_data()}
            fixes = {"fixed": fixed.as_data()} if fixed else {}
            json.dump({**found, **fixes}, data, indent=1)
    print("\n" + text_of(findings, fixed, args))
    left = fixed.left if fixed else findings
    return int(bool(left.of(Level.ERROR) or (args.strict and left.of(Level.WARNING))))


@contextlib.contextmanager
def output(path: str, source: str) -> Iterator[IO[str]]:
    """
    Open a file that is written wholly or not at all.

    Raises:
        UserError: it cannot be written, or it is the file `source`.
    """
    from msrcnn_d2.utils.errors import UserError
    from msrcnn_d2_runtime.files import write_whole

    if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
        raise UserError(f"'{path}' is the input: give another name for the output.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"'{path}' is no file: give the name of one to write.")
    try:
        with write_whole(path, "w") as f:
            yield f
    except OSError as error:
        raise UserError(
            f"Cannot write '{path}' ({error.strerror}): give the name of a file in a folder that "
            "can be written to."
        ) from error
    except RecursionError:
        raise UserError(
            f"Cannot write '{path}': something in '{source}' is nested too deeply."
        ) from None


def text_of(findings: "Findings", fixed: "Fixed | None", args: argparse.Namespace) -> str:
    """What the command prints: the head, the findings by kind, the fixes, the sums."""
    from msrcnn_d2.dataset_check.issues import KINDS, Fix, Level
    from msrcnn_d2_runtime.text import plural

    max_shown = None if args.all else args.show
    head = f"{args.annotations}: {entries_of(findings)}."
    if findings.num_files is None:
        head += " The images were not checked."
    else:
        how = "Read beginning and end of" if args.quick else "Decoded"
        head += f"\n{how} {plural(findings.num_files, 'file')} in {args.images}."
    parts = [head, findings.summary(max_shown)]

    if fixed:
        left = fixed.left
        lines = [f"FIXED in {args.fix}:", fixed.summary(max_shown) or "  nothing"]
        lines += [f"The copy has {entries_of(left)}; it still has {left.totals()}."]
        lines += [
            f"  {kind} ({len(found):,}): {KINDS[kind].title}"
            for kind, found in left.by_kind().items()
            if KINDS[kind].level is not Level.NOTE
        ]
        parts.append("\n".join(lines))

    last = f"{findings.totals()}."
    if not args.all and any(len(x) > args.show for x in findings.by_kind().values()):
        last += " (--all shows all.)"
    if not fixed and any(KINDS[f.kind].fix is not Fix.NOTHING for f in findings.all):
        last += f" To fix what can be fixed:\n  {command_to_fix(args)}"
    left = fixed.left if fixed else findings
    if any(f.kind == "crowd-mask" for f in left.all):
        last += f"\nIf the crowds are single objects:\n  {command_to_fix(args)} --crowds-to-objects"
    return "\n\n".join(filter(None, [*parts, last]))


def entries_of(findings: "Findings") -> str:
    from msrcnn_d2_runtime.text import plural

    parts = [
        plural(findings.num_images, "image"),
        plural(findings.num_annotations, "annotation"),
        plural(findings.num_categories, "category", "categories"),
    ]
    return ", ".join(parts)


def command_to_fix(args: argparse.Namespace) -> str:
    path = Path(args.annotations)
    command = ["msrcnn-d2", "check-data", args.annotations]
    command += ["--no-images"] if args.no_images else [str(args.images)]
    command += ["--quick"] if args.quick else []
    command += image_arguments(args)
    command += ["--fix", str(path.with_name(f"{path.stem}_fixed.json"))]
    return shlex.join(command)
