"""What several seeds of Mask R-CNN and Mask Scoring R-CNN say together, as tables."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from tabulate import tabulate

from measures import PRECISIONS

__all__ = ["TITLES", "tables"]

TITLES = {"mask_rcnn": "Mask R-CNN", "ms_rcnn": "Mask Scoring R-CNN"}
RETROFITS = {
    "mask_rcnn": "none",
    "retrofit_on_proposals": "from foreground proposals",
    "retrofit_on_detections": "from detections",
}
# The columns of the main table: title, model, ranking
COLUMNS = [
    ("Mask R-CNN", "mask_rcnn", "class_score"),
    ("MS R-CNN, by class score", "ms_rcnn", "class_score"),
    ("MS R-CNN, by mask score", "ms_rcnn", "mask_score"),
    ("ceiling, by true IoU", "ms_rcnn", "true_iou"),
]
THRESHOLDS = (50, 75, 90)
HEAD_COLUMNS = {
    "correlation": "correlation",
    "mae": "mean absolute error",
    "bias": "mean error",
    "ece": "calibration error",
    "ece_all": "calibration error, all detections",
}
# The scores of a model itself, and calibrated ones by what they were fitted to
SCORES = {
    "class_score": "class score",
    "mask_score": "mask score (the paper)",
    "train": "calibrated on training images",
    "holdout": "calibrated on held-out images",
    "true_iou": "true IoU (ceiling)",
}


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """
    Args:
        runs: what was measured of each model: its "model" and "seed", and the numbers of
            `measures.py`. At least one is of "ms_rcnn".

    Returns:
        Markdown.
    """
    by_model = {name: [r for r in runs if r["model"] == name] for name in TITLES | RETROFITS}
    retrofits = {name: of_model for name in RETROFITS if (of_model := by_model[name])}
    by_model = {name: by_model[name] for name in TITLES}
    runs = [r for of_model in by_model.values() for r in of_model]
    plain, scoring = by_model["mask_rcnn"], by_model["ms_rcnn"]
    by_model = {name: of_model for name, of_model in by_model.items() if of_model}
    parts = [
        ("Results on val", _main_table(plain, scoring)),
        ("What the paper claims", _claims(plain, scoring)),
        ("The MaskIoU head on images it was trained on, held-out ones and val", _heads(scoring)),
        ("What better predictions of the IoU would bring", _better_heads(scoring)),
        ("Calibrated scores", _calibrated(by_model)),
        ("Are the scores honest?", _honesty(by_model)),
        ("What holds for calibrated scores", _calibrated_claims(runs)),
        ("Do thresholds keep their word?", _precisions(by_model)),
        ("Which cues a calibrator needs", _cues(by_model)),
        ("How many images a calibrator needs", _amounts(by_model)),
    ]
    if "transfer" in runs[0]:
        parts.append(("Calibrators on images of another kind", _transfer(by_model)))
    if len(retrofits) > 1:
        parts.append(("What a head learns from that is trained afterwards", _retrofits(retrofits)))
        parts.append(("What its predictions are worth on val", _heads_of_retrofits(retrofits)))
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts) + "\n"


def own_ranking(rankings: dict) -> dict[str, float]:
    """The numbers of the score that a model ranks by without a calibrator."""
    return rankings.get("mask_score", rankings["class_score"])


def _calibrated(by_model: dict[str, list[dict]]) -> str:
    rows = []
    for model, runs in by_model.items():
        for name, title in SCORES.items():
            if name not in runs[0]["rankings"]:
                continue
            of_score = [r["rankings"][name] for r in runs]
            gains = [x["ap"] - own_ranking(r["rankings"])["ap"] for x, r in zip(of_score, runs)]
            rows.append(
                [
                    TITLES[model],
                    title,
                    *_aps(of_score, gains),
                    _spread([x.get("laece") for x in of_score], 3),
                    _spread([x.get("laece_iou") for x in of_score], 3),
                ]
            )
    headers = ["model", "masks ranked by", "mask AP", "gain", "AP50", "AP75", "% of the gap"]
    headers += ["LaECE_0", "LaECE_0 of the expected IoU"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def _aps(of_score: list[dict], gains: list[float]) -> list[str]:
    """The cells "mask AP", "gain", "AP50", "AP75" and "% of the gap" of a score in several runs."""
    return [
        _spread([x["ap"] for x in of_score], 2),
        _spread(gains, 2, True) if any(gains) else "",
        _spread([x["ap50"] for x in of_score], 1),
        _spread([x["ap75"] for x in of_score], 1),
        _spread([100 * x["gap_closed"] for x in of_score if "gap_closed" in x], 0),
    ]


def _retrofits(by_model: dict[str, list[dict]]) -> str:
    rows = []
    for name in ("class_score", "mask_score", "train", "true_iou"):
        for model, runs in by_model.items():
            if name not in runs[0]["rankings"]:
                continue
            if name in ("class_score", "true_iou") and model != "mask_rcnn":
                continue  # the masks and these scores are the same
            of_score = [r["rankings"][name] for r in runs]
            gains = [x["ap"] - r["rankings"]["class_score"]["ap"] for x, r in zip(of_score, runs)]
            rows.append([SCORES[name], RETROFITS[model], *_aps(of_score, gains)])
    headers = ["masks ranked by", "the head learned", "mask AP", "gain over class score"]
    headers += ["AP50", "AP75", "% of the gap"]
    return tabulate(rows, headers, "github", disable_numparse=True)


def _heads_of_retrofits(by_model: dict[str, list[dict]]) -> str:
    heads = {
        RETROFITS[model]: [r["head"]["val"] for r in runs]
        for model, runs in by_model.items()
        if "head" in runs[0]
    }
    rows = [
        [title, *(_spread([head[column] for head in of_model], 3) for column in HEAD_COLUMNS)]
        for title, of_model in heads.items()
    ]
    headers = ["the head learned", *HEAD_COLUMNS.values()]
    return tabulate(rows, headers, "github", disable_numparse=True)


def _honesty(by_model: dict[str, list[dict]]) -> str:
    keys = [f"{kind}{k}" for k in (50, 75) for kind in ("ece", "brier")]
    rows = [
        [
            TITLES[model],
            title,
            *(_spread([r["rankings"][name][key] for r in runs], 3) for key in keys),
        ]
        for model, runs in by_model.items()
        for name, title in SCORES.items()
        if name in runs[0]["rankings"] and name != "true_iou"
    ]
    headers = [
        f"P(IoU >= 0.{k}): {kind}"
        for k in (50, 75)
        for kind in ("calibration error", "Brier score")
    ]
    return tabulate(rows, ["model", "score", *headers], "github", disable_numparse=True)


def _calibrated_claims(runs: Sequence[dict]) -> str:
    rows = []
    for part in ("train", "holdout"):
        new = [r["rankings"][part] for r in runs]
        own = [own_ranking(r["rankings"]) for r in runs]
        gains = [n["ap"] - o["ap"] for n, o in zip(new, own)]
        rows.append(
            [
                f"{SCORES[part]}: mask AP is higher than by the model's own score",
                f"{min(gains):+.2f} to {max(gains):+.2f}",
                _answer((g > 0 for g in gains), "models"),
            ]
        )
        for key, title in (("laece", "LaECE_0"), ("laece_iou", "LaECE_0 of the expected IoU")):
            ratios = [n[key] / o["laece"] for n, o in zip(new, own)]
            rows.append(
                [
                    f"{SCORES[part]}: {title} is at most half of LaECE_0 of the model's own score",
                    f"{min(ratios):.2f} to {max(ratios):.2f} of it",
                    _answer((ratio <= 0.5 for ratio in ratios), "models"),
                ]
            )
    same_number = [next(x for x in r["amounts"] if x["part"] == "train") for r in runs]
    for claim, of_train in (
        ("training images are better than held-out ones", [r["rankings"]["train"] for r in runs]),
        ("the same, with as many training images as held-out ones", same_number),
    ):
        gains = [t["ap"] - r["rankings"]["holdout"]["ap"] for t, r in zip(of_train, runs)]
        answer = _answer((g > 0 for g in gains), "models")
        rows.append([claim, f"{_spread(gains, 2, True)} mask AP", answer])
    return tabulate(rows, ["claim", "measured", "holds"], "github", disable_numparse=True)


def _precisions(by_model: dict[str, list[dict]]) -> str:
    """The precision on val above the threshold for each precision that is wanted."""
    rows = []
    for model, runs in by_model.items():
        for part in ("train", "holdout"):
            for iou in runs[0]["precisions"][part]:
                reached = zip(*(r["precisions"][part][iou] for r in runs))
                cells = [_spread(list(of_runs), 0) for of_runs in reached]
                rows.append([TITLES[model], f"0.{iou[2:]}", SCORES[part], *cells])
    headers = ["model", "IoU", "score", *(f"{p} % wanted" for p in PRECISIONS)]
    return tabulate(rows, headers, "github", disable_numparse=True)


def _gain(run: dict, ap: float) -> float:
    return ap - own_ranking(run["rankings"])["ap"]


def _cues(by_model: dict[str, list[dict]]) -> str:
    rows = []
    for name in next(iter(by_model.values()))[0]["cues"]:
        row = [name]
        for model, runs in by_model.items():
            says_nothing = model == "mask_rcnn" and "predicted IoU" in name
            gains = [_gain(r, r["cues"][name]) for r in runs]
            row.append("" if says_nothing else _spread(gains, 2, True))
        rows.append(row)
    headers = ["a calibrator knows", *(f"{TITLES[m]}: gain" for m in by_model)]
    return tabulate(rows, headers, "github", disable_numparse=True)


def _amounts(by_model: dict[str, list[dict]]) -> str:
    fits = {name: [_fits(run) for run in runs] for name, runs in by_model.items()}
    everything = [of_run for runs in fits.values() for of_run in runs]
    rows = []
    for k, first in enumerate(everything[0]):
        of_fit = [of_run[k] for of_run in everything]
        rows.append(
            [
                {"holdout": "held-out images", "train": "training images"}[first["part"]],
                first["images"],
                round(mean(fit["detections"] for fit in of_fit)),
                *(_spread([of_run[k]["gain"] for of_run in x], 2, True) for x in fits.values()),
                f"{min(fit['gain'] for fit in of_fit):+.2f}",
                f"{sum(not fit['with_network'] for fit in of_fit)} of {len(of_fit)}",
                f"{min(fit['gain_with_network'] for fit in of_fit):+.2f}",
            ]
        )
    headers = [
        *("fitted to", "number", "detections", *(f"{TITLES[m]}: gain" for m in fits)),
        *("smallest gain", "models that keep their ranking", "smallest gain if none did"),
    ]
    return tabulate(rows, headers, "github", disable_numparse=True)


def _fits(run: dict) -> list[dict]:
    """A run's fits to few images and those to all, the smallest first."""
    fits = list(run["amounts"])
    for part, fit in run["fits"].items():
        ap = run["rankings"][part]["ap"]
        fits.append({**fit, "part": part, "ap": ap, "ap_with_network": ap})
    own = own_ranking(run["rankings"])["ap"]
    for k, fit in enumerate(fits):
        gains = {"gain": fit["ap"] - own, "gain_with_network": fit["ap_with_network"] - own}
        fits[k] = {**fit, **gains}
    return sorted(fits, key=lambda fit: (fit["part"], fit["images"]))


