"""
Time of COCO evaluation, of Boundary AP, of the quality of masks and its report, and of turning
predicted masks into COCO's format.
"""

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.layers import paste_masks_in_image

from benchmarks.measuring import Stopwatch, Timing, one_thread, time_in_turn, time_steps_in_turn
from benchmarks.report import Part, Target
from benchmarks.synthetic_coco import HEIGHT, WIDTH, draw_dataset
from msrcnn_d2.evaluation import MaskQuality
from msrcnn_d2.evaluation.average_precision import AveragePrecision
from msrcnn_d2.report import write_report
from msrcnn_d2_runtime.mask_encoding import encode_bitmasks, encode_roi_masks
from msrcnn_d2_runtime.scores import scores_of

ONE_TASK, ALL_TASKS = "masks", "boxes, masks by both scores"
NUM_MASKS, MASK_SIZE = 100, 28
# Side of the boxes, sqrt(area), in pixels; a range is log-uniform
SIDES = {"25 px": (25, 25), "100 px": (100, 100), "300 px": (300, 300), "12 to 400 px": (12, 400)}
MIXED = "12 to 400 px"


def run(options) -> list[Part]:
    """
    Args:
        options: with "rounds", how often each is timed, and "full", whether the slow ones are too.
    """
    parts = [evaluation_part, boundary_part, quality_part, encoding_part]
    return [part(options) for part in parts]


# ---- evaluation


def evaluation_part(options) -> Part:
    measured = {
        (ONE_TASK, 500): options.rounds,
        (ALL_TASKS, 100): options.rounds,
        (ONE_TASK, 5000): options.rounds if options.full else 1,  # minutes a round
    }
    timings = {}
    for (what, num_images), rounds in measured.items():
        dataset, results = draw_dataset(num_images)
        timings[what, num_images] = time_evaluation(dataset, results, what, rounds)
    speedups = {key: 1 / ours.ratio_to(official) for key, (official, ours) in timings.items()}
    return Part(
        title="COCO evaluation of 100 detections per image",
        headers=["", "images", "rounds", "pycocotools (s)", "ours (s)", "times as fast"],
        rows=[
            [*key, measured[key], official.median, ours.median, speedups[key]]
            for key, (official, ours) in timings.items()
        ],
        targets=[
            Target(f"Speed-up of {what}, {num_images} images", value, 3, at_least=True)
            for (what, num_images), value in speedups.items()
            if measured[what, num_images] == options.rounds  # one round is no verdict
        ],
        notes=[
            "From results in COCO's format, with RLEs, to the twelve numbers of COCO. Those of the "
            "two agree to 1e-6 in every round. pycocotools is run as Detectron2 does it."
        ],
        data={
            f"{what}, {num_images} images": {"pycocotools": a.as_dict(), "ours": b.as_dict()}
            for (what, num_images), (a, b) in timings.items()
        },
    )


def time_evaluation(dataset, results, what: str, rounds: int) -> list[Timing]:
    """Of pycocotools and of ours; they begin with annotations that no one has converted yet."""
    rankings = [("segm", "mask_score")]
    if what == ALL_TASKS:
        rankings = [("bbox", "score"), ("segm", "score"), ("segm", "mask_score")]
    numbers: dict[str, list] = {"official": [], "ours": []}
    functions = {
        name: partial(keep, numbers[name], function, dataset, results, rankings)
        for name, function in (("official", evaluate_officially), ("ours", evaluate_with_ours))
    }
    timings = time_in_turn(functions, rounds, warm_up=False)
    for official, ours in zip(*numbers.values()):
        np.testing.assert_allclose(ours, official, rtol=0, atol=1e-6)
    return list(timings.values())


def keep(returned: list, function: Callable, *args) -> None:
    returned.append(function(*args))


def evaluate_officially(dataset, results, rankings) -> list[list[float]]:
    """The twelve numbers for each task and ranking."""
    numbers = []
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = build_coco(dataset)
        for task, score in rankings:
            ranked = copy.deepcopy(results)
            for result in ranked:
                result["score"] = result[score]
                if task == "segm":
                    result.pop("bbox")
            coco_eval = COCOeval(coco_gt, coco_gt.loadRes(ranked), task)
            coco_eval.evaluate()
            coco_eval.accumulate()
            coco_eval.summarize()
            numbers.append(coco_eval.stats.tolist())
    return numbers


def evaluate_with_ours(dataset, results, rankings) -> list[list[float]]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = build_coco(dataset)
    by_task = {
        task: AveragePrecision(coco_gt, results, task, "faster-coco-eval")
        for task in dict.fromkeys(task for task, _ in rankings)
    }
    evaluations = [by_task[task].evaluate([r[score] for r in results]) for task, score in rankings]
    return [np.nan_to_num(x.stats, nan=-1).tolist() for x in evaluations]


def build_coco(dataset) -> COCO:
    coco = COCO()
    coco.dataset = {**dataset, "annotations": [dict(a) for a in dataset["annotations"]]}
    coco.createIndex()
    return coco


