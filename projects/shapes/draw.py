"""
Draws an instance segmentation dataset in COCO format: textured stars, moons, hearts and rings
that overlap and hide one another on a textured background.

What it writes::

    OUT_DIR/train.json, val.json   COCO annotations, masks of the visible parts as compressed RLE
    OUT_DIR/train/, val/           PNG images, SIZE x SIZE pixels, RGB
    OUT_DIR/complete.json          the parameters it was drawn with, written last

The same seed gives the same bytes: each image has a random generator of its own, seeded by
(seed, split, index), so neither the number of images nor the order of drawing matters.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw
from tqdm import tqdm

SPLITS = ("train", "val")
LICENSE_URL = "https://creativecommons.org/publicdomain/zero/1.0/"
SIZE = 128  # height and width of an image, pixels
SUPERSAMPLING = 4  # an outline is drawn at 4 x 4 subpixels, which gives it a soft edge
NUM_OBJECTS = (2, 6)  # fewest and most objects that are tried per image
RADIUS = (13.0, 36.0)  # smallest and largest radius of an object, pixels
CONTRAST = (0.35, 1.0)  # share of an object's own colours, the rest is the background's mean
MIN_VISIBLE = 0.35  # no object is hidden further than to this share of its area in the image
MIN_AREA = 80  # smallest visible area of an object, pixels

# One figure is a list of (points, fill): polygons of (K, 2) float points x, y around the origin,
# with a radius of about 1, drawn one after the other; fill 0 cuts out of what was drawn before.
Figure = list[tuple[np.ndarray, int]]


def _circle(radius: float, center_x: float = 0.0) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([radius * np.cos(angles) + center_x, radius * np.sin(angles)], axis=1)


def star(rng: np.random.Generator) -> Figure:
    """Five or six spikes of unequal length."""
    num_spikes = int(rng.integers(5, 7))
    radii = np.tile([1.0, rng.uniform(0.4, 0.55)], num_spikes)
    radii *= rng.uniform(0.88, 1.08, size=radii.shape)
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    return [(radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1), 1)]


def moon(rng: np.random.Generator) -> Figure:
    """A crescent: a disc out of which a shifted disc is cut."""
    return [(_circle(1.0), 1), (_circle(rng.uniform(0.75, 0.9), rng.uniform(0.45, 0.65)), 0)]


def heart(rng: np.random.Generator) -> Figure:
    """The usual curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t."""
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(np.stack([x * rng.uniform(0.9, 1.1), -y - 2.5], axis=1) / 15, 1)]


def ring(rng: np.random.Generator) -> Figure:
    """A disc with a hole, through which one sees what lies behind."""
    return [(_circle(1.0), 1), (_circle(rng.uniform(0.42, 0.58)), 0)]


CLASSES: dict[str, Callable[[np.random.Generator], Figure]] = {
    "star": star,
    "moon": moon,
    "heart": heart,
    "ring": ring,
}


def _irregular(points: np.ndarray, waves: np.ndarray) -> np.ndarray:
    """Dents an outline; ``waves`` is (W, 2): amplitude and phase of the 2nd, 3rd, ... harmonic."""
    angles = np.arctan2(points[:, 1], points[:, 0])
    factor = np.ones(len(points))
    for order, (amplitude, phase) in enumerate(waves, start=2):
        factor += amplitude * np.cos(order * angles + phase)
    return points * factor[:, None]


def draw_coverage(rng: np.random.Generator, category: str) -> np.ndarray:
    """
    Puts one object of a class somewhere in an empty image.

    Returns:
        (SIZE, SIZE) float array: share of each pixel that the object covers, in [0, 1].
    """
    radius = np.exp(rng.uniform(*np.log(RADIUS)))
    center = rng.uniform(0.4 * radius, SIZE - 0.4 * radius, size=2)
    return draw_coverage_at(rng, category, radius, center, SIZE)


def draw_coverage_at(
    rng: np.random.Generator, category: str, radius: float, center: np.ndarray, size: int
) -> np.ndarray:
    """
    Args:
        radius, center: of the object, in pixels; the centre is x, y.

    Returns:
        (size, size) float array: share of each pixel that the object covers, in [0, 1].
    """
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.array([1.0, rng.uniform(0.75, 1.0)])
    waves = np.stack([rng.uniform(0, 0.06, size=4), rng.uniform(0, 2 * np.pi, size=4)], axis=1)

    canvas = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    for points, fill in CLASSES[category](rng):
        points = (_irregular(points, waves) * stretch) @ rotation.T * radius + center
        outline = [tuple(point) for point in (points * SUPERSAMPLING).tolist()]
        ImageDraw.Draw(canvas).polygon(outline, fill=255 * fill)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def smooth_noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """(size, size) random field in about [-1, 1] that varies over SIZE / cells pixels."""
    cells = max(round(cells * size / SIZE), 2)
    coarse = rng.uniform(-1, 1, size=(cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size) soft waves in [-1, 1], of a random direction and a period of 4 to 12 pixels."""
    angle, phase = rng.uniform(0, 2 * np.pi, size=2)
    along = 2 * np.pi / rng.uniform(4, 12) * np.arange(size, dtype=np.float32)
    x, y = along * np.float32(np.cos(angle)), along * np.float32(np.sin(angle))
    return np.sin(x[None] + y[:, None] + np.float32(phase))


