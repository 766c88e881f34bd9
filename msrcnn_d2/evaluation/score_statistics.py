"""How well scores agree with the true IoU: correlation, and calibration of predicted IoUs."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Bin", "expected_calibration_error", "mean", "pearson", "reliability", "spearman"]

NUM_BINS = 10


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """
    Pearson's correlation coefficient, in [-1, 1]: how well a straight line describes the relation
    of two variables. NaN for fewer than two values, or if one of the variables is constant.
    """
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """
    Spearman's correlation coefficient, in [-1, 1]: Pearson's coefficient of the ranks, where equal
    values share their mean rank. It depends only on the order. NaN where Pearson's is.
    """

    def ranks(values: np.ndarray) -> np.ndarray:
        _, groups, sizes = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(sizes) - (sizes - 1) / 2)[groups]

    return pearson(ranks(first), ranks(second))


@dataclass
class Bin:
    """
    The detections whose predicted IoU, or another score, lies in an interval.

    Attributes:
        low, high: the interval, without `high` except in the last bin.
        count: number of detections.
        predicted, true: mean predicted and mean true value, NaN without detections.
    """

    low: float
    high: float
    count: int
    predicted: float
    true: float


def reliability(predicted: np.ndarray, true: np.ndarray, num_bins: int = NUM_BINS) -> list[Bin]:
    """
    A reliability diagram (Niculescu-Mizil and Caruana, ICML 2005; Guo et al., ICML 2017) of a
    regression: the mean predicted value beside the mean true value, in bins of equal width over
    [0, 1].

    Args:
        predicted, true: N values each, in [0, 1], such as predicted and true IoUs, or a probability
            and 1 where it came true.
    """
    edges = np.arange(num_bins + 1) / num_bins
    bins = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, num_bins - 1)
    return [
        Bin(low, high, int(inside.sum()), mean(predicted[inside]), mean(true[inside]))
        for low, high, inside in zip(
            edges[:-1].tolist(), edges[1:].tolist(), (bins == k for k in range(num_bins))
        )
    ]


def expected_calibration_error(bins: list[Bin]) -> float:
    """
    The mean over all detections of |mean predicted - mean true| of their bin (Naeini et al., AAAI
    2015; Guo et al., ICML 2017, Eq. 3, with IoU in place of accuracy), in [0, 1]; NaN without
    detections. It is 0 if the predictions in each bin are right on average. The mean absolute error
    tells how far single predictions are off.
    """
    count = sum(b.count for b in bins)
    if not count:
        return float("nan")
    return sum(b.count * abs(b.predicted - b.true) for b in bins if b.count) / count


def mean(values: np.ndarray) -> float:
    """The mean; NaN without values."""
    return float(values.mean()) if len(values) else float("nan")
