"""What a check of a dataset has found."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..utils.text import plural, shown
from .kinds import KINDS, Level

__all__ = ["BAD_IMAGES", "Finding", "Findings", "Id", "Level"]

Id = int | float | str


@dataclass(frozen=True)
class Finding:
    """
    One thing that is wrong with a dataset, or good to know.

    Attributes:
        kind: one of `KINDS`, which says what comes of it.
        message: a few words on what was met.
        image_id, annotation_id, file_name: where; None if it is not about one, or there is none.
        index: place in the list of the file that the kind is about, from 0 on; -1 if about none.
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

    def __str__(self) -> str:
        place = place_of(self.image_id, self.annotation_id, self.file_name)
        return f"{place}: {self.message}" if place else self.message


def place_of(image_id: Id | None, annotation_id: Id | None, file_name: str | None) -> str:
    """Such as "image 12 'a.jpg', annotation 345"; empty if there is nothing to say."""
    image = [] if image_id is None else [shown(image_id)]
    image += [] if file_name is None else [repr(file_name)]
    places = [f"image {' '.join(image)}"] if image else []
    places += [] if annotation_id is None else [f"annotation {shown(annotation_id)}"]
    return ", ".join(places)


@dataclass
class Findings:
    """
    What :func:`check_dataset` has found.

    Attributes:
        all: as they were found.
        num_images, num_annotations, num_categories: entries of the file.
        num_files: images that were looked at; None if none were to be.
        has_annotations: whether the file has a list of annotations, and be it empty.
        objects_per_image: numbers of objects that are no crowds, by image id; without zeros.
        mask_format: of Detectron2 for training, "polygon" or "bitmask": the latter as soon as an
            object that is not a crowd has RLE.
    """

    all: list[Finding] = field(default_factory=list)
    num_images: int = 0
    num_annotations: int = 0
    num_categories: int = 0
    num_files: int | None = None
    has_annotations: bool = True
    objects_per_image: dict[Id, int] = field(default_factory=dict)
    mask_format: str = "polygon"

    def add(self, kind: str, message: str, **where: Any) -> None:
        self.all.append(Finding(kind, KINDS[kind].level, message, **where))

    def of(self, level: Level) -> list[Finding]:
        return [f for f in self.all if f.level == level]

    @property
    def bad_images(self) -> list[Finding]:
        """Files that are missing, cannot be read, are cut off or have another size."""
        return [f for f in self.all if f.kind in BAD_IMAGES]

    def by_kind(self) -> dict[str, list[Finding]]:
        """In the order of KINDS, from errors to notes."""
        found = defaultdict(list)
        for finding in self.all:
            found[finding.kind].append(finding)
        return {kind: found[kind] for kind in KINDS if kind in found}

    def summary(self, max_shown: int | None = 5) -> str:
        """
        Text: for each level its kinds, with counts and examples.

        Args:
            max_shown: examples of each kind; None for all.
        """
        found = self.by_kind()
        lines = []
        for level in Level:
            of_level = {k: v for k, v in found.items() if KINDS[k].level == level}
            if of_level:
                count = sum(map(len, of_level.values()))
                lines += [f"{level.value.upper()}S: {count:,}"]
            for kind, findings in of_level.items():
                lines += self._lines_of_kind(kind, findings, max_shown)
        return "\n".join(lines)

    def _lines_of_kind(
        self, kind: str, findings: list[Finding], max_shown: int | None
    ) -> list[str]:
        about = KINDS[kind]
        if not about.of:  # there is one, which says it all
            return [f"  {kind}: {findings[0].message}", f"      {about.effect}"]
        count = f"{len(findings):,}"
        if kind == "area-differs":  # the share tells noise from another way to compute areas
            count += f" of {self.num_annotations:,}"
        lines = [f"  {kind} ({count}): {about.title}", f"      {about.effect}"]
        return lines + [f"    - {x}" for x in first(findings, max_shown)]

    def totals(self) -> str:
        """Such as "2 errors, 1 warning, 3 notes"."""
        return ", ".join(plural(len(self.of(level)), level.value) for level in Level)

    def as_data(self) -> dict:
        """All of it as what JSON can hold."""
        return {
            "num_images": self.num_images,
            "num_annotations": self.num_annotations,
            "num_categories": self.num_categories,
            "num_files": self.num_files,
            "mask_format": self.mask_format,
            "counts": {kind: len(findings) for kind, findings in self.by_kind().items()},
            "findings": [asdict(f) for f in self.all],
        }


BAD_IMAGES = ("image-missing", "image-unreadable", "image-truncated", "image-size")


def first(items: list, max_shown: int | None) -> Iterable[str]:
    """As text, and how many there are besides."""
    yield from map(str, items[:max_shown])
    more = len(items) - len(items[:max_shown])
    if more:
        yield f"... and {more:,} more"
