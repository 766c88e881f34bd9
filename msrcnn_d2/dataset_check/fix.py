"""
Mend what a check of a dataset has found, as far as a program can.

It goes in rounds, as mending one thing shows another: without a polygon that was far away, the box
is no longer that of the mask.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from .annotations import id_or_none, is_id, sides_of
from .check import check_contents
from .findings import Finding, Findings, Id, first, place_of
from .images import ImageFile
from .kinds import KINDS, Mend
from .masks import compressed, is_of_pairs

__all__ = ["Change", "Mended", "mend_contents"]

# Mends an entry, and says how; not at all if that has to wait for the next round
Mender = Callable[[dict, Finding], Mend | None]

MAX_ROUNDS = 20  # a few are enough; to mend for ever would be a mistake of this code

DROPS = {
    Mend.DROP_IMAGE: "images",
    Mend.DROP_CATEGORY: "categories",
    Mend.DROP_ANNOTATION: "annotations",
}
UNSETTLED = (Mend.DROP_POLYGON, Mend.WRAP_POLYGON, Mend.FLATTEN_POLYGONS)
REFERENCES = {"images": "image_id", "categories": "category_id"}  # keys of annotations


@dataclass(frozen=True)
class Change:
    """What was done about a finding; `detail` is for example the new id."""

    finding: Finding
    mend: Mend
    detail: str = ""

    def __str__(self) -> str:
        finding = self.finding
        place = place_of(finding.image_id, finding.annotation_id, finding.file_name)
        part = "" if finding.part is None else f", polygon {finding.part + 1}"
        detail = f": {self.detail}" if self.detail else ""
        return f"{place}{part}{detail}" if place else f"{finding.message}{detail}"


@dataclass
class Mended:
    """
    What mending has done, and what is left.

    Attributes:
        changes: one for each finding that was mended, and for each annotation that went with its
            image.
        left: of a check of the mended contents.
    """

    changes: list[Change] = field(default_factory=list)
    left: Findings = field(default_factory=Findings)

    def summary(self, max_shown: int | None = 5) -> str:
        """Text: what was done about each kind, with counts and ids."""
        groups = defaultdict(list)
        for change in self.changes:
            groups[change.finding.kind, change.mend].append(change)
        lines = []
        order = list(KINDS)
        for kind, mend in sorted(groups, key=lambda group: order.index(group[0])):
            changes = groups[kind, mend]
            of = "of images that were dropped" if mend is Mend.DROP_WITH_IMAGE else kind
            lines += [f"  {of} ({len(changes):,}): {mend.value}"]
            lines += [f"    - {x}" for x in first(changes, max_shown)]
        return "\n".join(lines)

    def as_data(self) -> dict:
        """All of it as what JSON can hold."""
        changes = [
            {"mend": x.mend.value, "detail": x.detail, **asdict(x.finding)} for x in self.changes
        ]
        return {"changes": changes, "left": self.left.as_data()}


def mend_contents(contents: dict, files: dict[str, ImageFile] | None, findings: Findings) -> Mended:
    """
    Args:
        contents: from :func:`read_contents`; modified in place.
        files: from :func:`read_images`.
        findings: of :func:`check_contents` for these.
    """
    mended = Mended(left=findings)
    for _ in range(MAX_ROUNDS):
        if not _Round(contents, files, mended).run():
            break
        mended.left = check_contents(contents, files)
    return mended


class _Round:
    """Mends what can be mended at once. Entries keep their places until its end."""

    def __init__(self, contents: dict, files: dict[str, ImageFile] | None, mended: Mended):
        self._contents, self._files, self._mended = contents, files, mended
        self._dropped: dict[str, set[int]] = {key: set() for key in DROPS.values()}
        self._sizes = _sizes_of(contents["images"])
        # In this order: what is ignored becomes a crowd, whatever its iscrowd was
        self._menders: dict[Mend, Mender] = {
            Mend.WRAP_POLYGON: _wrap_polygon,
            Mend.FLATTEN_POLYGONS: _flatten_polygons,
            Mend.SET_NAME: _set_name,
            Mend.SET_BOX: self._set_box,
            Mend.SET_AREA: self._set_area,
            Mend.SET_CROWD: _set_crowd,
            Mend.SET_IGNORED: _set_ignored,
            Mend.REMOVE_KEYPOINTS: _remove_keypoints,
        }

    def run(self) -> bool:
        """Whether there was anything to mend."""
        found = defaultdict(list)
        for finding in self._mended.left.all:
            found[KINDS[finding.kind].mend].append(finding)
        before = len(self._mended.changes)
        for mend, key in DROPS.items():
            self._dropped[key] |= {finding.index for finding in found[mend]}
            self._mended.changes += [Change(finding, mend) for finding in found[mend]]
        self._mend(found[Mend.SET_SIZE], self._set_size)
        self._mended.changes += [Change(f, Mend.WRITE_UTF8) for f in found[Mend.WRITE_UTF8]]
        self._scale(found[Mend.SCALE])
        self._drop_with_images()
        self._drop_polygons(found[Mend.DROP_POLYGON])
        # Where the mask itself is mended, the box and the area wait for the next round
        self._unsettled = {f.index for mend in UNSETTLED for f in found[mend]}
        for mend, mender in self._menders.items():
            self._mend(found[mend], mender)
        self._renumber(found[Mend.RENUMBER])
        for key, dropped in self._dropped.items():
            entries = self._contents[key]
            self._contents[key] = [x for k, x in enumerate(entries) if k not in dropped]
        return len(self._mended.changes) > before

    def _kept(self, findings: Iterable[Finding]) -> Iterator[tuple[Finding, Any]]:
        """Findings with their entries, without those that are dropped."""
        for finding in findings:
            key = KINDS[finding.kind].of
            if finding.index not in self._dropped[key]:
                yield finding, self._contents[key][finding.index]

    def _mend(self, findings: Iterable[Finding], mender: Mender) -> None:
        for finding, entry in self._kept(findings):
            mend = mender(entry, finding)
            if mend:
                self._mended.changes.append(Change(finding, mend))

    def _set_size(self, entry: dict, finding: Finding) -> Mend:
        file = (self._files or {}).get(finding.file_name or "")
        if file and file.size:
            entry["height"], entry["width"] = file.size
            return Mend.SET_SIZE
        self._dropped["images"].add(finding.index)
        return Mend.DROP_IMAGE

    def _scale(self, findings: list[Finding]) -> None:
        """Make pixels of coordinates from 0 to 1: polygons, boxes or both, as the finding says."""
        if not findings:
            return
        sizes = _sizes_of(self._contents["images"])
        keys = {"polygons": "segmentation", "boxes": "bbox"}
        used = [key for noun, key in keys.items() if noun in findings[0].message]
        for entry in self._contents["annotations"]:
            if not isinstance(entry, dict) or not is_id(entry.get("image_id")):
                continue
            height, width = sizes.get(entry["image_id"], (1, 1))
            for key in used:
                if isinstance(entry.get(key), list):
                    entry[key] = _scaled(entry[key], (width, height))
        self._mended.changes += [Change(finding, Mend.SCALE) for finding in findings]

    def _drop_with_images(self) -> None:
        """Drop the annotations of images that are dropped; another one may have the same id."""
        gone: set[Id] = set()
        kept: set[Id] = set()
        for k, image in enumerate(self._contents["images"]):
            if isinstance(image, dict) and is_id(image.get("id")):
                (gone if k in self._dropped["images"] else kept).add(image["id"])
        gone -= kept
        for k, entry in enumerate(self._contents["annotations"]):
            if k in self._dropped["annotations"] or not is_id(entry.get("image_id")):
                continue
            if entry["image_id"] in gone:
                self._dropped["annotations"].add(k)
                finding = Finding(
                    "unknown-image",
                    KINDS["unknown-image"].level,
                    "its image was dropped",
                    image_id=entry["image_id"],
                    annotation_id=id_or_none(entry.get("id")),
                    index=k,
                )
                self._mended.changes.append(Change(finding, Mend.DROP_WITH_IMAGE))

    def _drop_polygons(self, findings: Iterable[Finding]) -> None:
        by_annotation = defaultdict(list)
        for finding, _ in self._kept(findings):
            by_annotation[finding.index].append(finding)
        for index, group in by_annotation.items():
            wrong = {finding.part for finding in group}
            entry = self._contents["annotations"][index]
            mask = [x for k, x in enumerate(entry["segmentation"]) if k not in wrong]
            mend = Mend.DROP_POLYGON if mask else Mend.DROP_ANNOTATION
            if mask:
                entry["segmentation"] = mask
            else:
                self._dropped["annotations"].add(index)
            self._mended.changes += [Change(finding, mend) for finding in group]

    def _set_box(self, entry: dict, finding: Finding) -> Mend | None:
        if not self._is_settled(entry, finding):
            return None
        mask = entry["segmentation"]
        if isinstance(mask, dict):
            entry["bbox"] = mask_util.toBbox(compressed(mask)).tolist()
        else:
            points = np.concatenate([np.array(x, dtype=float).reshape(-1, 2) for x in mask])
            low, high = points.min(axis=0), points.max(axis=0)
            entry["bbox"] = [*low.tolist(), *(high - low).tolist()]
        return Mend.SET_BOX

    def _set_area(self, entry: dict, finding: Finding) -> Mend | None:
        if not self._is_settled(entry, finding):
            return None
        mask = entry["segmentation"]
        if isinstance(mask, dict):
            rle = compressed(mask)
        else:
            rle = mask_util.merge(mask_util.frPyObjects(mask, *self._sizes[entry["image_id"]]))
        entry["area"] = int(mask_util.area(rle))
        return Mend.SET_AREA

    def _is_settled(self, entry: dict, finding: Finding) -> bool:
        """Whether the mask, and the size of its image, have been found right."""
        return finding.index not in self._unsettled and entry["image_id"] in self._sizes

    def _renumber(self, findings: Iterable[Finding]) -> None:
        """Give the lowest free ids, and tell the annotations."""
        by_key = defaultdict(list)
        for finding, entry in self._kept(findings):
            by_key[KINDS[finding.kind].of].append((finding, entry))
        for key, pairs in by_key.items():
            used = {
                x["id"] for x in self._contents[key] if isinstance(x, dict) and is_id(x.get("id"))
            }
            free = (k for k in itertools.count(1) if k not in used)
            new_ids = {}
            for finding, entry in pairs:
                new_id = next(free)
                if key != "annotations":
                    new_ids[entry["id"]] = new_id
                entry["id"] = new_id
                self._mended.changes.append(Change(finding, Mend.RENUMBER, f"id {new_id}"))
            self._tell_annotations(REFERENCES.get(key, ""), new_ids)

    def _tell_annotations(self, reference: str, new_ids: dict) -> None:
        if not new_ids:
            return
        for entry in self._contents["annotations"]:
            if isinstance(entry, dict) and is_id(entry.get(reference)):
                entry[reference] = new_ids.get(entry[reference], entry[reference])


def _sizes_of(images: list) -> dict[Id, tuple[int, int]]:
    """By id the height and width of the images that have them."""
    sizes: dict[Id, tuple[int, int]] = {}
    for image in images:
        sides = sides_of(image) if isinstance(image, dict) and is_id(image.get("id")) else None
        if sides:
            sizes.setdefault(image["id"], sides)
    return sizes


def _wrap_polygon(entry: dict, finding: Finding) -> Mend:
    entry["segmentation"] = [entry["segmentation"]]
    return Mend.WRAP_POLYGON


def _flatten_polygons(entry: dict, finding: Finding) -> Mend:
    mask = entry["segmentation"]
    mask = [mask] if is_of_pairs(mask) else mask
    entry["segmentation"] = [
        list(itertools.chain.from_iterable(x)) if is_of_pairs(x) else x for x in mask
    ]
    return Mend.FLATTEN_POLYGONS


def _scaled(shape: list, factors: tuple[int, int]) -> list:
    """Lists of x, y, x, y, ..., at any depth, times the factors of x and y."""
    return [
        _scaled(x, factors)
        if isinstance(x, list)
        else (x * factors[k % 2] if isinstance(x, (int, float)) else x)
        for k, x in enumerate(shape)
    ]


def _set_name(entry: dict, finding: Finding) -> Mend:
    entry["name"] = str(entry.get("id"))
    return Mend.SET_NAME


def _set_crowd(entry: dict, finding: Finding) -> Mend:
    entry["iscrowd"] = int(_is_meant(entry.get("iscrowd")))
    return Mend.SET_CROWD


def _set_ignored(entry: dict, finding: Finding) -> Mend:
    if _is_meant(entry["ignore"]):
        entry["iscrowd"] = 1
    entry["ignore"] = 0
    return Mend.SET_IGNORED


def _is_meant(value: Any) -> bool:
    """Whether something in place of 0 or 1 is rather 1; in doubt an object is not learnt from."""
    return bool(value) and str(value).lower() not in ("0", "false", "no")


def _remove_keypoints(entry: dict, finding: Finding) -> Mend:
    del entry["keypoints"]
    return Mend.REMOVE_KEYPOINTS
