"""
Reads stage1_train of the 2018 Data Science Bowl, as a folder or as the downloaded zip::

    <id>/images/<id>.png    one image
    <id>/masks/*.png        one nucleus each, not zero where it is
"""

import io
import re
import sys
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from tqdm import tqdm

from msrcnn_d2.utils.errors import UserError

MIN_AREA = 5  # pixels; fewer are a slip of the pen
# A zip may have it all in one more folder. Names that begin with a dot are what macOS leaves.
PNG_NAME = re.compile(r"(?:.*/)?(?P<id>[^/]+)/(?P<kind>images|masks)/[^/.][^/]*\.png")
# What Pillow, and a zip with a broken file in it, can raise
BROKEN_FILE = (
    *(OSError, EOFError, SyntaxError, ValueError, zlib.error, zipfile.BadZipFile),
    Image.DecompressionBombError,  # a size that nobody would believe
)


@dataclass
class Sample:
    """
    One image and its nuclei.

    Attributes:
        id: the name of its folder.
        image: (H, W, 3) uint8, RGB.
        nuclei: one COCO annotation each, in the order of the names of the masks, without ids.
            Areas and boxes (x, y, width, height) are in pixels.
    """

    id: str
    image: np.ndarray
    nuclei: list[dict]


class Stage1:
    """
    Iterating over it gives the samples that can be used, in the order of their ids.

    Attributes:
        left_out: what of how many could not be used, so far; broken files are also named on
            stderr.
    """

    def __init__(self, path: Path, max_size: int):
        """
        Args:
            path: of a folder or zip.
            max_size: of the longer side of an image, in pixels.

        Raises:
            UserError: this is not stage1_train.
        """
        self._files = _open(path)
        self._max_size = max_size
        self._images, self._masks = _find_pngs(self._files.namelist())
        _check(path, self._images, self._masks)
        self.left_out: Counter[str] = Counter()

    def __len__(self) -> int:
        """The number of images, also of those that cannot be used."""
        return len(self._images)

    def __iter__(self) -> Iterator[Sample]:
        for id in tqdm(sorted(self._images), desc="reading", unit="image"):
            image = self._read_image(self._images[id])
            if image is not None:
                yield Sample(id, image, list(self._read_nuclei(id, image.shape[:2])))

    def _read_image(self, name: str) -> np.ndarray | None:
        try:
            with Image.open(io.BytesIO(self._files.read(name))) as image:
                if max(image.size) > self._max_size:
                    self.left_out[f"image(s) over {self._max_size} px"] += 1
                    return None
                if image.mode.startswith(("I", "F")):
                    raise ValueError("more than 8 bits per channel")  # Pillow would clip them
                return np.asarray(image.convert("RGB"))  # which drops alpha
        except BROKEN_FILE as error:
            self._leave_out("unreadable image(s)", name, str(error))
            return None

    def _read_nuclei(self, id: str, size: tuple[int, int]) -> Iterator[dict]:
        """``size`` is height, width."""
        if id not in self._masks:
            self._warn(id, "has no masks, kept as an image without nuclei")
        for name in sorted(self._masks[id]):
            mask = self._read_mask(name)
            if mask is None:
                continue
            if mask.shape != size:
                what = f"{_times(mask.shape)} px for an image of {_times(size)} px"
                self._leave_out("mask(s) of another size than the image", name, what)
            elif mask.sum() < MIN_AREA:
                self.left_out[f"mask(s) under {MIN_AREA} px"] += 1
            else:
                yield _annotation(mask)

    def _read_mask(self, name: str) -> np.ndarray | None:
        """(H, W) bool"""
        try:
            with Image.open(io.BytesIO(self._files.read(name))) as image:
                gray = image if image.mode.startswith("I") else image.convert("L")
                return np.asarray(gray) > 0
        except BROKEN_FILE as error:
            self._leave_out("unreadable mask(s)", name, str(error))
            return None

    def _leave_out(self, what: str, name: str, why: str) -> None:
        self.left_out[what] += 1
        self._warn(name, f"left out: {why}")

    def _warn(self, name: str, message: str) -> None:
        tqdm.write(f"warning: {name}: {message}", file=sys.stderr)


class _Folder:
    """Of a folder what :class:`zipfile.ZipFile` has for a zip."""

    def __init__(self, path: Path):
        self.path = path

    def namelist(self) -> list[str]:
        return [png.relative_to(self.path).as_posix() for png in self.path.glob("*/*/*.png")]

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


def _open(path: Path) -> "zipfile.ZipFile | _Folder":
    if path.is_dir():
        return _Folder(path)
    if not path.exists():
        raise UserError(f"There is no '{path}': give the stage1_train folder or its zip.")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(
            f"'{path}' is neither a folder nor a whole zip: give the stage1_train folder or "
            "download its zip again."
        ) from None


def _find_pngs(names: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """
    Returns:
        id -> name of its image, and id -> names of its masks, for those that have masks
    """
    images: dict[str, str] = {}
    masks: dict[str, list[str]] = defaultdict(list)
    for name in names:
        match = PNG_NAME.fullmatch(name)
        if match and match["kind"] == "masks":
            masks[match["id"]].append(name)
        elif match:
            if match["id"] in images:
                raise UserError(
                    f"'{name}' and '{images[match['id']]}' are two images of the same id: "
                    "remove one of them."
                )
            images[match["id"]] = name
    return images, masks


def _check(path: Path, images: dict[str, str], masks: dict[str, list[str]]) -> None:
    if not images:
        raise UserError(
            f"'{path}' is not stage1_train, it has no <id>/images/<id>.png: "
            + (_suggestion(path) or "give the folder that has one folder per image, or its zip.")
        )
    if not masks:
        raise UserError(
            f"'{path}' has images but no <id>/masks/*.png: give stage1_train, the only part of "
            "the download that has masks beside its images."
        )


def _suggestion(path: Path) -> str | None:
    """What inside of a folder looks more like stage1_train than the folder does."""
    folders = {png.parents[2] for png in path.glob("*/*/images/*.png")}
    # stage1_test has images too, but no masks
    with_masks = {folder for folder in folders if any(folder.glob("*/masks"))}
    likely = sorted(with_masks or folders) or sorted(path.glob("*stage1_train*.zip"))
    return f"'{likely[0]}' looks right." if likely else None


def _annotation(mask: np.ndarray) -> dict:
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "category_id": 1,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
        "area": int(mask_util.area(rle)),
        "bbox": [int(x) for x in mask_util.toBbox(rle)],
        "iscrowd": 0,
    }


def _times(size: tuple[int, ...]) -> str:
    height, width = size
    return f"{width} x {height}"
