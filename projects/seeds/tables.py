"""What several seeds of Mask R-CNN and Mask Scoring R-CNN say together, as tables."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
from tabulate import tabulate

from msrcnn_d2.evaluation import MaskQuality
from msrcnn_d2.evaluation.average_precision import AveragePrecision

__all__ = ["Run", "tables"]

# The columns of the main table: title, model, ranking
COLUMNS = [
    ("Mask R-CNN", "mask_rcnn", "class_score"),
    ("MS R-CNN, by class score", "ms_rcnn", "class_score"),
    ("MS R-CNN, by mask score", "ms_rcnn", "mask_score"),
    ("ceiling, by true IoU", "ms_rcnn", "true_iou"),
]
THRESHOLDS = (50, 75, 90)


@dataclass
class Run:
    """
    Attributes:
        model: "mask_rcnn" or "ms_rcnn".
        seed: of the training.
        quality: {part: what was measured on it}; "val", and of an MS R-CNN "holdout" and "seen".
    """

    model: str
    seed: int
    quality: dict[str, MaskQuality]


def tables(runs: Sequence[Run], max_dets: int) -> tuple[str, dict[str, Any]]:
    """
    Args:
        runs: with at least one of "ms_rcnn".
        max_dets: detections per image that count.

    Returns:
        Markdown; and the numbers of each run, by "<model>-<seed>".
    """
    numbers = {f"{run.model}-{run.seed}": _numbers(run, max_dets) for run in runs}
    scoring = [n for name, n in numbers.items() if name.startswith("ms_rcnn")]
    plain = [n for name, n in numbers.items() if name.startswith("mask_rcnn")]
    parts = [
        ("Results on val", _main_table(plain, scoring)),
        ("What the paper claims", _claims(plain, scoring)),
        ("The MaskIoU head on images it was trained on, held-out ones and val", _heads(scoring)),
        ("What better predictions of the IoU would bring", _better_heads(scoring)),
    ]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts) + "\n", numbers


def _numbers(run: Run, max_dets: int) -> dict[str, Any]:
    quality = run.quality["val"]
    boxes = AveragePrecision(quality.coco_gt, quality.results, "bbox", max_dets=[max_dets])
    numbers = {
        "model": run.model,
        "seed": run.seed,
        "box_ap": 100 * boxes.evaluate(quality.scores["class_score"]).numbers["AP"],
        "ap": quality.overall.ap,
        "gap_closed": quality.overall.gap_closed,
        **{f"ap{k}": quality.by_threshold[f"0.{k}"].ap for k in THRESHOLDS},
        "pearson": quality.overall.matched.pearson,
        "spearman": quality.overall.matched.spearman,
        "head": {part: _head(q) for part, q in run.quality.items()},
    }
    if run.model == "ms_rcnn":
        numbers["better_heads"] = _better_head_aps(quality)
    return numbers


def _head(quality: MaskQuality) -> dict[str, float]:
    """How well IoUs are predicted, over matched detections and over all."""
    matched, everything = quality.overall.matched, quality.overall.all
    return {
        "correlation": matched.pearson.get("predicted_iou", float("nan")),
        "mae": matched.mae,
        "bias": matched.bias,
        "ece": matched.ece,
        "ece_all": everything.ece,
    }


def _better_head_aps(quality: MaskQuality) -> dict[str, float]:
    """Mask AP if the predicted IoU were the true one, of some detections or of all."""
    scores, predicted = quality.scores["class_score"], quality.scores["predicted_iou"]
    found = quality.true_ious >= 0.5
    rankings = {
        "class score x predicted IoU": predicted,
        "the same, with the true IoU where that is at least 0.5": np.where(
            found, quality.true_ious, predicted
        ),
        "the same, with the true IoU where that is below 0.5": np.where(
            found, predicted, quality.true_ious
        ),
        "class score x true IoU": quality.true_ious,
    }
    ranking = quality.average_precision
    return {
        name: 100 * ranking.evaluate(scores * ious).numbers["AP"] for name, ious in rankings.items()
    }


def _better_heads(scoring: list[dict]) -> str:
    class_score = [n["ap"]["class_score"] for n in scoring]
    rows = [["class score alone", _spread(class_score, 1)]]
    for name in scoring[0]["better_heads"]:
        values = [n["better_heads"][name] for n in scoring]
        rows.append([name, _spread(values, 1)])
    rows.append(["true IoU (ceiling)", _spread([n["ap"]["true_iou"] for n in scoring], 1)])
    return tabulate(rows, ["masks ranked by", "mask AP"], "github", disable_numparse=True)


def _main_table(plain: list[dict], scoring: list[dict]) -> str:
    by_model = {"mask_rcnn": plain, "ms_rcnn": scoring}
    rows: list[tuple[str, Callable[[dict, str], Any], int]] = [
        ("box AP", lambda n, ranking: n["box_ap"] if ranking == "class_score" else None, 1),
        ("mask AP", lambda n, ranking: n["ap"][ranking], 1),
        *((f"AP{k}", lambda n, ranking, k=k: n[f"ap{k}"][ranking], 1) for k in THRESHOLDS),
        ("correlation with true IoU", lambda n, ranking: n["pearson"].get(ranking), 2),
        ("rank correlation with true IoU", lambda n, ranking: n["spearman"].get(ranking), 2),
        # The predicted IoU has its place with the mask score that it is a part of
        ("predicted IoU: calibration error", lambda n, r: _of_head(n, r, "ece"), 3),
        ("predicted IoU: mean absolute error", lambda n, r: _of_head(n, r, "mae"), 3),
    ]
    table = [
        [title, *(_spread([get(n, ranking) for n in by_model[m]], d) for _, m, ranking in COLUMNS)]
        for title, get, d in rows
    ]
    return tabulate(table, ["", *(title for title, *_ in COLUMNS)], "github", disable_numparse=True)


def _of_head(numbers: dict, ranking: str, which: str) -> float | None:
    return numbers["head"]["val"][which] if ranking == "mask_score" else None


def _claims(plain: list[dict], scoring: list[dict]) -> str:
    """Each with what was measured, and yes if that holds for every seed."""
    gains = {
        k: [n[f"ap{k}"]["mask_score"] - n[f"ap{k}"]["class_score"] for n in scoring]
        for k in THRESHOLDS
    }
    gain = [n["ap"]["mask_score"] - n["ap"]["class_score"] for n in scoring]
    predicted, class_score, mask_score = (
        [n["pearson"][name] for n in scoring]
        for name in ("predicted_iou", "class_score", "mask_score")
    )
    growth = [
        [
            f"the gain grows from IoU 0.{low} to 0.{high}",
            f"{_spread(gains[low], 2, True)}, {_spread(gains[high], 2, True)}",
            _answer(a < b for a, b in zip(gains[low], gains[high])),
        ]
        for low, high in zip(THRESHOLDS, THRESHOLDS[1:])
    ]
    rows = [
        ["mask scores raise mask AP", _spread(gain, 2, True), _answer(g > 0 for g in gain)],
        *growth,
        [
            "the predicted IoU correlates better with the true IoU than the class score does",
            f"{_spread(predicted, 2)} against {_spread(class_score, 2)}",
            _answer(p > c for p, c in zip(predicted, class_score)),
        ],
        [
            "the mask score correlates better with it, too",
            f"{_spread(mask_score, 2)} against {_spread(class_score, 2)}",
            _answer(m > c for m, c in zip(mask_score, class_score)),
        ],
    ]
    if plain:
        before, after = ([n["box_ap"] for n in runs] for runs in (plain, scoring))
        change = [b - a for a, b in zip(before, after)]
        # Ranking masks leaves boxes alone by definition; training the head might not
        text = f"{_spread(before, 1)} without the head, {_spread(after, 1)} with it; change "
        text += f"{_spread(change, 1, True)}"
        rows.append(["box AP does not change", text, _answer_on_change(change)])
    return tabulate(rows, ["claim", "measured", "holds"], "github", disable_numparse=True)


def _heads(scoring: list[dict]) -> str:
    titles = {"seen": "trained on", "holdout": "held out", "val": "val"}
    columns = {
        "correlation": "correlation",
        "mae": "mean absolute error",
        "bias": "mean error",
        "ece": "calibration error",
        "ece_all": "calibration error, all detections",
    }
    rows = [
        [title, *(_spread([n["head"][part][c] for n in scoring], 3) for c in columns)]
        for part, title in titles.items()
    ]
    return tabulate(rows, ["images", *columns.values()], "github", disable_numparse=True)


def _spread(values: list, digits: int, signed: bool = False) -> str:
    """Mean and standard deviation (n - 1) over seeds; a dash where a seed has none."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    if any(map(math.isnan, known)):
        return "–"
    center = f"{mean(known):{'+' if signed else ''}.{digits}f}"
    return f"{center} ± {stdev(known):.{digits}f}" if len(known) > 1 else center


def _answer_on_change(change: list[float]) -> str:
    """Few seeds cannot show that nothing changes, only that no change can be seen."""
    if len(change) < 2:
        return "one seed cannot tell"
    seen = abs(mean(change)) > 2 * stdev(change) / len(change) ** 0.5
    return "no" if seen else "yes, within 2 standard errors"


def _answer(holds) -> str:
    holds = list(holds)
    return {len(holds): "yes", 0: "no"}.get(sum(holds), f"for {sum(holds)} of {len(holds)} seeds")
