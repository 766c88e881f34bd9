"""Mask AP and time of predictions on tiles of large images, beside sahi with the same model."""

import contextlib
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from benchmarks.measuring import time_in_turn
from benchmarks.report import Part, Target
from msrcnn_d2 import load_predictor, to_sahi
from msrcnn_d2.evaluation.average_precision import AveragePrecision, Evaluation
from msrcnn_d2_runtime.mask_encoding import Crop, encode_crops
from msrcnn_d2_runtime.predictions import Predictions
from msrcnn_d2_runtime.predictor import Predictor
from msrcnn_d2_runtime.tiling import TiledPredictor

DRAW = Path(__file__).parents[1] / "projects" / "shapes" / "draw_large.py"
# Images that the rule of merge_tiles was not chosen with
SIZE, SEED = 2048, 1
# Size of a tile in pixels, overlap, number of images
SETTINGS = ((512, 0.2, 12), (256, 0.2, 12))
CONFIDENCES = (0.0, 0.3)  # detections with lower scores are left out before merging; sahi's is 0.3
# How sahi merges: its default first; below a confidence of 0.1 it takes the last
VARIANTS = (
    ("GREEDYNMM", "IOS"),
    ("GREEDYNMM", "IOU"),
    ("NMM", "IOS"),
    ("NMS", "IOS"),
    ("NMS", "IOU"),
)
OURS, THEIRS = "here", "sahi, {} by {}"
MAX_DETS = 1000  # of an image and class, for both: an image has about 300 objects
COCOResults = list[dict]


def run(options) -> list[Part]:
    methods: dict[str, Callable] = {OURS: predict_here}
    notes = [
        "The model sees a tile in its own size and the whole image as small as a tile. AP is by "
        f"our evaluator for all, from masks as RLEs, with up to {MAX_DETS} detections of each "
        "image and class. Seconds are medians over the images, from the file to the merged masks."
    ]
    try:
        import sahi  # noqa: F401
    except ModuleNotFoundError:
        notes.append(
            "sahi is not installed, so there is nothing to compare with: run `pip install "
            "'.[integrations]'`."
        )
    else:
        notes.append(f"sahi {version('sahi')}. Its masks are polygons, here as sahi draws them.")
        for variant in VARIANTS:
            methods[THEIRS.format(*variant)] = partial(predict_by_sahi, *variant)

    with tempfile.TemporaryDirectory() as folder:
        most = max(num_images for _, _, num_images in SETTINGS)
        draw = [sys.executable, DRAW, folder, "--seed", SEED, "--num-images", most, "--size", SIZE]
        subprocess.run([str(x) for x in draw], check=True, capture_output=True)
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(f"{folder}/large.json")
        return [compare(coco, Path(folder), methods, *x, notes) for x in SETTINGS]


class Remembers:
    """
    A predictor that predicts each image once: sahi's variants all merge the same.

    Attributes:
        predictor: what predicts the images that are new.
        confidence: detections with a lower score are left out.
    """

    def __init__(self, predictor: Predictor):
        self.predictor, self.class_names = predictor, predictor.class_names
        self.image_settings, self.rank_by = predictor.image_settings, predictor.rank_by
        self.confidence = 0.0
        self._found: dict[int, Predictions] = {}

    def predictions(self, images: Sequence[np.ndarray]) -> list[Predictions]:
        keys = [hash((image.shape, image.tobytes())) for image in images]
        for key, image in zip(keys, images):
            if key not in self._found:
                (self._found[key],) = self.predictor.predictions([image])
        found = [self._found[key] for key in keys]
        return [x[x.rank_scores >= self.confidence] for x in found]


