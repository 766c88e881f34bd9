"""The best checkpoint of a training, and when to stop because nothing gets better any more."""

import difflib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from msrcnn_d2_runtime.text import plural

from ..checkpoint import MaskScoringCheckpointer
from ..checkpoint.checkpointer import BEST
from ..checkpoint.reading import NotWeightsError, read_file
from ..utils.errors import UserError, agree_on_user_errors
from .configs import both_keys
from .evaluate import evaluators_in
from .hooks import VALIDATION
from .recipe import Recipe

__all__ = ["BestCheckpointer", "StoppedEarly", "check_metric"]

logger = logging.getLogger(__name__)

KEY = "train.best_checkpointer.val_metric"

# Results of COCO evaluators. There are none as long as the model detects nothing
COCO_TASKS = ("bbox", "segm", "segm_by_class_score", "boundary", "boundary_by_class_score")
OTHER_TASKS = ("keypoints", "mask_quality", VALIDATION)  # with other metrics than those
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def check_metric(recipe: Recipe, evaluators: Sequence[Any]) -> None:
    """
    Args:
        evaluators: of the recipe's test sets. If all are COCO's, the names of results are known.

    Raises:
        UserError: an evaluation will not have the result whose best checkpoint the recipe asks for.
    """
    wanted = recipe.val_metric
    task, _, metric = wanted.rpartition("/")
    of_all = [(t, x) for t, e in zip(recipe.test_sets, evaluators) for x in evaluators_in(e)]
    if not (wanted and of_all) or not all(isinstance(x, COCOEvaluator) for _, x in of_all):
        return  # a training may do without evaluations
    names = []
    for test_set, evaluator in of_all:
        prefix = f"{test_set}/" if len(recipe.test_sets) > 1 else ""
        number = len(COCO_TASKS) if getattr(evaluator, "_measures_boundaries", False) else 3
        names += [f"{prefix}{t}/{m}" for t in COCO_TASKS[:number] for m in COCO_METRICS]
    is_of_class = metric.startswith("AP-") or metric.endswith("@100")
    if wanted in names or (is_of_class and f"{task}/AP" in names) or task.endswith(OTHER_TASKS):
        return
    nearest = difflib.get_close_matches(wanted, names, n=2)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"it has {', '.join(names)}."
    raise UserError(f"{both_keys(KEY)}: the evaluation has no '{wanted}'; {hint}")


class StoppedEarly(BaseException):
    """
    Ends the loop of a trainer as if it were done. Not an Exception, which Detectron2 would log as
    a failure.
    """


