"""Draw the figures of the report, which are readable on a phone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msrcnn_d2_runtime.fonts import drawable
from msrcnn_d2_runtime.scores import TITLES

from ..evaluation.mask_quality import MaskQuality
from ..evaluation.score_statistics import Bin

__all__ = ["Chart", "charts", "reliability_charts"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; lines differ in style as well
STYLES: dict[str, dict[str, Any]] = {
    "class_score": {"color": "#D55E00", "linestyle": "--"},
    "predicted_iou": {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    "mask_score": {"color": "#0072B2", "linestyle": "-"},
    "quality_score": {"color": "#009E73", "linestyle": "-."},
    "expected_iou": {"color": "#E69F00", "linestyle": (0, (2, 1))},
    "true_iou": {"color": "black", "linestyle": ":"},
}
# Of two lines that are no scores
MARKED: list[dict[str, Any]] = [
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
]
SIZE = (4.6, 4.0)  # inches; the report shows about a hundred pixels an inch
FONT_SIZE = 11
NUM_POINTS = 5000  # in a scatter plot; a random sample if there are more
NUM_CLASSES = 80  # with a bar; if there are more, those whose AP changes most
PR_THRESHOLDS = ("0.50", "0.75", "0.90")


@dataclass
class Chart:
    """
    Attributes:
        name: name of the file, without ".png".
        section: the section of the page that shows it.
        alt: a sentence for readers who cannot see the figure.
        figure: the drawing.
    """

    name: str
    section: str
    alt: str
    figure: Figure


def charts(quality: MaskQuality) -> Iterator[Chart]:
    """All figures of a report, in their order; fewer for a model with fewer scores."""
    for name in quality.scores:
        yield score_against_iou(quality, name)
    yield from reliability_charts(quality)
    yield ap_by_threshold(quality)
    curves = quality.precision_recall()
    for threshold in PR_THRESHOLDS:
        yield precision_recall(curves[threshold], threshold)
    yield ap_by_class(quality)


def score_against_iou(quality: MaskQuality, name: str) -> Chart:
    """The true IoU and a score of each matched detection, as in the first figure of the paper."""
    agreement = quality.overall.matched
    true, scores = quality.matched_ious[quality.matched], quality.scores[name][quality.matched]
    which = f"{len(true):,}"
    if len(true) > NUM_POINTS:
        which = f"{NUM_POINTS:,} of {which}"
        shown = np.random.default_rng(0).choice(len(true), NUM_POINTS, replace=False)
        true, scores = true[shown], scores[shown]
    figure, axes = _figure(f"true IoU ({which} matched detections)", TITLES[name])
    axes.plot([0.5, 1], [0.5, 1], color="0.4", linewidth=1, linestyle=":")
    alpha = float(np.clip(300 / max(len(true), 1), 0.15, 0.6))
    axes.scatter(true, scores, s=9, alpha=alpha, color="#0072B2", linewidths=0)
    axes.set(xlim=(0.5, 1), ylim=(0, max([1.01, *scores])))
    pearson, spearman = agreement.pearson[name], agreement.spearman[name]
    axes.set_title(f"{TITLES[name]}: correlation {pearson:.2f} (of ranks {spearman:.2f})")
    alt = f"Scatter plot of {TITLES[name]} against true IoU; Pearson correlation {pearson:.2f}."
    return Chart(f"iou_{name}", "scores", alt, figure)


def reliability_charts(quality: MaskQuality) -> Iterator[Chart]:
    """Of the predicted IoU, of all scores, and of a calibrator's probabilities; as far as known."""
    if "predicted_iou" in quality.scores:
        diagrams = {
            f"{name} detections ({sum(b.count for b in bins):,})": bins
            for name, bins in quality.reliability().items()
        }
        figure = _reliability(diagrams, MARKED, "predicted IoU", "mean true IoU")
        alt = "Mean true IoU against mean predicted IoU, in ten bins of the predicted IoU."
        yield Chart("reliability", "reliability", alt, figure)
    by_score = quality.reliability_of_scores()
    diagrams = {TITLES[name]: bins for name, bins in by_score.items()}
    looks = [{**STYLES[name], "marker": "o", "markersize": 4} for name in by_score]
    figure = _reliability(diagrams, looks, "score", "mean IoU, 0 of mistakes")
    alt = "Mean IoU, with 0 for mistakes, against the mean of each score, in ten bins of the score."
    yield Chart("reliability_of_scores", "honesty", alt, figure)
    diagrams = {f"IoU at least {t}": bins for t, bins in quality.reliability_of_probs().items()}
    if diagrams:
        figure = _reliability(diagrams, MARKED, "probability", "share of right masks")
        alt = "Share of right masks against the calibrator's probability that they are."
        yield Chart("reliability_of_probs", "honesty", alt, figure)


