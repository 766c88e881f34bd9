"""Which score is high enough: precision above every threshold, and where to accept or to drop."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from msrcnn_d2_runtime.ranking import NUM_PERCENTS, UNREACHED

from ..utils.errors import UserError

__all__ = [
    "Group",
    "OperatingPoint",
    "ThresholdCurve",
    "accept_thresholds",
    "min_count",
    "precision_interval",
]

MIN_COUNT = 20  # detections from which any precision is estimated
NUM_RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass
class Group:
    """
    The detections whose score lies in an interval.

    Attributes:
        count: number of detections.
        right: how many of them are right. Each has found another object.
        of_detections: `count` as a share of all detections, NaN if there are none.
        of_objects: `right` as a share of all objects, NaN if there are none.
        precision: right / count, NaN for an empty group.
        interval: the 95 % confidence interval of the precision, see :func:`precision_interval`.
    """

    count: int
    right: int
    of_detections: float
    of_objects: float
    precision: float
    interval: tuple[float, float]


@dataclass
class OperatingPoint:
    """
    Two thresholds on a score, and what they do with detections.

    Attributes:
        wanted: the precision that was asked for.
        accept: detections with this score or a higher one are accepted. None if no threshold
            reaches the wanted precision; then nothing is accepted.
        drop: detections with a lower score are dropped. None if nothing is dropped.
        accepted, between, dropped: the three groups of detections.
        highest: the highest precision that a threshold reaches, NaN if there are too few
            detections to tell.
        highest_at: this threshold, NaN without one.
    """

    wanted: float
    accept: float | None
    drop: float | None
    accepted: Group
    between: Group
    dropped: Group
    highest: float
    highest_at: float


class ThresholdCurve:
    """
    Precision and the share of objects found above each threshold on a score.

    Attributes:
        thresholds: T, ascending.
        counts: T, number of detections with at least that score.
        right: T, how many of these are right.
        precision: T, right / counts, NaN where there are no detections.
        found: T, right as a share of the objects, NaN if there are none.
        num_objects: number of objects.
    """

    def __init__(
        self,
        scores: np.ndarray,
        right: np.ndarray,
        images: np.ndarray,
        num_objects: int,
        thresholds: np.ndarray | None = None,
    ):
        """
        Args:
            scores: N finite numbers.
            right: N bools, whether each detection is right, see
                :func:`right_detections`.
            images: N ids, the image of each detection. Images without detections do not matter.
            num_objects: number of objects in all images.
            thresholds: T, ascending; by default every score that occurs.
        """
        self._scores, self._right = np.asarray(scores), np.asarray(right, dtype=bool)
        self._images = np.unique(images, return_inverse=True)[1].reshape(-1)
        self.num_objects = num_objects
        self.thresholds = np.unique(scores) if thresholds is None else np.asarray(thresholds)
        order = np.argsort(self._scores, kind="stable")
        below = np.searchsorted(self._scores[order], self.thresholds)  # also their number
        right_below = np.concatenate([[0], np.cumsum(self._right[order])])
        self.counts = len(order) - below
        self.right = right_below[-1] - right_below[below]
        self.precision = _ratio(self.right, self.counts)
        self.found = _ratio(self.right, np.full(len(below), num_objects))

    @cached_property
    def intervals(self) -> np.ndarray:
        """
        T x 2, the 95 % confidence interval of each precision, see :func:`precision_interval`. It
        takes memory for images x T numbers.
        """
        bins = np.searchsorted(self.thresholds, self._scores, side="right")
        shape = self._images.max(initial=-1) + 1, len(self.thresholds) + 1
        cells = self._images * shape[1] + bins

        def at_or_above(cells: np.ndarray) -> np.ndarray:
            in_bins = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
            return in_bins[:, ::-1].cumsum(axis=1)[:, -2::-1]

        return precision_interval(at_or_above(cells[self._right]), at_or_above(cells))

    def operating_point(self, precision: float = 0.95) -> OperatingPoint:
        """
        Choose where to accept detections, where to drop them, and what a person should look at.

        Only the curve's own `thresholds` are considered. *Accept* is the smallest one such that
        at least `precision` of the detections at or above it are right. *Drop* is the largest one
        such that at most 1 - `precision` of the detections below it are right. A threshold counts
        only with enough detections on that side, see :func:`min_count`. If drop would be above
        accept, it is set to accept, and nothing is left to look at.

        Both thresholds are chosen and measured on the same detections. The precision on new images
        tends to be a little lower; the interval shows how much is left to chance.

        Args:
            precision: between 0 and 1.
        """
        enough = self.counts >= min_count(precision)
        reached = np.flatnonzero(enough & (self.precision >= precision))
        accept = self.thresholds[reached[0]].item() if len(reached) else None

        num_below = len(self._scores) - self.counts
        right_below = int(self._right.sum()) - self.right
        # As many must be wrong as would have to be right: no rounding of 1 - precision
        wrong_below = _ratio(num_below - right_below, num_below)
        may_go = np.flatnonzero((num_below >= min_count(precision)) & (wrong_below >= precision))
        drop = self.thresholds[may_go[-1]].item() if len(may_go) else None
        if accept is not None and drop is not None:
            drop = min(accept, drop)

        is_accepted = np.zeros(len(self._scores), dtype=bool)
        is_dropped = is_accepted.copy()
        if accept is not None:
            is_accepted = self._scores >= accept
        if drop is not None:
            is_dropped = self._scores < drop
        if not is_dropped.any():  # accept may be so low that nothing is below it
            drop = None
        best = int(np.argmax(np.where(enough, self.precision, -1))) if enough.any() else None
        return OperatingPoint(
            wanted=precision,
            accept=accept,
            drop=drop,
            accepted=self._group(is_accepted),
            between=self._group(~is_accepted & ~is_dropped),
            dropped=self._group(is_dropped),
            highest=float("nan") if best is None else float(self.precision[best]),
            highest_at=float("nan") if best is None else float(self.thresholds[best]),
        )

    def _group(self, chosen: np.ndarray) -> Group:
        num_images = self._images.max(initial=-1) + 1
        counts = np.bincount(self._images[chosen], minlength=num_images)
        right = np.bincount(self._images[chosen & self._right], minlength=num_images)
        low, high = precision_interval(right, counts).tolist()
        of_detections, of_objects, precision = _ratio(
            np.array([counts.sum(), right.sum(), right.sum()]),
            np.array([len(chosen), self.num_objects, counts.sum()]),
        ).tolist()
        return Group(
            count=int(counts.sum()),
            right=int(right.sum()),
            of_detections=of_detections,
            of_objects=of_objects,
            precision=precision,
            interval=(low, high),
        )


def min_count(precision: float) -> int:
    """
    How many detections it takes to tell whether they have a precision: 20 or, for a high precision,
    as many as may contain a wrong one, such as 100 for 99 percent.

    Args:
        precision: between 0 and 1.

    Raises:
        UserError: it is not.
    """
    if not 0 < precision < 1:
        raise UserError(f"{precision} is no precision to ask for: give one between 0 and 1.")
    # 1 / (1 - 0.9995) is a little more than 2000
    return max(MIN_COUNT, math.ceil(1 / (1 - precision) - 1e-6))


def precision_interval(right: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    Confidence intervals of precisions, 95 %, by resampling images (the percentile bootstrap of
    Efron, 1979, with 1,000 resamples of a fixed seed). Images are drawn rather than detections,
    because detections of one image are not independent.

    Where all detections are right, or none, resampling says nothing. The interval then ends at the
    exact bound of Clopper and Pearson (1934) that counts each image as one trial.

    Args:
        right: I x ..., number of right detections in each image.
        counts: I x ..., number of detections in each image.

    Returns:
        ... x 2, lower and upper end; NaN where there are no detections.
    """
    num_images, shape = len(counts), counts.shape[1:]
    flat = num_images, math.prod(shape)
    right, counts = right.reshape(flat), counts.reshape(flat)
    total_right, total = right.sum(axis=0), counts.sum(axis=0)
    intervals = np.full((flat[1], 2), np.nan)
    tail = (1 - CONFIDENCE) / 2
    for all_are, column in ((total_right == total, 0), (total_right == 0, 1)):
        chosen = all_are & (total > 0)
        bound = tail ** (1 / np.maximum((counts > 0).sum(axis=0)[chosen], 1))
        intervals[chosen, column] = bound if column == 0 else 1 - bound
        intervals[chosen, 1 - column] = 1 - column
    mixed = (total_right > 0) & (total_right < total)
    if mixed.any():
        drawn = _resamples(num_images)
        resampled = _ratio(
            drawn @ right[:, mixed].astype(np.float32), drawn @ counts[:, mixed].astype(np.float32)
        )
        # A resample may have no detection above a high threshold; looking for that takes long
        ends = np.full((2, resampled.shape[1]), np.nan)
        for gaps, quantile in ((False, np.quantile), (True, np.nanquantile)):
            columns = np.isnan(resampled).any(axis=0) == gaps
            ends[:, columns] = quantile(resampled[:, columns], [tail, 1 - tail], axis=0)
        intervals[mixed] = ends.T
    return intervals.reshape(*shape, 2)


