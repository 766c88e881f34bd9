"""Read masks of one class that programs write as PNG or TIFF files."""

import re
from collections.abc import Iterator

from ..utils.errors import UserError
from .shapes import objects_in, rle_in_place, rle_of
from .source import AnnotatedImage, Source, images_in, read_ids

__all__ = ["read_mask_images"]

# What tools add to the name of an image for that of its masks
MASK_SUFFIX = re.compile("[_-](cp_)?(masks?|labels?|instances?)$", re.IGNORECASE)
WHITE = 255  # the number of all objects in files that tell them only from the background


def read_mask_images(source: Source) -> Iterator[AnnotatedImage]:
    """
    The images of folders: IMAGE/images/*.png with IMAGE/masks/*.png, one file for each object, or
    one file for each image, with a number for each object.
    """
    label = (source.class_names or ["object"])[0]
    source.class_names = source.class_names or [label]
    folders = sorted(path.parent for path in source.path.rglob("masks") if path.is_dir())
    folders = [path for path in folders if (path / "images").is_dir()]
    if not source.images and folders:
        for folder in folders:
            pictures, files = images_in(folder / "images"), images_in(folder / "masks")
            if len(pictures) > 1:
                raise UserError(
                    f"'{folder}' has {len(pictures)} images: for one file with masks for each, "
                    f"give '{folder / 'masks'}' with --images '{folder / 'images'}'."
                )
            if not pictures or not files:
                source.skip(folder, f"it has {len(pictures)} images and {len(files)} masks")
                continue
            read = [read_ids(path, is_one_object=True)[0] > 0 for path in files]
            image = AnnotatedImage(source.name_of(pictures[0]), read[0].shape)
            for path, mask in zip(files, read):
                if mask.shape != image.size:
                    raise UserError(f"'{path}' has another size than '{files[0]}'.")
                image.objects.append((label, [rle_in_place(mask, 0, 0, image.size)]))
            yield image
        return
    if not source.images:
        raise UserError(
            f"'{source.path}' has no folders with images/ and masks/ in them: for files with a "
            "number for each object, give the folder of the images with --images."
        )
    images = {path.stem: path for path in images_in(source.images)}
    without_masks = set(images.values())
    for path in images_in(source.path):
        stems = path.stem, MASK_SUFFIX.sub("", path.stem)
        # Masks may lie beside the images
        picture = next((images[x] for x in stems if x in images and images[x] != path), None)
        if picture is None:
            if path not in images.values():
                source.skip(path, "there is no image of this name")
            continue
        without_masks -= {picture, path}
        ids, colors = read_ids(path)
        image = AnnotatedImage(source.name_of(picture), ids.shape)
        objects = dict(objects_in(ids))
        numbers = [*objects]
        if numbers == [WHITE] or [colors.get(x) for x in numbers] == [(WHITE, WHITE, WHITE)]:
            source.skip(path, "all its pixels have one number, so that they are one object")
        for pixels in objects.values():
            image.objects.append((label, [rle_of(pixels, image.size)]))
        yield image
    for path in sorted(without_masks):
        source.skip(source.name_of(path), "there are no masks of it")