def _transfer(by_model: dict[str, list[dict]]) -> str:
    """For each group of images, what calibrators bring that were fitted to several groups."""
    first = next(iter(by_model.values()))[0]["transfer"]
    titles = {"train": "all training images", "other": "the other study's training images"}
    rows = []
    for group, rankings in first.items():
        for name in rankings.keys() - SCORES.keys() | {"train"}:
            row = [group, titles.get(name, f"{name} training images")]
            for runs in by_model.values():
                new = [r["transfer"][group][name] for r in runs]
                own = [own_ranking(r["transfer"][group]) for r in runs]
                errors, own_errors = (_spread([x["ece50"] for x in part], 3) for part in (new, own))
                gains = [n["ap"] - o["ap"] for n, o in zip(new, own)]
                row += [_spread(gains, 2, True), f"{errors} ({own_errors})"]
            rows.append(row)
    rows.sort(key=lambda row: (list(first).index(row[0]), row[1]))
    headers = ["used on", "fitted to"]
    for model in by_model:
        headers += [f"{TITLES[model]}: gain", "calibration error of P(IoU >= 0.50) (own score's)"]
    return tabulate(rows, headers, "github", disable_numparse=True)


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
    titles = {"train": "trained on", "holdout": "held out", "val": "val"}
    rows = [
        [title, *(_spread([n["head"][part][c] for n in scoring], 3) for c in HEAD_COLUMNS)]
        for part, title in titles.items()
    ]
    return tabulate(rows, ["images", *HEAD_COLUMNS.values()], "github", disable_numparse=True)


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


def _answer(holds: Iterable[bool], of: str = "seeds") -> str:
    holds = list(holds)
    return {len(holds): "yes", 0: "no"}.get(sum(holds), f"for {sum(holds)} of {len(holds)} {of}")