def compare(
    coco: COCO,
    folder: Path,
    methods: dict[str, Callable],
    tile: int,
    overlap: float,
    num_images: int,
    notes: list[str],
) -> Part:
    """All methods for one size and one overlap of the tiles; one image after the other."""
    resize = "{_target_: detectron2.data.transforms.ResizeShortestEdge, short_edge_length: %d}"
    predictor = load_predictor(
        "demo", opts=[f"dataloader.test.mapper.augmentations=[{resize % tile}]"]
    )
    images = coco.loadImgs(sorted(coco.getImgIds())[:num_images])
    # Each has its own, so that the first of sahi's variants predicts, too, when it is timed
    memories = {name: Remembers(predictor) for name in (OURS, "sahi")}
    results: dict[tuple[str, float], COCOResults] = {}

    def predict(name: str, confidence: float, image: dict) -> None:
        memory = memories[OURS if name == OURS else "sahi"]
        memory.confidence = confidence
        path = folder / "large" / image["file_name"]
        classes, scores, rles = methods[name](memory, path, tile, overlap)
        for class_, score, rle in zip(classes, scores, rles):
            result = {"image_id": image["id"], "category_id": int(class_) + 1}
            result |= {"score": float(score), "segmentation": rle}
            results.setdefault((name, confidence), []).append(result)

    # Ours and sahi's default are timed
    cases = [(name, confidence) for confidence in CONFIDENCES for name in methods]
    timed = {case: map(partial(predict, *case), images) for case in cases[: min(len(methods), 2)]}
    functions = {case: partial(next, calls) for case, calls in timed.items()}
    timings = time_in_turn(functions, num_images, warm_up=False)
    for case in cases:
        for image in images if case not in timed else ():
            predict(*case, image)

    found = {case: evaluate(coco, images, results[case]).numbers for case in cases}
    rows = []
    for (name, confidence), numbers in found.items():
        aps = [100 * numbers[x] for x in ("AP", "AP50", "APs", "APm", "APl")]
        count = len(results[name, confidence]) / num_images
        timing = timings.get((name, confidence))
        rows.append([name, confidence, *aps, count, timing and timing.median])
    targets = []
    for confidence in CONFIDENCES if len(methods) > 1 else ():
        others = [found[name, confidence]["AP"] for name in methods if name != OURS]
        lead = 100 * (found[OURS, confidence]["AP"] - max(others))
        what = f"Mask AP here, less the best of sahi's, confidence {confidence}"
        targets.append(Target(what, lead, 0, at_least=True))
    return Part(
        f"Tiles of {tile} pixels, overlap {overlap}: {num_images} images of {SIZE} x {SIZE}",
        ["", "confidence", "mask AP", "AP50", "small", "medium", "large", "detections", "s"],
        rows,
        targets=targets,
        notes=notes,
        data={
            "numbers": {f"{name}, {confidence}": x for (name, confidence), x in found.items()},
            "seconds": {name: t.as_dict() for (name, _), t in timings.items()},
        },
    )


def evaluate(coco: COCO, images: list[dict], results: COCOResults) -> Evaluation:
    ids = [x["id"] for x in images]
    precision = AveragePrecision(coco, results, "segm", max_dets=[MAX_DETS], img_ids=ids)
    return precision.evaluate([x["score"] for x in results])


def predict_here(predictor: Predictor, path: Path, tile: int, overlap: float) -> tuple:
    (found,) = TiledPredictor(predictor, tile, overlap).predictions([path])
    return found.pred_classes, found.rank_scores, found.masks.rles()


def predict_by_sahi(
    kind: str, metric: str, predictor: Predictor, path: Path, tile: int, overlap: float
) -> tuple:
    from sahi.predict import get_sliced_prediction

    result = get_sliced_prediction(
        str(path),
        to_sahi(predictor, confidence_threshold=0),
        slice_height=tile,
        slice_width=tile,
        overlap_height_ratio=overlap,
        overlap_width_ratio=overlap,
        postprocess_type=kind,
        postprocess_match_metric=metric,
        force_postprocess_type=True,  # for low scores it would take NMS
        verbose=0,
    )
    found = result.object_prediction_list
    rles = encode_crops([crop_of(x.mask) for x in found], (SIZE, SIZE))
    return [x.category.id for x in found], [x.score.value for x in found], rles


def crop_of(mask) -> Crop:
    """`bool_mask` of a mask of sahi, but without the image around it, which takes seconds."""
    from sahi.utils.cv import get_bool_mask_from_coco_segmentation

    outlines = [np.reshape(x, (-1, 2)).round().astype(int) for x in mask.segmentation]
    points = np.concatenate(outlines)
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    inside = get_bool_mask_from_coco_segmentation(
        [(x - (left, top)).ravel() for x in outlines], right - left + 1, bottom - top + 1
    )
    return top, left, inside[: mask.full_shape_height - top, : mask.full_shape_width - left]
