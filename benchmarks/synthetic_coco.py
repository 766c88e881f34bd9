"""Ground truth and detections like COCO's in number, size and overlap, drawn at random."""

import numpy as np
import pycocotools.mask as mask_util

HEIGHT, WIDTH = 480, 640
NUM_CLASSES = 80
OBJECTS_PER_IMAGE = 7.3
CLASSES_PER_IMAGE = 3
DETECTED_CLASSES_PER_IMAGE = 12  # those of the objects, and others that are taken for them
DETECTIONS_PER_IMAGE = 100
SHARE_OF_JITTERED_OBJECTS = 0.6  # the other detections are anywhere
NUM_VERTICES = 20
RADII = (6, 200)  # in pixels, log-uniform
NUM_DISTINCT = 250  # images; more are the same ones with other ids and other scores


def draw_dataset(num_images: int, seed: int = 0) -> tuple[dict, list[dict]]:
    """
    Returns:
        a dataset in COCO's format; and detections in COCO's result format with "bbox",
        "segmentation" (compressed RLE), "score", "mask_score" and "pred_mask_iou".
    """
    rng = np.random.default_rng(seed)
    distinct = [_draw_image(rng) for _ in range(min(num_images, NUM_DISTINCT))]
    annotations: list[dict] = []
    results: list[dict] = []
    for image_id in range(1, num_images + 1):
        objects, found = distinct[image_id % len(distinct)]
        for entry in objects:
            annotations.append({**entry, "image_id": image_id, "id": len(annotations) + 1})
        results += [{"image_id": image_id, **x} for x in _with_scores(rng, found)]
    size = {"height": HEIGHT, "width": WIDTH}
    dataset = {
        "images": [{"id": k, "file_name": f"{k}.jpg", **size} for k in range(1, num_images + 1)],
        "annotations": annotations,
        "categories": [{"id": k, "name": str(k)} for k in range(1, NUM_CLASSES + 1)],
    }
    return dataset, results


def _draw_image(rng) -> tuple[list[dict], list[dict]]:
    """Objects, without ids; and detections, each with the quality that scores depend on."""
    classes = rng.choice(NUM_CLASSES, DETECTED_CLASSES_PER_IMAGE, replace=False) + 1
    count = max(1, rng.poisson(OBJECTS_PER_IMAGE))
    polygons = [_blob(rng) for _ in range(count)]
    labels = rng.choice(classes[:CLASSES_PER_IMAGE], count).tolist()
    objects = [_object(polygon, label) for polygon, label in zip(polygons, labels)]

    found = []
    for k in range(DETECTIONS_PER_IMAGE):
        if k < SHARE_OF_JITTERED_OBJECTS * DETECTIONS_PER_IMAGE:
            jitter = 0.05 + rng.exponential(0.4)
            polygon, label = _jittered(rng, polygons[k % count], jitter), labels[k % count]
        else:
            jitter, polygon, label = 1.0, _blob(rng), int(rng.choice(classes))
        found.append(_detection(polygon, label, jitter))
    return objects, found


def _blob(rng) -> np.ndarray:
    """A polygon (vertices x 2, in pixels) with a wavy outline, cut at the borders of the image."""
    angles = np.linspace(0, 2 * np.pi, NUM_VERTICES, endpoint=False)
    waves = sum(0.15 * np.sin(k * angles + rng.uniform(0, 2 * np.pi)) for k in (1, 2, 3))
    radii = np.exp(rng.uniform(*np.log(RADII))) * (1 + waves)
    center = rng.uniform(0, [WIDTH, HEIGHT])
    return _clipped(center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def _jittered(rng, polygon: np.ndarray, jitter: float) -> np.ndarray:
    """Moved, scaled and with a rougher outline, each by about `jitter` of the object's size."""
    center, size = polygon.mean(axis=0), np.ptp(polygon, axis=0)
    moved = center + jitter * size * rng.normal(0, 0.3, 2)
    scaled = (polygon - center) * (1 + jitter * rng.normal(0, 0.5, 2))
    return _clipped(moved + scaled + jitter * size * rng.normal(0, 0.05, polygon.shape))


def _clipped(polygon: np.ndarray) -> np.ndarray:
    polygon = polygon.clip(0, [WIDTH, HEIGHT])
    # Nothing thinner than 2 pixels: an object has an area
    return np.maximum(polygon, polygon.max(axis=0) - np.ptp(polygon, axis=0).clip(2)).round(2)


def _box(polygon: np.ndarray) -> list[float]:
    return [*polygon.min(axis=0).tolist(), *np.ptp(polygon, axis=0).tolist()]


def _object(polygon: np.ndarray, label: int) -> dict:
    return {
        "category_id": label,
        "bbox": _box(polygon),
        "area": float(mask_util.area(_rle(polygon))),
        "iscrowd": 0,
        "segmentation": [polygon.ravel().tolist()],
    }


def _detection(polygon: np.ndarray, label: int, jitter: float) -> dict:
    rle = _rle(polygon)
    rle["counts"] = rle["counts"].decode()
    return {"category_id": label, "bbox": _box(polygon), "segmentation": rle, "jitter": jitter}


def _rle(polygon: np.ndarray) -> dict:
    return mask_util.frPyObjects([polygon.ravel().tolist()], HEIGHT, WIDTH)[0]


def _with_scores(rng, found: list[dict]) -> list[dict]:
    """Class scores and mask IoUs that both fall with the jitter, but not alike."""
    jitter = np.array([x["jitter"] for x in found])
    scores, ious = np.exp(-2 * jitter + rng.normal(0, 0.4, (2, len(found)))).clip(0.01, 1)
    scores = scores.astype(np.float32).astype(float)  # what a model gives
    return [
        {
            **{k: v for k, v in x.items() if k != "jitter"},
            "score": score,
            "mask_score": score * iou,
            "pred_mask_iou": iou,
        }
        for x, score, iou in zip(found, scores.tolist(), ious.tolist())
    ]