def _reliability(
    diagrams: dict[str, list[Bin]], looks: Sequence[dict[str, Any]], x_label: str, y_label: str
) -> Figure:
    """
    Draw mean true against mean predicted values, and the number of detections in each bin.

    Args:
        diagrams: {label: bins}.
        looks: how to draw each of them.
    """
    figure = Figure(figsize=(SIZE[0], SIZE[1] + 0.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle=":", label="right on average")
    thickness = 0.07 / len(diagrams)
    for k, ((label, bins), look) in enumerate(zip(diagrams.items(), looks)):
        filled = [b for b in bins if b.count]
        upper.plot([b.predicted for b in filled], [b.true for b in filled], label=label, **look)
        offset = thickness * (k - (len(diagrams) - 1) / 2)
        middles = [(b.low + b.high) / 2 + offset for b in bins]
        lower.bar(middles, [b.count for b in bins], thickness, color=look["color"])
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel=y_label)
    upper.legend(loc="upper left", frameon=False, fontsize=FONT_SIZE - 1)
    lower.set(xlabel=x_label, ylabel="detections")
    for axes in (upper, lower):
        _tidy(axes)
    return figure


def ap_by_threshold(quality: MaskQuality) -> Chart:
    figure, axes = _figure("IoU threshold", "mask AP (%)")
    parts = quality.by_threshold
    for name in quality.evaluations:
        axes.plot(
            [float(threshold) for threshold in parts],
            [part.ap[name] for part in parts.values()],
            label=f"ranked by {TITLES[name]}",
            **STYLES[name],
        )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=FONT_SIZE - 1)
    axes.set_title("AP at each IoU threshold")
    alt = "Mask AP against the IoU threshold, for each ranking."
    return Chart("ap_by_threshold", "ap", alt, figure)


def precision_recall(curves: dict[str, list[float]], threshold: str) -> Chart:
    """
    Args:
        curves: {ranking: 101 precisions}, from :meth:`MaskQuality.precision_recall`.
    """
    figure, axes = _figure("recall", "precision")
    for name in (n for n in curves if n != "true_iou"):
        recalls = np.linspace(0, 1, len(curves[name]))
        axes.plot(recalls, curves[name], label=f"by {TITLES[name]}", **STYLES[name])
    axes.set(xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(frameon=False, fontsize=FONT_SIZE - 1, loc="best")
    axes.set_title(f"Precision and recall at IoU {threshold}")
    alt = f"Precision against recall at an IoU threshold of {threshold}, for each ranking."
    return Chart(f"precision_recall_{threshold.replace('.', '')}", "ap", alt, figure)


def ap_by_class(quality: MaskQuality) -> Chart:
    """Bars of AP with a mark at the ceiling, and the class that gains most at the top."""
    parts = {name: p for name, p in quality.by_class.items() if p.ap["class_score"] >= 0}
    rankings = quality.rankings[::-1]  # bars go up from the bottom
    names = sorted(
        parts, key=lambda name: parts[name].ap[rankings[0]] - parts[name].ap["class_score"]
    )
    which = "each class"
    if len(names) > NUM_CLASSES:
        which = f"the {NUM_CLASSES} classes whose AP changes most"
        names = names[: NUM_CLASSES // 2] + names[-NUM_CLASSES // 2 :]
    figure, axes = _figure(f"mask AP (%) of {which}", "", height=1.3 + 0.4 * max(len(names), 2))
    thickness = 0.8 / max(len(rankings), 2)
    for k, ranking in enumerate(rankings):
        axes.barh(
            np.arange(len(names)) + thickness * (k - (len(rankings) - 1) / 2),
            [parts[name].ap[ranking] for name in names],
            thickness,
            color=STYLES[ranking]["color"],
            label=f"by {TITLES[ranking]}",
            hatch={"class_score": "//", "quality_score": ".."}.get(ranking),
            edgecolor="white",
        )
    ceilings = [parts[name].ap["true_iou"] for name in names]
    axes.plot(ceilings, range(len(names)), "k|", markersize=15, label="ceiling")
    # Names are plain text, even with a dollar sign
    labels, families = drawable(n if len(n) <= 16 else n[:15] + "…" for n in names)
    axes.set_yticks(range(len(names)), labels, parse_math=False, fontfamily=families)
    axes.set_ylim(-0.6, max(len(names), 2) - 0.4)
    axes.set_xlim(0, 1.02 * max([*ceilings, 1]))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1],
        labels[::-1],
        loc="outside upper center",
        ncols=len(labels) if len(labels) <= 3 else 2,
        frameon=False,
        fontsize=FONT_SIZE - 1,
        columnspacing=1,
        handlelength=1.2,
    )
    alt = f"Mask AP of {which} under each ranking as bars, with the ceiling as a mark."
    return Chart("ap_by_class", "classes", alt, figure)


def _figure(x_label: str, y_label: str, height: float | None = None) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIZE[0], height or SIZE[1]), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    _tidy(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    axes.xaxis.label.set_fontsize(FONT_SIZE)
    axes.yaxis.label.set_fontsize(FONT_SIZE)
    axes.title.set_fontsize(FONT_SIZE)