class BestCheckpointer(HookBase):
    """
    Keeps the checkpoint with the best result of an evaluation as "model_best.pth", and ends the
    training after `patience` evaluations without gain, with "model_final.pth".

    Detectron2's `BestCheckpointer` forgets the best result when a training is resumed. Here all
    results are a part of each checkpoint. The file of an interrupted training stays as long as
    nothing is better, also if that training was ahead of the checkpoint that is resumed.

    Attributes:
        history: the result of each evaluation, by the iteration that was done last; NaN if there
            is none.
    """

    def __init__(
        self,
        checkpointer: MaskScoringCheckpointer,
        val_metric: str = "",
        mode: str = "max",
        patience: int = 0,
        min_delta: float = 0.0,
    ):
        """
        Args:
            checkpointer: writes the files, on the main process.
            val_metric: name of the result, such as "segm/AP"; "" to keep no best checkpoint.
            mode: "max" if more is better, "min" if less is.
            patience: evaluations without gain after which the training ends; 0 to go on.
            min_delta: by how much a result has to be better than the best one before to count as
                gain for `patience`.
        """
        self.history: dict[int, float] = {}
        self._checkpointer = checkpointer
        self._val_metric = val_metric
        self._mode = mode
        self._patience = patience
        self._min_delta = min_delta
        self._path = os.path.join(checkpointer.save_dir, f"{BEST}.pth")
        self._in_file: dict[int, float] = {}  # what the file contains, as in `history`
        self._stops = False

    def state_dict(self) -> dict:
        return {"val_metric": self._val_metric, "mode": self._mode, "history": self.history}

    def load_state_dict(self, state_dict: dict) -> None:
        self.history.clear()
        self.history.update(self._history_in(state_dict))
        if state_dict["val_metric"] and not self.history and state_dict["history"]:
            logger.warning(
                "The evaluations so far looked for the best %s (%s). They do not count.",
                *(state_dict["val_metric"], state_dict["mode"]),
            )

    def _history_in(self, state_dict: Mapping[str, Any]) -> dict[int, float]:
        """The results in a checkpoint; none if they are of another metric."""
        is_same = (state_dict["val_metric"], state_dict["mode"]) == (self._val_metric, self._mode)
        return dict(state_dict["history"]) if is_same else {}

    def before_train(self) -> None:
        if comm.is_main_process() and self._val_metric:
            self._look_at_file()
        # A checkpoint has the result of its own iteration only if the training ended with it:
        # others are written before their evaluation
        last = self.trainer.start_iter - 1
        if last in self.history and self._num_without_gain() >= self._patience > 0:
            self._stops = True
            logger.info(
                "This training has stopped early, after iteration %d: there is nothing to do.", last
            )

    def _look_at_file(self) -> None:
        """
        Find out what the interrupted training has left. It may have been ahead of the checkpoint
        that was resumed. Then a repetition gives the same file, or the better one stays.
        """
        best = self.best()
        if os.path.exists(self._path):
            try:
                states = read_file(self._path)["trainer"]["hooks"]
                history = self._history_in(states[type(self).__qualname__])
            except (NotWeightsError, KeyError, TypeError):
                logger.warning("'%s' is not of this training, or damaged.", self._path)
            else:
                self._in_file = dict(sorted(history.items())[-1:])
        if best and dict([best]) != self._in_file and self.best() == best:
            logger.warning(
                "'%s' lacks the best result so far (%s %.5g, after iteration %d). The next better "
                "one is written there.",
                *(self._path, self._val_metric, best[1], best[0]),
            )
        for iteration, result in self._in_file.items():
            if iteration not in self.history:
                logger.info(
                    "'%s' stays until there is a better one: it has %s %.5g, after iteration %d of "
                    "the training that was interrupted.",
                    *(self._path, self._val_metric, result, iteration),
                )

    def best(self) -> tuple[int, float] | None:
        """Iteration and result of the best evaluation, the earliest of equals; None if none."""
        results = [*self._in_file.items(), *sorted(self.history.items())]
        finite = [(k, v) for k, v in results if math.isfinite(v)]
        choose = max if self._mode == "max" else min
        return choose(finite, key=lambda x: x[1], default=None)

    def _num_without_gain(self) -> int:
        """Evaluations since the last gain. They count from the first one that has a result."""
        reference, count = math.nan, 0
        for _, result in sorted(self.history.items()):
            gain = result - reference if self._mode == "max" else reference - result
            if gain > self._min_delta or math.isnan(reference):
                reference, count = result, 0
            else:
                count += 1
        return count

    def update(self, results: Mapping[str, Any]) -> None:
        """
        Take the results of an evaluation after the trainer's iteration. All processes call it.

        Args:
            results: {task: {metric: value}}, on the main process.

        Raises:
            UserError: the metric is not among the results, or a checkpoint cannot be written.
        """
        with agree_on_user_errors():
            if comm.is_main_process():
                self._update(flatten_results_dict(results))
        self.history[self.trainer.iter], self._stops = comm.all_gather(
            (self.history.get(self.trainer.iter), self._stops)
        )[0]

    def _update(self, results: Mapping[str, float]) -> None:
        iteration, best = self.trainer.iter, self.best()
        if not self._val_metric:
            self.history[iteration] = math.nan
            return
        result = self._find(results)
        self.history[iteration] = result
        text = f"{self._val_metric} after iteration {iteration}: {result:.5g}"
        if self.best() != best:
            text += ", the best so far"
            self._checkpointer.save(BEST, iteration=iteration)
            self._in_file = {iteration: result}
        elif best is not None:
            text += f". The best so far: {best[1]:.5g} after iteration {best[0]}"
        count = self._num_without_gain()
        if self._patience and count:
            text += f" ({plural(count, 'evaluation')} of {self._patience} without gain)"
        logger.info("%s.", text)
        if count >= self._patience > 0 and iteration + 1 < self.trainer.max_iter:
            self._stops = True
            self._checkpointer.save("model_final", iteration=iteration)
            logger.info("The training stops early.")

    def _find(self, results: Mapping[str, float]) -> float:
        name = self._val_metric
        if name in results:
            return float(results[name])
        task = name.rpartition("/")[0]
        is_there = any(key.rpartition("/")[0] == task for key in results)
        if is_there or task.rpartition("/")[2] not in COCO_TASKS + OTHER_TASKS:
            raise UserError(
                f"{both_keys(KEY)}: the evaluation has no result '{name}'; it has "
                f"{', '.join(results) or 'none'}."
            )
        logger.warning(
            "There is no %s: the model detects nothing, or the evaluator does not compute it.", name
        )
        return math.nan

    def before_step(self) -> None:
        if self._stops:
            # This is how hooks recognise a training that has not failed
            self.trainer.max_iter = self.trainer.iter
            raise StoppedEarly

    def log_summary(self) -> None:
        """Log the best result; on the main process, when the training is done."""
        best = self.best()
        if best and dict([best]) == self._in_file:
            logger.info(
                "Best %s: %.5g, after iteration %d: '%s'.",
                *(self._val_metric, best[1], best[0], self._path),
            )
