"""
Check a dataset in COCO's format, before a model is trained on it: its annotations and its images.

It tells errors, at which training or evaluation fails or learns nonsense; warnings, of what
Detectron2 drops or was probably not meant; and notes. With --fix it writes a copy in which what
can be mended is mended.

Exit codes: 0 if there are no errors (with --strict: and no warnings; with --fix: left in the new
file), 1 if there are, 2 if the files cannot be read at all.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..image_reading import add_image_arguments, arguments_for, settings_from
from ..utils.errors import UserError, exit_on_user_error
from ..utils.files import write_whole
from ..utils.text import plural
from .check import check_contents, check_encoding, check_folder, read_contents, read_images
from .findings import Findings, Level
from .fix import Mended, mend_contents
from .images import ImageFile
from .kinds import KINDS, Mend

EXAMPLES = """
examples:
  all of the annotations and images:
    python -m msrcnn_d2.dataset_check annotations/train.json images/
  a large dataset in a hurry, reading only the beginnings and ends of image files:
    python -m msrcnn_d2.dataset_check annotations/train.json images/ --quick
  mend what can be mended:
    python -m msrcnn_d2.dataset_check train.json images/ --fix train_fixed.json
"""


def main() -> None:
    args = parse_args()
    try:
        with exit_on_user_error():
            failed = run(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(int(failed))


def run(args: argparse.Namespace) -> bool:
    """Whether there are errors, in the file or, if one is written, in the mended one."""
    images = None if args.no_images else str(args.images)
    check_folder(images)
    settings = settings_from(args)
    print(f"Reading {args.annotations} ...", flush=True)
    with contextlib.ExitStack() as stack:
        # Opened first: that they cannot be written is to be known before the long part
        fixed = args.fix and stack.enter_context(output(args.fix, args.annotations))
        data = args.json and stack.enter_context(output(args.json, args.annotations))
        contents = read_contents(args.annotations)
        files = read_images(
            contents, images, args.quick, args.workers, progress=True, settings=settings
        )
        findings = check_contents(contents, files)
        check_encoding(args.annotations, findings)
        mended = None
        if fixed:
            check_any_file(files, args)
            mended = mend_contents(contents, files, findings)
            fixed.write(json.dumps(contents))
        if data:
            json.dump(as_data(findings, mended, args), data, indent=1)
    show(findings, mended, args)
    return has_failed(mended.left if mended else findings, args.strict)


def check_any_file(files: dict[str, ImageFile] | None, args: argparse.Namespace) -> None:
    """A wrong folder is not mended by leaving out all of the images."""
    if files and all(file.kind == "image-missing" for file in files.values()):
        raise UserError(
            f"None of the {len(files):,} images, such as '{next(iter(files))}', is in the folder "
            f"'{args.images}': give theirs, so that --fix does not drop them all."
        )


def show(findings: Findings, mended: Mended | None, args: argparse.Namespace) -> None:
    max_shown = None if args.all else args.show
    parts = [head_line(findings, args), findings.summary(max_shown)]
    if mended:
        parts.append(text_of_mended(mended, args, max_shown))
    parts.append(last_line(findings, mended, args))
    print("\n" + "\n\n".join(filter(None, parts)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m msrcnn_d2.dataset_check",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("annotations", metavar="ANNOTATIONS.json", help="in COCO's format")
    parser.add_argument(
        "images", type=Path, nargs="?", metavar="IMAGES/", help="folder of the images"
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--quick",
        action="store_true",
        help="do not decode images: read their headers and, of JPEG and PNG, whether they end as "
        "they have to (only what does not is decoded)",
    )
    depth.add_argument("--no-images", action="store_true", help="leave the images out")
    parser.add_argument(
        "--fix", metavar="OUT.json", help="write a mended copy, and say what was done"
    )
    parser.add_argument("--strict", action="store_true", help="warnings count as errors")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--show",
        type=int,
        default=5,
        metavar="N",
        help="examples of each kind that are shown (default 5)",
    )
    shown.add_argument("--all", action="store_true", help="show all")
    parser.add_argument("--json", metavar="FILE", help="write all findings as data")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads that read images (default: all cores)"
    )
    add_image_arguments(parser)
    args = parser.parse_args()
    if args.images is None and not args.no_images:
        parser.error("give the folder of the images, or --no-images")
    if args.show < 0:
        parser.error("--show must be at least 0")
    if args.workers is not None and args.workers < 1:
        parser.error("--workers must be at least 1")
    if args.fix and args.json and os.path.realpath(args.fix) == os.path.realpath(args.json):
        parser.error("--fix and --json need two files")
    return args


@contextlib.contextmanager
def output(path: str, source: str) -> Iterator[IO[str]]:
    """
    Open a file that is written wholly or not at all.

    Raises:
        UserError: it cannot be written, or it is the file `source`.
    """
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


def head_line(findings: Findings, args: argparse.Namespace) -> str:
    line = f"{args.annotations}: {entries_of(findings)}."
    if findings.num_files is None:
        return f"{line} The images were not looked at."
    how = "Looked at the beginning and the end of" if args.quick else "Decoded"
    return f"{line}\n{how} {plural(findings.num_files, 'file')} in {args.images}."


def entries_of(findings: Findings) -> str:
    categories = findings.num_categories
    parts = [
        plural(findings.num_images, "image"),
        plural(findings.num_annotations, "annotation"),
        plural(categories, "category", "categories"),
    ]
    return ", ".join(parts)


def text_of_mended(mended: Mended, args: argparse.Namespace, max_shown: int | None) -> str:
    lines = [f"MENDED in {args.fix}:", mended.summary(max_shown) or "  nothing"]
    left = mended.left
    lines += [f"It has {entries_of(left)}. Left are {left.totals()}."]
    lines += [
        f"  {kind} ({len(found):,}): {KINDS[kind].title}"
        for kind, found in left.by_kind().items()
        if KINDS[kind].level is not Level.NOTE
    ]
    return "\n".join(lines)


def last_line(findings: Findings, mended: Mended | None, args: argparse.Namespace) -> str:
    line = f"{findings.totals()}."
    if not args.all and any(len(x) > args.show for x in findings.by_kind().values()):
        line += " (--all shows all.)"
    if mended or all(KINDS[f.kind].mend is Mend.NOTHING for f in findings.all):
        return line
    path = Path(args.annotations)
    command = ["python", "-m", "msrcnn_d2.dataset_check", args.annotations]
    command += ["--no-images"] if args.no_images else [str(args.images)]
    command += ["--quick"] if args.quick else []
    command += arguments_for(settings_from(args))
    command += ["--fix", str(path.with_name(f"{path.stem}_fixed.json"))]
    return f"{line} To mend what can be mended:\n  {shlex.join(command)}"


def as_data(findings: Findings, mended: Mended | None, args: argparse.Namespace) -> dict:
    images = None if args.no_images else str(args.images)
    data = {"annotations": args.annotations, "images": images, **findings.as_data()}
    return {**data, "fixed": mended.as_data()} if mended else data


def has_failed(findings: Findings, strict: bool) -> bool:
    return bool(findings.of(Level.ERROR) or (strict and findings.of(Level.WARNING)))


if __name__ == "__main__":
    main()
