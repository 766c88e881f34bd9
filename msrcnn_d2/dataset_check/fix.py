"""
Write a copy of a dataset in which what a check has found is fixed or left out.

Only what has one right answer is fixed: a box and an area follow from the mask, the ids of
annotations refer to nothing, and a mask in another form can be rewritten. Entries without one are
left out, unless that would remove a whole category or all objects. Then they stay as they are.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from typing import IO

import pycocotools.mask as mask_util

from msrcnn_d2_runtime.image_reading import ImageSettings

from ..coco_format import Id, compressed, is_id, is_of_pairs, sides_of
from ..utils.errors import UserError
from .annotations import turned_rectangle
from .check import Dataset, find_issues, read_dataset
from .issues import KINDS, Finding, Findings, Fix, Level, first_lines
from .masks import box_of

__all__ = ["Change", "Fixed", "fix_dataset", "fix_issues"]

MAX_ROUNDS = 20  # a few are enough


@dataclass(frozen=True)
class Change:
    """What was done about a finding."""

    finding: Finding
    fix: Fix
    detail: str = ""

    def __str__(self) -> str:
        part = "" if self.finding.part is None else f", polygon {self.finding.part + 1}"
        place = f"{self.finding.place}{part}" if self.finding.place else self.finding.message
        return f"{place}: {self.detail}" if self.detail else place


@dataclass
class Fixed:
    """
    What was done to a dataset.

    Attributes:
        found: the findings in the dataset as it was.
        changes: one for each finding that was fixed, and one for each annotation that was left out
            with its image.
        left: the findings in the fixed dataset.
    """

    found: Findings
    changes: list[Change] = field(default_factory=list)
    left: Findings = field(default_factory=Findings)

    def summary(self, max_shown: int | None = 5) -> str:
        """What was done about each kind as text, with counts and ids."""
        groups = defaultdict(list)
        for change in self.changes:
            groups[change.finding.kind, change.fix].append(change)
        lines = []
        order = list(KINDS)
        for kind, fix in sorted(groups, key=lambda group: order.index(group[0])):
            changes = groups[kind, fix]
            of = "annotations" if fix is Fix.DROP_WITH_IMAGE else kind
            lines += [f"  {of} ({len(changes):,}): {fix.value}", *first_lines(changes, max_shown)]
        return "\n".join(lines)

    def as_data(self) -> dict:
        """The changes as plain data, for JSON."""
        changes = [
            {"fix": x.fix.value, "detail": x.detail, **asdict(x.finding)} for x in self.changes
        ]
        return {"changes": changes, "left": self.left.as_data()}


def fix_dataset(
    annotations: str,
    images: str | None,
    out: IO[str],
    quick: bool = False,
    num_workers: int | None = None,
    progress: bool = True,
    settings: ImageSettings | None = None,
    crowds_to_objects: bool = False,
) -> Fixed:
    """
    Check a dataset and write a fixed copy of its annotations.

    Args:
        out: where to write the copy; for the other arguments see :func:`check_dataset`.
        crowds_to_objects: whether each crowd is a single object, which no file says.

    Raises:
        UserError: the dataset cannot be read, or none of its images is in the folder.
    """
    dataset = read_dataset(annotations, images, quick, num_workers, progress, settings=settings)
    files = dataset.files
    if files and all(file.kind == "image-missing" for file in files.values()):
        raise UserError(
            f"None of the {len(files):,} images, such as '{next(iter(files))}', is in the folder "
            f"'{images}': give the right folder, as all images would be left out."
        )
    fixed = fix_issues(dataset, crowds_to_objects)
    out.write(json.dumps(dataset.contents))  # several times as fast as `json.dump`
    return fixed


def fix_issues(dataset: Dataset, crowds_to_objects: bool = False) -> Fixed:
    """
    Fix a dataset in place.

    It works in rounds, because a fix may reveal another problem: without a polygon that was far
    away, the box may no longer match the mask.

    Args:
        crowds_to_objects: whether each crowd is a single object, and gets iscrowd 0. No file says
            that: real crowds look the same.
    """
    found = find_issues(dataset)
    fixed = Fixed(found, left=found)
    if crowds_to_objects:
        for finding in found.all:
            if finding.kind in ("crowd", "crowd-mask"):
                dataset.contents["annotations"][finding.index]["iscrowd"] = 0
                fixed.changes.append(Change(finding, Fix.SET_CROWD))
        fixed.left = find_issues(dataset)
    for _ in range(MAX_ROUNDS):
        changes = _Round(dataset, fixed.left).run()
        if not changes:
            break
        fixed.changes += changes
        fixed.left = find_issues(dataset)
    return fixed


class _Round:
    """Fixes what can be fixed at once. Entries keep their places until the end of the round."""

    def __init__(self, dataset: Dataset, findings: Findings):
        self.dataset = dataset
        self.contents = dataset.contents
        self.changes: list[Change] = []
        self.dropped: dict[str, set[int]] = {
            k: set() for k in ("images", "categories", "annotations")
        }
        self.found = defaultdict(list)
        for finding in findings.all:
            self.found[KINDS[finding.kind].fix].append(finding)
        # The masks of an image without a valid size have not been checked, nor have any that are
        # not in pixels
        self.sizes: dict[Id, tuple[int, int]] = {}
        if not any(finding.kind == "normalised" for finding in findings.all):
            for image in self.contents["images"]:
                sides = sides_of(image) if isinstance(image, dict) else None
                if sides and is_id(image.get("id")):
                    self.sizes.setdefault(image["id"], sides)

    def run(self) -> list[Change]:
        for finding in self.found[Fix.DROP]:
            self._drop(finding)
        self._set_sizes()
        self._set_file_names()
        self._drop_images()
        self._drop_polygons()
        fixes: dict[Fix, Callable[[dict], object]] = {
            Fix.WRAP_POLYGON: lambda entry: entry.update(segmentation=[entry["segmentation"]]),
            Fix.FLATTEN_POLYGONS: _flatten_polygons,
            Fix.TURN_MASK: _turn_mask,
            Fix.SET_CROWD: lambda entry: entry.update(iscrowd=0),
            Fix.REMOVE_KEYPOINTS: lambda entry: entry.pop("keypoints"),
        }
        for fix, function in fixes.items():
            for finding, entry in self._kept(fix):
                function(entry)
                self.changes.append(Change(finding, fix))
        self._set_boxes_and_areas()
        self._renumber()
        for finding in self.found[Fix.WRITE_UTF8]:
            self.dataset.has_mark = False
            self.changes.append(Change(finding, Fix.WRITE_UTF8))
        for key, dropped in self.dropped.items():
            self.contents[key] = [x for k, x in enumerate(self.contents[key]) if k not in dropped]
        return self.changes

    def _drop(self, finding: Finding, fix: Fix = Fix.DROP) -> None:
        self.dropped[KINDS[finding.kind].of].add(finding.index)
        self.changes.append(Change(finding, fix))

    def _kept(self, fix: Fix) -> Iterator[tuple[Finding, dict]]:
        """Findings with this fix and their entries, without those that are left out."""
        for finding in self.found[fix]:
            of = KINDS[finding.kind].of
            if finding.index not in self.dropped[of]:
                yield finding, self.contents[of][finding.index]

    def _set_sizes(self) -> None:
        for finding, image in self._kept(Fix.SET_SIZE):
            file = (self.dataset.files or {}).get(finding.file_name or "")
            if file and file.size:
                image["height"], image["width"] = file.size
                self.changes.append(Change(finding, Fix.SET_SIZE))
            else:
                self._drop(finding)

    def _set_file_names(self) -> None:
        files = self.dataset.files or {}
        for finding, image in self._kept(Fix.SET_FILE_NAME):
            file = files[image["file_name"]]
            if file.other_name and file.other:
                image["file_name"] = file.other_name
                files[file.other_name] = file.other
                self.changes.append(Change(finding, Fix.SET_FILE_NAME, f"'{file.other_name}'"))

    def _drop_images(self) -> None:
        """Leave out images that differ but have the same id, and annotations without an image."""
        images, dropped = self.contents["images"], self.dropped["images"]
        by_id = defaultdict(list)
        for k, image in enumerate(images):
            if isinstance(image, dict) and is_id(image.get("id")):
                by_id[image["id"]].append(k)
        for id_, places in by_id.items():
            if any(images[k] != images[places[0]] for k in places):
                # It is not known which of them the annotations describe
                for k in set(places) - dropped:
                    name = images[k].get("file_name")
                    finding = Finding(
                        *("image-id-twice", Level.ERROR, "another image has the same id"),
                        image_id=id_,
                        file_name=name if isinstance(name, str) else None,
                        index=k,
                    )
                    self._drop(finding)
        gone = {id_ for id_, places in by_id.items() if dropped.issuperset(places)}
        for k, entry in enumerate(self.contents["annotations"]):
            if k in self.dropped["annotations"] or entry["image_id"] not in gone:
                continue
            id_ = entry.get("id")
            finding = Finding(
                *("unknown-image", KINDS["unknown-image"].level, "its image was left out"),
                image_id=entry["image_id"],
                annotation_id=id_ if is_id(id_) else None,
                index=k,
            )
            self._drop(finding, Fix.DROP_WITH_IMAGE)

    def _drop_polygons(self) -> None:
        """Leave out wrong polygons, and annotations that have no others."""
        by_annotation = defaultdict(list)
        for finding, _ in self._kept(Fix.DROP_POLYGON):
            by_annotation[finding.index].append(finding)
        for index, findings in by_annotation.items():
            entry, wrong = self.contents["annotations"][index], {f.part for f in findings}
            mask = [x for k, x in enumerate(entry["segmentation"]) if k not in wrong]
            if mask:
                entry["segmentation"] = mask
                self.changes += [Change(finding, Fix.DROP_POLYGON) for finding in findings]
            else:
                for finding in findings:
                    self._drop(finding)

    def _set_boxes_and_areas(self) -> None:
        mask_fixes = (Fix.DROP_POLYGON, Fix.WRAP_POLYGON, Fix.FLATTEN_POLYGONS, Fix.TURN_MASK)
        changing = {finding.index for fix in mask_fixes for finding in self.found[fix]}
        for fix in (Fix.SET_BOX, Fix.SET_AREA):
            for finding, entry in self._kept(fix):
                mask, size = entry["segmentation"], self.sizes.get(entry["image_id"])
                if size is None or finding.index in changing:
                    continue  # until the next round
                is_rle = isinstance(mask, dict)
                if fix is Fix.SET_AREA:
                    merged = compressed(mask) if is_rle else _merged(mask, size)
                    entry["area"] = int(mask_util.area(merged))
                elif is_rle:
                    entry["bbox"] = mask_util.toBbox(compressed(mask)).tolist()
                else:
                    entry["bbox"] = box_of(mask)
                self.changes.append(Change(finding, fix))

    def _renumber(self) -> None:
        """Give annotations the lowest free ids."""
        entries = (x for x in self.contents["annotations"] if isinstance(x, dict))
        used = {x["id"] for x in entries if is_id(x.get("id"))}
        free = (k for k in count(1) if k not in used)
        for finding, entry in self._kept(Fix.RENUMBER):
            entry["id"] = next(free)
            self.changes.append(Change(finding, Fix.RENUMBER, f"id {entry['id']}"))


def _merged(polygons: list, size: tuple[int, int]) -> dict:
    return mask_util.merge(mask_util.frPyObjects(polygons, *size))


def _turn_mask(entry: dict) -> None:
    polygon = turned_rectangle(entry)
    assert polygon is not None  # it was when it was found, and nothing else has changed the mask
    entry["segmentation"] = [polygon]
    entry["bbox"] = box_of([polygon])
    entry["attributes"] = {**entry["attributes"], "rotation": 0}  # it must not be turned again


def _flatten_polygons(entry: dict) -> None:
    mask = entry["segmentation"]
    mask = [mask] if is_of_pairs(mask) else mask
    entry["segmentation"] = [[*chain.from_iterable(x)] if is_of_pairs(x) else x for x in mask]