@lru_cache(maxsize=1)  # the curves of a report have the same images
def _resamples(num_images: int) -> np.ndarray:
    """NUM_RESAMPLES x images: how often each image is drawn, float32 for fast products."""
    drawn = np.random.default_rng(0).integers(num_images, size=(NUM_RESAMPLES, num_images))
    drawn += num_images * np.arange(NUM_RESAMPLES)[:, None]  # a row of counts for each resample
    counts = np.bincount(drawn.ravel(), minlength=drawn.size)
    return counts.reshape(drawn.shape).astype(np.float32)


def accept_thresholds(
    probs: np.ndarray, right: np.ndarray, counted: np.ndarray | None = None
) -> np.ndarray:
    """
    The thresholds from which detections can be accepted, for every precision that may be wanted.

    Args:
        probs: N x 10, P(the detection is right at an IoU of t), t = 0.50, 0.55, ..., 0.95.
        right: N x 10 bools, whether it is.
        counted: N x 10 bools, whether a detection counts at that IoU; by default all do.

    Returns:
        10 x 99, float32: for each IoU and for a precision of 1, 2, ..., 99 percent, the threshold
        that :meth:`ThresholdCurve.operating_point` accepts from; 2 where there is none.
    """
    probs = np.asarray(probs, dtype=np.float32)
    table = np.full((probs.shape[1], NUM_PERCENTS), UNREACHED, dtype=np.float32)
    wanted = np.arange(1, NUM_PERCENTS + 1) / 100
    needed = np.array([min_count(precision) for precision in wanted.tolist()])
    for row, column, is_right, counts in zip(
        table,
        probs.T,
        np.asarray(right, dtype=bool).T,
        np.ones(probs.T.shape, dtype=bool) if counted is None else np.asarray(counted).T,
    ):
        order = np.argsort(-column[counts], kind="stable")
        ranked = column[counts][order]
        precision = np.cumsum(is_right[counts][order]) / np.arange(1, len(ranked) + 1)
        # Of equal probabilities all are accepted, or none
        usable = np.append(ranked[1:] != ranked[:-1], True) if len(ranked) else np.zeros(0, bool)
        ends = np.flatnonzero(usable)[::-1]
        # The best that a rank or a later one reaches falls with the rank
        best_from_here = np.maximum.accumulate(precision[ends])
        last = np.append(ends, -1)[np.searchsorted(best_from_here, wanted)]  # -1: none reaches it
        reached = last + 1 >= needed
        row[reached] = ranked[last[reached]]
    return table


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)
