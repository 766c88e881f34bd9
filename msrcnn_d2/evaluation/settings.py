"""Arguments of a COCO evaluator that would fail only after all images were predicted."""

import math
from collections.abc import Sequence

from detectron2.evaluation import COCOEvaluator

__all__ = ["check_settings"]

TASKS = ("bbox", "segm", "keypoints")
COCO_KEYPOINTS = 17


def check_settings(evaluator: COCOEvaluator, predicts_keypoints: bool) -> None:
    """
    Args:
        evaluator: of Detectron2, or one that is derived from it.
        predicts_keypoints: whether the model does.

    Raises:
        ValueError: `max_dets_per_image`, `tasks` or `kpt_oks_sigmas` has the wrong form, or the
            annotations have another number of keypoints than there are sigmas.
    """
    limit = evaluator._max_dets_per_image[-1]
    if type(limit) is not int or limit < 1:
        raise ValueError(f"max_dets_per_image is a whole number from 1 on, not {limit!r}.")
    tasks = evaluator._tasks
    if tasks is not None and (not _is_list(tasks) or not set(tasks) <= set(TASKS)):
        raise ValueError(f"tasks is a list of some of {', '.join(TASKS)}, not {tasks!r}.")
    if evaluator._do_evaluation:
        predicts_keypoints = "keypoints" in tasks if tasks is not None else predicts_keypoints
        _check_sigmas(evaluator._kpt_oks_sigmas, evaluator._coco_api.dataset, predicts_keypoints)


def _check_sigmas(sigmas, dataset: dict, predicts_keypoints: bool) -> None:
    if sigmas and not (_is_list(sigmas) and all(map(_is_positive, sigmas))):
        raise ValueError(f"kpt_oks_sigmas is a list of numbers above 0, not {sigmas!r}.")
    keypoints = next((a["keypoints"] for a in dataset["annotations"] if a.get("keypoints")), None)
    number = len(sigmas) if sigmas else COCO_KEYPOINTS
    if keypoints and (sigmas or predicts_keypoints) and len(keypoints) // 3 != number:
        raise ValueError(
            f"kpt_oks_sigmas has {number} numbers{'' if sigmas else ' by default'}, but objects "
            f"have {len(keypoints) // 3} keypoints: give one number for each."
        )


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_positive(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
