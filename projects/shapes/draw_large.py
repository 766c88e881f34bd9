"""
Draws large images with many small objects, and a few large ones, in COCO format: what a model sees
only in part if it looks at the image as a whole. The shapes are those of draw.py.

What it writes::

    OUT_DIR/large.json     COCO annotations, masks of the visible parts as compressed RLE
    OUT_DIR/large/         PNG images, RGB

Each image has a random generator of its own, seeded by (seed, index).
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from tqdm import tqdm

import draw
from msrcnn_d2_runtime.mask_encoding import encode_crops

SIZE = 2048  # height and width of an image, pixels
NUM_SMALL, NUM_LARGE = 300, 6  # objects that are tried per image, of the radii below
LARGER = 4  # large objects have the radii of draw.py times this


def draw_large_scene(
    rng: np.random.Generator, size: int, num_small: int, num_large: int
) -> tuple[np.ndarray, list[dict]]:
    """
    Args:
        size: height and width of the image, in pixels.
        num_small, num_large: how many objects are tried. Those that would hide another one too far
            are left out.

    Returns:
        (size, size, 3) uint8, RGB; and the annotations in COCO's format, without ids.
    """
    image = draw.draw_texture(rng, strength=0.8, size=size)
    mean_color = image.mean(axis=(0, 1))
    top = np.full((size, size), -1)  # the object that is seen at each pixel
    categories: list[str] = []
    windows: list[tuple[slice, slice]] = []
    areas, visible = np.zeros(0, dtype=int), np.zeros(0, dtype=int)  # pixels of each object
    # Large ones first: they would hide the small ones
    for scale in [LARGER] * num_large + [1] * num_small:
        category = str(rng.choice(list(draw.CLASSES)))
        radius = scale * float(np.exp(rng.uniform(*np.log(draw.RADIUS))))
        # Drawn in a window of its own, of which the part inside the image counts
        side = 8 * int(np.ceil((1.35 * radius + 4) / 4))
        y, x = (int(p) for p in rng.integers(-side // 2, size - side // 2, size=2))
        coverage = draw.draw_coverage_at(
            rng, category, radius, np.full(2, side / 2) + rng.uniform(size=2), side
        )
        contrast = np.float32(rng.uniform(*draw.CONTRAST))
        texture = contrast * draw.draw_texture(rng, 1.0, side) + (1 - contrast) * mean_color
        window = slice(max(y, 0), y + side), slice(max(x, 0), x + side)
        inside = slice(max(-y, 0), size - y), slice(max(-x, 0), size - x)

        covered = coverage[inside] > 0.5
        area = np.count_nonzero(covered)
        hidden = np.bincount(top[window][covered] + 1, minlength=len(areas) + 1)[1:]
        smallest = np.maximum(draw.MIN_AREA, draw.MIN_VISIBLE * areas)
        if area < draw.MIN_AREA or (visible - hidden < smallest).any():
            continue
        top[window][covered] = len(areas)
        areas, visible = np.append(areas, area), np.append(visible - hidden, area)
        categories.append(category)
        windows.append(window)
        share = np.ascontiguousarray(coverage[inside])
        pixels = draw.cast_shadow(image[window], share)
        image[window] = pixels + share[..., None] * (texture[inside] - pixels)
    image = image + 4 * rng.standard_normal(image.shape, dtype=np.float32)
    masks = [(w[0].start, w[1].start, top[w] == k) for k, w in enumerate(windows)]
    annotations = []
    for category, rle in zip(categories, encode_crops(masks, (size, size))):
        annotation = {"category_id": list(draw.CLASSES).index(category) + 1, "segmentation": rle}
        area, box = int(mask_util.area(rle)), [float(v) for v in mask_util.toBbox(rle)]
        annotations.append({**annotation, "area": area, "bbox": box, "iscrowd": 0})
    return np.clip(image, 0, 255).astype(np.uint8), annotations


def _draw_image(
    index: int, folder: Path, size: int, num_small: int, num_large: int, seed: int
) -> list[dict]:
    """Writes one PNG; returns its annotations."""
    rng = np.random.default_rng([seed, index])
    image, annotations = draw_large_scene(rng, size, num_small, num_large)
    Image.fromarray(image).save(folder / f"{index:06d}.png")
    return annotations


def draw_large_dataset(
    out_dir: Path,
    num_images: int,
    size: int = SIZE,
    num_small: int = NUM_SMALL,
    num_large: int = NUM_LARGE,
    seed: int = 0,
    num_workers: int = 1,
) -> None:
    """
    Writes ``OUT_DIR/large/*.png`` and ``OUT_DIR/large.json``.

    Args:
        size, num_small, num_large: see :func:`draw_large_scene`.
        num_workers: processes to draw with; the result does not depend on it.
    """
    folder = out_dir / "large"
    folder.mkdir(parents=True, exist_ok=True)
    coco: dict = {
        "categories": [{"id": k, "name": name} for k, name in enumerate(draw.CLASSES, start=1)],
        "images": [],
        "annotations": [],
    }
    arguments = dict(folder=folder, size=size, num_small=num_small, num_large=num_large, seed=seed)
    with ProcessPoolExecutor(num_workers) as pool:
        drawn = pool.map(partial(_draw_image, **arguments), range(num_images))
        for index, annotations in enumerate(tqdm(drawn, "drawing", num_images, unit="image")):
            name = f"{index:06d}.png"
            entry = {"id": index + 1, "file_name": name, "height": size, "width": size}
            coco["images"].append(entry)
            for annotation in annotations:
                annotation.update(id=len(coco["annotations"]) + 1, image_id=entry["id"])
                coco["annotations"].append(annotation)
    (out_dir / "large.json").write_text(json.dumps(coco) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path, help="folder to write, created if need be")
    parser.add_argument("--num-images", type=int, default=20, help="default 20")
    parser.add_argument("--size", type=int, default=SIZE, help=f"in pixels (default {SIZE})")
    parser.add_argument("--num-small", type=int, default=NUM_SMALL, help="objects of an image")
    parser.add_argument("--num-large", type=int, default=NUM_LARGE, help="objects of an image")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    parser.add_argument(
        "--num-workers", type=int, default=os.cpu_count(), help="processes (default one per core)"
    )
    draw_large_dataset(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
