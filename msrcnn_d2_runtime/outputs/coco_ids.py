"""Ids of images and classes in files in COCO's format."""

import json
from collections.abc import Sequence
from pathlib import PurePosixPath

from ..errors import UserError
from ..text import listed

__all__ = ["CocoIds"]


class CocoIds:
    """
    Without annotations, classes have the ids 1, 2, ... in their order, and so have images when they
    are sorted by name. With annotations of the same images both have the ids that they have there,
    so that the predictions can be evaluated.

    Attributes:
        category_ids: index of a class -> its id.
    """

    def __init__(self, class_names: Sequence[str], annotations: str | None = None):
        """
        Args:
            annotations: path of a JSON file in COCO's format.

        Raises:
            UserError: the file cannot be read, or lacks classes.
        """
        self.category_ids = list(range(1, len(class_names) + 1))
        self._annotations = annotations
        if annotations is None:
            return
        try:
            with open(annotations, "rb") as f:
                contents = json.load(f)
            categories = {x["name"]: x["id"] for x in contents["categories"]}
            images = {x["file_name"]: x["id"] for x in contents["images"]}
        except OSError as error:
            raise UserError(f"'{annotations}' cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"'{annotations}' has no images and categories in COCO's format: give the "
                "annotations that the predictions will be compared with."
            ) from None
        missing = [name for name in class_names if name not in categories]
        if missing:
            raise UserError(
                f"'{annotations}' lacks classes of the model ({listed(missing)}): give the "
                "annotations of a dataset with the classes that the model was trained on."
            )
        self.category_ids = [categories[name] for name in class_names]
        # End of a path -> id of the image, or None if several images have this end
        self._by_end: dict[str, int | None] = {}
        for name, image_id in images.items():
            for end in _ends_of(name)[1:]:
                self._by_end[end] = None if end in self._by_end else image_id
        self._images = images
        self._users: dict[int, str] = {}

    def check(self, name: str) -> None:
        """
        Raises:
            UserError: the annotations do not have this image, or another image has its id already.
        """
        if self._annotations is None:
            return
        # Either of the names may begin with folders that the other leaves out
        known = [self._images[end] for end in _ends_of(name) if end in self._images]
        image_id = known[0] if known else self._by_end.get(name)
        if image_id is None:
            raise UserError(
                f"'{self._annotations}' does not have the image '{name}': predict on images that "
                "it has, or leave out the annotations."
            )
        user = self._users.setdefault(image_id, name)
        if user != name:
            raise UserError(
                f"'{user}' and '{name}' would both be image {image_id} of '{self._annotations}': "
                "predict on a folder that has the images under the names in the annotations."
            )

    def image_ids(self, names: Sequence[str]) -> dict[str, int]:
        """
        Args:
            names: of all images, which have passed :meth:`check`.
        """
        if self._annotations is None:
            return {name: k for k, name in enumerate(sorted(names), start=1)}
        return {name: image_id for image_id, name in self._users.items()}


def _ends_of(name: str) -> list[str]:
    """A path without none, one, two, ... of its first folders."""
    parts = PurePosixPath(name).parts
    return ["/".join(parts[k:]) for k in range(len(parts))]
