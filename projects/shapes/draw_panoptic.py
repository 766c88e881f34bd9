"""
Draws a panoptic segmentation dataset in COCO's format: the objects of draw.py, on a background
that consists of two kinds of stuff: stripes, clouds and grain.

What it writes, the layout that Detectron2's ``register_coco_panoptic_separated`` takes::

    OUT_DIR/<split>/                      JPEG images, RGB
    OUT_DIR/<split>.json                  objects, as from draw.py
    OUT_DIR/panoptic_<split>.json, /      COCO panoptic annotations, and their PNG files
    OUT_DIR/stuff_<split>/                PNG files: 0 for objects, 1, 2, 3 for kinds of stuff

The same seed gives the same images.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import draw

STUFF = {
    "stripes": draw.stripes,
    "clouds": lambda rng, size: draw.smooth_noise(rng, 12, size),
    "grain": lambda rng, size: draw.smooth_noise(rng, 48, size),
}
CATEGORIES = [
    {"id": k, "name": name, "isthing": int(name in draw.CLASSES)}
    for k, name in enumerate([*draw.CLASSES, *STUFF], start=1)
]


def draw_panoptic_scene(rng: np.random.Generator) -> tuple[draw.Scene, np.ndarray]:
    """
    Returns:
        the scene, and (SIZE, SIZE) the kind of stuff of each pixel, counted from 0, also where
        objects hide it
    """
    first, second = rng.choice(len(STUFF), size=2, replace=False)
    y, x = np.mgrid[: draw.SIZE, : draw.SIZE]
    angle = rng.uniform(0, 2 * np.pi)
    border = rng.uniform(0.35, 0.65) * draw.SIZE + 12 * draw.smooth_noise(rng, 4, draw.SIZE)
    across = (x - draw.SIZE / 2) * np.cos(angle) + (y - draw.SIZE / 2) * np.sin(angle)
    kinds = np.where(across + draw.SIZE / 2 < border, first, second)
    textures = [draw.draw_texture(rng, 1.0, pattern=pattern) for pattern in STUFF.values()]
    background = np.choose(kinds[..., None], textures)
    return draw.draw_objects(rng, background), kinds


def _segments(scene: draw.Scene, kinds: np.ndarray) -> tuple[np.ndarray, list[dict]]:
    """
    Returns:
        (SIZE, SIZE) the segment of each pixel, counted from 1, and the ``segments_info`` of COCO
    """
    ids = np.zeros(kinds.shape, dtype=np.int64)
    names = list(scene.categories)
    for segment, mask in enumerate(scene.masks, start=1):
        ids[mask] = segment
    for kind, name in enumerate(STUFF):
        visible = (kinds == kind) & (ids == 0)
        if visible.any():
            names.append(name)
            ids[visible] = len(names)
    category_ids = {c["name"]: c["id"] for c in CATEGORIES}
    infos = []
    for segment, name in enumerate(names, start=1):
        ys, xs = np.nonzero(ids == segment)
        box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        infos.append(
            {
                "id": segment,
                "category_id": category_ids[name],
                "area": len(xs),
                "bbox": [int(v) for v in box],
                "iscrowd": 0,
            }
        )
    return ids, infos


def draw_split(out_dir: Path, split: str, num_images: int, seed: int) -> None:
    """Writes all files of a split."""
    panoptic, stuff = out_dir / f"panoptic_{split}", out_dir / f"stuff_{split}"
    for folder in (out_dir / split, panoptic, stuff):
        folder.mkdir(parents=True, exist_ok=True)
    images: list[dict] = []
    objects: list[dict] = []
    segments: list[dict] = []
    for index in tqdm(range(num_images), desc=f"drawing {split}", unit="image"):
        rng = np.random.default_rng([seed, draw.SPLITS.index(split), index])
        scene, kinds = draw_panoptic_scene(rng)
        name, image_id = f"{index:06d}", index + 1
        Image.fromarray(scene.image).save(out_dir / split / f"{name}.jpg", quality=95)
        images.append(
            {"id": image_id, "file_name": f"{name}.jpg", "height": draw.SIZE, "width": draw.SIZE}
        )
        for annotation in draw.annotations_of(scene):
            objects.append({**annotation, "id": len(objects) + 1, "image_id": image_id})
        ids, infos = _segments(scene, kinds)
        colors = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], axis=-1)
        Image.fromarray(colors.astype(np.uint8)).save(panoptic / f"{name}.png")
        segments.append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": infos})
        labels = np.where(scene.masks.any(axis=0), 0, kinds + 1)
        Image.fromarray(labels.astype(np.uint8)).save(stuff / f"{name}.png")
    things = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES if c["isthing"]]
    draw.write_json(
        out_dir / f"{split}.json", {"images": images, "annotations": objects, "categories": things}
    )
    draw.write_json(
        out_dir / f"panoptic_{split}.json",
        {"images": images, "annotations": segments, "categories": CATEGORIES},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path, help="folder to write, created if need be")
    parser.add_argument("--num-train", type=int, default=1000, help="images (default 1000)")
    parser.add_argument("--num-val", type=int, default=300, help="images (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    args = parser.parse_args()
    draw_split(args.out_dir, "train", args.num_train, args.seed)
    draw_split(args.out_dir, "val", args.num_val, args.seed)


if __name__ == "__main__":
    main()