def _pattern(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size) texture in about [-1, 1]: clouds, grain, stripes or a weave."""
    kind = rng.integers(4)
    if kind == 0:
        return smooth_noise(rng, 12, size)
    if kind == 1:
        return smooth_noise(rng, 48, size)
    if kind == 2:
        return stripes(rng, size)
    return stripes(rng, size) * stripes(rng, size)


def draw_texture(
    rng: np.random.Generator,
    strength: float,
    size: int = SIZE,
    pattern: Callable[[np.random.Generator, int], np.ndarray] = _pattern,
) -> np.ndarray:
    """(size, size, 3) RGB values in about [0, 255]: two colours mixed by a pattern, and shading."""
    first = rng.uniform(40, 230, size=3).astype(np.float32)
    change = rng.uniform(-90, 90, size=3).astype(np.float32) * strength
    second = np.clip(first + change, 0, 255)
    share = 0.5 + 0.5 * pattern(rng, size)[..., None]
    shading = 1 + 0.15 * smooth_noise(rng, 3, size)[..., None]
    return (second + (first - second) * share) * shading


@dataclass
class Scene:
    """
    One drawn image.

    Attributes:
        image: (SIZE, SIZE, 3) uint8, RGB.
        categories: class name of each object, from the farthest to the nearest.
        masks: (N, SIZE, SIZE) bool, visible part of each object.
        visible_shares: visible area / area within the image, of each object.
    """

    image: np.ndarray
    categories: list[str]
    masks: np.ndarray
    visible_shares: list[float]


def _place_objects(rng: np.random.Generator) -> tuple[list[str], list[np.ndarray], np.ndarray]:
    """
    Piles objects up and leaves out those that would hide another one too far.

    Returns:
        class names, coverages, and an (SIZE, SIZE) map of the object on top, -1 for none
    """
    categories: list[str] = []
    coverages: list[np.ndarray] = []
    top = np.full((SIZE, SIZE), -1)
    for _ in range(rng.integers(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1)):
        category = str(rng.choice(list(CLASSES)))
        coverage = draw_coverage(rng, category)
        piled = np.where(coverage > 0.5, len(coverages), top)
        if all(_well_visible(piled == i, c) for i, c in enumerate(coverages + [coverage])):
            top = piled
            categories.append(category)
            coverages.append(coverage)
    return categories, coverages, top


def _well_visible(mask: np.ndarray, coverage: np.ndarray) -> bool:
    return mask.sum() >= max(MIN_AREA, MIN_VISIBLE * (coverage > 0.5).sum())


def cast_shadow(image: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Darkens what lies below and to the right of an object: a soft edge that is not its own."""
    drawn = Image.fromarray(coverage)
    blurred = np.asarray(drawn.reduce(4).resize(drawn.size, Image.Resampling.BICUBIC))
    shadow = np.pad(blurred[:-2, :-2], ((2, 0), (2, 0)))
    return image * (1 - 0.3 * shadow[..., None])


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draws one image with its objects; ``rng`` decides everything in it."""
    return draw_objects(rng, draw_texture(rng, strength=0.8))


def draw_objects(rng: np.random.Generator, image: np.ndarray) -> Scene:
    """Draws objects on a background, (SIZE, SIZE, 3) RGB values in about [0, 255]."""
    mean_color = image.mean(axis=(0, 1))
    categories, coverages, top = _place_objects(rng)
    for coverage in coverages:
        contrast = np.float32(rng.uniform(*CONTRAST))
        texture = contrast * draw_texture(rng, strength=1.0) + (1 - contrast) * mean_color
        image = cast_shadow(image, coverage)
        image = image + coverage[..., None] * (texture - image)
    image = image + 4 * rng.standard_normal(image.shape, dtype=np.float32)
    masks = np.stack([top == i for i in range(len(categories))])
    shares = [m.sum() / (c > 0.5).sum() for m, c in zip(masks, coverages)]
    return Scene(np.clip(image, 0, 255).astype(np.uint8), categories, masks, shares)


def annotations_of(scene: Scene) -> list[dict]:
    """COCO annotations without ids; areas and boxes (x, y, width, height) are in pixels."""
    annotations = []
    for category, mask, share in zip(scene.categories, scene.masks, scene.visible_shares):
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        annotations.append(
            {
                "category_id": list(CLASSES).index(category) + 1,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "area": int(mask_util.area(rle)),
                "bbox": [float(x) for x in mask_util.toBbox(rle)],
                "iscrowd": 0,
                "visible_share": round(float(share), 4),
            }
        )
    return annotations


def _draw_image(index: int, folder: Path, seed: int) -> list[dict]:
    """Writes one PNG; returns its annotations. What it draws depends on the arguments alone."""
    rng = np.random.default_rng([seed, SPLITS.index(folder.name), index])
    scene = draw_scene(rng)
    Image.fromarray(scene.image).save(folder / f"{index:06d}.png")
    return annotations_of(scene)


def _draw_images(folder: Path, num_images: int, seed: int, num_workers: int) -> list[list[dict]]:
    """Writes all PNGs of a split; returns the annotations of each."""
    draw = partial(_draw_image, folder=folder, seed=seed)
    progress = partial(tqdm, total=num_images, desc=f"drawing {folder.name}", unit="image")
    if num_workers <= 1:
        return list(progress(map(draw, range(num_images))))
    with ProcessPoolExecutor(num_workers) as pool:
        return list(progress(pool.map(draw, range(num_images), chunksize=16)))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n")


def draw_split(out_dir: Path, split: str, num_images: int, seed: int, num_workers: int = 1) -> None:
    """Writes ``OUT_DIR/<split>/*.png`` and ``OUT_DIR/<split>.json``."""
    (out_dir / split).mkdir(parents=True)
    coco: dict = {
        "info": {"description": f"Drawn shapes, {split}, seed {seed}", "version": "1.0"},
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": LICENSE_URL}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
        "images": [],
        "annotations": [],
    }
    per_image = _draw_images(out_dir / split, num_images, seed, num_workers)
    for image_id, annotations in enumerate(per_image, start=1):
        name = f"{image_id - 1:06d}.png"
        coco["images"].append(
            {"id": image_id, "file_name": name, "height": SIZE, "width": SIZE, "license": 1}
        )
        for annotation in annotations:
            annotation.update(id=len(coco["annotations"]) + 1, image_id=image_id)
            coco["annotations"].append(annotation)
    write_json(out_dir / f"{split}.json", coco)


def draw_dataset(
    out_dir: Path, num_train: int, num_val: int, seed: int = 0, num_workers: int = 1
) -> bool:
    """
    Draws both splits, unless the same ones are already there.

    Args:
        num_train, num_val: number of images.
        num_workers: processes to draw with; the result does not depend on it.

    Returns:
        whether anything was drawn
    """
    marker = out_dir / "complete.json"
    parameters = {
        "num_train": num_train,
        "num_val": num_val,
        "seed": seed,
        "drawn_by": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    if _is_complete(out_dir, parameters):
        return False
    marker.unlink(missing_ok=True)
    for split in SPLITS:
        shutil.rmtree(out_dir / split, ignore_errors=True)
        draw_split(out_dir, split, parameters[f"num_{split}"], seed, num_workers)
    write_json(marker, parameters)
    return True


def _is_complete(out_dir: Path, parameters: dict) -> bool:
    """Whether these parameters were drawn to the end and no file has gone since."""
    marker = out_dir / "complete.json"
    if not marker.is_file() or json.loads(marker.read_text()) != parameters:
        return False
    return all(
        (out_dir / f"{split}.json").is_file()
        and len(list((out_dir / split).glob("*.png"))) == parameters[f"num_{split}"]
        for split in SPLITS
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path, help="folder to write, created if need be")
    parser.add_argument("--num-train", type=int, default=2000, help="images (default 2000)")
    parser.add_argument("--num-val", type=int, default=200, help="images (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    parser.add_argument(
        "--num-workers", type=int, default=os.cpu_count(), help="processes (default one per core)"
    )
    args = parser.parse_args()
    drawn = draw_dataset(args.out_dir, args.num_train, args.num_val, args.seed, args.num_workers)
    print(f"{args.out_dir}: {'drawn' if drawn else 'already complete, nothing drawn'}")


if __name__ == "__main__":
    main()