# ---- Boundary AP


def boundary_part(options) -> Part:
    dataset, results = draw_dataset(100)
    timings = time_boundary_ap(dataset, results, options.rounds)
    ours = timings["Boundary AP, ours"]
    speedup = 1 / ours.ratio_to(timings["Boundary AP, as published"])
    return Part(
        title="Boundary AP of 100 images with 100 detections each",
        headers=["", "seconds", "times the AP of masks"],
        rows=[
            [name, timing.median, timing.ratio_to(timings["AP of masks, ours"])]
            for name, timing in timings.items()
        ],
        targets=[Target("Speed-up of Boundary AP", speedup, 3, at_least=True)],
        notes=[
            "As published: the boundaries of all objects and detections are found in images of "
            "full size, by OpenCV, and AP is computed by pycocotools. All in one process. The "
            "twelve numbers agree to 1e-6 in every round."
        ],
        data={name: timing.as_dict() for name, timing in timings.items()},
    )


def time_boundary_ap(dataset, results, rounds: int) -> dict[str, Timing]:
    published: list = []
    ours: list = []
    timings = time_in_turn(
        {
            "AP of masks, ours": partial(
                evaluate_with_ours, dataset, results, [("segm", "mask_score")]
            ),
            "Boundary AP, ours": partial(
                *(keep, ours, evaluate_with_ours, dataset, results, [("boundary", "mask_score")])
            ),
            "Boundary AP, as published": partial(
                keep, published, boundary_ap_as_published, dataset, results, "mask_score"
            ),
        },
        rounds,
        warm_up=False,
    )
    for numbers, expected in zip(ours, published):
        np.testing.assert_allclose(numbers[0], expected, rtol=0, atol=1e-6)
    return timings


def boundary_ap_as_published(dataset, results, score: str) -> list[float]:
    """What the authors' boundary-iou-api does, in one process."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = build_coco(dataset)
        ranked = [{**r, "score": r[score]} for r in results]
        for result in ranked:
            del result["bbox"]
        coco_dt = coco_gt.loadRes(ranked)
        for coco in (coco_gt, coco_dt):
            for annotation in coco.dataset["annotations"]:
                annotation["boundary"] = boundary_of(coco.annToMask(annotation))
        coco_eval = BoundaryEval(coco_gt, coco_dt, "segm")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return coco_eval.stats.tolist()


def boundary_of(mask: np.ndarray) -> dict:
    """The RLE of the pixels (H x W) that d erosions remove; d is 2 % of the diagonal."""
    width = max(round(0.02 * np.hypot(*mask.shape)), 1)
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)
    return mask_util.encode(np.asfortranarray(mask - eroded[1:-1, 1:-1]))


class BoundaryEval(COCOeval):
    """COCO's evaluation with the smaller one of mask IoU and boundary IoU, without crowds."""

    def computeIoU(self, image_id: int, category_id: int) -> np.ndarray | list:
        mask_ious = super().computeIoU(image_id, category_id)
        objects, found = (x[image_id, category_id] for x in (self._gts, self._dts))
        if not (objects and found):
            return mask_ious
        ranked = sorted(found, key=lambda d: -d["score"])[: self.params.maxDets[-1]]
        boundaries = ([x["boundary"] for x in shapes] for shapes in (ranked, objects))
        return np.minimum(mask_ious, mask_util.iou(*boundaries, [0] * len(objects)))


# ---- quality of masks


def quality_part(options) -> Part:
    timings = {}
    for num_images, rounds in {
        500: options.rounds,
        5000: options.rounds if options.full else 1,
    }.items():
        dataset, results = draw_dataset(num_images)
        steps = partial(evaluate_and_report, dataset, results)
        timings[num_images] = time_steps_in_turn({"run": steps}, rounds, warm_up=False)["run"]
    largest = timings[5000]
    beyond = largest["quality of masks"].median + largest["report"].median
    steps = [step for step in largest if step != "total"]
    return Part(
        title="Quality of masks and its report, beyond the evaluation, seconds",
        headers=["images", "rounds", *steps],
        rows=[
            [num_images, len(t["total"].seconds), *(t[step].median for step in steps)]
            for num_images, t in timings.items()
        ],
        targets=[Target("Beyond the evaluation, 5,000 images (s)", beyond, 120)],
        notes=[
            "Evaluation: masks under both rankings, from results in memory. Quality of masks: true "
            "IoUs, the ceiling, matching at ten thresholds, correlations; all that an evaluation "
            "shows. Report: all other numbers, figures, page; without images."
        ],
        data={
            f"{num_images} images": {step: timing.as_dict() for step, timing in t.items()}
            for num_images, t in timings.items()
        },
    )


def evaluate_and_report(dataset, results, watch: Stopwatch) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt = build_coco(dataset)
    ranking = watch("evaluation", AveragePrecision, coco_gt, results)
    scores = scores_of(results)
    evaluations = {
        name: watch("evaluation", ranking.evaluate, scores[name])
        for name in ("class_score", "mask_score")
    }
    quality = watch("quality of masks", measure_quality, ranking, evaluations)
    with tempfile.TemporaryDirectory() as folder:
        watch("report", write_report, quality, folder)


def measure_quality(ranking: AveragePrecision, evaluations: dict) -> MaskQuality:
    """As the evaluator does it."""
    quality = MaskQuality(ranking, evaluations)
    quality.headline()
    return quality


# ---- encoding


@one_thread()
def encoding_part(options) -> Part:
    generator = torch.Generator().manual_seed(0)
    blobs = draw_blobs(generator)
    noise = torch.rand(blobs.shape, generator=generator)
    boxes = {name: draw_boxes(generator, *sides) for name, sides in SIDES.items()}
    works = {f"paste and encode, boxes of {name}": (blobs, boxes[name]) for name in SIDES}
    works[f"paste and encode noise, boxes of {MIXED}"] = (noise, boxes[MIXED])

    rows, data = [], {}
    for what, (masks, places) in works.items():
        functions = {
            "Detectron2": partial(paste_and_encode, masks, places),
            "ours": partial(encode_roi_masks, masks, places, (HEIGHT, WIDTH)),
        }
        rows.append(encoding_row(what, functions, options.rounds, data))
    pasted = paste_masks_in_image(blobs, boxes[MIXED], (HEIGHT, WIDTH))
    functions = {
        "Detectron2": partial(encode_as_detectron2, pasted),
        "ours": partial(encode_bitmasks, pasted),
    }
    rows.append(encoding_row("encode full-size masks", functions, options.rounds, data))
    (mixed,) = (row for row in rows if row[0] == f"paste and encode, boxes of {MIXED}")
    return Part(
        title=f"{NUM_MASKS} masks of a {WIDTH} x {HEIGHT} image to COCO's format, on the CPU",
        headers=["", "Detectron2 (ms)", "ours (ms)", "times as fast", "pixels that differ"],
        rows=rows,
        targets=[Target("Speed-up of pasting and encoding", mixed[3], 2, at_least=True)],
        notes=[
            f"{MASK_SIZE} x {MASK_SIZE} masks, blobs with soft edges, in boxes whose side is the "
            "square root of their area. A pixel can differ where its probability is 0.5 up to the "
            "rounding of float32. Both in one thread."
        ],
        data=data,
    )


def encoding_row(what: str, functions: dict[str, Callable], rounds: int, data: dict) -> list:
    """A row of the table; `data` gets the timings."""
    timings = time_in_turn(functions, rounds)
    theirs, ours = (mask_util.decode(function()) for function in functions.values())
    data[what] = {name: timing.as_dict() for name, timing in timings.items()}
    medians = [1000 * timing.median for timing in timings.values()]
    speedup = 1 / timings["ours"].ratio_to(timings["Detectron2"])
    return [what, *medians, speedup, int((theirs != ours).sum())]


def paste_and_encode(masks: torch.Tensor, boxes: torch.Tensor) -> list[dict]:
    return encode_as_detectron2(paste_masks_in_image(masks, boxes, (HEIGHT, WIDTH)))


def encode_as_detectron2(masks: torch.Tensor) -> list[dict]:
    """What `instances_to_coco_json` does with masks."""
    arrays = masks.numpy()  # iterating over a tensor here only adds warnings of NumPy
    rles = [mask_util.encode(np.array(m[:, :, None], order="F", dtype="uint8"))[0] for m in arrays]
    for rle in rles:
        rle["counts"] = rle["counts"].decode("utf-8")
    return rles


def draw_blobs(generator: torch.Generator) -> torch.Tensor:
    """Probabilities (N x M x M) that fall smoothly at wavy outlines, as mask heads give them."""
    axis = torch.linspace(-1, 1, MASK_SIZE)
    angles = torch.atan2(axis[:, None], axis[None])
    phases = 2 * torch.pi * torch.rand(3, NUM_MASKS, 1, 1, generator=generator)
    waves = sum(0.12 * torch.sin(k * angles + phase) for k, phase in enumerate(phases, start=1))
    return torch.sigmoid(12 * (0.8 + waves - torch.hypot(axis[:, None], axis[None])))


def draw_boxes(generator: torch.Generator, smallest: float, largest: float) -> torch.Tensor:
    """Boxes (N x 4, in pixels) around points of the image, cut at its borders."""
    share = torch.rand(NUM_MASKS, generator=generator)
    side = smallest * (largest / smallest) ** share
    stretch = torch.exp(0.3 * torch.randn(NUM_MASKS, generator=generator))
    half = torch.stack([side * stretch, side / stretch], dim=1) / 2
    size = torch.tensor([WIDTH, HEIGHT])
    centers = torch.rand(NUM_MASKS, 2, generator=generator) * size
    corners = [(centers - half).clamp(min=0), torch.minimum(centers + half, size)]
    return torch.cat(corners, dim=1)
